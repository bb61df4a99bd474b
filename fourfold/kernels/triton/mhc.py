"""Hyper-connections for GPUs: the post step of one site and the pre step of the next in two launches.

    streams   new X' = post·z + combᵀX, rounded and stored; its products with fn and Σ X'²
              a program: 64 dims of every stream and several times 16 tokens; 64 dims of one new stream
              and 16 tokens where there are few
    finish    one program a token: pre, y = RMSNorm(Σ pre_i·X'_i);  another: post, Sinkhorn

`streams` leaves partial sums for each chunk of 64 dims, those of its streams added in order or left to
`finish` to add in the same order, which adds up the chunks: fn is read by many programs at once however
few tokens there are, and a token's sums are the same in every batch. Sums over
dims are products of the matrix unit on tiles of one shape. With bfloat16 streams, fn is split into three
bfloat16 parts whose sum is exactly fn; products are then exact and only their accumulation rounds, as in
float32.
"""

# Triton's compiler takes tuples that grow by concatenation, and no other form of them.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.core.device import Feature
from fourfold.kernels.triton.early import after_previous, also_early, launch
from fourfold.ops.mhc import Site
from fourfold.ops.registry import Kernel

TOKENS = 16  # tokens a program of `_streams`
DIMS = 64  # dims of each stream a chunk
FEW_TOKENS = 16  # up to here every stream has programs of its own
MANY_TOKENS = 1024  # from here on a program takes TILES times TOKENS, to read fn less often
TILES = 4
MIXERS = 1  # tokens a Sinkhorn program
# Sums must round alike in every variant of a kernel: nothing is contracted but explicit tl.fma.
EXACT = {"enable_fp_fusion": False}


@triton.jit
def _parts(a, WIDE: tl.constexpr):
    """float32 `a` as bfloat16 numbers that add up to it, the smallest first; as two float32 if WIDE.

    Never as one: the compiler turns the sum of something and a single product into one product that
    starts from that something, and rounds otherwise.
    """
    high = a.to(tl.bfloat16)
    rest = a - high.to(tl.float32)
    if WIDE:
        parts = (rest, high.to(tl.float32))
    else:
        middle = rest.to(tl.bfloat16)
        parts = ((rest - middle.to(tl.float32)).to(tl.bfloat16), middle, high)
    return parts


