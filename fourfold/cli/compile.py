"""`fourfold compile`: compile kernels ahead of time, for a GPU that need not be here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fourfold.cli.group import same_spelling
from fourfold.cli.options import CACHE_DTYPES, cache_dtype_of, kernel_overrides
from fourfold.core.config import MODEL_DTYPES, CacheConfig, EngineConfig
from fourfold.core.errors import ConfigError
from fourfold.weights.locate import DEFAULT_MODEL, locate

if TYPE_CHECKING:
    from fourfold.core.device import Arch
    from fourfold.engine.compile import Subject

_CACHE_CHOICE = click.Choice([same_spelling(name) for name in CACHE_DTYPES])


@click.command("compile")
@click.argument("model", metavar="[MODEL]", required=False)
@click.option(
    "--geometry",
    type=click.Choice(["tiny", "flash", "flash-base", "pro"]),
    help="Shapes of a released model instead of MODEL; no files are needed.",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="ARCH",
    help="sm_90, gfx942, …; repeatable.  [default: the GPU of this machine]",
)
@click.option(
    "--cache-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the binaries go, one directory a target.  [default: Triton's own cache]",
)
@click.option("--dtype", type=click.Choice(["auto", *MODEL_DTYPES]), default="auto")
@click.option("--kv-cache-dtype", type=_CACHE_CHOICE, default="auto")
@click.option("--index-cache-dtype", type=_CACHE_CHOICE, default="auto")
@click.option("--kernel", "kernels", multiple=True, metavar="OP=NAME", help="Repeatable.")
@click.option("--max-num-seqs", type=click.IntRange(1), default=256, show_default=True)
@click.option("--max-num-batched-tokens", type=click.IntRange(1), default=8192, show_default=True)
@click.option("--num-speculative-tokens", type=click.IntRange(0, 3), default=0, show_default=True)
@click.option("--jobs", "-j", type=click.IntRange(1), help="Processes.  [default: one a core]")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else.")
@click.pass_context
def compile_(
    context: click.Context,
    model: str | None,
    geometry: str | None,
    targets: tuple[str, ...],
    cache_dir: Path | None,
    dtype: str,
    kv_cache_dtype: str,
    index_cache_dtype: str,
    kernels: tuple[str, ...],
    max_num_seqs: int,
    max_num_batched_tokens: int,
    num_speculative_tokens: int,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Compile every kernel that a model needs on a target, and say what each takes there.

    MODEL is a directory, org/name[@revision], or nano, the built-in model; nano if left out. Needs no
    GPU. Exit status 1 if a kernel does not compile or needs more than the target has.
    """
    from fourfold.cli.progress import Progress
    from fourfold.engine import compile_report

    if model is not None and geometry is not None:
        raise ConfigError("give either MODEL or --geometry, not both")
    engine = EngineConfig(
        model=geometry or model or DEFAULT_MODEL,
        dtype=dtype,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        num_speculative_tokens=num_speculative_tokens,
        kernels=kernel_overrides(kernels),
        cache=CacheConfig(
            kv_cache_dtype=cache_dtype_of(kv_cache_dtype),
            index_cache_dtype=cache_dtype_of(index_cache_dtype),
        ),
    )
    subject = _subject(geometry, engine)
    reports = []
    for arch in _archs(targets):
        reports.append(
            compile_report.compile_for(
                subject,
                arch,
                engine,
                cache_dir / arch.name if cache_dir else None,
                jobs or os.cpu_count() or 1,
                Progress(arch.name, quiet=as_json),
            )
        )
        if not as_json:
            click.echo(f"{reports[-1].table()}\n{reports[-1].summary()}\n")
    if as_json:
        click.echo(compile_report.as_json(reports))
    elif len(reports) > 1:
        click.echo(compile_report.matrix(reports))
    if any(report.failures for report in reports):
        context.exit(1)


def _subject(geometry: str | None, engine: EngineConfig) -> Subject:
    from fourfold.core.tensor import named_dtype
    from fourfold.engine.compile import subject_of_checkpoint, subject_of_geometry

    if geometry is not None:
        dtype = None if engine.dtype == "auto" else named_dtype(engine.dtype)
        return subject_of_geometry(geometry, dtype)
    return subject_of_checkpoint(locate(engine.model), engine)


def _archs(targets: tuple[str, ...]) -> list[Arch]:
    """The architectures called so, or that of the GPU here."""
    from fourfold.core.device import ARCHS, Feature, detect

    if not targets:
        here = detect("auto").arch
        if Feature.TRITON not in here.features:
            raise ConfigError("there is no GPU here: say what to compile for with --target")
        return [here]
    known = [name for name, arch in ARCHS.items() if Feature.TRITON in arch.features]
    for name in targets:
        if name not in known:
            raise ConfigError(f"--target {name}: no such target; there are {', '.join(known)}")
    return [ARCHS[name] for name in targets]
