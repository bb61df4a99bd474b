"""Streamed text equals the text decoded at once, and never shows part of a character."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourfold.core.errors import RequestError
from fourfold.text.detokenize import IncrementalDetokenizer
from fourfold.text.tokenizer import Tokenizer
from fourfold.weights.synthetic_tokenizer import tokenizer_files

TOKENIZER = Tokenizer(tokenizer_files(640, 4096)["tokenizer.json"], "tokenizer.json")
KNOWN = sorted(TOKENIZER.known_ids())


def stream(ids: list[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    return [*map(detokenizer.push, ids), detokenizer.finish()]


@given(st.lists(st.sampled_from(KNOWN)))
def test_random_ids_stream_like_they_decode(ids: list[int]) -> None:
    whole = b"".join(map(TOKENIZER.token_bytes, ids)).decode("utf-8", errors="replace")
    assert "".join(stream(ids)) == TOKENIZER.decode(ids) == whole


@given(st.text(), st.booleans())
def test_text_streams_without_replacement_characters(text: str, allow_special: bool) -> None:
    pieces = stream(TOKENIZER.encode(text, allow_special))
    assert "".join(pieces) == text
    assert pieces[-1] == ""


def test_a_character_comes_with_its_last_byte() -> None:
    first, *rest = [index for byte in "🙂".encode() for index in KNOWN if is_byte(index, byte)]
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    assert [detokenizer.push(index) for index in (first, *rest)] == ["", "", "", "🙂"]
    assert detokenizer.push(first) == ""
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""


def test_a_broken_character_is_replaced_when_it_can_no_longer_be_completed() -> None:
    (lead,) = [index for index in KNOWN if is_byte(index, 0xE4)]
    (letter,) = TOKENIZER.encode("a")
    marker = TOKENIZER.special_id("<｜User｜>")
    assert stream([lead, letter]) == ["", "\ufffda", ""]
    assert stream([lead, marker]) == ["", "\ufffd<｜User｜>", ""]
    assert stream([lead, lead]) == ["", "\ufffd", "\ufffd"]


def test_an_unknown_id_is_refused_and_changes_nothing() -> None:
    (lead,) = [index for index in KNOWN if is_byte(index, 0xE4)]
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    detokenizer.push(lead)
    with pytest.raises(RequestError, match="639"):
        detokenizer.push(639)
    assert detokenizer.finish() == "\ufffd"


def is_byte(index: int, byte: int) -> bool:
    return TOKENIZER.token_bytes(index) == bytes([byte])
