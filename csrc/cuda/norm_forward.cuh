// LayerNorm and RMSNorm, forward: the kernel, and the choice of its instantiation. Launched by norm_forward.cu.
//
//     mean = x0 + sum(x - x0)/n     (left out for RMSNorm)         rstd = 1/sqrt(sum((x - mean)^2)/n + eps)
//     y    = (x - mean)*rstd*w + b, rounded once; with `cast` (x - mean)*rstd is rounded to x's type first
//
// The first sum rounds in proportion to |x0 - mean|: where the row's first element is an outlier, that alone would put y many times
// further from the truth than it need be. So the second pass also sums off = sum(x - mean)/n, which is 0 but for rounding: the mean is
// moved by it, and its square taken from the variance.
//
// Data movement. A row belongs to part of a warp, a warp or a block, and an aligned one of up to 32 KB stays in registers from the first pass to
// the last. A wider row is cut into slices (norm_config.h). If the device has clusters of blocks (sm_90), or the row is but one slice (sm_80), an
// aligned row's slices belong to a block each, which copies its slice to shared memory, all of it at once, and the sums of the row go from
// block to block. Any other row has one block, and what shared memory holds of it stays there. So x is read once and y written once, M*N*E
// bytes each, except for what the shared memory of a single block cannot hold: that is read three times (RMSNorm: twice).
// Weight and bias are read once a row, from L2 after the first rows.
//
// Order. Thread t of a slice's T threads sums its chunks t, t + T, t + 2T, ... element by element, and the sums of its warp's threads are added
// up; then those of all warps of all slices (common.cuh). Where the bytes come from, whether 16 or one element at a time, and whether one
// block has all slices or each has one, changes nothing of it.
#pragma once

#include <type_traits>

#include "async_copy.cuh"
#include "cluster.cuh"
#include "common.cuh"
#include "norm.h"
#include "norm_config.h"

namespace fused_norm {

// Sums over a row that one call takes, and how many of them at once.
constexpr int kSums = 3;
constexpr int kSumsAtOnce = 2;

// Shared memory of all sums of a block that has the whole row, each of so many warps; chunks may follow it.
template <typename A>
__host__ __device__ constexpr size_t block_sums_bytes(int warps) {
  return (kSums * warps * sizeof(A) + kChunkBytes - 1) / kChunkBytes * kChunkBytes;
}

template <typename A>
struct NormShape {
  int64_t rows;
  int64_t n;
  int64_t x_row_stride;
  int64_t rows_per_group;
  int64_t weight_row_stride;  // n with weights per group, 0 with shared ones
  int64_t bias_row_stride;    // likewise
  A eps;
  int chunks;  // of a row: ceil(n / elements per chunk)
  int slices;
  int slice_chunks;
  int cached;  // chunks of a row that the shared memory of a single block keeps
  bool cast;
};

// Where a row's share is kept from the first pass to the last.
enum class Keep {
  kRegisters,
  kShared,  // of the one block that has the row, as far as it goes
  kSlice,   // shared memory too, the slice of one block in a cluster
};

// One thread's share of a row, and the row's sums. first_sum reads it from memory; sum and each meet it again. A sum calls f(v, chunk, its index)
// for each chunk, which adds to v, and leaves the row's total in v in every thread.
template <typename T, bool VECTOR, Keep KEEP>
struct RowShare;

// Whole chunks, at most kResidentChunks a thread.
template <typename T>
struct RowShare<T, true, Keep::kRegisters> {
  using A = Acc<T>;
  int64_t m;
  bool live;  // threads past the last row take part in the shuffles with an empty row
  bool first;
  const T* row;
  int64_t n;
  int chunks;
  A* partial;
  Chunk held[kResidentChunks];

  __device__ __forceinline__ RowShare(const T* __restrict__ x, const NormShape<A>& shape, unsigned char* shared)
      : m(static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y),
        live(m < shape.rows),
        first(threadIdx.x == 0),
        row(x + (live ? m : 0) * shape.x_row_stride),
        n(shape.n),
        chunks(live ? shape.chunks : 0),
        partial(reinterpret_cast<A*>(shared)) {}

  template <int COUNT, typename F>
  __device__ __forceinline__ void first_sum(A (&v)[COUNT], F&& f) {
    // All loads are issued before the first use.
#pragma unroll
    for (int i = 0; i < kResidentChunks; ++i) {
      const int c = threadIdx.x + i * blockDim.x;
      if (c < chunks) held[i] = load_chunk<true>(row, c, n);
    }
    sum(v, f);
  }

