"""Grammars: what they let through at every position, and that no source can hurt who reads it."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llguidance import LLParserLimits

from fourfold.core.errors import RequestError
from fourfold.core.request import Grammar, Request, SamplingParams, StructuredOutputsParams
from fourfold.text import grammar_check, grammar_mask
from fourfold.text.grammar import MAX_SCHEMA_DEPTH, check_source, choice_source, response_grammar
from fourfold.text.grammar_check import GrammarChecker, GrammarsBusyError
from fourfold.text.grammar_mask import GrammarMask, GrammarMasks, MaskRows, bit_row
from fourfold.text.tokenizer import Tokenizer
from fourfold.weights.synthetic_tokenizer import tokenizer_files

SIZE, EOS = 901, 1
TOKENIZER = Tokenizer(tokenizer_files(900, 4096)["tokenizer.json"], "tokenizer.json")
KNOWN = TOKENIZER.known_ids()
END_THINK = TOKENIZER.special_id("</think>")
BYTES = {TOKENIZER.token_bytes(t): t for t in sorted(KNOWN, reverse=True)}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "ok": {"type": "boolean"}},
    "required": ["name", "ok"],
    "additionalProperties": False,
}
JSON = Grammar("json_schema", json.dumps(SCHEMA))
CHOICES = ["yes", 'a "no"\\', "你好", "x\ty\nz", "é\x7f\x85\u2028", "😀", "\x00"]


@pytest.fixture(scope="module")
def masks() -> GrammarMasks:
    return GrammarMasks(TOKENIZER, SIZE, EOS)


def ids(row: MaskRows) -> list[int]:
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()


def walk(mask: GrammarMask, seed: int, most: int = 400) -> list[int]:
    """A random answer that a mask allows, its end included."""
    rng, tokens = random.Random(seed), []
    while len(tokens) < most and tokens[-1:] != [EOS]:
        (row,) = mask.allowed(())
        assert row.dtype == np.int32
        allowed = ids(row)
        assert allowed
        assert set(allowed) <= KNOWN
        tokens.append(rng.choice(allowed))
        mask.commit(tokens[-1:])
        assert mask.failure is None
    return tokens


def text(tokens: list[int]) -> str:
    assert tokens[-1] == EOS
    return b"".join(map(TOKENIZER.token_bytes, tokens[:-1])).decode()  # whole characters only


def is_object(answer: str) -> bool:
    return isinstance(json.loads(answer), dict)


def fits(answer: str) -> bool:
    found = json.loads(answer)
    return set(found) == {"name", "ok"} and isinstance(found["ok"], bool) and len(found["name"]) < 9


@pytest.mark.parametrize(
    ("grammar", "holds"),
    [
        (JSON, fits),
        (Grammar("regex", r"[ab]{3}-\d{2}é?"), lambda t: re.fullmatch(r"[ab]{3}-\d{2}é?", t)),
        (Grammar("choice", json.dumps(CHOICES)), CHOICES.__contains__),
        (Grammar("lark", 'start: "x" start | "y"'), lambda t: re.fullmatch("x*y", t)),
        (Grammar("lark", 'start: <think> "a" %json {"type": "null"}'), "<think>anull".__eq__),
    ],
)
def test_every_walk_through_a_grammar_is_in_it(
    masks: GrammarMasks, grammar: Grammar, holds: Callable[[str], Any]
) -> None:
    answers = [text(walk(masks(grammar, SIZE), seed)) for seed in range(40)]
    assert all(map(holds, answers)), answers
    if grammar.kind == "choice":
        assert set(answers) == set(CHOICES)


def test_any_object(masks: GrammarMasks) -> None:
    ended = [tokens for seed in range(20) if (tokens := walk(masks(OBJECT, SIZE), seed))[-1] == EOS]
    assert ended
    assert all(is_object(text(tokens)) for tokens in ended)


OBJECT = Grammar("json_object", "")


def spelled(answer: str) -> list[int]:
    """Byte by byte: every character of several bytes is split."""
    return [BYTES[bytes([byte])] for byte in answer.encode()]


def test_characters_may_be_split_between_tokens(masks: GrammarMasks) -> None:
    mask = masks(Grammar("choice", json.dumps(["你好", "我好", "你们"])), SIZE)
    for token in spelled("你好"):
        found = [TOKENIZER.token_bytes(t)[:1] for t in ids(mask.allowed(())[0])]
        assert TOKENIZER.token_bytes(token) in found
        mask.commit([token])
    assert ids(mask.allowed(())[0]) == [EOS]
    # Half a character is no end, and in JSON nothing but its other half may follow.
    mask = masks(JSON, SIZE)
    mask.commit(spelled('{"name":"你')[:-1])
    following = {TOKENIZER.token_bytes(t)[:1] for t in ids(mask.allowed(())[0])}
    assert following <= {bytes([b]) for b in range(0x80, 0xC0)}


def test_text_spells_no_special_token(masks: GrammarMasks) -> None:
    mask = masks(JSON, SIZE)
    mask.commit(spelled('{"name":"'))
    allowed = set(ids(mask.allowed(())[0]))
    assert len(allowed) > 300
    assert not allowed & set(TOKENIZER.special_tokens.values())


def test_ids_that_nothing_is_known_of_are_never_allowed(masks: GrammarMasks) -> None:
    mask = masks(Grammar("lark", 'start: <[*]> "z"'), SIZE)
    allowed = ids(mask.allowed(())[0])
    assert set(allowed) <= KNOWN < set(range(SIZE))
    assert len(allowed) > 600
    mask = masks(Grammar("lark", f'start: "z" <[{min(set(range(SIZE)) - KNOWN)}]>'), SIZE)
    mask.commit(spelled("z"))
    assert (mask.allowed(())[0] == -1).all()  # never empty; what is sampled there cannot stand
    mask.commit(spelled("z"))
    assert mask.failure == "the grammar does not lead on: no token fits"


def test_blanks_are_bounded(masks: GrammarMasks) -> None:
    mask = masks(OBJECT, SIZE)
    mask.commit(spelled("{" + " " * 64))
    assert not any(TOKENIZER.token_bytes(t).startswith(b" ") for t in ids(mask.allowed(())[0]))


# ---- drafts, and the reasoning before


@pytest.mark.parametrize("after", [None, END_THINK])
@pytest.mark.parametrize("grammar", [JSON, Grammar("lark", 'start: ("ab" | /c+d/)* "."')])
def test_rows_after_drafts_are_those_after_committing_them(
    masks: GrammarMasks, grammar: Grammar, after: int | None
) -> None:
    grammar = Grammar(grammar.kind, grammar.source, after)
    for seed in range(6):
        head = [] if after is None else [40, 41, END_THINK]
        whole = [*head, *walk(masks(Grammar(grammar.kind, grammar.source), SIZE), seed), EOS, EOS]
        reference, rows = masks(grammar, SIZE), []
        for token in whole:
            rows.append(reference.allowed(())[0])
            reference.commit([token])
        mask, rng, at = masks(grammar, SIZE), random.Random(seed), 0
        while at < len(whole):
            right = whole[at : at + rng.randrange(4)]
            wrong = [next(t for t in range(2, SIZE) if _wrong(t, rows[at : at + 4]))]
            found = mask.allowed([*right, *wrong, 7])
            expected = rows[at : at + len(right) + 1]
            assert np.array_equal(found[: len(expected)], expected)
            if after is None or at > 2:
                assert (found[len(right) + 1 :] == -1).all()
            mask.commit(whole[at : at + len(right) + 1])
            at += len(right) + 1


def _wrong(token: int, rows: list[MaskRows]) -> bool:
    """A token that no row allows, unless the row is of the free part."""
    return all(_is_free(row) or token not in ids(row) for row in rows)


def _is_free(row: MaskRows) -> bool:
    """Whether a row allows everything but an end."""
    return set(range(32 * len(row))) - set(ids(row)) <= {EOS}


def test_a_grammar_is_armed_by_its_token_alone(masks: GrammarMasks) -> None:
    mask = masks(Grammar(JSON.kind, JSON.source, END_THINK), SIZE)
    first = masks(JSON, SIZE).allowed(())[0]
    mask.commit(spelled("no JSON yet </think> {"))
    rows = mask.allowed([5, END_THINK, BYTES[b"{"], END_THINK])
    assert [_is_free(row) for row in rows] == [True, True, False, False, True]
    assert EOS not in ids(rows[0])
    assert np.array_equal(rows[2], first)
    assert _is_free(mask.allowed(())[0])  # those were drafts
    mask.commit([END_THINK])
    assert np.array_equal(mask.allowed(())[0], first)


def test_only_the_end_follows_the_end(masks: GrammarMasks) -> None:
    mask = masks(Grammar("choice", '["a"]'), SIZE)
    only = bit_row([EOS], SIZE)
    rows = mask.allowed([BYTES[b"a"], EOS, EOS, 5])
    assert np.array_equal(rows[1:4], [only] * 3)
    assert (rows[4] == -1).all()
    mask.commit([BYTES[b"a"], EOS])
    assert np.array_equal(mask.allowed([EOS]), [only] * 2)
    mask.commit([EOS, EOS])
    assert mask.failure is None


def test_an_end_inside_a_grammar_is_none(masks: GrammarMasks) -> None:
    """A lexeme that the end of an answer could stop does not end the answer."""
    mask = masks(Grammar("lark", 'start: a "z"\na[stop=""]: /[a-c]+/'), SIZE)
    mask.commit(spelled("a"))
    assert EOS not in ids(mask.allowed(())[0])
    assert text(walk(mask, 3)).endswith("z")


# ---- limits while an answer is made


def tight() -> LLParserLimits:
    return LLParserLimits(
        max_lexer_states=200, precompute_large_lexemes=False, verbose_errors=False
    )


def test_a_grammar_that_becomes_too_much_fails_where_it_does(
    masks: GrammarMasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_mask, "parser_limits", tight)
    fresh = GrammarMasks(TOKENIZER, SIZE, EOS)
    grammar = Grammar("regex", "x*(a|b)*a(a|b){200}")
    tokens = spelled("xx" + "abbaabab" * 40)
    mask, at = fresh(grammar, SIZE), 0
    while mask.failure is None:
        (row,) = mask.allowed(())
        assert row.any()
        mask.commit(tokens[at : at + 1])
        at += 1
    assert 2 < at < len(tokens)
    assert "states" in mask.failure
    # A draft that comes to it does no harm where it does not stand, nor does another's failure.
    mask, other = fresh(grammar, SIZE), fresh(grammar, SIZE)
    rows = mask.allowed(tokens)
    assert (rows[-1] == -1).all()
    mask.commit([BYTES[b"x"]])
    other.commit([BYTES[b"x"]])
    assert np.array_equal(mask.allowed(())[0], other.allowed(())[0])
    for answer in (mask, other):
        assert answer.failure is None
        answer.allowed(tokens[1:])
        answer.commit(tokens[1:])
        assert answer.failure is not None


# ---- what is refused

DEEP = '{"items":' * MAX_SCHEMA_DEPTH + "{}" + "}" * MAX_SCHEMA_DEPTH
PROPERTIES = {f"p{i}": {"type": "string"} for i in range(490)}
WIDE = {"type": "object", "properties": {key: {} for key in PROPERTIES}}
LONG = json.dumps({"anyOf": [WIDE] * 26}, separators=(",", ":"))  # 1 s of processor time


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("xml", "", "one of json_object, json_schema, regex, lark, choice, found 'xml'"),
        ("json_object", "{}", "takes no source"),
        ("json_schema", "{", "not valid JSON"),
        ("json_schema", "[1]", "must be an object, found a list"),
        ("json_schema", '{"a": NaN}', "NaN is not JSON"),
        ("json_schema", '{"items":' * 5000, "nested too deeply"),
        ("json_schema", DEEP, "at most 64 deep"),
        ("json_schema", json.dumps({"enum": list(range(20_000))}), "at most 20000 values"),
        ("json_schema", json.dumps({"properties": {**PROPERTIES, **dict.fromkeys("abcdefghijk")}}), "500"),
        ("json_schema", '{"x-guidance": {"lenient": true}}', "x-guidance is not supported"),
        ("json_schema", " " * 200_000, "at most 131072 characters, found 200000"),
        ("regex", "a" * 20_000, "at most 16384 characters"),
        ("regex", "\ud800", "half a surrogate pair"),
        ("choice", "[]", "list of 1 to 1000 texts"),
        ("choice", '["a", 1]', "must be a string"),
        ("choice", '["a", ""]', "empty text"),
        ("choice", '["\\ud800"]', "half a surrogate pair"),
    ],
)  # fmt: skip
def test_sources_that_need_no_compiler_to_be_refused(kind: str, source: str, message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        check_source(Grammar(kind, source))


REFUSED = [
    ("json_schema", '{"type": "foo"}', "foo"),
    ("json_schema", '{"format": "nope", "type": "string"}', "Unknown format: nope"),
    ("json_schema", '{"not": {}}', "not"),
    ("json_schema", '{"$ref": "#"}', "no text satisfies it"),
    ("json_schema", '{"$ref": "http://elsewhere/x"}', "elsewhere"),
    ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 4}', "Unsatisfiable"),
    ("regex", "(", "regex"),
    ("regex", "(" * 8000 + "a" + ")" * 8000, "regex"),
    ("regex", "(?=a)b", "look-around"),
    ("lark", "start: foo", "foo"),
    ("lark", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000, "nested"),
    ("lark", "start: <[999999]>", "999999"),
    ("lark", "start: <nope>", "nope"),
]


@pytest.mark.parametrize(("kind", "source", "message"), REFUSED)
def test_what_the_compiler_refuses_is_named(
    masks: GrammarMasks, kind: str, source: str, message: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        masks(Grammar(kind, source), SIZE)
    assert str(caught.value).startswith(f"the {kind} cannot be used: ")
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


HOSTILE = [
    ("regex", "((a{1,1000}){1,1000}){1,1000}"),
    ("regex", "(a|b)*a(a|b){1000}"),
    ("lark", "start: A\nA: " + " & ".join(f"/(.|\\n)*{c}(.|\\n)*/" for c in "abcdefghijklmnop")),
    ("lark", "start: s\ns: s s | /[a-z]+/ | /[a-m]+/ | /[b-z]*q/ |"),
    ("lark", 'start: a{100000}\na: b{1000}\nb: "x"'),
    ("json_schema", json.dumps({"allOf": [{"properties": {p: {"anyOf": [{}, {}]}}} for p in PROPERTIES]})),
    ("lark", 'start: "a" start'),
    ("lark", "start: a{100000}\na: b{1000}\nb: /x/ | /xx/"),
    ("json_schema", json.dumps({"type": "array", "items": {}, "minItems": 10**6})),
    ("json_schema", LONG),
    *((kind, source) for kind, source, _ in REFUSED),
]  # fmt: skip


def checker() -> GrammarChecker:
    return GrammarChecker(TOKENIZER.special_tokens, SIZE, EOS)


def test_hostile_grammars_end_quickly_and_harm_nobody() -> None:
    async def run() -> None:
        checking = checker()
        await checking.check(JSON)
        for kind, source in HOSTILE:
            began = time.monotonic()
            with suppress(RequestError):
                await checking.check(Grammar(kind, source))
            assert time.monotonic() - began < grammar_check.WALL_SECONDS
        with pytest.raises(RequestError, match=r"takes more than 0\.25 s or 1024 MiB"):
            await checking.check(Grammar("json_schema", LONG))
        await checking.check(Grammar("regex", "[ab]+"))
        await checking.close()

    asyncio.run(run())


def test_checks_and_compiling_agree(masks: GrammarMasks) -> None:
    cases = [*REFUSED, *((g.kind, g.source, None) for g in (JSON, OBJECT, Grammar("regex", "é")))]
    cases.append(("lark", 'start: <think> "a" <[899]>', None))

    async def run() -> list[str | None]:
        checking, found = checker(), []
        for kind, source, _ in cases:
            try:
                await checking.check(Grammar(kind, source))
                found.append(None)
            except RequestError as error:
                found.append(str(error))
        await checking.close()
        return found

    found = asyncio.run(run())
    assert [each is None for each in found] == [message is None for _, _, message in cases]
    for (kind, source, _), verdict in zip(cases, found, strict=True):
        if verdict is None:
            masks(Grammar(kind, source), SIZE)
            continue
        with pytest.raises(RequestError) as caught:
            masks(Grammar(kind, source), SIZE)
        assert str(caught.value)[:60] == verdict[:60]


@pytest.mark.full
def test_a_checker_survives_its_process_and_its_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        checking = checker()
        await checking.check(JSON)
        process = checking._process
        assert process is not None
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        assert re.search(rf"Max address space +{grammar_check.MEMORY_BYTES} ", limits)
        process.kill()
        await process.wait()
        await checking.check(Grammar("regex", "a+"))
        # Stopped, it is replaced after the time that a check may take; what waits behind goes on.
        monkeypatch.setattr(grammar_check, "WALL_SECONDS", 1.0)
        assert checking._process is not None
        checking._process.send_signal(signal.SIGSTOP)
        with pytest.raises(RequestError, match="takes more than"):
            await checking.check(Grammar("regex", "b+"))
        monkeypatch.undo()
        await checking.check(Grammar("regex", "c+"))
        # Who leaves takes the answer along.
        assert checking._process is not None
        checking._process.send_signal(signal.SIGSTOP)
        leaving = asyncio.create_task(checking.check(Grammar("regex", "(")))
        behind = asyncio.create_task(checking.check(Grammar("regex", "e+")))
        await asyncio.sleep(0.1)
        leaving.cancel()
        await behind
        monkeypatch.setattr(grammar_check, "MAX_WAITING", 0)
        await checking.check(JSON)  # known
        with pytest.raises(GrammarsBusyError):
            await checking.check(Grammar("regex", "f+"))
        last = checking._process
        await checking.close()
        await checking.close()
        assert last is not None
        assert last.returncode == -signal.SIGKILL

    asyncio.run(run())


def test_checking_loads_no_compiler_here() -> None:
    code = (
        "import sys, fourfold.text.grammar_check, fourfold.llm;"
        "sys.exit(any(m in sys.modules for m in ('llguidance', 'numpy', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- how requests say it


def test_response_formats() -> None:
    assert response_grammar(None) is None
    assert response_grammar({"type": "text"}) is None
    assert response_grammar({"type": "json_object"}, 7) == Grammar("json_object", "", 7)
    assert response_grammar({"type": "regex", "regex": "a+"}) == Grammar("regex", "a+")
    found = response_grammar(
        {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    )
    assert found == JSON
    for bad, message in (
        ([], "response_format must be an object"),
        ({"type": "xml"}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema must be"),
        ({"type": "json_schema", "json_schema": {}}, "json_schema.schema must be an object, found null"),
        ({"type": "regex"}, "response_format.regex"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=re.escape(message)):
            response_grammar(bad)


def test_structured_outputs_become_grammars() -> None:
    for given, grammar in (
        ({"json": SCHEMA}, JSON),
        ({"json": json.dumps(SCHEMA)}, JSON),
        ({"json_object": True}, OBJECT),
        ({"regex": "a+"}, Grammar("regex", "a+")),
        ({"choice": ["a", "b"]}, Grammar("choice", choice_source(["a", "b"]))),
        ({"grammar": 'start: "a"'}, Grammar("lark", 'start: "a"')),
    ):
        wanted = StructuredOutputsParams(**given)
        assert wanted.to_grammar() == grammar
        assert Request("r", (1,), SamplingParams(structured_outputs=wanted)).grammar == grammar
    explicit = Request(
        "r", (1,), SamplingParams(structured_outputs=wanted), grammar=wanted.to_grammar(5)
    )
    assert explicit.grammar == Grammar("lark", 'start: "a"', 5)
    for bad in ({}, {"json_object": False}, {"regex": "a", "choice": ["b"]}):
        with pytest.raises(RequestError, match="must hold one of json, regex, choice"):
            StructuredOutputsParams(**bad)
    for bad in ({"json": 3}, {"choice": "ab"}, {"choice": [1]}, {"regex": 4}, {"json_object": 1}):
        with pytest.raises(RequestError, match=f"structured_outputs.{next(iter(bad))} must be"):
            StructuredOutputsParams(**bad)
    with pytest.raises(RequestError, match="cannot be written as JSON"):
        StructuredOutputsParams(json={"a": float("nan")}).to_grammar()
