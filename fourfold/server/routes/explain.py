"""GET /explain: which kernel runs each op and how everything is stored, with the reasons."""

from __future__ import annotations

from fourfold.server.call import Call


async def explain(call: Call) -> None:
    """What `fourfold explain --json` says, of the engine that runs; 503 until it is loaded."""
    call.serving.expect_ready()
    await call.json(call.serving.info.explanation)