  template <int COUNT, typename F>
  __device__ __forceinline__ void sum(A (&v)[COUNT], F&& f) {
    each([&](const Chunk& chunk, int c) { f(v, chunk, c); });
    sum_over_row(v, partial);
    partial += COUNT * kWarp;
  }

  template <typename F>
  __device__ __forceinline__ void each(F&& f) const {
#pragma unroll
    for (int i = 0; i < kResidentChunks; ++i) {
      const int c = threadIdx.x + i * blockDim.x;
      if (c < chunks) f(held[i], c);
    }
  }
};

// The row's first `cached` chunks, the others being read again in every pass. A thread reads back only what it wrote itself, so no barrier is needed
// but for the sums. The block has several rows, or several slices of one row at once.
template <typename T, bool VECTOR>
struct RowShare<T, VECTOR, Keep::kShared> {
  using A = Acc<T>;
  // Four chunks' loads in flight at once; element by element a single chunk has as many.
  static constexpr int kUnroll = VECTOR ? 4 : 1;
  int64_t m;
  bool live;
  bool first;
  const T* row;
  const NormShape<A>& shape;
  int first_slice, warp_sums;
  A* partial;
  Chunk* cache;

  __device__ __forceinline__ RowShare(const T* __restrict__ x, const NormShape<A>& shape, unsigned char* shared)
      : m(shape.slices > 1 ? blockIdx.x : static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y),
        live(m < shape.rows),
        first(threadIdx.x == 0 && (shape.slices == 1 || threadIdx.y == 0)),
        row(x + (live ? m : 0) * shape.x_row_stride),
        shape(shape),
        first_slice(shape.slices > 1 ? threadIdx.y : 0),
        warp_sums(blockDim.x > kWarp ? shape.slices * static_cast<int>(blockDim.x) / kWarp : 0),
        partial(reinterpret_cast<A*>(shared)),
        cache(reinterpret_cast<Chunk*>(shared + block_sums_bytes<A>(warp_sums)) + (shape.slices > 1 ? 0 : threadIdx.y * shape.cached)) {}

  template <bool FIRST, typename F>
  __device__ __forceinline__ void walk(int slice, F&& f) const {
    const int begin = slice * shape.slice_chunks, past = begin + shape.slice_chunks, end = !live ? 0 : past < shape.chunks ? past : shape.chunks;
#pragma unroll kUnroll
    for (int c = begin + threadIdx.x; c < end; c += blockDim.x) {
      if (!FIRST && c < shape.cached) {
        f(cache[c], c);
        continue;
      }
      const Chunk chunk = load_chunk<VECTOR>(row, c, shape.n);
      if (FIRST && c < shape.cached) cache[c] = chunk;
      f(chunk, c);
    }
  }

  template <bool FIRST, int COUNT, typename F>
  __device__ __forceinline__ void sum_up(A (&v)[COUNT], F&& f) {
    for (int slice = first_slice; slice < shape.slices; slice += blockDim.y) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) v[i] = 0;
      walk<FIRST>(slice, [&](const Chunk& chunk, int c) { f(v, chunk, c); });
      if (warp_sums > 0) leave_warp_sums(v, partial, slice, shape.slices);
    }
    if (warp_sums == 0) return sum_over_lanes(v, blockDim.x);
    __syncthreads();
    add_warp_sums(v, partial, warp_sums);
    partial += COUNT * warp_sums;
  }

  template <int COUNT, typename F>
  __device__ __forceinline__ void first_sum(A (&v)[COUNT], F&& f) {
    sum_up<true>(v, f);
  }
  template <int COUNT, typename F>
  __device__ __forceinline__ void sum(A (&v)[COUNT], F&& f) {
    sum_up<false>(v, f);
  }

  template <typename F>
  __device__ __forceinline__ void each(F&& f) const {
    for (int slice = first_slice; slice < shape.slices; slice += blockDim.y) walk<false>(slice, f);
  }
};

// One slice a block. A thread reads back only what it copied itself.
template <typename T>
struct RowShare<T, true, Keep::kSlice> {
  using A = Acc<T>;
  static constexpr int kUnroll = 4;
  static constexpr int kGroups = 4;  // of copies: the first is added up while the others arrive
  int64_t m;
  static constexpr bool live = true;
  bool first;
  const T* row;
  int begin, count, per_group;  // per_group: chunks of all threads in a group
  ClusterSums<kSumsAtOnce, A> sums;
  Chunk* held;

