"""Every sampling parameter: the ops against the definitions, and the engine, with drafts and without,
against the same definitions applied to logits of whole-sequence passes."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fourfold.core.config import EngineConfig
from fourfold.core.device import detect
from fourfold.core.request import FinishReason, Request, RequestOutput, SamplingParams
from fourfold.engine.engine import Engine
from fourfold.engine.loading import LoadedModel, load_model
from fourfold.engine.oneshot import one_shot
from fourfold.engine.sampler import changed_logits
from fourfold.engine.sequence import Sequence as EngineSequence
from fourfold.model.parts import ForwardOutput
from fourfold.model.v4 import DeepseekV4
from fourfold.ops.sampling import (
    Adjustments,
    SamplingRows,
    adjust_logits,
    count_accepted,
    sample,
    token_logprobs,
)
from fourfold.weights.locate import locate
from tests.engine.sampling_reference import adjusted, distribution, next_token, pick
from tests.support import prompts, write_small

pytestmark = pytest.mark.full

VOCAB, EOS = 192, 1
FREE = SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.4, seed=3)
# Each parameter alone and some together, at values where it changes what is sampled.
VARIANTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 1.3},
    "top_k": {"top_k": 4},
    "top_k of one": {"top_k": 1},
    "top_k off": {"top_k": -1},
    "top_k beyond every vocabulary": {"top_k": 10**30},
    "top_p": {"top_p": 0.4},
    "min_p": {"min_p": 0.3},
    "all three": {"top_k": 20, "top_p": 0.8, "min_p": 0.05},
    "repetition": {"repetition_penalty": 1.4},
    "repetition below one": {"repetition_penalty": 0.8},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 1.5},
    "penalties": {"repetition_penalty": 1.2, "presence_penalty": -0.5, "frequency_penalty": 0.7},
    "greedy with penalties": {"temperature": 0.0, "repetition_penalty": 1.3},
    "bias": {"logit_bias": {5: 3.5, 9: 3.0, 100: -100.0}},
    "bias and penalties": {"logit_bias": {5: 4.0, 9: 4.0}, "frequency_penalty": 1.0},
    "min_tokens": {"ignore_eos": False, "min_tokens": 6, "logit_bias": {EOS: 4.5}},
    "no min_tokens": {"ignore_eos": False, "logit_bias": {EOS: 4.5}},
    "stop tokens": {"stop_token_ids": list(range(40, 60))},
    "stop tokens after min_tokens": {"stop_token_ids": list(range(40, 60)), "min_tokens": 8},
    "another seed": {"seed": 2**63 - 1},
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = write_small(
        tmp_path_factory.mktemp("sampling") / "c",
        "float32",
        seed=5,
        index_topk=10,
        sliding_window=24,
        num_hidden_layers=2,
        compress_ratios=[4, 128, 0],
        hidden_size=32,
    )
    config = EngineConfig(model=str(folder), dtype="float64")
    return load_model(locate(config.model), config, detect("cpu"))


def start(loaded: LoadedModel, allowed: Iterable[int] | None = None, **changes: Any) -> Engine:
    settings = {"max_num_seqs": 6, "max_model_len": 400, **changes}
    return Engine(loaded, EngineConfig(model="m", dtype="float64", **settings), allowed)


def outputs(
    engine: Engine, requests: Sequence[tuple[Sequence[int], SamplingParams]]
) -> list[list[RequestOutput]]:
    """All outputs of each request's first sequence, run together."""
    for number, (tokens, params) in enumerate(requests):
        engine.add(Request(str(number), tuple(tokens), params))
    got: dict[str, list[RequestOutput]] = {str(n): [] for n in range(len(requests))}
    for output in engine.run():
        if output.index == 0:
            got[output.request_id].append(output)
    assert engine.scheduler.cache.pages.num_used == 0
    return list(got.values())


def tokens_of(got: Sequence[RequestOutput]) -> list[int]:
    return [token for output in got for token in output.new_token_ids]


# ---- the ops ----


def rows(params: Sequence[SamplingParams], numbers: Sequence[float]) -> SamplingRows:
    return SamplingRows(
        torch.tensor([p.temperature for p in params], dtype=torch.float32),
        torch.tensor([p.top_p for p in params], dtype=torch.float32),
        torch.tensor([max(p.top_k, 0) for p in params]),
        torch.tensor([p.min_p for p in params], dtype=torch.float32),
        torch.tensor(numbers, dtype=torch.float64),
    )


