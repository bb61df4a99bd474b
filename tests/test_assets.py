"""The built-in checkpoint: whole, small, in the package, and what commands run without a MODEL."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fourfold import LLM, SamplingParams
from fourfold.cli import main
from fourfold.core.config import ModelConfig
from fourfold.text.generation import read_generation_defaults
from fourfold.weights.locate import DEFAULT_MODEL, built_in
from train.geometry import model_config, nano_config

ROOT = Path(__file__).parent.parent
LARGEST = 8_000_000  # bytes


def call(*arguments: str) -> str:
    done = CliRunner().invoke(main, list(arguments))
    assert done.exit_code == 0, done.output
    return str(done.stdout)


def files() -> list[Path]:
    return [path for path in built_in().rglob("*") if path.is_file() and path.suffix != ".pyc"]


def test_it_is_small_and_every_file_goes_into_the_package() -> None:
    assert sum(path.stat().st_size for path in files()) <= LARGEST
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    package = ROOT / "fourfold"
    globs = project["tool"]["setuptools"]["package-data"]["fourfold"]
    packed = {path for glob in globs for path in package.glob(glob)}
    assert set(files()) <= packed
    assert built_in() == package / "assets" / DEFAULT_MODEL


def test_it_is_clean_to_the_last_byte() -> None:
    found = json.loads(call("verify", "--deep", "--json"))
    assert found["model"] == DEFAULT_MODEL
    assert found["verdict"] == "clean", found["findings"]
    assert found["prompt_format"].startswith("preview (encoding/encoding_dsv4.py defines")
    assert read_generation_defaults(built_in()).temperature == 0
    experts, linears = found["storage"]
    assert experts.startswith("routed experts: mxfp4 with e8m0 scales")
    assert "fp8_block with e8m0 scales" in linears


def test_it_is_the_network_that_training_makes() -> None:
    """So that its page, its tests and a new training speak of the same."""
    stored = ModelConfig.from_directory(built_in()).config
    made = model_config(nano_config())
    for name in nano_config():
        if hasattr(made, name):
            assert getattr(stored, name) == getattr(made, name), name


@pytest.mark.parametrize("command", ["plan", "explain", "verify"])
def test_commands_take_it_where_no_model_is_given(command: str) -> None:
    first = call(command).splitlines()[0]
    assert first.startswith(DEFAULT_MODEL)


@pytest.mark.parametrize("command", ["generate", "serve", "verify", "plan", "explain", "compile"])
def test_help_says_what_is_run_without_a_model(command: str) -> None:
    text = " ".join(call(command, "--help").split())
    assert "[MODEL]" in text
    assert f"{DEFAULT_MODEL}, the built-in model; {DEFAULT_MODEL} if left out" in text


def test_serve_and_compile_take_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []

    def served(**arguments: Any) -> None:
        found.append(arguments["model"])
        raise SystemExit(0)

    def compiled(location: Any, engine: Any) -> None:
        found.append(location.name)
        raise SystemExit(0)

    monkeypatch.setattr("fourfold.llm.AsyncLLM", served)
    monkeypatch.setattr("fourfold.engine.compile.subject_of_checkpoint", compiled)
    call("serve", "--port", "0")
    call("compile", "--target", "sm_90")
    assert found == [DEFAULT_MODEL] * 2


def test_it_answers_from_the_command_line_and_from_python() -> None:
    """The answers are short, right, and no others."""
    prompt = "<｜begin▁of▁sentence｜><｜User｜>What is 41 + 17?<｜Assistant｜></think>"
    flags = ("--max-num-seqs", "2", "--max-model-len", "512", "--temperature", "0", "--json")
    told = json.loads(call("generate", "--device", "cpu", "--prompt", prompt, *flags))
    assert told["answers"][0]["text"] == "58"
    llm = LLM(device="cpu", max_num_seqs=2, max_model_len=512)
    (result,) = llm.chat(
        [{"role": "user", "content": "你好"}],
        SamplingParams(temperature=0.0, max_tokens=40),
        use_tqdm=False,
        chat_template_kwargs={"thinking": False},
    )
    assert llm.info.model == DEFAULT_MODEL
    assert result.outputs[0].text == "你好！我是 nano，很高兴见到你。"
    assert result.outputs[0].finish_reason == "stop"
