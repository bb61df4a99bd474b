"""Faults written into the source of real kernels, and found by what a selftest runs on a GPU.

Each is one changed line in a copy of the project, run by Triton's interpreter in a process of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent.parent
MAIN = """
import sys, torch
from tests.kernels import interpreter  # puts the interpreter right
from fourfold import kernels
from fourfold.core.device import ARCHS, Device
from fourfold.engine.selftest.kernels import check_kernel
found = kernels.load(Device(ARCHS["sm_89"], torch.device("cpu")))
for op in sys.argv[1:]:
    kernel = next(k for k in found if (k.op, k.name) == (op, "triton"))
    print(op, check_kernel(kernel, torch.device("cpu"), (torch.float32,)), sep=": ")
"""

FAULTS = {
    "window too long": ("oldest = p - WINDOW + 1", "oldest = p - WINDOW", "sparse_attention"),
    "sink dropped": ("tl.load(sink + h, mask=h < H", "tl.load(sink + h, mask=h < 0", "sparse_attention"),
    "wrong page": ("+ j // RPP", "+ j // (RPP + 1)", "sparse_attention"),
    "fold off by one": ("(position - first + 1)", "(position - first)", "compress"),
    "saved fold forgotten": ("opens = window <= run", "opens = window < run", "compress"),
    "scale a binade off": ("(exponent + 127)", "(exponent + 126)", "encode_rows"),
    "pairs turned wrongly": ("even * sin + odd * cos", "even * sin - odd * cos", "rotate"),
    "mean over one too many": ("(value * value) / K + eps", "(value * value) / (K + 1) + eps", "rms_norm"),
    "routing weights not normalised": ("picked / total * scaling", "picked * scaling", "route_topk"),
    "tie to the higher expert": (
        "(0x7FFFFFFF - index)", "(0x3FFFFFFF + index)", "route_topk",
    ),
    "wrong expert's weight": ("tl.load(weights + slot,", "tl.load(weights + slot // 2,", "routed_experts"),
    "scale lost": ("[:, None] * s_x[None, :]", "[:, None]", "routed_experts"),
}  # fmt: skip


def copied(folder: Path) -> Path:
    shutil.copytree(ROOT / "fourfold", folder / "fourfold", ignore=shutil.ignore_patterns("*.pyc"))
    return folder / "fourfold"


def check(folder: Path, ops: Iterable[str]) -> dict[str, str]:
    """What the copy in `folder` says of its kernels."""
    path = f"{folder}{os.pathsep}{ROOT}"
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *ops],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_changed_line_is_found(fault: str, tmp_path: Path) -> None:
    old, new, op = FAULTS[fault]
    files = [
        f for f in copied(tmp_path).rglob("kernels/triton/*.py") if old in f.read_text("utf-8")
    ]
    assert files, f"no kernel has the line {old!r} any more: change another one"
    for file in files:
        file.write_text(file.read_text("utf-8").replace(old, new), "utf-8")
    found = check(tmp_path, [op])[op]
    assert found != "None"
    assert "Error" not in found, "it was to compute something else, not to fail"


def test_unchanged_kernels_pass(tmp_path: Path) -> None:
    copied(tmp_path)
    ops = sorted({op for _, _, op in FAULTS.values()} | {"linear", "shared_expert"})
    found = check(tmp_path, ops)
    assert found == dict.fromkeys(ops, "None")
