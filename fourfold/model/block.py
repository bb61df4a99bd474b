"""One layer: attention and experts, each between the halves of its hyper-connection site."""

from __future__ import annotations

from fourfold.core.batch import ForwardBatch
from fourfold.core.parameters import Role
from fourfold.core.state import LayerState
from fourfold.model.attention import Attention
from fourfold.model.moe import MoE
from fourfold.model.parts import Context, Notes, Parameters, Sublayer, site

ATTN_SITE = (Role.HC_ATTN_FN, Role.HC_ATTN_BASE, Role.HC_ATTN_SCALE, Role.ATTN_NORM)
FFN_SITE = (Role.HC_FFN_FN, Role.HC_FFN_BASE, Role.HC_FFN_SCALE, Role.FFN_NORM)


class Block:
    """A layer's parameters; `sublayers` binds them to a step's batch and state."""

    def __init__(self, context: Context, p: Parameters, ratio: int, hashed: bool):
        name = p.prefix.removesuffix(".")
        self.attn_name, self.ffn_name = f"{name}.attn", f"{name}.ffn"
        self.attn_site = site(p, context.config, ATTN_SITE)
        self.ffn_site = site(p, context.config, FFN_SITE)
        self.attn = Attention(context, p, ratio, self.attn_name)
        self.ffn = MoE(context, p, hashed, self.ffn_name)

    def sublayers(self, batch: ForwardBatch, state: LayerState, note: Notes) -> list[Sublayer]:
        return [
            Sublayer(self.attn_name, self.attn_site, lambda y: self.attn(y, batch, state, note)),
            Sublayer(self.ffn_name, self.ffn_site, lambda y: self.ffn(y, batch, note)),
        ]
