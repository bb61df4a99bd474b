"""Planned memory against allocated memory: equal to the byte, the same without torch, and kept."""

from __future__ import annotations

import gc
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from fourfold.cache.pool import allocate
from fourfold.cache.rows import page_bytes, slot_bytes
from fourfold.core.config import CacheConfig, EngineConfig, ModelConfig
from fourfold.core.device import detect
from fourfold.core.errors import CapacityError
from fourfold.core.request import Request, SamplingParams
from fourfold.core.row_format import PAGE_TOKENS
from fourfold.core.tensor import QuantTensor, dtype_name, named_dtype
from fourfold.engine.capacity import (
    Capacity,
    engine_row_formats,
    image_bytes,
    plan_capacity,
    table_bytes,
    workspace_bytes,
)
from fourfold.engine.engine import Engine
from fourfold.engine.loading import LoadedModel, load_model
from fourfold.engine.memory import set_aside
from fourfold.weights.geometry import config_json
from fourfold.weights.locate import locate
from tests.support import prompts, small_config, write_small

PLAIN = {"kv_cache_dtype": "float32", "index_cache_dtype": "bfloat16"}
ODD = {"head_dim": 100, "qk_rope_head_dim": 12, "index_head_dim": 50, "sliding_window": 37}


def config_of(cache: dict[str, Any] | None = None, **changes: Any) -> EngineConfig:
    return EngineConfig(model="m", cache=CacheConfig(**(cache or {})), **changes)


def geometry(name: str) -> ModelConfig:
    return ModelConfig.from_dict(config_json(name), "config.json").config


@pytest.mark.parametrize("drafts", [0, 1, 3])
@pytest.mark.parametrize(
    ("model", "dtype", "cache"),
    [
        (small_config(), "bfloat16", {}),
        (small_config(), "float32", {}),
        (small_config(), "float64", {}),
        (small_config(), "bfloat16", PLAIN),
        (small_config(), "float64", {"kv_cache_dtype": "fp8"}),
        (small_config(**ODD), "bfloat16", {}),
        (small_config(**ODD), "float32", {"index_cache_dtype": "fp8"}),
        (small_config(compress_ratios=[0, 0, 0, 0, 0]), "bfloat16", {}),
        (small_config(compress_ratios=[128, 128, 0, 128, 0]), "float64", {}),
        (small_config(num_nextn_predict_layers=0, compress_ratios=[4] * 4), "float32", {}),
        (geometry("flash"), "bfloat16", {}),
        (geometry("pro"), "bfloat16", {}),
    ],
)
def test_planned_state_is_allocated_state(
    model: ModelConfig, dtype: str, cache: dict[str, Any], drafts: int
) -> None:
    """Slots and pages, to the byte; counted on a device that takes no memory."""
    config = config_of(cache, num_speculative_tokens=drafts)
    formats = engine_row_formats(config, model, dtype)
    meta = torch.device("meta")
    for pages, slots in ((1, 1), (7, 3)):
        state = allocate(model, formats, pages, slots, named_dtype(dtype), meta, drafts)
        streams = torch.empty(
            slots, model.hc_mult, model.hidden_size, dtype=named_dtype(dtype), device=meta
        )
        planned = pages * page_bytes(model, formats)
        planned += slots * slot_bytes(model, formats, dtype, drafts)
        assert planned == state.nbytes + streams.nbytes


@pytest.mark.parametrize("name", ["flash", "pro"])
@pytest.mark.parametrize("drafts", [0, 3])
def test_all_that_is_available_is_used_and_no_more(name: str, drafts: int) -> None:
    model = geometry(name)
    config = config_of(max_num_seqs=64, num_speculative_tokens=drafts)
    for available in (12 << 30, 40 << 30, (40 << 30) + 12_345):
        plan = plan_capacity(config, model, "bfloat16", 150 << 30, available)
        left = available + plan.weight_bytes - plan.total_bytes
        assert 0 <= left < plan.page_bytes
        assert plan.max_model_len == min(
            model.max_position_embeddings, plan.num_pages * PAGE_TOKENS
        )
    # With room for every slot's longest sequence, no more pages are made than these need.
    plan = plan_capacity(config, model, "bfloat16", 0, 1 << 50)
    assert plan.num_pages == 64 * (1 << 20) // PAGE_TOKENS
    assert plan.table()[-1] == (1 << 20, 64)