def random_params(rng: random.Random) -> SamplingParams:
    # Powers of two and their sums, so that float32 holds what the reference computes with.
    return SamplingParams(
        temperature=rng.choice([0.0, 0.25, 0.5, 1.0, 1.5]),
        top_p=rng.choice([1.0, 0.9375, 0.5, 0.0625]),
        top_k=rng.choice([0, 0, 1, 3, 17, 1000]),
        min_p=rng.choice([0.0, 0.0, 0.125, 0.75, 1.0]),
    )


def test_sampled_tokens_are_those_of_the_definition() -> None:
    rng = random.Random(1)
    params = [random_params(rng) for _ in range(1500)]
    numbers = [rng.choice([0.0, rng.random(), rng.random(), 1 - 2**-53]) for _ in params]
    logits = torch.randn(len(params), 40) * 2
    logits[::3] = (logits[::3] * 2).round() / 2  # many equal ones
    logits[torch.rand_like(logits) < 0.1] = float("-inf")
    got = sample(logits, rows(params, numbers)).tolist()
    wide = logits.double().numpy()
    expected = [pick(row, p, u) for row, p, u in zip(wide, params, numbers, strict=True)]
    assert got == expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"top_k": 6, "top_p": 0.7, "min_p": 0.05},
    ],
)
def test_frequencies_over_all_numbers_are_the_probabilities(changes: dict[str, Any]) -> None:
    """Evenly spaced numbers: each token's share is its probability, to one part in their count."""
    count, params = 4000, SamplingParams(**changes)
    logits = torch.randn(12) * 1.5
    numbers = [(i + 0.5) / count for i in range(count)]
    got = sample(logits.expand(count, -1), rows([params] * count, numbers))
    share = torch.bincount(got, minlength=12).double() / count
    assert np.abs(share.numpy() - distribution(logits.numpy(), params)).max() <= 1.5 / count


def test_equal_logits_go_by_id_and_barred_ones_never() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0], [float("-inf"), 0.0, float("-inf"), -30.0]])
    greedy, warm = SamplingParams(temperature=0.0), SamplingParams(top_k=2)
    assert sample(logits, rows([greedy] * 2, [0.9, 0.9])).tolist() == [1, 1]
    assert sample(logits, rows([warm] * 2, [0.4999, 1 - 2**-53])).tolist() == [1, 3]
    assert sample(logits[:1], rows([warm], [0.5001])).tolist() == [2]


def test_rows_do_not_touch_each_other_not_even_with_nan() -> None:
    params = [random_params(random.Random(n)) for n in range(30)]
    numbers = [n / 30 for n in range(30)]
    logits = torch.randn(30, 50)
    alone = [
        int(sample(logits[n : n + 1], rows(params[n : n + 1], numbers[n : n + 1])))
        for n in range(30)
    ]
    poisoned = logits.clone()
    poisoned[7], poisoned[19, 3] = float("nan"), float("nan")
    got = sample(poisoned, rows(params, numbers)).tolist()
    assert [t for n, t in enumerate(got) if n not in (7, 19)] == [
        t for n, t in enumerate(alone) if n not in (7, 19)
    ]
    assert all(0 <= token < 50 for token in got)


def test_adjustments_change_the_named_logits_only() -> None:
    logits = torch.tensor([[2.0, -2.0, 0.0, 1.0], [2.0, -2.0, 0.0, 1.0]])
    changes = Adjustments(
        torch.tensor([0, 0, 0, 1]),
        torch.tensor([0, 1, 3, 2]),
        torch.tensor([2.0, 2.0, 1.0, 1.0]),
        torch.tensor([0.5, -1.0, float("-inf"), 4.0]),
    )
    before = logits.clone()
    inf = float("inf")
    expected = torch.tensor([[1.5, -5.0, 0.0, -inf], [2.0, -2.0, 4.0, 1.0]])
    assert torch.equal(adjust_logits(logits, changes, None), expected)
    allowed = torch.tensor([True, True, False, True])
    expected[:, 2] = -inf
    assert torch.equal(adjust_logits(logits, changes, allowed), expected)
    by_row = torch.tensor([[True, True, True, True], [False, True, False, True]])
    got = adjust_logits(logits, None, by_row)
    assert torch.equal(got[0], logits[0])
    assert got[1].tolist() == [-inf, -2.0, -inf, 1.0]
    assert adjust_logits(logits, None, None) is logits
    assert torch.equal(logits, before)


