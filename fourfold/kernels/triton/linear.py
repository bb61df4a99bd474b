"""Linear layers for GPUs: FP8 blocks and plain weights, one form for every batch size.

    outᵀ [N, T] = W [N, K] · xᵀ [K, T]        the weight is the left operand, tokens are columns

K is cut into chunks by the shape (N, K) alone. A chunk is summed block after block, chunks are added in
order, whether one program walks through all of them (many tokens) or each chunk has a program of its own
and a second kernel adds them (few tokens, where the weight must be read by many programs at once). No
tile size is in that order, so a token's result does not depend on the batch.

FP8: codes go to the matrix unit as they are; after each 128 inputs the product is multiplied by the
token's and the block's scale (powers of two in the released checkpoints) and added in float32 by one
fused multiply-add, which also restarts the unit's narrow accumulator. Operands are loaded in the type
that the unit takes: a cast between load and product would send them through registers. GPUs without FP8
casts make codes by integer arithmetic and decode them behind the load, to bfloat16, which holds every
one of them exactly; the order of the sum is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.core.device import Feature
from fourfold.core.tensor import QuantTensor, Weight
from fourfold.kernels.triton.early import after_previous, launch
from fourfold.kernels.triton.rows import fp8_code
from fourfold.ops.linear import round_activations
from fourfold.ops.registry import Kernel

BLOCK_N = 128  # rows of a weight under one scale
BLOCK_K = 128
PROGRAMS = 132  # chunks × blocks of rows wanted for one pass over a weight
MOST_CHUNKS = 8
FEW_TOKENS = 256  # up to here every chunk has programs of its own
WIDE_TILE = 64  # above so many tokens a tile takes all rows of a block


@triton.jit
def decode_fp8(codes):
    """The float32 numbers of E4M3 codes: their seven bits are the top of a float32 of 2^−120 the size."""
    wide = codes.to(tl.int32)
    bits = ((wide & 0x80) << 24) | ((wide & 0x7F) << 20)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def to_fp8(values, FNUZ: tl.constexpr, DECODE: tl.constexpr = False):
    """Of float32 `[C, G]`: E4M3 codes of values / 2^e as uint8, and 2^e `[C]`.

    e is the smallest integer with max(amax, 1e-4) ≤ 448·2^e, from the bits of amax. DECODE: the device
    has no casts.
    """
    clean = tl.where(values == values, values, 0.0)
    amax = tl.maximum(tl.max(tl.abs(clean), 1), 1e-4)
    bits = tl.minimum(amax, 3.0e38).to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) & 0xFF) - 127 - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    scaled = tl.minimum(tl.maximum(clean * inverse[:, None], -448.0), 448.0)
    # What rounds to zero has no sign: half of the smallest code is a tie, and zero is even.
    scaled = tl.where(tl.abs(scaled) <= 0.0009765625, 0.0, scaled)
    if DECODE:
        raw = fp8_code(scaled)
    elif FNUZ:
        raw = (scaled * 0.5).to(tl.float8e4b8).to(tl.uint8, bitcast=True)
    else:
        raw = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return raw, ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["T"])
def _round_to_fp8(
    x,
    codes,
    scale,
    T,
    K,
    GROUPS,
    BY_GROUP: tl.constexpr,
    FNUZ: tl.constexpr,
    DECODE: tl.constexpr,
    COUNT: tl.constexpr,
    GROUP: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program a token and COUNT of its groups, as `to_fp8` rounds them."""
    after_previous(EARLY)
    token = tl.program_id(0)
    group = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    offset = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = offset < K
    values = tl.load(x + token.to(tl.int64) * K + offset, mask=inside, other=0.0).to(tl.float32)
    raw, factor = to_fp8(values, FNUZ, DECODE)
    tl.store(codes + token.to(tl.int64) * K + offset, raw, mask=inside)
    place = group * T + token if BY_GROUP else token * GROUPS + group
    tl.store(scale + place, factor, mask=group < GROUPS)


@triton.jit
def _block_scale(scales, index, E8M0: tl.constexpr):
    if E8M0:
        raw = tl.load(scales + index).to(tl.int32)
        value = tl.where(raw == 0, 0x00400000, raw << 23).to(tl.float32, bitcast=True)
    else:
        value = tl.load(scales + index)
    return value


