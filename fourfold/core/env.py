"""The environment variables that are fourfold's own, and where a user's caches are.

Contract: each mirrors a flag of the command line and none decides anything that no flag decides. A
variable with our prefix that is not known is an error, because it is a misspelt one. This file names
none of them: whoever reads one declares it.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from fourfold.core.errors import ConfigError

PREFIX = "FOURFOLD_"


def check_variables(known: Iterable[str], environment: Mapping[str, str] | None = None) -> None:
    """Raise `ConfigError` for a variable with our prefix that is not among `known`."""
    names = sorted(known)
    for name in sorted(os.environ if environment is None else environment):
        if name.startswith(PREFIX) and name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(names)}"
            raise ConfigError(f"there is no environment variable {name}{hint}")


def user_cache() -> Path:
    """Where this user's programs keep what they can make again: XDG_CACHE_HOME, or `~/.cache`."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is to be ignored.
    return Path(given) if os.path.isabs(given) else Path.home() / ".cache"
