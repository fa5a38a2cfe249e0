// Which launch serves backward for a shape, as norm_config.h says it for forward: a value computed from n, the element size and, for how the
// rows are shared out, from their number. So the order of every sum is fixed by them. Plain C++.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout.h"

namespace fused_norm {

// Chunks of a row that a thread keeps dw and db of: 64 registers, half of the 128 that 512 threads on a multiprocessor have each. More threads
// would be left with too few registers beside those: the copies that are under way need no threads that wait for them.
constexpr int backward_chunks(int element_size) { return element_size == 2 ? 4 : 8; }

// Two blocks share a multiprocessor, so that one goes on while the threads of the other wait for each other. They hold rows of up to 8192 elements
// each (fp64: 4096).
constexpr int kBackwardThreads = 256;
// Or a row of up to twice that has a block of twice that, which has the multiprocessor to itself.
constexpr int kBackwardWideThreads = 512;
// Blocks that share a wider row, as a cluster: the most that a device may be asked for.
constexpr int kBackwardMostSlices = 16;
// Blocks that the rows are shared out to: two for nearly each of the 132 multiprocessors of an H100, which so finish together. The partial sums
// of dw and db, n of each a part, are written and read once: at 4096 rows one byte an element beside the 12 (fp32) or 6 (bf16) of the tensors.
constexpr int kBackwardBlocks = 256;

struct NormBackwardConfig {
  int threads_per_row;
  int rows_per_block;    // rows under way at once
  int slices;            // blocks that share a row
  int slice_chunks;      // of a block's share of a row; of the last one perhaps fewer
  int chunks_per_thread;
};

constexpr NormBackwardConfig norm_backward_config(int64_t n, int element_size) {
  const int64_t chunks = (n * element_size + kChunkBytes - 1) / kChunkBytes, most = backward_chunks(element_size);
  if (chunks <= most * kWarp) {
    // One warp or a part of it: no barrier.
    int threads = 1;
    while (threads < chunks && threads < kWarp) threads *= 2;
    return {threads, kBackwardThreads / threads, 1, static_cast<int>(chunks), static_cast<int>((chunks - 1) / threads + 1)};
  }
  int64_t slices = 1;
  if (chunks > most * kBackwardWideThreads) {
    while (slices < kBackwardMostSlices && chunks > slices * most * kBackwardThreads) slices *= 2;
    // Nobody keeps such a row, and one block takes it.
    if (chunks > slices * most * kBackwardWideThreads) slices = 1;
  }
  // Whole warps, as few as hold a slice.
  const int64_t slice = (chunks - 1) / slices + 1, warps = (slice - 1) / (most * kWarp) + 1, wide = kBackwardWideThreads;
  const int64_t threads = warps * kWarp < wide ? warps * kWarp : wide, rows = threads < kBackwardThreads ? kBackwardThreads / threads : 1;
  return {static_cast<int>(threads), static_cast<int>(rows), static_cast<int>(slices), static_cast<int>(slice),
          static_cast<int>((slice - 1) / threads + 1)};
}

// How a group's rows are shared out: `parts` blocks (clusters) of rows_per_part rows in order, fewer in the last. Each leaves a partial sum.
struct NormBackwardPartition {
  int parts;
  int64_t rows_per_part;
};

constexpr NormBackwardPartition norm_backward_partition(int64_t rows, int64_t groups, const NormBackwardConfig& config) {
  const int per_row = config.slices == 1 && config.threads_per_row > kBackwardThreads ? 2 : config.slices;
  const int64_t tiles = (rows - 1) / config.rows_per_block + 1, most = kBackwardBlocks / per_row / groups;
  const int64_t parts = most < 1 ? 1 : most < tiles ? most : tiles;
  const int64_t rows_per_part = ((tiles - 1) / parts + 1) * config.rows_per_block;
  return {static_cast<int>((rows - 1) / rows_per_part + 1), rows_per_part};
}

// Shared memory of a block: sums over a row, the weight, and a ring of chunks of dy and x on their way from memory, `depth` of each a thread.
// None of it changes a result.
struct NormBackwardMemory {
  int depth;  // 0: the device has too little for a row, or nobody keeps it
  size_t bytes;
};

// Chunks of the next rows that are under way while a row is reduced: 64 KB in a block, if there is room; never more groups of copies than
// can be waited for. An H100 at its full rate has some 12 KB under way on each multiprocessor.
constexpr size_t kBackwardBytesAhead = 64 * 1024;
constexpr int kBackwardMostAhead = 8;

// `fixed` bytes are the sums' and the weight's; `limit` is the most that a block may have.
constexpr NormBackwardMemory norm_backward_memory(const NormBackwardConfig& config, int element_size, size_t fixed, size_t limit) {
  constexpr size_t kReserved = 1024;  // of each block, by the system
  if (config.chunks_per_thread > backward_chunks(element_size)) return {0, 0};
  const size_t threads = static_cast<size_t>(config.threads_per_row) * config.rows_per_block, entry = threads * 2 * kChunkBytes;
  const size_t row = config.chunks_per_thread, wanted = kBackwardBytesAhead / entry;
  const size_t ahead = wanted < 1 ? 1 : wanted < kBackwardMostAhead ? wanted : kBackwardMostAhead;
  const auto entries = [&](size_t room) { return room < fixed ? 0 : (room - fixed) / entry; };
  size_t depth = threads <= kBackwardThreads ? entries((limit + kReserved) / 2 - kReserved) : 0;
  if (depth <= row) depth = entries(limit);
  if (depth > row + ahead) depth = row + ahead;
  return depth < row ? NormBackwardMemory{0, 0} : NormBackwardMemory{static_cast<int>(depth), fixed + depth * entry};
}

// The sum of the partial sums: a block takes a warp's width of columns, and as many parts at once as it has warps, at most so many.
constexpr int kReduceWarps = 16;

}  // namespace fused_norm
