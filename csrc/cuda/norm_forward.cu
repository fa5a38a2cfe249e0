// The launcher of norm_forward.cuh.
#include <cuda_runtime.h>

#include "norm_forward.cuh"

namespace fused_norm {
namespace {

// Every kernel may take this much shared memory; more has to be asked for.
constexpr size_t kSharedForAll = 48 * 1024;

const char* describe(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

const char* launch_norm_forward(const NormForward& args, int device, void* stream) {
  // This library has the CUDA runtime linked in, torch another copy: make sure that both mean the same device. The caller's guard
  // has set it already and restores it.
  if (const char* error = describe(cudaSetDevice(device))) return error;
  int shared_limit = 0;
  if (const char* error = describe(cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))) return error;

  return choose_norm_forward(
      args, static_cast<size_t>(shared_limit), [&](const NormForwardLaunch& how, auto kernel, auto... kernel_args) -> const char* {
        if (how.blocks > 0x7fffffff) return "more rows than one launch can serve";
        if (how.shared_bytes > kSharedForAll) {
          const auto function = reinterpret_cast<const void*>(kernel);
          const auto bytes = static_cast<int>(how.shared_bytes);
          if (const char* error = describe(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))) return error;
        }
        const dim3 block(how.threads_per_row, how.rows_per_block);
        kernel<<<static_cast<unsigned>(how.blocks), block, how.shared_bytes, static_cast<cudaStream_t>(stream)>>>(kernel_args...);
        return describe(cudaGetLastError());
      });
}

}  // namespace fused_norm