def test_accepted_are_the_leading_equal_ones() -> None:
    sampled = torch.randint(0, 3, (500, 4))
    drafts = torch.randint(-1, 3, (500, 3))
    expected = [
        next((i for i, (a, b) in enumerate(zip(s, d, strict=False)) if a != b), 3)
        for s, d in zip(sampled.tolist(), drafts.tolist(), strict=True)
    ]
    assert count_accepted(sampled, drafts).tolist() == expected
    assert set(expected) == {0, 1, 2, 3}


def test_log_probabilities_and_ranks() -> None:
    logits = (torch.randn(40, 30) * 3).double()
    logits[5, 4] = logits[5, 9]
    tokens = torch.randint(0, 30, (40,))
    own, rank, top, values = token_logprobs(logits, tokens, 5)
    shifted = logits.numpy() - logits.numpy().max(-1, keepdims=True)
    expected = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    for n, token in enumerate(tokens.tolist()):
        assert abs(float(own[n]) - expected[n, token]) < 1e-5
        assert int(rank[n]) == 1 + int((expected[n] > expected[n, token]).sum())
        best = sorted(range(30), key=lambda t: (-logits[n, t].item(), t))[:5]
        assert top[n].tolist() == best
        assert np.abs(values[n].numpy() - expected[n, best]).max() < 1e-5
    assert token_logprobs(logits, tokens, 0)[2].shape == (40, 0)


@pytest.mark.parametrize("seed", range(5))
def test_changed_logits_are_the_definition_at_every_draft(seed: int) -> None:
    """Drafts count as output: the row after them is adjusted as if they had been sampled."""
    rng = random.Random(seed)
    prompt = tuple(rng.randrange(10) for _ in range(rng.randrange(1, 9)))
    output = [rng.randrange(12) for _ in range(rng.randrange(6))]
    drafts = [rng.randrange(14) for _ in range(3)]
    params = SamplingParams(
        min_tokens=rng.randrange(9),
        repetition_penalty=rng.choice([1.0, 1.5, 0.7]),
        presence_penalty=rng.choice([0.0, 1.25, -0.5]),
        frequency_penalty=rng.choice([0.0, 0.75]),
        logit_bias={3: 2.0, 15: -1.0},
    )
    sequence = EngineSequence(
        Request("a", prompt, params), 0, 0, 0, 50, (4, 15), b"", [*prompt, *output]
    )
    logits = torch.randn(1, 20)
    for count in range(4):
        changes = changed_logits(sequence, drafts[:count])
        lists = [
            torch.zeros(len(changes), dtype=torch.int64),
            torch.tensor([*changes], dtype=torch.int64),
            torch.tensor([factor for factor, _ in changes.values()]),
            torch.tensor([addend for _, addend in changes.values()]),
        ]
        got = adjust_logits(logits, Adjustments(*lists), None)[0]
        expected = adjusted(
            logits[0].double().numpy(), params, prompt, [*output, *drafts[:count]], (4, 15)
        )
        assert torch.allclose(got.double(), torch.from_numpy(expected), atol=1e-5)


# ---- the engine ----


def expected_tokens(
    loaded: LoadedModel,
    prompt: Sequence[int],
    got: Sequence[int],
    params: SamplingParams,
    allowed: set[int] | None = None,
) -> list[int]:
    """What the definition samples after each prefix of the answer."""
    with torch.inference_mode():
        logits = one_shot(loaded.model, [[*prompt, *got]]).logits.float().double().numpy()
    stops = [*([] if params.ignore_eos else [EOS]), *params.stop_token_ids]
    assert params.seed is not None
    return [
        next_token(
            logits[len(prompt) - 1 + n], params, prompt, got[:n], stops, params.seed, allowed
        )
        for n in range(len(got))
    ]


