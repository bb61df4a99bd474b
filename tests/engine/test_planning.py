"""`plan` against what is loaded, allocated, cut and published: the same figures by other ways."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fourfold.core.config import CacheConfig, EngineConfig
from fourfold.core.device import ARCHS, detect
from fourfold.core.errors import ConfigError
from fourfold.core.gpus import GIB, GPUS, parse_gpus
from fourfold.core.parameters import parameters
from fourfold.core.request import MAX_STOP_TOKENS
from fourfold.core.tensor import QuantTensor
from fourfold.dist.shard import shard
from fourfold.engine.engine import Engine
from fourfold.engine.loading import load_model
from fourfold.engine.planning import (
    RUNTIME_BYTES,
    Cost,
    Plan,
    Subject,
    command,
    fewest,
    plan,
    rank_model,
    stored_bytes,
    subject_of_checkpoint,
    subject_of_geometry,
    weight_bytes,
)
from fourfold.quant.schemes import SCHEMES
from fourfold.weights.layout import FORMATS
from fourfold.weights.locate import ModelLocation, locate
from fourfold.weights.random_weights import random_parameters
from fourfold.weights.synthetic import write_checkpoint

pytestmark = pytest.mark.full

MODELS = ("flash", "flash-base", "pro")
# Published: bytes of all tensors, less the copies that the Base carries and nobody loads.
PUBLISHED = {
    "flash": 159_609_485_896,
    "flash-base": 294_673_469_000 - 2 * 1_059_061_760,
    "pro": 864_704_792_696,
}
# Bytes of 256 tokens over all layers, from the field's row formats.
PAGE = {"flash": 998_208, "flash-base": 998_208, "pro": 1_430_208}
MACHINES = (
    ("8xMI300X", 8, 191.98),
    ("8xMI308", 8, 191.98),
    ("8xMI355X", 8, 287.98),
    ("1xH200", 1, 139.8),
    ("2xH200", 2, 139.8),
    ("4xH200", 4, 139.8),
    ("8xH200", 8, 139.8),
)


@pytest.fixture(scope="module")
def planned() -> Callable[..., Plan]:
    """Plans of released models by name; what they share is worked out once."""
    subjects = {name: subject_of_geometry(name) for name in MODELS}
    known: dict[str, dict[tuple[int, int], Cost]] = {name: {} for name in MODELS}

    def make(name: str, gpus: str, **changes: object) -> Plan:
        return plan(subjects[name], *parse_gpus(gpus), wanted(**changes), known[name])

    return make


def wanted(**changes: object) -> EngineConfig:
    settings = {"max_model_len": 32_768, "max_num_seqs": 32, **changes}
    return EngineConfig("m", **settings)


def by_hand(name: str, tp: int, ep: int) -> int:
    """Bytes a rank, from the dimensions of the released models alone."""
    pro = name == "pro"
    layers, d, h, q, g = (61, 7168, 128, 1536, 16) if pro else (43, 4096, 64, 1024, 8)
    e, i, v = (384, 3072, 129280) if pro else (256, 2048, 129280)
    wide = 4 if name == "flash-base" else 1  # bytes of an FP8 scale

    def fp8(rows: int, columns: int) -> int:
        return rows * columns + wide * math.ceil(rows / 128) * math.ceil(columns / 128)

    def fp4(rows: int, columns: int) -> int:
        return rows * columns // 2 + rows * columns // 32

    ratios = [128, 128] if pro else [0, 0]
    ratios += [4, 128] * ((layers - 3) // 2) + [4]
    expert = 3 * (fp8(i, d) if wide == 4 else fp4(i, d))
    total = 2 * v * d * 2 // tp + 2 * d + 4 * (4 * 4 * d + 4 + 1)
    for number, ratio in enumerate([*ratios, None]):  # None: the MTP layer
        total += 2 * 2 * d + 2 * 4 * (24 * 4 * d + 24 + 3)  # norms, hyper-connections
        total += 4 * h // tp + fp8(q, d) + 2 * q + fp8(512, d) + 2 * 512
        total += (fp8(h * 512, q) + fp8(g * 1024, h * 512 // g) + fp8(d, g * 1024)) // tp
        total += (3 * fp8(i, d)) // tp + e // ep * expert // (1 if ep > 1 else tp)
        total += 2 * e * d + (8 * v * 6 if number < 3 else 4 * e)
        if ratio:
            c = 2 if ratio == 4 else 1
            total += 4 * ratio * c * 512 + 2 * 2 * c * 512 * d + 2 * 512
        if ratio == 4:
            total += fp8(8192, q) + 2 * 64 * d + 4 * 4 * 256 + 2 * 2 * 256 * d + 2 * 128
        if ratio is None:
            total += 2 * fp8(d, d) + 3 * 2 * d + 4 * (4 * 4 * d + 4 + 1)
    return total


# ---- weights


@pytest.mark.parametrize("name", MODELS)
def test_weights_have_the_published_bytes(name: str) -> None:
    found = weight_bytes(subject_of_geometry(name))
    assert sum(found.values()) == PUBLISHED[name] == by_hand(name, 1, 1)
    assert found["routed experts"] > 0.9 * PUBLISHED[name]


@pytest.mark.parametrize("weights", FORMATS)
def test_weights_are_what_is_loaded(weights: str) -> None:
    """To the byte, in every storage format and model dtype."""
    for dtype in ("bfloat16", "float32"):
        subject = subject_of_geometry("tiny", weights=weights, dtype=dtype)
        made = random_parameters(
            subject.model, FORMATS[weights], torch.device("cpu"), getattr(torch, dtype)
        )
        specs = {spec.name: spec for spec in parameters(subject.model)}
        for parameter, weight in made.items():
            assert stored_bytes(subject, specs[parameter]) == weight.nbytes, parameter
        assert sum(weight_bytes(subject).values()) == sum(w.nbytes for w in made.values())


def on_meta(subject: Subject) -> dict[str, QuantTensor | torch.Tensor]:
    """All weights without memory."""
    made = {}
    for spec in parameters(subject.model):
        decision = subject.resolution.of(spec)
        if decision is None or decision.scheme == "plain":
            count = stored_bytes(subject, spec) // spec.numel
            kind = {2: torch.bfloat16, 4: torch.float32, 8: torch.int64}[count]
            made[spec.name] = torch.empty(spec.shape, dtype=kind, device="meta")
            continue
        scheme = SCHEMES[decision.scheme]
        kind = torch.float32 if decision.scale_format == "f32" else torch.uint8
        codes = torch.empty(scheme.codes_shape(spec.shape), dtype=torch.uint8, device="meta")
        scale = torch.empty(scheme.scale_shape(spec.shape), dtype=kind, device="meta")
        made[spec.name] = QuantTensor(codes, scale, scheme, spec.shape)
    return made


@pytest.mark.parametrize("name", MODELS)
def test_a_rank_holds_what_is_cut_for_it(name: str) -> None:
    """Against the function that cuts weights, for the first six layers, and by hand for all."""
    subject = subject_of_geometry(name, layers=6)
    made = on_meta(subject)
    for tp, ep in ((2, 1), (4, 4), (8, 1), (8, 8)):
        parts = [
            shard(spec, made[spec.name], tp - 1, tp, ep - 1, ep).nbytes
            for spec in parameters(subject.model)
        ]
        assert sum(weight_bytes(subject, tp, ep).values()) == sum(parts)
        whole = subject_of_geometry(name)
        assert sum(weight_bytes(whole, tp, ep).values()) == by_hand(name, tp, ep), (tp, ep)


def test_a_rank_computes_with_its_share() -> None:
    model = subject_of_geometry("pro").model
    for ep, inner in ((1, 768), (4, 3072)):
        rank = rank_model(model, 4, ep)
        assert (rank.num_attention_heads, rank.o_groups) == (32, 4)
        assert (rank.moe_intermediate_size, rank.index_n_heads) == (inner, 64)


# ---- an engine


@pytest.mark.parametrize("weights", ["native", "fp8"])
def test_an_engine_allocates_what_was_planned(tmp_path: Path, weights: str) -> None:
    """Weights, workspace, images, slots and pages of a running engine, from headers alone."""
    write_checkpoint(tmp_path / "c", "tiny", weights=weights)
    cache = CacheConfig(device_image_bytes=1 << 20)
    # A plan is for GPUs, where weights stay as they are stored.
    stored = dict.fromkeys(("linear", "wo_a", "routed_experts"), "body")
    config = EngineConfig(
        str(tmp_path / "c"), max_num_seqs=3, num_speculative_tokens=2, cache=cache, kernels=stored
    )
    location = locate(config.model)
    subject, source = subject_of_checkpoint(location, "c")
    assert source == "headers"
    engine = Engine(load_model(location, config, detect("cpu")), config)
    (split,) = plan(subject, 1, parse_gpus("8GiB")[1], config).splits
    assert split.capacity == engine.capacity
    assert split.weight_bytes == engine.loaded.weight_bytes


# ---- answers


def step(tokens: int, seqs: int, context: int, sizes: tuple[int, ...], head: bool = True) -> int:
    """Bytes alive at once with `seqs` rows of logits, in bfloat16."""
    d, h, inner, g, q, topk, e = sizes
    heads = 2 * (d + h * 512)
    logits = 129280 * 4 * seqs
    parts = [
        tokens * (heads + 2 * (q + 512) + 16 * 640 + 4 * 8192 + 8 * topk)
        + min(tokens * context, 256 << 20),
        tokens * (heads + 8 * topk)
        + max(
            min(1024 * min(64 * tokens, seqs * context // 4), 512 << 20),
            min(4 * min(tokens, 32) * (4 + context // 8192) * h * 512, 128 << 20),
        ),
        tokens * (heads + 2048 * g) + 2048 * h * 512,
        tokens * (4 * d + 6 * (4 * d + inner * 33 // 32) + 4 * (d + e)),
        tokens * 16 * d,
    ]
    parts += [2 * logits + 4 * 129280 * 4 * min(seqs, 64)] if head else []
    return tokens * 8 * d + max(parts)


def expected(name: str, tp: int, ep: int, memory: float, seqs: int, context: int) -> int | None:
    """Pages beside everything else, for `seqs` requests of `context`; None if not even one fits."""
    pro = name == "pro"
    room = int(int(memory * GIB) * 0.9) - RUNTIME_BYTES - by_hand(name, tp, ep) - (1 << 30)
    d, h, inner, g, q = (7168, 128, 3072, 16, 1536) if pro else (4096, 64, 2048, 8, 1024)
    inner, topk = inner // (1 if ep > 1 else tp), 1024 if pro else 512
    h, g, e = h // tp, g // tp, 384 if pro else 256
    room -= int(1.2 * step(8192, seqs, context, (d, h, inner, g, q, topk, e)))
    sizes = sum(
        size
        for size in (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
        if size <= seqs
    )
    rows = 129280 * 4 * seqs
    few = step(seqs, seqs, context, (d, h, inner, g, q, topk, e), head=False) - 8 * d * seqs
    room -= rows + sizes * 8 * d + max(few, rows, 4 * 129280 * 4 * min(seqs, 64))
    layers, csa, hca = (62, 30, 31) if pro else (44, 21, 20)
    ring = math.ceil(128 * 584 / 576) * 576
    folds = 3 * 4 * (csa * 2 * (512 + 128) + hca * 512)
    table = 8 * (1 + 5 + 1 + MAX_STOP_TOKENS + context // 256) + 13
    room -= seqs * (layers * ring + folds + 4 * d * 2 + table)
    pages = min(room // PAGE[name], seqs * context // 256)
    return None if pages < context // 256 else pages


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("text", "count", "memory"), MACHINES)
@pytest.mark.parametrize(("seqs", "context"), [(32, 32_768), (256, 131_072)])
def test_answers_equal_independent_arithmetic(
    planned: Callable[..., Plan],
    name: str,
    text: str,
    count: int,
    memory: float,
    seqs: int,
    context: int,
) -> None:
    """Every way to split, to the page."""
    found = planned(name, text, max_num_seqs=seqs, max_model_len=context)
    ways = [(split.tp, split.ep) for split in found.splits]
    assert ways == [(n, e) for n in (1, 2, 4, 8) if n <= count for e in sorted({1, n})]
    most = 0
    for split in found.splits:
        assert split.faults == ()
        assert split.replicas == count // split.tp
        assert split.weight_bytes == by_hand(name, split.tp, split.ep)
        pages = expected(name, split.tp, split.ep, memory, seqs, context)
        assert pages == (split.capacity.num_pages if split.capacity else None), split
        assert found.fits(split) == (pages == seqs * context // 256)
        assert (split.problem is None) == (pages is not None)
        most = max(most, split.replicas * seqs if found.fits(split) else 0)
    assert most == (found.best.requests(context) if found.best else 0)


def test_the_known_answers(planned: Callable[..., Plan]) -> None:
    """What people ask first."""

    def best(name: str, gpus: str) -> tuple[int, bool] | None:
        split = planned(name, gpus).best
        return None if split is None else (split.tp, split.served)

    assert best("flash", "1xH200") is None
    assert best("flash", "2xH200") == (2, False)
    assert best("flash", "1xMI300X") == (1, True)
    assert best("flash", "8xMI300X") == (1, True)  # eight engines of one GPU run the most requests
    assert best("flash-base", "1xMI355X") is None
    assert best("flash-base", "4xH200")[0] == 4
    assert best("pro", "8xH200") == (8, False)
    assert best("pro", "8xMI300X") == (8, False)
    assert best("pro", "4xMI355X") == (4, False)
    assert best("pro", "4xH200") is None


# ---- what does not divide, and what is asked wrongly


def test_what_does_not_divide_is_named(planned: Callable[..., Plan]) -> None:
    splits = planned("pro", "16xH200").splits
    last = next(split for split in splits if split.tp == 16)
    assert any("3,072-wide" in fault and "192" in fault and "128" in fault for fault in last.faults)
    assert last.capacity is None
    base = planned("flash-base", "16xH200").splits
    (text,) = [f for f in base[-2].faults if "o_groups" in f]
    assert text == "o_groups 8 does not divide over 16 tensor-parallel ranks"
    three = planned("flash", "3xMI300X").splits
    assert {s.tp for s in three} == {1, 3}
    faults = " ".join(three[-1].faults)
    for word in ("num_attention_heads 64", "o_groups 8", "vocab_size", "n_routed_experts 256"):
        assert word in faults


def test_a_command_says_what_was_planned(planned: Callable[..., Plan]) -> None:
    found = planned("pro", "8xH200", num_speculative_tokens=2)
    split = next(s for s in found.splits if (s.tp, s.ep) == (8, 8))
    text = command(found, split)
    assert text == (
        "fourfold serve pro --tensor-parallel-size 8 --enable-expert-parallel --max-model-len "
        "32768 --max-num-seqs 32 --method mtp --num-speculative-tokens 2"
    )


def test_the_fewest_of_every_gpu() -> None:
    found = {gpu.name: each for gpu, each in fewest(subject_of_geometry("flash"), wanted())}
    assert set(found) == {gpu.name for gpu in GPUS.values()}
    counts = {name: each.count for name, each in found.items() if isinstance(each, Plan)}
    assert counts["MI300X"] == counts["MI355X"] == counts["B200"] == 1
    assert (counts["H200"], counts["H100"], counts["A100"]) == (2, 4, 4)
    assert found["L4"] is None


@pytest.mark.parametrize(
    "text", ["", "x8", "0xH200", "8xH300", "8", "8 x", "9999xH200", "8xH200x2"]
)
def test_gpus_that_nobody_has(text: str) -> None:
    with pytest.raises(ConfigError, match="MI300X"):
        parse_gpus(text)


def test_gpus_have_names() -> None:
    assert parse_gpus("8xmi308")[1].name == "MI308X"
    assert parse_gpus("2 × RTX 5090")[0] == 2
    assert parse_gpus("H200")[0] == 1
    assert parse_gpus("4x96GiB")[1].memory == 96 * GIB
    assert parse_gpus("4x96GB")[1].memory == 96 * 10**9
    assert {gpu.arch for gpu in GPUS.values()} <= set(ARCHS) - {"cpu"}


def test_more_context_than_the_model_has_fits_nowhere(planned: Callable[..., Plan]) -> None:
    found = planned("flash", "8xMI355X", max_model_len=1 << 21)
    assert found.best is None
    assert all("max_position_embeddings" in str(split.problem) for split in found.splits)


def test_without_weights_the_configuration_decides(tmp_path: Path) -> None:
    """A directory with config.json alone."""
    write_checkpoint(tmp_path / "c", "tiny", weights="fp8", holes=True)
    whole, _ = subject_of_checkpoint(ModelLocation(tmp_path / "c", "c"), "c")
    for path in (tmp_path / "c").glob("*.safetensors*"):
        path.unlink()
    alone, source = subject_of_checkpoint(ModelLocation(tmp_path / "c", "c"), "c")
    assert source.startswith("config.json alone")
    assert weight_bytes(alone) == weight_bytes(whole)
