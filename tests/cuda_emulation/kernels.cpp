// csrc/cuda/norm_forward.cuh for one pair of types, EMULATE_T (of x) and EMULATE_W (of weight and bias).
#include "emulation.h"

#include "driver.h"
#include "norm_forward.cuh"

namespace {

Chosen run(const fused_norm::NormForward& args, size_t shared_limit, bool ascending) {
  const auto launch = [&](const fused_norm::NormForwardLaunch& how, auto kernel, auto... kernel_args) {
    const Dim3 grid{static_cast<unsigned>(how.blocks)}, block{unsigned(how.threads_per_row), unsigned(how.rows_per_block)};
    emulation::launch([&] { kernel(kernel_args...); }, grid, block, how.shared_bytes, ascending);
    return Chosen{how.threads_per_row, how.rows_per_block, how.vector, how.in_registers, static_cast<int64_t>(how.shared_bytes)};
  };
  return fused_norm::choose_norm<EMULATE_T, EMULATE_W>(args, shared_limit, launch);
}

const bool registered = register_types(EMULATE_DTYPE, EMULATE_PARAM_DTYPE, run);

}  // namespace
