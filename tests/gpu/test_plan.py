"""`plan` against a GPU: memory predicted from the geometry alone is what an engine takes."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

ROOT = Path(__file__).parent.parent.parent
TOLERANCE = 0.03


@pytest.fixture(scope="module", params=["flash", "flash-base"])
def measured(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Eight layers of Flash with FP4 experts, and of Flash-Base with FP8 experts, in a process of
    their own; `before` is what other processes, this one among them, hold meanwhile."""
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.memory_of", request.param],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["before"] = total - free
    print(json.dumps(found, indent=1))
    return found


def near(planned: int, real: int) -> bool:
    return abs(planned - real) <= TOLERANCE * real


def test_weights_take_what_was_planned(measured: dict[str, Any]) -> None:
    """To the byte as the engine counts them, and what the allocator rounds up beside."""
    capacity = measured["capacity"]
    assert capacity["weight_bytes"] == measured["engine_capacity"]["weight_bytes"]
    stages = measured["stages"]
    real = stages["weights"]["allocated"] - stages["context"]["allocated"]
    assert abs(real - capacity["weight_bytes"]) <= 0.001 * real, (real, capacity["weight_bytes"])


def test_the_engine_says_what_was_planned(measured: dict[str, Any]) -> None:
    assert measured["engine_capacity"] == measured["capacity"]
    assert near(measured["pages_planned"], measured["pages_here"])


def test_steps_find_room_in_what_was_set_aside(measured: dict[str, Any]) -> None:
    """What the allocator has of the device does not grow behind the start, but for small segments."""
    stages = measured["stages"]
    grown = stages["decode"]["reserved"] - stages["engine"]["reserved"]
    assert grown <= 64 << 20, grown


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_the_driver_says_what_was_planned(measured: dict[str, Any], stage: str) -> None:
    """All that the process holds, its context and captured steps included, within 3 %."""
    real = measured["stages"][stage]["driver"] - measured["before"]
    assert near(measured["planned"], real), (measured["planned"], real, measured["stages"])
