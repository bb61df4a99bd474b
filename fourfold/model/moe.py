"""The mixture-of-experts sublayer: router, routed experts, shared expert."""

from __future__ import annotations

from torch import Tensor

from fourfold.core.batch import ForwardBatch
from fourfold.core.parameters import Role
from fourfold.dist.comm import Group
from fourfold.model.parts import Context, Notes, Parameters


class MoE:
    """One layer's experts. `hashed` layers pick experts by token id, others by score and bias."""

    def __init__(self, context: Context, p: Parameters, hashed: bool, name: str):
        self.ops, self.comm, self.config = context.ops, context.comm, context.config
        self.name = name
        self.gate = p.weight(Role.GATE)
        self.table = p.tensor(Role.TID2EID) if hashed else None
        self.bias = None if hashed else p.tensor(Role.GATE_BIAS)
        w1, w2, w3 = (p.weight(r) for r in (Role.EXPERT_W1, Role.EXPERT_W2, Role.EXPERT_W3))
        self.experts = (w1, w2, w3)
        self.shared_w2 = p.weight(Role.SHARED_W2)
        self.first = (self.gate, p.weight(Role.SHARED_W1), p.weight(Role.SHARED_W3))
        # Experts split by expert: this rank's first. Split inside each expert: all are here, first 0.
        rank = context.comm.rank(Group.EXPERT)
        self.first_expert = rank * w1.shape[0] % context.config.n_routed_experts

    def __call__(self, y: Tensor, batch: ForwardBatch, note: Notes) -> Tensor:
        """`y [T, D]` → `[T, D]`."""
        ops, c = self.ops, self.config
        logits, shared_gate, shared_up = ops.linears(y, self.first, (True, True, True))
        if self.table is not None:
            ids, weights = ops.route_hash(
                logits, batch.token_ids, self.table, c.routed_scaling_factor
            )
        else:
            ids, weights = ops.route_topk(
                logits, self.bias, c.num_experts_per_tok, c.routed_scaling_factor
            )
        note(f"{self.name}.logits", logits)
        note(f"{self.name}.ids", ids)
        note(f"{self.name}.weights", weights)
        limit = c.swiglu_limit
        shared = ops.shared_expert(shared_gate, shared_up, self.shared_w2, limit, y.dtype)
        del shared_gate, shared_up  # in a prompt's step 128 MiB and more
        z = ops.moe(y, ids, weights, self.experts, shared, limit, self.first_expert)
        return self.comm.all_reduce(z)
