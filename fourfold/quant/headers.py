"""What a safetensors header proves about how one weight is stored.

Contract: `classify` names the scheme of a weight from dtypes and shapes alone (its own and those of
the tensors beside it), or raises `QuantizationError` naming the tensor, the scheme it recognised
and what is supported. It never guesses: FP8 without a scale, a plain weight with one, or groups of
an unexpected size are refused. Torch-free; it reads no file and no config.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

from fourfold.core.checkpoint import TensorHeader
from fourfold.core.errors import QuantizationError
from fourfold.core.parameters import ParamSpec, Storage

PLAIN = "plain"
FP8_BLOCK = "fp8_block"
MXFP4 = "mxfp4"
SCHEMES = (PLAIN, FP8_BLOCK, MXFP4)
E8M0 = "e8m0"
F32 = "f32"

FP8_BLOCK_SIZE = 128
MXFP4_GROUP = 32
SUPPORTED = (
    "supported are plain weights (BF16, F16, F32, F64), FP8 E4M3 in blocks of 128×128, and MXFP4 "
    "(E2M1 with one power-of-two scale for 32 inputs)"
)

_WEIGHT_LEAVES = ("weight", "weight_packed", "qweight")
_SCALE_LEAVES = ("scale", "weight_scale", "weight_scale_inv")
_SECOND_SCALES = ("weight_scale_2", "weight_global_scale")
_OFFSETS = ("weight_zero_point", "weight_offset", "weight_g_idx", "qzeros", "g_idx")
_PLAIN_DTYPES = ("BF16", "F16", "F32", "F64")
_SCALE_FORMATS = {"F8_E8M0": E8M0, "U8": E8M0, "F32": F32}


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight and the tensors that share its name up to the last dot, by that last part."""

    weight: TensorHeader
    leaf: str
    partners: Mapping[str, TensorHeader]


@dataclass(frozen=True, slots=True)
class Finding:
    """`scheme` is one of `SCHEMES`; `scale_format` "e8m0", "f32", or None for plain weights;
    `reason` names the tensor, its dtype and shape, and its file."""

    scheme: str
    scale_format: str | None
    reason: str


def gather(
    specs: Iterable[ParamSpec],
    headers: Mapping[str, TensorHeader],
    native: Callable[[str], Iterable[str]],
) -> dict[str, tuple[StoredWeight, ...]]:
    """The stored weights of every quantisable parameter, by `ParamSpec.name`.

    `headers` is keyed by the file's names. `native` gives the native names that a weight's file
    name stands for (none if it is no weight): one of `ParamSpec.checkpoint_names`, or
    `ParamSpec.name` for a stack of all routed experts.
    """
    by_stem: dict[str, dict[str, TensorHeader]] = defaultdict(dict)
    for name, header in headers.items():
        stem, _, leaf = name.rpartition(".")
        by_stem[stem][leaf] = header
    found: dict[str, StoredWeight] = {}
    for stem, leaves in by_stem.items():
        for file_name, stored in _weights(stem, leaves):
            found.update(dict.fromkeys(native(file_name), stored))
    result: dict[str, tuple[StoredWeight, ...]] = {}
    for spec in specs:
        if spec.storage in (Storage.LINEAR, Storage.EXPERT):
            names = dict.fromkeys((*spec.checkpoint_names, spec.name))
            result[spec.name] = tuple(found[name] for name in names if name in found)
    return result


def _weights(stem: str, leaves: Mapping[str, TensorHeader]) -> Iterator[tuple[str, StoredWeight]]:
    """The tensors below one stem that may be weights, under the name a plain one would have."""
    for leaf in _WEIGHT_LEAVES:
        if leaf in leaves:
            partners = {name: header for name, header in leaves.items() if name != leaf}
            yield f"{stem}.weight", StoredWeight(leaves[leaf], leaf, partners)
            return
    for leaf, header in leaves.items():
        # Stacked experts have no leaf of their own: `experts.down_proj`, `experts.down_proj_scale`.
        partners = {
            "weight_" + name.removeprefix(f"{leaf}_"): other
            for name, other in leaves.items()
            if name.startswith(f"{leaf}_")
        }
        yield f"{stem}.{leaf}", StoredWeight(header, "weight", partners)


def classify(stored: StoredWeight, columns: int) -> Finding:
    """The scheme of one weight whose matrices have `columns` inputs.

    Only the last two dimensions are looked at, so that stacked experts pass too; whether the other
    dimensions are right is the loader's to check.
    """
    weight = stored.weight
    if len(weight.shape) < 2:
        _refuse(weight, "a tensor that is no matrix")
    _refuse_marked(stored, columns)
    if weight.dtype in _PLAIN_DTYPES:
        return _plain(stored)
    if weight.dtype == "F8_E4M3":
        return _fp8(stored)
    if weight.dtype in ("I8", "U8", "F4"):
        return _four_bits(stored, columns)
    _refuse(weight, f"{weight.dtype} storage")


def _refuse(weight: TensorHeader, scheme: str) -> NoReturn:
    raise QuantizationError(f"{weight} is stored as {scheme}, which is not supported; {SUPPORTED}")


