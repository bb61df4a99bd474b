"""One forward pass, however it is cut: chunked = one-shot, batched = alone, gradients through it all."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from fourfold.cache.rows import row_formats
from fourfold.core.parameters import Storage, parameters
from fourfold.core.tensor import Weight
from fourfold.engine.oneshot import one_shot, one_shot_with_mtp
from fourfold.model.v4 import DeepseekV4
from tests.support import Driver, build, load_small, prompts, small_config, write_small

pytestmark = pytest.mark.full

EXACT = 1e-9  # largest logit difference in float64
SPARSE = {"index_topk": 12, "sliding_window": 20, "compress_ratios": [0, 4, 128, 4, 0]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DeepseekV4:
    folder = tmp_path_factory.mktemp("invariants") / "c"
    return load_small(write_small(folder, "float32", **SPARSE), torch.float64)


LENGTHS = (263, 140, 31)


@torch.inference_mode()
def test_fifty_random_chunkings_equal_one_shot(model: DeepseekV4) -> None:
    sequences = prompts(model.config.vocab_size, LENGTHS, 1)
    expected = one_shot(model, sequences).logits
    rng = random.Random(2)
    for _ in range(50):
        driver = Driver(model, sequences)
        while driver.unfinished:
            sizes = [0, 1, 2, 3, 4, 5, 19, 20, 21, 64, 127, 128, 129, 300]
            driver.step([rng.choice(sizes) for _ in sequences])
        assert float((driver.all_logits() - expected).abs().max()) < EXACT


@torch.inference_mode()
def test_token_by_token_equals_one_shot(model: DeepseekV4) -> None:
    sequences = prompts(model.config.vocab_size, LENGTHS, 3)
    driver = Driver(model, sequences)
    while driver.unfinished:
        driver.step([1] * len(sequences))
    expected = one_shot(model, sequences).logits
    assert float((driver.all_logits() - expected).abs().max()) < EXACT


@torch.inference_mode()
def test_batched_equals_alone(model: DeepseekV4) -> None:
    sequences = prompts(model.config.vocab_size, (1, 2, 3, 4, 5, 127, 128, 129, 256, 257), 4)
    together = one_shot(model, sequences).logits.split([len(s) for s in sequences])
    for sequence, logits in zip(sequences, together, strict=True):
        alone = one_shot(model, [sequence]).logits
        assert float((alone - logits).abs().max()) < EXACT


@torch.inference_mode()
def test_what_an_observer_sees_is_its_own(model: DeepseekV4) -> None:
    """It may keep it, though ops write where intermediates lay, and overwrite it."""
    sequences = prompts(model.config.vocab_size, (40, 7), 12)
    expected = one_shot(model, sequences).logits
    seen: list[str] = []

    def spoil(name: str, value: torch.Tensor) -> None:
        seen.append(name)
        value.zero_()

    assert torch.equal(one_shot(model, sequences, observe=spoil).logits, expected)
    assert {"embed", "layers.1.attn.q", "layers.1.attn.streams", "logits"} <= set(seen)


@torch.inference_mode()
def test_a_warm_up_run_leaves_no_trace(model: DeepseekV4) -> None:
    """A warm-up that pollutes caches: the slots and pages it used must not show in the next request."""
    config = model.config
    sequences = prompts(config.vocab_size, (150, 40), 5)
    fresh = Driver(model, sequences)
    fresh.step([150, 40])
    used = Driver(model, prompts(config.vocab_size, (150, 40), 6))
    for size in (100, 50):
        used.step([size, size])
    second = Driver(model, sequences)
    second.state, second.block_ids = used.state, used.block_ids[::1]
    for size in (77, 73):
        second.step([size, size])
    assert float((second.all_logits() - fresh.all_logits()).abs().max()) < EXACT


@torch.inference_mode()
def test_fp8_rows_chunked_equal_one_shot_with_fp8_rows(tmp_path: Path) -> None:
    """Attention sees a chunk's own rows already rounded, so rounding does not depend on the cut."""
    model = load_small(write_small(tmp_path / "c", "float32", **SPARSE), torch.float64)
    formats = row_formats(model.config, "float64", "fp8", "fp8")
    sequences = prompts(model.config.vocab_size, (200,), 1)
    expected = one_shot(model, sequences, formats).logits
    plain = one_shot(model, sequences).logits
    assert float((plain - expected).abs().max()) > 1e-4  # the format does something
    for size in (1, 13, 128):
        driver = Driver(model, sequences, formats)
        while driver.unfinished:
            driver.step([size])
        assert float((driver.all_logits() - expected).abs().max()) < EXACT


