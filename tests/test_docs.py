"""What the documentation shows must run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from fourfold.cli import main as fourfold
from fourfold.weights.synthetic import write_checkpoint
from train import report, tasks
from train.cli import main as train

ROOT = Path(__file__).parent.parent
PROGRAMS = {
    "fourfold": fourfold,
    "python -m train": train,
    "python -m train.report": report.main,
    "python -m train.tasks": tasks.main,
}


def shown_commands() -> Iterator[tuple[str, str]]:
    """(file, command line) of every command of ours in the pages' code."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
        for line in "".join(blocks).replace("\\\n", " ").splitlines():
            for command in line.split(" && "):
                text = command.strip().removeprefix(".venv/bin/")
                if re.match("fourfold |python -m train", text + " "):
                    yield page.name, text


@pytest.mark.parametrize(("page", "line"), sorted(set(shown_commands())))
def test_every_command_that_is_shown_is_one(page: str, line: str) -> None:
    """Its name, its flags and their values; nothing runs."""
    words = shlex.split(line, comments=True)
    size = 1 if words[0] == "fourfold" else 3
    command: click.Command = PROGRAMS[" ".join(words[:size])]
    words = words[size:]
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    command.make_context(page, words)


@pytest.mark.full
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
