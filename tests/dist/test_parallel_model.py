"""The same model object on several ranks: the sum of the shards is the whole, with no `if` in it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fourfold.core.parameters import parameters
from fourfold.core.tensor import Weight
from fourfold.dist.comm import Group
from fourfold.dist.shard import shard
from fourfold.engine.oneshot import one_shot
from tests.support import build, load_weights, prompts, write_small


class Meeting:
    """Where the ranks' threads meet: each brings a tensor and takes everybody's."""

    def __init__(self, size: int):
        self.barrier = threading.Barrier(size)
        self.brought: list[Tensor] = [torch.empty(0)] * size

    def exchange(self, rank: int, tensor: Tensor) -> list[Tensor]:
        self.brought[rank] = tensor
        self.barrier.wait()
        everybody = list(self.brought)
        self.barrier.wait()
        return everybody


class ThreadComm:
    """One rank of several in one process. With `by_expert`, routed experts are split by expert."""

    def __init__(self, meeting: Meeting, rank: int, size: int):
        self.meeting, self.own, self.count = meeting, rank, size

    def rank(self, group: Group = Group.TENSOR) -> int:
        return self.own

    def size(self, group: Group = Group.TENSOR) -> int:
        return self.count

    def all_reduce(self, tensor: Tensor, group: Group = Group.TENSOR) -> Tensor:
        parts = self.meeting.exchange(self.own, tensor)
        return torch.stack(parts).sum(0)

    def all_gather(self, tensor: Tensor, dim: int, group: Group = Group.TENSOR) -> Tensor:
        return torch.cat(self.meeting.exchange(self.own, tensor), dim=dim)


def on_ranks(size: int, work: Callable[[int, ThreadComm], Tensor]) -> list[Tensor]:
    meeting, results = Meeting(size), [torch.empty(0)] * size

    def run(rank: int) -> None:
        with torch.inference_mode():
            try:
                results[rank] = work(rank, ThreadComm(meeting, rank, size))
            except BaseException:
                meeting.barrier.abort()
                raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize(("size", "by_expert"), [(2, False), (2, True), (4, False), (4, True)])
def test_tensor_and_expert_parallel_equal_one_rank(
    size: int, by_expert: bool, tmp_path: Path
) -> None:
    """Two all-reduces of the shared expert, or experts of the wrong rank, would show here."""
    directory = write_small(
        tmp_path / "c", "float32", num_attention_heads=8, o_groups=4, index_topk=10
    )
    config, weights = load_weights(directory, torch.float64)
    tokens = prompts(config.vocab_size, (140, 9), 1)
    expected = one_shot(build(config, weights), tokens).logits

    def work(rank: int, comm: ThreadComm) -> Tensor:
        expert_rank, expert_size = (rank, size) if by_expert else (0, 1)
        mine: dict[str, Weight] = {
            spec.name: shard(spec, weights[spec.name], rank, size, expert_rank, expert_size)
            for spec in parameters(config)
        }
        return one_shot(build(config, mine, comm), tokens).logits

    for logits in on_ranks(size, work):
        assert float((logits - expected).abs().max()) < 1e-9
