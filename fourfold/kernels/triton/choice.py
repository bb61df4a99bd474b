"""The op `sample` on GPUs: the token at a place of the falling order, without sorting a vocabulary.

What top_k, top_p and the number drawn ask for are places in the falling order of a row's tokens: the
first token at which a measure of those so far (their count, or their mass) is enough. A row is cut in
parts, a program each in all launches but the last:

    _tops    largest logit and the mean of each part
    _cells   how many tokens are in each of 512 cells of equal width, from the largest logit down; the
             last part to arrive estimates their masses, and chooses the cells each place must lie in
    _list    exact masses above those cells, and the tokens in them as lists
    _find    one program a row: a search in the lists or, for a place that was in none, in the row

Contract: a row's token depends on its logits, parameters and number alone. Sums are float64 like the
body's, in another order: where a boundary (min_p, top_p, the number drawn) falls within about 1e-12 of a
cumulative sum, the neighbouring token may be taken; greedy rows and top_k are exact. Rows whose largest
logit is not finite give the token that the sort puts first, as the body does. Estimates decide where a
place is sought and nothing else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.core.device import Feature
from fourfold.kernels.triton.routing import descending_key
from fourfold.ops.registry import Kernel
from fourfold.ops.sampling import SamplingRows

EXACT = {"enable_fp_fusion": False}
PART = 4096  # tokens of a row that one program looks at
LISTED = 4096  # tokens in a list
ROW_TILE = 256  # rows at once: 170 KB of workspace each
GONE = tl.constexpr(-(1 << 63))
CELLS = tl.constexpr(512)
WAYS = tl.constexpr(4)  # keys tried at once in a search
WAYS_LOG2 = tl.constexpr(2)
SLACK = tl.constexpr(5e-4)  # of the whole mass: that tokens are not spread evenly in a cell


@triton.jit
def ordered_logit(ordered):
    """The float32 whose order-preserving integer is `ordered` (int32)."""
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)


@triton.jit
def _tops(
    logits, temperature, tops, means, arrivals, counts, FIRST, V, PARTS, PART: tl.constexpr
):  # fmt: skip
    """The largest key of a part; unless greedy, sum and number of its finite logits."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    i = part * PART + tl.arange(0, PART)
    x = tl.load(logits + (FIRST + row) * V + i, mask=i < V, other=0.0)
    tl.store(tops + row * PARTS + part, tl.max(tl.where(i < V, descending_key(x, i), GONE)))
    if tl.load(temperature + FIRST + row) != 0.0:
        finite = (i < V) & (x - x == 0.0)
        place = means + (row * PARTS + part) * 2
        tl.store(place, tl.sum(tl.where(finite, x, 0.0)))
        tl.store(place + 1, tl.sum(finite.to(tl.float32)))
        if part == 0:
            n = tl.arange(0, 4)
            tl.store(arrivals + row, 0)
            tl.store(counts + row * 4 + n, 0)


@triton.jit
def _row_top(tops, row, PARTS, B: tl.constexpr):
    """The row's largest key."""
    b = tl.arange(0, B)
    return tl.max(tl.load(tops + row * PARTS + b, mask=b < PARTS, other=GONE))


@triton.jit
def _row_rate(means, row, largest, PARTS, B: tl.constexpr):
    """Cells for each unit of logit: the mean lies in the middle one."""
    b = tl.arange(0, B)
    place = means + (row * PARTS + b) * 2
    total = tl.sum(tl.load(place, mask=b < PARTS, other=0.0))
    number = tl.sum(tl.load(place + 1, mask=b < PARTS, other=0.0))
    return 255.5 / tl.maximum(largest - total / number, 1e-30)


@triton.jit
def _cell(x, largest, rate):
    return tl.minimum((largest - x) * rate, 511.0).to(tl.int32)


@triton.jit
def _first(enough, last):
    """The first cell for which it is enough, `last` at most."""
    c = tl.arange(0, CELLS)
    return tl.minimum(tl.min(tl.where(enough, c, CELLS - 1)), last)


