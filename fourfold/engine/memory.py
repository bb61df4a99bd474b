"""How much memory a device has for the engine, beside the weights.

Contract: asked once, after the weights are loaded and before anything else is allocated. What the
memory then goes to is arithmetic (capacity.py).
"""

from __future__ import annotations

import torch

from fourfold.core.config import EngineConfig, ModelConfig
from fourfold.core.device import Device
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