def _refuse_marked(stored: StoredWeight, columns: int) -> None:
    """Schemes that give themselves away by the tensors they bring."""
    weight, names = stored.weight, stored.partners.keys()
    four_bit = weight.dtype in ("I8", "U8", "F4") and weight.shape[-1] <= columns
    if four_bit and (names & set(_SECOND_SCALES) or _scale_dtype(stored) == "F8_E4M3"):
        _refuse(weight, "NVFP4 (E2M1 with one E4M3 scale for 16 inputs and a second scale)")
    if stored.leaf == "qweight":
        _refuse(weight, "GPTQ or AWQ integers (qweight)")
    if weight.dtype == "I32":
        bits = 32 * weight.shape[-1] // columns
        _refuse(weight, f"W{bits}A16 (integers of {bits} bits packed in I32)")
    if stored.leaf == "weight_packed":
        _refuse(weight, "weight_packed codes of compressed-tensors")
    if weight.dtype in ("I8", "U8") and names & set(_OFFSETS):
        _refuse(weight, "integers with offsets (W8A8 or W4A8)")
    if weight.dtype == "F8_E4M3" and "input_scale" in names:
        _refuse(weight, "FP8 with static activation scales (input_scale)")
    if names & set(_SECOND_SCALES):
        _refuse(weight, f"{weight.dtype} with a second scale")


def _scale(stored: StoredWeight) -> TensorHeader | None:
    scales = [stored.partners[leaf] for leaf in _SCALE_LEAVES if leaf in stored.partners]
    if len(scales) > 1:
        raise QuantizationError(
            f"{stored.weight} has two scales, {scales[0].name} and {scales[1].name}; one expected"
        )
    return scales[0] if scales else None


def _scale_dtype(stored: StoredWeight) -> str | None:
    scale = _scale(stored)
    return scale.dtype if scale else None


def _required_scale(stored: StoredWeight, what: str) -> TensorHeader:
    scale = _scale(stored)
    if scale is None:
        stem = stored.weight.name.removesuffix("weight")
        raise QuantizationError(
            f"{stored.weight} is {what} without a scale ({stem}scale), and its codes alone have no "
            "value"
        )
    return scale


def _plain(stored: StoredWeight) -> Finding:
    scale = _scale(stored)
    if scale is not None:
        raise QuantizationError(
            f"{stored.weight} is not quantised, yet {scale} stands beside it: whether to multiply "
            "is not known"
        )
    return Finding(PLAIN, None, _describe(stored.weight, None))


def _fp8(stored: StoredWeight) -> Finding:
    weight = stored.weight
    scale = _required_scale(stored, "FP8 E4M3")
    rows, columns = weight.shape[-2:]
    blocks = (-(-rows // FP8_BLOCK_SIZE), -(-columns // FP8_BLOCK_SIZE))
    if scale.shape != (*weight.shape[:-2], *blocks):
        _refuse(weight, _fp8_granularity(rows, columns, scale))
    if scale.dtype not in _SCALE_FORMATS:
        _refuse(weight, f"FP8 E4M3 with {scale.dtype} scales")
    format_ = _SCALE_FORMATS[scale.dtype]
    return Finding(FP8_BLOCK, format_, _describe(weight, scale))


def _fp8_granularity(rows: int, columns: int, scale: TensorHeader) -> str:
    """What FP8 scales of an unsupported shape are for."""
    shape = scale.shape
    if scale.numel == 1:
        return "FP8 per tensor"
    if shape in ((rows,), (rows, 1)):
        return "FP8 per channel"
    if len(shape) < 2 or not shape[-2] or not shape[-1]:
        return f"FP8 with scales of shape {list(shape)}"
    if shape[-2] == rows:
        size = -(-columns // shape[-1])
        return f"MXFP8 (groups of {size})" if size == MXFP4_GROUP else f"FP8 in groups of {size}"
    return f"FP8 in blocks of {-(-rows // shape[-2])}×{-(-columns // shape[-1])}"


def _four_bits(stored: StoredWeight, columns: int) -> Finding:
    weight = stored.weight
    stored_columns = columns if weight.dtype == "F4" else columns // 2
    if weight.dtype != "F4" and weight.shape[-1] == columns:
        _refuse(weight, "8-bit integers (W8A8)")
    if weight.shape[-1] != stored_columns:
        raise QuantizationError(
            f"{weight} should have {stored_columns} columns to hold {columns} inputs of 4 bits"
        )
    scale = _required_scale(stored, "packed FP4")
    groups = scale.shape[-1] if scale.shape else 1
    size = columns // groups if groups and columns % groups == 0 else 0
    if scale.shape[:-1] != weight.shape[:-1] or not size:
        _refuse(weight, f"packed 4-bit codes with scales of shape {list(scale.shape)}")
    if scale.dtype not in ("F8_E8M0", "U8"):
        _refuse(weight, f"packed 4-bit codes with {scale.dtype} scales for {size} inputs")
    if size != MXFP4_GROUP:
        _refuse(weight, f"FP4 in groups of {size}")
    return Finding(MXFP4, E8M0, _describe(weight, scale))


def _describe(weight: TensorHeader, scale: TensorHeader | None) -> str:
    with_scale = f" with {scale.dtype} scale {list(scale.shape)}" if scale else ""
    return f"{weight.name} is {weight.dtype} {list(weight.shape)}{with_scale}, {weight.file}"
