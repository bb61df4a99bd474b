"""Names in a GPU's trace: the project's own kernels, what torch may run beside them, and all others."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterable

from fourfold.kernels import nvidia, triton

# What torch may do in a step: bookkeeping of integers, element by element, and copies. Products are in
# none of these words, nor are reductions, whose order torch chooses by the shape.
_OF_TORCH = re.compile(r"\bat::native::|\bat_cuda_detail::cub::|\bcub::|\bc10::cuda::")
_ELEMENTWISE = re.compile(
    r"elementwise_kernel|CatArrayBatchedCopy|FillFunctor|arange|searchsorted|[Ss]ort|[Ss]can|"
    r"fill_reverse_indices|gather|scatter|index_(?:copy|select|put|fill)|[iI]ndexSelect|copy_kernel|"
    r"sleep_kernel|spin_kernel"
)
_COPY = re.compile(r"(Memcpy|Memset)\b")
_LIBRARY = re.compile(
    r"gemm|gemv|cublas|cutlass|cudnn|xmma|splitK|nvjet|cute::|flash_|fmha|dot_kernel|reduce_1Block",
    re.IGNORECASE,
)


def our_kernels() -> frozenset[str]:
    """Names of all functions that the project's own kernels for GPUs define."""
    names = set()
    for family in (triton, nvidia):
        for found in pkgutil.iter_modules(family.__path__, family.__name__ + "."):
            for value in vars(importlib.import_module(found.name)).values():
                own = getattr(value, "fn", None)
                if getattr(own, "__module__", "").startswith("fourfold.kernels."):
                    names.add(own.__name__)
    return frozenset(names)


def of_libraries(names: Iterable[str]) -> list[str]:
    """Those that a vendor's library for products, convolutions or attention would launch."""
    ours = our_kernels()
    return sorted({name for name in names if name not in ours and _LIBRARY.search(name)})


def strangers(names: Iterable[str]) -> list[str]:
    """Those that are neither the project's own nor torch's for bookkeeping and copies."""
    ours = our_kernels()

    def known(name: str) -> bool:
        if name in ours or _COPY.match(name):
            return True
        return bool(_OF_TORCH.search(name) and _ELEMENTWISE.search(name))

    names = set(names)
    return sorted({name for name in names if not known(name)} | {*of_libraries(names)})
