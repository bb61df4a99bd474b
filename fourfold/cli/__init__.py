"""The command line: the only place that knows both the engine and what a person types.

Contract: one command, one module, and one line here. Importing this loads no torch; a command imports
what it needs when it runs.
"""

from fourfold.cli import bench, bench_engine, chat, compile, generate, serve, synth
from fourfold.cli.group import main

for _command in (
    bench.bench,
    chat.chat,
    compile.compile_,
    generate.generate,
    serve.serve,
    synth.synth,
):
    main.add_command(_command)
for _command in (bench_engine.bench_decode, bench_engine.bench_prefill, bench_engine.bench_op):
    bench.bench.add_command(_command)

__all__ = ["main"]
