"""`fourfold explain`: what would run, why, and what was rejected, for a GPU that need not be here."""

from __future__ import annotations

import json

import click

from fourfold.cli.group import same_spelling
from fourfold.cli.options import CACHE_DTYPES, cache_dtype_of, kernel_overrides
from fourfold.core.config import EXPERT_DTYPES, MODEL_DTYPES, CacheConfig, EngineConfig
from fourfold.core.errors import ConfigError
from fourfold.weights.locate import DEFAULT_MODEL, locate

_CACHE_CHOICE = click.Choice([same_spelling(name) for name in CACHE_DTYPES])


@click.command()
@click.argument("model", metavar="[MODEL]", required=False)
@click.option(
    "--geometry",
    type=click.Choice(["tiny", "flash", "flash-base", "pro"]),
    help="A released model instead of MODEL; no files are needed.",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="ARCH",
    help="cpu, sm_90, gfx942, …; repeatable.  [default: the device of this machine]",
)
@click.option("--dtype", type=click.Choice(["auto", *MODEL_DTYPES]), default="auto")
@click.option(
    "--expert-dtype", type=click.Choice([same_spelling(n) for n in EXPERT_DTYPES]), default="auto"
)
@click.option("--kv-cache-dtype", type=_CACHE_CHOICE, default="auto")
@click.option("--index-cache-dtype", type=_CACHE_CHOICE, default="auto")
@click.option("--num-speculative-tokens", type=click.IntRange(0, 3), default=0, show_default=True)
@click.option("--enforce-eager", is_flag=True, help="As if no graphs were to be captured.")
@click.option("--kernel", "kernels", multiple=True, metavar="OP=NAME", help="Repeatable.")
@click.option("--tensors", is_flag=True, help="List every weight, with what decided its format.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else.")
def explain(
    model: str | None,
    geometry: str | None,
    targets: tuple[str, ...],
    dtype: str,
    expert_dtype: str,
    kv_cache_dtype: str,
    index_cache_dtype: str,
    num_speculative_tokens: int,
    enforce_eager: bool,
    kernels: tuple[str, ...],
    tensors: bool,
    as_json: bool,
) -> None:
    """Say what would run on a device, and why: the kernel of every op and those rejected, the format
    of every buffer, which rule decided how each tensor is stored.

    MODEL is a directory, org/name[@revision], or nano, the built-in model; nano if left out. Loads
    nothing and needs no GPU. It asks what the engine asks, so what it says is what runs; a
    running server says the same at GET /explain.
    """
    from fourfold.engine import explain as engine_explain
    from fourfold.engine.explain_text import tensor_line, text

    if model is not None and geometry is not None:
        raise ConfigError("give either MODEL or --geometry, not both")
    engine = EngineConfig(
        model=geometry or model or DEFAULT_MODEL,
        dtype=dtype,
        expert_dtype=expert_dtype.replace("-", "_"),
        num_speculative_tokens=num_speculative_tokens,
        enforce_eager=enforce_eager,
        kernels=kernel_overrides(kernels),
        cache=CacheConfig(
            kv_cache_dtype=cache_dtype_of(kv_cache_dtype),
            index_cache_dtype=cache_dtype_of(index_cache_dtype),
        ),
    )
    if geometry is not None:
        explained = engine_explain.model_of_geometry(geometry)
    else:
        explained = engine_explain.model_of_checkpoint(locate(engine.model), engine)
    told = [
        engine_explain.explain_model(explained, engine_explain.target_device(name), engine)
        for name in targets or (None,)
    ]
    if tensors:
        lines = list(engine_explain.tensor_lines(explained, engine))
    if as_json:
        listed = {"tensors": lines} if tensors else {}
        click.echo(json.dumps([each | listed for each in told], ensure_ascii=False))
        return
    click.echo("\n\n".join(map(text, told)))
    if tensors:
        click.echo()
        for line in lines:
            click.echo(tensor_line(line))