@triton.jit(do_not_specialize=["T"])
def _linear(
    w,
    w_scale,
    x,
    x_scale,
    out,
    T,
    N,
    K,
    BLOCKS,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
    FP8: tl.constexpr,
    DECODE: tl.constexpr,
    E8M0: tl.constexpr,
    FNUZ: tl.constexpr,
    WHOLE: tl.constexpr,
    TN: tl.constexpr,
    TK: tl.constexpr,
    TT: tl.constexpr,
):
    """A [TN rows, TT tokens] tile of outᵀ; with SPLIT of one chunk's partial sums [CHUNKS, T, N].

    WHOLE: K is a multiple of TK. `x_scale [BLOCKS, T]`; plain operands have no scales. DECODE: operands are
    the bytes of FP8 codes.
    """
    tile_n, tile_t = tl.program_id(0), tl.program_id(1)
    n = tile_n * TN + tl.arange(0, TN)
    t = tile_t * TT + tl.arange(0, TT)
    # Rows and tokens beyond the last are the last again; they are not stored.
    token = tl.minimum(t, T - 1)
    k = tl.arange(0, TK)
    w_place = w + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + k[None, :]
    x_place = x + token.to(tl.int64)[None, :] * K + k[:, None]
    w_scale += (tile_n * TN // 128) * BLOCKS
    total = tl.zeros((TN, TT), dtype=tl.float32)
    first = tl.program_id(2) if SPLIT else 0
    last = first + 1 if SPLIT else CHUNKS
    for chunk in range(first, last):
        acc = tl.zeros((TN, TT), dtype=tl.float32)
        for block in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, BLOCKS)):
            if WHOLE:
                a = tl.load(w_place + block * TK)
                b = tl.load(x_place + block * TK)
            else:
                inside = k < K - block * TK
                a = tl.load(w_place + block * TK, mask=inside[None, :], other=0.0)
                b = tl.load(x_place + block * TK, mask=inside[:, None], other=0.0)
            if DECODE:
                a = decode_fp8(a).to(tl.bfloat16)
                b = decode_fp8(b).to(tl.bfloat16)
            if FP8:
                scale = tl.load(x_scale + block * T + token)
                scale *= _block_scale(w_scale, block, E8M0)
                if FNUZ:
                    scale *= 4.0
                scale = tl.broadcast_to(scale[None, :], (TN, TT))
                acc = tl.fma(tl.dot(a, b), scale, acc)
            else:
                acc = tl.dot(a, b, acc, input_precision="ieee")
        if CHUNKS == 1 or SPLIT:
            total = acc
        else:
            total += acc
    place = t.to(tl.int64)[None, :] * N + n[:, None]
    if SPLIT:
        place += tl.program_id(2).to(tl.int64) * T * N
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(n < N)[:, None] & (t < T)[None, :])


