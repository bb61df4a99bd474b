"""`fourfold plan`: what a model needs, and what fits on GPUs that need not be here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fourfold.cli.group import same_spelling
from fourfold.cli.options import CACHE_DTYPES, cache_dtype_of
from fourfold.core.config import EXPERT_DTYPES, MODEL_DTYPES, CacheConfig, EngineConfig
from fourfold.core.errors import ConfigError
from fourfold.core.gpus import parse_gpus
from fourfold.weights.locate import DEFAULT_MODEL, locate

if TYPE_CHECKING:
    from fourfold.core.gpus import Gpu
    from fourfold.engine.planning import Plan, Split, Subject

_GEOMETRIES = ("tiny", "flash", "flash-base", "pro")
_CACHE_CHOICE = click.Choice([same_spelling(name) for name in CACHE_DTYPES])
_FIRST_FAULTS = 3


@click.command()
@click.argument("model", metavar="[MODEL]", default=DEFAULT_MODEL)
@click.option(
    "--gpus",
    multiple=True,
    metavar="COUNTxNAME",
    help="8xMI300X, 2xH200, 4x96GiB, …; repeatable.  [default: the fewest of each known GPU]",
)
@click.option("--context", "--max-model-len", type=click.IntRange(1), help="Tokens of a request.")
@click.option(
    "--concurrency",
    "--max-num-seqs",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Requests at once, of each engine.",
)
@click.option("--layers", type=click.IntRange(1), help="The first N layers of a released geometry.")
@click.option(
    "--weights",
    type=click.Choice(["native", "fp8", "bf16", "float32"]),
    help="How a released geometry is stored.  [default: as released]",
)
@click.option("--dtype", type=click.Choice(["auto", *MODEL_DTYPES]), default="auto")
@click.option(
    "--expert-dtype",
    type=click.Choice([same_spelling(name) for name in EXPERT_DTYPES]),
    default="auto",
)
@click.option("--kv-cache-dtype", type=_CACHE_CHOICE, default="auto")
@click.option("--index-cache-dtype", type=_CACHE_CHOICE, default="auto")
@click.option("--max-num-batched-tokens", type=click.IntRange(1), default=8192, show_default=True)
@click.option("--num-speculative-tokens", type=click.IntRange(0, 3), default=0, show_default=True)
@click.option(
    "--gpu-memory-utilization",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.9,
    show_default=True,
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else.")
@click.pass_context
def plan(
    context_: click.Context,
    model: str,
    gpus: tuple[str, ...],
    layers: int | None,
    weights: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Say what a model's memory goes to and what fits, from config.json and headers alone.

    MODEL is a directory, org/name[@revision], a released geometry that needs no files (flash,
    flash-base, pro or tiny), or nano, the built-in model; nano if left out. For each way to split it
    over the GPUs: bytes of weights a rank, what does not divide and why, how many requests fit; then
    the recommended command line. Needs no GPU. Exit status 1 if it fits on none of the GPUs asked for.
    """
    from fourfold.engine import planning

    wanted = _wanted(model, flags)
    subject, source = _subject(model, layers, weights, wanted)
    if not gpus:
        found = list(planning.fewest(subject, wanted))
        document = _fewest_dict(found)
        lines = [*_needs(subject, source, wanted), "", *_fewest_lines(found, wanted)]
        fits = any(each is not None for _, each in found)
    else:
        plans = [planning.plan(subject, *parse_gpus(text), wanted) for text in gpus]
        document = [_plan_dict(each) for each in plans]
        lines = list(_needs(subject, source, wanted))
        for each in plans:
            lines += ["", *_plan_lines(each)]
        fits = any(each.best is not None for each in plans)
    if as_json:
        shared = _needs_dict(subject, source, wanted)
        click.echo(json.dumps({**shared, "plans": document}, ensure_ascii=False, indent=1))
    else:
        click.echo("\n".join(lines))
    context_.exit(0 if fits else 1)


def _wanted(model: str, flags: dict[str, Any]) -> EngineConfig:
    return EngineConfig(
        model=model,
        dtype=flags["dtype"],
        expert_dtype=flags["expert_dtype"].replace("-", "_"),
        max_model_len=flags["context"],
        max_num_seqs=flags["concurrency"],
        max_num_batched_tokens=flags["max_num_batched_tokens"],
        num_speculative_tokens=flags["num_speculative_tokens"],
        gpu_memory_utilization=flags["gpu_memory_utilization"],
        cache=CacheConfig(
            kv_cache_dtype=cache_dtype_of(flags["kv_cache_dtype"]),
            index_cache_dtype=cache_dtype_of(flags["index_cache_dtype"]),
        ),
    )


