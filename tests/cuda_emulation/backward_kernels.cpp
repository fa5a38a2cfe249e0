// csrc/cuda/norm_backward.cuh for one type of x, EMULATE_T.
#include "emulation.h"

#include "backward_driver.h"
#include "norm_backward.cuh"

namespace {

struct Launcher {
  const BackwardDevice& device;
  bool ascending;
  BackwardChosen chosen{};

  template <typename Kernel>
  bool holds(const fused_norm::NormBackwardLaunch& how, Kernel) {
    return how.cluster <= device.largest_cluster;
  }

  template <typename Kernel, typename... Arguments>
  const char* operator()(const fused_norm::NormBackwardLaunch& how, Kernel kernel, Arguments... arguments) {
    if (chosen.launches++ == 0) {
      chosen = {how.threads_per_row, how.rows_per_block, how.cluster, how.blocks, static_cast<int64_t>(how.shared_bytes), 1};
    }
    const Dim3 grid{static_cast<unsigned>(how.blocks), unsigned(how.groups), unsigned(how.tensors)};
    const Dim3 block{unsigned(how.threads_per_row), unsigned(how.rows_per_block)};
    emulation::copies_are_late = !ascending;
    emulation::launch([&] { kernel(arguments...); }, grid, block, how.shared_bytes, ascending, how.cluster);
    emulation::expect_no_copies();
    return nullptr;
  }
};

size_t scratch_bytes(const fused_norm::NormBackward& args, const BackwardDevice& device) {
  return fused_norm::norm_backward_scratch(args, device.shared_limit);
}

BackwardChosen backward(const fused_norm::NormBackward& args, const BackwardDevice& device, bool ascending) {
  Launcher launcher{device, ascending};
  if (const char* error = fused_norm::choose_backward_of<EMULATE_T>(args, device.shared_limit, launcher)) emulation::fail("%s", error);
  return launcher.chosen;
}

const bool registered = register_backward(EMULATE_DTYPE, {scratch_bytes, backward});

}  // namespace
