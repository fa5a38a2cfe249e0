// Between driver.cpp and the kernels that one executable was built with.
#pragma once

#include <cstddef>
#include <cstdint>

#include "norm.h"

// The launch that served a call.
struct Chosen {
  int64_t threads_per_row, rows_per_block, vector, in_registers, shared_bytes;
};

using Run = Chosen (*)(const fused_norm::NormForward&, size_t shared_limit, bool ascending);

bool register_types(int dtype, int param_dtype, Run run);
