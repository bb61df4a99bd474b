"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

import msgspec

from fourfold.server.call import Call
from fourfold.server.errors import bad_request
from fourfold.text.chat import ChatOptions, encode_chat, read_switches


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A text or a conversation. `parse_special`: markers spelled in a text are markers."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    parse_special: bool = True
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Token ids."""

    tokens: list[int]
    model: str | None = None


async def tokenize(call: Call) -> None:
    """The tokens of a text or a conversation."""
    request = await call.read(TokenizeRequest)
    serving = call.serving
    serving.expect_ready()
    serving.expect_model(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise bad_request("give either prompt or messages", "prompt")

    if request.prompt is not None and serving.cannot_fit(len(request.prompt)):
        raise bad_request("prompt exceeds the model's context", "prompt", "context_length_exceeded")

    def encode() -> list[int]:
        if request.messages is None:
            return serving.tokenizer.encode(request.prompt or "", request.parse_special)
        options = ChatOptions(
            serving.profile,
            tools=request.tools,
            continue_final_message=bool(request.continue_final_message),
            **read_switches(request.chat_template_kwargs),
        )
        return encode_chat(request.messages, options).token_ids(serving.tokenizer)

    ids = await serving.tokenising(call.held_bytes, encode)
    body: dict[str, Any] = {
        "count": len(ids),
        "max_model_len": serving.info.max_model_len,
        "tokens": ids,
    }
    if request.return_token_strs:
        body["token_strs"] = [serving.tokenizer.decode([i]) for i in ids]
    await call.json(body)


async def detokenize(call: Call) -> None:
    """The text of tokens."""
    request = await call.read(DetokenizeRequest)
    serving = call.serving
    serving.expect_model(request.model)
    known = serving.texts.known
    for index, token in enumerate(request.tokens):
        if token not in known:
            raise bad_request(f"tokens[{index}] is no token of this model", f"tokens[{index}]")
    await call.json({"prompt": serving.tokenizer.decode(request.tokens)})
