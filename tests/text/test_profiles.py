"""A checkpoint gets the prompt it was trained with, and thinking means what the request said."""

import hashlib
from pathlib import Path

import pytest

from fourfold.core.errors import ConfigError, RequestError
from fourfold.text.profiles import (
    ENCODER_FILE,
    ChatProfile,
    Effort,
    detect_profile,
    effort_prefix,
    resolve_thinking,
)
from tests.text.answers import examples

PREVIEW, OFFICIAL = ChatProfile.PREVIEW, ChatProfile.OFFICIAL


def checkpoint(directory: Path, source: str | bytes) -> Path:
    file = directory / ENCODER_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(source if isinstance(source, bytes) else source.encode())
    return directory


@pytest.mark.parametrize(
    ("source", "profile", "certain"),
    [
        ('import re\nREASONING_EFFORT_MAX = "x"\n', PREVIEW, True),
        ("REASONING_EFFORT_PROMPTS: dict[str, str] = {}\n", OFFICIAL, True),
        ('REASONING_EFFORT_MAX = "x"\nREASONING_EFFORT_PROMPTS = {}\n', OFFICIAL, True),
        ('"""\nREASONING_EFFORT_PROMPTS = 1\n"""\nREASONING_EFFORT_MAX = 2\n', PREVIEW, True),
        ("# REASONING_EFFORT_PROMPTS = 1\nREASONING_EFFORT_MAX = (\n 2)\n", PREVIEW, True),
        ("def f():\n    REASONING_EFFORT_PROMPTS = 1\nx = 2\n", PREVIEW, False),
        ("print(REASONING_EFFORT_PROMPTS)\n", PREVIEW, False),
        ("f(\nREASONING_EFFORT_PROMPTS=1)\n", PREVIEW, False),
        ('X = "Reasoning Effort: Beyond maximum — exhaustive, relentless, and '
         'uncompromising."\n', OFFICIAL, False),
        ("", PREVIEW, False),
        (b"\xff\xfe\x00", PREVIEW, False),
        ("REASONING_EFFORT_PROMPTS = 1\n" + "(" * 5000, OFFICIAL, True),
        ("x = 1\n" * 200_000 + "REASONING_EFFORT_PROMPTS = 1\n", PREVIEW, False),
    ],
)  # fmt: skip
def test_the_encoder_file_tells_the_profile(
    tmp_path: Path, source: str | bytes, profile: ChatProfile, certain: bool
) -> None:
    found = detect_profile(checkpoint(tmp_path, source))
    assert (found.profile, found.certain) == (profile, certain)
    if not certain:
        assert "nearest" in found.reason
        assert "--chat-profile" in found.reason


def test_the_encoder_file_is_never_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    detect_profile(checkpoint(tmp_path, f"open({str(trap)!r}, 'w')\nREASONING_EFFORT_MAX = 1\n"))
    assert not trap.exists()


def test_a_missing_encoder_file_is_said(tmp_path: Path) -> None:
    found = detect_profile(tmp_path)
    assert (found.profile, found.certain, found.sha256) == (PREVIEW, False, None)
    assert ENCODER_FILE in found.reason


def test_a_known_digest_goes_before_the_names(tmp_path: Path) -> None:
    source = b"REASONING_EFFORT_MAX = 1\n"
    digest = hashlib.sha256(source).hexdigest()
    found = detect_profile(checkpoint(tmp_path, source), known={digest: OFFICIAL})
    assert (found.profile, found.certain, found.sha256) == (OFFICIAL, True, digest)


def test_the_flag_goes_before_the_file(tmp_path: Path) -> None:
    checkpoint(tmp_path, "REASONING_EFFORT_MAX = 1\n")
    assert detect_profile(tmp_path, "official").profile is OFFICIAL
    with pytest.raises(ConfigError, match=r"--chat-profile must be one of preview, official"):
        detect_profile(tmp_path, "newest")


def test_effort_texts_are_those_of_the_examples() -> None:
    prompts = {case["name"]: case["expected_prompt"] for case in examples("chat-examples.jsonl")}

    def of(name: str) -> str:
        text: str = prompts[name]
        return text[text.index("Reasoning Effort") : text.index("Be brief.")]

    high, highest = of("thinking_effort_high_official"), of("thinking_effort_max_official")
    assert high.endswith("unchecked.\n\n")
    assert highest.endswith("undiscovered.\n\n")
    assert "—" in highest
    texts = {
        profile: [effort_prefix(profile, effort) for effort in Effort] for profile in ChatProfile
    }
    assert texts == {PREVIEW: ["", "", high], OFFICIAL: ["", high, highest]}


@pytest.mark.parametrize(
    ("name", "official", "preview"),
    [
        (None, Effort.HIGH, Effort.HIGH),
        ("minimal", Effort.LOW, Effort.LOW),
        ("low", Effort.LOW, Effort.LOW),
        ("medium", Effort.HIGH, Effort.HIGH),
        ("high", Effort.HIGH, Effort.HIGH),
        ("xhigh", Effort.HIGH, Effort.MAX),
        ("max", Effort.MAX, Effort.MAX),
        ("ultra", Effort.MAX, Effort.MAX),
    ],
)
def test_every_effort_name_has_its_tier(
    name: str | None, official: Effort, preview: Effort
) -> None:
    assert resolve_thinking(OFFICIAL, reasoning_effort=name) == (True, official)
    assert resolve_thinking(PREVIEW, reasoning_effort=name) == (True, preview)


@pytest.mark.parametrize(
    ("switches", "on"),
    [
        ({}, True),
        ({"thinking": True}, True),
        ({"thinking": False}, False),
        ({"enable_thinking": False}, False),
        ({"thinking": False, "enable_thinking": True}, True),
        ({"thinking": {"type": "enabled"}, "enable_thinking": False}, True),
        ({"thinking": {"type": "disabled"}, "reasoning_effort": "max"}, False),
        ({"thinking": True, "reasoning_effort": "none"}, False),
    ],
)
def test_one_switch_is_enough_and_effort_none_wins(switches: dict[str, object], on: bool) -> None:
    assert resolve_thinking(OFFICIAL, **switches)[0] is on


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"thinking": "yes"}, "thinking must be a boolean, found 'yes'"),
        ({"thinking": {"type": "adaptive"}}, "thinking.type must be"),
        ({"enable_thinking": 1}, "enable_thinking must be a boolean, found a number"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort must be one of none, minimal"),
        ({"reasoning_effort": 3}, "reasoning_effort must be one of .* found a number"),
    ],
)
def test_other_switches_are_refused_by_name(switches: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        resolve_thinking(OFFICIAL, **switches)
