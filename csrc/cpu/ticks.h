// What the ticks loss's forward and backward share: a row goes through them in blocks of columns that stay in the first-level cache.
//
// z'_j = s*tanh(z_j/s) with a softcap, else z_j    m = max_j z'_j    others = sum_j exp(z'_j - m) without one that is largest
// p_j = exp(z'_j - m)/(1 + others)    q_j = 1 - p_j, others/(1 + others) where z'_j == m
// a_j: the mass of class j, target mass times class weight
#pragma once

#include "kernels.h"
#include "rows.h"
#include "vec.h"

namespace fused_norm {
namespace {

// Columns in a block, a multiple of four registers of every kind. It fixes the order of a row's sums.
template <typename A>
constexpr int64_t kTicksBlock = 8192 / sizeof(A);

FUSED_NORM_INLINE float scalar_exp(float x) { return exp_of_nonpositive(splat<float>(x))[0]; }
FUSED_NORM_INLINE double scalar_exp(double x) { return exp_of_nonpositive(splat<double>(x))[0]; }

template <typename T>
FUSED_NORM_INLINE void store_one(T* p, Acc<T> v) {
  T copy[kLanes<Acc<T>>];
  store(copy, splat<Acc<T>>(v));
  *p = copy[0];
}

// bf16 and fp16 need no more than the short exponential.
template <typename T>
constexpr bool kShortExp = sizeof(T) == 2;

template <typename A>
FUSED_NORM_INLINE A softcapped(A z, A softcap) {
  return softcap ? softcap * tanh_and_slope<A>(splat<A>(z) / softcap).value[0] : z;
}

// A block's logits in the type of the arithmetic, capped; with `Slope` also 1 - tanh(z/s)^2.
template <bool Slope, typename T, typename A = Acc<T>>
FUSED_NORM_NOINLINE void cap_block(const T* z, int64_t count, A softcap, A* capped, A* slope) {
  const Vec<A> s = splat<A>(softcap);
  const auto cap = [&](Vec<A> v) {
    Tanh<A> t = tanh_and_slope<A>(v / s);
    t.value *= s;
    return t;
  };
  for_registers<A>(
      count,
      [&](int64_t i) {
        const Tanh<A> t = cap(load(z + i));
        store(capped + i, t.value);
        if (Slope) store(slope + i, t.slope);
      },
      [&](int64_t i, int n) {
        const Tanh<A> t = cap(load_first(z + i, n));
        store_first(capped + i, t.value, n);
        if (Slope) store_first(slope + i, t.slope, n);
      });
}

// Elements in the type of the arithmetic.
template <typename T, typename A = Acc<T>>
FUSED_NORM_NOINLINE void widen_block(const T* from, int64_t count, A* to) {
  for_registers<A>(
      count, [&](int64_t i) { store(to + i, load(from + i)); },
      [&](int64_t i, int n) { store_first(to + i, load_first(from + i, n), n); });
}

// The masses that a block's columns have: w_j*(scale*target_j + uniform), without a target (hard targets) w_j*uniform, and without a
// weight w_j is 1.
template <typename T, typename A>
FUSED_NORM_NOINLINE void mass_block(const T* target, const A* weight, A scale, A uniform, int64_t count, A* mass) {
  const Vec<A> vscale = splat<A>(scale), vuniform = splat<A>(uniform);
  const auto compute = [&](auto&& target_at, auto&& weight_at) {
    const Vec<A> a = target ? fma(target_at(), vscale, vuniform) : vuniform;
    return weight ? (Vec<A>)(a * weight_at()) : a;
  };
  for_registers<A>(
      count,
      [&](int64_t i) { store(mass + i, compute([&] { return load(target + i); }, [&] { return load(weight + i); })); },
      [&](int64_t i, int n) {
        const auto a = compute([&] { return load_first(target + i, n); }, [&] { return load_first(weight + i, n); });
        store_first(mass + i, a, n);
      });
}
// `target_dtype` is z's, or f32 beside bf16 and f16.
template <typename T, typename A = Acc<T>>
FUSED_NORM_INLINE void masses(
    Dtype target_dtype, const void* target, int64_t start, const A* weight, A scale, A uniform, int64_t count, A* mass) {
  if (weight) weight += start;
  if (!target) return mass_block<A, A>(nullptr, weight, scale, uniform, count, mass);
  if (target_dtype == Dtype::f32) {
    if constexpr (sizeof(A) == 4) return mass_block<float, A>((const float*)target + start, weight, scale, uniform, count, mass);
  }
  return mass_block<T, A>((const T*)target + start, weight, scale, uniform, count, mass);
}

void widen(Dtype dtype, const void* from, void* to, int64_t count) {
  switch (dtype) {
    case Dtype::f64: return widen_block((const double*)from, count, (double*)to);
    case Dtype::f32: return widen_block((const float*)from, count, (float*)to);
    case Dtype::bf16: return widen_block((const BFloat16*)from, count, (float*)to);
    case Dtype::f16: return widen_block((const Half*)from, count, (float*)to);
  }
}

}  // namespace
}  // namespace fused_norm
