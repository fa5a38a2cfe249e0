// LayerNorm and RMSNorm, forward: one row after another, each read from memory once and then from cache.
//
//   m = x0 + sum(x - x0)/n    off = sum(x - m)/n    mean = m + off    var = sum((x - m)^2)/n - off^2
//   rstd = 1/sqrt(var + eps)    y = (x - mean)*rstd*w + b
//
// With `cast`, (x - mean)*rstd is rounded to x's type before w and b. RMSNorm leaves the mean out. x0 is the row's first element; where it lies far from the rest m has lost digits, and off
// gives them back.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace fused_norm {
namespace {

FUSED_NORM_INLINE float square_root(float a) { return __builtin_sqrtf(a); }
FUSED_NORM_INLINE double square_root(double a) { return __builtin_sqrt(a); }

// The sum of a row's deviations and of their squares, taken in one pass.
template <typename A>
struct Moments {
  Vec<A> sum = {}, squares = {};
  FUSED_NORM_INLINE Moments operator+(const Moments& o) const { return {sum + o.sum, squares + o.squares}; }
  FUSED_NORM_INLINE Moments& operator+=(const Moments& o) { return *this = *this + o; }
};

// Sum over a row of n columns, of type R (a register, or Moments): `add(i, acc)` returns acc plus the terms of the register at
// column i, `last()` the terms of the tail.
//
// Four accumulators, which are added up every 64 rounds: a chain of additions is never long, and so neither is its error.
template <typename A, typename R, typename Add, typename Last>
FUSED_NORM_INLINE R sum_row(int64_t n, const Tail<A>& tail, const Add& add, const Last& last) {
  constexpr int64_t L = kLanes<A>, kRounds = 64;
  R total = {};
  int64_t i = 0;
  while (n - i >= 4 * L) {
    const int64_t rounds = (n - i) / (4 * L);
    const int64_t end = i + 4 * L * (rounds < kRounds ? rounds : kRounds);
    R a0 = {}, a1 = {}, a2 = {}, a3 = {};
    for (; i < end; i += 4 * L) {
      a0 = add(i, a0);
      a1 = add(i + L, a1);
      a2 = add(i + 2 * L, a2);
      a3 = add(i + 3 * L, a3);
    }
    total += (a0 + a1) + (a2 + a3);
  }
  for (; n - i >= L; i += L) total = add(i, total);
  if (tail.any) total += last();
  return total;
}

template <typename T, typename W, bool Rms, bool HasWeight, bool HasBias, bool Cast = false>
void forward_rows(const NormForward& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t L = kLanes<A>;
  const int64_t n = a.n;
  const Tail<A> tail(n);
  const A eps = (A)a.eps, count = (A)n;
  for (int64_t row = begin; row < end; row++) {
    const T* x = (const T*)a.x + row * a.x_stride;
    T* y = (T*)a.y + row * n;
    const int64_t group = a.weight_stride | a.bias_stride ? row / a.rows_per_group : 0;
    const W* weight = (const W*)a.weight + (HasWeight ? group * a.weight_stride : 0);
    const W* bias = (const W*)a.bias + (HasBias ? group * a.bias_stride : 0);

    A mean = 0, var;
    if constexpr (Rms) {
      const V squares = sum_row<A, V>(
          n, tail, [&](int64_t i, V acc) { const V v = load(x + i); return fma(v, v, acc); },
          [&] { const V v = tail.keep(tail.load(x)); return v * v; });
      var = sum_lanes(squares) / count;
    } else {
      const A x0 = load_one(x);
      const V pivot = splat<A>(x0);
      const V shifted = sum_row<A, V>(
          n, tail, [&](int64_t i, V acc) { return acc + (load(x + i) - pivot); },
          [&] { return tail.keep(tail.load(x) - pivot); });
      mean = x0 + sum_lanes(shifted) / count;
      const V first = splat<A>(mean);
      const Moments<A> moments = sum_row<A, Moments<A>>(
          n, tail,
          [&](int64_t i, Moments<A> acc) {
            const V d = load(x + i) - first;
            return Moments<A>{acc.sum + d, fma(d, d, acc.squares)};
          },
          [&] {
            const V d = tail.keep(tail.load(x) - first);
            return Moments<A>{d, d * d};
          });
      const A off = sum_lanes(moments.sum) / count;
      mean += off;
      var = sum_lanes(moments.squares) / count - off * off;
    }
    const V vmean = splat<A>(mean);
    const auto centre = [&](V v) {
      if constexpr (Rms) return v;
      else return v - vmean;
    };
    const A rstd = 1 / square_root(var + eps);
    if (a.rstd) ((A*)a.rstd)[row] = rstd;
    if (a.mean) ((A*)a.mean)[row] = mean;

    const V vrstd = splat<A>(rstd);
    const auto affine = [&](V v, auto&& weight_at, auto&& bias_at) {
      V xhat = centre(v) * vrstd;
      if constexpr (Cast) xhat = rounded<T>(xhat);
      if constexpr (HasWeight && HasBias) return fma(xhat, weight_at(), bias_at());
      else if constexpr (HasWeight) return xhat * weight_at();
      else if constexpr (HasBias) return xhat + bias_at();
      else return xhat;
    };
    for (int64_t i = 0; i + L <= n; i += L) {
      store(y + i, affine(load(x + i), [&] { return load(weight + i); }, [&] { return load(bias + i); }));
    }
    if (tail.any) {
      tail.store(y, affine(tail.load(x), [&] { return tail.load(weight); }, [&] { return tail.load(bias); }));
    }
  }
}

template <typename T, typename W, bool Rms>
void forward_affine(const NormForward& a, int64_t begin, int64_t end) {
  if constexpr (sizeof(T) == 2) {
    // Without weight and bias y is that rounding.
    if (a.cast && a.weight && a.bias) return forward_rows<T, W, Rms, true, true, true>(a, begin, end);
    if (a.cast && a.weight) return forward_rows<T, W, Rms, true, false, true>(a, begin, end);
    if (a.cast && a.bias) return forward_rows<T, W, Rms, false, true, true>(a, begin, end);
  }
  if (a.weight && a.bias) return forward_rows<T, W, Rms, true, true>(a, begin, end);
  if (a.weight) return forward_rows<T, W, Rms, true, false>(a, begin, end);
  if (a.bias) return forward_rows<T, W, Rms, false, true>(a, begin, end);
  return forward_rows<T, W, Rms, false, false>(a, begin, end);
}

template <typename T, typename W>
void forward_rms(bool rms, const NormForward& a, int64_t begin, int64_t end) {
  return rms ? forward_affine<T, W, true>(a, begin, end) : forward_affine<T, W, false>(a, begin, end);
}

void norm_forward(Dtype dtype, Dtype weight_dtype, bool rms, const NormForward& a, int64_t begin, int64_t end) {
  const bool mixed = weight_dtype != dtype;
  switch (dtype) {
    case Dtype::f64: return forward_rms<double, double>(rms, a, begin, end);
    case Dtype::f32: return forward_rms<float, float>(rms, a, begin, end);
    case Dtype::bf16:
      return mixed ? forward_rms<BFloat16, float>(rms, a, begin, end) : forward_rms<BFloat16, BFloat16>(rms, a, begin, end);
    case Dtype::f16:
      return mixed ? forward_rms<Half, float>(rms, a, begin, end) : forward_rms<Half, Half>(rms, a, begin, end);
  }
}

}  // namespace
}  // namespace fused_norm
