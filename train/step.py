"""One training step: losses of a batch, gradients, the optimizer, the routers' biases.

Contract: a `Trainer` holds masters and optimizer; `step` takes a batch of token ids, document starts
and loss weights and returns the losses as tensors on the device. No shape depends on values and
nothing is read back. The model is fourfold's; what its layers are made of is not known here.

    loss = cross entropy of token t+1 + 0.3 · (MTP: of token t+2) + 0.1 · Σ foresight of the indexers
    bias += rate · sign(mean load − load), of each learned router
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.cache.rows import RowFormats, row_formats
from fourfold.core.config import ModelConfig
from fourfold.core.parameters import Role, parameters
from fourfold.core.tensor import dtype_name
from fourfold.dist.comm import SingleComm
from fourfold.model.v4 import DeepseekV4
from train.batch import TrainBatch, fresh_state
from train.ops import mixing
from train.ops.plan import Hyper, Trace, train_plan
from train.optimizer import Optimizer
from train.parameters import StepWeights, trained

MTP_SHARE = 0.3
FORESIGHT_SHARE = 0.1


@dataclass(frozen=True)
class Mode:
    """How a step computes: `sparse` lets indexers choose, `quantised` rounds as the files will."""

    sparse: bool = False
    quantised: bool = False


@dataclass(frozen=True)
class Tokens:
    """A batch on the device: `ids [R, L]`, `starts [R, L]` (index in the row of each token's
    document's start), `weights [R, L]` of each token as a target."""

    ids: Tensor
    starts: Tensor
    weights: Tensor


def formats_of(config: ModelConfig, dtype: torch.dtype, quantised: bool) -> RowFormats:
    """The formats rows are rounded to."""
    name = dtype_name(dtype)
    kind = "fp8" if quantised else name
    return row_formats(config, name, kind, kind)


def _cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return (each * weights).sum() / weights.sum().clamp(min=1.0)


class Trainer:
    """Masters, the models that read them (one a mode), and the optimizer."""

    def __init__(
        self,
        config: ModelConfig,
        masters: Mapping[str, Tensor],
        dtype: torch.dtype,
        hyper: Hyper = mixing,
    ):
        self.config, self.masters, self.dtype = config, masters, dtype
        specs = trained(config)
        self.parameters = [masters[spec.name].requires_grad_() for spec in specs]
        self.biases = [masters[s.name] for s in parameters(config) if s.role is Role.GATE_BIAS]
        self.optimizer = Optimizer(specs, masters)
        self.weights = StepWeights(config, masters, dtype)
        device = self.parameters[0].device
        self.trace = Trace(torch.zeros(0, device=device))
        self.lr = torch.zeros((), device=device)
        self.bias_rate = torch.zeros((), device=device)
        self._models = {
            sparse: DeepseekV4(
                config,
                self.weights.values,
                train_plan(dtype, self.trace, sparse, hyper),
                SingleComm(),
            )
            for sparse in (False, True)
        }

    def snapshot(self) -> list[Tensor]:
        """Copies of everything a step changes."""
        return [each.detach().clone() for each in self._changing()]

    @torch.no_grad()
    def restore(self, kept: list[Tensor]) -> None:
        """Undo the steps since `snapshot`."""
        for each, before in zip(self._changing(), kept, strict=True):
            each.copy_(before)

    def _changing(self) -> list[Tensor]:
        return [*self.parameters, *self.biases, *self.optimizer.state()]

    def logits(self, tokens: Tokens, mode: Mode) -> tuple[Tensor, Tensor]:
        """`[R·L, V]` of the token after each, and the MTP layer's of the one after that."""
        config = self.config
        self.trace.clear()
        self.trace.real = (tokens.weights.flatten() > 0).to(torch.float32)
        self.weights.refresh(mode.quantised)
        batch = TrainBatch.of(tokens.ids, tokens.starts, config)
        formats = formats_of(config, self.dtype, mode.quantised)
        state = fresh_state(config, formats, batch, self.dtype)
        model = self._models[mode.sparse]
        out = model.forward(batch, state)
        following = tokens.ids.roll(-1, 1).flatten()
        drafted = model.mtp[0].forward(out.streams, following, batch, state.mtp[0]).logits
        return out.logits, drafted

    def losses(self, tokens: Tokens, mode: Mode) -> dict[str, Tensor]:
        """`total`, `main`, `mtp`, `foresight`."""
        parts = []
        for shift, logits in enumerate(self.logits(tokens, mode), 1):
            targets = tokens.ids.roll(-shift, 1).flatten()
            parts.append(_cross_entropy(logits, targets, _ahead(tokens, shift).flatten()))
        main, mtp = parts
        foresight = torch.stack(self.trace.foresight).sum()
        total = main + MTP_SHARE * mtp + FORESIGHT_SHARE * foresight
        return {"total": total, "main": main, "mtp": mtp, "foresight": foresight}

    def hits(self, tokens: Tokens, mode: Mode) -> tuple[Tensor, Tensor]:
        """Of one row: whether each token is the likeliest after those before it, and whether the MTP
        layer foresaw it; bool `[L]`. Documents' first tokens mean nothing."""
        found = self.logits(tokens, mode)
        one, two = (_predicted(each, tokens.ids[0], n) for n, each in enumerate(found, 1))
        return one, two

    def step(self, tokens: Tokens, mode: Mode) -> dict[str, Tensor]:
        """One step at the learning rate in `lr`; the losses, detached."""
        losses = self.losses(tokens, mode)
        grads = torch.autograd.grad(losses["total"], self.parameters)
        by_master = {id(p): grad for p, grad in zip(self.parameters, grads, strict=True)}
        self.optimizer.step(by_master, self.lr)
        with torch.no_grad():
            for bias, load in zip(self.biases, self.trace.loads, strict=True):
                bias.add_(self.bias_rate * torch.sign(load.mean() - load))
        return {name: loss.detach() for name, loss in losses.items()}


def _predicted(logits: Tensor, ids: Tensor, shift: int) -> Tensor:
    hits = torch.zeros_like(ids, dtype=torch.bool)
    hits[shift:] = logits.argmax(-1)[:-shift] == ids[shift:]
    return hits


def _ahead(tokens: Tokens, shift: int) -> Tensor:
    """The loss weight of the token `shift` ahead, 0 where that is in another document."""
    same = tokens.starts.roll(-shift, 1) == tokens.starts
    same[:, -shift:] = False
    return tokens.weights.roll(-shift, 1) * same
