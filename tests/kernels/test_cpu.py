"""Kernels of a CPU against the definitions of their ops, and what plans make of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fourfold import kernels
from fourfold.core.batch import ScheduledBatch, ScheduledSequence, lower
from fourfold.core.config import EngineConfig
from fourfold.core.device import detect
from fourfold.core.parameters import Role, parameters
from fourfold.core.request import Request, SamplingParams
from fourfold.core.row_format import RowFormat, RowKind
from fourfold.core.tensor import QuantScheme, QuantTensor
from fourfold.engine import threads
from fourfold.engine.compile import released
from fourfold.engine.engine import Engine
from fourfold.engine.explain import explain_model, model_of_geometry
from fourfold.engine.explain_text import text
from fourfold.engine.kernel_plan import plan_kernels, prepared_by
from fourfold.engine.loading import LoadedModel, load_model
from fourfold.engine.oneshot import one_shot
from fourfold.engine.selftest.kernels import check_kernel
from fourfold.engine.verdicts import Verdicts
from fourfold.kernels.cpu import attention, compressor, indexer, rounding, rows, weights
from fourfold.ops.attention import sparse_attention
from fourfold.ops.compressor import compress
from fourfold.ops.indexer import index_topk
from fourfold.ops.quantize import dequantize_fp8_groups, quantize_fp8_groups
from fourfold.ops.registry import Kernel
from fourfold.ops.rows import encode_rows, read_rows
from fourfold.quant.fp8_block import FP8_BLOCK
from fourfold.quant.mxfp4 import MXFP4
from fourfold.weights.locate import locate
from fourfold.weights.synthetic import write_model
from tests.kernels.cached import PADDING, Cached, CachedKeys
from train.geometry import model_config, nano_config

pytestmark = pytest.mark.full

CPU = detect("cpu")
OURS = kernels.load(CPU)
OF_WEIGHTS = {"linear", "linears", "wo_a", "routed_experts"}


@pytest.mark.parametrize("kernel", OURS, ids=lambda k: f"{k.op}={k.name}")
def test_equals_the_body_on_the_ops_cases(kernel: Kernel) -> None:
    """Both dtypes; weights as they are stored and as the kernel has them stored."""
    assert check_kernel(kernel, CPU.torch_device) is None


def test_rounding_is_the_definitions() -> None:
    """Every power of two, numbers between codes and beyond them, groups that are not whole."""
    patterns = torch.arange(0, 0x7F800000, 65521, dtype=torch.int32).view(torch.float32)
    patterns = torch.cat([patterns, -patterns])
    alike = patterns[: patterns.numel() // 128 * 128].view(-1, 128)
    mixed = alike[:, torch.randperm(128)].T.reshape(-1, 128)
    # The largest number of a scale, and what the next scale would lose.
    edges = torch.cat([torch.tensor([448.0]), torch.arange(127) * 2.0**-9])
    cases = [alike, mixed, edges * torch.logspace(-12, 12, 25, 2).view(-1, 1)]
    for size in (64, 128, 200, 384):
        x = torch.randn(6, size) * torch.tensor([1, 1e30, 1e-3, 1e-7, 0, 448.0]).view(-1, 1)
        x[0, 3], x[1, 5], x[2, 7], x[3, :2] = torch.inf, torch.nan, -torch.inf, torch.nan
        cases += [x, x.to(torch.bfloat16)]
    for x in cases:
        codes, exponent = quantize_fp8_groups(x, 128)
        expected = dequantize_fp8_groups(codes, exponent, 128, torch.float32)
        assert torch.equal(rounding.round_groups(x, 128), expected)


@pytest.mark.parametrize("kind", RowKind)
def test_rows_have_the_same_bytes_and_numbers(kind: RowKind) -> None:
    format = RowFormat(kind, 128, 32)
    x = torch.randn(70, 128) * torch.logspace(-9, 9, 70).view(-1, 1)
    x[1, :64], x[2, 0], x[3, 90] = -1e-12, torch.nan, torch.inf  # zero, with a sign before rounding
    x[4], x[5] = -0.0, 448.0
    x = x.to(torch.bfloat16)
    ours, theirs = rows.encode_rows(x, format), encode_rows.body(x, format)
    assert torch.equal(ours.storage.view(torch.uint8), theirs.storage.view(torch.uint8))
    slots = torch.tensor([5, -1, 0, 69, 5])
    expected = read_rows(theirs, slots, torch.float32)
    assert torch.equal(rows.read_rows(theirs, slots).nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("lengths", [(1, 1, 1), (3, 1, 8), (8, 5, 7), (2, 9, 1)], ids=str)
def test_folds_are_the_definitions_bit_for_bit(ratio: int, lengths: tuple[int, ...]) -> None:
    """Runs that begin, end and cross a window anywhere."""
    series, width = (2, 24) if ratio == 4 else (1, 40)
    for offset in range(-4, 4):
        computed = [0, ratio + offset, 2 * ratio - 1]
        batch = lower(
            ScheduledBatch(
                tuple(
                    ScheduledSequence(
                        [0] * n,
                        c,
                        block_ids=[2 * i, 2 * i + 1],
                        fold_source=i if c else -1,
                        fold_keeps=[(k, 8 * i + k) for k in range(n)],
                    )
                    for i, (n, c) in enumerate(zip(lengths, computed, strict=True))
                )
            ),
            (ratio,),
            8,
            CPU.torch_device,
        )
        folds = torch.randn(4, series, 3, width)
        folds[:, :, 1] = folds[:, :, 1].abs() + 1
        arguments = (
            torch.randn(sum(lengths), series * width),
            torch.randn(sum(lengths), series * width),
            torch.randn(ratio, series * width),
            folds,
            batch,
            batch.emissions[ratio],
            ratio,
            torch.float32,
        )
        got, expected = compressor.compress(*arguments), compress.body(*arguments)
        completed = batch.emissions[ratio].slots >= 0
        assert torch.equal(got[0][completed], expected[0][completed])
        assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("kind", [RowKind.PLAIN, RowKind.FP8_WHOLE])
@pytest.mark.parametrize("alike", [False, True])
def test_listed_rows_are_the_definitions(kind: RowKind, alike: bool) -> None:
    """Fewer rows than are listed, as many, more; scores that are equal, NaN or infinite."""
    cached = CachedKeys.make(200, base=10, topk=16, kind=kind)
    if alike:
        cached.weights[::2] = 0.0
        cached.weights[1::4], cached.weights[3::8, 0] = torch.nan, -torch.inf
    for runs in ([(10, 200)], [(73, 1)], [(74, 1), PADDING, (60, 30), (209, 1)]):
        step = cached.step(runs)
        assert torch.equal(indexer.index_topk(**step), index_topk.body(**step))


@pytest.mark.parametrize(
    ("ratio", "topk", "kind"),
    [
        (0, None, RowKind.FP8_GROUPS),
        (4, 6, RowKind.FP8_GROUPS),
        (4, None, RowKind.PLAIN),
        (128, None, RowKind.FP8_GROUPS),
    ],
)
def test_attention_is_the_definitions(ratio: int, topk: int | None, kind: RowKind) -> None:
    """Few tokens and tiles, from anywhere; what is not seen holds NaN."""
    for base in (0, 7, 301):
        cached = Cached.make(300, base=base, ratio=ratio, topk=topk, kind=kind, window=24)
        many = [[(base, 300)], [(base, 150)], [(base + 150, 150)], [(base + 20, 1), (base, 129)]]
        few = [[(base, 1)], [(base, 30)], [(base + 299, 1), (base, 3), (base + 100, 20)]]
        for runs in (*many, *few):
            step = cached.step(runs)
            expected, got = sparse_attention.body(**step), attention.sparse_attention(**step)
            assert float((got - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("scheme", "scales"), [(MXFP4, "e8m0"), (FP8_BLOCK, "e8m0"), (FP8_BLOCK, "f32")]
)
def test_numbers_are_those_of_the_codes(scheme: QuantScheme, scales: str) -> None:
    codes, scale = scheme.quantize(torch.randn(3, 200, 160), scales)
    if scales == "f32":
        scale *= 1.1
    stored = QuantTensor(codes, scale, scheme, (3, 200, 160), quantize_activations=scales == "f32")
    made = weights.as_numbers(stored)
    assert isinstance(made, QuantTensor)
    assert (made.shape, made.quantize_activations) == (stored.shape, stored.quantize_activations)
    assert made.nbytes == 4 * 3 * 200 * 160
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(made.dequantize(dtype), stored.dequantize(dtype))
        assert torch.equal(made[1].dequantize(dtype), stored[1].dequantize(dtype))
    assert made.dequantize(torch.float32).data_ptr() == made.codes.data_ptr()
    assert weights.as_numbers(made) is made
    plain = torch.randn(4, 8).bfloat16()
    wide = weights.as_numbers(plain)
    assert isinstance(wide, Tensor)
    assert torch.equal(wide, plain.float())


def chosen(config: Any, dtype: torch.dtype = torch.bfloat16, **forced: str) -> dict[str, str]:
    plan, _ = plan_kernels(config, dtype, CPU, forced, verdicts=Verdicts())
    return {choice.op: choice.kernel for choice in plan.choices}


def test_small_models_get_all_kernels_and_large_ones_no_numbers() -> None:
    nano = chosen(model_config(nano_config()))
    assert {op for op, kernel in nano.items() if kernel == "cpu"} == {k.op for k in OURS}
    assert set(chosen(model_config(nano_config()), torch.float64).values()) == {"body"}
    for geometry in ("flash", "pro"):
        told = explain_model(model_of_geometry(geometry), CPU, EngineConfig("m"))
        found = {each["op"]: each for each in told["kernels"]}
        assert {op for op, each in found.items() if each["kernel"] == "cpu"} == {
            k.op for k in OURS
        } - OF_WEIGHTS
        for op in OF_WEIGHTS:
            (why,) = found[op]["rejected"]
            assert "GiB, the limit is 4" in why["reason"]
        assert "the limit is 4" in text(told)
        assert "numbers, made once" not in text(told)


def test_what_is_kept_is_told() -> None:
    told = explain_model(model_of_geometry("tiny"), CPU, EngineConfig("m"))
    formats = {each["op"]: each["format"] for each in told["buffers"]["weights"]}
    assert formats["routed_experts"].startswith("float32 numbers, made once of FP4")
    assert formats["wo_a"].startswith("float32 numbers, made once of FP8")
    forced = EngineConfig("m", kernels={"routed_experts": "body"})
    told = explain_model(model_of_geometry("tiny"), CPU, forced)
    formats = {each["op"]: each["format"] for each in told["buffers"]["weights"]}
    assert formats["routed_experts"].startswith("FP4")
    assert formats["wo_a"].startswith("float32 numbers")


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cpu") / "nano"
    write_model(folder, nano_config(), "native", seed=3)
    return folder


BODIES = dict.fromkeys((k.op for k in OURS), "body")


def loaded(folder: Path, **changes: Any) -> LoadedModel:
    config = EngineConfig(str(folder), max_num_seqs=4, max_model_len=2048, **changes)
    return load_model(locate(str(folder)), config, CPU)


def test_weights_are_numbers_where_their_kernel_wants_them(nano: Path) -> None:
    for forced, plain in (({}, ()), ({"wo_a": "body"}, ("wo_a",))):
        model = loaded(nano, kernels=forced)
        for spec in parameters(model.config):
            weight, op = model.weights[spec.name], prepared_by(spec.role)
            if op is not None and isinstance(weight, QuantTensor):
                assert (weight.scheme.name == "numbers") is (op not in plain), spec.name
            elif op is not None:
                assert isinstance(weight, Tensor)
                assert weight.dtype == torch.float32, spec.name
        quantised = [w for w in model.weights.values() if isinstance(w, QuantTensor)]
        assert len(quantised) > 60
        assert model.weight_bytes == sum(w.nbytes for w in model.weights.values())
        assert prepared_by(Role.EMBED) is None


def logits(folder: Path, forced: dict[str, str]) -> Tensor:
    """In float32, of two prompts in one pass."""
    tokens = [[(7 * i + 31 * n) % 192 for i in range(n)] for n in (400, 33)]
    model = loaded(folder, dtype="float32", kernels=forced).model
    with torch.inference_mode():
        return one_shot(model, tokens).logits


def test_the_built_in_geometry_gives_the_definitions_bits(nano: Path) -> None:
    """All but attention, which adds fewer rows, and so in another order."""
    exact = {"sparse_attention": "body"}
    assert torch.equal(logits(nano, exact), logits(nano, BODIES))


def test_attention_moves_logits_by_rounding_alone(tmp_path: Path) -> None:
    """Without FP8 inputs, where a number that falls to the next code moves all behind it."""
    folder = tmp_path / "plain"
    write_model(folder, nano_config(), "float32", seed=3)
    ours, theirs = logits(folder, {}), logits(folder, BODIES)
    assert float((ours - theirs).abs().median()) < 1e-5 * float(theirs.abs().max())
    assert float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()) > 0.99


class Calls(TorchDispatchMode):
    """Counts torch operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def answer(engine: Engine, prompt: Sequence[int], steps: int) -> tuple[list[int], int]:
    """Tokens, and torch operations of the last step."""
    params = SamplingParams(max_tokens=steps, temperature=0.0, ignore_eos=True)
    engine.add(Request(str(len(prompt)), tuple(prompt), params))
    got: list[int] = []
    calls = Calls()
    while engine.has_work:
        calls = Calls()
        with calls:
            for output in engine.step():
                got += output.new_token_ids
    return got, calls.count