@triton.jit(do_not_specialize=["COUNT"])
def _add_chunks(parts, out, COUNT, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """`out[i] = parts[0, i] + parts[1, i] + …` in that order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for chunk in tl.static_range(CHUNKS):
        total += tl.load(parts + chunk * COUNT + i, mask=i < COUNT, other=0.0)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < COUNT)


@dataclass(frozen=True)
class Operands:
    """A product ready to launch: `w [N, K]` and `x [T, K]` in one type of the matrix unit.

    FP8 operands, in their type or as bytes, have `w_scale [⌈N/128⌉, ⌈K/128⌉]` and `x_scale [⌈K/128⌉, T]`;
    plain ones stand in for their own scales, which are not read. `block` inputs are one step, `chunk` steps
    one of the `chunks` sums.
    """

    w: Tensor
    w_scale: Tensor
    x: Tensor
    x_scale: Tensor
    fp8: bool
    block: int
    chunk: int
    chunks: int

    @property
    def split(self) -> bool:
        """Whether every chunk has programs of its own."""
        return self.x.shape[0] <= FEW_TOKENS and self.chunks > 1

    def target(self, dtype: torch.dtype) -> Tensor:
        """Memory for the product `[T, N]` in `dtype`, or split for `[chunks, T, N]` float32."""
        shape = (self.x.shape[0], self.w.shape[0])
        if self.split:
            return torch.empty(self.chunks, *shape, dtype=torch.float32, device=self.x.device)
        return torch.empty(shape, dtype=dtype, device=self.x.device)


Products = Callable[[Operands, Tensor], bool]


def chunking(rows: int, blocks: int) -> tuple[int, int]:
    """(blocks a chunk, chunks) for a weight of `rows` outputs: of its shape alone."""
    tiles = -(-rows // BLOCK_N)
    wanted = min(max(PROGRAMS // tiles, 1), blocks, MOST_CHUNKS)
    size = -(-blocks // wanted)
    return size, -(-blocks // size)


def is_fp8(weight: QuantTensor) -> bool:
    """Whether the FP8 product computes what the weight asks for."""
    return weight.scheme.name == "fp8_block" and weight.quantize_activations


def launch_options(tile: int, split: bool, chunks: int) -> dict[str, int]:
    """Rows of a tile, warps and pipeline stages for `tile` tokens; they fit 64 KiB of shared memory.

    Rows and tokens are 128 bytes a step each, whatever their type. A program that adds chunks has two sums
    in registers: 128 rows of both are more than NVIDIA's 255 (616 bytes of them spilt on sm_100).
    """
    if tile <= WIDE_TILE or split:
        return {"TN": 64, "num_warps": 4, "num_stages": {16: 4, 32: 4, 64: 3}.get(tile, 2)}
    return {"TN": 128 if chunks == 1 else 64, "num_warps": 8, "num_stages": 2}


def plain_block(dtype: torch.dtype) -> int:
    """Inputs of a plain weight taken at once: 128 bytes."""
    return 128 // dtype.itemsize


def quantize_activations(
    x: Tensor,
    fnuz: bool = False,
    by_group: bool = False,
    early: bool = False,
    decoded: bool = False,
) -> tuple[Tensor, Tensor]:
    """Codes uint8 `[T, K]` and scales float32, powers of two, of x `[T, K]`.

    Scales are `[T, ceil(K/128)]`, or with `by_group` `[ceil(K/128), T]`; `early` as in triton/early.py;
    `decoded` for devices without casts.
    """
    tokens, size = x.shape
    groups = -(-size // BLOCK_K)
    codes = torch.empty(tokens, size, dtype=torch.uint8, device=x.device)
    shape = (groups, tokens) if by_group else (tokens, groups)
    scale = torch.empty(shape, dtype=torch.float32, device=x.device)
    if tokens:
        count = min(triton.next_power_of_2(groups), 32) if tokens > WIDE_TILE else 1
        _round_to_fp8[(tokens, -(-groups // count))](
            x, codes, scale, tokens, size, groups, BY_GROUP=by_group, FNUZ=fnuz, DECODE=decoded,
            COUNT=count, GROUP=BLOCK_K, EARLY=early, num_warps=4 if count > 4 else 1, **launch(early),
        )  # fmt: skip
    return codes, scale


def as_fp8(codes: Tensor, fnuz: bool, decoded: bool = False) -> Tensor:
    """The same bytes in the type that the device's unit reads them as; bytes where it reads none."""
    if decoded:
        return codes
    return codes.view(torch.float8_e4m3fnuz if fnuz else torch.float8_e4m3fn)


def operands(weight: Weight, x: Tensor, x_scale: Tensor | None = None) -> Operands:
    """Operands for `x [T, K]`: FP8 codes with their scales by group, or plain numbers."""
    rows, size = weight.shape
    if isinstance(weight, QuantTensor):
        assert x_scale is not None
        chunk, chunks = chunking(rows, -(-size // BLOCK_K))
        w = weight.codes.view(x.dtype)
        return Operands(w, weight.scale, x, x_scale, True, BLOCK_K, chunk, chunks)
    if weight.dtype != x.dtype:
        x, weight = x.float(), weight.float()
    weight = weight.contiguous()
    block = plain_block(x.dtype)
    chunk, chunks = chunking(rows, -(-size // block))
    return Operands(weight, weight, x, x, False, block, chunk, chunks)


def multiply(o: Operands, target: Tensor, fnuz: bool, products: Products | None) -> Tensor:
    """Write `target` (see `Operands.target`), by `products` if they take the operands."""
    if products is None or not products(o, target):
        tokens, size = o.x.shape
        rows = o.w.shape[0]
        tile = min(max(triton.next_power_of_2(tokens), 16), 128)
        options = launch_options(tile, o.split, o.chunks)
        decoded = o.x.dtype == torch.uint8
        if decoded and tile > WIDE_TILE:
            options["num_warps"] = 8  # numbers take more registers than codes
        grid = (-(-rows // options["TN"]), -(-tokens // tile), o.chunks if o.split else 1)
        _linear[grid](
            o.w, o.w_scale, o.x, o.x_scale, target, tokens, rows, size, -(-size // o.block),
            CHUNK=o.chunk, CHUNKS=o.chunks, SPLIT=o.split, FP8=o.fp8, DECODE=decoded,
            E8M0=o.w_scale.dtype == torch.uint8, FNUZ=fnuz, WHOLE=size % o.block == 0, TK=o.block,
            TT=tile, **options,
        )  # fmt: skip
    return target


def finish(o: Operands, dtype: torch.dtype, fnuz: bool, products: Products | None) -> Tensor:
    """The product `[T, N]` in `dtype`, its chunks added in order."""
    product = multiply(o, o.target(dtype), fnuz, products)
    if not o.split:
        return product
    out = torch.empty(product.shape[1:], dtype=dtype, device=product.device)
    count = out.numel()
    _add_chunks[(-(-count // 512),)](product, out, count, CHUNKS=o.chunks, BLOCK=512)
    return out


def linear(
    x: Tensor,
    weight: Weight,
    unrounded: bool = False,
    fnuz: bool = False,
    products: Products | None = None,
    decoded: bool = False,
) -> Tensor:
    """The op `linear` (ops/linear.py) for contiguous weights of FP8 blocks, bfloat16 or float32.

    `products(operands, target)` may write the target in another way, bit for bit; it says whether it did.
    `decoded`: FP8 codes are made and read by integer arithmetic.
    """
    dtype = torch.float32 if unrounded else x.dtype
    if isinstance(weight, QuantTensor) and not is_fp8(weight):
        # No released checkpoint has such a linear layer: exact, and slow.
        x = round_activations(x, weight)
        weight = weight.dequantize(torch.float32)
    x = x.contiguous()
    if not x.shape[0]:
        return torch.empty(0, weight.shape[0], dtype=dtype, device=x.device)
    if isinstance(weight, QuantTensor):
        codes, scale = quantize_activations(x, fnuz, by_group=True, decoded=decoded)
        o = operands(weight, as_fp8(codes, fnuz, decoded), scale)
    else:
        o = operands(weight, x)
    return finish(o, dtype, fnuz, products)


def linears(
    ops: object,
    x: Tensor,
    weights: Sequence[Weight],
    unrounded: Sequence[bool],
    fnuz: bool = False,
    products: Products | None = None,
    decoded: bool = False,
) -> tuple[Tensor, ...]:
    """The op `linears` (ops/linear.py): `linear` for each weight, with x rounded once for all."""
    x = x.contiguous()
    rounded: tuple[Tensor, Tensor] | None = None
    outputs = []
    for weight, wide in zip(weights, unrounded, strict=True):
        if isinstance(weight, QuantTensor) and is_fp8(weight) and x.shape[0]:
            codes, scale = rounded = rounded or quantize_activations(
                x, fnuz, by_group=True, decoded=decoded
            )
            o = operands(weight, as_fp8(codes, fnuz, decoded), scale)
            outputs.append(finish(o, torch.float32 if wide else x.dtype, fnuz, products))
        else:
            outputs.append(linear(x, weight, wide, fnuz, products, decoded))
    return tuple(outputs)


_OCP = frozenset({Feature.TRITON, Feature.FP8_OCP})
_FNUZ = frozenset({Feature.TRITON, Feature.FP8_FNUZ})
_ANY = frozenset({Feature.TRITON})
KERNELS = (
    Kernel("linear", "triton", linear, _OCP),
    Kernel("linear", "triton_fnuz", partial(linear, fnuz=True), _FNUZ),
    Kernel("linears", "triton", linears, _OCP),
    Kernel("linears", "triton_fnuz", partial(linears, fnuz=True), _FNUZ),
    Kernel("linear", "triton_decoded", partial(linear, decoded=True), _ANY, priority=5),
    Kernel("linears", "triton_decoded", partial(linears, decoded=True), _ANY, priority=5),
)
