"""What the engine's memory goes to: fixed bytes a request, bytes a token, pages, and what fits.

Contract: computed before anything but the weights is allocated; every figure is exact, save the
workspace, which is a reserve. A geometry that does not fit is refused with the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fourfold.cache.rows import RowFormats, page_bytes, slot_bytes
from fourfold.core.batch import PAGE_TOKENS
from fourfold.core.config import EngineConfig, ModelConfig
from fourfold.core.device import Device
from fourfold.core.errors import CapacityError
from fourfold.engine.sequence import pages_for

CPU_CACHE_BYTES = 4 << 30  # for all state, when there is no GPU whose memory says how much
WORKSPACE_BYTES = 2 << 30  # kept free on a GPU for a step's intermediates


@dataclass(frozen=True)
class Capacity:
    """Bytes of a page over all layers and of a slot; pages to allocate; the longest sequence."""

    page_bytes: int
    slot_bytes: int
    num_slots: int
    num_pages: int
    max_model_len: int

    def fits(self, context: int, concurrency: int) -> bool:
        """Whether `concurrency` sequences of `context` tokens each fit at once."""
        return (
            concurrency <= self.num_slots
            and context <= self.max_model_len
            and concurrency * pages_for(context) <= self.num_pages
        )

    def describe(self) -> list[str]:
        """Lines for a person: what state costs, and a table of context × concurrency."""
        lines = [
            f"state: {self.slot_bytes / 2**20:.2f} MiB a request ({self.num_slots} slots), "
            f"{self.page_bytes / PAGE_TOKENS:.0f} bytes a token ({self.num_pages} pages of "
            f"{PAGE_TOKENS} tokens)",
            "what fits at once:",
        ]
        context = PAGE_TOKENS * 4
        while context <= self.max_model_len:
            count = min(self.num_slots, self.num_pages // pages_for(context))
            lines.append(f"  {context:>9,} tokens of context: {count:>5} requests")
            context *= 4
        return lines


def plan_memory(
    config: EngineConfig, model: ModelConfig, formats: RowFormats, device: Device
) -> Capacity:
    """Pages and the longest request for the memory there is. Raises `CapacityError`."""
    slots, drafts = config.max_num_seqs, config.num_speculative_tokens
    per_page, per_slot = page_bytes(model, formats), slot_bytes(model, formats, drafts)
    longest = config.max_model_len or model.max_position_embeddings
    if longest > model.max_position_embeddings:
        raise CapacityError(
            f"--max-model-len {longest} exceeds the model's max_position_embeddings "
            f"({model.max_position_embeddings})"
        )
    pages = config.cache.num_pages
    if pages is None:
        wanted = slots * pages_for(longest)
        room = _state_bytes(config, device) - slots * per_slot
        pages = min(wanted, room // per_page) if per_page else wanted
    if pages < 1 or (config.max_model_len and pages * PAGE_TOKENS < longest):
        raise CapacityError(
            f"the cache has room for {max(pages, 0) * PAGE_TOKENS} tokens after "
            f"{slots * per_slot / 2**20:.0f} MiB for {slots} sequences; one sequence of "
            f"{config.max_model_len or PAGE_TOKENS} tokens does not fit: lower --max-model-len "
            "or --max-num-seqs"
        )
    return Capacity(per_page, per_slot, slots, pages, min(longest, pages * PAGE_TOKENS))


def _state_bytes(config: EngineConfig, device: Device) -> int:
    """Bytes for slots and pages."""
    if device.torch_device.type == "cpu":
        return CPU_CACHE_BYTES
    free, total = torch.cuda.mem_get_info(device.torch_device)
    return int(free - total * (1 - config.gpu_memory_utilization) - WORKSPACE_BYTES)
