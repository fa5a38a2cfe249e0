// Which launch serves a row length, as norm_config.h says it for the norms: forward's order of sums is fixed by V and the element size.
// Plain C++.
#pragma once

#include <cstdint>

#include "layout.h"

namespace fused_norm {

// Chunks whose loads a thread has in flight. Of 1024 threads on a multiprocessor that is 64 KB, some four times what covers the latency
// of the memory of an H100 at its full rate.
constexpr int kTicksInFlight = 4;
// Beside each chunk of logits the general loss has one or two of targets and of weights in registers.
constexpr int kTicksGeneralInFlight = 2;
constexpr int kTicksForwardThreads = 512;
constexpr int kTicksBackwardThreads = 256;

// Blocks that must fit on a multiprocessor: 64 registers a thread in forward, where one block loads while another reduces, and 64 in
// backward, 80 for the general loss. fp64 takes twice as many.
constexpr int ticks_forward_min_blocks(int element_size) { return element_size == 8 ? 1 : 2; }
constexpr int ticks_backward_min_blocks(int element_size, bool general) { return element_size == 8 ? 2 : general ? 3 : 4; }

struct TicksConfig {
  int threads_per_row;
  int rows_per_block;
  int64_t blocks_per_row;  // forward: 1
};

// Part of a warp for each row where a few chunks a thread hold it: no barrier, four warps a block.
constexpr TicksConfig ticks_narrow_config(int64_t chunks) {
  int threads = 1;
  while (threads < chunks && threads < kWarp) threads *= 2;
  return {threads, 4 * kWarp / threads, 1};
}

constexpr int64_t ticks_chunks(int64_t classes, int element_size) { return (classes * element_size + kChunkBytes - 1) / kChunkBytes; }

// Up to 2 KB a row a warp or part of it, then whole warps, as few as read the row in one go, up to kTicksForwardThreads.
constexpr TicksConfig ticks_forward_config(int64_t classes, int element_size) {
  const int64_t chunks = ticks_chunks(classes, element_size);
  if (chunks <= kTicksInFlight * kWarp) return ticks_narrow_config(chunks);
  const int64_t threads = ((chunks - 1) / kTicksInFlight / kWarp + 1) * kWarp;
  return {static_cast<int>(threads < kTicksForwardThreads ? threads : kTicksForwardThreads), 1, 1};
}

// No sum crosses threads: a wide row is cut into as many blocks as it fills with two rounds of kTicksInFlight chunks a thread, 32 KB each.
constexpr TicksConfig ticks_backward_config(int64_t classes, int element_size) {
  const int64_t chunks = ticks_chunks(classes, element_size);
  if (chunks <= kTicksInFlight * kWarp) return ticks_narrow_config(chunks);
  const int64_t threads = ((chunks - 1) / kTicksInFlight / kWarp + 1) * kWarp;
  if (threads <= kTicksBackwardThreads) return {static_cast<int>(threads), 1, 1};
  return {kTicksBackwardThreads, 1, (chunks - 1) / (2 * kTicksInFlight * kTicksBackwardThreads) + 1};
}

}  // namespace fused_norm
