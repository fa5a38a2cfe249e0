// LayerNorm and RMSNorm, forward: one row after another, each read from memory once and then from cache.
//
//   m = x0 + sum(x - x0)/n    off = sum(x - m)/n    mean = m + off    var = sum((x - m)^2)/n - off^2
//   rstd = 1/sqrt(var + eps)    y = (x - mean)*rstd*w + b
//
// With `cast`, (x - mean)*rstd is rounded to x's type before w and b. RMSNorm leaves the mean out. x0 is the row's first element; where it
// lies far from the rest m has lost digits, and off gives them back.
//
// 16-bit rows are widened once, into L1, and so are their weight and bias, once for many rows. There too goes a row that is a sum (add.h).
// While a row is written, one further on is fetched: memory is never idle.
#pragma once

#include "add.h"
#include "kernels.h"
#include "vec.h"

namespace fused_norm {
namespace {

// The sum of a row's deviations and of their squares, taken in one pass.
template <typename A>
struct Moments {
  Vec<A> sum = {}, squares = {};
  FUSED_NORM_INLINE Moments operator+(const Moments& o) const { return {sum + o.sum, squares + o.squares}; }
  FUSED_NORM_INLINE Moments& operator+=(const Moments& o) { return *this = *this + o; }
};

// A row's mean and rstd, by one pass in most cases: about a pivot that lies near the mean, the squares of the deviations lose nothing that
// matters to cancellation. The first registers' mean is such a pivot, unless they are unlike the rest; then it is done again about the mean.
// What is made of the sums is made in fp64, and rounded once: a row's every element has the error of its rstd.
template <bool Rms, typename T, typename At, typename A = Acc<T>>
FUSED_NORM_INLINE void row_stats(
    int64_t n, const RowEnd<T>& end, A eps, const At& at, const Two<A>& last, A x0, Share share, A* mean_out, A* rstd_out) {
  using V = Vec<A>;
  constexpr int64_t kTwo = 2 * kLanes<A>;
  const double count = (double)n;
  A mean = 0;
  double var;
  if constexpr (Rms) {
    const V squares = sum_row<V>(n, end, at, last, [](V v, auto&& keep, V acc) {
      v = keep(v);
      return fma(v, v, acc);
    }, share);
    var = sum_lanes(squares) / count;
  } else {
    A pivot = x0;
    if (n >= 2 * kTwo) {
      const V v0 = splat<A>(x0);
      const Two<A> v = at(0), w = at(kTwo);
      pivot += sum_lanes(((v.a - v0) + (v.b - v0)) + ((w.a - v0) + (w.b - v0))) / (2 * kTwo);
    }
    for (int attempt = 0;; attempt++) {
      const V first = splat<A>(pivot);
      const Moments<A> moments = sum_row<Moments<A>>(n, end, at, last, [&](V v, auto&& keep, Moments<A> acc) {
        const V d = keep(v - first);
        return Moments<A>{acc.sum + d, fma(d, d, acc.squares)};
      }, share);
      const double off = sum_lanes(moments.sum) / count, square = off * off;
      mean = (A)(pivot + off);
      var = sum_lanes(moments.squares) / count;
      if (square - square == 0) var -= square;  // not infinity from infinity
      if (attempt || 4 * square <= var) break;
      pivot = mean;
    }
  }
  *mean_out = mean;
  *rstd_out = (A)(1 / __builtin_sqrt(var + eps));
}

// One row, of type S with parameters of type P, into y. Where S is not T, they are in the accumulation type and in the order of T's registers.
template <typename T, typename S, typename P, bool Rms, bool HasWeight, bool HasBias, bool Cast, bool Shared, typename A = Acc<T>>
FUSED_NORM_INLINE void forward_row(
    const NormForward& a, int64_t row, const S* x, const P* weight, const P* bias, const RowEnd<T>& end, const Ahead& next) {
  using V = Vec<A>;
  constexpr bool Held = !__is_same(S, T);
  constexpr int64_t L = kLanes<A>;
  const int64_t n = a.n, whole = n - end.count;
  const auto two_at = [&](const auto* p, int64_t i) -> Two<A> {
    if constexpr (Held) return {load(p + i), load(p + i + L)};
    else return load_two_of<T>(p + i);
  };
  const auto end_of = [&](const auto* p) -> Two<A> {
    if (!end.count) return Two<A>{V{}, V{}};
    if constexpr (Held) return {load(p + whole), load(p + whole + L)};
    else return load_end<T>(p + whole, end.count);
  };
  const Two<A> last = end_of(x);
  A mean, rstd;
  row_stats<Rms>(n, end, (A)a.eps, [&](int64_t i) { return two_at(x, i); }, last, load_one(x), Shared ? a.share : nullptr, &mean, &rstd);
  if (a.rstd) ((A*)a.rstd)[row] = rstd;
  if (a.mean) ((A*)a.mean)[row] = mean;

  const V vmean = splat<A>(mean), vrstd = splat<A>(rstd);
  const auto affine = [&](V v, V w, V b) -> V {
    V xhat = (Rms ? v : v - vmean) * vrstd;
    if constexpr (Cast) xhat = rounded<T>(xhat);
    if constexpr (HasWeight && HasBias) return fma(xhat, w, b);
    else if constexpr (HasWeight) return xhat * w;
    else if constexpr (HasBias) return xhat + b;
    else return xhat;
  };
  const auto affine_two = [&](Two<A> v, Two<A> w, Two<A> b) { return Two<A>{affine(v.a, w.a, b.a), affine(v.b, w.b, b.b)}; };
  const Two<A> none{V{}, V{}};
  T* const y = (T*)a.y + row * n;
  const auto write = [&](int64_t begin, int64_t stop) {
    write_row(
        y + begin, stop - begin, a.past_cache,
        [&](int64_t i) {
          i += begin;
          return affine_two(two_at(x, i), HasWeight ? two_at(weight, i) : none, HasBias ? two_at(bias, i) : none);
        },
        [&](int64_t) { return affine_two(last, HasWeight ? end_of(weight) : none, HasBias ? end_of(bias) : none); },
        [&](int64_t i) { next.fetch<2 * L * sizeof(T)>(begin + i); });
  };
  if constexpr (Shared) {
    constexpr int64_t kBlock = kSumBlock<A>;
    share_out(a.share, (n + kBlock - 1) / kBlock, kBlock, [&](int64_t begin, int64_t stop) {
      write(begin * kBlock, stop * kBlock < n ? stop * kBlock : n);
      if (a.past_cache) stream_fence();
    });
  } else {
    write(0, n);
  }
}

template <typename T, typename W, bool Rms, bool HasWeight, bool HasBias, bool Cast = false>
void forward_rows(const NormForward& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t n = a.n;
  const RowEnd<T> row_end(n);
  // Rows that are taken together: so many that what is fetched for later has the time to come.
  const int64_t held_stride = n - row_end.count + (row_end.count ? 2 * kLanes<A> : 0);
  const int64_t together = held_stride < kHeldColumns / 2 ? kHeldColumns / 2 / held_stride : 1;
  const AddRows* const before = a.before;
  const int64_t x_stride = before ? n : a.x_stride;
  const T* const x = before ? (const T*)before->summed : (const T*)a.x;
  const auto next = [&](int64_t row) {
    if (row >= end) row = end - 1;
    if (!before) return Ahead{(const char*)(x + row * x_stride), nullptr, sizeof(T), 0};
    return Ahead{
        (const char*)before->x + row * before->x_stride * before->x_size, (const char*)((const T*)before->residual + row * before->residual_stride),
        before->x_size, sizeof(T)};
  };
  int64_t group = -1;
  const W *weight = nullptr, *bias = nullptr;
  const auto enter_group = [&](int64_t row) {
    const int64_t of_row = a.weight_stride | a.bias_stride ? row / a.rows_per_group : 0;
    if (of_row == group) return false;
    group = of_row;
    weight = (const W*)a.weight + (HasWeight ? group * a.weight_stride : 0);
    bias = (const W*)a.bias + (HasBias ? group * a.bias_stride : 0);
    return true;
  };
  // 16-bit rows are held in the accumulation type. Of others only a sum is, which will not be found in cache where it has been written past it.
  constexpr bool Narrow = sizeof(T) == 2;
  alignas(64) A held[kHeldColumns], held_weight[Narrow && HasWeight ? kHeldColumns : 1], held_bias[Narrow && HasBias ? kHeldColumns : 1];
  const bool holds = n <= kHeldColumns && (Narrow || (before && before->past_cache));
  A* const added = holds ? held : nullptr;
  for (int64_t row = begin, stop; row < end; row = stop) {
    stop = end - row < together ? end : row + together;
    if (before) {
      add_rows<T>(*before, row, stop, added, held_stride);
    } else if (Narrow && holds) {
      if (x_stride == n && held_stride == n) hold<T>(x + row * n, (stop - row) * n, held);
      else for (int64_t r = row; r < stop; r++) hold<T>(x + r * x_stride, n, held + (r - row) * held_stride);
    }
    for (int64_t r = row; r < stop; r++) {
      const bool entered = enter_group(r);
      const A* const held_row = held + (r - row) * held_stride;
      const Ahead further = next(r + together);
      if constexpr (Narrow) {
        if (holds) {
          if (HasWeight && entered) hold<T>(weight, n, held_weight);
          if (HasBias && entered) hold<T>(bias, n, held_bias);
          forward_row<T, A, A, Rms, HasWeight, HasBias, Cast, false>(a, r, held_row, held_weight, held_bias, row_end, further);
          continue;
        }
      }
      const T* const from = holds ? (const T*)held_row : x + r * x_stride;
      // Of 16-bit rows only wide ones come here.
      if (Narrow || a.share) forward_row<T, T, W, Rms, HasWeight, HasBias, Cast, true>(a, r, from, weight, bias, row_end, further);
      else forward_row<T, T, W, Rms, HasWeight, HasBias, Cast, false>(a, r, from, weight, bias, row_end, further);
    }
  }
  if (a.past_cache) stream_fence();
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