@triton.jit
def _masses(number, tops, row, largest, rate, heat, floor, PARTS, B: tl.constexpr):
    """(mass of each cell, what sums of them may be wrong by).

    The parts' largest tokens count with their weights; the others as if they lay evenly in their cell,
    where n of them have a sum that is off by √(n/12) cell widths.
    """
    c, b = tl.arange(0, CELLS), tl.arange(0, B)
    width = 1.0 / (rate * heat)  # of a cell in units of the exponent
    top = tl.load(tops + row * PARTS + b, mask=b < PARTS, other=GONE)
    x = ordered_logit((top >> 32).to(tl.int32))
    weight = tl.exp((x - largest) / heat)
    known = (b < PARTS) & (x > float("-inf")) & (weight >= floor)
    here = (_cell(x, largest, rate)[None, :] == c[:, None]) & known[None, :]
    others = number - tl.sum(here.to(tl.float32), axis=1)
    each = tl.exp(-(c.to(tl.float32) + 0.5) * width)
    mass = others * each + tl.sum(tl.where(here, weight[None, :], 0.0), axis=1)
    off = each * tl.minimum(width, 1.0)
    slack = 4.0 * tl.sqrt(tl.sum(others * off * off) / 12.0) + SLACK * tl.sum(mass)
    # The last cell has no end.
    return mass, slack + tl.sum(tl.where(c == CELLS - 1, mass, 0.0))


@triton.jit
def _fitting(count, first, last, LISTED: tl.constexpr):
    """`last`, or an earlier cell if the tokens from `first` to there are too many for a list."""
    c = tl.arange(0, CELLS)
    before = tl.sum(tl.where(c == first - 1, count, 0.0))
    return tl.minimum(last, tl.maximum(first, tl.max(tl.where(count - before <= LISTED, c, 0))))


@triton.jit
def _chosen_cells(
    mass, number, slack, width, top_p, top_k, uniform, ranges, LISTED: tl.constexpr
):  # fmt: skip
    """Store the first and last cell of each list: of the token drawn, of top_p's last, of top_k's."""
    c = tl.arange(0, CELLS)
    upto, count = tl.cumsum(mass, 0), tl.cumsum(number, 0)
    whole, tokens = tl.sum(mass), tl.sum(number)
    least, most, last = whole - slack, whole + slack, tl.max(c)
    k_first = last * 0 - 1
    k_last, p_first, p_last = k_first, k_first, k_first
    if (top_k > 0) & (top_k < tokens):
        last = _first(count >= top_k, last)
        here, before = tl.sum(tl.where(c == last, mass, 0.0)), tl.sum(tl.where(c < last, mass, 0.0))
        least, most = before - slack, before + here + slack
        k_first, k_last = last, last
    if top_p < 1.0:
        least, most = least * top_p, most * top_p
        p_first = _first(upto >= least - slack, last)
        p_last = _first(upto >= most + slack, last)
        last = p_last
        most += tl.exp(-p_first.to(tl.float32) * width)  # top_p's last token is taken whole
    first = _first(upto > least * uniform - slack, last)
    last_drawn = _first(upto > most * uniform + slack, last)
    # A place is most likely near the beginning of where it may be.
    last_drawn = _fitting(count, first, last_drawn, LISTED)
    p_last = _fitting(count, p_first, p_last, LISTED)
    # Where it is enough to look at the first tokens, one list does for all.
    short = tl.sum(tl.where(c <= last, number, 0.0)) <= LISTED
    tl.store(ranges, tl.where(short, 0, first))
    tl.store(ranges + 1, tl.where(short, last, last_drawn))
    tl.store(ranges + 2, tl.where(short, -1, p_first))
    tl.store(ranges + 3, tl.where(short, -1, p_last))
    tl.store(ranges + 4, tl.where(short, -1, k_first))
    tl.store(ranges + 5, tl.where(short, -1, k_last))


