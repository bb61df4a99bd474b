"""Random numbers as a function of seed, absolute position and purpose, and of nothing else.

Counter-based: what a request samples cannot depend on its batch, on chunking, on preemption, or on how
many tokens were drafted. Three rounds of the SplitMix64 finaliser, vectorised over rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

SAMPLING = 0  # the only purpose today; others get numbers of their own at the same position

Numbers = Sequence[int] | npt.NDArray[np.int64] | npt.NDArray[np.uint64]

_WEYL = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * _MULTIPLY[0]
    z = (z ^ (z >> np.uint64(27))) * _MULTIPLY[1]
    return z ^ (z >> np.uint64(31))


def uniform(seeds: Numbers, positions: Numbers, purpose: int = SAMPLING) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1), one for each pair of seed (0 … 2^64 − 1) and token position."""
    state = np.asarray(seeds, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for word in (np.uint64(purpose), np.asarray(positions, dtype=np.uint64)):
            state = _mix((state ^ word * _MULTIPLY[1]) + _WEYL)
        return (_mix(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53