@pytest.mark.parametrize("drafts", [0, 3])
def test_every_parameter_through_the_engine(loaded: LoadedModel, drafts: int) -> None:
    """All variants in one engine, six at a time, so that each has others for neighbours."""
    params = [replace(FREE, **changes) for changes in VARIANTS.values()]
    prompt_ids = prompts(VOCAB, [9 + 5 * n % 30 for n in range(len(params))], 4)
    work = list(zip(prompt_ids, params, strict=True))
    engine = start(loaded, num_speculative_tokens=drafts)
    plain = outputs(start(loaded), [(p, replace(FREE)) for p in prompt_ids])
    changed = 0
    for (prompt, each), got, before, name in zip(
        work, outputs(engine, work), plain, VARIANTS, strict=True
    ):
        answer, last = tokens_of(got), got[-1]
        assert answer == expected_tokens(loaded, prompt, answer, each), name
        changed += answer != tokens_of(before)[: len(answer)]
        stops = {*each.stop_token_ids, *(() if each.ignore_eos else (EOS,))}
        assert not stops & {*answer[:-1]}, name
        assert (last.finish_reason is FinishReason.STOP) == (answer[-1] in stops)
        if last.finish_reason is FinishReason.STOP:
            assert last.stop_reason == answer[-1]
            assert len(answer) > each.min_tokens
        else:
            assert last.finish_reason is FinishReason.LENGTH
            assert last.stop_reason is None
            assert len(answer) == 20
        assert all(output.finish_reason is None for output in got[:-1])
    # All but "top_k off", "top_k beyond" and variants that happen to change nothing in 20 tokens.
    assert changed >= len(VARIANTS) - 5