def _subject(
    model: str, layers: int | None, weights: str | None, wanted: EngineConfig
) -> tuple[Subject, str]:
    """What to plan for, and where that was read. A directory goes before a geometry of its name."""
    from fourfold.engine.planning import subject_of_checkpoint, subject_of_geometry

    if model in _GEOMETRIES and not Path(model).is_dir():
        return subject_of_geometry(model, layers, weights, wanted.dtype), "the released geometry"
    if layers is not None or weights is not None:
        raise ConfigError(
            f"--layers and --weights are for {', '.join(_GEOMETRIES)}; {model} says its own"
        )
    location = locate(model, weights=False)
    return subject_of_checkpoint(location, model, wanted.dtype, wanted.expert_dtype)


def _needs_dict(subject: Subject, source: str, wanted: EngineConfig) -> dict[str, Any]:
    """What does not depend on the GPUs."""
    from fourfold.cache.rows import page_bytes, slot_bytes
    from fourfold.core.row_format import PAGE_TOKENS
    from fourfold.engine.capacity import (
        engine_row_formats,
        image_bytes,
        table_bytes,
        workspace_bytes,
    )
    from fourfold.engine.planning import RUNTIME_BYTES, weight_bytes

    model, drafts = subject.model, wanted.num_speculative_tokens
    formats = engine_row_formats(wanted, model, subject.dtype)
    longest = wanted.max_model_len or model.max_position_embeddings
    page = page_bytes(model, formats)
    state = slot_bytes(model, formats, subject.dtype, drafts)
    return {
        "model": subject.name,
        "storage_from": source,
        "dtype": subject.dtype,
        "layers": model.num_hidden_layers,
        "weight_bytes": weight_bytes(subject),
        "bytes_a_token": page / PAGE_TOKENS,
        "fixed_bytes_a_request": state + table_bytes(drafts, longest),
        "workspace_bytes": workspace_bytes(wanted, model, subject.dtype),
        "image_bytes": image_bytes(wanted),
        "runtime_bytes": RUNTIME_BYTES,
        "context": wanted.max_model_len,
        "concurrency": wanted.max_num_seqs,
        "gpu_memory_utilization": wanted.gpu_memory_utilization,
    }


def _needs(subject: Subject, source: str, wanted: EngineConfig) -> Iterator[str]:
    needs = _needs_dict(subject, source, wanted)
    held, experts = sum(needs["weight_bytes"].values()), needs["weight_bytes"]["routed experts"]
    fixed, tokens = needs["fixed_bytes_a_request"] / 2**20, wanted.max_num_batched_tokens
    yield f"{subject.name}: {subject.model.num_hidden_layers} layers, storage from {source}"
    yield f"  weights:     {_gib(held)}, of them {_gib(experts)} routed experts"
    yield f"  a request:   {fixed:.2f} MiB, and {needs['bytes_a_token']:,.0f} bytes a token"
    yield f"  workspace:   {_gib(needs['workspace_bytes'])} for a step of {tokens:,} tokens"
    yield f"  images:      {_gib(needs['image_bytes'])} at most for the prefix cache"
    yield f"  runtime:     {_gib(needs['runtime_bytes'])} of a GPU for driver, libraries and kernels"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def _plan_lines(plan: Plan) -> Iterator[str]:
    """One set of GPUs: every split, the recommendation, its table."""
    context, share = plan.context, plan.wanted.gpu_memory_utilization
    asked = f"{plan.wanted.max_num_seqs} requests"
    asked += f" of {context:,} tokens" if context else " of any length"
    gpu = f"{_gib(plan.gpu.memory)} each" + (f", {plan.gpu.arch}" if plan.gpu.arch else "")
    yield f"{plan.count} × {plan.gpu.name} ({gpu}), {share:.0%} of it; asked for: {asked} an engine"
    yield "  TP  EP  engines  weights a GPU   "
    for split in plan.splits:
        head = f"  {split.tp:>2}  {split.ep:>2}  {split.replicas:>7}  {_gib(split.weight_bytes):>13}   "
        yield head + _outcome(plan, split)
        for fault in split.faults[1:]:
            yield " " * len(head) + fault
    best, today = plan.best, plan.today
    if best is None or best.capacity is None:
        yield "  does not fit: " + _nearest(plan)
        return
    yield "recommended:"
    yield from _recommendation(plan, best)
    if today is not None and today is not best:
        yield "today:"
        yield from _recommendation(plan, today)
    yield f"of each GPU with TP {best.tp}, EP {best.ep}:"
    yield from (f"  {line}" for line in best.capacity.describe())


