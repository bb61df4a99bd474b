"""Log lines: bounded, one line each, whatever they are given."""

from __future__ import annotations

import io
import json

import pytest

from fourfold.core.env import check_variables
from fourfold.core.errors import ConfigError
from fourfold.core.log import MAX_LINE, Log


@pytest.mark.parametrize("style", ["text", "json"])
def test_a_value_cannot_make_a_second_line_nor_a_long_one(style: str) -> None:
    stream = io.StringIO()
    values = {f"v{i}": "a\nb\r\u2028\x1b[0m" * 1000 for i in range(30)}
    Log(style, stream).event("request", **values)
    (line,) = stream.getvalue().splitlines()
    assert "\x1b" not in line
    if style == "text":
        assert len(line) <= MAX_LINE
    else:
        assert json.loads(line)["event"] == "request"
        assert len(line) < 30 * 1000


def test_lines_are_times_words_and_values() -> None:
    stream = io.StringIO()
    Log("text", stream, clock=lambda: 1.5).event(
        "request", id="a", n=3, t=0.123456, none=None, s="a b"
    )
    assert stream.getvalue() == '1970-01-01T00:00:01.500Z request id=a n=3 t=0.1235 s="a b"\n'


def test_a_log_that_is_gone_ends_nothing() -> None:
    stream = io.StringIO()
    stream.close()
    Log("text", stream).event("request")


def test_a_misspelt_variable_is_an_error_with_a_suggestion() -> None:
    known = ("FOURFOLD_PORT", "FOURFOLD_HOST")
    check_variables(known, {"FOURFOLD_PORT": "1", "PATH": "x"})
    with pytest.raises(ConfigError, match="FOURFOLD_PROT; did you mean FOURFOLD_PORT"):
        check_variables(known, {"FOURFOLD_PROT": "1"})
