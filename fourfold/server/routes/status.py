"""How the server is: /live, /health, /version, /metrics, /v1/models, /reset_prefix_cache."""

from __future__ import annotations

from typing import Any

from fourfold.core.client import EngineState
from fourfold.server.call import Call
from fourfold.server.errors import model_not_found
from fourfold.server.metrics import CONTENT_TYPE
from fourfold.server.serving import Serving


async def live(call: Call) -> None:
    """The process answers."""
    await call.json({"status": "live"})


async def health(call: Call) -> None:
    """200 if requests are taken, else 503 with the reason and, while loading, how far it is."""
    body = health_body(call.serving)
    await call.json(body, 200 if body["status"] == "ready" else 503)


def health_body(serving: Serving) -> dict[str, Any]:
    """What /health says."""
    seen = serving.engine.health()
    body: dict[str, Any] = {"status": _status(serving)}
    if seen.state in (EngineState.NEW, EngineState.LOADING):
        loading = serving.loading
        left = loading.seconds_left
        body["loading"] = {
            "stage": loading.part,
            "bytes_done": loading.done,
            "bytes_total": loading.total,
            "bytes_per_second": round(loading.rate),
            "seconds_left": None if left is None else round(left, 1),
        }
    else:
        body |= {
            "requests": seen.requests,
            "steps": seen.num_steps,
            "last_step_age_seconds": round(seen.step_age, 3),
        }
    return body


def _status(serving: Serving) -> str:
    state = serving.engine.health().state
    if state is EngineState.DEAD:
        return "dead"
    if serving.draining or state in (EngineState.DRAINING, EngineState.STOPPED):
        return "draining"
    return "ready" if state is EngineState.READY else "loading"


async def models(call: Call) -> None:
    """The names the model is served under."""
    await call.json(
        {"object": "list", "data": [_card(call.serving, n) for n in call.serving.names]}
    )


async def model(call: Call) -> None:
    """One of them."""
    name = call.scope["path_params"]["name"]
    if name not in call.serving.names:
        raise model_not_found(name)
    await call.json(_card(call.serving, name))


def _card(serving: Serving, name: str) -> dict[str, Any]:
    ready = serving.engine.health().state in (EngineState.READY, EngineState.DRAINING)
    return {
        "id": name,
        "object": "model",
        "created": serving.created,
        "owned_by": "fourfold",
        "root": serving.names[0],
        "parent": None,
        "max_model_len": serving.info.max_model_len if ready else None,
    }


async def metrics(call: Call) -> None:
    """For Prometheus."""
    await call.content(await call.serving.metrics.exposition(), CONTENT_TYPE.encode())


async def reset_prefix_cache(call: Call) -> None:
    """Give up all cached state that nobody uses."""
    call.serving.expect_ready()
    await call.attached(call.serving.engine.reset_prefix_cache())
    await call.json({"status": "ok"})