@triton.jit
def _cells(
    logits, temperature, top_p, top_k, min_p, uniform, tops, means, arrivals, tables, ranges, FIRST, V,
    PARTS, PART: tl.constexpr, B: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Count a part's tokens by cell."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    heat = tl.load(temperature + FIRST + row)
    if heat == 0.0:
        return
    largest = ordered_logit((_row_top(tops, row, PARTS, B) >> 32).to(tl.int32))
    if largest - largest != 0.0:
        return
    rate = _row_rate(means, row, largest, PARTS, B)
    floor = tl.load(min_p + FIRST + row)
    i = part * PART + tl.arange(0, PART)
    x = tl.load(logits + (FIRST + row) * V + i, mask=i < V, other=float("-inf"))
    kept = (x > float("-inf")) & (tl.exp((x - largest) / heat) >= floor)
    c = tl.arange(0, CELLS)
    table = tables + row * PARTS * CELLS + c
    tl.store(table + part * CELLS, tl.histogram(_cell(x, largest, rate), CELLS, mask=kept))
    tl.debug_barrier()
    if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == PARTS - 1:
        # What the cache of this processor holds of others' parts may be older than they are.
        b = tl.arange(0, B)[:, None]
        theirs = tl.load(table[None, :] + b * CELLS, mask=b < PARTS, other=0, cache_modifier=".cg")
        numbers = tl.sum(theirs, axis=0).to(tl.float32)
        mass, slack = _masses(numbers, tops, row, largest, rate, heat, floor, PARTS, B)
        _chosen_cells(
            mass, numbers, slack, 1.0 / (rate * heat), tl.load(top_p + FIRST + row),
            tl.load(top_k + FIRST + row), tl.load(uniform + FIRST + row).to(tl.float32),
            ranges + row * 6, LISTED,
        )  # fmt: skip


@triton.jit
def _weight(x, heat, peak, floor):
    """exp(x/heat − peak), the largest logit's being 1; 0 for what min_p drops."""
    weight = tl.exp(x.to(tl.float64) / heat - peak)
    return tl.where((weight > 0.0) & (weight >= floor), weight, 0.0)


@triton.jit
def _listed(keys, number, heat, peak, floor, LISTED: tl.constexpr):
    """(keys, weights) of a list."""
    n = tl.arange(0, LISTED)
    key = tl.load(keys + n, mask=n < number, other=GONE)
    weight = _weight(ordered_logit((key >> 32).to(tl.int32)), heat, peak, floor)
    return key, tl.where(n < number, weight, 0.0)


@triton.jit
def _of_row(logits, first, V, heat, peak, floor, LISTED: tl.constexpr):
    """(keys, weights) of a row's tokens from `first` on."""
    i = first + tl.arange(0, LISTED)
    x = tl.load(logits + i, mask=i < V, other=float("-inf"))
    weight = tl.where(x == float("-inf"), 0.0, _weight(x, heat, peak, floor))
    return tl.where(weight > 0.0, descending_key(x, i), GONE), weight


@triton.jit
def _beyond(keys, weights, wanted):
    """(how many keys, what mass) from each of `wanted [WAYS]` on."""
    taken = (keys[None, :] >= wanted[:, None]) & (weights > 0.0)[None, :]
    mass = tl.sum(tl.where(taken, weights[None, :], 0.0), axis=1)
    return tl.sum(taken.to(tl.int32), axis=1), mass


@triton.jit
def _enough(count, mass, target, STAGE):
    """Whether the place is reached: top_k counts, top_p wants its mass, the number drawn more."""
    measure = tl.where(STAGE == 0, count.to(tl.float64), mass)
    return (measure > target) | ((measure == target) & (STAGE < 2))


@triton.jit
def _search(
    logits, keys, number, count, mass, limit, best, target, STAGE, V, heat, peak, floor,
    FULL: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """The first token at which it is enough: (its key, mass with it, whether it is there).

    Among `number` keys listed, above which are `count` tokens of `mass`, or in the whole row (FULL,
    `count` and `mass` 0), where the last token is taken if rounding leaves too little. Tokens with keys
    below `limit` are not there. Ends when one token is left between two keys.
    """
    way = tl.arange(0, WAYS)
    least, most = tl.maximum(limit, GONE + (1 << 32)), best
    if not FULL:
        key, weight = _listed(keys, number, heat, peak, floor, LISTED)
        weight = tl.where(key >= limit, weight, 0.0)
        key = tl.where(weight > 0.0, key, GONE)
        least, most = tl.min(tl.where(key == GONE, best, key)), tl.max(key)
    upto_count, upto_mass = count, mass  # from `least` on
    above_count = count  # from beyond `most` on
    found, begun, going = count >= 0, count < 0, count >= 0
    while going:
        step = (most >> WAYS_LOG2) - (least >> WAYS_LOG2) + 1
        wanted = least + way * step
        counts, masses = tl.zeros((WAYS,), tl.int32), tl.zeros((WAYS,), tl.float64)
        if FULL:
            for first in range(0, V, LISTED):
                some, weights = _of_row(logits, first, V, heat, peak, floor, LISTED)
                more_counts, more_masses = _beyond(some, weights, wanted)
                counts += more_counts
                masses += more_masses
        else:
            counts, masses = _beyond(key, weight, wanted)
        counts, masses = counts + count, masses + mass
        if begun == 0:
            upto_count = tl.sum(tl.where(way == 0, counts, 0))
            upto_mass = tl.sum(tl.where(way == 0, masses, 0.0))
            if FULL:
                nearly = upto_mass * (1.0 - 2.220446049250313e-16)
                target = tl.where(STAGE == 0, target, tl.minimum(target, nearly))
            else:
                # All there is must be enough, and what is above it not.
                found = (most >= least) & _enough(upto_count, upto_mass, target, STAGE)
                found = found & (_enough(count, mass, target, STAGE) == 0)
            begun = count >= 0
        reached = (wanted <= most) & _enough(counts, masses, target, STAGE)
        good = tl.max(tl.where(reached, way, 0))
        ends = (good + 1 < WAYS) & (least + (good + 1) * step <= most)
        upto_count = tl.sum(tl.where(way == good, counts, 0))
        upto_mass = tl.sum(tl.where(way == good, masses, 0.0))
        above_count = tl.where(ends, tl.sum(tl.where(way == good + 1, counts, 0)), above_count)
        most = tl.where(ends, least + (good + 1) * step - 1, most)
        least = least + good * step
        going = found & (upto_count - above_count > 1) & (least < most)
    token = tl.where(most >= least, most * 0 + GONE, GONE)
    if FULL:
        for first in range(0, V, LISTED):
            some, weights = _of_row(logits, first, V, heat, peak, floor, LISTED)
            token = tl.maximum(token, tl.max(tl.where(some <= most, some, GONE)))
    else:
        token = tl.max(tl.where(key <= most, key, GONE))
    return token, upto_mass, found


@triton.jit
def _found(
    logits, keys, counts, numbers, masses, ranges, best, top_k, top_p, uniform, V, heat, peak, floor,
    whole_count, whole, LISTED: tl.constexpr,
):  # fmt: skip
    """The key of a row's token: top_k's last token, of those top_p's last, of those the one drawn."""
    limit = tl.where(best == GONE, best, GONE)
    for stage in range(3):
        asked = (stage == 2) | ((stage == 1) & (top_p < 1.0))
        asked = asked | ((stage == 0) & (top_k > 0) & (top_k < whole_count))
        if asked:
            share = tl.where(stage == 1, top_p, uniform)
            target = tl.where(stage == 0, top_k.to(tl.float64), share * whole)
            mine = 2 - stage
            mine = tl.where(tl.load(ranges + 2 * mine) < 0, 0, mine)
            number = tl.load(counts + mine)
            n = tl.arange(0, 4)
            count = tl.sum(tl.where(n == mine, numbers, 0))
            mass = tl.sum(tl.where(n == mine, masses, 0.0))
            # A list that is too long is not whole.
            number = tl.where(number <= LISTED, number, 0)
            key, upto, found = _search(
                logits, keys + mine.to(tl.int64) * LISTED, number, count, mass, limit, best, target,
                stage, V, heat, peak, floor, False, LISTED,
            )  # fmt: skip
            if found == 0:
                key, upto, found = _search(
                    logits, keys, number, count * 0, mass * 0.0, limit, best, target, stage, V, heat,
                    peak, floor, True, LISTED,
                )  # fmt: skip
            limit, whole = key, upto
    return limit


@triton.jit
def _list(
    logits, temperature, min_p, tops, means, ranges, counts, keys, numbers, masses, FIRST, V, PARTS,
    PART: tl.constexpr, B: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """List a part's tokens, in any order, and sum what is above each list and all there is."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    heat = tl.load(temperature + FIRST + row).to(tl.float64)
    if heat == 0.0:
        return
    largest = ordered_logit((_row_top(tops, row, PARTS, B) >> 32).to(tl.int32))
    if largest - largest != 0.0:
        return
    peak = largest.to(tl.float64) / heat
    floor = tl.load(min_p + FIRST + row).to(tl.float64)
    rate = _row_rate(means, row, largest, PARTS, B)
    i = part * PART + tl.arange(0, PART)
    x = tl.load(logits + (FIRST + row) * V + i, mask=i < V, other=float("-inf"))
    cell = _cell(x, largest, rate)
    weight = tl.where(x == float("-inf"), 0.0, _weight(x, heat, peak, floor))
    n = tl.arange(0, 4)
    own_numbers = tl.where(n == 3, tl.sum((weight > 0.0).to(tl.int32)), 0)
    own_masses = tl.where(n == 3, tl.sum(weight), 0.0)
    for each in range(3):
        first = tl.load(ranges + row * 6 + 2 * each)
        last = tl.load(ranges + row * 6 + 2 * each + 1)
        if first >= 0:
            above = (weight > 0.0) & (cell < first)
            own_numbers = tl.where(n == each, tl.sum(above.to(tl.int32)), own_numbers)
            own_masses = tl.where(n == each, tl.sum(tl.where(above, weight, 0.0)), own_masses)
            listed = ((weight > 0.0) & (cell >= first) & (cell <= last)).to(tl.int32)
            number = tl.sum(listed)
            if number > 0:
                before = tl.atomic_add(counts + row * 4 + each, number)
                place = before + tl.cumsum(listed, 0) - 1
                fits = (listed > 0) & (place < LISTED)
                place += each * LISTED
                tl.store(keys + row * 3 * LISTED + place, descending_key(x, i), mask=fits)
    mine = (row * PARTS + part) * 4
    tl.store(numbers + mine + n, own_numbers)
    tl.store(masses + mine + n, own_masses)


@triton.jit
def _find(
    logits, temperature, top_p, top_k, min_p, uniform, tops, ranges, counts, keys, numbers, masses,
    out, FIRST, V, PARTS, B: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    heat = tl.load(temperature + FIRST + row).to(tl.float64)
    key = _row_top(tops, row, PARTS, B)
    largest = ordered_logit((key >> 32).to(tl.int32))
    if (heat != 0.0) & (largest - largest == 0.0):
        n = tl.arange(0, 4)
        b = tl.arange(0, B)[:, None]
        place = (row * PARTS + b) * 4 + n[None, :]
        count = tl.sum(tl.load(numbers + place, mask=b < PARTS, other=0), axis=0)
        mass = tl.sum(tl.load(masses + place, mask=b < PARTS, other=0.0), axis=0)
        key = _found(
            logits + (FIRST + row) * V, keys + row * 3 * LISTED, counts + row * 4, count, mass,
            ranges + row * 6, key, tl.load(top_k + FIRST + row).to(tl.int64),
            tl.load(top_p + FIRST + row).to(tl.float64),
            tl.load(uniform + FIRST + row).to(tl.float64), V, heat, largest.to(tl.float64) / heat,
            tl.load(min_p + FIRST + row).to(tl.float64), tl.sum(tl.where(n == 3, count, 0)),
            tl.sum(tl.where(n == 3, mass, 0.0)), LISTED,
        )  # fmt: skip
    tl.store(out + FIRST + row, 0x7FFFFFFF - (key & 0x7FFFFFFF))


def sample(logits: Tensor, rows: SamplingRows, part: int = PART, listed: int = LISTED) -> Tensor:
    """The op `sample` (ops/sampling.py), within the contract above."""
    logits = logits.contiguous()
    count, size = logits.shape
    out = torch.empty(count, dtype=torch.int64, device=logits.device)
    if not count:
        return out
    tile, parts = min(count, ROW_TILE), -(-size // part)

    def room(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(tile, *shape, dtype=dtype, device=logits.device)

    tops, keys = room(parts, dtype=torch.int64), room(3, listed, dtype=torch.int64)
    means, tables = room(parts, 2, dtype=torch.float32), room(parts, 512)
    arrivals, ranges, counts = room(), room(6), room(4)
    numbers, masses = room(parts, 4), room(parts, 4, dtype=torch.float64)
    heat, given = rows.temperature, (rows.top_p, rows.top_k, rows.min_p, rows.uniform)
    width = triton.next_power_of_2(parts)
    for first in range(0, count, tile):
        here = min(tile, count - first)
        _tops[(here, parts)](
            logits, heat, tops, means, arrivals, counts, first, size, parts, PART=part, num_warps=4,
            **EXACT,
        )  # fmt: skip
        _cells[(here, parts)](
            logits, heat, *given, tops, means, arrivals, tables, ranges, first, size, parts, PART=part,
            B=width, LISTED=listed, num_warps=4, **EXACT,
        )  # fmt: skip
        _list[(here, parts)](
            logits, heat, rows.min_p, tops, means, ranges, counts, keys, numbers, masses, first, size,
            parts, PART=part, B=width, LISTED=listed, num_warps=8, **EXACT,
        )  # fmt: skip
        _find[(here,)](
            logits, heat, *given, tops, ranges, counts, keys, numbers, masses, out, first, size, parts,
            B=width, LISTED=listed, num_warps=16, **EXACT,
        )  # fmt: skip
    return out


KERNELS = (Kernel("sample", "triton_cells", sample, frozenset({Feature.TRITON}), priority=5),)
