"""Batches of 1 to 257 tokens, around every tile's edge, in the interpreter, at reduced widths; and every
portable kernel is met by some interpreted test."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fourfold.core.device import ARCHS
from fourfold.core.row_format import RowFormat, RowKind
from fourfold.core.rows import RowPages
from fourfold.core.tensor import QuantTensor
from fourfold.ops.compare import tensors
from fourfold.ops.mhc import Site, sinkhorn
from fourfold.ops.moe import routed_experts as experts_body
from fourfold.ops.rope import inverse_frequencies
from fourfold.ops.sampling import SamplingRows
from fourfold.quant.fp8_block import FP8_BLOCK
from fourfold.quant.mxfp4 import MXFP4
from tests.kernels import interpreter
from tests.kernels.cached import Cached, CachedKeys
from tests.kernels.given import kept
from tests.kernels.interpreter import assert_close, body, driver, interpreted, poisoned
from tests.kernels.launches import kernels_of
from tests.ops import test_compressor as folding

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.full

SIZES = (1, 16, 17, 64, 65, 129, 257)


@driver
@pytest.mark.slow
def test_in_the_interpreter() -> None:
    interpreter.run(__file__, "slow")


def stored(*shape: int, fp4: bool = False) -> QuantTensor:
    scheme = MXFP4 if fp4 else FP8_BLOCK
    codes, scale = scheme.quantize(torch.randn(shape) * shape[-1] ** -0.5, "e8m0")
    scheme.canonicalize(codes)
    return QuantTensor(codes, scale, scheme, shape)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("decoded", [False, True])
def test_linear(decoded: bool) -> None:
    from fourfold.kernels.triton.linear import linear

    x, plain = torch.randn(257, 300), torch.randn(72, 300)
    for weight in (stored(72, 300), plain.bfloat16(), plain):
        values = x if weight is plain else x.bfloat16()
        whole = linear(values, weight, decoded=decoded)
        assert_close(whole, body("linear")(values, weight), 1e-5 if weight is plain else 1.6e-2)
        for size in SIZES:
            with poisoned():
                got = linear(values[:size], weight, decoded=decoded)
            assert torch.equal(got, whole[:size]), size


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("fp4", [True, False])
def test_experts(fp4: bool) -> None:
    from fourfold.kernels.triton.moe import routed_experts

    made = [stored(*shape, fp4=fp4) for shape in ((4, 64, 128), (4, 128, 64), (4, 64, 128))]
    y, ids, weights = (
        torch.randn(257, 128).bfloat16(),
        torch.randint(4, (257, 2)),
        torch.rand(257, 2),
    )
    whole = routed_experts(y, ids, weights, *made, 2.0)
    assert_close(whole, experts_body(y, ids, weights, *made, 2.0), 1.6e-2)
    for size in SIZES:
        with poisoned():
            got = routed_experts(y[:size], ids[:size], weights[:size], *made, 2.0)
        assert torch.equal(got, whole[:size]), size


@interpreted
@pytest.mark.slow
def test_wo_a_and_norm() -> None:
    from fourfold.kernels.triton.grouped import einsum
    from fourfold.kernels.triton.norm import rms_norm

    attended, weight = torch.randn(257, 4, 64).bfloat16(), stored(2 * 40, 128)
    positions, frequencies = torch.arange(257) * 61, inverse_frequencies(32, 1e4, None)
    run, x, norm = kept(einsum), torch.randn(257, 200).bfloat16(), torch.rand(200).bfloat16()
    whole = run(attended, weight, positions, frequencies)
    assert_close(whole, body("wo_a")(attended, weight, positions, frequencies), 1.6e-2)
    normed = rms_norm(x, norm, 1e-6)
    assert_close(normed, body("rms_norm")(x, norm, 1e-6), 1.6e-2)
    for size in SIZES:
        with poisoned():
            got = run(attended[:size], weight, positions[:size], frequencies)
            alike = rms_norm(x[:size], norm, 1e-6)
        assert torch.equal(got, whole[:size]), size
        assert torch.equal(alike, normed[:size]), size


def check_sizes(
    run: Callable[..., Any],
    definition: Callable[..., Any],
    tolerance: float,
    *given: Any,
    sizes: Sequence[int] = SIZES,
    **constants: Any,
) -> None:
    """A kernel on all 257 tokens as the definition has it, and on the first few of them bit for bit as on
    all. Tensors in `given` have a row for each token."""
    with poisoned():
        whole = kept(run)(*given, **constants)
    assert_close(whole, kept(definition)(*given, **constants), tolerance)
    for size in sizes:
        part = [value[:size] for value in given]
        with poisoned():
            got = kept(run)(*part, **constants)
        for a, b in zip(tensors(got), tensors(whole), strict=True):
            assert torch.equal(a, b[:size]), size


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "ratio", "topk", "dtype"),
    [
        (RowKind.FP8_GROUPS, 4, 37, torch.bfloat16),
        (RowKind.PLAIN, 128, None, torch.float32),
        (RowKind.FP8_GROUPS, 0, None, torch.bfloat16),
    ],
)
def test_attention(kind: RowKind, ratio: int, topk: int | None, dtype: torch.dtype) -> None:
    """In the launch forms that it chooses itself for so many tokens."""
    from fourfold.kernels.triton.attention import sparse_attention

    cached = Cached.make(257, base=300, ratio=ratio, topk=topk, kind=kind, dtype=dtype)
    with poisoned():
        whole = sparse_attention(**cached.step([(300, 257)]))
        expected = body("sparse_attention")(**cached.step([(300, 257)]))
        assert_close(whole, expected, 2e-5 if dtype == torch.float32 else 1.6e-2)
        for size in SIZES:
            got = sparse_attention(**cached.step([(300, size)]))
            assert torch.equal(got, whole[:size]), size


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("kind", [RowKind.FP8_WHOLE, RowKind.PLAIN])
def test_indexer(kind: RowKind) -> None:
    from fourfold.kernels.triton.indexer import index_topk

    cached = CachedKeys.make(257, base=300, kind=kind, dtype=torch.bfloat16, topk=33)
    with poisoned():
        whole = index_topk(**cached.step([(300, 257)]))
        assert torch.equal(whole, body("index_topk")(**cached.step([(300, 257)])))
        for size in SIZES:
            assert torch.equal(index_topk(**cached.step([(300, size)])), whole[:size]), size


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(("ratio", "series"), [(4, 2), (128, 1)])
def test_compressor(ratio: int, series: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of 257 tokens, and cut in two behind every size."""
    from fourfold.kernels.triton import compressor

    data = folding.inputs(ratio, series, 257, 1)

    def rows_of(*counts: int) -> tuple[Tensor, Tensor]:
        folder = folding.Folder(ratio, series, data)
        for count in counts:
            with poisoned():
                folder.run(count, [(count - 1, 0)])
            folder.live = 0
        return torch.stack([folder.rows[j] for j in range(257 // ratio)]), folder.folds[0]

    expected = rows_of(257)
    monkeypatch.setattr(folding, "compress", compressor.compress)
    monkeypatch.setattr(folding, "store_folds", compressor.store_folds)
    whole = rows_of(257)
    assert_close(whole, expected, 2e-5)
    for size in SIZES[:-1]:
        assert all(map(torch.equal, rows_of(size, 257 - size), whole)), size


@interpreted
@pytest.mark.slow
def test_hyper_connections() -> None:
    from fourfold.kernels.triton import mhc

    count, dim = 4, 72
    z, streams = torch.randn(257, dim).bfloat16(), torch.randn(257, count, dim).bfloat16()
    post, comb = torch.rand(257, count) * 2, sinkhorn(torch.randn(257, count, count), 20, 1e-6)
    fn, base = torch.randn(24, count * dim) * 0.1, torch.randn(24)
    site = Site(fn, base, torch.ones(3), torch.rand(dim), 1e-6, 1e-6, 3)
    check_sizes(mhc.hc_pre, body("hc_pre"), 1.6e-2, streams, site=site)
    check_sizes(mhc.hc_post, body("hc_post"), 1.6e-2, z, streams, post, comb)

    def both(*given: Tensor) -> Any:
        return mhc.hc_post_pre(None, *given, site)

    def defined(*given: Tensor) -> Any:
        return body("hc_post_pre")(*given, site)

    check_sizes(both, defined, 1.6e-2, z, streams, post, comb)
    head = {"fn": fn[:4], "base": base[:4], "scale": torch.ones(1), "norm": torch.rand(dim)}
    head |= {"norm_eps": 1e-6, "hc_eps": 1e-6}
    check_sizes(mhc.hc_head, body("hc_head"), 1.6e-2, streams, **head)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("kind", list(RowKind), ids=str)
def test_rows(kind: RowKind) -> None:
    """Pages of 257 rows hold the rows of smaller ones, and a store to scattered slots what was encoded."""
    from fourfold.kernels.triton import rows

    format = RowFormat(kind, 96, 16)
    x, weight = torch.randn(257, 96).bfloat16() * 20, torch.rand(96).bfloat16()
    positions, frequencies = torch.arange(257) * 61, inverse_frequencies(16, 1e4, None)
    slots = torch.randperm(300)[:257]

    def parts(pages: RowPages) -> list[Tensor]:
        made = [pages.data()[0], *([pages.scales()[0]] if format.scale_bytes else [])]
        return [each.contiguous().view(torch.uint8) for each in made]

    def encoded(size: int, run: Callable[..., RowPages], plain: Callable[..., RowPages]) -> Any:
        with poisoned():
            own = run(x[:size], weight, positions[:size], frequencies, 1e-6, format)
            unturned = plain(x[:size], format)
            return parts(own), parts(unturned), own, unturned.storage

    whole = encoded(257, rows.norm_rope_rows, rows.encode_rows)
    expected = encoded(257, body("norm_rope_rows"), body("encode_rows"))
    differing = [float((a != b).float().mean()) for a, b in zip(whole[0], expected[0], strict=True)]
    assert max(differing) < 0.02  # a code on a rounding tie
    assert all(map(torch.equal, whole[1], expected[1]))
    for size in SIZES:
        got = encoded(size, rows.norm_rope_rows, rows.encode_rows)
        assert torch.equal(got[3], body("encode_rows")(x[:size], format).storage), size
        for some, every in ((got[0], whole[0]), (got[1], whole[1])):
            assert all(torch.equal(a, b[:size]) for a, b in zip(some, every, strict=True)), size
        stores = []
        for store in (rows.store_rows, body("store_rows")):
            pages = RowPages.zeros(format, 6, 50, torch.device("cpu"))
            store(pages, got[2], slots[:size])
            stores.append(pages.storage)
        assert torch.equal(*stores), size


@interpreted
@pytest.mark.slow
def test_rotary() -> None:
    from fourfold.kernels.triton import norm, rope

    q, positions = torch.randn(257, 3, 40).bfloat16() * 7, torch.arange(257) * 997
    frequencies = {"inv_freq": inverse_frequencies(16, 1e4, None)}
    for run, name, rest in (
        (norm.query_norm_rope, "query_norm_rope", {"eps": 1e-6}),
        (rope.KERNELS[0].run, "rotate", {"inverse": True}),
    ):
        check_sizes(run, body(name), 1.6e-2, q, positions, **frequencies, **rest)


@interpreted
@pytest.mark.slow
def test_routing_and_checks() -> None:
    from fourfold.kernels.triton import checks, embed, routing

    logits, bias = torch.randn(257, 40) * 4, torch.randn(40)
    names, table = torch.randint(90, (257,)), torch.randint(40, (90, 3))
    check_sizes(
        routing.route_topk, body("route_topk"), 1e-5, logits, bias=bias, topk=6, scaling=2.5
    )
    check_sizes(
        routing.route_hash, body("route_hash"), 1e-5, logits, names, table=table, scaling=2.5
    )
    weight = torch.randn(70, 24).bfloat16()
    check_sizes(embed.embed, body("embed"), 0.0, names, weight=weight, first_token=10)
    streams, owners = torch.randn(257, 4, 24), torch.arange(257)
    streams[[5, 64, 128, 256], 3, 7] = torch.tensor([float("nan"), float("inf")] * 2)
    for size in SIZES:
        found = checks.nonfinite_sequences(streams[:size], owners[:size], size)
        assert found.nonzero().flatten().tolist() == [n for n in (5, 64, 128, 256) if n < size]


@interpreted
@pytest.mark.slow
def test_sampling() -> None:
    from fourfold.kernels.triton import sampling

    logits = torch.randn(257, 70) * 3
    drafts = torch.randint(3, (257, 2))
    sampled = torch.cat([drafts, drafts[:, :1]], dim=1) * (torch.rand(257, 3) < 0.8)
    seeds, positions = torch.randint(1 << 60, (257,)), torch.arange(257) * 61
    rows = SamplingRows(
        torch.tensor([0.0, 0.7, 1.0])[torch.arange(257) % 3],
        torch.tensor([1.0, 0.9])[torch.arange(257) % 2],
        torch.arange(257) % 5,
        torch.tensor([0.0, 0.05, 0.0, 0.1])[torch.arange(257) % 4],
        torch.rand(257).double(),
    )
    small = partial(sampling.sample, block=32)

    def some(run: Callable[..., Tensor], *given: Tensor) -> Tensor:
        return run(given[0], SamplingRows(*given[1:]))

    columns = [getattr(rows, each.name) for each in fields(rows)]
    check_sizes(
        partial(some, small), partial(some, body("sample")), 0.0, logits, *columns, sizes=(17, 65)
    )
    check_sizes(sampling.count_accepted, body("count_accepted"), 0.0, sampled, drafts)
    check_sizes(sampling.uniform, body("uniform"), 0.0, seeds, positions)
    check_sizes(sampling.likeliest, body("likeliest"), 0.0, logits, allowed=None)
    tokens = torch.randint(70, (257,))
    check_sizes(sampling.token_logprobs, body("token_logprobs"), 1e-6, logits, tokens, count=3)
    allowed = torch.rand(257, 70) < 0.5

    def masked(run: Callable[..., Tensor], *given: Tensor) -> Tensor:
        return run(given[0], None, given[1])

    check_sizes(
        partial(masked, sampling.adjust_logits),
        partial(masked, body("adjust_logits")),
        0.0,
        logits,
        allowed,
    )


@driver
def test_every_portable_kernels_file_is_interpreted() -> None:
    """The files that hold kernels for every GPU, each by a test that runs it in the interpreter."""
    wanted = {k.run for k in kernels_of(ARCHS["sm_80"])}
    modules = {getattr(run, "func", run).__module__ for run in wanted}
    portable = {m for m in modules if m.startswith("fourfold.kernels.triton.")}
    here = Path(__file__).parent
    texts = [
        file.read_text("utf-8")
        for file in here.glob("test_*.py")
        if file.name != Path(__file__).name
    ]
    interpreting = "\n".join(text for text in texts if "interpreter.run(__file__" in text)
    missing = []
    for module in portable:
        name = module.rpartition(".")[2]
        named = rf'kernels\.triton(\.{name}\b| import [^\n]*\b{name}\b)|"{name}"'
        missing += [] if re.search(named, interpreting) else [name]
    assert len(portable) > 10
    assert not missing
