// Between ticks_driver.cpp and the kernels that one executable was built with.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ticks.h"

// The launch that served a call.
struct TicksChosen {
  int64_t threads_per_row, rows_per_block, blocks, vector;
};

struct TicksRuns {
  TicksChosen (*forward)(const fused_norm::TicksForward&, bool ascending);
  TicksChosen (*backward)(const fused_norm::TicksBackward&, bool ascending);
};

bool register_ticks(int dtype, TicksRuns runs);
