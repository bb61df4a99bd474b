"""The indexer for GPUs: scores of paged keys, then the largest of them, a few hundred tokens at a time.

    q ─ rounded as FP8 keys are ─┐
    keys ─ codes as bfloat16 ────┼─ score_j = Σ_h w_h · relu(q_h · K_j) ─ image: uint32 in score order
                                 │                                             │
    out ◄─ rows in ascending order ◄─ threshold by bisection of the image's bits ┘

A token that sees no more than `topk` rows gets them all and no scores are computed. Otherwise one
program scores a block of rows for one or more tokens of a run, each token by itself in one and the same
matrix product, so that a score depends on its token and row alone. Images make the choice exact: the
largest threshold that at least `topk` images reach is found two bits at a time, all images above it are
taken, and of those equal to it the lowest rows; NaN counts as −∞, −0 as +0.

Scratch memory is bounded: tokens are taken as many at once as WORKSPACE holds images for. Grids follow
from tensor shapes; how many rows a token sees is read on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.core.batch import ForwardBatch
from fourfold.core.config import ModelConfig
from fourfold.core.device import Feature
from fourfold.core.row_format import RowKind
from fourfold.core.rows import RowPages
from fourfold.ops.registry import Kernel

WORKSPACE = 256 << 20  # bytes of images held at once, unless one token needs more
TOKENS = 64  # of one run, most that a program scores against the keys it has decoded
PROGRAMS = 1056  # wanted for one pass over the keys: eight for each multiprocessor
SCAN = 4096  # images looked at together when choosing
INTEGERS = ("T", "BASE", "EACH", "BLOCKS", "STRIDE", "WIDTH", "TOPK")
INDEXES = ("weights", "positions", "sequence_ids", "cu_seqlens", "block_table", "out")


@triton.jit(do_not_specialize=("COUNT",))
def _round_queries(q, out, COUNT, C: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr):
    """Each of COUNT vectors of C numbers to E4M3 · 2^e, e the smallest with amax ≤ 448·2^e.

    As `index_round` (ops/rows.py): the numbers are rounded to bfloat16 first; NaN becomes 0, and a
    vector that holds one has the smallest e.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, CP)
    inside = (row < COUNT)[:, None] & (c < C)[None, :]
    place = row[:, None] * C + c[None, :]
    x = tl.load(q + place, mask=inside, other=0.0).to(tl.float32)
    # Round to bfloat16, ties to even, by integers: exact for bfloat16 input and the same everywhere.
    raw = x.to(tl.int32, bitcast=True)
    near = ((raw + 0x7FFF + ((raw >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    x = tl.where(x == x, near, x)
    spoilt = tl.max((x != x).to(tl.int32), 1) > 0
    amax = tl.max(tl.where(x == x, tl.abs(x), 0.0), 1)
    amax = tl.minimum(tl.maximum(tl.where(spoilt, 0.0, amax), 1e-4), 3.0e38)
    bits = amax.to(tl.int32, bitcast=True)
    e = (bits >> 23) - 127 - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    y = x * ((127 - e) << 23).to(tl.float32, bitcast=True)[:, None]
    y = tl.where(x == x, tl.minimum(tl.maximum(y, -448.0), 448.0), 0.0)
    # Adding and taking away 1.5·2^23 units of the last place rounds to that place, ties to even.
    binade = tl.maximum((y.to(tl.int32, bitcast=True) >> 23) & 0xFF, 127 - 6)
    magic = (((binade - 3 + 23) << 23) | 0x400000).to(tl.float32, bitcast=True)
    y = (y + magic) - magic
    y *= ((127 + e) << 23).to(tl.float32, bitcast=True)[:, None]
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _keys(
    keys, block_table, sequence, j, rows, STRIDE,
    C: tl.constexpr, CP: tl.constexpr, FP8: tl.constexpr, WIDE: tl.constexpr, CAST: tl.constexpr,
    RPP: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Keys of rows `j [n]` as `[n, CP]`, without their scale, and the scale `[n]`."""
    c = tl.arange(0, CP)
    page = tl.load(block_table + sequence * STRIDE + j // RPP, mask=j < rows, other=-1)
    there = page >= 0
    base = keys + tl.where(there, page, 0) * PAGE
    offset = (j % RPP).to(tl.int64)
    scale = tl.full(j.shape, 1.0, tl.float32)
    raw = tl.load(
        (base + offset * C)[:, None] + c[None, :], mask=there[:, None] & (c < C)[None, :], other=0
    )
    if FP8:
        numbers = (base + RPP * C).to(tl.pointer_type(tl.float32))
        scale = tl.load(numbers + offset, mask=there, other=0.0)
        if CAST:
            value = raw.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        else:
            # The code's fields are float32's, but for the exponent's bias: 2^120 too small.
            wide = raw.to(tl.int32)
            value = (((wide & 0x80) << 24) | ((wide & 0x7F) << 20)).to(tl.float32, bitcast=True)
            value *= 1.329227995784916e36
    else:
        value = raw.to(tl.float32)
    return value if WIDE else value.to(tl.bfloat16), scale


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=INDEXES)
def _score(
    q, weights, keys, positions, sequence_ids, cu_seqlens, block_table, images,
    T, BASE, EACH, BLOCKS, STRIDE, WIDTH, TOPK,
    RATIO: tl.constexpr, RPP: tl.constexpr, PAGE: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
    H: tl.constexpr, HP: tl.constexpr, FP8: tl.constexpr, WIDE: tl.constexpr, CAST: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Images `[T, WIDTH]` of EACH tokens' scores, every n-th block of ROWS rows."""
    h, c = tl.arange(0, HP), tl.arange(0, CP)
    t = tl.program_id(0).to(tl.int64) * EACH
    end = tl.minimum(t + EACH, T)
    while t < end:
        sequence = tl.load(sequence_ids + t)
        stop = tl.minimum(end, tl.maximum(tl.load(cu_seqlens + sequence + 1) - BASE, t + 1))
        p = tl.load(positions + t)
        seen = tl.minimum((p + stop - t) // RATIO, BLOCKS.to(tl.int64) * RPP)
        blocks = tl.where(seen > TOPK, tl.cdiv(seen, ROWS), 0).to(tl.int32)
        for block in range(tl.program_id(1), blocks, tl.num_programs(1)):
            j = block * ROWS + tl.arange(0, ROWS)
            a, scale = _keys(
                keys, block_table, sequence, j, seen, STRIDE, C, CP, FP8, WIDE, CAST, RPP, PAGE
            )
            # The first token that sees more than TOPK rows, and one of this block.
            least = RATIO * (tl.maximum(block * ROWS, TOPK) + 1).to(tl.int64) - 1
            for u in range(tl.maximum(t, t + least - p), stop):
                place = (u * H + h)[:, None] * C + c[None, :]
                b = tl.load(q + place, mask=(h < H)[:, None] & (c < C)[None, :], other=0.0)
                if WIDE:
                    b = b.to(tl.float32)
                w = tl.load(weights + u * H + h, mask=h < H, other=0.0)
                dots = tl.dot(a, tl.trans(b), input_precision="ieee")
                dots = tl.where(dots < 0.0, 0.0, dots)  # keeps NaN, unlike a maximum
                if H < HP:  # what infinite keys make of heads that do not exist
                    dots = tl.where((h < H)[None, :], dots, 0.0)
                score = tl.sum(dots * w[None, :], 1) * scale + 0.0
                score = tl.where(score == score, score, float("-inf"))
                bits = score.to(tl.int32, bitcast=True)
                image = tl.where(bits < 0, ~bits, bits ^ -2147483648)
                visible = tl.minimum((p + u - t + 1) // RATIO, seen)
                tl.store(images + u * WIDTH + j, image, mask=j < visible)
        t = stop


@triton.jit
def _scan(images, low, count, SCAN: tl.constexpr):
    """SCAN images from `low` on; those that do not exist are 0, less than any that does."""
    i = low + tl.arange(0, SCAN)
    return tl.load(images + i, mask=i < count, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _reaching(images, kept, count, a, b, c, SCAN: tl.constexpr):
    """How many of `count` images are at least a, b and c, none of them 0. `kept`: the first SCAN."""
    n_a = tl.sum((kept >= a).to(tl.int32), 0)
    n_b = tl.sum((kept >= b).to(tl.int32), 0)
    n_c = tl.sum((kept >= c).to(tl.int32), 0)
    if count > SCAN:
        in_a = tl.zeros((SCAN,), tl.int32)
        in_b = tl.zeros((SCAN,), tl.int32)
        in_c = tl.zeros((SCAN,), tl.int32)
        for low in range(SCAN, count, SCAN):
            image = _scan(images, low, count, SCAN)
            in_a += (image >= a).to(tl.int32)
            in_b += (image >= b).to(tl.int32)
            in_c += (image >= c).to(tl.int32)
        n_a += tl.sum(in_a, 0)
        n_b += tl.sum(in_b, 0)
        n_c += tl.sum(in_c, 0)
    return n_a, n_b, n_c


@triton.jit
def _common_bits(images, kept, count, SCAN: tl.constexpr):
    """The bits in which all images agree, zeros below them, and the first pair below: its shift."""
    i = tl.arange(0, SCAN)
    most = kept
    least = tl.where(i < count, kept, 0xFFFFFFFF)
    for low in range(SCAN, count, SCAN):
        image = _scan(images, low, count, SCAN)
        most = tl.maximum(most, image)
        least = tl.minimum(least, tl.where(low + i < count, image, 0xFFFFFFFF))
    top = tl.max(most, 0)
    differ = top ^ tl.min(least, 0)
    shift = tl.full((), 30, tl.int32)
    while (shift > 0) & ((differ >> shift.to(tl.uint32)) == 0):
        shift -= 2
    below = (tl.full((), 4, tl.uint32) << shift.to(tl.uint32)) - 1
    return (top | below) ^ below, shift


@triton.jit
def _threshold(images, kept, count, wanted, SCAN: tl.constexpr):
    """A bound that at least `wanted` images reach and, unless exactly so many do, none larger."""
    bound, shift = _common_bits(images, kept, count, SCAN)
    reached = count
    while (shift >= 0) & (reached != wanted):
        one = tl.full((), 1, tl.uint32) << shift.to(tl.uint32)
        a, b, c = bound + one, bound + one * 2, bound + one * 3
        n_a, n_b, n_c = _reaching(images, kept, count, a, b, c, SCAN)
        if n_c >= wanted:
            bound, reached = c, n_c
        elif n_b >= wanted:
            bound, reached = b, n_b
        elif n_a >= wanted:
            bound, reached = a, n_a
        shift -= 2
    return bound


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=INDEXES)
def _choose(
    images, positions, out, BLOCKS, WIDTH, TOPK,
    RATIO: tl.constexpr, RPP: tl.constexpr, SCAN: tl.constexpr, TP: tl.constexpr,
):  # fmt: skip
    """The TOPK rows with the largest images of one token, in order of rows; all if they are fewer."""
    t = tl.program_id(0).to(tl.int64)
    out += t * TOPK
    images += t * WIDTH
    seen = (tl.load(positions + t) + 1) // RATIO
    count = tl.minimum(seen, BLOCKS.to(tl.int64) * RPP).to(tl.int32)
    if count <= TOPK:
        k = tl.arange(0, TP)
        tl.store(out + k, tl.where(k < count, k, -1).to(tl.int64), mask=k < TOPK)
    else:
        kept = _scan(images, 0, count, SCAN)
        bound = _threshold(images, kept, count, TOPK, SCAN)
        # No image is all ones, so there is a next bound.
        above, _, _ = _reaching(images, kept, count, bound + 1, bound + 1, bound + 1, SCAN)
        ties = TOPK - above
        taken, tied = 0, 0
        for low in range(0, count, SCAN):
            j = low + tl.arange(0, SCAN)
            image = _scan(images, low, count, SCAN)
            equal = ((image == bound) & (j < count)).to(tl.int32)
            rank = tied + tl.cumsum(equal, 0)
            take = ((image > bound) | ((equal > 0) & (rank <= ties))).to(tl.int32)
            place = taken + tl.cumsum(take, 0) - 1
            tl.store(out + place, j.to(tl.int64), mask=take > 0)
            tied += tl.sum(equal, 0)
            taken += tl.sum(take, 0)


@dataclass(frozen=True)
class Shape:
    """Rows of a program of `_score`, its warps and its pipeline stages.

    `cast`: the device converts OCP codes itself.
    """

    rows: int
    warps: int
    stages: int
    cast: bool = False


COMPACT = Shape(rows=64, warps=4, stages=2)
WARP_GROUPS = Shape(rows=128, warps=4, stages=2, cast=True)
FLOAT32 = Shape(rows=32, warps=4, stages=1)


def index_topk(
    q: Tensor,
    weights: Tensor,
    keys: RowPages,
    batch: ForwardBatch,
    ratio: int,
    topk: int,
    shape: Shape = COMPACT,
) -> Tensor:
    """The op `index_topk` (ops/indexer.py)."""
    tokens, heads, size = q.shape
    chosen = torch.empty(tokens, topk, dtype=torch.int64, device=q.device)
    if not tokens:
        return chosen
    fp8 = keys.format.kind is RowKind.FP8_WHOLE
    wide = not (q.dtype == torch.bfloat16 and keys.storage.dtype in (torch.bfloat16, torch.uint8))
    q, weights = q.contiguous(), weights.to(torch.float32).contiguous()
    blocks, stride = batch.block_table.shape[1], batch.block_table.stride(0)
    width = blocks * keys.rows_per_page
    scored = width > topk
    padded = max(triton.next_power_of_2(size), 16)
    if fp8 and scored:
        rounded, rows = torch.empty_like(q), max(2048 // padded, 1)
        _round_queries[(-(-tokens * heads // rows),)](
            q, rounded, tokens * heads, C=size, CP=padded, ROWS=rows, num_warps=4
        )
        q = rounded
    most = min(tokens, max(WORKSPACE // (4 * max(width, 1)), 1)) if scored else tokens
    images = torch.empty(most if scored else 0, width, dtype=torch.int32, device=q.device)
    each = min(triton.next_power_of_2(-(-tokens // batch.num_sequences)), TOKENS)
    shape = FLOAT32 if wide else shape
    for low in range(0, tokens, most):
        part = slice(low, min(low + most, tokens))
        count, positions = part.stop - low, batch.positions[part]
        if scored:
            groups = -(-count // each)
            splits = min(-(-PROGRAMS // groups), -(-width // shape.rows))
            _score[(groups, splits)](
                q[part], weights[part], keys.storage, positions, batch.sequence_ids[part],
                batch.cu_seqlens_q, batch.block_table, images, count, low, each, blocks,
                stride, width, topk, RATIO=ratio, RPP=keys.rows_per_page,
                PAGE=keys.storage.stride(0), C=size, CP=padded,
                H=heads, HP=max(triton.next_power_of_2(heads), 16), FP8=fp8, WIDE=wide,
                CAST=shape.cast, ROWS=shape.rows, num_warps=shape.warps, num_stages=shape.stages,
            )  # fmt: skip
        _choose[(count,)](
            images, positions, chosen[part], blocks, width, topk, RATIO=ratio,
            RPP=keys.rows_per_page, SCAN=SCAN, TP=triton.next_power_of_2(topk), num_warps=8,
        )  # fmt: skip
    return chosen


def _supports(config: ModelConfig) -> str | None:
    if config.index_head_dim % 4:
        return f"needs index_head_dim divisible by 4, not {config.index_head_dim}"
    return None


KERNELS = (
    Kernel(
        "index_topk",
        "triton",
        index_topk,
        frozenset({Feature.TRITON, Feature.BF16_MATRIX}),
        supports=_supports,
    ),
    Kernel(
        "index_topk",
        "triton_wgmma",
        partial(index_topk, shape=WARP_GROUPS),
        frozenset({Feature.TRITON, Feature.BF16_MATRIX, Feature.WGMMA}),
        priority=20,
        supports=_supports,
    ),
)
