"""From logits to tokens on the device.

Sampling needs sums of probabilities in falling order. Nothing sorts the whole vocabulary: blocks of 2,048
tokens are sorted by programs of their own, each with its running sums (float64), and one program a row
then finds the places it needs (top_k, top_p, the token) by searching for a logit:

    a prefix of the falling order  =  a logit v and, of the tokens equal to v, the first j by id
    its count or mass              =  Σ over blocks of what the block's sorted list holds before there

Contract: a row's token depends on its logits, parameters and number alone. Sums are float64 like the
body's, in another order: where a boundary (min_p, top_p, the number drawn) falls within about 1e-12 of a
cumulative sum, the neighbouring token may be taken; greedy rows and top_k are exact. Rows whose largest
logit is not finite give the token that the sort puts first, as the body does. Greedy rows sort nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.core.device import Feature
from fourfold.kernels.triton.routing import descending_key
from fourfold.ops.registry import Kernel
from fourfold.ops.sampling import Adjustments, SamplingRows
from fourfold.ops.sampling import token_logprobs as logprobs_body

EXACT = {"enable_fp_fusion": False}
BLOCK = 2048  # tokens sorted by one program
WAYS = 16  # logits tried at once in a search
ROW_TILE = 64  # rows sorted at once: 28 bytes a token and row of workspace
TOP_BLOCK = 2048  # tokens of which one program finds the likeliest
LOGPROB_BLOCK = 4096
MOST_LOGPROBS = 64  # alternatives a token; more go the body's way


GONE = tl.constexpr(-(1 << 63))


@triton.jit
def ordered_logit(ordered):
    """The float32 whose order-preserving integer is `ordered` (int32)."""
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)


@triton.jit
def _adjust_all(logits, allowed, out, V, STRIDE, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + row * V + i, mask=i < V, other=0.0)
    if MASKED:
        keep = tl.load(allowed + row * STRIDE + i, mask=i < V, other=0)
        value = tl.where(keep != 0, value, float("-inf"))
    tl.store(out + row * V + i, value, mask=i < V)


# How many pairs there are is another number in every step.
@triton.jit(do_not_specialize=["M"])
def _adjust_some(
    logits, rows, tokens, repetition, bias, allowed, out, M, V, STRIDE,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < M
    row = tl.load(rows + i, mask=live, other=0).to(tl.int64)
    token = tl.load(tokens + i, mask=live, other=0).to(tl.int64)
    factor = tl.load(repetition + i, mask=live, other=1.0)
    value = tl.load(logits + row * V + token, mask=live, other=0.0)
    value = tl.where(value > 0, value / factor, value * factor)
    value += tl.load(bias + i, mask=live, other=0.0)
    if MASKED:
        keep = tl.load(allowed + row * STRIDE + token, mask=live, other=0)
        value = tl.where(keep != 0, value, float("-inf"))
    tl.store(out + row * V + token, value, mask=live)


@triton.jit
def _mix(z):
    z = (z ^ (z >> 30)) * tl.full((), 0xBF58476D1CE4E5B9, tl.uint64)
    z = (z ^ (z >> 27)) * tl.full((), 0x94D049BB133111EB, tl.uint64)
    return z ^ (z >> 31)


@triton.jit
def uniform_number(stream, position):
    """Two rounds of the SplitMix64 finaliser, as the body of `uniform`; int64 in, float64 out."""
    place = position.to(tl.uint64, bitcast=True) * tl.full((), 0x94D049BB133111EB, tl.uint64)
    state = stream.to(tl.uint64, bitcast=True) ^ place
    state = _mix(state + tl.full((), 0x9E3779B97F4A7C15, tl.uint64))
    return (_mix(state) >> 11).to(tl.int64, bitcast=True).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _uniform(streams, positions, out, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    stream = tl.load(streams + i, mask=i < N, other=0)
    position = tl.load(positions + i, mask=i < N, other=0)
    tl.store(out + i, uniform_number(stream, position), mask=i < N)


@triton.jit
def _sort_blocks(logits, temperature, tops, keys, ids, sums, FIRST, V, BLOCKS, BLOCK: tl.constexpr):
    """One block of one row: its largest key; unless greedy, sorted logits, token ids and running sums of
    exp((x − block's largest)/temperature)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + (FIRST + row) * V + i, mask=i < V, other=0.0)
    key = tl.where(i < V, descending_key(x, i), GONE)
    best = tl.max(key)
    tl.store(tops + row * BLOCKS + tl.program_id(1), best)
    heat = tl.load(temperature + FIRST + row).to(tl.float64)
    if heat != 0.0:
        key = tl.sort(key, descending=True)
        ordered = (key >> 32).to(tl.int32)
        scaled = ordered_logit(ordered).to(tl.float64) / heat
        largest = ordered_logit((best >> 32).to(tl.int32)).to(tl.float64) / heat
        # Nothing but −∞ in the block: −∞ − −∞ must not become a NaN.
        weight = tl.where(scaled == float("-inf"), 0.0, tl.exp(scaled - largest))
        weight = tl.where(key == GONE, 0.0, weight)
        place = (row * BLOCKS + tl.program_id(1)) * BLOCK + tl.arange(0, BLOCK)
        tl.store(keys + place, ordered)
        tl.store(ids + place, (0x7FFFFFFF - (key & 0x7FFFFFFF)).to(tl.int32))
        tl.store(sums + place, tl.cumsum(weight, 0))


@triton.jit
def _mass(sums, counts, scale, mask):
    """scale · the sum of the first `counts` weights of each block."""
    return tl.load(sums + tl.maximum(counts - 1, 0), mask=mask & (counts > 0), other=0.0) * scale


@triton.jit
def _counts_from(keys, wanted, low, high):
    """How many of each block's sorted logits are at least `wanted`, known to lie in low … high."""
    while tl.max(tl.max(high - low, axis=1), axis=0) > 0:
        middle = (low + high) // 2
        searching = low < high
        value = tl.load(keys + middle, mask=searching, other=0).to(tl.int64)
        above = searching & (value >= wanted)
        high = tl.where(searching & (value < wanted), middle, high)
        low = tl.where(above, middle + 1, low)
    return low


@triton.jit
def _find_logit(
    keys, sums, scale, limit, least, most, target, COUNTS: tl.constexpr, STRICT: tl.constexpr,
    WAYS: tl.constexpr,
):  # fmt: skip
    """The largest logit v with measure{x ≥ v} ≥ target (STRICT: > target) among the first `limit [B]` of
    each block, as (v, counts above v, counts from v on). Measure: tokens (COUNTS) or their mass.

    v is sought in least … most, of which `least` is known to satisfy it (or is taken if nothing does).
    """
    way = tl.arange(0, WAYS)[:, None]
    above = tl.zeros_like(limit)  # counts of logits > most
    upto = limit  # counts of logits ≥ least
    while least < most:
        step = (most - least) // WAYS + 1
        wanted = least + way * step
        tried = wanted <= most
        low = tl.broadcast_to(above[None, :], (WAYS, limit.shape[0]))
        high = tl.broadcast_to(upto[None, :], (WAYS, limit.shape[0]))
        counts = _counts_from(keys[None, :], wanted, low, tl.where(tried, high, low))
        if COUNTS:
            measure = tl.sum(counts, axis=1).to(tl.float64)
        else:
            measure = tl.sum(_mass(sums[None, :], counts, scale[None, :], tried), axis=1)
        enough = measure > target if STRICT else measure >= target
        # Way 0 is `least`. Measures fall from way to way, so those that are enough come first.
        good = tl.max(tl.where(enough[:, None] & tried, way, 0), axis=0)
        good = tl.max(good, axis=0)
        upto = tl.where(good == 0, upto, tl.sum(tl.where(way == good, counts, 0), axis=0))
        ends = (good + 1 < WAYS) & (least + (good + 1) * step <= most)
        above = tl.where(ends, tl.sum(tl.where(way == good + 1, counts, 0), axis=0), above)
        most = tl.where(ends, least + (good + 1) * step - 1, most)
        least = least + good * step
    return least, above, upto


@triton.jit
def _with_ties(above, upto, ties):
    """Counts of the prefix that ends after the first `ties` of the equal logits, block after block."""
    each = upto - above
    before = tl.cumsum(each, 0) - each
    return above + tl.minimum(tl.maximum(ties.to(tl.int32) - before, 0), each)


@triton.jit
def _pick(
    tops, keys, ids, sums, temperature, top_p, top_k, min_p, uniform, out, FIRST, BLOCKS,
    BLOCK: tl.constexpr, B: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    """The token of one row."""
    row = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, B)
    top = tl.load(tops + row * BLOCKS + b, mask=b < BLOCKS, other=GONE)
    best = tl.max(top)
    most = best >> 32
    largest = ordered_logit(most.to(tl.int32))
    heat = tl.load(temperature + FIRST + row).to(tl.float64)
    token = 0x7FFFFFFF - (best & 0x7FFFFFFF)
    if (heat != 0.0) & (largest - largest == 0.0):
        start = (row * BLOCKS + b).to(tl.int64) * BLOCK
        sorted_keys, running = keys + start, sums + start
        peak = largest.to(tl.float64) / heat
        block_peak = ordered_logit((top >> 32).to(tl.int32)).to(tl.float64) / heat
        real = (b < BLOCKS) & (block_peak > float("-inf"))
        scale = tl.where(real, tl.exp(tl.where(real, block_peak, peak) - peak), 0.0)

        # min_p: tokens with weight > 0 and ≥ min_p of the largest, whose weight is 1.
        floor = tl.load(min_p + FIRST + row).to(tl.float64)
        low = tl.zeros((B,), dtype=tl.int32)
        high = tl.where(real, BLOCK, 0).to(tl.int32)
        while tl.max(high - low) > 0:
            middle = (low + high) // 2
            searching = low < high
            value = tl.load(sorted_keys + middle, mask=searching, other=0)
            # Places beyond the vocabulary hold the least of all keys, which is a NaN's.
            x = ordered_logit(value)
            weight = tl.exp(tl.where(x == x, x, float("-inf")).to(tl.float64) / heat - peak)
            kept = searching & (weight > 0.0) & (weight >= floor)
            high = tl.where(searching & (kept == 0), middle, high)
            low = tl.where(kept, middle + 1, low)
        counts = low
        last = tl.load(sorted_keys + tl.maximum(counts - 1, 0), mask=counts > 0, other=0x7FFFFFFF)
        least = tl.min(last.to(tl.int64))

        limit = tl.load(top_k + FIRST + row).to(tl.int64)
        if (limit > 0) & (limit < tl.sum(counts)):
            least, above, upto = _find_logit(
                sorted_keys,
                running,
                scale,
                counts,
                least,
                most,
                limit.to(tl.float64),
                True,
                False,
                WAYS,
            )
            counts = _with_ties(above, upto, limit - tl.sum(above))

        share = tl.load(top_p + FIRST + row).to(tl.float64)
        if share < 1.0:
            target = share * tl.sum(_mass(running, counts, scale, real))
            least, above, upto = _find_logit(
                sorted_keys, running, scale, counts, least, most, target, False, False, WAYS
            )
            weight = tl.exp(ordered_logit(least.to(tl.int32)).to(tl.float64) / heat - peak)
            lacking = target - tl.sum(_mass(running, above, scale, real))
            ties = tl.minimum(tl.maximum(tl.ceil(lacking / weight), 1.0), 2147483647.0)
            counts = _with_ties(above, upto, ties.to(tl.int64))

        target = tl.load(uniform + FIRST + row).to(tl.float64)
        target *= tl.sum(_mass(running, counts, scale, real))
        least, above, upto = _find_logit(
            sorted_keys, running, scale, counts, least, most, target, False, True, WAYS
        )
        weight = tl.exp(ordered_logit(least.to(tl.int32)).to(tl.float64) / heat - peak)
        passed = target - tl.sum(_mass(running, above, scale, real))
        each = upto - above
        chosen = tl.minimum(tl.floor(tl.maximum(passed / weight, 0.0)), 2147483647.0).to(tl.int64)
        chosen = tl.minimum(chosen, tl.sum(each).to(tl.int64) - 1)
        before = tl.cumsum(each, 0) - each
        here = (chosen >= before) & (chosen < before + each)
        place = above + (chosen - before).to(tl.int32)
        found = tl.load(ids + start + tl.where(here, place, 0), mask=here, other=0)
        token = tl.sum(found).to(tl.int64)
    tl.store(out + FIRST + row, token)


@triton.jit
def _count_accepted(sampled, drafts, out, N, K, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, WIDTH)[None, :]
    live = (row < N)[:, None] & (k < K)
    ours = tl.load(sampled + row.to(tl.int64)[:, None] * (K + 1) + k, mask=live, other=0)
    theirs = tl.load(drafts + row.to(tl.int64)[:, None] * K + k, mask=live, other=0)
    first = tl.min(tl.where(live & (ours != theirs), k, K), axis=1)
    tl.store(out + row, first.to(tl.int64), mask=row < N)


@triton.jit
def _top_of_block(logits, allowed, tops, V, BLOCKS, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key of one block of one row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * V + i, mask=i < V, other=0.0).to(tl.float32)
    if MASKED:
        keep = tl.load(allowed + i, mask=i < V, other=0)
        x = tl.where(keep != 0, x, float("-inf"))
    key = tl.where(i < V, descending_key(x, i), GONE)
    tl.store(tops + row * BLOCKS + tl.program_id(1), tl.max(key))


@triton.jit
def _top_of_row(tops, out, BLOCKS, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, B)
    best = tl.max(tl.load(tops + row * BLOCKS + b, mask=b < BLOCKS, other=GONE))
    tl.store(out + row, 0x7FFFFFFF - (best & 0x7FFFFFFF))


@triton.jit
def _block_sums(logits, parts, V, BLOCKS, BLOCK: tl.constexpr):
    """(largest, Σ exp(x − largest)) of one block of one row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * V + i, mask=i < V, other=float("-inf")).to(tl.float32)
    largest = tl.max(x)
    power = tl.where(x == float("-inf"), 0.0, tl.exp(x - largest))
    place = parts + (row * BLOCKS + tl.program_id(1)) * 2
    tl.store(place, largest)
    tl.store(place + 1, tl.sum(power))


@triton.jit
def _row_sums(parts, row, BLOCKS, B: tl.constexpr):
    """(largest, log Σ exp(x − largest)) of a row."""
    b = tl.arange(0, B)
    place = parts + (row * BLOCKS + b) * 2
    peak = tl.load(place, mask=b < BLOCKS, other=float("-inf"))
    total = tl.load(place + 1, mask=b < BLOCKS, other=0.0)
    largest = tl.max(peak)
    scale = tl.where(peak == float("-inf"), 0.0, tl.exp(peak - largest))
    return largest, tl.log(tl.sum(total * scale))


# Requests ask for any number of alternatives: a binary for each would be many.
@triton.jit(do_not_specialize=["COUNT"])
def _block_logprobs(
    logits, tokens, parts, ranks, candidates, V, BLOCKS, COUNT, B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one block of one row: tokens likelier than the row's own, and the COUNT likeliest as keys."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    largest, log = _row_sums(parts, row, BLOCKS, B)
    x = tl.load(logits + row * V + i, mask=i < V, other=0.0).to(tl.float32)
    value = x - largest - log
    own = tl.load(logits + row * V + tl.load(tokens + row)).to(tl.float32) - largest - log
    place = row * BLOCKS + tl.program_id(1)
    tl.store(ranks + place, tl.sum(((i < V) & (value > own)).to(tl.int32)))
    key = tl.where(i < V, descending_key(value, i), GONE)
    for n in range(COUNT):
        best = tl.max(key)
        tl.store(candidates + place * COUNT + n, best)
        key = tl.where(key == best, GONE, key)


@triton.jit(do_not_specialize=["COUNT"])
def _row_logprobs(
    logits, tokens, parts, ranks, candidates, own, rank, top, top_values, V, BLOCKS, COUNT,
    B: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    largest, log = _row_sums(parts, row, BLOCKS, B)
    value = tl.load(logits + row * V + tl.load(tokens + row)).to(tl.float32)
    tl.store(own + row, value - largest - log)
    b = tl.arange(0, B)
    above = tl.load(ranks + row * BLOCKS + b, mask=b < BLOCKS, other=0)
    tl.store(rank + row, tl.sum(above).to(tl.int64) + 1)
    n = tl.arange(0, KEYS)
    key = tl.load(candidates + row * BLOCKS * COUNT + n, mask=n < BLOCKS * COUNT, other=GONE)
    for n in range(COUNT):
        best = tl.max(key)
        key = tl.where(key == best, GONE, key)
        tl.store(top + row * COUNT + n, 0x7FFFFFFF - (best & 0x7FFFFFFF))
        tl.store(top_values + row * COUNT + n, ordered_logit((best >> 32).to(tl.int32)))


def adjust_logits(
    logits: Tensor, adjustments: Adjustments | None, allowed: Tensor | None
) -> Tensor:
    """The op `adjust_logits` (ops/sampling.py)."""
    if (adjustments is None and allowed is None) or not logits.numel():
        return logits
    logits = logits.contiguous()
    out = torch.empty_like(logits)
    rows, size = logits.shape
    masked = allowed is not None
    mask = allowed.contiguous().view(torch.uint8) if allowed is not None else logits
    stride = size if masked and mask.dim() == 2 else 0
    _adjust_all[(rows, -(-size // 4096))](
        logits, mask, out, size, stride, MASKED=masked, BLOCK=4096, num_warps=4
    )
    if adjustments is not None and adjustments.rows.shape[0]:
        a, count = adjustments, adjustments.rows.shape[0]
        _adjust_some[(-(-count // 128),)](
            logits, a.rows.contiguous(), a.tokens.contiguous(), a.repetition, a.bias, mask, out,
            count, size, stride, MASKED=masked, BLOCK=128, num_warps=1,
        )  # fmt: skip
    return out


def uniform(streams: Tensor, positions: Tensor) -> Tensor:
    """The op `uniform` (ops/sampling.py)."""
    count = streams.shape[0]
    out = torch.empty(count, dtype=torch.float64, device=streams.device)
    if count:
        _uniform[(-(-count // 128),)](
            streams.contiguous(), positions.contiguous(), out, count, BLOCK=128, num_warps=1
        )
    return out


def sample(logits: Tensor, rows: SamplingRows, block: int = BLOCK) -> Tensor:
    """The op `sample` (ops/sampling.py), within the contract above."""
    logits = logits.contiguous()
    count, size = logits.shape
    out = torch.empty(count, dtype=torch.int64, device=logits.device)
    if not count:
        return out
    blocks = -(-size // block)
    tile = min(count, ROW_TILE)
    place = (tile, blocks, block)
    tops = torch.empty(place[:2], dtype=torch.int64, device=out.device)
    keys = torch.empty(place, dtype=torch.int32, device=out.device)
    ids = torch.empty(place, dtype=torch.int32, device=out.device)
    sums = torch.empty(place, dtype=torch.float64, device=out.device)
    for first in range(0, count, tile):
        part = min(tile, count - first)
        _sort_blocks[(part, blocks)](
            logits, rows.temperature, tops, keys, ids, sums, first, size, blocks, BLOCK=block,
            num_warps=8, **EXACT,
        )  # fmt: skip
        _pick[(part,)](
            tops, keys, ids, sums, rows.temperature, rows.top_p, rows.top_k, rows.min_p,
            rows.uniform, out, first, blocks, BLOCK=block, B=triton.next_power_of_2(blocks),
            WAYS=WAYS, num_warps=8, **EXACT,
        )  # fmt: skip
    return out


def count_accepted(sampled: Tensor, drafts: Tensor) -> Tensor:
    """The op `count_accepted` (ops/sampling.py)."""
    count, width = drafts.shape
    out = torch.zeros(count, dtype=torch.int64, device=drafts.device)
    if count and width:
        _count_accepted[(-(-count // 32),)](
            sampled.contiguous(), drafts.contiguous(), out, count, width, ROWS=32,
            WIDTH=triton.next_power_of_2(width), num_warps=1,
        )  # fmt: skip
    return out


def likeliest(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """The op `likeliest` (ops/sampling.py)."""
    count, size = logits.shape
    out = torch.empty(count, dtype=torch.int64, device=logits.device)
    if not count:
        return out
    logits, blocks = logits.contiguous(), -(-size // TOP_BLOCK)
    tops = torch.empty(count, blocks, dtype=torch.int64, device=out.device)
    mask = logits if allowed is None else allowed.view(torch.uint8)
    _top_of_block[(count, blocks)](
        logits, mask, tops, size, blocks, MASKED=allowed is not None, BLOCK=TOP_BLOCK, num_warps=4
    )
    _top_of_row[(count,)](tops, out, blocks, B=triton.next_power_of_2(blocks), num_warps=1)
    return out


def token_logprobs(
    logits: Tensor, tokens: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op `token_logprobs` (ops/sampling.py)."""
    rows, size = logits.shape
    count = min(count, size)
    if count > MOST_LOGPROBS or not rows:
        return logprobs_body(logits, tokens, count)
    logits = logits.contiguous()
    device, blocks = logits.device, -(-size // LOGPROB_BLOCK)
    width = triton.next_power_of_2(blocks)
    parts = torch.empty(rows, blocks, 2, dtype=torch.float32, device=device)
    ranks = torch.empty(rows, blocks, dtype=torch.int32, device=device)
    candidates = torch.empty(rows, blocks, count, dtype=torch.int64, device=device)
    own = torch.empty(rows, dtype=torch.float32, device=device)
    rank = torch.empty(rows, dtype=torch.int64, device=device)
    top = torch.empty(rows, count, dtype=torch.int64, device=device)
    values = torch.empty(rows, count, dtype=torch.float32, device=device)
    grid = (rows, blocks)
    _block_sums[grid](logits, parts, size, blocks, BLOCK=LOGPROB_BLOCK, num_warps=8, **EXACT)
    _block_logprobs[grid](
        logits, tokens, parts, ranks, candidates, size, blocks, count, B=width,
        BLOCK=LOGPROB_BLOCK, num_warps=8, **EXACT,
    )  # fmt: skip
    _row_logprobs[(rows,)](
        logits, tokens, parts, ranks, candidates, own, rank, top, values, size, blocks, count,
        B=width, KEYS=triton.next_power_of_2(blocks * max(count, 1)), num_warps=4, **EXACT,
    )  # fmt: skip
    return own, rank, top, values


_NEEDS = frozenset({Feature.TRITON})
KERNELS = (
    Kernel("adjust_logits", "triton", adjust_logits, _NEEDS),
    Kernel("uniform", "triton", uniform, _NEEDS),
    Kernel("sample", "triton", sample, _NEEDS),
    Kernel("count_accepted", "triton", count_accepted, _NEEDS),
    Kernel("likeliest", "triton", likeliest, _NEEDS),
    Kernel("token_logprobs", "triton", token_logprobs, _NEEDS),
)