  __device__ __forceinline__ RowShare(const T* __restrict__ x, const NormShape<A>& shape, unsigned char* shared)
      : m(blockIdx.x / shape.slices),
        first(threadIdx.x == 0 && blockIdx.x % shape.slices == 0),
        row(x + m * shape.x_row_stride),
        begin(static_cast<int>(blockIdx.x % shape.slices) * shape.slice_chunks),
        count(shape.chunks - begin < shape.slice_chunks ? shape.chunks - begin : shape.slice_chunks),
        sums(shared),
        held(reinterpret_cast<Chunk*>(shared + cluster_sums_bytes(kSumsAtOnce, sizeof(A), shape.slices, blockDim.x / kWarp))) {
    const int threads = static_cast<int>(blockDim.x);
    per_group = ((shape.slice_chunks - 1) / (kGroups * threads) + 1) * threads;
    for (int g = 0; g < kGroups; ++g) {
      in_group(g, [&](int l) { copy_chunk_async<true>(held + l, row, begin + l, shape.n); });
      commit_copies();
    }
  }

  template <typename F>
  __device__ __forceinline__ void in_group(int g, F&& f) const {
    const int past = (g + 1) * per_group, end = past < count ? past : count;
#pragma unroll kUnroll
    for (int l = g * per_group + static_cast<int>(threadIdx.x); l < end; l += blockDim.x) f(l);
  }

  template <int COUNT, typename F>
  __device__ __forceinline__ void first_sum(A (&v)[COUNT], F&& f) {
#pragma unroll 1
    for (int g = 0; g < kGroups; ++g) {
      wait_for_copies(kGroups - 1 - g);
      in_group(g, [&](int l) { f(v, held[l], begin + l); });
    }
    sums.begin();
    sums.add(v);
  }

  template <int COUNT, typename F>
  __device__ __forceinline__ void sum(A (&v)[COUNT], F&& f) {
    each([&](const Chunk& chunk, int c) { f(v, chunk, c); });
    sums.add(v);
  }

  template <typename F>
  __device__ __forceinline__ void each(F&& f) const {
#pragma unroll kUnroll
    for (int l = threadIdx.x; l < count; l += blockDim.x) f(held[l], begin + l);
  }
};

constexpr int forward_threads(Keep keep) {
  return keep == Keep::kRegisters ? kResidentMaxThreads : keep == Keep::kSlice ? kSliceThreads : kMaxThreads;
}
constexpr int forward_blocks(Keep keep) { return keep == Keep::kRegisters ? kResidentMinBlocks : keep == Keep::kSlice ? kSliceMinBlocks : 1; }

