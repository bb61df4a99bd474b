"""Loading says what it decided, and what looks wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fourfold.core.config import EngineConfig
from fourfold.core.device import ARCHS, detect
from fourfold.core.errors import ConfigError, KernelError
from fourfold.engine.loading import load_model
from fourfold.engine.start import use_compiled
from fourfold.weights.locate import locate
from tests.support import write_small


def notes(directory: Path) -> tuple[str, ...]:
    config = EngineConfig(model=str(directory))
    return load_model(locate(str(directory)), config, detect("cpu")).notes


def test_weights_of_unusual_size_are_noted(tmp_path: Path) -> None:
    """A checkpoint whose parameters are all nonzero and all wrong loads, and says so."""
    directory = write_small(tmp_path / "c", "float32")
    assert not any("unusual" in note for note in notes(directory))
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        for name, value in tensors.items():
            if name.endswith("weight") and value.dim() == 2:
                tensors[name] = value * 2768
        save_file(tensors, file)
    found = notes(directory)
    assert any("unusual weight: embed.weight" in note for note in found)
    assert any("more" in note for note in found)


def test_keys_nobody_knows_are_noted(tmp_path: Path) -> None:
    directory = write_small(tmp_path / "c", "float32", some_new_key=3)
    assert any("some_new_key" in note for note in notes(directory))


def test_compiled_kernels_are_refused_where_they_are_of_no_use(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=f"--compile-cache {tmp_path}: .*runs no compiled kernels"
    ):
        use_compiled(str(tmp_path), detect("cpu"))
    gpu = replace(detect("cpu"), arch=ARCHS["sm_90"])
    with pytest.raises(KernelError, match="is no cache of compiled kernels"):
        use_compiled(str(tmp_path), gpu)
