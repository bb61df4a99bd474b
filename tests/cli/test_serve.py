"""`fourfold serve`'s flags: every spelling, every refusal, without a model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from fourfold.cli import main
from fourfold.cli import serve as serving
from fourfold.cli.group import known_variables


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the flags of the last call became; nothing is served."""
    found: dict[str, Any] = {}
    command = main.commands["serve"]

    def remember(**flags: Any) -> None:
        serving._expect_parsers(flags)
        serving.say_no_effect(flags, serving._NO_EFFECT)
        found.update(serving.llm_arguments(flags, flags["seed"]), flags=flags)
        found["settings"] = serving._settings(flags)

    monkeypatch.setattr(command, "callback", remember)
    return found


def call(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(main, ["serve", *arguments], env=environment)


def test_the_command_line_of_atom_runs_unchanged(parsed: dict[str, Any]) -> None:
    result = call(
        "--model", "M", "--server-port", "8001", "--max-model-len", "16384", "--max-num-seqs",
        "256", "--gpu-memory-utilization", "0.95", "-tp", "1", "--kv_cache_dtype", "fp8",
        "--method", "mtp", "--num-speculative-tokens", "3", "--trust-remote-code",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert parsed["flags"]["port"] == 8001
    assert parsed["kv_cache_dtype"] == "fp8"
    assert parsed["speculative_config"] == {"method": "mtp", "num_speculative_tokens": 3}


def test_the_command_line_of_vllm_runs_unchanged(parsed: dict[str, Any]) -> None:
    result = call(
        "M", "--host", "0.0.0.0", "--port", "9", "--served-model-name", "a", "--served-model-name",
        "b", "--api-key", "k", "--tool-call-parser", "deepseek_v4", "--reasoning-parser",
        "deepseek_v4", "--enable-auto-tool-choice", "--tokenizer-mode", "deepseek_v4",
        "--kv-cache-dtype", "fp8", "--block-size", "256", "--no-enable-prefix-caching",
        "--speculative-config", '{"method":"mtp","num_speculative_tokens":2}',
        "--allowed-origins", '["http://a", "http://b"]', "--enable-expert-parallel",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    settings = parsed["settings"]
    assert settings.served_model_names == ("a", "b")
    assert settings.api_keys == ("k",)
    assert settings.allowed_origins == ("http://a", "http://b")
    for flag in ("tool-call-parser", "reasoning-parser", "enable-auto-tool-choice", "block-size"):
        assert f"--{flag} has no effect here" in result.stderr


def test_the_command_line_of_sglang_runs_unchanged(parsed: dict[str, Any]) -> None:
    result = call(
        "--model-path", "M", "--context-length", "4096", "--mem-fraction-static", "0.8",
        "--tp-size", "1", "--dp-size", "1", "--ep-size", "1", "--page-size", "256",
        "--tool-call-parser", "deepseekv4", "--reasoning-parser", "deepseek-v4",
        "--chunked-prefill-size", "4096", "--speculative-algorithm", "EAGLE",
        "--speculative-num-steps", "3", "--speculative-eagle-topk", "1", "--enable-dp-attention",
        "--nnodes", "1", "--node-rank", "0", "--dist-init-addr", "h:1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert parsed["max_model_len"] == 4096
    assert parsed["max_num_batched_tokens"] == 4096
    assert parsed["speculative_config"] == {"method": "mtp", "num_speculative_tokens": 3}


def test_what_changes_nothing_says_so(parsed: dict[str, Any]) -> None:
    flags = {
        "compilation-config": "{}", "cudagraph-capture-sizes": "[1,2,4]", "cudagraph-mode": "FULL",
        "graph-sizes": "[1]", "level": "3", "page-size": "64", "master-addr": "h",
        "master-port": "9", "node-rank": "1", "reasoning-parser": "deepseek_v4",
        "tool-call-parser": "auto", "tokenizer-mode": "auto",
    }  # fmt: skip
    switches = (
        "trust-remote-code", "enable-expert-parallel", "enable-dp-attention",
        "enable-auto-tool-choice", "disable-log-requests",
    )  # fmt: skip
    said = {"page-size": "block-size", "graph-sizes": "cudagraph-capture-sizes"}
    for name, value in flags.items():
        result = call("M", f"--{name}", value)
        assert result.exit_code == 0, result.output
        assert f"--{said.get(name, name)} has no effect here: " in result.stderr
    for name in switches:
        assert f"--{name} has no effect here: " in call("M", f"--{name}").stderr
    assert "no effect" not in call("M", "--tensor-parallel-size", "1", "--pp", "1").stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("",), "model must be a name, found ''"),
        (("nona",), "the built-in model is called nano"),
        (("M", "--model", "M"), "given twice"),
        (("M", "--max-nun-seqs", "3"), "--max-num-seqs"),
        (("M", "--prot", "3"), "--port"),
        (("M", "--port", "70000"), "70000"),
        (("M", "-tp", "2"), "--tensor-parallel-size above 1 is not supported yet"),
        (("M", "-dp", "2"), "--data-parallel-size above 1"),
        (("M", "--tp-size", "2"), "--tensor-parallel-size above 1"),
        (("M", "--speculative-eagle-topk", "4"), "4"),
        (("M", "--speculative-algorithm", "NGRAM"), "NGRAM"),
        (("M", "-pp", "2"), "--pipeline-parallel-size above 1"),
        (("M", "--ep-size", "8"), "--expert-parallel-size above 1"),
        (("M", "--nnodes", "2"), "--nnodes above 1"),
        (("M", "--tool-call-parser", "hermes"), "hermes"),
        (("M", "--api-key", "a key"), "API key"),
        (("M", "--chat-profile", "v3"), "v3"),
        (("M", "--allowed-origins", "["), "--allowed-origins"),
        (("M", "--speculative-config", "{"), "--speculative-config"),
        (("M", "--speculative-config", '{"method":"eagle"}'), "mtp"),
        (("M", "--log-format", "xml"), "xml"),
    ],
)
def test_a_bad_flag_is_one_readable_error(arguments: tuple[str, ...], expected: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert expected in result.stderr
    assert "Traceback" not in result.output


def test_variables_mirror_flags_and_misspelt_ones_are_errors(parsed: dict[str, Any]) -> None:
    result = call("M", FOURFOLD_PORT="9001", FOURFOLD_API_KEY="a b", FOURFOLD_HOST="0.0.0.0")
    assert result.exit_code == 0
    assert parsed["flags"]["port"] == 9001
    assert parsed["settings"].api_keys == ("a", "b")
    assert call("M", "--port", "5", FOURFOLD_PORT="9001").exit_code == 0
    assert parsed["flags"]["port"] == 5
    result = call("M", FOURFOLD_PROT="9001")
    assert result.exit_code == 2
    assert "did you mean FOURFOLD_PORT?" in result.stderr
    assert len(known_variables(main)) <= 12


YAML = """
# as for vLLM
model: M
{name}: 5000
server-port: 7000
api-key: [x, "y"]
served_model_name: name
enforce-eager: true
no-enable-prefix-caching: true
speculative-config: {{method: mtp, num_speculative_tokens: 2}}
"""


@pytest.mark.parametrize("kind", ["toml", "json", "yaml", "yml"])
def test_a_file_of_flags(parsed: dict[str, Any], tmp_path: Path, kind: str) -> None:
    values = {
        "model": "M", "max_model_len": 5000, "server-port": 7000, "api-key": ["x", "y"],
        "served_model_name": "name", "enforce-eager": True, "no-enable-prefix-caching": True,
        "speculative-config": {"method": "mtp", "num_speculative_tokens": 2},
    }  # fmt: skip
    path = tmp_path / f"flags.{kind}"
    lines = "".join(
        f"{key} = {json.dumps(value)}\n" for key, value in values.items() if type(value) is not dict
    )
    lines += "[speculative-config]\nmethod = 'mtp'\nnum_speculative_tokens = 2"
    yaml = YAML.format(name="max_model_len" if kind == "yaml" else "context-length")
    path.write_text({"json": json.dumps(values), "toml": lines}.get(kind, yaml))
    result = call("--config", str(path), "--server-port", "7001")
    assert result.exit_code == 0, result.output
    assert parsed["model"] == "M"
    assert parsed["flags"]["port"] == 7001  # the command line goes before the file
    assert parsed["max_model_len"] == 5000
    assert parsed["settings"].api_keys == ("x", "y")
    assert parsed["settings"].served_model_names == ("name",)
    assert parsed["enforce_eager"]
    assert not parsed["enable_prefix_caching"]
    assert parsed["speculative_config"] == {"method": "mtp", "num_speculative_tokens": 2}
    assert call("other", "--config", str(path), FOURFOLD_MAX_MODEL_LEN="64").exit_code == 0
    assert parsed["model"] == "other"
    assert parsed["max_model_len"] == 64  # and so does the environment


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.toml", "max-nun-seqs = 3", "did you mean --max-num-seqs?"),
        ("a.toml", "port = [1, 2]", "one value"),
        ("a.toml", "port = ", "not valid"),
        ("a.json", "[1]", "names and their values"),
        ("a.json", '{"port": 1, "port": 2}', "port is given twice"),
        ("a.json", '{"port": 1, "server_port": 2}', "server_port was given before"),
        ("a.ini", "port: 1", ".yaml, .toml or .json"),
        ("a.toml", "port = 'x'", "'x'"),
        ("a.yaml", "max_nun_seqs: 3", "did you mean --max-num-seqs?"),
        ("a.yaml", "port: 1\nport: 2", "port is given twice"),
        ("a.yaml", "port: [1", "not valid"),
        ("a.yaml", "port:", "port must be a text or a number, found nothing"),
        ("a.yaml", "port: yes", "found true"),
        ("a.yaml", "enforce-eager: 1", "enforce-eager must be true or false"),
        ("a.yaml", "- port", "names and their values"),
        ("a.yaml", "1: port", "names and their values"),
        ("a.yaml", "model: !!python/object/apply:os.getcwd []", "not valid"),
        ("a.yaml", "port: 70000", "70000"),
    ],
)
def test_a_bad_file_is_one_readable_error(
    tmp_path: Path, name: str, text: str, expected: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    result = call("M", "--config", str(path))
    assert result.exit_code == 2
    assert expected in result.stderr
    assert "cannot be read" in call("M", "--config", str(tmp_path / "none.toml")).stderr


def test_there_are_not_too_many_flags() -> None:
    shown = [
        each
        for each in main.commands["serve"].params
        if isinstance(each, click.Option) and not each.hidden
    ]
    assert len(shown) <= 40


def test_help_and_a_stub_load_no_torch() -> None:
    code = (
        "import sys\nfrom fourfold.cli import main\n"
        "for words in (['serve', '--help'], ['chat', '--help'], ['--help']):\n"
        "    try:\n        main(words)\n    except SystemExit as e:\n        assert e.code == 0\n"
        "import fourfold.server.run, fourfold.engine.client\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--served-model-name" in done.stdout
