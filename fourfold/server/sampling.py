"""A request's sampling fields, and what they become.

Contract: every field here works; a field that is not here is refused by name when the body is read.
What a request leaves out is the checkpoint's default, and `max_tokens` what remains of the context.
Failures are 400s that name the field.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from fourfold.core.client import EngineInfo
from fourfold.core.request import MAX_STOP_TOKENS, SamplingParams
from fourfold.server.errors import bad_request, unsupported
from fourfold.server.settings import MAX_STOP_CHARACTERS, MAX_STOPS
from fourfold.text.generation import GenerationDefaults


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """`include_usage` adds a last event with counts, `continuous_usage_stats` counts to all."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingFields(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What completions and chat share. None is a field not given."""

    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    cache_salt: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Labels of the client's own, which ask for nothing.
    user: str | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None


def stream_options(fields: SamplingFields) -> StreamOptions:
    """The request's, checked."""
    if fields.stream_options is None:
        return StreamOptions()
    if not fields.stream:
        raise bad_request("stream_options needs stream to be true", "stream_options")
    return fields.stream_options


def expect_labels(fields: SamplingFields) -> None:
    """Raise 400 for a label that asks for something after all."""
    if fields.service_tier not in (None, "auto", "default"):
        raise unsupported("service_tier", "other than auto or default is not supported")


def stops(fields: SamplingFields) -> tuple[str, ...]:
    """The stop strings, within bounds."""
    given = (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop or ())
    if len(given) > MAX_STOPS:
        raise bad_request(f"stop must hold at most {MAX_STOPS} texts, found {len(given)}", "stop")
    for text in given:
        if not 0 < len(text) <= MAX_STOP_CHARACTERS:
            wanted = f"texts of 1 to {MAX_STOP_CHARACTERS} characters"
            raise bad_request(f"stop must hold {wanted}, found one of {len(text)}", "stop")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise bad_request("stop is not valid Unicode: half a surrogate pair", "stop") from None
    return given


def sampling_params(
    fields: SamplingFields,
    defaults: GenerationDefaults,
    max_tokens: int | None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """The engine's parameters. Raises `RequestError` or 400, naming the field."""
    if len(fields.stop_token_ids or ()) > MAX_STOP_TOKENS:
        raise bad_request(f"stop_token_ids must hold at most {MAX_STOP_TOKENS} ids")
    given: dict[str, Any] = {
        name: getattr(fields, name)
        for name in (
            *("n", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos"),
            *("presence_penalty", "frequency_penalty", "repetition_penalty", "stop_token_ids"),
        )
        if getattr(fields, name) is not None
    }
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        given.setdefault(name, getattr(defaults, name))
    return SamplingParams(
        **given,
        max_tokens=max_tokens,
        stop=stops(fields),
        logit_bias=_biases(fields.logit_bias),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _biases(given: dict[str, float] | None) -> dict[int, float]:
    biases: dict[int, float] = {}
    for key, value in (given or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise bad_request(f"logit_bias must be a map from token ids, found {key[:20]!r}")
        biases[int(key)] = value
    return biases


def expect_fit(prompt: Sequence[int], params: SamplingParams, info: EngineInfo) -> None:
    """Raise 400 unless the prompt and its answer fit into the context and the vocabulary."""
    if not prompt:
        raise bad_request("the prompt must hold at least one token", "prompt")
    length, longest = len(prompt), info.max_model_len
    wanted = 1 if params.max_tokens is None else params.max_tokens
    if length + wanted > longest:
        answer = "one token of answer" if params.max_tokens is None else f"max_tokens ({wanted})"
        raise bad_request(
            f"the prompt ({length} tokens) and {answer} exceed the context of {longest} tokens",
            "max_tokens" if length < longest else "prompt",
            "context_length_exceeded",
        )
    if params.min_tokens > (longest - length if params.max_tokens is None else wanted):
        raise bad_request("min_tokens must not be above max_tokens", "min_tokens")
    for name, ids in (
        ("prompt", prompt),
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", list(params.logit_bias)),
    ):
        if ids and not 0 <= min(ids) <= max(ids) < info.vocab_size:
            wrong = next(i for i in ids if not 0 <= i < info.vocab_size)
            shown = wrong if abs(wrong) < 10**12 else "a huge number"
            raise bad_request(
                f"{name} holds token {shown}, outside the vocabulary ({info.vocab_size})", name
            )
