"""What a benchmark counts and how it reads a trace; that it runs is tested through the command line."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fourfold.core.device import detect
from fourfold.core.parameters import parameters
from fourfold.engine.benchmark import Setting, against_floor, prefill_works
from fourfold.engine.benchmark_report import details
from fourfold.engine.capacity import engine_row_formats
from fourfold.engine.loading import random_model
from fourfold.engine.profile import OpClock, read_trace
from fourfold.engine.roofline import Ceilings, Work, step_costs, stored_bytes

FLASH = Setting()
H200 = Ceilings(4.35e12, 8e14, 1.46e15, 60 << 20)


def floor(batch: int) -> dict[str, Any]:
    model = FLASH.model
    formats = engine_row_formats(FLASH.engine(1, 2048), model, "bfloat16")
    costs = step_costs(model, FLASH.format, formats, Work(((1056, 1),) * batch, batch))
    return against_floor(H200, [costs], 1.0)


def part(found: dict[str, Any], name: str) -> dict[str, Any]:
    (one,) = [each for each in found["parts"] if each["part"] == name]
    return dict(one)


def test_the_cut_flash_is_the_measured_shape() -> None:
    ratios = FLASH.model.compress_ratios
    assert [ratios.count(ratio) for ratio in (0, 4, 128)] == [2, 3, 3]


def test_bytes_of_a_decode_step_by_hand() -> None:
    """Flash cut to 8 layers: 13.4 MB an expert, 1.06 GB of head, 584 bytes a row."""
    one, many = floor(1), floor(256)
    expert = 3 * 2048 * 4096 * (1 / 2 + 1 / 32)
    routed = sum(part(one, f"experts.w{n}")["bytes"] for n in (1, 2, 3))
    assert routed == pytest.approx(8 * 6 * expert)
    routed = sum(part(many, f"experts.w{n}")["bytes"] for n in (1, 2, 3))
    assert routed == pytest.approx(8 * 256 * (1 - (250 / 256) ** 256) * expert)
    assert part(one, "head")["bytes"] == 129280 * 4096 * 2
    assert part(many, "CSA")["bytes"] == 3 * 256 * 584 * (127 + 264)
    assert part(many, "CSA")["flops"] == 3 * 256 * 4 * 64 * 512 * (128 + 264)
    assert part(many, "keys")["bytes"] == 3 * 256 * 264 * 132
    assert 0.6 < one["floor_ms"] < 0.8
    assert 6.5 < many["floor_ms"] < 8


def test_drafts_add_the_mtp_layer_and_more_logits() -> None:
    model = FLASH.model
    formats = engine_row_formats(FLASH.engine(1, 2048), model, "bfloat16")
    plain = step_costs(model, FLASH.format, formats, Work(((1056, 1),), 1))
    drafted = step_costs(model, FLASH.format, formats, Work(((1056, 3),), 3, drafts=2))
    heads = [sum(c.bytes for c in costs if c.part == "head") for costs in (plain, drafted)]
    assert heads[1] == 3 * heads[0]
    assert not any(c.part == "e_proj" for c in plain)
    assert sum(c.bytes for c in drafted if c.part == "e_proj") == 2 * (4096**2 + 32**2)


def test_prefill_steps_are_full() -> None:
    works = prefill_works(1024, 20, 8192)
    assert [work.tokens for work in works] == [8192, 8192, 4096]
    assert [work.logits for work in works] == [8, 8, 4]
    works = prefill_works(300, 2, 256)
    assert [work.runs for work in works] == [((0, 256),), ((256, 44), (0, 212)), ((212, 88),)]
    assert [work.logits for work in works] == [0, 1, 1]


def test_weights_take_what_their_checkpoint_takes() -> None:
    as_stored = dict.fromkeys(("linear", "wo_a", "routed_experts"), "body")
    setting = Setting(geometry="tiny", layers=4, device="cpu", kernels=as_stored)
    loaded = random_model(setting.model, setting.format, setting.engine(1, 64), detect("cpu"))
    stored = sum(stored_bytes(spec, setting.format, 2) for spec in parameters(setting.model))
    assert loaded.weight_bytes == stored
    assert loaded.checkpoint is None


def test_a_trace_is_read_by_family_and_gap() -> None:
    def event(name: str, begin: float, took: float, category: str = "kernel") -> dict[str, Any]:
        return {
            "cat": category, "name": name, "ts": begin, "dur": took, "args": {"grid": [2, 1, 1]}
        }  # fmt: skip

    events = [
        event("_linear", 0, 16),
        event("_attend", 5, 10),  # within it
        event("Memcpy DtoH", 20, 2, "gpu_memcpy"),
        event("_linear", 30, 10),
        event("void at::native::x", 40, 4),
        event("_linear_2", 50, 6),
        {"cat": "cuda_runtime", "name": "cuLaunchKernel", "ts": 0, "dur": 99},
        {"ph": "M", "name": "process_name"},
    ]
    profile = read_trace(events, 2, {"_linear": "linear", "_attend": "attention"})
    assert profile.span_us == 28
    assert profile.idle_us == (4 + 8 + 6) / 2
    assert profile.families == {"linear": 16, "attention": 5, "torch": 2, "copy": 1}
    assert profile.kinds == {"matmul": 16, "attention": 5, "bookkeeping": 3}
    assert profile.kernels[0].name == "_linear"
    assert profile.kernels[0].calls == 1
    assert profile.gaps[0].after == "Memcpy DtoH"
    assert profile.launches == 3
    assert "idle between Memcpy DtoH and _linear" in details(
        {"profile": profile.as_dict(), "parts": []}
    )
    assert read_trace([], 1, {}).span_us == 0


def test_an_op_within_another_counts_for_itself() -> None:
    clock = OpClock()
    inner = clock.watch("linear", lambda: torch.randn(300, 300) @ torch.randn(300, 300))
    outer = clock.watch("moe", lambda: inner())
    outer()
    assert not clock.calls
    profile = clock.profile(lambda: [outer() for _ in range(4)], 2)
    assert clock.calls == {"moe": 4, "linear": 4}
    assert profile.families["linear"] > profile.families["experts"]
    assert sum(profile.families.values()) == pytest.approx(profile.span_us)
