// Which launch serves a row length: a value computed from n and the element size alone, so that the order of every sum is fixed
// by them. The number of rows sets only the number of blocks. Plain C++.
#pragma once

#include <cstdint>

#include "layout.h"

namespace fused_norm {

// Chunks that a thread keeps in registers: 32 registers beside the 40 or so that the kernel needs for itself. Three blocks of 256 threads
// share the 64 K registers of a multiprocessor, 80 a thread, and have 96 KB of x under way: an H100 at its full rate, half of it
// reads, takes in some 12 KB a microsecond on each, so that a row may take 8 microseconds from its loads to its stores. With 4 chunks a
// thread it were 72 KB at most, for twice the threads that have to meet.
constexpr int kResidentChunks = 8;
constexpr int kResidentMaxThreads = 256;
constexpr int kResidentMinBlocks = 3;

// A wider row is cut into slices of up to 64 KB, which shared memory holds. Three slices fit on a multiprocessor of sm_90 or later, 192 KB
// under way: while the threads of one wait for the row's sums, another loads, and a third is stored. Slices of 32 KB would leave as many bytes
// under way and make twice the blocks meet. A thread copies 16 chunks: more threads would have fewer than 80 registers each.
constexpr int kSliceChunks = 4096;
constexpr int kSliceThreads = 256;
constexpr int kSliceMinBlocks = 3;
// As many blocks as a cluster may have; 8 everywhere, 16 where it is asked for. A slice of a still wider row is as large as it must be.
constexpr int kMostSlices = 16;

// Where no cluster has the slices, one block takes them, several at once.
constexpr int kMaxThreads = 1024;

struct NormForwardConfig {
  int threads_per_row;  // of each slice of it
  int rows_per_block;
  bool in_registers;  // kResidentChunks a thread hold the row; else shared memory keeps what fits
  int slices;
  int slice_chunks;  // the last slice may have fewer
};

constexpr NormForwardConfig norm_forward_config(int64_t n, int element_size) {
  const int64_t chunks = (n * element_size + kChunkBytes - 1) / kChunkBytes;
  if (chunks <= kResidentChunks * kWarp) {
    // Up to 4 KB a row: one warp or a part of it, no barrier. Half of what a thread can keep is enough under way, and adjacent threads read 64
    // bytes at least, whole sectors. Four warps a block reach full occupancy within the limit of 16 blocks a multiprocessor, the lowest of any
    // architecture, and retire in small steps.
    int threads = 1;
    while (threads < chunks && threads < kWarp && (threads < 4 || threads * kResidentChunks / 2 < chunks)) threads *= 2;
    return {threads, 4 * kWarp / threads, true, 1, static_cast<int>(chunks)};
  }
  if (chunks <= kResidentChunks * kResidentMaxThreads) {
    // Up to 32 KB a row: whole warps, as few as hold it: the more chunks a thread, the more loads in flight for each barrier.
    const int64_t threads = (chunks + kResidentChunks - 1) / kResidentChunks;
    return {static_cast<int>((threads + kWarp - 1) / kWarp * kWarp), 1, true, 1, static_cast<int>(chunks)};
  }
  int64_t slices = 1;
  while (slices < kMostSlices && slices * kSliceChunks < chunks) slices *= 2;
  // Whole warps of chunks, so that each slice begins on a cache line if the row does.
  const int64_t slice = ((chunks - 1) / slices + 1 + kWarp - 1) / kWarp * kWarp;
  return {kSliceThreads, 1, false, static_cast<int>(slices), static_cast<int>(slice)};
}

}  // namespace fused_norm
