"""Norms, hyper-connections, rows, folds, routing, the grouped output and sampling at the real geometry:
against the bodies, and bit for bit the same alone, in a decode batch and in a prefill chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fourfold import kernels
from fourfold.core.batch import ForwardBatch, ScheduledBatch, ScheduledSequence, lower
from fourfold.core.device import detect
from fourfold.core.row_format import RowFormat, RowKind, rows_per_page
from fourfold.core.rows import RowPages
from fourfold.core.tensor import QuantTensor
from fourfold.ops.catalog import OPS
from fourfold.ops.mhc import Site, sinkhorn
from fourfold.ops.registry import KernelPlan
from fourfold.ops.rope import inverse_frequencies
from fourfold.ops.rows import read_rows
from fourfold.ops.sampling import Adjustments, SamplingRows
from fourfold.quant.fp8_block import FP8_BLOCK
from tests.kernels.given import kept

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
D, S, DIM, ROPE = 4096, 4, 512, 64
COUNTS = (1, 2, 15, 16, 17, 63, 64, 65, 256, 1023, 1024, 1025, 2049, 4097)
BODIES = KernelPlan.bodies(OPS)


def chosen(op: str, name: str = "triton", early: bool = True) -> Callable[..., Any]:
    """The kernel of that name, in the form that starts early where there is one and it is wanted."""
    device = detect("cuda")
    found = {
        k.name: k.run for k in kernels.load(device) if k.op == op and k.needs <= device.features
    }
    run: Callable[..., Any] = found.get(f"{name}_early", found[name]) if early else found[name]
    return run


def poison() -> None:
    blocks = [torch.full((1 << 24,), float("nan"), device="cuda") for _ in range(16)]
    del blocks


def near(got: Tensor, expected: Tensor, tolerance: float = 1.6e-2) -> None:
    difference = (got.float() - expected.float()).abs().max()
    assert float(difference) <= tolerance * float(expected.float().abs().max())


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).bfloat16()


def slices(count: int = 4097) -> list[slice]:
    return [slice(start, start + n) for n in COUNTS for start in (0, 7) if start + n <= count]


def site() -> Site:
    fn = torch.randn(S * (S + 2), S * D, device="cuda") * (S * D) ** -0.5
    base = torch.randn(S * (S + 2), device="cuda")
    scale = torch.ones(3, device="cuda")
    return Site(fn, base, scale, 1 + randn(D, scale=0.1), 1e-6, 1e-6, 20)


def test_hyper_connections() -> None:
    here, z, streams = site(), randn(4097, D), randn(4097, S, D, scale=3.0)
    post = torch.rand(4097, S, device="cuda") * 2
    comb = sinkhorn(torch.randn(4097, S, S, device="cuda"), 20, 1e-6)
    run = kept(chosen("hc_post_pre"))
    poison()
    whole = run(BODIES, z, streams, post, comb, here)
    expected = BODIES.hc_post_pre(z, streams, post, comb, here)
    for a, b, tolerance in zip(whole, expected, (1e-2, 1e-2, 1e-4, 1e-4), strict=True):
        near(a, b, tolerance)
    for part in slices():
        poison()
        some = run(BODIES, z[part], streams[part], post[part], comb[part], here)
        assert all(torch.equal(a, b[part]) for a, b in zip(some, whole, strict=True)), part
    new = kept(chosen("hc_post"))(z, streams, post, comb)
    steps = (new, *chosen("hc_pre")(new, here))
    assert all(torch.equal(a, b) for a, b in zip(steps, whole, strict=True))
    head = (torch.randn(S, S * D, device="cuda") * 0.01, torch.randn(S, device="cuda"))
    rest = (torch.ones(1, device="cuda"), here.norm, 1e-6, 1e-6)
    near(chosen("hc_head")(new, *head, *rest), BODIES.hc_head(new, *head, *rest))


def test_norms_and_rotary() -> None:
    weight, frequencies = 1 + randn(D, scale=0.1), inverse_frequencies(ROPE, 1e4, None).cuda()
    positions = torch.randint(1 << 20, (4097,), device="cuda")
    x, q, k = randn(4097, D, scale=5), randn(4097, 64, DIM, scale=5), randn(4097, 64, 128)
    cases = (
        (chosen("rms_norm"), BODIES.rms_norm, (x,), (weight, 1e-6)),
        (chosen("query_norm_rope"), BODIES.query_norm_rope, (q, positions), (frequencies, 1e-6)),
        (chosen("rotate"), BODIES.rotate, (k, positions), (frequencies,)),
        (chosen("rotate"), BODIES.rotate, (q, positions), (frequencies, True)),
    )
    for run, body, tokens, rest in cases:
        poison()
        whole = kept(run)(*tokens, *rest)
        near(whole, body(*tokens, *rest))
        for part in slices():
            assert torch.equal(kept(run)(*(t[part] for t in tokens), *rest), whole[part])


@pytest.mark.parametrize("kind", list(RowKind), ids=str)
def test_rows(kind: RowKind) -> None:
    dim = 128 if kind is RowKind.FP8_WHOLE else DIM
    format, frequencies = RowFormat(kind, dim, ROPE), inverse_frequencies(ROPE, 1.6e5, None).cuda()
    x, weight = randn(4097, dim, scale=4), 1 + randn(dim, scale=0.1)
    positions = torch.randint(1 << 20, (4097,), device="cuda")
    run = chosen("norm_rope_rows")
    poison()
    whole = run(x, weight, positions, frequencies, 1e-6, format)
    expected = BODIES.norm_rope_rows(x, weight, positions, frequencies, 1e-6, format)
    slots = torch.arange(4097, device="cuda")
    got = read_rows(whole, slots, torch.float32)
    # One step of a 3-bit mantissa where a code flips on a rounding tie.
    near(got, read_rows(expected, slots, torch.float32), 0.07)
    differing = (whole.storage != expected.storage).float().mean()
    assert float(differing) < 0.02
    for part in slices():
        some = run(x[part], weight, positions[part], frequencies, 1e-6, format)
        here = torch.arange(some.rows_per_page, device="cuda")
        assert torch.equal(read_rows(some, here, torch.float32), got[part])
    pages = RowPages.zeros(format, 70, 64, x.device)
    targets = torch.randperm(70 * 64, device="cuda")[:4097]
    targets[::5] = -1
    chosen("store_rows")(pages, whole, targets)
    kept = torch.where((targets >= 0)[:, None], got, 0.0)
    assert torch.equal(read_rows(pages, targets, torch.float32), kept)
    unwritten = torch.ones(70 * 64, dtype=torch.bool, device="cuda")
    unwritten[targets[targets >= 0]] = False
    left = read_rows(pages, unwritten.nonzero()[:, 0], torch.float32)
    assert not left.any()


def run_of(count: int, computed: int, slot: int, ratio: int) -> ForwardBatch:
    """One sequence; its fold lives in `slot`."""
    pages = tuple(range(-(-(computed + count) // 256)))
    sequence = ScheduledSequence(
        [0] * count, computed, pages, fold_source=slot if computed else -1,
        fold_keeps=[(count - 1, slot)],
    )  # fmt: skip
    return lower(ScheduledBatch((sequence,)), (ratio,), 128, torch.device("cuda"))


FOLDS = [
    (4, 2, DIM, RowKind.FP8_GROUPS),
    (4, 2, 128, RowKind.FP8_WHOLE),
    (128, 1, DIM, RowKind.PLAIN),
]


@pytest.mark.parametrize(("ratio", "series", "width", "kind"), FOLDS)
def test_folds_in_any_chunking(ratio: int, series: int, width: int, kind: RowKind) -> None:
    """Chunks, single tokens and all at once leave the same bytes in the pages and the same folds."""
    total, format = 1100, RowFormat(kind, width, ROPE)
    kv, gate = (torch.randn(total, series * width, device="cuda") * 3 for _ in range(2))
    ape, norm = torch.randn(ratio, series * width, device="cuda"), 1 + randn(width, scale=0.1)
    frequencies = inverse_frequencies(ROPE, 1.6e5, None).cuda()

    def through(cuts: list[int], run: Callable[..., Any]) -> tuple[RowPages, Tensor]:
        pages = RowPages.zeros(format, 5, rows_per_page(ratio), kv.device)
        folds = torch.full((2, series, 3, width), float("nan"), device="cuda")
        at = 0
        for count in cuts:
            batch, part = run_of(count, at, 1, ratio), slice(at, at + count)
            poison()
            run(
                kv[part], gate[part], ape, norm, frequencies, 1e-6, pages, folds, batch,
                batch.emissions[ratio], ratio, torch.bfloat16,
            )  # fmt: skip
            at += count
        return pages, folds[1]

    kernel = chosen("compress_rows")

    def fused(*arguments: Any) -> Any:
        return kernel(BODIES, *arguments)

    pages, folds = through([total], fused)
    for cuts in ([1] * 260 + [840], [700, 3, 130, 1, 266], [255, 2, 843]):
        some, ends = through(cuts, fused)
        assert torch.equal(some.storage, pages.storage)
        assert torch.equal(ends, folds)
    right, ends = through([total], BODIES.compress_rows)
    near(folds, ends, 1e-4)
    slots = torch.arange(total // ratio, device="cuda")
    got, expected = (read_rows(p, slots, torch.float32) for p in (pages, right))
    near(got, expected, 0.07)
    assert float((pages.storage != right.storage).float().mean()) < 0.03


def test_kernels_that_start_early_wait_for_what_they_read() -> None:
    """A captured chain, each kernel reading what the one ahead has just written: the same bits as one
    after another."""
    here, frequencies = site(), inverse_frequencies(ROPE, 1e4, None).cuda()
    weight = 1 + randn(D, scale=0.1)
    format = RowFormat(RowKind.FP8_GROUPS, DIM, ROPE)
    names = ("hc_post_pre", "rms_norm", "query_norm_rope", "rotate", "norm_rope_rows", "store_rows")

    def chain(inputs: tuple[Tensor, ...], early: bool) -> list[Tensor]:
        z, streams, post, comb, positions = inputs
        streams = streams.clone()
        run = {name: chosen(name, early=early) for name in names}
        slots = torch.arange(z.shape[0], device="cuda")
        pages, seen = RowPages.zeros(format, 1, z.shape[0], z.device), []
        for _ in range(6):
            streams, y, post, comb = run["hc_post_pre"](BODIES, z, streams, post, comb, here)
            z = run["rms_norm"](y, weight, 1e-6)
            q = run["query_norm_rope"](z.unflatten(-1, (8, DIM)), positions, frequencies, 1e-6)
            z = run["rotate"](q, positions, frequencies, True).flatten(1)
            x = z[:, :DIM].contiguous()
            rows = run["norm_rope_rows"](x, weight[:DIM], positions, frequencies, 1e-6, format)
            run["store_rows"](pages, rows, slots)
            seen += [z, streams.clone(), pages.storage.clone()]
        return seen

    for count in (1, 40, 700):
        positions = torch.randint(1 << 20, (count,), device="cuda")
        comb = sinkhorn(torch.randn(count, S, S, device="cuda"), 20, 1e-6)
        post = torch.rand(count, S, device="cuda")
        inputs = (randn(count, D), randn(count, S, D), post, comb, positions)
        expected = chain(inputs, early=False)
        chain(inputs, early=True)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = chain(inputs, early=True)
        for _ in range(20):
            for each in got:
                each.zero_()
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_routing() -> None:
    logits = torch.randn(4097, 256, device="cuda") * 4
    logits[3], logits[4, ::2], logits[5, 9] = 0.0, 1.0, float("nan")
    bias = torch.randn(256, device="cuda")
    for topk_bias in (bias, bias * 0):
        ids, weights = chosen("route_topk")(logits, topk_bias, 6, 1.5)
        expected = BODIES.route_topk(logits, topk_bias, 6, 1.5)
        differing = (ids != expected[0]).any(
            -1
        )  # scores that a last bit's difference puts in order
        assert int(differing.sum()) <= 2
        near(weights[~differing].nan_to_num(), expected[1][~differing].nan_to_num(), 1e-5)
        assert torch.equal(ids[3], torch.sort(topk_bias, descending=True, stable=True).indices[:6])
        for part in slices():
            some = chosen("route_topk")(logits[part], topk_bias, 6, 1.5)
            assert torch.equal(some[0], ids[part])
            assert torch.equal(some[1].nan_to_num(7.0), weights[part].nan_to_num(7.0))
    table = torch.randint(256, (129_280, 6), device="cuda")
    names = torch.randint(129_280, (4097,), device="cuda")
    ids, weights = chosen("route_hash")(logits, names, table, 1.5)
    expected = BODIES.route_hash(logits, names, table, 1.5)
    assert torch.equal(ids, expected[0])
    near(weights.nan_to_num(), expected[1].nan_to_num(), 1e-5)


def test_embedding_and_checks() -> None:
    table, names = randn(129_280, 1024), torch.randint(129_280, (4097,), device="cuda")
    assert torch.equal(chosen("embed")(names, table), table[names])
    half = chosen("embed")(names, table[64_640:], 64_640)
    assert torch.equal(half, torch.where((names >= 64_640)[:, None], table[names], 0))
    streams, owners = randn(4097, S, D), torch.arange(4097, device="cuda") // 3
    streams[12, 3, 4095], streams[3000, 0, 0] = float("nan"), float("inf")
    found = chosen("nonfinite_sequences")(streams, owners, 1366)
    assert found.nonzero()[:, 0].tolist() == [4, 1000]


def fp8_weight(rows: int, columns: int) -> QuantTensor:
    values = torch.randn(rows, columns, device="cuda") * columns**-0.5
    return QuantTensor(*FP8_BLOCK.quantize(values, "e8m0"), FP8_BLOCK, (rows, columns))


@pytest.mark.parametrize("name", ["einsum", "sm90", "fp8_batched", "fp8_loop"])
def test_wo_a(name: str) -> None:
    """G = 8, K = 4096, N = 1024. The FP8 forms round activations: their error is that of rounding."""
    attended, weight = randn(4097, 64, DIM), fp8_weight(8192, 4096)
    positions = torch.randint(1 << 20, (4097,), device="cuda")
    frequencies, run = inverse_frequencies(ROPE, 1.6e5, None).cuda(), kept(chosen("wo_a", name))
    poison()
    whole = run(attended, weight, positions, frequencies)
    part = slice(1000, 1600)
    expected = BODIES.wo_a(attended[part], weight, positions[part], frequencies)
    near(whole[part], expected, 5e-2 if name.startswith("fp8") else 1.6e-2)
    for part in slices():
        poison()
        some = run(attended[part], weight, positions[part], frequencies)
        assert torch.equal(some, whole[part]), part


def sampling_rows(count: int, greedy: bool) -> SamplingRows:
    generator = torch.Generator().manual_seed(count)

    def choose(*values: float) -> Tensor:
        index = torch.randint(len(values), (count,), generator=generator)
        return torch.tensor(values)[index].cuda()

    return SamplingRows(
        temperature=choose(0.0) if greedy else choose(0.0, 1.0, 0.7, 2.0, 0.05),
        top_p=choose(1.0, 0.953, 0.497),
        top_k=choose(0, 0, 1, 50, 5000).long(),
        min_p=choose(0.0, 0.0, 0.05),
        uniform=torch.rand(count, generator=generator, dtype=torch.float64).cuda(),
    )


@pytest.mark.parametrize("scale", [1e-3, 1.0, 4.0])
def test_sampling(scale: float) -> None:
    """500 rows of the real vocabulary: the body's tokens, in one batch and alone."""
    for kind in ("plain", "tied", "barred"):
        logits = torch.randn(500, 129_280, device="cuda") * scale
        if kind == "tied":
            logits = (logits * 8 / scale).round() / 8 * scale
        elif kind == "barred":
            logits[torch.rand(logits.shape, device="cuda") < 0.9] = float("-inf")
        rows = sampling_rows(500, greedy=False)
        poison()
        got = chosen("sample")(logits, rows)
        assert torch.equal(got, BODIES.sample(logits, rows)), kind
        names = rows.__dataclass_fields__
        for i in (0, 64, 499):
            one = SamplingRows(*(getattr(rows, f)[i : i + 1] for f in names))
            assert torch.equal(chosen("sample")(logits[i : i + 1], one), got[i : i + 1])
    rows = sampling_rows(64, greedy=True)
    logits[3, 7], logits[4] = float("nan"), 1.0
    got = chosen("sample")(logits[:64], rows)
    assert torch.equal(got, BODIES.sample(logits[:64], rows))


def test_logprobs_and_adjustments() -> None:
    logits = torch.randn(70, 129_280, device="cuda")
    tokens = torch.randint(129_280, (70,), device="cuda")
    got, expected = (
        f(logits, tokens, 20) for f in (chosen("token_logprobs"), BODIES.token_logprobs)
    )
    near(got[0], expected[0], 1e-6)
    near(got[3], expected[3], 1e-6)
    assert (
        float((got[1] != expected[1]).float().mean()) < 0.05
    )  # ranks among last bits' differences
    assert float((got[2] != expected[2]).float().mean()) < 0.01
    pairs = torch.stack([torch.arange(70), torch.randint(129_280, (70,))]).cuda()
    factors, biases = torch.rand(70, device="cuda") + 0.5, torch.randn(70, device="cuda")
    allowed = torch.rand(129_280, device="cuda") < 0.99
    changes = Adjustments(pairs[0], pairs[1], factors, biases)
    poison()
    got = chosen("adjust_logits")(logits, changes, allowed)
    near(
        got.nan_to_num(neginf=0),
        BODIES.adjust_logits(logits, changes, allowed).nan_to_num(neginf=0),
        1e-6,
    )
    assert torch.equal(torch.isinf(got), ~allowed.expand(70, -1))
