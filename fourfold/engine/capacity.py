"""What a model's memory goes to: weights, workspace, fixed bytes a request, bytes a token, what fits.

    weights | workspace | images | slots: max_num_seqs × slot_bytes | pages: num_pages × page_bytes |

Contract: arithmetic over the configuration alone, torch-free, so that the same figures are known with
and without a device, weights or the memory to hold them. Slots and pages are exact to the byte; the
workspace is what a step makes and drops (workspace.py). All of it is set aside at the start, so that
nothing grows later. A geometry that does not fit is refused with the numbers. It does not know how
much memory a device has free (memory.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from fourfold.cache.rows import RowFormats, page_bytes, row_formats, slot_bytes
from fourfold.core.config import EngineConfig, ModelConfig
from fourfold.core.errors import CapacityError
from fourfold.core.request import MAX_STOP_TOKENS
from fourfold.core.row_format import PAGE_TOKENS, pages_for, table_width
from fourfold.engine.workspace import captured_bytes, step_bytes

_LEAST_CONTEXT = 4 * PAGE_TOKENS  # the table's first row


@dataclass(frozen=True)
class Capacity:
    """Bytes of everything the engine sets aside; pages of `PAGE_TOKENS` tokens; the longest sequence.

    `weight_bytes` are the parameters as loaded, `image_bytes` the most that state images of the
    prefix cache take on the device, `slot_bytes` a sequence's state beside its pages and its row of the
    slot table.
    """

    weight_bytes: int
    workspace_bytes: int
    image_bytes: int
    page_bytes: int
    slot_bytes: int
    num_slots: int
    num_pages: int
    max_model_len: int

    @property
    def state_bytes(self) -> int:
        """All slots and pages."""
        return self.num_slots * self.slot_bytes + self.num_pages * self.page_bytes

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.workspace_bytes + self.image_bytes + self.state_bytes

    def concurrency(self, context: int) -> int:
        """How many sequences of `context` tokens fit at once."""
        if context > self.max_model_len:
            return 0
        return min(self.num_slots, self.num_pages // pages_for(context))

    def table(self) -> list[tuple[int, int]]:
        """(context, how many fit at once) up to the longest sequence, each context 4 times the last."""
        contexts = [_LEAST_CONTEXT]
        while contexts[-1] * 4 < self.max_model_len:
            contexts.append(contexts[-1] * 4)
        contexts = [*(c for c in contexts if c < self.max_model_len), self.max_model_len]
        return [(context, self.concurrency(context)) for context in contexts]

    def describe(self) -> list[str]:
        """Lines for a person: what memory goes to, and a table of context × concurrency."""
        slots, pages = self.num_slots * self.slot_bytes, self.num_pages * self.page_bytes
        return [
            f"weights:   {_size(self.weight_bytes)}",
            f"workspace: {_size(self.workspace_bytes)} for a step's intermediates",
            f"images:    {_size(self.image_bytes)} at most for the prefix cache's state images",
            f"state:     {_size(slots)}, {self.slot_bytes / 2**20:.2f} MiB a request "
            f"({self.num_slots} slots)",
            f"cache:     {_size(pages)}, {self.page_bytes / PAGE_TOKENS:.0f} bytes a token "
            f"({self.num_pages} pages of {PAGE_TOKENS} tokens)",
            "what fits at once:",
            *(
                f"  {context:>9,} tokens of context: {count:>5} requests"
                for context, count in self.table()
            ),
        ]


def _size(count: int) -> str:
    """Bytes with three digits or so and a binary unit."""
    if count < 2**30:
        return f"{count / 2**20:.2f} MiB"
    return f"{count / 2**30:.2f} GiB"


def engine_row_formats(config: EngineConfig, model: ModelConfig, dtype: str) -> RowFormats:
    """The formats of an engine's cached rows; `dtype` is the model's."""
    return row_formats(model, dtype, config.cache.kv_cache_dtype, config.cache.index_cache_dtype)


def image_bytes(config: EngineConfig) -> int:
    """Bytes that state images may take on the device."""
    return config.cache.device_image_bytes if config.cache.enable_prefix_caching else 0


def table_bytes(drafts: int, longest: int) -> int:
    """Bytes of a row of the slot table (slots.py) for sequences of up to `longest` tokens.

    64-bit integers: the last token and drafts; length, fold version, end, random stream, top_k; stop
    tokens; pages. Then three sampling parameters in float32, and whether it is alive.
    """
    integers = (1 + drafts) + 5 + (1 + MAX_STOP_TOKENS) + table_width(longest)
    return 8 * integers + 3 * 4 + 1


def workspace_bytes(config: EngineConfig, model: ModelConfig, dtype: str) -> int:
    """A block for what a step makes and drops, and what captured steps keep (workspace.py). The slot of
    nobody is lost in the rounding."""
    return step_bytes(config, model, dtype) + captured_bytes(config, model, dtype)


def plan_capacity(
    config: EngineConfig, model: ModelConfig, dtype: str, weight_bytes: int, available: int
) -> Capacity:
    """Pages and the longest request, given `available` bytes for workspace, images and state.

    `dtype` is the model's. Raises `CapacityError`.
    """
    slots, drafts = config.max_num_seqs, config.num_speculative_tokens
    formats = engine_row_formats(config, model, dtype)
    longest = config.max_model_len or model.max_position_embeddings
    per_page, state = page_bytes(model, formats), slot_bytes(model, formats, dtype, drafts)
    per_slot = state + table_bytes(drafts, longest)
    workspace, images = workspace_bytes(config, model, dtype), image_bytes(config)
    if longest > model.max_position_embeddings:
        raise CapacityError(
            f"--max-model-len {longest} exceeds the model's max_position_embeddings "
            f"({model.max_position_embeddings})"
        )
    pages = config.cache.num_pages
    if pages is None:
        wanted = slots * pages_for(longest)
        room = available - workspace - images - slots * per_slot
        pages = min(wanted, room // per_page) if per_page else wanted
    if pages < 1 or (config.max_model_len and pages * PAGE_TOKENS < longest):
        raise CapacityError(
            f"the cache has room for {max(pages, 0) * PAGE_TOKENS} tokens after "
            f"{_size(workspace)} of workspace, {_size(images)} for images and "
            f"{_size(slots * per_slot)} for {slots} sequences; one sequence of "
            f"{config.max_model_len or PAGE_TOKENS} tokens does not fit: lower --max-model-len "
            "or --max-num-seqs"
        )
    longest = min(longest, pages * PAGE_TOKENS)
    return Capacity(
        weight_bytes=weight_bytes,
        workspace_bytes=workspace,
        image_bytes=images,
        page_bytes=per_page,
        slot_bytes=state + table_bytes(drafts, longest),
        num_slots=slots,
        num_pages=pages,
        max_model_len=longest,
    )
