"""`fourfold verify` as a person and a machine see it: verdict, exit status, JSON, manifests, small files."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fourfold.cli import main
from fourfold.weights.synthetic import write_checkpoint
from tests.weights.corruptions import HEADERS, Copy

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "tiny"
    write_checkpoint(folder, "tiny", seed=1)
    return folder


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["verify", *map(str, arguments)])


def found(result: Result) -> list[dict]:
    return [f for f in json.loads(result.stdout)["findings"] if f["severity"] != "note"]


def test_clean_is_zero(tiny: Path) -> None:
    result = call(tiny)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert "9 files, 585 tensors, 6,134,058 bytes" in lines[1]
    assert "routed experts: mxfp4, e8m0 scales (21 parameters)" in result.output
    assert "prompt format: preview" in result.output
    assert lines[-1].startswith("clean (headers and small files")
    document = json.loads(call(tiny, "--json").stdout)
    assert (document["verdict"], document["exit_status"], document["tensors"]) == ("clean", 0, 585)
    assert found(call(tiny, "--json")) == []


@pytest.mark.parametrize(("name", "status"), [("extra file", 1), ("reshaped", 2)])
def test_the_exit_status_tells(tiny: Path, tmp_path: Path, name: str, status: int) -> None:
    copy = Copy(tiny, tmp_path / "c")
    needle = HEADERS[name][1](copy, random.Random(1))
    result = call(copy.folder)
    assert result.exit_code == status
    assert needle in result.output
    assert result.output.splitlines()[-1].startswith({1: "1 warning ", 2: "1 error "}[status])
    (one,) = found(call(copy.folder, "--json"))
    assert one["fix"]
    assert one["file"].endswith(".safetensors")
    assert set(one) == {"severity", "tensor", "file", "offset", "message", "fix"}


def test_the_same_of_many_tensors_is_one_line(tiny: Path, tmp_path: Path) -> None:
    copy = Copy(tiny, tmp_path / "c")
    name = copy.json("model.safetensors.index.json")["weight_map"]["layers.2.attn_norm.weight"]
    copy.edit(
        name,
        lambda h: [e.update(dtype="F8_E5M2") for k, e in h.items() if "w1.weight" in k] and None,
    )
    result = call(copy.folder)
    (line,) = [line for line in result.output.splitlines() if "layers.2.ffn.experts.{0-7}" in line]
    assert "(8 tensors)" in line
    assert "F8_E5M2" in line
    assert len(found(call(copy.folder, "--json"))) == 9  # each by itself, and the shared expert's


def set_tokenizer(change: Callable[[dict], object]) -> Callable[[Copy], None]:
    def corrupt(copy: Copy) -> None:
        data = copy.json("tokenizer.json")
        change(data)
        copy.write_json("tokenizer.json", data)

    return corrupt


def set_file(name: str, **changes: object) -> Callable[[Copy], None]:
    return lambda copy: copy.write_json(name, {**copy.json(name), **changes})


def encoder(text: str) -> Callable[[Copy], None]:
    def corrupt(copy: Copy) -> None:
        (copy.folder / "encoding").mkdir()
        copy.write("encoding/encoding_dsv4.py", text.encode())

    return corrupt


def a_plain_token_too_many(data: dict) -> None:
    data["model"]["vocab"]["Ġunheard"] = 640


def no_user(data: dict) -> None:
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] != "<｜User｜>"]


SMALL_FILES = {
    "tokenizer missing": (lambda c: (c.folder / "tokenizer.json").unlink(), "tokenizer.json", 2),
    "tokenizer of another kind": (
        set_tokenizer(lambda d: d["model"].update(type="Unigram")),
        "tokenizer.json",
        2,
    ),
    "a token without a row": (set_tokenizer(a_plain_token_too_many), "640", 2),
    "another begin of sentence": (set_file("config.json", bos_token_id=5), "bos_token_id", 2),
    "no marker of users": (set_tokenizer(no_user), "<｜User｜>", 1),
    "other sampling defaults": (set_file("generation_config.json", eos_token_id=7), "7", 1),
    "another end": (set_file("tokenizer_config.json", eos_token="</s>"), "</s>", 1),
    "an unknown encoder": (encoder("X = 1\n"), "encoding/encoding_dsv4.py", 1),
}


@pytest.mark.parametrize("name", SMALL_FILES)
def test_small_files_are_checked(tiny: Path, tmp_path: Path, name: str) -> None:
    corrupt, needle, status = SMALL_FILES[name]
    copy = Copy(tiny, tmp_path / "c")
    corrupt(copy)
    result = call(copy.folder, "--json")
    assert result.exit_code == status, result.output
    assert any(needle in (f["file"] or "") + f["message"] for f in found(result)), result.output


def test_the_encoder_tells_the_prompt_format(tiny: Path, tmp_path: Path) -> None:
    copy = Copy(tiny, tmp_path / "c")
    encoder("REASONING_EFFORT_PROMPTS = {}\n")(copy)
    result = call(copy.folder)
    assert result.exit_code == 0
    assert "prompt format: official" in result.output


def test_a_manifest_holds_every_byte(tiny: Path, tmp_path: Path) -> None:
    """Written, read by sha256sum's own rules, and checked: one flipped bit of one file is found."""
    import hashlib

    copy, manifest = Copy(tiny, tmp_path / "c"), tmp_path / "sums"
    assert call(copy.folder, "--write-manifest", manifest).exit_code == 0
    lines = dict(reversed(line.split("  ")) for line in manifest.read_text().splitlines())
    assert len(lines) == 9 + 5
    for name, digest in lines.items():
        assert hashlib.sha256((copy.folder / name).read_bytes()).hexdigest() == digest
    tensor = "layers.3.ffn.experts.1.w1.weight"
    copy.poke(tensor, 5, bytes([copy.read(tensor)[5] ^ 1]))
    file = copy.json("model.safetensors.index.json")["weight_map"][tensor]
    manifest.write_text(manifest.read_text() + "f" * 64 + "  gone.safetensors\n")
    result = call(copy.folder, "--manifest", manifest, "--json")
    assert result.exit_code == 2
    assert [(f["file"], "SHA-256" in f["message"]) for f in found(result)] == [
        (file, True),
        ("gone.safetensors", False),
    ]
    manifest.write_text("not a manifest")
    result = call(copy.folder, "--manifest", manifest)
    assert (result.exit_code, "line 1" in result.stderr) == (2, True)


