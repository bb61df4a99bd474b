"""What a step takes of memory while it runs: bytes by a formula, without torch.

    step_bytes       the block in which every step that is not captured finds all its tensors
    captured_bytes   the pool that captured steps share, and what each of them keeps

Contract: arithmetic over the configuration. The terms are the tensors that live at once where most of
them do, as kernels and model make and drop them; a test runs the steps on tensors without memory and
holds the formulas to what it counts. It does not know where the bytes come from (memory.py) or what
else there is (capacity.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from fourfold.core.config import EngineConfig, ModelConfig
from fourfold.core.row_format import DTYPE_BYTES, PAGE_TOKENS, table_width

LEAST = 512 << 20  # op bodies compute scores in tiles, libraries keep scratch
GAPS = 1.2  # of one block: tensors of unlike sizes leave gaps between them
SCORES = 256 << 20  # most that an indexer's scores take at once
DECODED = 512 << 20  # most that compressed rows decoded beforehand take
APART = 128 << 20  # most that attention's spans with programs of their own take
SORTED_ROWS = 64  # rows of logits that are sorted at once, with four numbers for each logit

CAPTURED = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)


def capture_sizes(most: int) -> tuple[int, ...]:
    """Batch sizes to capture for up to `most` sequences."""
    steps = range(CAPTURED[-1], most, 64)
    return tuple(sorted({min(size, most) for size in (*CAPTURED, *steps, most)}))


@dataclass(frozen=True)
class _Step:
    """A step of `tokens` tokens, `rows` rows of logits and contexts of up to `longest` tokens.

    `size` and `wide` are bytes of a number as the model computes and as it adds up.
    """

    model: ModelConfig
    tokens: int
    rows: int
    longest: int
    size: int
    wide: int

    @property
    def streams(self) -> int:
        return self.tokens * self.model.hc_mult * self.model.hidden_size * self.size

    @property
    def inputs(self) -> int:
        """A sublayer's input, or its output."""
        return self.tokens * self.model.hidden_size * self.size

    @property
    def queries(self) -> int:
        """Queries: then in the same memory what they attended to, and that turned back."""
        return self.tokens * self.model.num_attention_heads * self.model.head_dim * self.size

    @property
    def logits(self) -> int:
        return self.rows * self.model.vocab_size * self.wide

    @property
    def listed(self) -> int:
        return 8 * self.tokens * self.model.index_topk if self._indexed else 0

    @property
    def _indexed(self) -> bool:
        return any(map(self.model.has_indexer, self.model.compress_ratios))

    def choosing(self) -> int:
        """The indexer's scores beside its queries, plain and rounded, the main ones, and the products
        of both compressors."""
        m = self.model
        products = self.tokens * (
            (m.q_lora_rank + m.head_dim) * self.size
            + 4 * (m.head_dim + m.index_head_dim) * self.wide
        )
        rounded = 2 * self.tokens * m.index_n_heads * m.index_head_dim * self.size
        rows = table_width(self.longest) * PAGE_TOKENS // 4
        scores = min(4 * self.tokens * rows, SCORES)
        if not self._indexed:
            rounded = scores = 0
        return self.inputs + self.queries + products + rounded + self.listed + scores

    def attending(self) -> int:
        """Queries, and cached rows decoded where many queries read them, or for few of them the results
        of spans of 64 rows."""
        dim = self.model.head_dim
        decoded = 2 * dim * min(64 * self.tokens, self.rows * self.longest // 4)
        spans = min(self.tokens, 32) * (4 + self.longest // 128 // 64)
        apart = 4 * spans * self.model.num_attention_heads * dim
        extra = max(min(decoded, DECODED), min(apart, APART))
        return self.inputs + self.queries + self.listed + extra

    def projecting(self) -> int:
        """What was attended to, the grouped outputs, and wo_a's numbers."""
        m = self.model
        grouped = m.o_groups * m.o_lora_rank
        numbers = grouped * m.num_attention_heads // m.o_groups * m.head_dim
        return self.inputs + self.queries + (self.tokens * grouped + numbers) * self.size

    def experts(self) -> int:
        """A result for each of a token's experts, the codes it came from, the router's logits, the
        shared expert's result and the sum."""
        m = self.model
        each = m.hidden_size * self.wide + m.moe_intermediate_size * 33 // 32
        width = m.num_experts_per_tok * each + (m.hidden_size + m.n_routed_experts) * self.wide
        return 2 * self.inputs + self.tokens * width

    def site(self) -> int:
        """Streams before and after, input and output before, input after, and sums over each 64 dims."""
        return self.streams + 4 * self.inputs

    def head(self) -> int:
        """Logits, a copy, and what sorting them takes."""
        return 2 * self.logits + self.sorting()

    def sorting(self) -> int:
        return 4 * min(self.rows, SORTED_ROWS) * self.model.vocab_size * self.wide

    def most(self, drafts: int) -> int:
        """Bytes alive at once. The MTP layer runs while the model's streams and logits are kept."""
        layer = max(self.attending(), self.projecting(), self.experts(), self.site())
        if drafts:
            layer += self.streams + self.logits
        return self.streams + max(layer, self.choosing(), self.head())


def _step(config: EngineConfig, model: ModelConfig, dtype: str, tokens: int) -> _Step:
    longest = min(config.max_model_len or 1 << 62, model.max_position_embeddings)
    rows = min(config.max_num_seqs * (1 + config.num_speculative_tokens), tokens)
    size = DTYPE_BYTES[dtype]
    return _Step(model, tokens, rows, longest, size, max(4, size))


def step_bytes(config: EngineConfig, model: ModelConfig, dtype: str) -> int:
    """A block in which any step finds room for what it makes; `dtype` is the model's."""
    step = _step(config, model, dtype, config.max_num_batched_tokens)
    return max(int(GAPS * step.most(config.num_speculative_tokens)), LEAST)


def captured_bytes(config: EngineConfig, model: ModelConfig, dtype: str) -> int:
    """What captured decode steps take: logits that all of them fill, each one's last streams, and one
    pool for the rest, as they never run at once. 0 if none are captured."""
    if config.enforce_eager:
        return 0
    width = 1 + config.num_speculative_tokens
    step = _step(config, model, dtype, config.max_num_seqs * width)
    streams = sum(capture_sizes(config.max_num_seqs)) * step.streams // config.max_num_seqs
    layer = max(step.choosing(), step.attending(), step.projecting(), step.experts(), step.site())
    return step.logits + streams + max(step.logits, step.sorting(), layer)
