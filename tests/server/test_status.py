"""What the server says of itself, and who is let in."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fourfold.core.client import EngineState
from fourfold.server.settings import ServerSettings
from tests.server.http import Site, site


def test_health_tells_what_is_so(web: Site) -> None:
    assert (web.get("/health").status, web.get("/health").json["status"]) == (200, "ready")
    assert web.get("/live").status == 200
    for state, word in (
        (EngineState.LOADING, "loading"),
        (EngineState.DRAINING, "draining"),
        (EngineState.DEAD, "dead"),
    ):
        web.engine.state = state
        web.serving.progress("layers.3", 50, 200)
        answer = web.get("/health")
        assert (answer.status, answer.json["status"]) == (503, word)
        assert web.get("/live").status == 200
        if word == "loading":
            loading = answer.json["loading"]
            assert (loading["stage"], loading["bytes_done"]) == ("layers.3", 50)
            assert loading["seconds_left"] >= 0
            assert loading["bytes_per_second"] > 0


@pytest.mark.parametrize(
    ("state", "code"),
    [
        (EngineState.LOADING, "starting"),
        (EngineState.DRAINING, "draining"),
        (EngineState.DEAD, "engine_dead"),
    ],
)
def test_unready_is_503_with_a_time_to_come_back(web: Site, state: EngineState, code: str) -> None:
    web.engine.state = state
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/reset_prefix_cache", {}),
    ):
        answer = web.post(path, **body)
        assert (answer.status, answer.error["code"]) == (503, code)
        assert int(answer.headers["retry-after"]) >= 1


def test_models(web: Site) -> None:
    (card,) = web.get("/v1/models").json["data"]
    assert (card["id"], card["max_model_len"]) == ("stub/model", 2000)
    assert web.get("/v1/models/stub/model").json == card
    assert web.get("/v1/models/other").status == 404


def test_served_names() -> None:
    with site(ServerSettings(served_model_names=("a", "b"))) as web:
        assert [card["id"] for card in web.get("/v1/models").json["data"]] == ["a", "b"]
        body = {"messages": [{"role": "user", "content": "a"}]}
        assert web.post("/v1/chat/completions", model="b", **body).json["model"] == "b"
        assert web.post("/v1/chat/completions", model="stub/model", **body).status == 404


def test_tokenize_and_back(web: Site) -> None:
    found = web.post("/tokenize", prompt="hi 你好").json
    assert found["count"] == len(found["tokens"])
    assert found["max_model_len"] == 2000
    assert web.post("/detokenize", tokens=found["tokens"]).json == {"prompt": "hi 你好"}
    messages = [{"role": "user", "content": "hi"}]
    chat = web.post("/tokenize", messages=messages, chat_template_kwargs={"thinking": False}).json
    shown = web.post("/v1/chat/completions/render", messages=messages, thinking=False).json
    assert chat["tokens"] == shown["token_ids"]
    marked = web.post("/tokenize", prompt="<｜User｜>", return_token_strs=True).json
    assert (marked["count"], marked["token_strs"]) == (1, ["<｜User｜>"])
    assert web.post("/tokenize", prompt="<｜User｜>", parse_special=False).json["count"] > 1
    assert web.post("/tokenize").error["param"] == "prompt"
    answer = web.post("/detokenize", tokens=[5, 898, 10**40])
    assert (answer.status, answer.error["param"]) == (400, "tokens[1]")


def test_the_prefix_cache_is_reset(web: Site) -> None:
    assert web.post("/reset_prefix_cache").status == 200
    assert web.engine.resets == 1


def test_metrics_have_the_names_that_dashboards_use(web: Site) -> None:
    web.says("one two")
    web.post("/v1/completions", prompt="abcdef")
    text = web.get("/metrics").body.decode()
    samples = {
        s.name + json.dumps(s.labels, sort_keys=True): s.value
        for f in text_string_to_metric_families(text)
        for s in f.samples
    }
    for name in (
        *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
        *("time_to_first_token_seconds_count", "inter_token_latency_seconds_count"),
        *("e2e_request_latency_seconds_count", "prompt_tokens_total", "generation_tokens_total"),
        *("num_preemptions_total", "prefix_cache_queries_total", "prefix_cache_hits_total"),
        *("step_time_seconds_total", "last_step_age_seconds"),
    ):
        assert f"fourfold:{name}{{}}" in samples, name
    assert samples["fourfold:kv_cache_usage_perc{}"] == 0.3
    assert samples["fourfold:prefix_cache_hits_total{}"] == 4
    assert samples['fourfold:request_success_total{"finished_reason": "stop"}'] == 1
    assert samples['fourfold:prefix_cache_misses_total{"reason": "not_cached"}'] == 1
    accepted = "fourfold:spec_decode_num_accepted_tokens_per_pos_total"
    assert samples[accepted + '{"position": "0"}'] == 3
    assert samples['fourfold:request_rejected_total{"reason": "requests"}'] == 0


def test_the_dashboard_names_metrics_that_exist(web: Site) -> None:
    text = web.get("/metrics").body.decode()
    there = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if line[0] != "#"}
    board = json.loads((ROOT / "docs/grafana.json").read_text())
    queries = [t["expr"] for panel in board["panels"] for t in panel["targets"]]
    named = {name for query in queries for name in re.findall(r"fourfold:\w+", query)}
    assert len(named) > 20
    assert named <= there


def test_no_request_adds_a_series(web: Site) -> None:
    def series() -> set[str]:
        text = web.get("/metrics").body.decode()
        return {line.rpartition(" ")[0] for line in text.splitlines() if line[0] != "#"}

    web.post("/v1/completions", prompt="a")
    before = series()
    web.post("/v1/completions", prompt="a", model="x" * 50)
    web.post("/v1/chat/completions", messages=[], user="somebody")
    web.get("/nowhere/at/all")
    web.post("/v1/completions", prompt="b", n=3, stream=True)
    assert series() == before


def test_openapi_has_every_route_and_its_fields(web: Site) -> None:
    found = web.get("/openapi.json").json
    assert found["openapi"].startswith("3.1")
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/v1/models/{name}"):
        assert path in found["paths"]
    fields = found["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "tools", "reasoning_effort", "top_k"} <= set(fields)
    page = web.get("/docs")
    assert "/v1/chat/completions" in page.body.decode()
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_wrong_paths_and_methods(web: Site) -> None:
    assert web.get("/v1/nothing").error["code"] == "no_route"
    assert web.get("/v1/completions").status == 405
    assert web.get("/v1/models/").status == 404


def test_the_log_has_one_line_a_request_and_no_text_in_it(web: Site) -> None:
    web.says("classified output")
    web.post("/v1/completions", prompt="secret words", user="somebody")
    web.post("/v1/completions", prompt="secret words", temperature="secret")
    web.post("/v1/chat/completions", messages=[{"role": "secret words", "content": "secret"}])
    lines = web.lines(3)
    assert len(lines) == 3
    assert not re.search("secret|classified|somebody", web.log.getvalue())
    for word in (
        "id=",
        "status=200",
        "prompt_tokens=",
        "output_tokens=",
        "seconds=",
        "finish=stop",
    ):
        assert word in lines[0]


ROOT = Path(__file__).resolve().parents[2]

# ---- keys and origins

KEYS = ServerSettings(api_keys=("k1-secret", "k2-secret"))


def test_without_a_key_only_the_doors_are_open() -> None:
    with site(KEYS) as web:
        for path in ("/live", "/health", "/docs"):
            assert web.get(path).status == 200
        for path in (
            *(
                "/metrics",
                "/v1/models",
                "/version",
                "/openapi.json",
                "/nowhere",
                "/health/",
                "//health",
            ),
            *("/%68ealth", "/health%2f..%2fmetrics", "/docs/../metrics", "/./metrics", "/HEALTH"),
        ):
            answer = web.get(path)
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key"), path
            assert answer.headers["www-authenticate"] == "Bearer"
        assert web.post("/health").status == 401
        body = {"prompt": "a"}
        assert web.call("POST", "/v1/completions", body).status == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer k1-secret"}, 200),
        ({"Authorization": "bearer k2-secret"}, 200),
        ({"x-api-key": "k2-secret"}, 200),
        ({"Authorization": "Bearer k1"}, 401),
        ({"Authorization": "Bearer "}, 401),
        ({"Authorization": "Basic k1-secret"}, 401),
        ({"Authorization": "k1-secret"}, 401),
        ({"Authorization": "Bearer k\xe9y"}, 401),
        ({"x-api-key": ""}, 401),
    ],
)
def test_keys(headers: dict[str, str], status: int) -> None:
    with site(KEYS) as web:
        answer = web.call("GET", "/v1/models", headers=headers)
        assert answer.status == status
        assert b"secret" not in answer.body


def test_pages_from_elsewhere_are_refused() -> None:
    with site(ServerSettings(allowed_origins=("https://good.example",))) as web:
        here = f"http://127.0.0.1:{web.port}"

        def status(origin: str, host: str | None = None) -> int:
            headers = {"Origin": origin} | ({"Host": host} if host else {})
            return web.call("POST", "/v1/completions", {"prompt": "a"}, headers).status

        assert status(here) == 200
        assert status("https://good.example") == 200
        for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "http://[", ""):
            assert status(origin) == 403
        # A stranger's name that was pointed at this address.
        assert status("http://evil.example:80", "evil.example:80") == 403
        asked = web.call("OPTIONS", "/v1/completions", headers={"Origin": "https://good.example"})
        assert asked.status == 204
        assert asked.headers["access-control-allow-origin"] == "https://good.example"
        asked = web.call("OPTIONS", "/v1/completions", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in asked.headers
