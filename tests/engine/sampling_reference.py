"""Sampling written down a second time, token by token in numpy, straight from the definitions."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from fourfold.core.request import SamplingParams

Row = npt.NDArray[np.float64]
_WORD = 2**64


def uniform(seed: int, position: int, purpose: int = 0) -> float:
    """The random number of a position, in Python's integers."""

    def mix(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % _WORD
        z = (z ^ z >> 27) * 0x94D049BB133111EB % _WORD
        return z ^ z >> 31

    state = seed
    for word in (purpose, position):
        state = mix(((state ^ word * 0x94D049BB133111EB % _WORD) + 0x9E3779B97F4A7C15) % _WORD)
    return (mix(state) >> 11) * 2.0**-53


def adjusted(
    logits: Row,
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    stop_ids: Sequence[int],
    allowed: Collection[int] | None = None,
) -> Row:
    """Logits of the token after `output` under penalties, biases and barred tokens."""
    changed = np.array(logits, dtype=np.float64)
    for token in {*prompt, *output}:
        penalty = params.repetition_penalty
        changed[token] = (
            changed[token] / penalty if changed[token] > 0 else changed[token] * penalty
        )
    for token in set(output):
        changed[token] -= params.presence_penalty
        changed[token] -= params.frequency_penalty * list(output).count(token)
    for token, bias in params.logit_bias.items():
        changed[token] += bias
    if len(output) < params.min_tokens:
        for token in stop_ids:
            changed[token] = -np.inf
    if allowed is not None:
        for token in range(len(changed)):
            if token not in allowed:
                changed[token] = -np.inf
    return changed


def order_of(logits: Row) -> list[int]:
    """Tokens from the likeliest on, equal ones by id."""
    return sorted(range(len(logits)), key=lambda token: (-logits[token], token))


def distribution(logits: Row, params: SamplingParams) -> Row:
    """The probability of every token."""
    order = order_of(logits)
    chosen = np.zeros(len(logits))
    if params.temperature == 0:
        chosen[order[0]] = 1.0
        return chosen
    scaled = np.asarray(logits, dtype=np.float64) / params.temperature
    weights = np.exp(scaled - scaled.max())
    weights /= weights.sum()
    order = [t for t in order if weights[t] >= params.min_p * weights.max() and weights[t] > 0]
    if params.top_k > 0:
        order = order[: params.top_k]
    total = sum(weights[t] for t in order)
    reached = 0.0
    for token in order:
        if reached >= params.top_p * total:
            break
        chosen[token] = weights[token]
        reached += weights[token]
    return chosen / chosen.sum()


def pick(logits: Row, params: SamplingParams, number: float) -> int:
    """The token at `number` of the cumulative distribution, in falling order."""
    probability, reached, last = distribution(logits, params), 0.0, -1
    for token in order_of(logits):
        if probability[token] > 0:
            reached += probability[token]
            last = token
            if number < reached:
                return token
    return last


def next_token(
    logits: Row,
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    stop_ids: Sequence[int],
    seed: int,
    allowed: Collection[int] | None = None,
) -> int:
    """What must be sampled after `prompt` and `output`."""
    number = uniform(seed, len(prompt) + len(output))
    return pick(adjusted(logits, params, prompt, output, stop_ids, allowed), params, number)