def test_a_decode_step_of_the_built_in_geometry_is_few_operations(nano: Path) -> None:
    """What a step costs on a CPU is mostly what its operations cost to start: 7,000 of them, views among
    them, and 13,000 by the definitions."""
    prompt = [random.randrange(1200) for _ in range(600)]
    config = EngineConfig(str(nano), max_num_seqs=2, max_model_len=2048)
    engine = Engine(loaded(nano), config)
    tokens, count = answer(engine, prompt, 4)
    assert len(tokens) == 4
    assert count < 8000, f"{count} operations in a decode step"


def test_small_models_run_on_one_thread_and_leave_the_count_alone(nano: Path) -> None:
    seen: list[int] = []
    model = loaded(nano)
    config = EngineConfig(str(nano), max_num_seqs=2, max_model_len=2048)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        engine = Engine(model, config, on_step=lambda step: seen.append(torch.get_num_threads()))
        answer(engine, [5] * 20, 2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}
    assert any("one CPU thread" in each for each in engine.notes)
    large = replace(model, weight_bytes=threads.SMALL_MODEL + 1)
    assert not Engine(large, config).notes
    assert threads.step_threads(torch.device("cuda"), 1000) is None
    with threads.running_on(None):
        assert torch.get_num_threads() == before


def test_the_released_geometries_are_above_the_limit_by_far() -> None:
    config, _ = released("flash")
    (linear,) = (k for k in OURS if k.op == "linear")
    why: Tensor | str | None = linear.supports(config)
    assert isinstance(why, str)
    assert float(why.split("take ")[1].split()[0]) > 8
