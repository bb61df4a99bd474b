"""Which names in a GPU's trace are taken for a vendor's library; every kernel of the project is known."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from tests.kernels.traced import of_libraries, our_kernels, strangers

# As CUPTI reports them, most cut short.
TORCHS = (
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, std::array",
    "void at::native::index_elementwise_kernel<128, 4, at::native::gpu_index_kernel<at::native::",
    "void at::native::(anonymous namespace)::searchsorted_cuda_kernel<long, long>(long*, long c",
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::(anonymous namespace)",
    "void at_cuda_detail::cub::detail::radix_sort::DeviceRadixSortOnesweepKernel<at_cuda_detail",
    "Memcpy HtoD (Pinned -> Device)",
    "Memset (Device)",
)
LIBRARIES = (
    "nvjet_tst_64x8_64x16_1x4_h_bz_splitK_TNT",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize2x1x1_execute",
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16>",
    "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 128, 16>",
    "std::enable_if<!(false), void>::type internal::gemvx::kernel<int, int, float, float, float>",
    "void dot_kernel<float, 128, 0, cublasDotParams<cublasGemvTensor<float const>>>",
    "void cudnn::ops::nchwToNhwcKernel<float, float, float, false, true, (cudnnKernelDataType_t)2>",
    "pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, false>>",
)
UNKNOWN = (
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::func_wrapper",
    "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float>",
    "_somebody_elses_kernel",
)


def test_libraries_are_named_and_bookkeeping_is_not() -> None:
    assert strangers([*TORCHS, *our_kernels()]) == []
    assert of_libraries([*TORCHS, *our_kernels(), *UNKNOWN]) == []
    assert of_libraries([*LIBRARIES, *TORCHS]) == sorted(LIBRARIES)
    assert strangers([*LIBRARIES, *UNKNOWN, *TORCHS]) == sorted([*LIBRARIES, *UNKNOWN])


def test_kernels_of_every_family_are_the_projects_own() -> None:
    ours = our_kernels()
    assert {
        "_attend",
        "_experts_gate_up",
        "_streams",
        "_score",
        "_compress_rows",
        "_adjust_some",
    } <= ours
    assert len(ours) > 100
