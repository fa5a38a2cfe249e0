// What the kernels share: the accumulator type, 16-byte chunks of a row, and sums over the threads of a row. Device code only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "layout.h"

namespace fused_norm {

// Sums and arithmetic are fp32, and fp64 for fp64 input.
template <typename T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <typename T>
using Acc = typename AccOf<T>::type;

__device__ __forceinline__ double to_acc(double v) { return v; }
__device__ __forceinline__ float to_acc(float v) { return v; }
__device__ __forceinline__ float to_acc(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_acc(__half v) { return __half2float(v); }

// To nearest, ties to even.
template <typename T>
__device__ __forceinline__ T from_acc(Acc<T> v) {
  return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_acc<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ __half from_acc<__half>(float v) {
  return __float2half_rn(v);
}

// a*b + c rounded once. Always spelled out: left to the compiler, two instantiations of a kernel might contract differently,
// and an aligned and a misaligned input would differ in the last bit.
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// a*b and a + b that no compiler may fuse with what surrounds them, for the same reason.
__device__ __forceinline__ float times(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double times(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float plus(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double plus(double a, double b) { return __dadd_rn(a, b); }

// The accurate functions (to 2 units in the last place), by names that take either type.
__device__ __forceinline__ float exponential(float v) { return expf(v); }
__device__ __forceinline__ double exponential(double v) { return exp(v); }
__device__ __forceinline__ float log_of_1_plus(float v) { return log1pf(v); }
__device__ __forceinline__ double log_of_1_plus(double v) { return log1p(v); }
__device__ __forceinline__ float hyperbolic_tangent(float v) { return tanhf(v); }
__device__ __forceinline__ double hyperbolic_tangent(double v) { return tanh(v); }
// The larger of two; of a number and NaN the number.
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

// 1/sqrt(v), for fp32 rounded once: half the error of a division by a square root, and all of the row shares it.
__device__ __forceinline__ float reciprocal_sqrt(float v) { return __frsqrt_rn(v); }
__device__ __forceinline__ double reciprocal_sqrt(double v) { return 1 / sqrt(v); }

// A chunk: 16 bytes of a row, as packed 32-bit words, so that a chunk of 2-byte elements takes four registers however it was loaded.
struct alignas(kChunkBytes) Chunk {
  uint32_t word[kChunkBytes / 4];
};

template <typename T>
constexpr int kPerChunk = kChunkBytes / static_cast<int>(sizeof(T));

template <typename T>
__device__ __forceinline__ T chunk_get(const Chunk& chunk, int j) {
  T v;
  if constexpr (sizeof(T) == 2) {
    const uint16_t bits = static_cast<uint16_t>(chunk.word[j / 2] >> (j % 2 * 16));
    memcpy(&v, &bits, sizeof(T));
  } else {
    memcpy(&v, &chunk.word[j * static_cast<int>(sizeof(T)) / 4], sizeof(T));
  }
  return v;
}

// Elements are set in ascending order: the even one of a pair clears its neighbour.
template <typename T>
__device__ __forceinline__ void chunk_set(Chunk& chunk, int j, T v) {
  if constexpr (sizeof(T) == 2) {
    uint16_t bits;
    memcpy(&bits, &v, sizeof(T));
    chunk.word[j / 2] = j % 2 == 0 ? bits : chunk.word[j / 2] | static_cast<uint32_t>(bits) << 16;
  } else {
    memcpy(&chunk.word[j * static_cast<int>(sizeof(T)) / 4], &v, sizeof(T));
  }
}

// Whether element j of chunk c exists in a row of n elements, K a chunk. The vectorised kernels see whole chunks only, and pay
// nothing for asking.
template <bool VECTOR, int K>
__device__ __forceinline__ bool present(int c, int j, int64_t n) {
  return VECTOR || j < n - static_cast<int64_t>(c) * K;
}

// Loads chunk c of a row of n elements: one 16-byte access where VECTOR (the row is then 16-byte aligned and the chunk whole),
// else one access an element. Elements past the row's end are not touched, and come out as zero.
template <bool VECTOR, typename T>
__device__ __forceinline__ Chunk load_chunk(const T* __restrict__ row, int c, int64_t n) {
  constexpr int K = kPerChunk<T>;
  const T* const p = row + static_cast<int64_t>(c) * K;
  if constexpr (VECTOR) {
    return *reinterpret_cast<const Chunk*>(p);
  } else {
    Chunk chunk;
#pragma unroll
    for (int j = 0; j < K; ++j) {
      T v = from_acc<T>(0);
      if (present<VECTOR, K>(c, j, n)) v = p[j];
      chunk_set(chunk, j, v);
    }
    return chunk;
  }
}

template <bool VECTOR, typename T>
__device__ __forceinline__ void store_chunk(T* __restrict__ row, int c, int64_t n, const Chunk& chunk) {
  constexpr int K = kPerChunk<T>;
  T* const p = row + static_cast<int64_t>(c) * K;
  if constexpr (VECTOR) {
    *reinterpret_cast<Chunk*>(p) = chunk;
  } else {
#pragma unroll
    for (int j = 0; j < K; ++j) {
      if (present<VECTOR, K>(c, j, n)) p[j] = chunk_get<T>(chunk, j);
    }
  }
}

// Elements c*K to c*K + K of weight or bias, those that stand beside chunk c of x: where VECTOR, in whole chunks, two of fp32 parameters beside
// a 2-byte x.
template <bool VECTOR, int K, typename W>
__device__ __forceinline__ void load_params(const W* __restrict__ row, int c, int64_t n, Acc<W> (&out)[K]) {
  if constexpr (VECTOR) {
    constexpr int kStep = kPerChunk<W>;
    static_assert(K % kStep == 0, "a chunk of x has fewer elements than one of its parameters");
#pragma unroll
    for (int i = 0; i < K / kStep; ++i) {
      const Chunk chunk = load_chunk<true>(row, c * (K / kStep) + i, n);
#pragma unroll
      for (int j = 0; j < kStep; ++j) out[i * kStep + j] = to_acc(chunk_get<W>(chunk, j));
    }
  } else {
#pragma unroll
    for (int j = 0; j < K; ++j) out[j] = present<false, K>(c, j, n) ? to_acc(row[static_cast<int64_t>(c) * K + j]) : Acc<W>(0);
  }
}

// Sums each v[i] over `lanes` adjacent lanes of a warp, a power of two: a butterfly, so that each gets the same bits.
template <int COUNT, typename A>
__device__ __forceinline__ void sum_over_lanes(A (&v)[COUNT], int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) v[i] += __shfl_xor_sync(0xffffffffu, v[i], offset);
  }
}

// A row's sums over more than one warp: each warp leaves its sums in shared memory, and when all have, every warp adds up what all left. The
// order is that of the entries alone, slice by slice, warp by warp in a slice: who left them, and when, changes no bit.
//
// `partial` is COUNT*entries elements that are used for no other sum before the next barrier but one.
template <int COUNT, typename A>
__device__ __forceinline__ void leave_warp_sums(A (&v)[COUNT], A* partial, int slice, int slices) {
  const int warps = static_cast<int>(blockDim.x) / kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  sum_over_lanes(v, kWarp);
  if (threadIdx.x % kWarp != 0) return;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) partial[(i * slices + slice) * warps + warp] = v[i];
}

template <int COUNT, typename A>
__device__ __forceinline__ void add_warp_sums(A (&v)[COUNT], const A* partial, int entries) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) v[i] = lane < entries ? partial[i * entries + lane] : A(0);
#pragma unroll 1
  for (int e = lane + kWarp; e < entries; e += kWarp) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) v[i] += partial[i * entries + e];
  }
  sum_over_lanes(v, kWarp);
}

// Sums each v[i] over the threads of one row; every thread gets the same bits. The tree depends on blockDim.x (threads per row) alone. With more
// than a warp, `partial` is COUNT*kWarp elements of shared memory that this block uses for no other sum, so that one barrier is enough. With
// less, several rows may share a warp.
template <int COUNT, typename A>
__device__ __forceinline__ void sum_over_row(A (&v)[COUNT], A* partial) {
  const int threads = static_cast<int>(blockDim.x);
  if (threads <= kWarp) return sum_over_lanes(v, threads);
  leave_warp_sums(v, partial, 0, 1);
  __syncthreads();
  add_warp_sums(v, partial, threads / kWarp);
}

}  // namespace fused_norm
