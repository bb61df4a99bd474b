"""Requests and what comes back, in plain Python.

Contract: the words the server, the engine and the offline API share. Torch-free; it knows neither text
nor tensors. Names, defaults and meanings of sampling parameters follow vLLM's.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, NamedTuple

from fourfold.core.errors import RequestError

MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_STOP_TOKENS = 63  # and the end-of-sequence token


# What `RequestOutput.error` says of an engine fault; any other text is about the request itself.
NOT_FINITE = "the model's numbers were not finite"


class FinishReason(Enum):
    """Why a request ended."""

    STOP = "stop"  # an end-of-sequence token, a stop token or (found by the front) a stop string
    LENGTH = "length"  # max_tokens or the context's end reached
    ABORT = "abort"  # its client asked
    ERROR = "error"  # its numbers were not finite, or it could not go on; `error` says which


def _expect(ok: bool, name: str, expected: str, found: object) -> None:
    if not ok:
        raise RequestError(f"{name} must be {expected}, found {found!r}")


def _is_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # an integer may be too large for a float


def _is_int(value: object, low: int, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


# The kind of a grammar whose source is a JSON list of the token ids that an answer begins with.
BEGINNING = "tokens"


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like: `source` in the language `kind` ("json_schema", "regex", …).

    With `after_token` the answer is free until that token, and the grammar holds from there on; with
    `max_free_tokens` too, that token is all that may come once so many others have.
    """

    kind: str
    source: str
    after_token: int | None = None
    max_free_tokens: int | None = None

    @property
    def says_the_end(self) -> bool:
        """Whether the answer ends where the grammar does; a demanded beginning leaves that open."""
        return self.kind != BEGINNING


@dataclass(frozen=True)
class StructuredOutputsParams:
    """What an answer must look like, exactly one of: a JSON schema as `json` (an object or its text),
    any JSON object, a regular expression, one of several texts, or a `grammar` in llguidance's Lark.
    Raises `RequestError`; whether it can be used shows later."""

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) not in (None, False)]
        if len(given) != 1:
            names = ", ".join(f.name for f in fields(self))
            raise RequestError(f"structured_outputs must hold one of {names}, found {given}")
        (name,) = given
        value = getattr(self, name)
        listed = isinstance(value, Sequence) and all(isinstance(each, str) for each in value)
        ok = {
            "json": isinstance(value, str | Mapping),
            "choice": listed and not isinstance(value, str),
            "json_object": value is True,
        }.get(name, isinstance(value, str))
        _expect(ok, f"structured_outputs.{name}", "of its type", type(value).__name__)

    def to_grammar(self, after_token: int | None = None) -> Grammar:
        """As requests carry it; `after_token` as there. Raises `RequestError`."""
        if self.json is not None:
            source = self.json if isinstance(self.json, str) else _json(dict(self.json))
            return Grammar("json_schema", source, after_token)
        if self.regex is not None:
            return Grammar("regex", self.regex, after_token)
        if self.choice is not None:
            return Grammar("choice", _json(list(self.choice)), after_token)
        if self.grammar is not None:
            return Grammar("lark", self.grammar, after_token)
        return Grammar("json_object", "", after_token)


def _json(value: object) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"structured_outputs cannot be written as JSON: {error}") from None


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens.

    `temperature` 0 is greedy; `seed` None takes one from the engine's; `max_tokens` None is what
    remains of the context; `top_k` 0 or −1 is off. `logprobs` and `prompt_logprobs` ask for that many
    alternatives (0: the token's own), at most 20. Raises `RequestError` naming the field.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, low, high, words in (
            ("n", 1, 128, "an integer from 1 to 128"),
            ("min_tokens", 0, math.inf, "a non-negative integer"),
            ("top_k", -1, math.inf, "an integer of at least -1"),
        ):
            _expect(_is_int(getattr(self, name), low, high), name, words, getattr(self, name))
        for name, least, most, words in (
            ("temperature", 0.0, 100.0, "a number from 0 to 100"),
            ("min_p", 0.0, 1.0, "a number from 0 to 1"),
            ("presence_penalty", -2.0, 2.0, "a number from -2 to 2"),
            ("frequency_penalty", -2.0, 2.0, "a number from -2 to 2"),
        ):
            value = getattr(self, name)
            _expect(_is_number(value) and least <= value <= most, name, words, value)
        for name, high in (("top_p", 1.0), ("repetition_penalty", math.inf)):
            value = getattr(self, name)
            words = "above 0 and at most 1" if high == 1 else "a number above 0"
            _expect(_is_number(value) and 0 < value <= high, name, words, value)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            ok = value is None or _is_int(value, 0, MAX_LOGPROBS)
            _expect(ok, name, f"an integer from 0 to {MAX_LOGPROBS}", value)
        for name, low in (("max_tokens", 1), ("seed", 0)):
            value = getattr(self, name)
            words = "an integer of at least 1" if low else "an integer from 0 to 2^63 - 1"
            _expect(value is None or _is_int(value, low, 2**63 - 1), name, words, value)
        self._check_lists()

    def _check_lists(self) -> None:
        stops = self.stop
        ok = all(isinstance(s, str) and s for s in stops)
        _expect(ok, "stop", "one or more texts that are not empty", list(stops))
        ok = all(_is_int(t, 0) for t in self.stop_token_ids)
        _expect(ok, "stop_token_ids", "a list of token ids", list(self.stop_token_ids))
        count = len(self.stop_token_ids)
        ok = count <= MAX_STOP_TOKENS
        _expect(ok, "stop_token_ids", f"at most {MAX_STOP_TOKENS} token ids", count)
        ok = isinstance(self.logit_bias, Mapping) and len(self.logit_bias) <= MAX_BIASES
        _expect(ok, "logit_bias", f"at most {MAX_BIASES} entries", type(self.logit_bias).__name__)
        for token, bias in self.logit_bias.items():
            _expect(_is_int(token, 0), "logit_bias", "a map from token ids", token)
            ok = _is_number(bias) and -100 <= bias <= 100
            _expect(ok, f"logit_bias[{token}]", "a number from -100 to 100", bias)

    @property
    def has_penalties(self) -> bool:
        return bool(
            self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        )


@dataclass(frozen=True)
class Request:
    """A prompt in tokens and how to continue it.

    Lower `priority` runs first, equal ones first come first served; whoever has waited longest gets a
    turn now and then all the same. `cache_salt` separates prefix caches. `image_positions` are prompt
    positions worth keeping a state image at, such as the one before a chat's generation marker. Unless
    given, `grammar` is what `params` ask for, from the answer's start.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    cache_salt: str | None = None
    image_positions: tuple[int, ...] = ()
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        wanted = self.params.structured_outputs
        if self.grammar is None and wanted is not None:
            object.__setattr__(self, "grammar", wanted.to_grammar())


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities at one position: the token's own with its rank (1 is the likeliest), and
    the likeliest alternatives in falling order."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class RequestOutput(NamedTuple):
    """What one step added to one of a request's n sequences (`index`).

    The first output of a sequence carries `cached_tokens` (prompt tokens not computed again),
    `cache_miss` (why not more) and, if asked for, `prompt_logprobs` (None for the first token).
    """

    request_id: str
    new_token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    index: int = 0  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    stop_reason: int | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    cached_tokens: int = 0
    cache_miss: str | None = None
    accepted_drafts: int = 0
    error: str | None = None
