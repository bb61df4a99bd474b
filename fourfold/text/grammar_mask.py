"""Grammars at work: which tokens may come next.

    Grammar ─ compiled ─▶ LLMatcher (llguidance) ─ one copy a sequence ─▶ GrammarMask.allowed / commit

Contract: `GrammarMasks` makes masks as an engine wants them (engine/masks.py has the protocol) out of a
tokenizer's bytes. A special token is never part of what a grammar's text spells. Drafts are tried and
taken back; what a mask allows depends on the committed tokens and the drafts before, and on nothing else.
Compiling a grammar and every step of it end when llguidance's own counts of work are used up: at once
they are a `RequestError`, in mid-answer a `failure`. It does not know engines, requests or processes.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from functools import partial

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from fourfold.core.errors import RequestError
from fourfold.core.request import BEGINNING, Grammar
from fourfold.text.grammar import check_source, read_choices
from fourfold.text.token_mask import (
    Mask,
    MaskRows,
    after_reasoning,
    bit_row,
    clear_bit,
    demand_mask,
    has_bit,
)
from fourfold.text.tokenizer import Tokenizer

# Blanks between two parts of JSON: bounded, or an answer may consist of them alone.
_BLANKS = r"[ \t\r\n]{1,64}"
_ANY_OBJECT = '{"type":"object"}'
_TEMPLATES = 32
_RENEWALS = 8
_ERROR_CHARACTERS = 300
_DEAD_END = "NoExtensionBias"  # llguidance's word for it


def parser_limits() -> LLParserLimits:
    """What one grammar may use. Lexer fuel is spent at 14,000 to 50,000 a millisecond, items are made
    at 20,000, a lexer state takes 1 to 2 kB; all by llguidance's own account."""
    return LLParserLimits(
        max_items_in_row=2000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
        # Else compiling would take time for every token of the vocabulary.
        precompute_large_lexemes=False,
        # Longer errors carry the parser's state.
        verbose_errors=False,
    )


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    def __init__(
        self,
        tokens: Sequence[bytes],
        special: Collection[int],
        eos_token_id: int,
        encode: Callable[[str], list[int]],
    ):
        self.tokens, self.special_token_ids = list(tokens), sorted(special)
        self.eos_token_id, self.bos_token_id = eos_token_id, None
        self._encode = encode

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text.decode(errors="replace") if isinstance(text, bytes) else text)


def guided_tokenizer(
    tokens: Sequence[bytes],
    special: Collection[int],
    eos_token_id: int,
    encode: Callable[[str], list[int]],
) -> LLTokenizer:
    """llguidance's view of a vocabulary: `tokens[i]` are the bytes of id i, none for an id that is not
    known. Takes about 1 s for 130,000 tokens."""
    vocabulary = _Vocabulary(tokens, special, eos_token_id, encode)
    return LLTokenizer(TokenizerWrapper(vocabulary), n_vocab=len(tokens))


def compiled(grammar: Grammar, tokenizer: LLTokenizer) -> LLMatcher:
    """A matcher at the beginning of `grammar`. Raises `RequestError`: malformed, not supported, too
    large, or satisfied by no text."""
    check_source(grammar)
    try:
        source = _translated(grammar)
    except ValueError as error:
        raise _refused(grammar, str(error)) from None
    matcher = LLMatcher(tokenizer, source, log_level=0, limits=parser_limits())
    if matcher.is_error():
        raise _refused(grammar, matcher.get_error())
    bits = bytearray(matcher.compute_bitmask())
    eos = tokenizer.eos_token
    if not matcher.is_accepting():
        bits[eos >> 3] &= ~(1 << (eos & 7))
        if not any(bits):
            why = matcher.get_error()
            raise _refused(grammar, "no text satisfies it" if _DEAD_END in why else why)
    return matcher


def _translated(grammar: Grammar) -> str:
    """In llguidance's own form. Raises `ValueError`."""
    source = grammar.source
    match grammar.kind:
        case "json_object" | "json_schema":
            return LLMatcher.grammar_from_json_schema(
                source or _ANY_OBJECT,
                overrides={
                    "whitespace_pattern": _BLANKS,
                    "lenient": False,
                    "coerce_one_of": False,
                },
            )
        case "regex":
            return LLMatcher.grammar_from_regex(source)
        case "lark":
            return LLMatcher.grammar_from_lark(source)
        case "choice":
            texts = (json.dumps(text, ensure_ascii=False) for text in read_choices(source))
            literals = (re.sub(r"[\x7f-\x9f]", _escaped, text) for text in texts)
            return LLMatcher.grammar_from_lark("start: " + " | ".join(literals))
    raise ValueError(f"there is no kind {grammar.kind}")


