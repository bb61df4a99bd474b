"""The command line: one readable line for every mistake, and output that a person and a machine can use."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fourfold.cli import main

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    assert call("synth", str(folder), "--seed", "1").exit_code == 0
    return folder


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def generate(model: Path, *arguments: str) -> Result:
    limits = ("--max-num-seqs", "2", "--max-model-len", "512")
    return call("generate", str(model), *limits, *arguments)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            data.pop(key)
        else:
            data[key] = value
    path.write_text(json.dumps(data))


def shard(folder: Path, number: int) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[number]


def truncate(folder: Path) -> None:
    path = shard(folder, 3)
    path.write_bytes(path.read_bytes()[:-100])


def corrupt_header(folder: Path) -> None:
    path = shard(folder, 2)
    raw = bytearray(path.read_bytes())
    raw[8:12] = b"\xff\xfe{{"
    path.write_bytes(raw)


def huge_header(folder: Path) -> None:
    path = shard(folder, 2)
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])


def stale_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    data = json.loads(path.read_text())
    data["weight_map"]["layers.0.attn.extra.weight"] = shard(folder, 1).name
    path.write_text(json.dumps(data))


def escaping_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    data = json.loads(path.read_text())
    data["weight_map"]["head.weight"] = "../elsewhere.safetensors"
    path.write_text(json.dumps(data))


def nan_code(folder: Path) -> None:
    path = shard(folder, 1)
    raw = bytearray(path.read_bytes())
    size = struct.unpack_from("<Q", raw)[0]
    entry = json.loads(raw[8 : 8 + size])["layers.0.attn.wq_a.weight"]
    raw[8 + size + entry["data_offsets"][0]] = 0x7F
    path.write_bytes(raw)


def pickles_only(folder: Path) -> None:
    for path in [*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "config missing": (lambda d: (d / "config.json").unlink(), "config.json"),
    "config not json": (lambda d: (d / "config.json").write_text("{"), "config.json"),
    "config not an object": (lambda d: (d / "config.json").write_text("[]"), "config.json"),
    "another model": (lambda d: edit_config(d, model_type="llama"), "llama"),
    "version 4.1": (lambda d: edit_config(d, model_type="deepseek_v41"), "deepseek_v41"),
    "a key missing": (lambda d: edit_config(d, q_lora_rank=None), "q_lora_rank"),
    "a key of the wrong type": (lambda d: edit_config(d, hidden_size="big"), "hidden_size"),
    "an odd rope": (lambda d: edit_config(d, qk_rope_head_dim=15), "qk_rope_head_dim"),
    "a ratio nobody has": (
        lambda d: edit_config(d, compress_ratios=[0, 0, 4, 7, 4, 128, 0]),
        "compress_ratios[3]",
    ),
    "config against header": (lambda d: edit_config(d, hidden_size=256), "[640, 256]"),
    "expert_dtype against header": (lambda d: edit_config(d, expert_dtype="fp8"), "expert_dtype"),
    "unknown quantisation": (
        lambda d: edit_config(d, quantization_config={"quant_method": "gptq"}),
        "gptq",
    ),
    "tokenizer missing": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json"),
    "tokenizer broken": (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    "shard missing": (lambda d: shard(d, 4).unlink(), "model-00005-of-00009"),
    "shard truncated": (truncate, "model-00004-of-00009"),
    "header corrupt": (corrupt_header, "model-00003-of-00009"),
    "header endless": (huge_header, "model-00003-of-00009"),
    "index stale": (stale_index, "layers.0.attn.extra.weight"),
    "index leaves the directory": (escaping_index, "../elsewhere"),
    "NaN code": (nan_code, "layers.0.attn.wq_a.weight"),
    "pickles only": (pickles_only, "pytorch_model.bin"),
}


def one_line(result: Result) -> str:
    """The error of a refused command, after checking how it was said."""
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert "Traceback" not in result.output
    line = result.stderr.strip()
    assert line.splitlines()[-1].lower().startswith(("error", "fourfold: error")) or "\n  " in line
    return line


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_bad_checkpoint_gives_one_readable_error(name: str, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny, folder)
    spoil, expected = CHECKPOINTS[name]
    spoil(folder)
    assert expected in one_line(generate(folder, "--prompt", "x", "--max-tokens", "2"))


FLAGS = [
    (("",), "model must be a name, found ''"),
    (("--model", ""), "model must be a name, found ''"),
    (("/nowhere/at/all",), "/nowhere/at/all"),
    (("no-org/no-model",), "hf download no-org/no-model"),
    (("MODEL", "--model", "MODEL"), "given twice"),
    (("MODEL", "--max-nun-seqs", "3"), "--max-num-seqs"),
    (("MODEL", "--max-tokens", "0"), "max_tokens"),
    (("MODEL", "--max-tokens", "many"), "many"),
    (("MODEL", "--temperature", "-1"), "temperature"),
    (("MODEL", "--temperature", "nan"), "temperature"),
    (("MODEL", "--top-p", "1.5"), "top_p"),
    (("MODEL", "--seed", "-4"), "seed"),
    (("MODEL", "--max-tokens", "5000"), "max_model_len"),
    (("MODEL", "--max-model-len", "100000"), "max_position_embeddings"),
    (("MODEL", "--kernel", "attention"), "OP=NAME"),
    (("MODEL", "--kernel", "nosuch=body"), "nosuch"),
    (("MODEL", "--kernel", "moe=nosuch"), "moe=nosuch"),
    (("MODEL", "--kernel", "moe=body", "--kernel", "moe=body"), "twice"),
    (("MODEL", "-tp", "2"), "not supported yet"),
    (("MODEL", "-dp", "2"), "--data-parallel-size"),
    (("MODEL", "--device", "cuda:x"), "cuda:N"),
    (("MODEL", "--device", "tpu"), "tpu"),
    (("MODEL", "--expert-dtype", "fp8"), "fp8"),
    (("MODEL", "--expert-dtype", "int3"), "int3"),
    (("MODEL", "--kv-cache-dtype", "int8"), "int8"),
    (("MODEL", "--prompt", ""), "at least one token"),
]


@pytest.mark.parametrize(
    ("arguments", "expected"), FLAGS, ids=lambda v: " ".join(v) if isinstance(v, tuple) else ""
)
def test_a_bad_flag_gives_one_readable_error(
    arguments: tuple[str, ...],
    expected: str,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    given = [str(tiny) if a == "MODEL" else a for a in arguments]
    assert expected in one_line(call("generate", *given))


def test_synth_refuses_what_it_cannot_write(tiny: Path, tmp_path: Path) -> None:
    assert "nothing is overwritten" in one_line(call("synth", str(tiny)))
    assert "layers" in one_line(call("synth", str(tmp_path / "a"), "--layers", "99"))
    assert "huge" in one_line(call("synth", str(tmp_path / "b"), "--geometry", "huge"))


def test_generate_prints_whole_characters_and_the_figures(tiny: Path) -> None:
    result = generate(
        tiny, "--prompt", "你好，世界", "--max-tokens", "30", "--temperature", "1", "--ignore-eos"
    )
    assert result.exit_code == 0
    text = result.stdout
    assert "你好，世界" in text
    assert "30 output tokens" in text
    assert "time to first token" in text
    assert "time per output token" in text


def test_json_is_one_object_and_nothing_else(tiny: Path) -> None:
    flags = ("--prompt", "a", "--prompt", "bc", "--max-tokens", "5", "--ignore-eos", "--json")
    result = generate(tiny, *flags)
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert [len(a["token_ids"]) for a in report["answers"]] == [5, 5]
    assert report["output_tokens"] == 10
    assert report["tpot_s"] > 0
    again = json.loads(generate(tiny, *flags).stdout)
    assert [a["token_ids"] for a in again["answers"]] == [a["token_ids"] for a in report["answers"]]


def test_batched_prompts_get_what_they_get_alone(tiny: Path) -> None:
    flags = (
        "--max-tokens",
        "6",
        "--temperature",
        "0",
        "--dtype",
        "float64",
        "--kv-cache-dtype",
        "float64",
        "--json",
    )
    both = json.loads(generate(tiny, "--prompt", "one", "--prompt", "two two", *flags).stdout)
    for answer in both["answers"]:
        alone = json.loads(generate(tiny, "--prompt", answer["prompt"], *flags).stdout)
        assert alone["answers"][0]["token_ids"] == answer["token_ids"]


def test_flags_of_other_engines_run_unchanged(tiny: Path) -> None:
    """The flags of ATOM's simple_inference, in its own mixture of dashes and underscores."""
    result = call(
        "generate", "--model", str(tiny), "--enforce-eager", "--temperature", "0.0",
        "--max-tokens", "4", "-tp", "1", "-dp", "1", "--kv_cache_dtype", "fp8", "--max_model_len", "512",
        "--max-num-seqs", "2", "--max_num_batched_tokens", "256", "--gpu-memory-utilization", "0.9",
        "--block-size", "16", "--port", "8006", "--level", "0", "--enable_prefix_caching",
        "--method", "mtp", "--num-speculative-tokens", "3",
        "--cudagraph-capture-sizes", "[1,2]", "--trust-remote-code",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for flag in ("--block-size", "--port", "--level", "--cudagraph-capture-sizes"):
        assert f"{flag} has no effect here" in result.stderr


def test_dashes_and_underscores_are_the_same(tiny: Path) -> None:
    for spelling in ("--max-tokens", "--max_tokens"):
        assert generate(tiny, "--prompt", "a", spelling, "1").exit_code == 0


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom fourfold.cli import main\n"
        "try:\n    main(['generate', '--help'])\nexcept SystemExit as e:\n"
        "    assert e.code == 0\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--kv-cache-dtype" in done.stdout


def test_the_core_needs_neither_the_transport_nor_a_web_library(tiny: Path) -> None:
    """torch, numpy, safetensors, tokenizers (and triton on a GPU) are enough to generate."""
    code = (
        "import sys\n"
        "for name in ('msgspec', 'starlette', 'uvicorn', 'transformers', 'huggingface_hub'):\n"
        "    sys.modules[name] = None\n"
        "from fourfold import LLM, SamplingParams\n"
        f"llm = LLM({str(tiny)!r}, max_num_seqs=2, max_model_len=512)\n"
        "result, = llm.generate('a', SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)\n"
        "assert len(result.outputs[0].token_ids) == 3\n"
        "assert llm.stats().generation_tokens == 3\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_real_process_ends_with_status_2_and_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fourfold", "generate", "/nowhere"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("fourfold: error: ")
    assert "Traceback" not in done.stderr