def test_deep_says_what_fp4_loses_as_fp8_and_how_large_scales_are(tiny: Path) -> None:
    """Counted once more, by the op that converts."""
    import torch

    from fourfold.core.config import ModelConfig
    from fourfold.core.tensor import QuantTensor
    from fourfold.ops.quantize import fp4_as_fp8
    from fourfold.weights.loader import load, open_checkpoint

    weights = load(open_checkpoint(tiny, ModelConfig.from_directory(tiny).config))
    experts = [w for w in weights.values() if isinstance(w, QuantTensor) and len(w.shape) == 3]
    masks = [fp4_as_fp8(w.codes, w.scale)[2] for w in experts]
    exact, strips = (sum(int(f(m)) for m in masks) for f in (torch.sum, torch.numel))
    assert exact < strips
    output = call(tiny, "--deep").output
    assert f"{exact:,} of {strips:,} strips of 128 inputs are exact" in output
    low = min(int(w.scale.min()) for w in experts) - 127
    high = max(int(w.scale.max()) for w in experts) - 127
    assert f"scales of routed experts: 2^{low} to 2^{high}" in output
    assert output.splitlines()[-1].startswith("clean (all data read")


def test_headers_are_judged_without_torch(tiny: Path) -> None:
    code = f"""
import sys
for name in ("torch", "numpy", "triton", "safetensors"):
    sys.modules[name] = None
from fourfold.cli import main
main(["verify", {str(tiny)!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "585 tensors" in done.stdout


def test_what_is_no_model_is_one_line(tmp_path: Path) -> None:
    result = call("no/such-model")
    assert (result.exit_code, "not in the local cache" in result.stderr) == (2, True)
    result = call(tmp_path)  # an empty directory is a checkpoint without anything
    assert result.exit_code == 2
    assert "there are no .safetensors files" in result.output
    assert "config.json" in result.output
