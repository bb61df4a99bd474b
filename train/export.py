"""Weights to a checkpoint directory in the released format, and one format to another.

Contract: `export` writes what fourfold, or anything that reads released checkpoints, loads: FP4 experts
and FP8 linears with E8M0 scales, or any other `WeightFormat`. Codes that are in the wanted scheme
already are copied, others made from the numbers; `convert` tells how many numbers changed by that.
"""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourfold.core.config import ModelConfig
from fourfold.core.parameters import Storage, parameters
from fourfold.core.tensor import QuantScheme, QuantTensor, Weight
from fourfold.ops.quantize import decode_e8m0
from fourfold.text.profiles import ENCODER_FILE, ChatProfile, Effort, effort_prefix
from fourfold.weights.geometry import with_storage
from fourfold.weights.index import INDEX_FILE
from fourfold.weights.layout import FORMATS, StoredTensor, WeightFormat, checkpoint_layout
from fourfold.weights.loader import load, open_checkpoint
from fourfold.weights.names import Part
from fourfold.weights.safetensors_writer import write_file
from train.geometry import model_config

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_PLAIN = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}


def export(
    directory: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, Weight],
    tokenizer: Path,
    format_name: str = "native",
) -> int:
    """Write a checkpoint of `weights` (by `ParamSpec.name`) and return its size in bytes.

    `config` is config.json without storage keys; `tokenizer` the directory of the tokenizer's files.
    `directory` must be new or empty.
    """
    kind = FORMATS[format_name]
    data = with_storage(config, kind.torch_dtype, kind.expert_dtype, kind.quantised)
    model = model_config(data)
    layout = checkpoint_layout(model, kind)
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise ValueError(f"{directory} must be new or empty")
    source = _Source(weights, kind)
    for name, file in layout.files.items():
        write_file(directory / name, file, source.pieces, lambda count: None)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, directory / name)
    _write(directory / "config.json", data)
    _write(directory / "generation_config.json", _generation(model))
    index = {"metadata": {"total_size": layout.total_size}, "weight_map": layout.weight_map()}
    _write(directory / INDEX_FILE, index)
    encoder = directory / ENCODER_FILE
    encoder.parent.mkdir()
    encoder.write_text(_encoder(), encoding="utf-8")
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


@dataclass(frozen=True)
class Conversion:
    """A checkpoint written anew: its size, and how many of its quantised numbers are others now."""

    nbytes: int
    numbers: int
    changed: int


def convert(source: Path, target: Path, format_name: str = "fp8") -> Conversion:
    """Write the checkpoint in `source` to `target` in another format; "fp8" is that of the Bases: FP8
    experts, float32 scales."""
    data = json.loads((source / "config.json").read_text("utf-8"))
    config = ModelConfig.from_dict(data, str(source / "config.json")).config
    weights = load(open_checkpoint(source, config), "cpu", torch.float32)
    size = export(target, data, weights, source, format_name)
    again = json.loads((target / "config.json").read_text("utf-8"))
    config = ModelConfig.from_dict(again, str(target / "config.json")).config
    written = load(open_checkpoint(target, config), "cpu", torch.float32)
    numbers = changed = 0
    for spec in parameters(config):
        if spec.storage in (Storage.EXPERT, Storage.LINEAR):
            before, after = (numbers_of(each[spec.name]) for each in (weights, written))
            numbers += before.numel()
            changed += int((before != after).sum())
    return Conversion(size, numbers, changed)


def numbers_of(weight: Weight) -> Tensor:
    """The values of a weight, float32."""
    if isinstance(weight, QuantTensor):
        return weight.dequantize(torch.float32)
    return weight.to(torch.float32)


class _Source:
    """The bytes of each stored tensor."""

    def __init__(self, weights: Mapping[str, Weight], kind: WeightFormat):
        self.weights, self.kind = weights, kind
        # Codes and scales of the parameter asked for last: both are stored one after another.
        self._made: tuple[str, tuple[Tensor, Tensor]] | None = None

    def pieces(self, tensor: StoredTensor) -> Iterator[memoryview]:
        weight = self.weights[tensor.spec.name]
        if tensor.scheme is None:
            value = numbers_of(weight) if tensor.dtype != "I64" else weight
            assert isinstance(value, Tensor)
            stored = value.detach().to(_PLAIN[tensor.dtype])
        else:
            codes, scale = self._quantised(tensor.spec.name, weight, tensor.scheme)
            stored = scale if tensor.part is Part.SCALE else codes
        expert = _EXPERT.search(tensor.name)
        if expert is not None:
            stored = stored[int(expert[1])]
        yield stored.cpu().contiguous().flatten().view(torch.uint8).numpy().data

    def _quantised(self, name: str, weight: Weight, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
        if self._made is None or self._made[0] != name:
            self._made = (name, self._quantise(weight, scheme))
        return self._made[1]

    def _quantise(self, weight: Weight, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
        floats = self.kind.scale_dtype == "F32" and scheme.block[0] > 1
        if isinstance(weight, QuantTensor) and weight.scheme.name == scheme.name:
            scale = weight.scale
            if floats and scale.dtype == torch.uint8:
                scale = decode_e8m0(scale, torch.float32)
            return weight.codes, scale
        return scheme.quantize(numbers_of(weight).detach().cpu(), "f32" if floats else "e8m0")


def _generation(config: ModelConfig) -> dict[str, Any]:
    return {
        "_from_model_config": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        # Its answers are right or wrong: the likeliest one, unless a request asks for another.
        "do_sample": False,
        "transformers_version": "4.46.3",
    }


def _encoder() -> str:
    """Where a checkpoint says which of the two prompt formats is its own; read, and never run."""
    text = effort_prefix(ChatProfile.PREVIEW, Effort.MAX)
    parts = (
        part
        for line in text.splitlines(keepends=True)
        for part in textwrap.wrap(
            line, 88, drop_whitespace=False, replace_whitespace=False, expand_tabs=False
        )
    )
    lines = "".join(f"    {json.dumps(part)}\n" for part in parts)
    return (
        '"""The prompts of this checkpoint are those of the preview: of all efforts, max alone has a '
        'text."""\n\n'
        f"REASONING_EFFORT_MAX = (\n{lines})\n"
    )


def _write(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