// Block (threads per row, rows per block), grid (ceil(rows / rows per block)); with more than one slice a row block (threads, slices at once) and
// grid (rows), or for kSlice block (threads) and grid (rows*slices) in clusters of one row. VECTOR: n fills whole chunks, and x, y, weight and bias
// are 16-byte aligned in every row.
template <typename T, typename W, bool IS_RMS, bool VECTOR, Keep KEEP>
__global__ void __launch_bounds__(forward_threads(KEEP), forward_blocks(KEEP))
    norm_forward_kernel(const T* __restrict__ x, const W* __restrict__ weight, const W* __restrict__ bias, T* __restrict__ y,
                        Acc<T>* __restrict__ stats, const NormShape<Acc<T>> shape) {
  using A = Acc<T>;
  constexpr int K = kPerChunk<T>;
  extern __shared__ __align__(16) unsigned char fused_norm_shared[];
  RowShare<T, VECTOR, KEEP> row(x, shape, fused_norm_shared);
  const A length = static_cast<A>(shape.n);

  A mean = 0;
  A rstd;
  if constexpr (IS_RMS) {
    A squares[1] = {0};
    row.first_sum(squares, [&](A(&v)[1], const Chunk& chunk, int c) {
#pragma unroll
      for (int j = 0; j < K; ++j) {
        if (!present<VECTOR, K>(c, j, shape.n)) continue;
        const A xj = to_acc(chunk_get<T>(chunk, j));
        v[0] = multiply_add(xj, xj, v[0]);
      }
    });
    rstd = reciprocal_sqrt(squares[0] / length + shape.eps);
  } else {
    const A x0 = to_acc(row.row[0]);
    A sum[1] = {0};
    row.first_sum(sum, [&](A(&v)[1], const Chunk& chunk, int c) {
#pragma unroll
      for (int j = 0; j < K; ++j) {
        if (present<VECTOR, K>(c, j, shape.n)) v[0] += to_acc(chunk_get<T>(chunk, j)) - x0;
      }
    });
    mean = x0 + sum[0] / length;
    A centred[2] = {0, 0};  // sum(d), sum(d^2)
    row.sum(centred, [&](A(&v)[2], const Chunk& chunk, int c) {
#pragma unroll
      for (int j = 0; j < K; ++j) {
        if (!present<VECTOR, K>(c, j, shape.n)) continue;
        const A d = to_acc(chunk_get<T>(chunk, j)) - mean;
        v[0] += d;
        v[1] = multiply_add(d, d, v[1]);
      }
    });
    const A off = centred[0] / length;
    mean += off;
    rstd = reciprocal_sqrt(multiply_add(-off, off, centred[1] / length) + shape.eps);
  }

  if (!row.live) return;
  const int64_t m = row.m;
  if (stats != nullptr && row.first) {
    stats[m] = rstd;
    if (!IS_RMS) stats[shape.rows + m] = mean;
  }
  const int64_t group = shape.weight_row_stride == 0 && shape.bias_row_stride == 0 ? 0 : m / shape.rows_per_group;
  const W* const weight_row = weight == nullptr ? nullptr : weight + group * shape.weight_row_stride;
  const W* const bias_row = bias == nullptr ? nullptr : bias + group * shape.bias_row_stride;
  T* const y_row = y + m * shape.n;
  row.each([&](const Chunk& chunk, int c) {
    Chunk out;
    // As many elements at a time as a chunk of parameters has; one by one their predicates take registers too.
    constexpr int P = VECTOR ? kPerChunk<W> : K < 4 ? K : 4;
#pragma unroll
    for (int i = 0; i < K; i += P) {
      A w[P], b[P];
      if (weight != nullptr) load_params<VECTOR>(weight_row, c * (K / P) + i / P, shape.n, w);
      if (bias != nullptr) load_params<VECTOR>(bias_row, c * (K / P) + i / P, shape.n, b);
#pragma unroll
      for (int j = 0; j < P; ++j) {
        const A xj = to_acc(chunk_get<T>(chunk, i + j));
        A v = times(IS_RMS ? xj : xj - mean, rstd);
        if (sizeof(T) < sizeof(A) && shape.cast) v = to_acc(from_acc<T>(v));  // one way for the whole grid
        if (weight != nullptr && bias != nullptr) {
          v = multiply_add(v, w[j], b[j]);
        } else if (weight != nullptr) {
          v = times(v, w[j]);
        } else if (bias != nullptr) {
          v = plus(v, b[j]);
        }
        chunk_set(out, i + j, from_acc<T>(v));
      }
    }
    store_chunk<VECTOR>(y_row, c, shape.n, out);
  });
}

// ---- On the host: which instantiation serves a call. The launch itself is the caller's, so that the emulation runs this very code. ----

struct NormForwardLaunch {
  int64_t blocks;
  int threads_per_row;  // the block's first dimension
  int rows_per_block;   // and its second
  int cluster;          // blocks in a cluster; 1: no clusters
  size_t shared_bytes;
  bool vector;  // the kernel's own switches, for who wants to know
  Keep keep;
};

// What matters of a device.
struct NormForwardDevice {
  int compute_capability;  // 90 for sm_90
  size_t shared_limit;     // the most shared memory that a block may have
};

template <typename A>
size_t slice_shared_bytes(const NormForwardConfig& config) {
  return cluster_sums_bytes(kSumsAtOnce, sizeof(A), config.slices, config.threads_per_row / kWarp) + sizeof(Chunk) * config.slice_chunks;
}

