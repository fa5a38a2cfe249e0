// The launcher of ticks_backward.cuh.
#include "launch.cuh"
#include "ticks_backward.cuh"

namespace fused_norm {

const char* launch_ticks_backward(const TicksBackward& args, int device, void* stream) {
  if (const char* error = describe(use_device(device))) return error;
  return choose_ticks_backward(args, [&](const TicksLaunch& how, auto kernel, auto... kernel_args) -> const char* {
    if (how.blocks > 0x7fffffff) return "more rows than one launch can serve";
    const dim3 block(how.threads_per_row, how.rows_per_block);
    kernel<<<static_cast<unsigned>(how.blocks), block, how.shared_bytes, static_cast<cudaStream_t>(stream)>>>(kernel_args...);
    return describe(cudaGetLastError());
  });
}

}  // namespace fused_norm
