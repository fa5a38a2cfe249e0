// What stands before and behind the norm where a sum is normed: dropout and the residual.
//
//   summed = x*keep/(1 - p) + residual        d = dx of the norm + dsummed    dresidual = d    dx = d*keep/(1 - p)
//
// The first is a pass of its own over a few rows, which the norm then finds in cache. dsummed is added where the norm's backward has dx in
// registers, and where dx is another than d, it is made of runs of d that lie unrounded in L1.
#pragma once

#include "kernels.h"
#include "philox.h"
#include "vec.h"

namespace fused_norm {
namespace {

template <bool First, typename A, typename B>
struct Choice {
  using type = A;
};
template <typename A, typename B>
struct Choice<false, A, B> {
  using type = B;
};
struct Nothing {
  template <typename... Any>
  explicit Nothing(const Any&...) {}
};

// `index` is that of the first element, counted over all rows; `keep` is a Keep, or Nothing.
template <typename T, typename X, typename K, typename A = Acc<T>>
FUSED_NORM_INLINE void add_row(const X* x, const T* residual, T* summed, int64_t n, int64_t index, K& keep) {
  using V = Vec<A>;
  constexpr int64_t L = kLanes<A>;
  constexpr bool Drop = !__is_same(K, Nothing);
  const Tail<A> tail(n);
  for (int64_t begin = 0, end; begin < n; begin = end) {
    end = Drop ? run_end<A>(begin, n) : n;
    if constexpr (Drop) keep.draw(index + begin, end - begin);
    const auto add = [&](V v, V r, int64_t i) {
      if constexpr (Drop) return fma(v, keep.at(i - begin), r);
      else return v + r;
    };
    for (int64_t i = begin; i + L <= end; i += L) store(summed + i, add(load(x + i), load(residual + i), i));
    if (tail.any && end == n) tail.store(summed, add(tail.load(x), tail.load(residual), tail.start));
  }
}

template <typename T, typename X, bool Drop>
void add_rows(const AddRows& a, int64_t begin, int64_t end) {
  typename Choice<Drop, Keep<Acc<T>>, Nothing>::type keep(a.dropout);
  const X* x = (const X*)a.x + begin * a.x_stride;
  const T* residual = (const T*)a.residual + begin * a.residual_stride;
  T* summed = (T*)a.summed + begin * a.n;
  // No element of a row minds where the row ends.
  if (a.x_stride == a.n && a.residual_stride == a.n) return add_row(x, residual, summed, (end - begin) * a.n, begin * a.n, keep);
  for (int64_t row = begin; row < end; row++, x += a.x_stride, residual += a.residual_stride, summed += a.n) {
    add_row(x, residual, summed, a.n, row * a.n, keep);
  }
}

template <typename T, typename X>
void add_dropped(const AddRows& a, int64_t begin, int64_t end) {
  return a.dropout.any ? add_rows<T, X, true>(a, begin, end) : add_rows<T, X, false>(a, begin, end);
}

void add(Dtype dtype, Dtype x_dtype, const AddRows& a, int64_t begin, int64_t end) {
  switch (dtype) {
    case Dtype::f64: return add_dropped<double, double>(a, begin, end);
    case Dtype::f32:
      return x_dtype == Dtype::bf16  ? add_dropped<float, BFloat16>(a, begin, end)
             : x_dtype == Dtype::f16 ? add_dropped<float, Half>(a, begin, end)
                                     : add_dropped<float, float>(a, begin, end);
    case Dtype::bf16: return add_dropped<BFloat16, BFloat16>(a, begin, end);
    case Dtype::f16: return add_dropped<Half, Half>(a, begin, end);
  }
}

// Where the norm's backward leaves d of a few rows' columns [begin, end), for the results to be rounded from.
template <typename T, int Rows, typename A = Acc<T>>
class AfterBackward {
 public:
  explicit AfterBackward(const NormBackward& a) : after_(*a.after), n_(a.n), keep_(a.after->dropout) {}

  // Memory that run will write for this row (in 16-bit dx beside fp32 it takes half of what a row of T would).
  FUSED_NORM_INLINE T* written(int64_t row) const {
    if (after_.dresidual) return (T*)after_.dresidual + row * n_;
    return (T*)((char*)after_.dx + row * n_ * (after_.x_dtype == Dtype::bf16 || after_.x_dtype == Dtype::f16 ? 2 : sizeof(T)));
  }

  // Column `begin` of row r.
  FUSED_NORM_INLINE A* at(int r) { return d_ + r * kLongestRun<A>; }

  FUSED_NORM_NOINLINE void run(int64_t row, int rows, int64_t begin, int64_t end, const Tail<A>& tail) {
    // Beside a 16-bit sum there is no other 16-bit type.
    if constexpr (__is_same(T, float)) {
      if (after_.x_dtype == Dtype::bf16) return run_rows<BFloat16>(row, rows, begin, end, tail);
      if (after_.x_dtype == Dtype::f16) return run_rows<Half>(row, rows, begin, end, tail);
    }
    run_rows<T>(row, rows, begin, end, tail);
  }

 private:
  template <typename X>
  FUSED_NORM_INLINE void run_rows(int64_t row, int rows, int64_t begin, int64_t end, const Tail<A>& tail) {
    for (int r = 0; r < rows; r++) {
      after_.dropout.any ? run_row<X, true>(row + r, at(r), begin, end, tail) : run_row<X, false>(row + r, at(r), begin, end, tail);
    }
  }

  template <typename X, bool Drop>
  FUSED_NORM_INLINE void run_row(int64_t row, const A* d, int64_t begin, int64_t end, const Tail<A>& tail) {
    using V = Vec<A>;
    constexpr int64_t L = kLanes<A>;
    T* const dresidual = after_.dresidual ? (T*)after_.dresidual + row * n_ : nullptr;
    X* const dx = (X*)after_.dx + row * n_;
    if constexpr (Drop) keep_.draw(row * n_ + begin, end - begin);
    const auto dropped = [&](V v, int64_t i) {
      if constexpr (Drop) return v * keep_.at(i - begin);
      else return v;
    };
    for (int64_t i = begin; i + L <= end; i += L) {
      const V v = load(d + (i - begin));
      if (dresidual) store(dresidual + i, v);
      store(dx + i, dropped(v, i));
    }
    if (tail.any && end == n_) {
      const V v = tail.load(d, begin);
      if (dresidual) tail.store(dresidual, v);
      tail.store(dx, dropped(v, tail.start));
    }
  }

  const AddBackward& after_;
  int64_t n_;
  Keep<A> keep_;
  A d_[Rows * kLongestRun<A>];
};

}  // namespace
}  // namespace fused_norm
