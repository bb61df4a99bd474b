"""A stop string ends the text where it is complete first, and no piece of it gets out."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fourfold.core.errors import RequestError
from fourfold.text.stop import StopMatcher
from tests.text.answers import CUTS, pieces

# A small alphabet, so that stop strings overlap, nest and nearly match.
words = st.text("ab\n", min_size=1, max_size=5)


def run(parts: list[str], stops: list[str], include: bool = False) -> tuple[str, str | None]:
    matcher = StopMatcher(stops, include)
    text = "".join([*map(matcher.push, parts), matcher.finish()])
    return text, matcher.matched


def reference(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@given(st.text("ab\n", max_size=40), st.lists(words, max_size=4), CUTS, st.booleans())
@example("abcdefgh", ["cdef", "de", "bcde"], [3, 4], False)
@example("aaaaab", ["aaab"], [1, 2, 3, 4, 5], False)
def test_any_cut_ends_where_the_whole_text_does(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    expected = reference(text, stops, include)
    assert run(pieces(text, cuts), stops, include) == expected
    assert run(list(text), stops, include) == expected


@given(st.text("ab", max_size=30), st.lists(words, min_size=1, max_size=3))
def test_nothing_handed_out_is_ever_taken_back(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    out = ""
    for index, character in enumerate(text):
        out += matcher.push(character)
        final, _ = reference(text, stops, False)
        assert final.startswith(out)
        # Nor is more held back than the beginning of a stop string.
        held = text[len(out) : index + 1]
        assert matcher.matched or not held or any(stop.startswith(held) for stop in stops)


def test_stops_that_end_together_leave_nothing_of_the_longer_one() -> None:
    assert run(["abcdefgh"], ["de", "bcde", "cde"]) == ("a", "bcde")


def test_text_after_the_end_is_dropped() -> None:
    matcher = StopMatcher(["STOP"])
    assert matcher.push("one ST") == "one "
    assert matcher.push("OP two") == ""
    assert matcher.push("three") == matcher.finish() == ""
    assert matcher.matched == "STOP"


def test_without_stops_nothing_is_held() -> None:
    assert StopMatcher([]).push("a<") == "a<"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match="stop"):
        StopMatcher(["x", ""])
