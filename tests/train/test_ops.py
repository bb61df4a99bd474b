"""What training computes is what the model's definition computes, document by document."""

import dataclasses

import pytest
import torch
from torch import Tensor

from fourfold.core.parameters import Storage, parameters
from fourfold.core.tensor import QuantTensor, Weight
from fourfold.dist.comm import SingleComm
from fourfold.engine.oneshot import one_shot_with_mtp
from fourfold.model.v4 import DeepseekV4
from fourfold.ops.catalog import OPS
from fourfold.ops.indexer import largest
from fourfold.ops.registry import KernelPlan
from fourfold.quant.fp8_block import FP8_BLOCK
from fourfold.quant.mxfp4 import MXFP4
from tests.train.support import LENGTHS, config, documents, masters, pick, tokens
from train.ops.indexer import choose, foresight
from train.ops.rounding import round_expert, round_linear
from train.step import Mode, Trainer, formats_of

TOPK = {True: 8, False: 1000}


def definition(found: dict[str, Weight], sparse: bool) -> DeepseekV4:
    """The model by its op bodies; without `sparse` the indexer lists every row."""
    c = config(index_topk=TOPK[sparse])
    return DeepseekV4(c, found, KernelPlan.bodies(OPS), SingleComm())


@pytest.mark.parametrize("sparse", [False, pytest.param(True, marks=pytest.mark.full)])
def test_logits_and_gradients_are_those_of_the_definition(sparse: bool) -> None:
    c = config(index_topk=TOPK[True])
    shared = masters(c, torch.float64)
    docs = documents()
    trainer = Trainer(c, shared, torch.float64)
    mine = trainer.logits(tokens(docs), Mode(sparse=sparse))
    one, two = pick(mine[0]), pick(mine[1], drop_last=1)
    body, drafted = one_shot_with_mtp(definition(dict(shared), sparse), docs)
    inner = torch.cat([torch.arange(n) < n - 1 for n in LENGTHS])
    assert (one - body.logits).abs().max() < 1e-10
    assert (two - drafted[inner]).abs().max() < 1e-10

    direction = torch.randn(one.shape, generator=torch.Generator().manual_seed(1))
    names = [name for name, value in shared.items() if value.requires_grad]
    found = _gradients((one * direction).sum(), shared, names)
    wanted = _gradients((body.logits * direction).sum(), shared, names)
    for name in names:
        if wanted[name] is None or found[name] is None:
            assert found[name] is wanted[name], name
        else:
            size = wanted[name].abs().max().clamp(min=1e-9)
            assert (found[name] - wanted[name]).abs().max() / size < 1e-9, name


def _gradients(value: Tensor, shared: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    inputs = [shared[name] for name in names]
    grads = torch.autograd.grad(value, inputs, allow_unused=True, retain_graph=True)
    return dict(zip(names, grads, strict=True))


def test_rounding_is_that_of_the_stored_formats() -> None:
    c = config(index_topk=TOPK[True])
    shared = masters(c, torch.float32)
    stored: dict[str, Weight] = {}
    for spec in parameters(c):
        value = shared[spec.name].detach()
        if spec.storage in (Storage.EXPERT, Storage.LINEAR):
            scheme = MXFP4 if spec.storage is Storage.EXPERT else FP8_BLOCK
            stored[spec.name] = QuantTensor(*scheme.quantize(value, "e8m0"), scheme, spec.shape)
        else:
            stored[spec.name] = value
    docs = documents()
    trainer = Trainer(c, shared, torch.float32)
    with torch.no_grad():
        mine = pick(trainer.logits(tokens(docs), Mode(sparse=False, quantised=True))[0])
        unrounded = pick(trainer.logits(tokens(docs), Mode())[0])
    rows = formats_of(c, torch.float32, quantised=True)
    with torch.no_grad():
        wanted = one_shot_with_mtp(definition(stored, sparse=False), docs, rows)[0].logits
    # Sums in another order move single roundings, which is far less than rounding does.
    distance = (mine - wanted).abs().mean()
    assert distance < 0.05 * (unrounded - wanted).abs().mean()
    assert (mine.argmax(-1) == wanted.argmax(-1)).float().mean() > 0.99


def test_rounded_weights_are_what_is_stored() -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(3, 160, 192, generator=generator) * 3
    value[0, 0, :8] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    value[0, 0, 8:32] = 0
    for scheme, rounded in ((MXFP4, round_expert(value)), (FP8_BLOCK, round_linear(value))):
        assert torch.equal(
            rounded, scheme.dequantize(*scheme.quantize(value, "e8m0"), torch.float32)
        )
    value.requires_grad_()
    assert torch.equal(
        torch.autograd.grad(round_expert(value).sum(), value)[0], torch.ones_like(value)
    )


def test_rows_are_chosen_as_the_indexer_lists_them() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (2, 40, 30), generator=generator).float()
    scores[:, :20, 10:] = float("-inf")
    chosen = choose(scores, 12)
    for row, mask in zip(scores.flatten(0, 1), chosen.flatten(0, 1), strict=True):
        listed = [int(i) for i in largest(row[None], 12)[0] if row[i] > float("-inf")]
        assert mask.nonzero().squeeze(-1).tolist() == listed


def test_foresight_is_zero_only_where_attention_is_foreseen() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 6, 9, generator=generator)
    seen = torch.rand(1, 6, 9, generator=generator) < 0.7
    seen[:, :, 0] = True
    right = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1)
    assert foresight(scores, 0.3 * right, seen) < 1e-6
    assert foresight(scores, 0.3 * right.roll(1, -1) * seen, seen) > 0.01


def test_indexers_learn_without_moving_what_they_read() -> None:
    c = config(index_topk=TOPK[True])
    shared = masters(c, torch.float32)
    trainer = Trainer(c, shared, torch.float32)
    losses = trainer.losses(tokens(documents()), Mode())
    names = [name for name, value in shared.items() if value.requires_grad]
    found = _gradients(losses["foresight"], shared, names)
    moved = {name for name, grad in found.items() if grad is not None and bool(grad.any())}
    assert moved
    assert all(".indexer." in name for name in moved)


def test_losses_stay_within_documents() -> None:
    c = config()
    trainer = Trainer(c, masters(c, torch.float32), torch.float32)
    given = tokens(documents())
    mode = Mode()
    before = trainer.losses(given, mode)
    # Other tokens where no target is: the fill of a row changes nothing.
    ids = torch.where(given.weights > 0, given.ids, (given.ids + 7) % 64)
    after = trainer.losses(dataclasses.replace(given, ids=ids), mode)
    for name in ("main", "mtp"):
        assert torch.allclose(before[name], after[name], atol=1e-6), name