@pytest.mark.parametrize("drafts", [0, 2])
def test_end_of_sequence_and_its_exceptions(loaded: LoadedModel, drafts: int) -> None:
    """A model that always wants to end: it may at once, may not before min_tokens, need not at all."""
    wants = replace(FREE, ignore_eos=False, logit_bias={EOS: 100.0}, max_tokens=9)
    prompt = prompts(VOCAB, (20,), 6)[0]
    work = [wants, replace(wants, min_tokens=5), replace(wants, ignore_eos=True)]
    engine = start(loaded, num_speculative_tokens=drafts)
    at_once, later, never = outputs(engine, [(prompt, params) for params in work])
    assert tokens_of(at_once) == [EOS]
    assert at_once[-1].finish_reason is FinishReason.STOP
    assert EOS not in tokens_of(later)[:5]
    assert tokens_of(later)[5:] == [EOS]
    assert tokens_of(never) == [EOS] * 9
    assert never[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("drafts", [0, 2])
def test_ids_that_are_not_allowed_are_neither_sampled_nor_drafted(
    loaded: LoadedModel, drafts: int
) -> None:
    allowed = set(range(2, VOCAB, 3))
    params = [
        replace(FREE, logit_bias={3: 100.0, 4: 100.0}),
        replace(FREE, temperature=0.0),
        replace(FREE, temperature=2.0, max_tokens=60),
    ]
    prompt = prompts(VOCAB, (30,), 7)[0]
    engine = start(loaded, allowed, num_speculative_tokens=drafts)
    drafted: set[int] = set()
    for number, each in enumerate(params):
        engine.add(Request(str(number), tuple(prompt), each))
    got: dict[str, list[int]] = {"0": [], "1": [], "2": []}
    while engine.has_work:
        for output in engine.step():
            got[output.request_id] += output.new_token_ids
        drafted |= {t for s in engine.scheduler.running for t in s.drafts}
    for number, each in enumerate(params):
        answer = got[str(number)]
        assert set(answer) <= allowed
        assert answer == expected_tokens(loaded, prompt, answer, each, allowed)
    assert drafted <= allowed
    assert bool(drafted) == bool(drafts)


@pytest.mark.parametrize("drafts", [0, 3])
def test_log_probabilities_are_the_models_own(loaded: LoadedModel, drafts: int) -> None:
    """Of what was sampled, before any adjustment, with rank and alternatives; and of the prompt."""
    params = replace(
        FREE, temperature=1.0, logprobs=4, prompt_logprobs=2, logit_bias={7: 5.0}, top_k=9
    )
    prompt = prompts(VOCAB, (40,), 8)[0]
    got = outputs(start(loaded, num_speculative_tokens=drafts), [(prompt, params)])[0]
    answer = tokens_of(got)
    with torch.inference_mode():
        logits = one_shot(loaded.model, [[*prompt, *answer]]).logits
    values = torch.log_softmax(logits, -1)
    entries = [entry for output in got for entry in output.logprobs]
    assert [entry.token_id for entry in entries] == answer
    assert got[0].prompt_logprobs is not None
    assert got[0].prompt_logprobs[0] is None
    assert all(output.prompt_logprobs is None for output in got[1:])
    known = [entry for entry in got[0].prompt_logprobs if entry is not None]
    for position, entry in enumerate([*known, *entries]):
        row = values[position]
        assert entry.token_id == [*prompt, *answer][position + 1]
        assert abs(entry.logprob - float(row[entry.token_id])) < 1e-4
        assert entry.rank == 1 + int((row > row[entry.token_id]).sum())
        count = 2 if position < len(known) else 4
        best = torch.sort(row, descending=True, stable=True)
        assert [token for token, _ in entry.top] == best.indices[:count].tolist()
        assert max(abs(v - float(row[t])) for t, v in entry.top) < 1e-4


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_seed_means_the_same_whoever_else_is_there(loaded: LoadedModel, drafts: int) -> None:
    tokens = prompts(VOCAB, (12, 30, 5, 17, 40), 9)
    work = [(p, replace(FREE, seed=n, temperature=1.0)) for n, p in enumerate(tokens)]
    alone = [tokens_of(outputs(start(loaded), [one])[0]) for one in work]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        engine = start(loaded, num_speculative_tokens=drafts, max_num_seqs=3)
        together = outputs(engine, [work[n] for n in order])
        assert [tokens_of(got) for got in together] == [alone[n] for n in order]


def test_without_a_seed_requests_differ_and_an_engine_repeats_itself(loaded: LoadedModel) -> None:
    prompt = prompts(VOCAB, (12,), 10)[0]
    work = [(prompt, replace(FREE, seed=None, temperature=1.0))] * 3
    first, again = ([tokens_of(g) for g in outputs(start(loaded), work)] for _ in range(2))
    other = [tokens_of(got) for got in outputs(start(loaded, seed=1), work)]
    assert len({tuple(answer) for answer in first}) == 3
    assert first == again
    assert not {tuple(a) for a in first} & {tuple(a) for a in other}


class Poison:
    """Makes what the model returns for one request not finite, from its n-th sampled token on."""

    def __init__(self, engine: Engine, request_id: str, after: int, where: str, value: float):
        self.engine, self.request_id, self.after = engine, request_id, after
        self.where, self.value, self.done = where, value, False

    def __call__(self, original: Any, model: Any, batch: Any, state: Any) -> ForwardOutput:
        out = original(model, batch, state)
        for sequence in self.engine.scheduler.running:
            mine = sequence.request.request_id == self.request_id
            if mine and sequence.num_output_tokens >= self.after:
                numbers = (batch.state_slots == sequence.state_slot).nonzero().flatten()
                if self.where == "logits":
                    self.spoil(out.logits, batch.sequence_ids[batch.logits_tokens], numbers)
                else:
                    self.spoil(out.streams, batch.sequence_ids, numbers)
        flags = model.ops.nonfinite_sequences(out.streams, batch.sequence_ids, batch.num_sequences)
        return replace(out, nonfinite=flags)

    def spoil(self, tensor: Tensor, owners: Tensor, numbers: Tensor) -> None:
        mine = torch.isin(owners, numbers)
        tensor[mine.nonzero().flatten()[-1:]] = self.value


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("where", ["logits", "streams"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_end_that_request_alone(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, drafts: int, where: str, value: float
) -> None:
    tokens = prompts(VOCAB, (12, 260, 31), 11)
    work = [(p, replace(FREE, seed=n, temperature=1.0)) for n, p in enumerate(tokens)]
    expected = [tokens_of(got) for got in outputs(start(loaded), work)]
    engine = start(loaded, num_speculative_tokens=drafts)
    poison = Poison(engine, "1", 5, where, value)
    original = DeepseekV4.forward
    with monkeypatch.context() as patch:
        patch.setattr(
            DeepseekV4, "forward", lambda model, batch, state: poison(original, model, batch, state)
        )
        got = outputs(engine, work)
    assert tokens_of(got[0]) == expected[0]
    assert tokens_of(got[2]) == expected[2]
    assert got[1][-1].finish_reason is FinishReason.ERROR
    assert "not finite" in str(got[1][-1].error)
    assert got[1][-1].new_token_ids == ()
    answer = tokens_of(got[1])
    assert 5 <= len(answer) <= 5 + drafts
    assert answer == expected[1][: len(answer)]
    assert all(output.error is None for n in (0, 2) for output in got[n])
    # What is left behind, pages and images included, harms nobody either.
    assert [tokens_of(again) for again in outputs(engine, work)] == expected
