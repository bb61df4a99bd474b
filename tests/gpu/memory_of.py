"""What an engine takes of a GPU, measured in a process of its own: `python -m tests.gpu.memory_of flash`.

Prints one JSON object of bytes: what was planned from the geometry alone, what the engine says at its
start, and what the driver and the allocator say after each stage. Prompts that fill a step, then as
many decoding requests as there are slots, make the largest intermediates there are.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import asdict, replace

import torch

from fourfold.core.config import CacheConfig, EngineConfig
from fourfold.core.device import detect
from fourfold.core.gpus import Gpu
from fourfold.core.request import Request, SamplingParams
from fourfold.engine.ahead import compile_ahead
from fourfold.engine.engine import Engine
from fourfold.engine.loading import random_model
from fourfold.engine.memory import plan_memory
from fourfold.engine.planning import RUNTIME_BYTES, plan, subject_of_geometry
from fourfold.weights.layout import FORMATS

SLOTS, CONTEXT, STEP = 64, 16_384, 8_192


def used() -> dict[str, int]:
    """By the driver (all processes), and by this process's allocator now and at most."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return {
        "driver": total - free,
        "allocated": torch.cuda.memory_allocated(),
        "most_allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
    }


def work(engine: Engine, count: int, tokens: int) -> None:
    rng = random.Random(count)
    params = SamplingParams(max_tokens=4, temperature=0.7, top_p=0.9, ignore_eos=True)
    for number in range(count):
        prompt = tuple(rng.randrange(2, 100_000) for _ in range(tokens))
        engine.add(Request(f"{tokens}-{number}", prompt, params))
    for output in engine.run():
        assert output.error is None, output.error


def measure(geometry: str, layers: int) -> dict[str, object]:
    config = EngineConfig(
        geometry,
        max_model_len=CONTEXT,
        max_num_seqs=SLOTS,
        max_num_batched_tokens=STEP,
        cache=CacheConfig(enable_prefix_caching=False),
    )
    subject, device = subject_of_geometry(geometry, layers), detect("cuda")
    torch.zeros(1, device="cuda")
    stages = {"context": used()}
    total = torch.cuda.mem_get_info()[1]
    (split,) = plan(subject, 1, Gpu(device.name, device.arch.name, total), config).splits
    assert split.capacity is not None, split.problem
    weights = FORMATS["fp8" if geometry == "flash-base" else "native"]
    loaded = random_model(subject.model, weights, config, device)
    compile_ahead(loaded, config)
    torch.cuda.empty_cache()
    stages["weights"] = used()
    # As many pages as there is memory for, as the engine counts them here and as they were planned.
    whole = replace(config, max_num_seqs=1024, max_model_len=None)
    here = plan_memory(whole, subject.model, subject.dtype, loaded.weight_bytes, device)
    planned = plan(subject, 1, Gpu("", "", total), whole).splits[0].capacity
    engine = Engine(loaded, config)
    stages["engine"] = used()
    work(engine, 3, STEP - 1)
    stages["prefill"] = used()
    work(engine, SLOTS, 40)
    stages["decode"] = used()
    return {
        "device": device.name,
        "total": total,
        "planned": split.capacity.total_bytes + RUNTIME_BYTES,
        "capacity": asdict(split.capacity),
        "engine_capacity": asdict(engine.capacity),
        "pages_planned": planned.num_pages if planned else 0,
        "pages_here": here.num_pages,
        "stages": stages,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("geometry", choices=["flash", "flash-base", "pro"])
    parser.add_argument("--layers", type=int, default=8)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.geometry, arguments.layers)))
