"""Hyper-connections in training: kernels and plain torch give the op's results and gradients."""

import pytest
import torch

from fourfold.ops import mhc
from tests.kernels.interpreter import driver, interpreted, run
from train.ops import mixing
from train.ops.compare import differences, hyper_connections

CPU = torch.device("cpu")


def test_torch_gives_what_the_op_gives() -> None:
    class Definition:
        def hc_pre(self, streams: torch.Tensor, site: mhc.Site) -> object:
            return mhc.hc_pre(streams, site)

        def hc_post(self, *args: torch.Tensor) -> object:
            return mhc.hc_post(*args)

    assert max(differences(Definition(), CPU, torch.float32).values()) < 1e-5


def test_a_cpu_mixes_by_torch() -> None:
    assert hyper_connections("auto", CPU, torch.float32) == (mixing, "torch")


def test_a_difference_is_seen() -> None:
    class Wrong:
        def hc_pre(self, streams: torch.Tensor, site: mhc.Site) -> object:
            return mixing.hc_pre(streams, site)

        def hc_post(
            self, z: torch.Tensor, streams: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
        ) -> torch.Tensor:
            return mixing.hc_post(z, streams, post, comb.transpose(1, 2))

    found = differences(Wrong(), CPU, torch.float32)
    assert found["streams"] > 0.05
    assert found["y"] == 0


@driver
@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run(__file__)


@interpreted
def test_kernels_give_what_torch_gives() -> None:
    from train.ops import mixing_gpu

    found = differences(mixing_gpu, CPU, torch.float32, tokens=70, size=40)
    assert max(found.values()) < 1e-5, found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_mixes_by_kernels(dtype: torch.dtype) -> None:
    from train.ops import mixing_gpu

    found, why = hyper_connections("auto", torch.device("cuda"), dtype)
    assert found is mixing_gpu, why
