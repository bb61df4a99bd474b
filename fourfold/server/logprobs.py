"""Log probabilities in the two shapes of OpenAI's API.

Contract: a token's text is what its bytes are; where they are no whole characters the chat shape has
U+FFFD and the bytes beside it, the completions shape spells the bytes, so that keys differ. It does not
know requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fourfold.core.request import TokenLogprobs
from fourfold.text.detokenize import IncrementalDetokenizer
from fourfold.text.tokenizer import Tokenizer

# JSON has no infinity; this is what peers write for a token that cannot be.
_IMPOSSIBLE = -9999.0


class TokenTexts:
    """Tokens as text. `known` are the ids that the tokenizer can decode."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.known = tokenizer.known_ids()

    def bytes(self, token: int) -> bytes:
        """A token's bytes; none for an id the tokenizer does not know."""
        return self._tokenizer.token_bytes(token) if token in self.known else b""

    def spelled(self, token: int) -> str:
        """Its text, or its bytes spelled out."""
        if token not in self.known:
            return f"token_id:{token}"
        data = self.bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def chat_entries(self, found: Sequence[TokenLogprobs], top: int) -> list[dict[str, Any]]:
        """Entries of `logprobs.content`, each with `top` alternatives."""
        return [
            self._entry(at.token_id, at.logprob)
            | {"top_logprobs": [self._entry(*pair) for pair in at.top[:top]]}
            for at in found
        ]

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.bytes(token)
        text = data.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, _IMPOSSIBLE), "bytes": list(data)}


class CompletionLogprobs:
    """The four lists of a completion's `logprobs`, for tokens as they come."""

    def __init__(self, tokenizer: Tokenizer, texts: TokenTexts) -> None:
        self._texts = texts
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._offset = 0

    def entries(
        self,
        tokens: Sequence[int],
        found: Sequence[TokenLogprobs | None],
    ) -> dict[str, list[Any]]:
        """For more tokens; `found` is None for the first of a prompt. Offsets count characters."""
        names: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for token, at in zip(tokens, found, strict=False):
            names.append(self._texts.spelled(token))
            offsets.append(self._offset)
            if token in self._texts.known:
                self._offset += len(self._detokenizer.push(token))
            if at is None:
                values.append(None)
                tops.append(None)
                continue
            values.append(max(at.logprob, _IMPOSSIBLE))
            top = {self._texts.spelled(at.token_id): max(at.logprob, _IMPOSSIBLE)}
            for other, value in at.top:
                top.setdefault(self._texts.spelled(other), max(value, _IMPOSSIBLE))
            tops.append(top)
        return {
            "tokens": names,
            "token_logprobs": values,
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def joined(parts: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Several of them as one."""
    whole: dict[str, list[Any]] = {
        "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []
    }  # fmt: skip
    for part in parts:
        for name, values in part.items():
            whole[name] += values
    return whole
