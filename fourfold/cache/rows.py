"""Row geometry: which formats a model's rows have, how long its rings are, what they cost.

Contract: everything follows from the config; bytes are exact, and equal to those of the tensors that
pool.py allocates. Torch-free: a model's memory can be planned where there is no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from fourfold.core.config import ModelConfig
from fourfold.core.row_format import DTYPE_BYTES, RowFormat, RowKind, rows_per_page


@dataclass(frozen=True)
class RowFormats:
    """Formats of a model's main rows (window and compressed) and of its indexer rows."""

    main: RowFormat
    indexer: RowFormat


def row_formats(
    config: ModelConfig, dtype: str, kv_cache_dtype: str, index_cache_dtype: str
) -> RowFormats:
    """Formats for cache dtypes "fp8", a dtype's name, or "auto"; `dtype` is the model's.

    "auto" is FP8 for a bfloat16 model, which was trained with that rounding, and the model's own
    dtype otherwise. Indexer rows follow the main rows unless told.
    """
    main = _resolved(kv_cache_dtype, "fp8" if dtype == "bfloat16" else dtype)
    indexer = _resolved(index_cache_dtype, main)
    rope = config.qk_rope_head_dim
    return RowFormats(
        _format(main, RowKind.FP8_GROUPS, config.head_dim, rope),
        _format(indexer, RowKind.FP8_WHOLE, config.index_head_dim, rope),
    )


def _resolved(wanted: str, default: str) -> str:
    return default if wanted == "auto" else wanted


def _format(name: str, fp8: RowKind, dim: int, rope: int) -> RowFormat:
    if name == "fp8":
        return RowFormat(fp8, dim, rope)
    return RowFormat(RowKind.PLAIN, dim, rope, name)


def ring_rows(config: ModelConfig, drafts: int = 0) -> int:
    """Rows of a window ring: the window, and one more for each draft that may be rejected."""
    return config.sliding_window + drafts


def page_bytes(config: ModelConfig, formats: RowFormats) -> int:
    """Bytes of one page of 256 source tokens over all layers."""
    total = 0
    for ratio in config.compress_ratios:
        if ratio:
            total += formats.main.page_bytes(rows_per_page(ratio))
        if config.has_indexer(ratio):
            total += formats.indexer.page_bytes(rows_per_page(ratio))
    return total


def slot_bytes(config: ModelConfig, formats: RowFormats, dtype: str, drafts: int = 0) -> int:
    """Bytes a running sequence holds whatever its length: rings and folds of all layers, and the
    streams of its last token. `dtype` is the model's; folds are float32, or float64 with it."""
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    total = layers * formats.main.page_bytes(ring_rows(config, drafts))
    for ratio in config.compress_ratios:
        folds = config.compressor_series(ratio) * 3 * (1 + drafts) * max(4, DTYPE_BYTES[dtype])
        if ratio:
            total += folds * config.head_dim
        if config.has_indexer(ratio):
            total += folds * config.index_head_dim
    return total + config.hc_mult * config.hidden_size * DTYPE_BYTES[dtype]