def test_the_workspace_grows_with_what_a_step_may_hold() -> None:
    """It follows tokens, widths, drafts and dtype, and holds the largest single tensors; captured steps
    are counted beside it."""
    model, config = geometry("flash"), config_of(max_num_batched_tokens=8192)
    base = workspace_bytes(config, model, "bfloat16")
    streams = 8192 * model.hc_mult * model.hidden_size * 2
    queries = 8192 * model.num_attention_heads * model.head_dim * 2
    results = 8192 * model.num_experts_per_tok * model.hidden_size * 4
    eager = replace(config, enforce_eager=True)
    assert base > workspace_bytes(eager, model, "bfloat16") > streams + max(queries, results)
    assert workspace_bytes(config, geometry("pro"), "bfloat16") > base
    assert workspace_bytes(config, model, "float32") > 1.5 * base
    more = replace(config, max_num_batched_tokens=16384)
    assert 1.6 * base < workspace_bytes(more, model, "bfloat16") < 2 * base
    crowd = replace(config, max_num_seqs=1024, num_speculative_tokens=3)
    assert workspace_bytes(crowd, model, "bfloat16") > base
    assert workspace_bytes(eager, small_config(), "bfloat16") == 512 << 20


def test_the_table_says_what_fits() -> None:
    plan = Capacity(0, 0, 0, 1, 1, num_slots=50, num_pages=100, max_model_len=20_000)
    assert plan.table() == [(1024, 25), (4096, 6), (16384, 1), (20_000, 1)]
    assert plan.concurrency(256) == 50
    assert plan.concurrency(257) == 50
    assert plan.concurrency(20_001) == 0
    short = Capacity(0, 0, 0, 1, 1, num_slots=2, num_pages=100, max_model_len=300)
    assert short.table() == [(300, 2)]


def test_every_figure_is_printed() -> None:
    model, config = geometry("flash"), config_of(max_num_seqs=128)
    plan = plan_capacity(config, model, "bfloat16", 150 << 30, 40 << 30)
    lines = plan.describe()
    for line, words in zip(
        lines,
        (
            ("weights:", "150.00 GiB"),
            ("workspace:", f"{plan.workspace_bytes / 2**30:.2f} GiB"),
            ("images:", "1.00 GiB"),
            ("state:", f"{plan.slot_bytes / 2**20:.2f} MiB a request", "(128 slots)"),
            ("cache:", f"{plan.page_bytes / 256:.0f} bytes a token", f"({plan.num_pages} pages"),
            ("what fits at once:",),
        ),
        strict=False,
    ):
        assert all(word in line for word in words), line
    assert len(lines) == 6 + len(plan.table())
    off = config_of({"enable_prefix_caching": False})
    assert image_bytes(off) == 0


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    model = geometry("flash")
    config = config_of(max_model_len=1 << 20, max_num_seqs=256)
    with pytest.raises(
        CapacityError,
        match=r"room for \d+ tokens after 2\.18 GiB .* \d+\.\d+ MiB for 256 sequences",
    ):
        plan_capacity(config, model, "bfloat16", 0, 6 << 30)
    with pytest.raises(CapacityError, match="room for 0 tokens"):
        plan_capacity(config_of(), model, "bfloat16", 0, 1 << 30)
    with pytest.raises(CapacityError, match="max_position_embeddings"):
        plan_capacity(config_of(max_model_len=1 << 21), model, "bfloat16", 0, 1 << 50)