@triton.jit(do_not_specialize=["T"])
def _streams(
    z,
    streams,
    post,
    comb,
    fn,
    out,
    parts,
    T,
    D,
    ROW,
    NEXT,
    POST: tl.constexpr,
    MIX: tl.constexpr,
    APART: tl.constexpr,
    S: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    TT: tl.constexpr,
    BD: tl.constexpr,
    EARLY: tl.constexpr,
):
    """`out` = new streams (POST), `parts [chunks, T, WIDTH]` = sums of fn · X and of X² (MIX).

    Given streams are ROW apart from token to token and NEXT from one to the next, new ones lie side by
    side. `out` may be `streams`, but not with APART: a number needs those of its dim and token alone,
    all of which its own thread has read.

    A row of `parts` holds ROWS products, then the sum of squares. APART: a program makes one stream, and
    there are S such rows, `[chunks · S, T, WIDTH]`.
    """
    COUNT: tl.constexpr = 1 if APART else S
    first = tl.program_id(0) % S if APART else 0
    d = (tl.program_id(0) // S if APART else tl.program_id(0)) * BD + tl.arange(0, BD)
    row = tl.arange(0, WIDTH)
    WIDE: tl.constexpr = streams.dtype.element_ty == tl.float32
    if MIX:
        a = ()
        for n in tl.static_range(COUNT):
            values = tl.load(
                fn + row[:, None] * (S * D) + (first + n) * D + d[None, :],
                mask=(row < ROWS)[:, None] & (d < D)[None, :],
                other=0.0,
            )
            a = a + (_parts(values.to(tl.float32), WIDE),)
    after_previous(EARLY)
    for tile in range(TILES):
        tokens = (tl.program_id(1) * TILES + tile).to(tl.int64) * TT + tl.arange(0, TT)
        live = tokens < T
        inside = (d < D)[:, None] & live[None, :]
        place = tokens[None, :] * ROW + d[:, None]
        apart = NEXT
        if POST:
            x = ()
            for i in tl.static_range(S):
                value = tl.load(streams + place + i * NEXT, mask=inside, other=0.0)
                x = x + (value.to(tl.float32),)
            y = tl.load(z + tokens[None, :] * D + d[:, None], mask=inside, other=0.0)
            y = y.to(tl.float32)
            place = tokens[None, :] * (S * D) + d[:, None]
            apart = D
            for n in tl.static_range(COUNT):
                mixer = comb + tokens * (S * S) + first + n
                value = tl.load(mixer, mask=live, other=0.0)[None, :] * x[0]
                for i in tl.static_range(1, S):
                    factor = tl.load(mixer + i * S, mask=live, other=0.0)[None, :]
                    value = tl.fma(factor, x[i], value)
                gain = tl.load(post + tokens * S + first + n, mask=live, other=0.0)[None, :]
                value = tl.fma(gain, y, value).to(out.dtype.element_ty)
                tl.store(out + place + (first + n) * apart, value, mask=inside)
            # Read back what was just written: carried over in registers, it would be computed again
            # for every layout that the products need.
            tl.debug_barrier()
        if MIX:
            products = tl.zeros((WIDTH, TT), dtype=tl.float32)
            squares = tl.zeros((TT,), dtype=tl.float32)
            own = tl.arange(0, TT)[:, None] == tl.arange(0, TT)[None, :]
            for n in tl.static_range(COUNT):
                x_n = tl.load(out + place + (first + n) * apart, mask=inside, other=0.0)
                product = tl.zeros((WIDTH, TT), dtype=tl.float32)
                for part in tl.static_range(len(a[n])):
                    product = tl.dot(a[n][part], x_n, product, input_precision="ieee")
                square = tl.zeros((TT, TT), dtype=tl.float32)
                square = tl.dot(tl.trans(x_n), x_n, square, input_precision="ieee")
                # All but one addend of each column are zero: exact in any order.
                square = tl.sum(tl.where(own, square, 0.0), axis=0)
                products = product if n == 0 else products + product
                squares = square if n == 0 else squares + square
            sums = parts + (tl.program_id(0).to(tl.int64) * T + tokens) * WIDTH
            kept = (row < ROWS)[:, None] & live[None, :]
            tl.store(sums[None, :] + row[:, None], products, mask=kept)
            tl.store(sums + ROWS, squares, mask=live)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _pick(values, lane, index: tl.constexpr):
    """Entry `index` of the last axis: all other addends are zero."""
    return tl.sum(tl.where(lane == index, values, 0.0), axis=len(values.shape) - 1)


@triton.jit
def _read_streams(
    token,
    streams,
    parts,
    base,
    scale,
    norm,
    y,
    T,
    D,
    ROW,
    NEXT,
    norm_eps,
    hc_eps,
    CHUNKS: tl.constexpr,
    PER: tl.constexpr,
    S: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BD: tl.constexpr,
):
    """y of one token: RMSNorm(Σ (sigmoid(mix_i·scale₀ + base_i) + hc_eps)·X_i)."""
    lane = tl.arange(0, WIDTH)
    d = tl.arange(0, BLOCK)
    x = ()
    for i in tl.static_range(S):
        place = token.to(tl.int64) * ROW + i * NEXT + d
        x = x + (tl.load(streams + place, mask=d < D, other=0.0),)
    chunk = tl.arange(0, CHUNKS).to(tl.int64)[:, None]
    present = (chunk * BD < D) & (lane <= ROWS)[None, :]
    place = (chunk * PER * T + token) * WIDTH + lane[None, :]
    part = tl.load(parts + place, mask=present, other=0.0)
    for i in tl.static_range(1, PER):
        part += tl.load(parts + place + i * T * WIDTH, mask=present, other=0.0)
    mix = tl.sum(part, axis=0)
    inverse = tl.rsqrt(_pick(mix, lane, ROWS) / (S * D) + norm_eps)
    first = tl.load(scale)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in tl.static_range(S):
        logit = tl.fma(_pick(mix, lane, i) * inverse, first, tl.load(base + i).to(tl.float32))
        weight = _sigmoid(logit) + hc_eps
        total = tl.fma(weight + tl.zeros_like(total), x[i].to(tl.float32), total)
    length = tl.rsqrt(tl.sum(total * total) / D + norm_eps)
    weights = tl.load(norm + d, mask=d < D, other=0.0).to(tl.float32)
    value = (total * length * weights).to(y.dtype.element_ty)
    tl.store(y + token.to(tl.int64) * D + d, value, mask=d < D)


@triton.jit
def _mix_streams(
    tile,
    parts,
    base,
    scale,
    post,
    comb,
    T,
    D,
    norm_eps,
    hc_eps,
    iterations,
    CHUNKS: tl.constexpr,
    PER: tl.constexpr,
    S: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    BD: tl.constexpr,
):
    """post and comb of a tile of tokens; a token's S×S matrix is S² registers."""
    tokens = tile.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    live = tokens < T
    lane = tl.arange(0, WIDTH)[None, :]
    chunk = tl.arange(0, CHUNKS)[None, :, None]
    present = (chunk * BD < D) & (lane <= ROWS)[:, None, :] & live[:, None, None]
    place = (chunk * PER * T + tokens[:, None, None]) * WIDTH + lane[:, None, :]
    part = tl.load(parts + place, mask=present, other=0.0)
    for i in tl.static_range(1, PER):
        part += tl.load(parts + place + i * T * WIDTH, mask=present, other=0.0)
    mix = tl.sum(part, axis=1)
    inverse = tl.rsqrt(_pick(mix, lane, ROWS) / (S * D) + norm_eps)
    second = tl.load(scale + 1) + tl.zeros_like(inverse)
    third = tl.load(scale + 2) + tl.zeros_like(inverse)
    for j in tl.static_range(S):
        logit = tl.fma(
            _pick(mix, lane, S + j) * inverse, second, tl.load(base + S + j).to(tl.float32)
        )
        tl.store(post + tokens * S + j, 2.0 * _sigmoid(logit), mask=live)
    matrix = ()
    for i in tl.static_range(S):
        logits = ()
        for j in tl.static_range(S):
            offset = tl.load(base + 2 * S + i * S + j).to(tl.float32)
            value = _pick(mix, lane, 2 * S + i * S + j) * inverse
            logits = logits + (tl.fma(value, third, offset + tl.zeros_like(inverse)),)
        top = logits[0]
        for j in tl.static_range(1, S):
            top = tl.maximum(top, logits[j], propagate_nan=tl.PropagateNan.ALL)
        powers = ()
        for j in tl.static_range(S):
            powers = powers + (tl.exp(logits[j] - top),)
        total = powers[0]
        for j in tl.static_range(1, S):
            total += powers[j]
        for j in tl.static_range(S):
            matrix = matrix + (powers[j] / total + hc_eps,)
    matrix = _normalize(matrix, hc_eps, S, 1, S)
    for _ in range(iterations - 1):
        matrix = _normalize(matrix, hc_eps, S, S, 1)
        matrix = _normalize(matrix, hc_eps, S, 1, S)
    for n in tl.static_range(S * S):
        tl.store(comb + tokens * S * S + n, matrix[n], mask=live)


@triton.jit
def _normalize(matrix, eps, S: tl.constexpr, LINE: tl.constexpr, STEP: tl.constexpr):
    """Divide each of S lines by its sum plus eps: line a holds entries a·LINE + b·STEP."""
    scales = ()
    for a in tl.static_range(S):
        total = matrix[a * LINE]
        for b in tl.static_range(1, S):
            total += matrix[a * LINE + b * STEP]
        scales = scales + (1.0 / (total + eps),)
    result = ()
    for n in tl.static_range(S * S):
        result = result + (matrix[n] * scales[(n // LINE) % S],)
    return result


@triton.jit(do_not_specialize=["T"])
def _finish(
    streams,
    parts,
    base,
    scale,
    norm,
    y,
    post,
    comb,
    T,
    D,
    ROW,
    NEXT,
    norm_eps,
    hc_eps,
    iterations,
    CHUNKS: tl.constexpr,
    PER: tl.constexpr,
    S: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD: tl.constexpr,
    BD: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Programs 0 … T−1 make y; the rest post and comb of TOKENS tokens each (not for HEAD)."""
    after_previous(EARLY)
    program = tl.program_id(0)
    if HEAD or program < T:
        _read_streams(
            program, streams, parts, base, scale, norm, y, T, D, ROW, NEXT, norm_eps, hc_eps,
            CHUNKS, PER, S, ROWS, WIDTH, BLOCK, BD,
        )  # fmt: skip
    else:
        _mix_streams(
            program - T, parts, base, scale, post, comb, T, D, norm_eps, hc_eps, iterations,
            CHUNKS, PER, S, ROWS, WIDTH, TOKENS, BD,
        )  # fmt: skip


def _warps(streams: Tensor) -> int:
    """Two: fn is two tiles of 16 rows. Float32 takes twice the registers."""
    return 2 if streams.dtype == torch.bfloat16 else 4


def _readable(streams: Tensor) -> Tensor:
    """`streams`, copied only if a stream's dims do not lie side by side: the first layer's may be one
    memory under all S of them."""
    return streams if streams.stride(2) == 1 else streams.contiguous()


def _run_streams(
    streams: Tensor,
    fn: Tensor | None,
    post_step: tuple[Tensor, Tensor, Tensor] | None,
    early: bool,
) -> tuple[Tensor, Tensor]:
    """New streams (or the given ones) and `parts [chunks, per chunk, T, width]` (see `_streams`), without
    tokens if without fn. New streams of many tokens lie where the given ones lay."""
    streams = _readable(streams)
    tokens, count, dim = streams.shape
    rows = fn.shape[0] if fn is not None else 0
    width = max(16, triton.next_power_of_2(rows + 1))
    chunks, apart = -(-dim // DIMS), tokens <= FEW_TOKENS
    per = count if apart else 1
    shape = (chunks, per, tokens if fn is not None else 0, width)
    parts = torch.empty(shape, dtype=torch.float32, device=streams.device)
    out = streams
    if post_step and (apart or not streams.is_contiguous()):
        out = torch.empty(streams.shape, dtype=streams.dtype, device=streams.device)
    z, post, comb = (each.contiguous() for each in post_step or (streams, parts, parts))
    if tokens:
        many = (
            tokens >= MANY_TOKENS and streams.dtype == torch.bfloat16
        )  # fn in float32 is too large
        tiles = TILES if many else 1
        _streams[(chunks * per, -(-tokens // (TOKENS * tiles)))](
            z, streams, post, comb, streams if fn is None else fn, out, parts, tokens, dim,
            streams.stride(0), streams.stride(1), POST=post_step is not None, MIX=fn is not None,
            APART=apart, S=count, ROWS=rows, WIDTH=width, TILES=tiles, TT=TOKENS, BD=DIMS,
            EARLY=early, num_warps=_warps(streams), num_stages=1, **EXACT, **launch(early),
        )  # fmt: skip
    return out, parts


def _run_finish(
    streams: Tensor,
    parts: Tensor,
    parameters: tuple[Tensor, Tensor, Tensor],
    eps: tuple[float, float],
    rows: int,
    iterations: int,
    early: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, post and comb from the sums; `iterations` 0 is the head, which has y only."""
    tokens, count, dim = streams.shape
    mixes = (tokens, count, count * count) if iterations else (0, 0, 0)
    y = torch.empty(tokens, dim, dtype=streams.dtype, device=streams.device)
    post = torch.empty(mixes[0], mixes[1], dtype=torch.float32, device=streams.device)
    comb = torch.empty(mixes[0], count, count, dtype=torch.float32, device=streams.device)
    if tokens:
        base, scale, norm = parameters
        _finish[(tokens + (-(-tokens // MIXERS) if iterations else 0),)](
            streams, parts, base, scale, norm, y, post, comb, tokens, dim, streams.stride(0),
            streams.stride(1), *eps, iterations, CHUNKS=triton.next_power_of_2(parts.shape[0]),
            PER=parts.shape[1], S=count, ROWS=rows, WIDTH=parts.shape[3],
            BLOCK=triton.next_power_of_2(dim), TOKENS=MIXERS, HEAD=not iterations, BD=DIMS,
            EARLY=early, num_warps=_warps(streams) * (1 if dim <= 4096 else 2), **EXACT,
            **launch(early),
        )  # fmt: skip
    return y, post, comb


def _finish_site(
    streams: Tensor, parts: Tensor, site: Site, early: bool
) -> tuple[Tensor, Tensor, Tensor]:
    parameters = (site.base, site.scale.to(torch.float32), site.norm)
    eps = (site.norm_eps, site.hc_eps)
    return _run_finish(streams, parts, parameters, eps, site.fn.shape[0], site.iterations, early)


def hc_pre(streams: Tensor, site: Site, early: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The op `hc_pre` (ops/mhc.py)."""
    streams, parts = _run_streams(streams, site.fn, None, early)
    return _finish_site(streams, parts, site, early)


def hc_post(z: Tensor, streams: Tensor, post: Tensor, comb: Tensor, early: bool = False) -> Tensor:
    """The op `hc_post` (ops/mhc.py)."""
    return _run_streams(streams, None, (z, post, comb), early)[0]


def hc_post_pre(
    ops: object,
    z: Tensor,
    streams: Tensor,
    post: Tensor,
    comb: Tensor,
    site: Site,
    early: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op `hc_post_pre` (ops/mhc.py): `hc_post` and `hc_pre`, bit for bit."""
    new, parts = _run_streams(streams, site.fn, (z, post, comb), early)
    return (new, *_finish_site(new, parts, site, early))


def hc_head(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm: Tensor,
    norm_eps: float,
    hc_eps: float,
    early: bool = False,
) -> Tensor:
    """The op `hc_head` (ops/mhc.py)."""
    streams, parts = _run_streams(streams, fn, None, early)
    parameters = (base, scale.to(torch.float32), norm)
    return _run_finish(streams, parts, parameters, (norm_eps, hc_eps), fn.shape[0], 0, early)[0]


_NEEDS = frozenset({Feature.TRITON})
KERNELS = also_early(
    Kernel("hc_pre", "triton", hc_pre, _NEEDS),
    Kernel("hc_post", "triton", hc_post, _NEEDS),
    Kernel("hc_post_pre", "triton", hc_post_pre, _NEEDS),
    Kernel("hc_head", "triton", hc_head, _NEEDS),
)
