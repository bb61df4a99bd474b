"""A small network in training: its batch, its masters, and the same documents for the definition."""

import torch
from torch import Tensor

from fourfold.core.config import ModelConfig
from train import parameters
from train.batch import BLOCK
from train.geometry import model_config, small_config
from train.step import Tokens

CPU = torch.device("cpu")
VOCAB = 64
LENGTHS = (200, 100, 300, 128)
PLACES = ((0, 0), (0, 256), (1, 0), (1, 384))
ROW = 512


def config(**changes: object) -> ModelConfig:
    return model_config(small_config(vocab_size=VOCAB, **changes))


def masters(c: ModelConfig, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Parameters as at the start of training, but with nothing left at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, value in parameters.initial(c, seed, CPU).items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator)
            # As a checkpoint stores it, so that saving changes nothing.
            value = (value + 0.05 * noise).to(torch.bfloat16).to(dtype).requires_grad_()
        found[name] = value
    return found


def documents(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


def tokens(found: list[list[int]]) -> Tokens:
    """Two rows of four documents."""
    ids, starts, weights = (torch.zeros(2, ROW) for _ in range(3))
    for document, (row, begin) in zip(found, PLACES, strict=True):
        end = begin + len(document)
        ids[row, begin:end] = torch.tensor(document).float()
        weights[row, begin:end] = 1
        starts[row, begin:] = begin
        starts[row, -(-end // BLOCK) * BLOCK :] = -(-end // BLOCK) * BLOCK
    return Tokens(ids.long(), starts.long(), weights)


def pick(values: Tensor, drop_last: int = 0) -> Tensor:
    """The documents' values of `[2·ROW, …]`, as a one-shot pass lays them out."""
    rows = values.view(2, ROW, *values.shape[1:])
    return torch.cat(
        [
            rows[row, begin : begin + length - drop_last]
            for length, (row, begin) in zip(LENGTHS, PLACES, strict=True)
        ]
    )
