"""The command line: the only place that knows both the engine and what a person types.

Contract: one command, one module, and one line here. Importing this loads no torch; a command imports
what it needs when it runs.
"""

from fourfold.cli import (
    bench,
    bench_engine,
    chat,
    compile,
    explain,
    generate,
    plan,
    selftest,
    serve,
    synth,
    verify,
)
from fourfold.cli.group import main

for _command in (
    bench.bench,
    chat.chat,
    compile.compile_,
    explain.explain,
    generate.generate,
    plan.plan,
    selftest.selftest,
    serve.serve,
    synth.synth,
    verify.verify,
):
    main.add_command(_command)
for _command in (bench_engine.bench_decode, bench_engine.bench_prefill, bench_engine.bench_op):
    bench.bench.add_command(_command)

__all__ = ["main"]
