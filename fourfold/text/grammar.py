"""Grammars of answers: what a request may demand, and which tokens may come next.

    response_format, structured_outputs ─ read_… ─▶ Grammar ─ GrammarCompiler ─▶ GrammarMatcher

Contract: llguidance does the work and is imported when it is first needed. A `GrammarMatcher` belongs
to one sequence and knows token ids only. Compiling somebody's grammar may take long: a server checks
it first where that harms nobody (`check_forever`, a process of its own). Torch-free.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from fourfold.core.errors import RequestError
from fourfold.core.request import Grammar
from fourfold.text.checks import checked_list, checked_object, checked_text, refuse, to_json

JSON_OBJECT = "json_object"
JSON_SCHEMA = "json_schema"
REGEX = "regex"
LARK = "grammar"
CHOICE = "choice"
KINDS = (JSON_OBJECT, JSON_SCHEMA, REGEX, LARK, CHOICE)
MAX_SOURCE = 200_000  # characters
_ANY_OBJECT = '{"type": "object"}'
_MAX_ERROR = 300


def read_response_format(value: object, after_token: int | None) -> Grammar | None:
    """The grammar of a `response_format`, None for text. Raises `RequestError`."""
    if value is None:
        return None
    wanted = checked_object(value, "response_format")
    kind = wanted.get("type")
    if kind == "text":
        return None
    if kind == JSON_OBJECT:
        return Grammar(JSON_OBJECT, "", after_token)
    if kind != JSON_SCHEMA:
        refuse("response_format.type", "one of text, json_object, json_schema", kind)
    inner = checked_object(wanted.get("json_schema"), "response_format.json_schema")
    where = "response_format.json_schema.schema"
    return _bounded(
        JSON_SCHEMA, to_json(checked_object(inner.get("schema"), where), where), after_token
    )


def read_structured_outputs(value: object, after_token: int | None) -> Grammar | None:
    """The grammar of vLLM's `structured_outputs`: one of json, json_object, regex, choice, grammar.
    Raises `RequestError`."""
    if value is None:
        return None
    where = "structured_outputs"
    given = {k: v for k, v in checked_object(value, where).items() if v is not None}
    if len(given) != 1:
        raise RequestError(
            f"{where} must hold exactly one of json, json_object, regex, choice, grammar"
        )
    ((name, inner),) = given.items()
    place = f"{where}.{name}"
    match name:
        case "json":
            schema = inner if isinstance(inner, str) else to_json(inner, place)
            return _bounded(JSON_SCHEMA, checked_text(schema, place), after_token)
        case "json_object":
            return Grammar(JSON_OBJECT, "", after_token) if inner is True else None
        case "regex" | "grammar":
            return _bounded(name, checked_text(inner, place), after_token)
        case "choice":
            texts = [
                checked_text(t, f"{place}[{i}]") for i, t in enumerate(checked_list(inner, place))
            ]
            if not texts or not all(texts):
                refuse(place, "texts that are not empty", inner)
            return _bounded(CHOICE, to_json(texts, place), after_token)
    raise RequestError(f"{where} has no {name[:80]!r}")


def _bounded(kind: str, source: str, after_token: int | None) -> Grammar:
    if len(source) > MAX_SOURCE:
        raise RequestError(f"a grammar may have {MAX_SOURCE} characters, found {len(source)}")
    return Grammar(kind, source, after_token)


def compiled(grammar: Grammar) -> str:
    """The grammar in llguidance's own language. Raises `RequestError`."""
    from llguidance import LLMatcher

    try:
        match grammar.kind:
            case "json_object":
                return str(LLMatcher.grammar_from_json_schema(_ANY_OBJECT))
            case "json_schema":
                return str(LLMatcher.grammar_from_json_schema(grammar.source))
            case "regex":
                return str(LLMatcher.grammar_from_regex(grammar.source))
            case "grammar":
                return str(LLMatcher.grammar_from_lark(grammar.source))
            case "choice":
                texts = (json.dumps(text) for text in json.loads(grammar.source))
                return str(LLMatcher.grammar_from_lark(f"start: {' | '.join(texts)}"))
    except ValueError as error:
        raise RequestError(
            f"the {grammar.kind} cannot be used: {str(error)[:_MAX_ERROR]}"
        ) from None
    raise RequestError(f"there is no grammar of kind {grammar.kind!r}")


def check(grammar: Grammar) -> str | None:
    """What is wrong with a grammar, None if it can be used."""
    from llguidance import LLMatcher

    try:
        message = LLMatcher.validate_grammar(compiled(grammar))
    except RequestError as error:
        return str(error)
    return f"the {grammar.kind} cannot be used: {message[:_MAX_ERROR]}" if message else None


class GrammarCompiler:
    """Makes matchers for one tokenizer, whose `tokenizer.json` is given as text."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_id: int) -> None:
        from llguidance import LLTokenizer

        self._tokens = LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=eos_token_id)
        self._eos = eos_token_id

    def matcher(self, grammar: Grammar) -> GrammarMatcher:
        """A matcher at the beginning of an answer. Raises `RequestError`."""
        from llguidance import LLMatcher

        found = LLMatcher(self._tokens, compiled(grammar))
        if found.is_error():
            message = str(found.get_error())[:_MAX_ERROR]
            raise RequestError(f"the {grammar.kind} cannot be used: {message}")
        return GrammarMatcher(found, grammar.after_token, self._eos)


class GrammarMatcher:
    """Where one answer stands in its grammar; before `after_token` everything is allowed."""

    def __init__(self, matcher: Any, after_token: int | None, eos_token_id: int) -> None:
        self._matcher, self._eos = matcher, eos_token_id
        self._waits_for = after_token

    def rows(self, drafts: Sequence[int]) -> list[bytes | None]:
        """Bits of the tokens that may come next, then after each of `drafts` (None: all may; also
        where a draft before breaks the rules). Token t is bit t % 8 of byte t // 8."""
        rows: list[bytes | None] = []
        taken, waits = 0, self._waits_for
        for draft in [*drafts, None]:
            rows.append(None if waits is not None else self._matcher.compute_bitmask())
            if draft is None:
                break
            if waits is not None:
                waits = None if draft == waits else waits
            elif draft != self._eos and self._matcher.try_consume_tokens([draft]):
                taken += 1
            else:
                rows += [None] * (len(drafts) + 1 - len(rows))
                break
        if taken:
            self._matcher.rollback(taken)
        return rows

    def commit(self, tokens: Sequence[int]) -> None:
        """Move on over tokens that stand now. Raises `RequestError` for one that is not allowed."""
        for position, token in enumerate(tokens):
            if self._waits_for is not None:
                self._waits_for = None if token == self._waits_for else self._waits_for
                continue
            rest = list(tokens[position:])
            if rest[-1] == self._eos:  # the end is no token of the grammar's
                rest.pop()
                ends = self._matcher.try_consume_tokens(rest) == len(rest)
                ok = ends and self._matcher.is_accepting()
            else:
                ok = self._matcher.try_consume_tokens(rest) == len(rest)
            if not ok:
                raise RequestError("a token outside the grammar was committed")
            return


def check_forever(lines: TextIO = sys.stdin, answers: TextIO = sys.stdout) -> None:
    """A process that checks grammars: a JSON line in, a JSON line out. Memory is bounded here (1 GiB),
    time by whoever asks."""
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    for line in lines:
        asked: Mapping[str, str] = json.loads(line)
        answers.write(json.dumps(check(Grammar(asked["kind"], asked["source"]))) + "\n")
        answers.flush()
