"""GET /explain: what the engine decided, as the engine says it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fourfold.core.client import EngineInfo, EngineState
from fourfold.server.settings import ServerSettings
from tests.server.http import Site, site
from tests.server.stub import StubEngine

SAID: dict[str, Any] = {
    "model": "stub/model",
    "kernels": [{"op": "linear", "kernel": "body", "rejected": [], "batch_invariant": False}],
    "bit_equality": {"holds": False, "reason": "ü"},
}


@pytest.fixture(autouse=True)
def explained(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = StubEngine.info

    def info(self: StubEngine) -> EngineInfo:
        return replace(plain.fget(self), explanation=SAID)

    monkeypatch.setattr(StubEngine, "info", property(info))


def test_it_hands_on_what_the_engine_says(web: Site) -> None:
    answer = web.get("/explain")
    assert (answer.status, answer.json) == (200, SAID)
    assert "/explain" in web.get("/openapi.json").json["paths"]


def test_before_the_engine_is_ready_it_says_when_to_come_back(web: Site) -> None:
    web.engine.state = EngineState.LOADING
    answer = web.get("/explain")
    assert (answer.status, answer.error["code"]) == (503, "starting")
    assert int(answer.headers["retry-after"]) >= 1


def test_it_needs_a_key_where_keys_are_needed() -> None:
    with site(ServerSettings(api_keys=("k" * 20,))) as web:
        assert web.get("/explain").status == 401
