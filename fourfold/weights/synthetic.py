"""Write a synthetic checkpoint: random weights in exactly the released on-disk format.

Contract: the directory holds what a released one holds (config.json, generation_config.json, the
tokenizer's two files, the safetensors files and their index) and everything that reads a released
checkpoint reads it. Equal arguments give equal bytes. At most one piece of one tensor is in memory.
It prints nothing; progress goes to a callback.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fourfold.core.config import ModelConfig
from fourfold.core.errors import CapacityError, CheckpointError, ConfigError
from fourfold.weights.geometry import config_json, with_storage
from fourfold.weights.index import INDEX_FILE
from fourfold.weights.layout import FORMATS, CheckpointLayout, WeightFormat, checkpoint_layout
from fourfold.weights.random_values import tensor_bytes
from fourfold.weights.safetensors_writer import write_file
from fourfold.weights.synthetic_tokenizer import tokenizer_files

Progress = Callable[[int, int], None]
"""Called with (bytes of tensor data written so far, bytes in all)."""

_GENERATION_CONFIG = (
    ("_from_model_config", True),
    ("bos_token_id", 0),
    ("eos_token_id", 1),
    ("do_sample", True),
    ("temperature", 1.0),
    ("top_p", 1.0),
    ("transformers_version", "4.46.3"),
)


def write_checkpoint(
    directory: str | Path,
    geometry: str,
    layers: int | None = None,
    weights: str | None = None,
    seed: int = 0,
    holes: bool = False,
    progress: Progress | None = None,
) -> CheckpointLayout:
    """Write a checkpoint of a released geometry, or the tiny one, and return its layout.

    `geometry` is tiny, flash, flash-base or pro; `layers` cuts it to its first layers; `weights`
    is native, fp8, bf16 or float32 (None: as released, so fp8 for flash-base). With `holes` headers
    and sizes are real and the data is file holes, which read as zeros. `directory` must be new or
    empty. Raises `ConfigError`, `CapacityError` or `CheckpointError`.
    """
    base = geometry == "flash-base"
    return write_model(
        directory,
        config_json(geometry, layers),
        weights or ("fp8" if base else "native"),
        seed=seed,
        holes=holes,
        mtp_duplicates=base,
        progress=progress,
    )


def write_model(
    directory: str | Path,
    config: Mapping[str, Any],
    weights: str | WeightFormat,
    seed: int = 0,
    holes: bool = False,
    tokenizer: bool = True,
    mtp_duplicates: bool = False,
    progress: Progress | None = None,
) -> CheckpointLayout:
    """Write a checkpoint of any config, in config.json's own keys, and return its layout.

    The keys about storage (`torch_dtype`, `expert_dtype`, `quantization_config`) are replaced by
    those of `weights`, a name or a `WeightFormat`. Without `tokenizer` its files are left out, for
    vocabularies too small for one. The rest is as in `write_checkpoint`.
    """
    layout_format = _format(weights)
    data = with_storage(
        config, layout_format.torch_dtype, layout_format.expert_dtype, layout_format.quantised
    )
    model = ModelConfig.from_dict(data, "config.json").config
    if model.num_dspark_stages:
        raise ConfigError("DSpark stages cannot be written: give compress_ratios one MTP entry")
    if seed < 0:
        raise ConfigError(f"seed must not be negative, found {seed}")
    layout = checkpoint_layout(model, layout_format, mtp_duplicates)
    documents = {"config.json": data, "generation_config.json": _generation_config(model)}
    if tokenizer:
        documents |= tokenizer_files(model.vocab_size, model.max_position_embeddings)
    target = _prepare(Path(directory), 0 if holes else layout.file_bytes)
    _write_data(target, layout, model, seed, holes, progress)
    for name, document in documents.items():
        _write_json(target / name, document)
    # The index comes last: a directory that has one is complete.
    index = {"metadata": {"total_size": layout.total_size}, "weight_map": layout.weight_map()}
    _write_json(target / INDEX_FILE, index)
    return layout


def _format(weights: str | WeightFormat) -> WeightFormat:
    if isinstance(weights, WeightFormat):
        return weights
    if weights not in FORMATS:
        raise ConfigError(f"weights must be one of {', '.join(FORMATS)}, found {weights!r}")
    return FORMATS[weights]


def _generation_config(config: ModelConfig) -> dict[str, Any]:
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    return dict(_GENERATION_CONFIG) | ids


def _prepare(directory: Path, needed: int) -> Path:
    """A new or empty directory with room for `needed` bytes."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        occupied = next(directory.iterdir(), None)
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error.strerror}") from error
    if occupied is not None:
        raise CheckpointError(
            f"{directory} must be new or empty, but holds {occupied.name}; nothing is overwritten"
        )
    if needed > free:
        raise CapacityError(
            f"the checkpoint needs {needed:,} bytes, but {directory} has room for {free:,}"
        )
    return directory


def _write_data(
    directory: Path,
    layout: CheckpointLayout,
    config: ModelConfig,
    seed: int,
    holes: bool,
    progress: Progress | None,
) -> None:
    done, total = 0, layout.total_size

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    for name, file in layout.files.items():
        write_file(
            directory / name,
            file,
            None if holes else lambda tensor: tensor_bytes(tensor, seed, config.n_routed_experts),
            advance,
        )


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error
