"""From logits to tokens.

Contract: rows are independent; the only randomness is the `uniform` argument, so a row's token depends
on nothing but its own logits, parameters and number. Ties go to the lower token id.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fourfold.ops.registry import Case, CaseMaker, op


def _cases(make: CaseMaker) -> Iterator[Case]:
    logits = make.randn(4, 50, scale=3.0, dtype=torch.float32)
    yield Case(
        "greedy and sampled",
        {
            "logits": logits,
            "temperature": torch.tensor([0.0, 1.0, 0.7, 1.5], device=make.device),
            "top_p": torch.tensor([1.0, 0.9, 1.0, 0.5], device=make.device),
            "uniform": torch.tensor([0.5, 0.01, 0.99, 0.3], device=make.device),
        },
    )


@op(_cases, differentiable=False)
def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """Token ids int64 `[N]` from `logits [N, V]` float32; a token whose logit is −∞ is never picked.

    `temperature [N]` 0 takes the largest logit. Otherwise tokens are put in falling order, cut to the
    smallest set whose probability reaches `top_p [N]`, and the one at `uniform [N]` in [0, 1) of the
    cumulative distribution is taken.
    """
    greedy = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, 0]
    scaled = logits / torch.where(temperature > 0, temperature, 1.0).unsqueeze(-1)
    order = torch.sort(scaled, dim=-1, descending=True, stable=True)
    probability = torch.softmax(order.values.double(), dim=-1)
    before = probability.cumsum(-1) - probability
    kept = torch.where(before < top_p.unsqueeze(-1).double(), probability, 0.0)
    cumulative = kept.cumsum(-1)
    target = uniform.double().unsqueeze(-1) * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)
    place = torch.minimum(place, (kept > 0).sum(-1, keepdim=True) - 1)
    sampled = order.indices.gather(-1, place.clamp(min=0)).squeeze(-1)
    return torch.where(temperature > 0, sampled, greedy)
