"""How much memory a device has for the engine, beside the weights, and its share for steps.

Contract: `plan_memory` is asked once, after the weights are loaded and before anything else is
allocated. What the memory then goes to is arithmetic (capacity.py). `set_aside` comes after all that
lasts.
"""

from __future__ import annotations

import torch

from fourfold.core.config import EngineConfig, ModelConfig
from fourfold.core.device import Device
from fourfold.core.errors import CapacityError
from fourfold.engine.capacity import Capacity, image_bytes, plan_capacity, workspace_bytes

CPU_STATE_BYTES = 4 << 30  # for all slots and pages, where no GPU's memory says how much


def plan_memory(
    config: EngineConfig, model: ModelConfig, dtype: str, weight_bytes: int, device: Device
) -> Capacity:
    """The capacity of an engine whose weights are on `device`. Raises `CapacityError`."""
    if device.torch_device.type == "cpu":
        available = workspace_bytes(config, model, dtype) + image_bytes(config) + CPU_STATE_BYTES
    else:
        free, total = torch.cuda.mem_get_info(device.torch_device)
        available = int(free - total * (1 - config.gpu_memory_utilization))
    return plan_capacity(config, model, dtype, weight_bytes, available)


def set_aside(count: int, device: torch.device) -> None:
    """Have PyTorch's allocator keep a block of `count` bytes for the current stream, in which the steps'
    tensors then find room, and return to the driver what it has kept of the start.

    A block for each of them as they come would leave gaps that fit nothing later: a GiB for a prompt of
    8,192 tokens. Nothing on a CPU. Raises `CapacityError`.
    """
    if device.type == "cpu":
        return
    torch.cuda.empty_cache()
    try:
        torch.empty(count, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        raise CapacityError(
            f"no {count / 2**30:.2f} GiB are left for a step's tensors: lower --max-num-batched-tokens, "
            "--max-num-seqs or the number of pages"
        ) from None
