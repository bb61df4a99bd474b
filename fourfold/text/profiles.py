"""Which prompt a checkpoint was trained with, and what a request's thinking switches mean there.

Contract: two profiles share everything but the text in front of a thinking prompt. A checkpoint's
profile is read from its own encoder file, which is tokenised and never run; `detect_profile` always
answers, and says so when it had to guess. It does not know messages.
"""

from __future__ import annotations

import hashlib
import io
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import MappingProxyType

from fourfold.core.errors import ConfigError, RequestError
from fourfold.text.checks import refuse

ENCODER_FILE = "encoding/encoding_dsv4.py"
_ENCODER_LIMIT = 1 << 20

_ABSOLUTE_MAXIMUM = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to "
    "resolve the root cause, rigorously stress-testing your logic against all potential paths, edge "
    "cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, "
    "considered alternative, and rejected hypothesis to ensure absolutely no assumption is left "
    "unchecked.\n\n"
)
_BEYOND_MAXIMUM = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: "
    "exhaustively decompose the problem into its most fundamental components, trace every causal "
    "chain to its root, and resolve the underlying cause rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles "
    "and are certain that no assumption remains unchecked and no error remains undiscovered.\n\n"
)


class ChatProfile(Enum):
    """The two generations of V4 checkpoints."""

    PREVIEW = "preview"
    OFFICIAL = "official"


class Effort(Enum):
    """How hard to think."""

    LOW = "low"
    HIGH = "high"
    MAX = "max"


# The text after the begin-of-sentence marker, in thinking mode only.
_PREFIXES = MappingProxyType(
    {
        (ChatProfile.PREVIEW, Effort.MAX): _ABSOLUTE_MAXIMUM,
        (ChatProfile.OFFICIAL, Effort.HIGH): _ABSOLUTE_MAXIMUM,
        (ChatProfile.OFFICIAL, Effort.MAX): _BEYOND_MAXIMUM,
    }
)
_EFFORTS = MappingProxyType(
    {
        "minimal": Effort.LOW,
        "low": Effort.LOW,
        "medium": Effort.HIGH,
        "high": Effort.HIGH,
        "xhigh": Effort.HIGH,
        "max": Effort.MAX,
        "ultra": Effort.MAX,
    }
)
# Where the previews' own servers understood a name differently.
_PREVIEW_EFFORTS = MappingProxyType({"xhigh": Effort.MAX})
_NO_EFFORT = "none"

# SHA-256 of an encoder file -> its profile, for files that the names in them would misplace. None is
# known.
KNOWN_ENCODERS: Mapping[str, ChatProfile] = MappingProxyType({})
# Name that an encoder file defines at module level -> the profile; the first one found decides.
_TELLING_NAMES = (
    ("REASONING_EFFORT_PROMPTS", ChatProfile.OFFICIAL),
    ("REASONING_EFFORT_MAX", ChatProfile.PREVIEW),
)


def effort_prefix(profile: ChatProfile, effort: Effort) -> str:
    """What a thinking prompt of `profile` says about `effort`, possibly nothing."""
    return _PREFIXES.get((profile, effort), "")


def resolve_thinking(
    profile: ChatProfile,
    thinking: object = None,
    enable_thinking: object = None,
    reasoning_effort: object = None,
) -> tuple[bool, Effort]:
    """(thinking on, effort) from a request's switches; None is a switch not given.

    `thinking` is a boolean or {"type": "enabled" | "disabled"}. One switch turned on is enough; with
    neither given, thinking is on. Effort "none" turns it off in any case. Raises `RequestError`
    naming the switch.
    """
    switches = [_thinking_switch(thinking), _boolean(enable_thinking, "enable_thinking")]
    given = [switch for switch in switches if switch is not None]
    on = any(given) if given else True
    if reasoning_effort is None:
        return on, Effort.HIGH
    if reasoning_effort == _NO_EFFORT:
        return False, Effort.LOW
    if not isinstance(reasoning_effort, str) or reasoning_effort not in _EFFORTS:
        refuse("reasoning_effort", f"one of {', '.join([_NO_EFFORT, *_EFFORTS])}", reasoning_effort)
    effort = _EFFORTS[reasoning_effort]
    if profile is ChatProfile.PREVIEW:
        effort = _PREVIEW_EFFORTS.get(reasoning_effort, effort)
    return on, effort


