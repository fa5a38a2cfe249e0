// csrc/cuda/norm_forward.cuh for one pair of types, EMULATE_T (of x) and EMULATE_W (of weight and bias).
#include "emulation.h"

#include "driver.h"
#include "norm_forward.cuh"

namespace {

struct Launcher {
  const ForwardDevice& device;
  bool ascending;

  template <typename Kernel>
  bool holds(int blocks, int, size_t, Kernel) const {
    return blocks <= device.largest_cluster;
  }

  template <typename Kernel, typename... Args>
  Chosen operator()(const fused_norm::NormForwardLaunch& how, Kernel kernel, Args... args) const {
    const Dim3 grid{static_cast<unsigned>(how.blocks)}, block{unsigned(how.threads_per_row), unsigned(how.rows_per_block)};
    emulation::copies_are_late = !ascending;
    emulation::launch([&] { kernel(args...); }, grid, block, how.shared_bytes, ascending, how.cluster);
    emulation::expect_no_copies();
    return {how.threads_per_row, how.rows_per_block, how.cluster, how.vector, int64_t(how.keep), static_cast<int64_t>(how.shared_bytes)};
  }
};

Chosen run(const fused_norm::NormForward& args, const ForwardDevice& device, bool ascending) {
  Launcher launch{device, ascending};
  return fused_norm::choose_norm<EMULATE_T, EMULATE_W>(args, {device.compute_capability, device.shared_limit}, launch);
}

const bool registered = register_types(EMULATE_DTYPE, EMULATE_PARAM_DTYPE, run);

}  // namespace
