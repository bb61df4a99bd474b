"""Failures as HTTP answers.

Contract: an answer's body is small and says what the client can do; it holds no stack trace, no path
of ours, no address, and of the request no more than a name and a short value. Whatever fails becomes
an `ApiError` here, and nowhere else is a status chosen for an engine's failure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from fourfold.core.client import EngineClosedError, EngineDeadError
from fourfold.core.errors import CapacityError, FourfoldError, RequestError
from fourfold.core.request import NOT_FINITE
from fourfold.server.settings import MAX_ERROR_CHARACTERS
from fourfold.text.grammar_check import GrammarsBusyError

RETRY_STARTING = 5
RETRY_DRAINING = 10


@dataclass
class ApiError(Exception):
    """An answer that is not success. `param` is the request's field, `code` a word for programs."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        text = self.message.encode("utf-8", "replace").decode()
        if len(text) > MAX_ERROR_CHARACTERS:
            text = text[: MAX_ERROR_CHARACTERS - 1] + "…"
        self.message = text
        super().__init__(text)

    @property
    def body(self) -> dict[str, Any]:
        """The answer's JSON, in OpenAI's shape."""
        names = ("message", "type", "param", "code")
        return {"error": {name: getattr(self, name) for name in names}}


class Gone(Exception):
    """The client has left: there is nobody to answer."""


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400. Without `param` it is the field that the message begins with."""
    return ApiError(400, message, param=param or _leading_name(message), code=code)


def unsupported(param: str, why: str = "is not supported") -> ApiError:
    """400 for something that is known and not done."""
    return ApiError(400, f"{param} {why}", param=param, code="unsupported_parameter")


def model_not_found(name: str) -> ApiError:
    """404."""
    shown = name if len(name) <= 100 else name[:99] + "…"
    message = f"there is no model {shown!r} here; GET /v1/models lists what is served"
    return ApiError(404, message, "invalid_request_error", "model", "model_not_found")


def busy(message: str, retry_after: int, code: str = "queue_full") -> ApiError:
    """429 with the seconds to wait."""
    return ApiError(
        429, message, "rate_limit_error", code=code, headers={"retry-after": str(retry_after)}
    )


def unavailable(message: str, retry_after: int, code: str) -> ApiError:
    """503 with the seconds to wait."""
    return ApiError(
        503, message, "server_error", code=code, headers={"retry-after": str(retry_after)}
    )


def engine_fault(message: str, code: str) -> ApiError:
    """500: the engine failed, not the request."""
    return ApiError(500, message, "server_error", code=code)


def failed_answer(error: str | None) -> ApiError:
    """For an answer that ended in an error: a 500 if the engine was at fault, a 400 if the request
    could not go on, as when its grammar leads nowhere."""
    if error is None or error == NOT_FINITE:
        return engine_fault(f"engine fault: {error or 'no reason was given'}", "nonfinite_logits")
    return ApiError(400, error, code="answer_failed")


def from_failure(error: Exception) -> ApiError:
    """The answer for a failure of the layers below."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineDeadError):
        where = "" if error.step is None else f" in step {error.step}"
        return engine_fault(f"engine fault: the engine died{where}", "engine_dead")
    if isinstance(error, EngineClosedError):
        message = "the server is shutting down and takes no more requests"
        return unavailable(message, RETRY_DRAINING, "draining")
    if isinstance(error, GrammarsBusyError):
        return busy("the server is busy: too many grammars are being checked", 1)
    if isinstance(error, CapacityError):
        return bad_request(str(error), code="context_length_exceeded")
    if isinstance(error, RequestError):
        return bad_request(str(error))
    if isinstance(error, FourfoldError):
        return bad_request("the request cannot be run")
    return engine_fault("internal error: a defect of the server", "internal_error")


def _leading_name(message: str) -> str | None:
    """The field that an error's text begins with, such as `messages[0].content`."""
    word = message.partition(" ")[0].rstrip(":")
    path = _PATH.fullmatch(word) is not None and len(word) <= 100
    return word if path and (word in _PLAIN or any(mark in word for mark in "_.[")) else None


_PATH = re.compile(r"[a-z_]+(\[\d+\]|\.[a-z_]+)*")
_PLAIN = frozenset(
    ("n", "seed", "stop", "tools", "logprobs", "temperature", "messages", "thinking", "prompt")
)
