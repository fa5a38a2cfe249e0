// Between backward_driver.cpp and the kernels that one executable was built with.
#pragma once

#include <cstddef>
#include <cstdint>

#include "norm.h"

// The launch that served a call, and how many there were.
struct BackwardChosen {
  int64_t threads_per_row, rows_per_block, cluster, blocks, shared_bytes, launches;
};

struct BackwardDevice {
  size_t shared_limit;
  int largest_cluster;  // 1: it has none
};

struct BackwardRuns {
  size_t (*scratch_bytes)(const fused_norm::NormBackward&, const BackwardDevice&);
  BackwardChosen (*backward)(const fused_norm::NormBackward&, const BackwardDevice&, bool ascending);
};

bool register_backward(int dtype, BackwardRuns runs);
