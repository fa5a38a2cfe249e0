// The launcher of norm_backward.cuh.
#include "launch.cuh"
#include "norm_backward.cuh"

namespace fused_norm {
namespace {

struct Launcher {
  int device;
  cudaStream_t stream;

  template <typename Kernel>
  bool holds(const NormBackwardLaunch& how, Kernel kernel) const {
    return launch(how).holds(kernel);
  }

  template <typename Kernel, typename... Arguments>
  const char* operator()(const NormBackwardLaunch& how, Kernel kernel, Arguments... arguments) const {
    if (how.blocks > 0x7fffffff) return "more groups than one launch can serve";
    return launch(how)(kernel, arguments...);
  }

 private:
  Launch launch(const NormBackwardLaunch& how) const {
    const dim3 grid(static_cast<unsigned>(how.blocks), how.groups, how.tensors), block(how.threads_per_row, how.rows_per_block);
    return {device, grid, block, how.cluster, how.shared_bytes, stream};
  }
};

}  // namespace

size_t norm_backward_scratch_bytes(const NormBackward& args, int device) { return norm_backward_scratch(args, device_of(device).shared_limit); }

const char* launch_norm_backward(const NormBackward& args, int device, void* stream) {
  if (const char* error = describe(use_device(device))) return error;
  const Device& found = device_of(device);
  if (const char* error = describe(found.error)) return error;
  return choose_norm_backward(args, found.shared_limit, Launcher{device, static_cast<cudaStream_t>(stream)});
}

}  // namespace fused_norm
