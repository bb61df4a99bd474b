"""GET /version, /openapi.json, and /docs, one page made from the same table."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from fourfold import __version__
from fourfold.server.call import Call

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_FAILURES = {
    "400": "A field is wrong or not supported; the message names it.",
    "401": "A key is needed.",
    "404": "There is no such model.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "Busy; Retry-After says when to come back.",
    "500": "The engine failed.",
    "503": "Starting, draining or dead; Retry-After says when to come back.",
}
_STYLE = (
    "body{font:16px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "code{background:#8882;padding:0 .2rem}table{border-collapse:collapse;width:100%}"
    "td{border-top:1px solid #8884;padding:.2rem .5rem;vertical-align:top}"
)


class Described(Protocol):
    """What is shown of an endpoint."""

    method: str
    path: str
    summary: str
    body: type[msgspec.Struct] | None


async def version(call: Call) -> None:
    """The version."""
    await call.json({"version": __version__})


async def openapi(call: Call) -> None:
    """The OpenAPI document."""
    await call.json(document(call.serving.operations))


async def page(call: Call) -> None:
    """The same to read."""
    policy = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
    text = _page(document(call.serving.operations))
    await call.content(text.encode(), b"text/html; charset=utf-8", 200, policy)


def document(operations: Sequence[Described]) -> dict[str, Any]:
    """The OpenAPI document of these endpoints."""
    bodies = [each.body for each in operations if each.body is not None]
    kinds = list(dict.fromkeys(bodies))
    references, components = msgspec.json.schema_components(
        kinds, ref_template="#/components/schemas/{name}"
    )
    schemas = dict(zip(kinds, references, strict=True))
    paths: dict[str, Any] = {}
    for each in operations:
        path = re.sub(r":\w+", "", each.path)
        paths.setdefault(path, {})[each.method.lower()] = _operation(each, path, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "fourfold", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(
    each: Described, path: str, schemas: dict[type[msgspec.Struct], dict[str, Any]]
) -> dict[str, Any]:
    failure = {"application/json": {"schema": _ERROR}}
    found: dict[str, Any] = {
        "summary": each.summary,
        "responses": {
            "200": {"description": "Success."},
            **{code: {"description": t, "content": failure} for code, t in _FAILURES.items()},
        },
    }
    names = re.findall(r"\{(\w+)\}", path)
    if names:
        found["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]
    if each.body is not None:
        content = {"application/json": {"schema": schemas[each.body]}}
        found["requestBody"] = {"required": True, "content": content}
    return found


def _page(description: dict[str, Any]) -> str:
    parts = [f"<!doctype html><meta charset=utf-8><title>fourfold</title><style>{_STYLE}</style>"]
    parts.append(f"<h1>fourfold {html.escape(__version__)}</h1>")
    for path, methods in description["paths"].items():
        for method, each in methods.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(each['summary'])}</p>")
            content = each.get("requestBody", {}).get("content", {})
            for schema in content.values():
                parts.append(_fields(schema["schema"], description))
    return "".join(parts)


def _fields(schema: dict[str, Any], description: dict[str, Any]) -> str:
    name = schema["$ref"].rpartition("/")[2]
    found = description["components"]["schemas"][name]
    needed = found.get("required", ())
    rows = [
        f"<tr><td><code>{html.escape(field)}</code><td>{html.escape(_kind(kind))}"
        f"<td>{'required' if field in needed else ''}"
        for field, kind in found["properties"].items()
    ]
    return f"<p>{html.escape(found.get('description', ''))}</p><table>{''.join(rows)}</table>"


def _kind(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_kind(each) for each in schema["anyOf"] if each.get("type") != "null")
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    kind = str(schema.get("type", "any"))
    return f"{kind} of {_kind(schema['items'])}" if schema.get("items") else kind
