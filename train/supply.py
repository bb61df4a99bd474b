"""Rows made ahead by worker processes, in the order of the steps.

Contract: step s's rows depend on (seed, s) alone, so that the number of workers changes nothing. A
worker that dies ends the run with an error.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty
from typing import Any

from fourfold.text.tokenizer import Tokenizer
from train.data.encode import Encoder
from train.data.mixture import Mixture, Rows

Job = tuple[int, int, int, float]  # step, rows, length, share of the drill
_AHEAD = 3  # steps a worker has in hand or done
_PATIENCE = 120.0  # seconds without a row


def _work(directory: str, seed: int, jobs: Queue[Any], done: Queue[Any]) -> None:
    mixture = Mixture(Encoder(Tokenizer.from_directory(directory)), seed)
    while (job := jobs.get()) is not None:
        done.put((job[0], mixture.rows(*job)))


def supply(directory: Path, seed: int, jobs: Sequence[Job], workers: int) -> Iterator[Rows]:
    """The rows of each job, in order; `directory` holds the tokenizer. Without workers they are made
    here."""
    if not workers:
        mixture = Mixture(Encoder(Tokenizer.from_directory(directory)), seed)
        for job in jobs:
            yield mixture.rows(*job)
        return
    context = multiprocessing.get_context("spawn")
    todo, done = context.Queue(), context.Queue()
    processes = [
        context.Process(target=_work, args=(str(directory), seed, todo, done), daemon=True)
        for _ in range(workers)
    ]
    for process in processes:
        process.start()
    waiting = iter(jobs)
    for _, job in zip(range(_AHEAD * workers), waiting, strict=False):
        todo.put(job)
    ready: dict[int, Rows] = {}
    try:
        for step, *_ in jobs:
            while step not in ready:
                number, rows = _next(done)
                ready[number] = rows
                following = next(waiting, None)
                if following is not None:
                    todo.put(following)
            yield ready.pop(step)
    finally:
        # What was asked for and is not wanted any more must not keep this process alive.
        todo.cancel_join_thread()
        for process in processes:
            process.terminate()


def _next(done: Queue[Any]) -> tuple[int, Rows]:
    try:
        number, rows = done.get(timeout=_PATIENCE)
    except Empty:
        raise RuntimeError(f"no rows came for {_PATIENCE:.0f} seconds") from None
    return number, rows
