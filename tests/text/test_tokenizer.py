"""Text survives encoding, markers are what the caller says they are, and bad files are named."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fourfold.core.errors import ConfigError, RequestError
from fourfold.text.tokenizer import Tokenizer
from fourfold.weights.synthetic_tokenizer import SPECIAL_TOKENS, tokenizer_files

RELEASED_VOCABULARY = 129_280
SPELLINGS = [spelling for spelling, _ in SPECIAL_TOKENS]


def files(vocab_size: int) -> dict[str, Any]:
    return tokenizer_files(vocab_size, 4096)


def of_size(vocab_size: int) -> Tokenizer:
    return Tokenizer(files(vocab_size)["tokenizer.json"], "tokenizer.json")


TINY = of_size(640)
RELEASED = of_size(RELEASED_VOCABULARY)
BOTH = pytest.mark.parametrize("tokenizer", [TINY, RELEASED], ids=["tiny", "released"])

texts = st.lists(st.text() | st.sampled_from(SPELLINGS)).map("".join)


@given(texts, st.booleans())
@example("你好，世界。The capital of France is Paris. 🙂\r\n\t\x00 naïve", True)
@example(" leading and trailing ", False)
@example("<think><｜User｜>hi</think>", True)
def test_every_text_comes_back(text: str, allow_special: bool) -> None:
    for tokenizer in (TINY, RELEASED):
        ids = tokenizer.encode(text, allow_special=allow_special)
        assert tokenizer.decode(ids) == text
        assert set(ids) <= tokenizer.known_ids()


@given(texts)
def test_plain_text_never_becomes_a_marker(text: str) -> None:
    assert not set(TINY.encode(text)) & set(TINY.special_tokens.values())


@BOTH
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_marker_is_one_token_only_where_allowed(tokenizer: Tokenizer, spelling: str) -> None:
    text = f"a{spelling} b"
    marker = tokenizer.special_id(spelling)
    allowed = tokenizer.encode(text, allow_special=True)
    plain = tokenizer.encode(text)
    assert allowed.count(marker) == 1
    assert marker not in plain
    assert len(plain) > len(allowed)
    assert tokenizer.decode(plain) == tokenizer.decode(allowed) == text


def test_released_ids() -> None:
    found = {spelling: RELEASED.special_id(spelling) for spelling in SPELLINGS}
    assert found["<｜begin▁of▁sentence｜>"] == 0
    assert found["<｜end▁of▁sentence｜>"] == 1
    assert found["<｜User｜>"] == 128_803
    assert found["<think>"] == 128_821
    assert found["｜DSML｜"] == 128_825
    assert found["<｜read_url｜>"] == 128_845
    assert found == dict(SPECIAL_TOKENS)


@pytest.mark.parametrize("vocab_size", [280, 281, 640, 1024, 128_845])
def test_compact_ids_fit_the_vocabulary(vocab_size: int) -> None:
    tokenizer = of_size(vocab_size)
    assert sorted(tokenizer.special_tokens.values()) == list(range(len(SPELLINGS)))
    assert max(tokenizer.known_ids()) < vocab_size - 3
    assert tokenizer.vocab_size == len(tokenizer.known_ids()) == max(tokenizer.known_ids()) + 1
    assert tokenizer.decode(tokenizer.encode("any text, 任何文字")) == "any text, 任何文字"


def test_ids_without_an_entry_are_known_as_such() -> None:
    known = RELEASED.known_ids()
    assert len(known) == RELEASED.vocab_size < 1000
    assert not {5_000, 128_805, 129_279} & known
    for tokenizer, unknown in ((RELEASED, 5_000), (TINY, 639), (TINY, -1)):
        with pytest.raises(RequestError, match=f"token id {unknown} has no entry"):
            tokenizer.decode([3, unknown])


def test_merges_shorten_both_languages() -> None:
    assert len(TINY.encode("The capital of France is Paris")) < 15
    assert len("今天的天气很好".encode()) > 1.5 * len(TINY.encode("今天的天气很好"))


def test_nothing_is_inserted() -> None:
    assert TINY.encode("") == TINY.encode("", allow_special=True) == []
    config = files(640)["tokenizer_config.json"]
    assert config["add_bos_token"] is config["add_eos_token"] is False
    assert config["eos_token"] == config["pad_token"] == "<｜end▁of▁sentence｜>"
    assert "chat_template" not in config


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(RequestError, match="character 2"):
        TINY.encode("ab\ud800")


def test_an_unknown_marker_is_named() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json has no special token <\|User\|>"):
        TINY.special_id("<|User|>")


def test_truncation_and_padding_of_the_file_are_not_applied() -> None:
    data = files(640)["tokenizer.json"]
    data["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    data["padding"] = {
        "strategy": {"Fixed": 30},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 2,
        "pad_type_id": 0,
        "pad_token": "<｜▁pad▁｜>",
    }
    text = "one two three four"
    assert Tokenizer(data, "x").encode(text) == TINY.encode(text)


def test_added_tokens_that_are_not_special_stay_text_too() -> None:
    data = files(640)["tokenizer.json"]
    for token in data["added_tokens"]:
        token["special"] = False
    tokenizer = Tokenizer(data, "x")
    marker = tokenizer.special_id("<think>")
    assert marker not in tokenizer.encode("<think>")
    assert tokenizer.encode("<think>", allow_special=True) == [marker]
    assert tokenizer.decode([marker]) == "<think>"


def corrupt(**changes: Any) -> str:
    return json.dumps(files(640)["tokenizer.json"] | changes)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is missing"),
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object, found list"),
        ("[" * 100_000, "is not valid JSON"),
        ("{}", "model.type must be 'BPE', found None"),
        (corrupt(model={"type": "Unigram"}), "model.type must be 'BPE', found 'Unigram'"),
        (corrupt(decoder=None), "decoder.type must be 'ByteLevel', found None"),
        (corrupt(model={"type": "BPE"}), "is not a usable tokenizer"),
        (corrupt(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]]}), "not a usable"),
        (corrupt(added_tokens=7), "is not a usable tokenizer"),
        (corrupt(pre_tokenizer={"type": "Mystery"}), "is not a usable tokenizer"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as error:
        Tokenizer.from_directory(tmp_path)
    assert str(path) in str(error.value)
    assert words in str(error.value)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        Tokenizer.from_directory(tmp_path)


def test_a_marker_whose_id_the_library_would_change_is_refused() -> None:
    data = files(640)["tokenizer.json"]
    token = next(t for t in data["added_tokens"] if t["content"] == "<think>")
    token["id"] = 600
    with pytest.raises(ConfigError, match="added token <think> must get id 600"):
        Tokenizer(data, "x")


def test_transformers_reads_the_same_tokens(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for name, document in files(RELEASED_VOCABULARY).items():
        (tmp_path / name).write_text(json.dumps(document))
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "<｜begin▁of▁sentence｜><｜User｜>你好, Paris<｜Assistant｜></think>"
    ids = Tokenizer.from_directory(tmp_path).encode(text, allow_special=True)
    assert peer.encode(text) == ids
    assert peer.decode(ids) == text


@pytest.mark.parametrize("allow_special", [False, True])
def test_long_texts_have_the_same_tokens(
    allow_special: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They go another way through the library."""
    text = "The capital, 你好 <think>🙂</think>\n" * 600
    ids = TINY.encode(text, allow_special)
    monkeypatch.setattr("fourfold.text.tokenizer._LONG", 1 << 30)
    assert TINY.encode(text, allow_special) == ids