def _thinking_switch(value: object) -> bool | None:
    if not isinstance(value, Mapping):
        return _boolean(value, "thinking")
    kind = value.get("type")
    if kind not in ("enabled", "disabled"):
        refuse("thinking.type", "'enabled' or 'disabled'", kind)
    for name in value:
        if name != "type":
            raise RequestError(f"thinking.{name!s:.80} is not supported")
    return bool(kind == "enabled")


def _boolean(value: object, name: str) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    refuse(name, "a boolean", value)


@dataclass(frozen=True)
class DetectedProfile:
    """A checkpoint's profile, why it was chosen, and the SHA-256 of the encoder file if there is
    one. `certain` is False if the file says nothing and the nearest profile was taken."""

    profile: ChatProfile
    reason: str
    certain: bool
    sha256: str | None = None


def detect_profile(
    checkpoint: str | Path,
    override: str | None = None,
    known: Mapping[str, ChatProfile] = KNOWN_ENCODERS,
) -> DetectedProfile:
    """The profile of the checkpoint in this directory, or the one that `override` names.

    `known` maps SHA-256 digests of encoder files to profiles and goes before what the file defines.
    Raises `ConfigError` for an override that is no profile's name.
    """
    if override is not None:
        names = [profile.value for profile in ChatProfile]
        if override not in names:
            raise ConfigError(
                f"--chat-profile must be one of {', '.join(names)}, found {override!r}"
            )
        return DetectedProfile(ChatProfile(override), "chosen by --chat-profile", True)
    path = Path(checkpoint) / ENCODER_FILE
    try:
        with path.open("rb") as file:
            source = file.read(_ENCODER_LIMIT + 1)
    except OSError as error:
        return _nearest(b"", f"{ENCODER_FILE} cannot be read ({error.strerror})", None)
    if len(source) > _ENCODER_LIMIT:
        return _nearest(b"", f"{ENCODER_FILE} is larger than {_ENCODER_LIMIT} bytes", None)
    digest = hashlib.sha256(source).hexdigest()
    if digest in known:
        return DetectedProfile(known[digest], f"{ENCODER_FILE} is a known file", True, digest)
    names_found = _module_level_names(source)
    for name, profile in _TELLING_NAMES:
        if name in names_found:
            return DetectedProfile(profile, f"{ENCODER_FILE} defines {name}", True, digest)
    missing = " nor ".join(name for name, _ in _TELLING_NAMES)
    return _nearest(source, f"{ENCODER_FILE} defines neither {missing}", digest)


def _nearest(source: bytes, why: str, digest: str | None) -> DetectedProfile:
    """The profile whose prompts an unknown encoder file is most likely to build."""
    newer = _BEYOND_MAXIMUM.splitlines()[0].encode() in source
    profile = ChatProfile.OFFICIAL if newer else ChatProfile.PREVIEW
    note = f"{why}; took the nearest profile, {profile.value}: --chat-profile chooses another"
    return DetectedProfile(profile, note, False, digest)


def _module_level_names(source: bytes) -> set[str]:
    """Names assigned at module level; of a file that is no Python, those before the fault.

    Only the tokens are looked at: no syntax tree, whose depth a hostile file could choose.
    """
    found = set()
    line_start, depth, name = True, 0, None
    try:
        for token in tokenize.tokenize(io.BytesIO(source).readline):
            if token.type in (tokenize.ENCODING, tokenize.NL, tokenize.COMMENT):
                continue
            if name is not None and token.string in ("=", ":"):
                found.add(name)
            name = (
                token.string if line_start and not depth and token.type == tokenize.NAME else None
            )
            depth += (token.type == tokenize.INDENT) - (token.type == tokenize.DEDENT)
            line_start = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    except (tokenize.TokenError, SyntaxError):
        return found
    return found
