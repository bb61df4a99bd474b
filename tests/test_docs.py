"""What the documentation shows must run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from fourfold.weights.synthetic import write_checkpoint

ROOT = Path(__file__).parent.parent


def test_the_observer_example_runs(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "tiny", "tiny")
    done = subprocess.run(
        [
            sys.executable,
            "docs/observe.py",
            str(tmp_path / "tiny"),
            "The capital of France is Paris",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for layer in range(6):
        assert f"layers.{layer}.ffn.ids" in done.stdout
    assert "layers.2.attn.listed" in done.stdout
