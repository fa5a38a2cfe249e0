// LayerNorm and RMSNorm, forward: the kernel, and the choice of its instantiation. Launched by norm_forward.cu.
//
//     mean = x0 + sum(x - x0)/n     (left out for RMSNorm)         rstd = 1/sqrt(sum((x - mean)^2)/n + eps)
//     y    = (x - mean)*rstd*w + b, rounded once; with `cast` (x - mean)*rstd is rounded to x's type first
//
// The first sum rounds in proportion to |x0 - mean|: where the row's first element is an outlier, that alone would put y many times
// further from the truth than it need be. So the second pass also sums off = sum(x - mean)/n, which is 0 but for rounding: the mean is
// moved by it, and its square taken from the variance.
//
// Data movement. A row belongs to part of a warp, a warp or a block (norm_config.h). An aligned row of up to 32 KB stays in
// registers from the first pass to the last, any other in shared memory: x is read once and y written once, M*N*E bytes each. Only
// what shared memory cannot hold is read three times (RMSNorm: twice); the 227 KB of an H100 hold 116 K bf16 or 58 K fp32 elements.
// Weight and bias are read once a row, from L2 after the first rows.
//
// Order. Thread t of a row's T threads sums chunks t, t + T, t + 2T, ... element by element, then sum_over_row adds the threads'
// sums. Where the bytes come from, and whether 16 or one element at a time, changes nothing of it.
#pragma once

#include <type_traits>

#include "common.cuh"
#include "norm.h"
#include "norm_config.h"

namespace fused_norm {

// Sums over a row that one call takes.
constexpr int kSums = 3;

template <typename A>
struct NormShape {
  int64_t rows;
  int64_t n;
  int64_t x_row_stride;
  int64_t rows_per_group;
  int64_t param_row_stride;  // n with parameters per group, 0 with shared ones
  A eps;
  int chunks;  // of a row: ceil(n / elements per chunk)
  int cached;  // chunks of a row that shared memory keeps
  bool cast;
};

// One thread's share of a row: chunks threadIdx.x, threadIdx.x + blockDim.x, ..., kept for the later passes in one of two places.
// first_pass reads them from memory and calls f(chunk, its index) for each; pass calls f again for each.
template <typename T, bool VECTOR, bool IN_REGISTERS>
struct RowShare;

// Kept in registers: whole chunks, at most kResidentChunks a thread.
template <typename T>
struct RowShare<T, true, true> {
  const T* row;
  int64_t n;
  int chunks;  // of the whole row; 0 where there is no row
  Chunk held[kResidentChunks];

  __device__ __forceinline__ RowShare(const T* row, int64_t n, int chunks, Chunk*, int) : row(row), n(n), chunks(chunks) {}

  template <typename F>
  __device__ __forceinline__ void first_pass(F&& f) {
    // All loads are issued before the first use.
#pragma unroll
    for (int i = 0; i < kResidentChunks; ++i) {
      const int c = threadIdx.x + i * blockDim.x;
      if (c < chunks) held[i] = load_chunk<true>(row, c, n);
    }
    pass(f);
  }

  template <typename F>
  __device__ __forceinline__ void pass(F&& f) const {
#pragma unroll
    for (int i = 0; i < kResidentChunks; ++i) {
      const int c = threadIdx.x + i * blockDim.x;
      if (c < chunks) f(held[i], c);
    }
  }
};

// Kept in shared memory: the row's first `cached` chunks, the others being read again in every pass. A thread reads back only what
// it wrote itself, so no barrier is needed.
template <typename T, bool VECTOR>
struct RowShare<T, VECTOR, false> {
  // Four chunks' loads in flight at once; element by element a single chunk has as many.
  static constexpr int kUnroll = VECTOR ? 4 : 1;
  const T* row;
  int64_t n;
  int chunks;
  Chunk* cache;
  int cached;

  __device__ __forceinline__ RowShare(const T* row, int64_t n, int chunks, Chunk* cache, int cached)
      : row(row), n(n), chunks(chunks), cache(cache), cached(cached) {}

  template <typename F>
  __device__ __forceinline__ void first_pass(F&& f) {
#pragma unroll kUnroll
    for (int c = threadIdx.x; c < chunks; c += blockDim.x) {
      const Chunk chunk = load_chunk<VECTOR>(row, c, n);
      if (c < cached) cache[c] = chunk;
      f(chunk, c);
    }
  }