def _outcome(plan: Plan, split: Split) -> str:
    if split.faults:
        return f"does not divide: {split.faults[0]}"
    if split.capacity is None:
        return f"does not fit: {split.problem}"
    context = plan.context or split.capacity.max_model_len
    count = split.requests(context)
    served = "" if split.served else " (not served yet)"
    if not plan.fits(split):
        return f"does not fit: {count} requests of {context:,} tokens at once"
    return f"fits: {count} requests of {context:,} tokens at once{served}"


def _nearest(plan: Plan) -> str:
    """What comes closest."""
    with_room = [split for split in plan.splits if split.capacity is not None]
    if with_room and plan.context:
        most = max(with_room, key=lambda split: split.requests(plan.context))
        return (
            f"TP {most.tp}, EP {most.ep} takes {most.requests(plan.context)} requests of "
            f"{plan.context:,} tokens; lower --context or --concurrency, or take more GPUs"
        )
    return "take more or larger GPUs"


def _recommendation(plan: Plan, split: Split) -> Iterator[str]:
    from fourfold.engine.planning import NOT_SERVED, command

    each = f"   (once for each group of {split.tp} GPUs)" if split.tp > 1 else "   (once a GPU)"
    yield f"  {command(plan, split)}{each if split.replicas > 1 else ''}"
    if not split.served:
        yield f"  {NOT_SERVED}"


def _plan_dict(plan: Plan) -> dict[str, Any]:
    from fourfold.engine.planning import NOT_SERVED, command

    best = plan.best
    return {
        "gpus": {"count": plan.count, **asdict(plan.gpu)},
        "splits": [_split_dict(plan, split) for split in plan.splits],
        "recommended": None
        if best is None
        else {
            "tensor_parallel_size": best.tp,
            "expert_parallel_size": best.ep,
            "command": command(plan, best),
            "served": best.served,
            "note": "" if best.served else NOT_SERVED,
        },
    }


def _split_dict(plan: Plan, split: Split) -> dict[str, Any]:
    capacity = split.capacity
    return {
        "tensor_parallel_size": split.tp,
        "expert_parallel_size": split.ep,
        "engines": split.replicas,
        "weight_bytes_a_gpu": split.weight_bytes,
        "does_not_divide": list(split.faults),
        "fits": plan.fits(split),
        "problem": split.problem,
        "served": split.served,
        "requests": split.requests(plan.context),
        "capacity": asdict(capacity) if capacity else None,
        "table": [list(row) for row in capacity.table()] if capacity else [],
    }


def _fewest_lines(found: Sequence[tuple[Gpu, Plan | None]], wanted: EngineConfig) -> Iterator[str]:
    length = f" of {wanted.max_model_len:,} tokens" if wanted.max_model_len else ""
    yield f"the fewest GPUs that hold it, with room for {wanted.max_num_seqs} requests{length}:"
    if not wanted.max_model_len:
        yield "  (--context says how long they may be; without it, one of any length is enough)"
    for gpu, plan in found:
        best = plan.best if plan else None
        if plan is None or best is None or best.capacity is None:
            yield f"  {gpu.name:<12} {_gib(gpu.memory):>11}   not on 16"
            continue
        context = plan.context or best.capacity.max_model_len
        served = "" if best.served else "   (not served yet)"
        yield (
            f"  {gpu.name:<12} {_gib(gpu.memory):>11}   {plan.count:>2} × with TP {best.tp}, "
            f"EP {best.ep}: {best.requests(context)} × {context:,} tokens{served}"
        )


def _fewest_dict(found: Sequence[tuple[Gpu, Plan | None]]) -> list[dict[str, Any]]:
    return [
        _plan_dict(plan) if plan else {"gpus": asdict(gpu), "splits": [], "recommended": None}
        for gpu, plan in found
    ]
