// What forward and backward of the ticks loss share: a call's numbers as the kernels take them, the softcap, and the masses a_j.
#pragma once

#include "common.cuh"
#include "ticks.h"

namespace fused_norm {

template <typename A>
struct TicksShape {
  int64_t rows;
  int64_t classes;
  int64_t z_row_stride;
  int64_t target_row_stride;
  int64_t ignore_index;
  const void* target;
  const void* weight;
  bool soft;
  bool target_is_fp32;  // beside a 2-byte z, whose type they have otherwise
  bool weight_is_fp32;
  A keep;    // 1 - smoothing: what is left of the target's mass
  A spread;  // smoothing/V: what every class is given
  A peak;    // keep + spread: a hard target's mass
  A ce;
  A ticks;
  A both;  // ce + ticks: what -log p counts in all
  A softcap;
};

template <typename T>
TicksShape<Acc<T>> ticks_shape(const Ticks& a) {
  using A = Acc<T>;
  const double spread = a.smoothing / static_cast<double>(a.classes), keep = 1 - a.smoothing;
  return {a.rows,
          a.classes,
          a.z_row_stride,
          a.target_row_stride,
          a.ignore_index,
          a.target,
          a.weight,
          a.soft,
          a.target_dtype != a.dtype,
          a.weight_dtype != a.dtype,
          static_cast<A>(keep),
          static_cast<A>(spread),
          static_cast<A>(keep + spread),
          static_cast<A>(a.ce),
          static_cast<A>(a.ticks),
          static_cast<A>(a.ce + a.ticks),
          static_cast<A>(a.softcap)};
}

template <typename A>
__device__ __forceinline__ A infinity() {
  return static_cast<A>(INFINITY);
}

// A row's hard target, or the lack of one.
struct HardTarget {
  uint32_t index;  // above all others where there is none
  bool ignored;
  bool valid;  // neither ignored nor out of range

  template <typename A>
  __device__ __forceinline__ HardTarget(const TicksShape<A>& shape, int64_t m) : index(UINT32_MAX), ignored(false), valid(true) {
    if (shape.soft) return;
    const int64_t given = static_cast<const int64_t*>(shape.target)[m];
    ignored = given == shape.ignore_index;
    valid = !ignored && given >= 0 && given < shape.classes;
    if (valid) index = static_cast<uint32_t>(given);
  }

  // Where in a piece of `count` elements that begins at element i the target is; -1: elsewhere.
  __device__ __forceinline__ int place_in(uint32_t i, int count) const {
    const uint32_t place = index - i;  // wraps around for what lies before
    return place < static_cast<uint32_t>(count) ? static_cast<int>(place) : -1;
  }
};

// z' = s*tanh(z/s). Rounded, never fused with a subtraction: the largest must be found to be equal to itself.
template <bool CAPPED, typename A>
__device__ __forceinline__ A capped(A z, A softcap) {
  return !CAPPED || softcap == 0 ? z : times(softcap, hyperbolic_tangent(z / softcap));
}

// z' again, by the same operations, and dz'/dz = 1 - tanh(z/s)^2.
template <typename A>
__device__ __forceinline__ A capped(A z, A softcap, A& slope) {
  const A x = z / softcap, t = hyperbolic_tangent(x);
  if (times(t, t) < A(0.5)) {
    slope = multiply_add(-t, t, A(1));
  } else {
    // Near 1 little is left of 1 - t^2 but t's own rounding: 4u/(1 + u)^2 with u = exp(-2|x|) is the same and keeps its digits.
    const A u = exponential(2 * (x < 0 ? x : -x));
    slope = 4 * u / times(1 + u, 1 + u);
  }
  return times(softcap, t);
}

// Element i of weight or of soft targets, which have z's type or fp32.
template <typename T>
__device__ __forceinline__ Acc<T> operand_at(const void* operand, bool is_fp32, int64_t i) {
  if constexpr (sizeof(T) == 2) {
    if (is_fp32) return static_cast<const float*>(operand)[i];
  }
  return to_acc(static_cast<const T*>(operand)[i]);
}

// The K elements of it that stand beside chunk c of what begins at element `offset` and has n elements.
template <bool VECTOR, typename T, int K>
__device__ __forceinline__ void load_operand(const void* operand, bool is_fp32, int64_t offset, int c, int64_t n, Acc<T> (&out)[K]) {
  if constexpr (sizeof(T) == 2) {
    if (is_fp32) return load_params<VECTOR>(static_cast<const float*>(operand) + offset, c, n, out);
  }
  load_params<VECTOR>(static_cast<const T*>(operand) + offset, c, n, out);
}

// a_j/w_j: of a soft target's element, or of a hard one's class where `hit`.
template <typename A>
__device__ __forceinline__ A mass_of(const TicksShape<A>& shape, A target, bool hit) {
  return shape.soft ? multiply_add(shape.keep, target, shape.spread) : hit ? shape.peak : shape.spread;
}

// The launch of either kernel.
struct TicksLaunch {
  int64_t blocks;
  int threads_per_row, rows_per_block;
  size_t shared_bytes;
  bool vector;  // the kernel's own switch, for who wants to know
};

}  // namespace fused_norm