@torch.inference_mode()
def test_mtp_chunked_equals_one_shot(model: DeepseekV4) -> None:
    tokens = prompts(model.config.vocab_size, (170,), 8)[0]
    _, expected = one_shot_with_mtp(model, [tokens])
    from fourfold.core.batch import ScheduledBatch, ScheduledSequence, lower

    driver, got, done = Driver(model, [tokens]), [], 0
    for size in (1, 30, 100, 38, 1):
        begin, done = done, done + size
        run = ScheduledSequence(
            tokens[begin:done], begin, driver.block_ids[0], 0, 0 if begin else -1, ((size - 1, 0),)
        )
        ratios = model.config.compress_ratios
        batch = lower(ScheduledBatch((run,)), ratios, driver.ring, torch.device("cpu"))
        out = model.forward(batch, driver.state)
        following = torch.tensor([*tokens[1:], 0][begin:done])
        mtp = model.mtp[0].forward(out.streams, following, batch, driver.state.mtp[0])
        got.append(mtp.logits)
    assert float((torch.cat(got) - expected).abs().max()) < EXACT


def random_weights(seed: int = 0, **changes: object) -> tuple[object, dict[str, Weight]]:
    """In-memory float64 weights that want gradients, for a geometry too small for files."""
    config = small_config(
        **{
            "vocab_size": 20,
            "hidden_size": 12,
            "num_attention_heads": 2,
            "head_dim": 8,
            "qk_rope_head_dim": 4,
            "q_lora_rank": 6,
            "o_lora_rank": 4,
            "moe_intermediate_size": 6,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "index_head_dim": 6,
            "index_n_heads": 2,
            "hc_mult": 2,
            "hc_sinkhorn_iters": 3,
            "sliding_window": 6,
            "compress_ratios": [0, 4, 128, 0],
            "num_hidden_layers": 3,
            "num_hash_layers": 1,
            **changes,
        }
    )
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Weight] = {}
    for spec in parameters(config):
        if spec.storage is Storage.INTEGER:
            weights[spec.name] = torch.randint(
                0, config.n_routed_experts, spec.shape, generator=generator
            )
        else:
            value = torch.randn(spec.shape, generator=generator, dtype=torch.float64)
            weights[spec.name] = (0.4 * value + ("norm" in spec.name)).requires_grad_()
    return config, weights


def test_gradcheck_of_the_whole_model() -> None:
    """The one definition is differentiable in every parameter: gradcheck in float64, MTP included.

    133 tokens, so that HCA's first row and CSA's choice (all rows visible are listed) take part.
    """
    config, weights = random_weights()
    floats = [n for n, w in weights.items() if w.is_floating_point()]
    tokens = prompts(20, (133, 5), 1)

    def logits(*values: torch.Tensor) -> torch.Tensor:
        model = build(config, {**weights, **dict(zip(floats, values, strict=True))})
        main, mtp = one_shot_with_mtp(model, tokens)
        return torch.cat([main.logits[::37], mtp[::41]])

    inputs = tuple(weights[n] for n in floats)
    assert torch.autograd.gradcheck(logits, inputs, fast_mode=True, atol=1e-5)


def test_every_parameter_gets_a_gradient_except_the_indexer() -> None:
    """The indexer's choice is not differentiable; it is trained by a loss of its own."""
    config, weights = random_weights()
    model = build(config, weights)
    main, mtp = one_shot_with_mtp(model, prompts(20, (140,), 2))
    (main.logits.square().sum() + mtp.square().sum()).backward()
    silent = {
        n
        for n, w in weights.items()
        if w.is_floating_point() and (w.grad is None or not w.grad.any())
    }
    # Row 0 of an HCA layer is the only one here; its ape and gate act through differences within it.
    assert all(".indexer." in name or name.endswith("gate.bias") for name in silent), silent
