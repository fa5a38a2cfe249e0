// LayerNorm and RMSNorm, forward: one row after another, each read from memory once and then from cache.
//
//   mean = x0 + sum(x - x0)/n    var = sum((x - mean)^2)/n    rstd = 1/sqrt(var + eps)    y = (x - mean)*rstd*w + b
//
// RMSNorm leaves the mean out. x0 is the row's first element.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace fused_norm {
namespace {

FUSED_NORM_INLINE float square_root(float a) { return __builtin_sqrtf(a); }
FUSED_NORM_INLINE double square_root(double a) { return __builtin_sqrt(a); }

// Sum over a row of n columns: `add(i, acc)` returns acc plus the terms of the register at column i, `last()` the terms of the tail.
//
// Four accumulators, which are added up every 64 rounds: a chain of additions is never long, and so neither is its error.
template <typename A, typename Add, typename Last>
FUSED_NORM_INLINE A sum_row(int64_t n, const Tail<A>& tail, const Add& add, const Last& last) {
  constexpr int64_t L = kLanes<A>, kRounds = 64;
  Vec<A> total = {};
  int64_t i = 0;
  while (n - i >= 4 * L) {
    const int64_t rounds = (n - i) / (4 * L);
    const int64_t end = i + 4 * L * (rounds < kRounds ? rounds : kRounds);
    Vec<A> a0 = {}, a1 = {}, a2 = {}, a3 = {};
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
  return sum_lanes(total);
}

template <typename T, typename W, bool Rms, bool HasWeight, bool HasBias>
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

    A mean = 0;
    if constexpr (!Rms) {
      const A x0 = load_one(x);
      const V pivot = splat<A>(x0);
      const A sum = sum_row<A>(
          n, tail, [&](int64_t i, V acc) { return acc + (load(x + i) - pivot); },
          [&] { return tail.keep(tail.load(x) - pivot); });
      mean = x0 + sum / count;
    }
    const V vmean = splat<A>(mean);
    const auto centre = [&](V v) {
      if constexpr (Rms) return v;
      else return v - vmean;
    };
    const A squares = sum_row<A>(
        n, tail,
        [&](int64_t i, V acc) {
          const V d = centre(load(x + i));
          return fma(d, d, acc);
        },
        [&] {
          const V d = tail.keep(centre(tail.load(x)));
          return d * d;
        });
    const A rstd = 1 / square_root(squares / count + eps);
    if (a.rstd) ((A*)a.rstd)[row] = rstd;
    if (a.mean) ((A*)a.mean)[row] = mean;

    const V vrstd = splat<A>(rstd);
    const auto affine = [&](V v, auto&& weight_at, auto&& bias_at) {
      const V xhat = centre(v) * vrstd;
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
