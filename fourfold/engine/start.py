"""From a `Launch` to an engine that can step, and what it tells of itself.

Contract: what every way of running an engine shares, in this process or in another; no transport is
imported, so that an engine in the caller's process needs none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fourfold.core.client import EngineInfo, EngineStats, Launch, StepInfo
from fourfold.core.device import Device, Feature, detect
from fourfold.core.errors import ConfigError
from fourfold.core.tensor import dtype_name
from fourfold.engine.ahead import compile_ahead
from fourfold.engine.engine import Engine
from fourfold.engine.explain import explain_loaded
from fourfold.engine.loading import LoadedModel, load_model
from fourfold.engine.masks import MaskMaker
from fourfold.weights.locate import ModelLocation, locate


def engine_stats(engine: Engine) -> EngineStats:
    """An engine's counts."""
    counts, scheduler = engine.stats, engine.scheduler
    cache = scheduler.cache
    return EngineStats(
        num_steps=counts.num_steps,
        prompt_tokens=counts.prompt_tokens,
        cached_tokens=counts.cached_tokens,
        generation_tokens=counts.generation_tokens,
        num_preemptions=scheduler.num_preemptions,
        drafted=tuple(counts.drafted),
        accepted=tuple(counts.accepted),
        num_running=len(scheduler.running),
        num_waiting=scheduler.num_waiting,
        pages=cache.pages.size,
        pages_used=cache.pages.num_used,
        pages_cached=cache.pages.num_cached,
        images=cache.num_images,
    )


def engine_info(engine: Engine, location: ModelLocation) -> EngineInfo:
    """What was loaded and decided."""
    loaded = engine.loaded
    return EngineInfo(
        model=location.name,
        revision=location.revision,
        device=loaded.device.name,
        dtype=dtype_name(loaded.dtype),
        max_model_len=engine.capacity.max_model_len,
        max_num_seqs=engine.config.max_num_seqs,
        vocab_size=loaded.config.vocab_size,
        bos_token_id=loaded.config.bos_token_id,
        eos_token_id=loaded.config.eos_token_id,
        num_speculative_tokens=engine.config.num_speculative_tokens,
        notes=(*_storage(loaded), *loaded.notes, *engine.notes),
        capacity=tuple(engine.capacity.describe()),
        explanation=explain_loaded(location.name, loaded, engine.config),
    )


def _storage(loaded: LoadedModel) -> tuple[str, ...]:
    return tuple(loaded.checkpoint.resolution.lines()) if loaded.checkpoint else ()


def use_compiled(directory: str, device: Device) -> None:
    """Take the kernels that `fourfold compile --cache-dir` put into `directory` for the rest of the
    process. Raises `ConfigError` where none are used, `KernelError` for those of another build."""
    if Feature.TRITON not in device.features:
        raise ConfigError(f"--compile-cache {directory}: {device.name} runs no compiled kernels")
    from fourfold.kernels import store

    store.use(Path(directory, device.arch.name), device.arch)


def start_engine(
    launch: Launch,
    progress: Callable[[str, int, int], None] | None = None,
    on_step: Callable[[StepInfo], None] | None = None,
    masks: MaskMaker | None = None,
) -> tuple[Engine, EngineInfo]:
    """Find, load and allocate; `masks` as in `Engine`. Raises `FourfoldError`s."""
    location, device = locate(launch.config.model), detect(launch.device)
    if launch.config.compile_cache is not None:
        use_compiled(launch.config.compile_cache, device)
    loaded = load_model(location, launch.config, device, progress)
    compiled = compile_ahead(loaded, launch.config)
    loaded = replace(loaded, notes=(*loaded.notes, *compiled))
    engine = Engine(loaded, launch.config, launch.allowed_token_ids, on_step, masks)
    return engine, engine_info(engine, location)