def test_no_room_for_a_step_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pages were asked for that leave none; and a CPU sets nothing aside."""

    def full(*shape: int, **given: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "empty", full)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with pytest.raises(CapacityError, match=r"no 2\.00 GiB are left for a step.*--max-num-seqs"):
        set_aside(2 << 30, torch.device("cuda"))
    set_aside(2 << 30, torch.device("cpu"))


def test_the_same_figures_without_torch() -> None:
    """In a process where importing torch or numpy fails."""
    code = f"""
import sys
for name in ("torch", "numpy", "triton", "safetensors"):
    sys.modules[name] = None
from fourfold.core.config import EngineConfig, ModelConfig
from fourfold.engine.capacity import plan_capacity
model = ModelConfig.from_dict({config_json("flash")!r}, "config.json").config
plan = plan_capacity(EngineConfig(model="m"), model, "bfloat16", 150 << 30, 40 << 30)
print("\\n".join(plan.describe()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    plan = plan_capacity(config_of(), geometry("flash"), "bfloat16", 150 << 30, 40 << 30)
    assert done.stdout.splitlines() == plan.describe(), done.stderr


# ---- a running engine ----


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = write_small(tmp_path_factory.mktemp("capacity") / "c", "native", seed=1, **ODD)
    return load_model(locate(str(folder)), EngineConfig(model=str(folder)), detect("cpu"))


def start(loaded: LoadedModel, **changes: Any) -> Engine:
    settings = {"max_num_seqs": 3, "max_model_len": 700, **changes}
    cache = {"device_image_bytes": 60_000, "host_image_bytes": 60_000}
    return Engine(loaded, config_of(cache, **settings))


def test_an_engine_allocates_what_it_says(loaded: LoadedModel) -> None:
    """State and the slot table with all its columns, to the byte; weights as they were loaded. The
    slot of nobody is one row more, and lives on the workspace."""
    engine = start(loaded, num_speculative_tokens=2)
    capacity, runner = engine.capacity, engine.runner
    columns = [column[:-1] for column in vars(runner.slots.columns).values()]
    assert capacity.state_bytes == runner.state.nbytes + sum(column.nbytes for column in columns)
    assert sum(c.nbytes for c in columns) - runner.slots.columns.streams[
        :-1
    ].nbytes == 3 * table_bytes(2, 700)
    weights = loaded.weights.values()
    parts = [(w.codes, w.scale) if isinstance(w, QuantTensor) else (w,) for w in weights]
    stored = sum(t.numel() * t.element_size() for tensors in parts for t in tensors)
    assert capacity.weight_bytes == stored
    assert capacity == plan_capacity(
        engine.config,
        loaded.config,
        dtype_name(loaded.dtype),
        stored,
        workspace_bytes(engine.config, loaded.config, "bfloat16") + 60_000 + (4 << 30),
    )


def live_bytes() -> int:
    """Bytes of all tensors there are, each storage once."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.full
def test_after_warm_up_nothing_grows(loaded: LoadedModel) -> None:
    """Live tensors between steps: after a warm-up that fills the image budgets, never more again."""
    engine = start(loaded, num_speculative_tokens=2, max_num_batched_tokens=150)
    params = SamplingParams(max_tokens=5, temperature=0.7, ignore_eos=True, logprobs=2)
    gc.collect()
    before = live_bytes()

    def serve(seed: int) -> int:
        for number, tokens in enumerate(prompts(192, (270, 40, 10, 20), seed)):
            engine.add(Request(str(number), tuple(tokens), params))
        most = 0
        while engine.has_work:
            engine.step()
            most = max(most, live_bytes() - before)
        return most

    warm = max(serve(seed) for seed in range(2))
    assert warm <= 2 * 60_000
    assert max(serve(seed) for seed in range(2, 5)) <= warm
    assert not engine._requests
    assert not engine._held
