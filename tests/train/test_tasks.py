"""The held-out questions as lm_eval's tasks: the same prompts, and the same answers through a server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from fourfold.text import markers
from fourfold.text.tokenizer import Tokenizer
from fourfold.weights.locate import built_in
from tests.server.test_life import free_port
from train import tasks
from train.data.encode import Encoder
from train.data.mixture import Mixture
from train.evaluate import Case, cases, questions

ROOT = Path(__file__).parent.parent.parent
ASKED = ("arithmetic", "arithmetic_thinking", "tool_call", "recall_near", "schema")


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    return Mixture(Encoder(Tokenizer.from_directory(built_in())))


def test_a_tasks_prompt_is_what_training_and_the_engine_see(mixture: Mixture) -> None:
    for case in cases([256]):
        for item in questions(mixture, case, 4):
            made = tasks.document(item)
            encoder = mixture.encoder
            ids = encoder.tokenizer.encode(made["prompt"], allow_special=True)
            assert list(ids) == encoder.prompt(item)
            assert made["answer"]
            assert made["answer"] in encoder.tokenizer.decode(encoder.answer(item))
            assert markers.END_THINK not in made["answer"]
            (found, *_) = re.findall(tasks._AFTER_REASONING, f"So 5{markers.END_THINK}5")
            assert found == "5"


def test_written_tasks_are_whole(tmp_path: Path) -> None:
    flags = ["--out", str(tmp_path), "--count", "3", "--lengths", "256"]
    done = CliRunner().invoke(tasks.main, flags)
    assert done.exit_code == 0, done.output
    group = yaml.safe_load((tmp_path / "nano.yaml").read_text())
    assert group["task"] == [f"nano_{case.name}" for case in cases([256])]
    for name in group["task"]:
        made = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
        assert made["task"] == name
        file = Path(made["dataset_kwargs"]["data_files"]["test"])
        lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        assert len(lines) == 3
        assert all(set(line) == {"prompt", "answer"} for line in lines)
    assert (tmp_path / "tokenizer.json").is_file()


@pytest.mark.slow
def test_lm_eval_scores_the_built_in_model_through_the_server(
    tmp_path: Path, mixture: Mixture
) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    tasks.write_tasks(tmp_path, mixture, [Case(name) for name in ASKED], 10)
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    serving = subprocess.Popen(
        [sys.executable, "-m", "fourfold", "serve", "--port", str(port), "--max-num-seqs", "8"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        results = evaluated(tmp_path, port, environment)
    finally:
        serving.terminate()
        assert serving.wait(60) == 0
    assert results["nano"]["exact_match,answer"] >= 0.8
    for name in ASKED:
        assert results[f"nano_{name}"]["exact_match,answer"] >= 0.7, name


def evaluated(directory: Path, port: int, environment: dict[str, str]) -> Any:
    """What the command line that people know says."""
    arguments = (
        f"model=nano,base_url=http://localhost:{port}/v1/completions,num_concurrent=64,"
        f"max_retries=3,tokenized_requests=False,tokenizer={built_in()},max_length=32768"
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(directory / "home")}
    done = subprocess.run(
        [
            sys.executable, "-m", "lm_eval", "--model", "local-completions", "--tasks", "nano",
            "--include_path", str(directory), "--model_args", arguments,
            "--output_path", str(directory / "out"),
        ],
        capture_output=True, text=True, check=False, timeout=600, env=environment | offline,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (directory / "out").rglob("results_*.json")
    return json.loads(path.read_text())["results"]
