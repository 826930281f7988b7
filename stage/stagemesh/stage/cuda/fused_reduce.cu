// Binds one of the patterns of FlashInfer's all-reduce, that with residual and RMS norm, for the ranks and types that
// a stage may have: all of them together compile for minutes.
#include "flashinfer/comm/trtllm_allreduce_fusion.cuh"
#include "tvm_ffi_utils.h"

namespace fusion = flashinfer::trtllm_allreduce_fusion;

template <typename T>
cudaError_t launch(fusion::AllReduceFusionParams<T>& params, bool pdl) {
  constexpr auto pattern = fusion::AllReduceFusionPattern::kARResidualRMSNorm;
  switch (params.nranks) {
    case 2:
      return fusion::allreduce_fusion_kernel_launcher<pattern, T, 2, true>(params, pdl);
    case 4:
      return fusion::allreduce_fusion_kernel_launcher<pattern, T, 4, true>(params, pdl);
    case 8:
      return fusion::allreduce_fusion_kernel_launcher<pattern, T, 8, true>(params, pdl);
    default:
      return cudaErrorInvalidValue;
  }
}

template <typename T>
cudaError_t sum_add_norm_of(TensorView part, TensorView residual, TensorView weight, TensorView out,
                            TensorView workspace, int64_t rank, int64_t size, double eps, bool pdl) {
  fusion::AllReduceFusionParams<T> params{};
  params.nranks = size;
  params.rank = rank;
  params.size = part.size(0) * part.size(1);
  params.hidden_dim = part.size(1);
  params.workspace = reinterpret_cast<void**>(workspace.data_ptr());
  params.allreduce_in = part.data_ptr();
  params.residual_in = residual.data_ptr();
  params.residual_out = residual.data_ptr();
  params.norm_out = out.data_ptr();
  params.rms_gamma = weight.data_ptr();
  params.rms_eps = static_cast<float>(eps);
  params.use_oneshot = true;
  params.pattern = fusion::AllReduceFusionPattern::kARResidualRMSNorm;
  params.trigger_completion_at_end = true;
  params.stream = get_stream(part.device());
  return launch(params, pdl);
}

// residual += the sum of part over the ranks; out = norm(residual). All [T, hidden]; out may be part.
void sum_add_norm(TensorView part, TensorView residual, TensorView weight, TensorView out, TensorView workspace,
                  int64_t rank, int64_t size, double eps, bool pdl) {
  ffi::CUDADeviceGuard guard(part.device().device_id);
  auto of = part.dtype().code == kDLBfloat ? sum_add_norm_of<__nv_bfloat16> : sum_add_norm_of<half>;
  cudaError_t status = of(part, residual, weight, out, workspace, rank, size, eps, pdl);
  TVM_FFI_ICHECK(status == cudaSuccess) << "all-reduce with norm: " << cudaGetErrorString(status);
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(sum_add_norm, sum_add_norm);
