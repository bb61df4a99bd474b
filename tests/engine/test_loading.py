"""Loading says what it decided, and what looks wrong."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from fourfold.core.config import EngineConfig
from fourfold.core.device import detect
from fourfold.engine.loading import load_model
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
