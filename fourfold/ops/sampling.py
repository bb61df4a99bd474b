"""From logits to tokens.

    logits ─ adjust (bias, penalties, barred tokens, masks) ─ temperature ─ min_p ─ top_k ─ top_p ─ pick

Contract: rows are independent; the only randomness is a row's `uniform` number, so a row's token
depends on nothing but its own logits, parameters and number. Equal logits are put in order of token
id. A token whose logit is −∞ is never picked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.ops.registry import Case, CaseMaker, Tolerance, op


@dataclass(frozen=True)
class SamplingRows:
    """Parameters of N rows, `[N]` each: temperature 0 is greedy, top_k 0 is off."""

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    min_p: Tensor
    uniform: Tensor


@dataclass(frozen=True)
class Adjustments:
    """Changes to single logits, as lists of (row, token): `[M]` each, every pair at most once.

    First l ← l / repetition where l > 0, else l · repetition; then l ← l + bias (which carries
    logit_bias and the presence and frequency penalties; −∞ bars the token).
    """

    rows: Tensor
    tokens: Tensor
    repetition: Tensor
    bias: Tensor


def _adjust_cases(make: CaseMaker) -> Iterator[Case]:
    wide = torch.float32
    pairs = torch.tensor([[0, 3], [0, 7], [2, 3], [2, 49]], device=make.device)
    allowed = torch.ones(3, 50, dtype=torch.bool, device=make.device)
    allowed[1, 10:] = False
    yield Case(
        "penalties, a barred token, a mask",
        {
            "logits": make.randn(3, 50, dtype=wide),
            "adjustments": Adjustments(
                rows=pairs[:, 0],
                tokens=pairs[:, 1],
                repetition=torch.tensor([1.0, 1.3, 0.8, 1.0], device=make.device),
                bias=torch.tensor([-1.5, 0.0, 2.0, float("-inf")], device=make.device),
            ),
            "allowed": allowed,
        },
    )


@op(_adjust_cases, differentiable=False)
def adjust_logits(
    logits: Tensor, adjustments: Adjustments | None, allowed: Tensor | None
) -> Tensor:
    """`logits [N, V]` after single changes and with everything outside `allowed` at −∞.

    `allowed` is bool `[V]` or `[N, V]`.
    """
    if adjustments is not None:
        a = adjustments
        value = logits[a.rows, a.tokens]
        value = torch.where(value > 0, value / a.repetition, value * a.repetition) + a.bias
        logits = logits.index_put((a.rows, a.tokens), value)
    return logits if allowed is None else logits.masked_fill(~allowed, float("-inf"))


SAMPLING = 0  # the only purpose today; others get numbers of their own at the same position

_WEYL = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLY = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def _shifted(z: Tensor, bits: int) -> Tensor:
    """z >> bits of the unsigned 64-bit number that int64 `z` stands for."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _MULTIPLY[0]
    z = (z ^ _shifted(z, 27)) * _MULTIPLY[1]
    return z ^ _shifted(z, 31)


def random_streams(seeds: Tensor, purpose: int = SAMPLING) -> Tensor:
    """What `uniform` takes numbers from: `seeds [N]` are the 64 bits of unsigned numbers as int64."""
    word = (purpose * _MULTIPLY[1] + (1 << 63)) % (1 << 64) - (1 << 63)
    return _mix((seeds ^ word) + _WEYL)


def _uniform_cases(make: CaseMaker) -> Iterator[Case]:
    seeds = torch.tensor([0, 1, -1, 1 << 62, -(1 << 63), 7], device=make.device)
    positions = torch.tensor([0, 0, 5, 1 << 20, 3, 7], device=make.device)
    for purpose in (SAMPLING, 3):
        inputs = {"streams": random_streams(seeds, purpose), "positions": positions}
        yield Case(f"purpose {purpose}", inputs)


@op(
    _uniform_cases,
    tolerance=Tolerance(float32=0.0),
    differentiable=False,
    batch_invariant=True,
)
def uniform(streams: Tensor, positions: Tensor) -> Tensor:
    """Numbers in [0, 1), float64 `[N]`: functions of seed, purpose and absolute token position alone.

    Counter-based, so that what a request samples cannot depend on its batch, on chunking, on
    preemption, or on how many tokens were drafted: rounds of the SplitMix64 finaliser.
    `streams [N]` are of `random_streams`, `positions [N]` int64.
    """
    # Multiplication wraps, and a product's low 64 bits do not depend on the sign of its factors.
    state = _mix((streams ^ (positions * _MULTIPLY[1])) + _WEYL)
    return _shifted(_mix(state), 11).double() * 2.0**-53


