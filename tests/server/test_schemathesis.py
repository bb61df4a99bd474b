"""schemathesis on our own OpenAPI document: no input makes a 5xx."""

from __future__ import annotations

import pytest

from tests.server.http import site

schemathesis = pytest.importorskip(
    "schemathesis", reason="schemathesis is not installed (extra: peers)"
)
pytestmark = pytest.mark.full


def test_p2_no_generated_request_causes_a_5xx() -> None:
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error

    with site() as web:
        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{web.port}/openapi.json")
        tried = 0
        for found in schema.get_all_operations():
            operation = found.ok()

            @settings(
                max_examples=60, deadline=None, derandomize=True, database=None,
                suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate],
            )  # fmt: skip
            @given(case=operation.as_strategy())
            def hold(case: schemathesis.Case) -> None:
                response = case.call(timeout=20)
                case.validate_response(response, checks=[not_a_server_error])

            hold()
            tried += 1
        assert tried >= 15
        web.says("fine")
        assert web.post("/v1/completions", prompt="a").json["choices"][0]["text"] == "fine"
