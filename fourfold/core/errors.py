"""Errors a user can cause, each one readable sentence.

Contract: every failure that comes from input (a file, a flag, a request) is raised as a subclass of
`FourfoldError`, whose text names the field, tensor or file, what was expected and what was found. The
command line prints that text alone and leaves with `exit_status`; anything else is a defect of ours
and keeps its traceback. This file knows nothing about where errors are shown.
"""

from __future__ import annotations

from collections.abc import Iterable


class FourfoldError(Exception):
    """Base of all errors that user input can cause."""

    exit_status = 2


class ConfigError(FourfoldError):
    """A configuration file or value is missing, malformed, contradictory or unsupported."""


class CheckpointError(FourfoldError):
    """A checkpoint's files do not hold what they must: missing, extra, mismatched or corrupt data."""


class QuantizationError(FourfoldError):
    """A quantisation scheme is contradictory, unsupported, or cannot describe the bytes found."""


class ModelNotFoundError(FourfoldError):
    """`MODEL` is neither built in, nor a directory, nor a snapshot in the local Hugging Face cache."""


class KernelError(FourfoldError):
    """A kernel was asked for that does not exist or cannot run on this device."""


class CapacityError(FourfoldError):
    """A request or a model does not fit; the text gives the numbers."""


class RequestError(FourfoldError):
    """A request's parameters are invalid; the text names the parameter."""


def listing(items: Iterable[str], limit: int = 20) -> str:
    """Join `items` one per line, cut after `limit` with a count of the rest."""
    rows = list(items)
    text = "".join(f"\n  {row}" for row in rows[:limit])
    return text + (f"\n  … and {len(rows) - limit} more" if len(rows) > limit else "")
