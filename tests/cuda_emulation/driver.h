// Between driver.cpp and the kernels that one executable was built with.
#pragma once

#include <cstddef>
#include <cstdint>

#include "norm.h"

// The launch that served a call.
struct Chosen {
  int64_t threads_per_row, rows_per_block, cluster, vector, keep, shared_bytes;
};

// What matters of the device.
struct ForwardDevice {
  int compute_capability;
  size_t shared_limit;
  int largest_cluster;  // that it has room for
};

using Run = Chosen (*)(const fused_norm::NormForward&, const ForwardDevice&, bool ascending);

bool register_types(int dtype, int param_dtype, Run run);
