"""Two optimizers in one: orthogonalised momentum for matrices, AdamW for the rest.

    matrices   M ← μM + (1−μ)G;  U = orthogonalise((1−μ)G + μM);  W ← (1 − lr·λ)W − lr·0.2·√max(n,k)·U
    the rest   AdamW: tables, norms, hyper-connections, sinks

Contract: all state begins at zero, so that training resumes from weights alone with a warm-up. The
learning rate is a tensor on the device; nothing is read back, so a step can be captured.
Orthogonalisation is Newton-Schulz iteration with the coefficients of K. Jordan's Muon; the scale 0.2
makes its steps as large as AdamW's (Moonlight, section 2.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fourfold.core.parameters import ParamSpec, Role, Storage

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_TABLES = (Role.EMBED, Role.HEAD)


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices of `matrices [B, n, k]`, roughly (singular values near 1)."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    x = x.transpose(-1, -2) if tall else x
    x = x / (torch.linalg.matrix_norm(x.float(), keepdim=True).to(x.dtype) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.transpose(-1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(-1, -2) if tall else x


class _Matrices:
    """All matrices of one shape, stacked."""

    def __init__(self, masters: Sequence[Tensor], momentum: float, decay: float):
        self.masters, self.momentum, self.decay = list(masters), momentum, decay
        self.shape = masters[0].shape[-2:]
        self.counts = [master.numel() // self.shape.numel() for master in masters]
        first = masters[0]
        self.mean = torch.zeros(sum(self.counts), *self.shape, device=first.device)

    def step(self, grads: Mapping[int, Tensor], lr: Tensor) -> None:
        grad = torch.cat([grads[id(m)].reshape(-1, *self.shape) for m in self.masters])
        self.mean.lerp_(grad, 1 - self.momentum)
        update = orthogonalise(grad.lerp(self.mean, self.momentum)).to(grad.dtype)
        update *= 0.2 * max(self.shape) ** 0.5 * lr
        for master, part in zip(self.masters, update.split(self.counts), strict=True):
            master.mul_(1 - lr * self.decay).sub_(part.view(master.shape))


class Optimizer:
    """`step` changes the masters by their gradients."""

    def __init__(
        self,
        specs: Sequence[ParamSpec],
        masters: Mapping[str, Tensor],
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        decay: float = 0.02,
    ):
        groups: dict[tuple[int, ...], list[Tensor]] = {}
        self._others: list[Tensor] = []
        for spec in specs:
            matrix = len(spec.shape) > 1 and spec.storage is not Storage.FLOAT
            if matrix and spec.role not in _TABLES:
                groups.setdefault(spec.shape[-2:], []).append(masters[spec.name])
            else:
                self._others.append(masters[spec.name])
        self._matrices = [_Matrices(group, momentum, decay) for group in groups.values()]
        self._betas = betas
        self._first = [torch.zeros_like(p) for p in self._others]
        self._second = [torch.zeros_like(p) for p in self._others]
        self._powers = torch.ones(2, device=self._others[0].device)
        self._beta = torch.tensor(betas, device=self._powers.device)

    def state(self) -> list[Tensor]:
        """All state tensors."""
        means = [group.mean for group in self._matrices]
        return [*means, *self._first, *self._second, self._powers]

    @torch.no_grad()
    def step(self, grads: Mapping[int, Tensor], lr: Tensor) -> None:
        """One step; `grads` by the identity of the master, `lr` a scalar on the masters' device."""
        for group in self._matrices:
            group.step(grads, lr)
        low, high = self._betas
        found = [grads[id(p)] for p in self._others]
        self._powers.mul_(self._beta)
        torch._foreach_lerp_(self._first, found, 1 - low)
        torch._foreach_mul_(self._second, high)
        torch._foreach_addcmul_(self._second, found, found, 1 - high)
        size = torch._foreach_sqrt(self._second)
        torch._foreach_mul_(size, torch.rsqrt(1 - self._powers[1]))
        torch._foreach_add_(size, 1e-10)
        update = torch._foreach_div(self._first, size)
        torch._foreach_mul_(update, lr / (1 - self._powers[0]))
        torch._foreach_sub_(self._others, update)