  template <typename F>
  __device__ __forceinline__ void pass(F&& f) const {
#pragma unroll kUnroll
    for (int c = threadIdx.x; c < chunks; c += blockDim.x) f(c < cached ? cache[c] : load_chunk<VECTOR>(row, c, n), c);
  }
};

// Block (threads per row, rows per block), grid (ceil(rows / rows per block)). VECTOR: n fills whole chunks, and x, y, weight and
// bias are 16-byte aligned in every row. Shared memory: kSums*kWarp accumulators where a row has more than one warp, then `cached` chunks
// for each of the block's rows.
template <typename T, typename W, bool IS_RMS, bool VECTOR, bool IN_REGISTERS>
__global__ void __launch_bounds__(IN_REGISTERS ? kResidentMaxThreads : kMaxThreads, IN_REGISTERS ? kResidentMinBlocks : 1)
    norm_forward_kernel(const T* __restrict__ x, const W* __restrict__ weight, const W* __restrict__ bias, T* __restrict__ y,
                        Acc<T>* __restrict__ stats, const NormShape<Acc<T>> shape) {
  using A = Acc<T>;
  constexpr int K = kPerChunk<T>;
  extern __shared__ __align__(16) unsigned char fused_norm_shared[];
  A* const partial = reinterpret_cast<A*>(fused_norm_shared);
  Chunk* const cache = reinterpret_cast<Chunk*>(partial + (blockDim.x > kWarp ? kSums * kWarp : 0)) + threadIdx.y * shape.cached;

  // Threads past the last row take part in the shuffles with an empty row.
  const int64_t m = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool live = m < shape.rows;
  const T* const x_row = x + (live ? m : 0) * shape.x_row_stride;
  const A length = static_cast<A>(shape.n);
  RowShare<T, VECTOR, IN_REGISTERS> row(x_row, shape.n, live ? shape.chunks : 0, cache, shape.cached);

  A mean = 0;
  A rstd;
  if constexpr (IS_RMS) {
    A squares[1] = {0};
    row.first_pass([&](const Chunk& chunk, int c) {
#pragma unroll
      for (int j = 0; j < K; ++j) {
        if (!present<VECTOR, K>(c, j, shape.n)) continue;
        const A xj = to_acc(chunk_get<T>(chunk, j));
        squares[0] = multiply_add(xj, xj, squares[0]);
      }
    });
    sum_over_row(squares, partial);
    rstd = reciprocal_sqrt(squares[0] / length + shape.eps);
  } else {
    const A x0 = to_acc(x_row[0]);
    A sum[1] = {0};
    row.first_pass([&](const Chunk& chunk, int c) {
#pragma unroll
      for (int j = 0; j < K; ++j) {
        if (present<VECTOR, K>(c, j, shape.n)) sum[0] += to_acc(chunk_get<T>(chunk, j)) - x0;
      }
    });
    sum_over_row(sum, partial);
    mean = x0 + sum[0] / length;
    A centred[2] = {0, 0};  // sum(d), sum(d^2)
    row.pass([&](const Chunk& chunk, int c) {
#pragma unroll
      for (int j = 0; j < K; ++j) {
        if (!present<VECTOR, K>(c, j, shape.n)) continue;
        const A d = to_acc(chunk_get<T>(chunk, j)) - mean;
        centred[0] += d;
        centred[1] = multiply_add(d, d, centred[1]);
      }
    });
    sum_over_row(centred, partial + kWarp);
    const A off = centred[0] / length;
    mean += off;
    rstd = reciprocal_sqrt(multiply_add(-off, off, centred[1] / length) + shape.eps);
  }

  if (!live) return;
  if (stats != nullptr && threadIdx.x == 0) {
    stats[m] = rstd;
    if (!IS_RMS) stats[shape.rows + m] = mean;
  }
  const int64_t param_row = shape.param_row_stride == 0 ? 0 : m / shape.rows_per_group * shape.param_row_stride;
  T* const y_row = y + m * shape.n;
  row.pass([&](const Chunk& chunk, int c) {
    A v[K];
#pragma unroll
    for (int j = 0; j < K; ++j) {
      const A xj = to_acc(chunk_get<T>(chunk, j));
      v[j] = (IS_RMS ? xj : xj - mean) * rstd;
    }
    if (sizeof(T) < sizeof(A) && shape.cast) {  // one way for the whole grid
#pragma unroll
      for (int j = 0; j < K; ++j) v[j] = to_acc(from_acc<T>(v[j]));
    }
    A w[K], b[K];
    if (weight != nullptr) load_params<VECTOR>(weight + param_row, c, shape.n, w);
    if (bias != nullptr) load_params<VECTOR>(bias + param_row, c, shape.n, b);
    Chunk out;
#pragma unroll
    for (int j = 0; j < K; ++j) {
      if (weight != nullptr && bias != nullptr) {
        v[j] = multiply_add(v[j], w[j], b[j]);
      } else if (weight != nullptr) {
        v[j] *= w[j];
      } else if (bias != nullptr) {
        v[j] += b[j];
      }
      chunk_set(out, j, from_acc<T>(v[j]));
    }
    store_chunk<VECTOR>(y_row, c, shape.n, out);
  });
}

// ---- On the host: which instantiation serves a call. The launch itself is the caller's, so that the emulation runs this very code. ----

struct NormForwardLaunch {
  int64_t blocks;
  int threads_per_row, rows_per_block;
  size_t shared_bytes;
  bool vector, in_registers;  // the kernel's own switches, for who wants to know
};

template <typename T, typename W, bool IS_RMS, bool VECTOR, bool IN_REGISTERS, typename Launch>
auto choose_done(const NormForward& a, const NormForwardConfig& config, size_t shared_limit, Launch& launch) {
  using A = Acc<T>;
  const int chunks = static_cast<int>((a.n - 1) / kPerChunk<T> + 1);
  NormForwardLaunch how{(a.rows - 1) / config.rows_per_block + 1, config.threads_per_row, config.rows_per_block, 0, VECTOR, IN_REGISTERS};
  if (config.threads_per_row > kWarp) how.shared_bytes = kSums * kWarp * sizeof(A);
  int cached = 0;
  if (!IN_REGISTERS) {
    const size_t room = (shared_limit - how.shared_bytes) / (sizeof(Chunk) * config.rows_per_block);
    cached = static_cast<size_t>(chunks) < room ? chunks : static_cast<int>(room);
    how.shared_bytes += sizeof(Chunk) * config.rows_per_block * cached;
  }
  const NormShape<A> shape{a.rows, a.n, a.x_row_stride, a.rows / a.groups, a.params_grouped ? a.n : 0, static_cast<A>(a.eps), chunks, cached, a.cast};
  return launch(how, norm_forward_kernel<T, W, IS_RMS, VECTOR, IN_REGISTERS>, static_cast<const T*>(a.x), static_cast<const W*>(a.weight),
                static_cast<const W*>(a.bias), static_cast<T*>(a.y), static_cast<A*>(a.stats), shape);
}

template <typename T, typename W, bool IS_RMS, typename Launch>
auto choose_width(const NormForward& a, size_t shared_limit, Launch& launch) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % kChunkBytes == 0; };
  const bool whole_chunks = a.n % kPerChunk<T> == 0 && (a.rows == 1 || a.x_row_stride % kPerChunk<T> == 0);
  const bool vector = whole_chunks && aligned(a.x) && aligned(a.y) && aligned(a.weight) && aligned(a.bias);
  const NormForwardConfig config = norm_forward_config(a.n, static_cast<int>(sizeof(T)));
  if (!vector) return choose_done<T, W, IS_RMS, false, false>(a, config, shared_limit, launch);
  if (!config.in_registers) return choose_done<T, W, IS_RMS, true, false>(a, config, shared_limit, launch);
  return choose_done<T, W, IS_RMS, true, true>(a, config, shared_limit, launch);
}

template <typename T, typename W, typename Launch>
auto choose_norm(const NormForward& a, size_t shared_limit, Launch& launch) {
  return a.rms ? choose_width<T, W, true>(a, shared_limit, launch) : choose_width<T, W, false>(a, shared_limit, launch);
}

// Calls launch(NormForwardLaunch, kernel, its arguments...) with the instantiation that serves `a` and returns what it returns.
// `shared_limit` is the most shared memory that a block may have on the device.
template <typename Launch>
auto choose_norm_forward(const NormForward& a, size_t shared_limit, Launch&& launch) {
  const bool mixed = a.param_dtype != a.dtype;
  switch (a.dtype) {
    case DType::kFloat64: return choose_norm<double, double>(a, shared_limit, launch);
    case DType::kFloat32: return choose_norm<float, float>(a, shared_limit, launch);
    case DType::kBFloat16:
      return mixed ? choose_norm<__nv_bfloat16, float>(a, shared_limit, launch)
                   : choose_norm<__nv_bfloat16, __nv_bfloat16>(a, shared_limit, launch);
    default:
      return mixed ? choose_norm<__half, float>(a, shared_limit, launch) : choose_norm<__half, __half>(a, shared_limit, launch);
  }
}

}  // namespace fused_norm