template <typename T, typename W, bool IS_RMS, bool VECTOR, Keep KEEP, typename Launch>
auto choose_done(const NormForward& a, const NormForwardConfig& config, size_t shared_limit, Launch& launch) {
  using A = Acc<T>;
  const int chunks = static_cast<int>((a.n - 1) / kPerChunk<T> + 1), warps = config.threads_per_row / kWarp;
  NormForwardLaunch how{(a.rows - 1) / config.rows_per_block + 1, config.threads_per_row, config.rows_per_block, 1, 0, VECTOR, KEEP};
  int cached = 0;
  if constexpr (KEEP == Keep::kRegisters) {
    if (warps > 1) how.shared_bytes = kSums * kWarp * sizeof(A);
  } else if constexpr (KEEP == Keep::kShared) {
    if (config.slices > 1) how.rows_per_block = config.slices < kMaxThreads / kSliceThreads ? config.slices : kMaxThreads / kSliceThreads;
    if (config.threads_per_row > kWarp) how.shared_bytes = block_sums_bytes<A>(config.slices * warps);
    const size_t room = (shared_limit - how.shared_bytes) / (sizeof(Chunk) * config.rows_per_block);
    cached = static_cast<size_t>(chunks) < room ? chunks : static_cast<int>(room);
    how.shared_bytes += sizeof(Chunk) * config.rows_per_block * cached;
  } else {
    how.blocks = a.rows * config.slices;
    how.cluster = config.slices;
    how.shared_bytes = slice_shared_bytes<A>(config);
  }
  const NormShape<A> shape{a.rows,
                           a.n,
                           a.x_row_stride,
                           a.rows / a.groups,
                           a.weight_grouped ? a.n : 0,
                           a.bias_grouped ? a.n : 0,
                           static_cast<A>(a.eps),
                           chunks,
                           config.slices,
                           config.slice_chunks,
                           cached,
                           a.cast};
  return launch(how, norm_forward_kernel<T, W, IS_RMS, VECTOR, KEEP>, static_cast<const T*>(a.x), static_cast<const W*>(a.weight),
                static_cast<const W*>(a.bias), static_cast<T*>(a.y), static_cast<A*>(a.stats), shape);
}

template <typename T, typename W, bool IS_RMS, typename Launch>
auto choose_width(const NormForward& a, const NormForwardDevice& device, Launch& launch) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % kChunkBytes == 0; };
  const bool whole_chunks = a.n % kPerChunk<T> == 0 && (a.rows == 1 || a.x_row_stride % kPerChunk<T> == 0);
  const bool vector = whole_chunks && aligned(a.x) && aligned(a.y) && aligned(a.weight) && aligned(a.bias);
  const NormForwardConfig config = norm_forward_config(a.n, static_cast<int>(sizeof(T)));
  const size_t limit = device.shared_limit;
  if (!vector) return choose_done<T, W, IS_RMS, false, Keep::kShared>(a, config, limit, launch);
  if (config.in_registers) return choose_done<T, W, IS_RMS, true, Keep::kRegisters>(a, config, limit, launch);
  const size_t slice_bytes = slice_shared_bytes<Acc<T>>(config);
  if (device.compute_capability >= (config.slices > 1 ? 90 : 80) && slice_bytes <= limit &&
      launch.holds(config.slices, config.threads_per_row, slice_bytes, norm_forward_kernel<T, W, IS_RMS, true, Keep::kSlice>)) {
    return choose_done<T, W, IS_RMS, true, Keep::kSlice>(a, config, limit, launch);
  }
  return choose_done<T, W, IS_RMS, true, Keep::kShared>(a, config, limit, launch);
}

template <typename T, typename W, typename Launch>
auto choose_norm(const NormForward& a, const NormForwardDevice& device, Launch& launch) {
  return a.rms ? choose_width<T, W, true>(a, device, launch) : choose_width<T, W, false>(a, device, launch);
}

// Calls launch(NormForwardLaunch, kernel, its arguments...) with the instantiation that serves `a` and returns what it returns. Before that
// it may ask launch.holds(blocks, threads and shared bytes of each, kernel), whether the device has room for such a cluster.
template <typename Launch>
auto choose_norm_forward(const NormForward& a, const NormForwardDevice& device, Launch&& launch) {
  const bool mixed = a.param_dtype != a.dtype;
  switch (a.dtype) {
    case DType::kFloat64: return choose_norm<double, double>(a, device, launch);
    case DType::kFloat32: return choose_norm<float, float>(a, device, launch);
    case DType::kBFloat16:
      return mixed ? choose_norm<__nv_bfloat16, float>(a, device, launch)
                   : choose_norm<__nv_bfloat16, __nv_bfloat16>(a, device, launch);
    default:
      return mixed ? choose_norm<__half, float>(a, device, launch) : choose_norm<__half, __half>(a, device, launch);
  }
}

}  // namespace fused_norm
