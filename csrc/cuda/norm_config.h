// Which launch serves a row length: a value computed from n and the element size alone, so that the order of every sum is fixed
// by them. The number of rows sets only the number of blocks. Plain C++.
#pragma once

#include <cstdint>

#include "layout.h"

namespace fused_norm {

// Chunks that a thread keeps in registers: 16 registers. Twice that spills within the 64 a thread that 1024 threads can have.
constexpr int kResidentChunks = 4;
constexpr int kResidentMaxThreads = 512;
constexpr int kResidentMinBlocks = 2;  // 64 registers a thread. Left to itself ptxas tries for 3 blocks in places, and spills
constexpr int kMaxThreads = 1024;

struct NormForwardConfig {
  int threads_per_row;
  int rows_per_block;
  bool in_registers;  // kResidentChunks a thread hold the row; else shared memory keeps what fits
};

constexpr NormForwardConfig norm_forward_config(int64_t n, int element_size) {
  const int64_t chunks = (n * element_size + kChunkBytes - 1) / kChunkBytes;
  if (chunks <= kResidentChunks * kWarp) {
    // Up to 2 KB a row: one warp or a part of it, no barrier. Four warps a block reach full occupancy within the limit of 16
    // blocks a multiprocessor, the lowest of any architecture, and retire in small steps.
    int threads = 1;
    while (threads < chunks && threads < kWarp) threads *= 2;
    return {threads, 4 * kWarp / threads, true};
  }
  if (chunks <= kResidentChunks * kResidentMaxThreads) {
    // Up to 32 KB a row: whole warps, as few as hold it: the more chunks a thread, the more loads in flight for each barrier.
    const int64_t threads = (chunks + kResidentChunks - 1) / kResidentChunks;
    return {static_cast<int>((threads + kWarp - 1) / kWarp * kWarp), 1, true};
  }
  // Up to 64 KB a row two blocks of 512 threads fit on a multiprocessor of sm_80 or later, one loading while the other reduces and
  // stores. A wider row often has the multiprocessor to itself, and takes all the threads it may.
  return {chunks <= 8 * 512 ? 512 : kMaxThreads, 1, false};
}

}  // namespace fused_norm
