"""`fourfold selftest`: does everything work on this machine? Needs no weights."""

from __future__ import annotations

import json
from pathlib import Path

import click

from fourfold.cli.options import kernel_overrides
from fourfold.core.errors import ConfigError


@click.command()
@click.option("--quick", is_flag=True, help="Under a minute on two CPU cores.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--kernel",
    "kernels",
    multiple=True,
    metavar="OP=NAME",
    help="Run the engine's checks with this kernel, even one that failed; repeatable.",
)
@click.option(
    "--keep/--no-keep",
    default=True,
    show_default=True,
    help="Keep which kernels failed, so that engines on this machine do not choose them.",
)
@click.option(
    "--bundle",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write versions, plan and results to a file that can be sent: no paths, no user data.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else.")
@click.pass_context
def selftest(
    context: click.Context,
    quick: bool,
    device: str,
    kernels: tuple[str, ...],
    keep: bool,
    bundle: Path | None,
    as_json: bool,
) -> None:
    """Check this machine: every kernel against its definition, and a small random model whose answers
    must not depend on batching, chunking, the cache, drafts or graphs.

    A kernel that fails is named and no longer chosen on this device. Exit status 1 if anything failed.
    """
    from fourfold.core.device import detect
    from fourfold.engine.selftest.report import Check, write_bundle
    from fourfold.engine.selftest.run import run_selftest

    def tell(check: Check) -> None:
        words = f"{check.outcome.value:<7} {check.seconds:6.1f} s  {check.group}: {check.name}"
        click.echo(f"{words}  {check.detail}".rstrip(), err=True)

    if bundle is not None and not bundle.absolute().parent.is_dir():
        raise ConfigError(f"--bundle {bundle}: there is no such directory")
    report = run_selftest(detect(device), quick, kernel_overrides(kernels), keep, tell)
    if bundle is not None:
        try:
            write_bundle(bundle, [report])
        except OSError as error:
            raise ConfigError(f"--bundle {bundle}: {error.strerror}") from None
    if as_json:
        click.echo(json.dumps(report.as_dict(), ensure_ascii=False))
    else:
        click.echo(f"{report.table()}\n\n{report.summary()}")
    if report.failures:
        context.exit(1)
