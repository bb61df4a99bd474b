"""The table of endpoints, and the application made of it.

Contract: `OPERATIONS` is the only list of routes; the OpenAPI document is made from it. An endpoint is
one file under routes/ and one line here.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from fourfold.server.call import Endpoint, Handler
from fourfold.server.errors import ApiError
from fourfold.server.gate import Gate
from fourfold.server.routes import (
    chat,
    completions,
    docs,
    explain,
    messages,
    page,
    responses,
    status,
    tokens,
)
from fourfold.server.serving import Serving


@dataclass(frozen=True)
class Operation:
    """One endpoint. `body` is the type of its request; quiet ones leave no line in the log."""

    method: str
    path: str
    handler: Handler
    summary: str
    body: type[msgspec.Struct] | None = None
    quiet: bool = False


OPERATIONS = (
    Operation(
        "POST", "/v1/chat/completions", chat.chat_completions, "Answer a conversation.",
        chat.ChatRequest,
    ),
    Operation(
        "POST", "/v1/completions", completions.completions, "Continue texts or tokens.",
        completions.CompletionRequest,
    ),
    Operation(
        "POST", "/v1/responses", responses.responses, "Answer an input (text, tools).",
        responses.ResponsesRequest,
    ),
    Operation(
        "POST", "/v1/messages", messages.messages, "Answer a conversation (Anthropic's API).",
        messages.MessagesRequest,
    ),
    Operation(
        "POST", "/v1/messages/count_tokens", messages.count_tokens, "Count its tokens.",
        messages.CountRequest,
    ),
    Operation(
        "POST", "/v1/chat/completions/render", chat.render, "Show a conversation's prompt.",
        chat.ChatRequest,
    ),
    Operation("POST", "/tokenize", tokens.tokenize, "Text to tokens.", tokens.TokenizeRequest),
    Operation(
        "POST", "/detokenize", tokens.detokenize, "Tokens to text.", tokens.DetokenizeRequest
    ),
    Operation("GET", "/v1/models", status.models, "The model's names.", quiet=True),
    Operation("GET", "/v1/models/{name:path}", status.model, "One of them.", quiet=True),
    Operation("GET", "/health", status.health, "Whether requests are taken.", quiet=True),
    Operation("GET", "/live", status.live, "Whether the process answers.", quiet=True),
    Operation("GET", "/version", docs.version, "The version.", quiet=True),
    Operation("GET", "/explain", explain.explain, "Kernels and formats, and why.", quiet=True),
    Operation("GET", "/metrics", status.metrics, "Counts for Prometheus.", quiet=True),
    Operation("POST", "/reset_prefix_cache", status.reset_prefix_cache, "Forget cached state."),
    Operation("GET", "/openapi.json", docs.openapi, "This description.", quiet=True),
    Operation("GET", "/", page.page, "A page to talk to the model.", quiet=True),
    Operation("GET", "/docs", docs.page, "This description, to read.", quiet=True),
)  # fmt: skip


def build_app(serving: Serving) -> ASGIApp:
    """The application for one server."""
    offered = [each for each in OPERATIONS if serving.settings.ui or each.path != "/"]
    serving.operations = offered
    routes = [
        Route(each.path, Endpoint(serving, each.handler, each.quiet), methods=[each.method])
        for each in offered
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _no_route})
    app.router.redirect_slashes = False
    return Gate(app, serving.settings)


def _no_route(request: Request, error: Exception) -> Response:
    """404 and 405, with the paths there are."""
    status_code = error.status_code if isinstance(error, HTTPException) else 404
    if status_code == 405:
        message = "this path does not take this method"
    else:
        message = "there is no such path; GET /docs lists them"
    answer = ApiError(status_code, message, code="no_route")
    headers = getattr(error, "headers", None)
    return Response(msgspec.json.encode(answer.body), status_code, headers, "application/json")
