"""`fourfold synth`: write a checkpoint with random weights."""

from __future__ import annotations

import time
from pathlib import Path

import click

from fourfold.cli.progress import Progress


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--geometry",
    type=click.Choice(["tiny", "flash", "flash-base", "pro"]),
    default="tiny",
    show_default=True,
    help="Shapes of the model.",
)
@click.option("--layers", type=click.IntRange(1), help="Keep the first N main layers only.")
@click.option(
    "--weights",
    type=click.Choice(["native", "fp8", "bf16", "float32"]),
    help="Storage: native is FP4 experts and FP8 linears, fp8 the Base models' format.  "
    "[default: native; fp8 for flash-base]",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--holes", is_flag=True, help="Real headers and sizes, data as file holes.")
def synth(
    directory: Path, geometry: str, layers: int | None, weights: str | None, seed: int, holes: bool
) -> None:
    """Write a checkpoint with random weights in exactly the released format."""
    from fourfold.weights.synthetic import write_checkpoint

    began = time.perf_counter()
    layout = write_checkpoint(
        directory,
        geometry=geometry,
        layers=layers,
        weights=weights,
        seed=seed,
        holes=holes,
        progress=Progress("writing", quiet=False),
    )
    click.echo(
        f"{directory}: {len(layout.files)} shards, {len(layout.weight_map()):,} tensors, "
        f"{layout.total_size:,} bytes of data in {time.perf_counter() - began:.1f} s"
    )
