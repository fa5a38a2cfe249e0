// The launcher of norm_forward.cuh.
#include "launch.cuh"
#include "norm_forward.cuh"

namespace fused_norm {
namespace {

struct Launcher {
  int device;
  cudaStream_t stream;

  template <typename Kernel>
  bool holds(int blocks, int threads, size_t shared_bytes, Kernel kernel) const {
    return blocks == 1 || Launch(device, dim3(blocks), dim3(threads), blocks, shared_bytes, stream).holds(kernel);
  }

  template <typename Kernel, typename... Args>
  const char* operator()(const NormForwardLaunch& how, Kernel kernel, Args... args) const {
    if (how.blocks > 0x7fffffff) return "more rows than one launch can serve";
    const dim3 grid(static_cast<unsigned>(how.blocks)), block(how.threads_per_row, how.rows_per_block);
    return Launch(device, grid, block, how.cluster, how.shared_bytes, stream)(kernel, args...);
  }
};

}  // namespace

const char* launch_norm_forward(const NormForward& args, int device, void* stream) {
  if (const char* error = describe(use_device(device))) return error;
  const Device& found = device_of(device);
  if (const char* error = describe(found.error)) return error;
  return choose_norm_forward(args, {found.compute_capability, found.shared_limit}, Launcher{device, static_cast<cudaStream_t>(stream)});
}

}  // namespace fused_norm