def _escaped(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def _refused(grammar: Grammar, why: str) -> RequestError:
    return RequestError(f"the {grammar.kind} cannot be used: {_sentence(why)}")


def _sentence(text: str) -> str:
    """A compiler's message on one short line."""
    text = " ".join(text.replace("<non-verbose/>", "").split())
    return text if len(text) <= _ERROR_CHARACTERS else text[:_ERROR_CHARACTERS] + "…"


class GrammarMasks:
    """Makes masks for a model whose logits have `vocab_size` entries and whose answers end with
    `eos_token_id`. Grammars that come again are not compiled again."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int):
        known = [token for token in tokenizer.known_ids() if token < vocab_size]
        tokens = [b""] * vocab_size
        for token in known:
            tokens[token] = tokenizer.token_bytes(token)
        special = {token for token in tokenizer.special_tokens.values() if token < vocab_size}
        self.vocab_size, self.eos_token_id = vocab_size, eos_token_id
        self._tokenizer = guided_tokenizer(
            tokens, special | {eos_token_id}, eos_token_id, tokenizer.encode
        )
        self._known = bit_row([*known, eos_token_id], vocab_size)
        self._templates: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()

    def __call__(self, grammar: Grammar, vocab_size: int) -> Mask:
        """A mask at the beginning of an answer. Raises `RequestError`."""
        if vocab_size != self.vocab_size:
            raise ValueError(f"masks are for {self.vocab_size} tokens, not for {vocab_size}")
        words, eos = len(self._known), self.eos_token_id
        if grammar.kind == BEGINNING:
            return demand_mask(grammar, eos, words)
        mask = GrammarMask(partial(self._template, grammar), self._known, eos)
        return after_reasoning(mask, grammar, eos, words)

    def _template(self, grammar: Grammar, spent: LLMatcher | None = None) -> LLMatcher:
        """A matcher at the grammar's beginning, to be copied: another than `spent`. Raises
        `RequestError`."""
        key = (grammar.kind, grammar.source)
        if self._templates.get(key) is spent:
            self._templates[key] = compiled(grammar, self._tokenizer)
            if len(self._templates) > _TEMPLATES:
                self._templates.popitem(last=False)
        self._templates.move_to_end(key)
        return self._templates[key]


class GrammarMask:
    """A grammar at some point of its sequence's output: what it allows, and after its end the
    end-of-sequence token alone. `failure` says why the answer cannot go on, None while it can.

    Copies of a matcher share what they have built of the lexer, and its limit. When that is reached,
    a sequence goes on with a fresh one, eight times at most, so that it does not fail for what others did.
    """

    def __init__(
        self,
        template: Callable[[LLMatcher | None], LLMatcher],
        known: MaskRows,
        eos_token_id: int,
    ):
        self.failure: str | None = None
        self.open_for = 0
        self._known = known
        self._new_template, self._template, self._renewals = template, template(None), 0
        self._may_renew = True
        self._matcher = self._template.deep_copy()
        self._eos, self._done = eos_token_id, False
        self._matched: list[int] = []  # committed tokens that the matcher has taken
        self._failing: tuple[int, str] | None = None  # row of the latest mask that failed, and why

    def allowed(self, drafts: Sequence[int]) -> MaskRows:
        """Bits of the tokens that may come next `[1 + len(drafts), words]`: token t is bit t % 32 of
        word t // 32. Row i is for after the first i drafts; all its bits are set where these break the
        grammar. No row is empty."""
        rows = np.full((1 + len(drafts), len(self._known)), -1, np.int32)
        done = self._done
        tried: list[int] = []
        self._failing, self._may_renew = None, True
        for number, row in enumerate(rows):
            if number:
                token = drafts[number - 1]
                if not has_bit(rows[number - 1], token):
                    break
                if token == self._eos:
                    done = True
                elif self._consume(token, tried):
                    tried.append(token)
                else:
                    self._fail(row, number)
                    break
            if done:
                row[:] = bit_row([self._eos], 32 * len(row))
            elif not (self._fill(row) or (self._renew(tried) and self._fill(row))):
                self._fail(row, number)
                break
        if tried and (self._matcher.is_error() or not self._matcher.rollback(len(tried))):
            self._may_renew = True
            self._renew(())
        return rows

    def commit(self, tokens: Sequence[int]) -> None:
        """Move on over tokens that stand now; each was allowed."""
        if self._failing is not None and len(tokens) > self._failing[0]:
            self.failure = self._failing[1]
        self._may_renew = True
        for token in tokens:
            if self.failure is not None or self._done:
                return
            if token == self._eos:
                self._done = True
            elif self._consume(token, ()):
                self._matched.append(token)
            else:
                self.failure = self._why()

    def _fill(self, row: MaskRows) -> bool:
        """Write what the grammar allows now into `row`; whether that is anything."""
        matcher, eos = self._matcher, self._eos
        matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if has_bit(row, eos) and not matcher.is_accepting():
            clear_bit(row, eos)
        row &= self._known
        return bool(row.any())

    def _fail(self, row: MaskRows, number: int) -> None:
        """Nothing sampled in row `number` can stand."""
        row[:] = -1
        self._failing = number, self._why()

    def _why(self) -> str:
        why = _sentence(self._matcher.get_error())
        return f"the grammar does not lead on: {why or 'no token fits'}"

    def _consume(self, token: int, tried: Sequence[int]) -> bool:
        """Take one more token after the committed ones and those `tried`; whether that went well."""
        if self._matcher.consume_token(token):
            return True
        return self._renew(tried) and self._matcher.consume_token(token)

    def _renew(self, tried: Sequence[int]) -> bool:
        """Replace a matcher that has failed, which it stays for ever; whether that was possible."""
        if not (self._may_renew and self._renewals < _RENEWALS and self._matcher.is_error()):
            return False
        self._renewals, self._may_renew = self._renewals + 1, False
        self._template = self._new_template(self._template)
        self._matcher = self._template.deep_copy()
        return self._matcher.consume_tokens([*self._matched, *tried])
