// csrc/cuda/ticks_forward.cuh and ticks_backward.cuh for one type of logits, EMULATE_T.
#include "emulation.h"

#include "ticks_backward.cuh"
#include "ticks_driver.h"
#include "ticks_forward.cuh"

namespace {

// What the launchers are given to launch with.
auto launcher(bool ascending) {
  return [ascending](const fused_norm::TicksLaunch& how, auto kernel, auto... kernel_args) {
    const Dim3 grid{static_cast<unsigned>(how.blocks)}, block{unsigned(how.threads_per_row), unsigned(how.rows_per_block)};
    emulation::launch([&] { kernel(kernel_args...); }, grid, block, how.shared_bytes, ascending);
    return TicksChosen{how.threads_per_row, how.rows_per_block, how.blocks, how.vector};
  };
}

TicksChosen forward(const fused_norm::TicksForward& args, bool ascending) {
  auto launch = launcher(ascending);
  return fused_norm::choose_ticks_forward_of<EMULATE_T>(args, launch);
}

TicksChosen backward(const fused_norm::TicksBackward& args, bool ascending) {
  auto launch = launcher(ascending);
  return fused_norm::choose_ticks_backward_of<EMULATE_T>(args, launch);
}

const bool registered = register_ticks(EMULATE_DTYPE, {forward, backward});

}  // namespace
