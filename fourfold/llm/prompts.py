"""An offline call's arguments: prompts and conversations to tokens, options to a configuration.

Contract: what is wrong is a `FourfoldError` that names it. A prompt's text is the caller's own, so
markers spelled in it count; in a conversation they never do. It does not run anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, TypeGuard

from fourfold.core.errors import ConfigError, RequestError
from fourfold.core.request import SamplingParams
from fourfold.text import markers
from fourfold.text.chat import ChatOptions, encode_chat, read_switches
from fourfold.text.profiles import ChatProfile
from fourfold.text.tokenizer import Tokenizer
from fourfold.weights.locate import locate, model_directory

# A text to continue, its token ids, or either with more to say, by name.
Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]
_PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")
_MAX_DRAFTS = 3


@dataclass(frozen=True)
class Encoded:
    """A prompt in tokens, and what else its request needs."""

    text: str | None
    token_ids: tuple[int, ...]
    cache_salt: str | None = None
    image_positions: tuple[int, ...] = ()
    end_think: int | None = None  # if the answer begins with reasoning: the token that ends it


def is_ids(value: object) -> TypeGuard[Sequence[int]]:
    """Whether this is a list of token ids, possibly empty."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        return False
    return all(isinstance(each, Integral) and not isinstance(each, bool) for each in value)


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as several. An empty list is no prompt at all."""
    if isinstance(prompts, str | Mapping) or (is_ids(prompts) and prompts):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise RequestError(f"prompts must be one prompt or a list, found {type(prompts).__name__}")
    return list(prompts)  # type: ignore[arg-type]


def as_conversations(
    messages: Sequence[Message] | Sequence[Sequence[Message]],
) -> list[Sequence[Message]]:
    """One conversation or several, as several."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise RequestError(f"messages must be a list, found {type(messages).__name__}")
    if messages and all(isinstance(each, Sequence) for each in messages):
        return list(messages)  # type: ignore[arg-type]
    return [messages]  # type: ignore[list-item]


def as_params(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    """Sampling parameters for each of `count` prompts: the same for all unless it is a list."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise RequestError(f"sampling_params has {len(params)} entries for {count} prompts")
    return list(params)


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer) -> Encoded:
    """A prompt's tokens. Raises `RequestError`."""
    text = salt = None
    ids: object = prompt
    if isinstance(prompt, Mapping):
        unknown = set(prompt) - set(_PROMPT_KEYS)
        if unknown:
            raise RequestError(
                f"a prompt has no {', '.join(sorted(map(repr, unknown)))}; there are "
                f"{', '.join(_PROMPT_KEYS)}"
            )
        text, salt = prompt.get("prompt"), prompt.get("cache_salt")
        ids = prompt.get("prompt_token_ids")
        ids = text if ids is None else ids
    if isinstance(ids, str):
        return Encoded(ids, tuple(tokenizer.encode(ids, allow_special=True)), salt)
    if not is_ids(ids):
        raise RequestError(
            "a prompt must be a text, a list of token ids, or a map with prompt or "
            f"prompt_token_ids, found {prompt!r:.80}"
        )
    return Encoded(text, tuple(int(token) for token in ids), salt)


def encode_conversation(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    profile: ChatProfile,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    continue_final_message: bool = False,
) -> Encoded:
    """A conversation's tokens. A state image is wanted before the `<think>` or `</think>` at its end:
    the next turn may begin with the other one there. Raises `RequestError`."""
    options = ChatOptions(
        profile,
        tools=tools,
        continue_final_message=continue_final_message,
        **read_switches(chat_template_kwargs),
    )
    prompt = encode_chat(messages, options)
    tokens = prompt.tokenize(tokenizer)
    header = tokens.header_position
    positions = () if header is None else (header,)
    end = tokenizer.special_id(markers.END_THINK) if prompt.ends_in_reasoning else None
    return Encoded(prompt.text, tokens.token_ids, image_positions=positions, end_think=end)


def tokenizer_directory(given: str | Path | Tokenizer | None, checkpoint: Path) -> Path | None:
    """Where the tokenizer lies: the checkpoint's own, or that of another directory or model; None if
    it is in memory only."""
    if isinstance(given, Tokenizer):
        return None
    if given is None:
        return checkpoint
    return model_directory(str(given)) or locate(str(given), weights=False).directory


def num_drafts(config: Mapping[str, Any] | None) -> int:
    """Draft tokens a step from a `speculative_config`; 0 for None. Raises `ConfigError`."""
    if config is None:
        return 0
    if not isinstance(config, Mapping) or config.get("method") != "mtp":
        raise ConfigError(f'speculative_config needs "method": "mtp", found {config!r}')
    unknown = set(config) - {"method", "num_speculative_tokens"}
    if unknown:
        raise ConfigError(f"speculative_config: unknown {', '.join(sorted(map(str, unknown)))}")
    count = config.get("num_speculative_tokens", 1)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _MAX_DRAFTS:
        raise ConfigError(
            f"speculative_config: num_speculative_tokens must be 1 to {_MAX_DRAFTS}, found {count!r}"
        )
    return count