def _cases(make: CaseMaker) -> Iterator[Case]:
    def row(*values: float) -> Tensor:
        return torch.tensor(values, device=make.device)

    yield Case(
        "greedy and sampled",
        {
            "logits": make.randn(6, 50, scale=3.0, dtype=torch.float32),
            "rows": SamplingRows(
                temperature=row(0.0, 1.0, 0.7, 1.5, 1.0, 1.0),
                top_p=row(1.0, 0.9, 1.0, 0.5, 1.0, 0.8),
                top_k=torch.tensor([0, 0, 5, 0, 1, 10], device=make.device),
                min_p=row(0.0, 0.0, 0.0, 0.0, 0.0, 0.05),
                uniform=row(0.5, 0.01, 0.99, 0.3, 0.7, 0.6),
            ),
        },
    )


@op(_cases, differentiable=False)
def sample(logits: Tensor, rows: SamplingRows) -> Tensor:
    """Token ids int64 `[N]` from `logits [N, V]` float32.

    Probabilities at the row's temperature; those below min_p times the largest are dropped, then all
    but the top_k likeliest, then all outside the smallest set that reaches top_p of what is left. The
    token at `uniform` in [0, 1) of the remaining cumulative distribution, in falling order, is taken.
    """
    order = torch.sort(logits, dim=-1, descending=True, stable=True)
    greedy = rows.temperature == 0
    scale = torch.where(greedy, 1.0, rows.temperature).unsqueeze(-1)
    probability = torch.softmax(order.values.double() / scale.double(), dim=-1)
    place = torch.arange(logits.shape[-1], device=logits.device)
    kept = probability >= rows.min_p.unsqueeze(-1).double() * probability[:, :1]
    limit = torch.where(rows.top_k > 0, rows.top_k, logits.shape[-1]).unsqueeze(-1)
    kept = kept & (place < limit) & (probability > 0)
    probability = torch.where(kept, probability, 0.0)
    total = probability.sum(-1, keepdim=True)
    before = (probability.cumsum(-1) - probability) / total
    kept = kept & (before < rows.top_p.unsqueeze(-1).double())
    cumulative = torch.where(kept, probability, 0.0).cumsum(-1)
    target = rows.uniform.double().unsqueeze(-1) * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)
    index = torch.minimum(index, kept.sum(-1, keepdim=True) - 1).clamp(min=0)
    index = torch.where(greedy.unsqueeze(-1), 0, index)
    return order.indices.gather(-1, index).squeeze(-1)


def _verify_cases(make: CaseMaker) -> Iterator[Case]:
    def ids(*values: list[int]) -> Tensor:
        return torch.tensor(values, device=make.device)

    yield Case(
        "none, some, all",
        {
            "sampled": ids([4, 5, 6, 7], [4, 5, 6, 7], [4, 5, 6, 7], [1, 2, 3, 4]),
            "drafts": ids([9, 5, 6], [4, 9, 6], [4, 5, 6], [-1, -1, -1]),
        },
    )


@op(_verify_cases, differentiable=False, batch_invariant=True)
def count_accepted(sampled: Tensor, drafts: Tensor) -> Tensor:
    """How many drafts stand, int64 `[N]`: the leading ones that equal what was sampled there.

    `sampled [N, k+1]` are tokens drawn from the model's own distribution at each position as if there
    were no drafts; `drafts [N, k]`, −1 where there is none. Draft i stands if all before it do and
    sampled[i] = draft[i]. As drafts are fixed before the draw, a standing run of tokens is exactly
    what would have been sampled one at a time: speculation changes nothing but the number of steps.
    """
    return (sampled[:, : drafts.shape[1]] == drafts).to(torch.int64).cumprod(-1).sum(-1)


def _likeliest_cases(make: CaseMaker) -> Iterator[Case]:
    logits = make.randn(4, 50, dtype=torch.float32).round()
    logits[1, 40], logits[2] = float("nan"), float("-inf")
    allowed = torch.ones(50, dtype=torch.bool, device=make.device)
    allowed[logits[0].argmax()] = False
    yield Case("ties", {"logits": logits, "allowed": None})
    yield Case("a mask", {"logits": logits, "allowed": allowed})


@op(_likeliest_cases, differentiable=False, batch_invariant=True)
def likeliest(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """The token with the largest of `logits [N, V]` among those `allowed [V]`, int64 `[N]`; the first
    of equals, and the first NaN before all."""
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    return logits.argmax(-1)


def _logprob_cases(make: CaseMaker) -> Iterator[Case]:
    yield Case(
        "3 of 50",
        {
            "logits": make.randn(4, 50, scale=2.0, dtype=torch.float32),
            "tokens": torch.tensor([0, 7, 49, 3], device=make.device),
            "count": 3,
        },
    )


@op(_logprob_cases, differentiable=False)
def token_logprobs(
    logits: Tensor, tokens: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the model's unadjusted `logits [N, V]`: the log probability `[N]` and rank `[N]` (1 is the
    likeliest) of `tokens [N]`, and the `count` likeliest tokens `[N, count]` with theirs."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    own = logprobs.gather(-1, tokens.unsqueeze(-1))
    rank = (logprobs > own).sum(-1) + 1
    top = torch.sort(logprobs, dim=-1, descending=True, stable=True)
    return own.squeeze(-1), rank, top.indices[:, :count], top.values[:, :count]
