// What stands before and behind the norm where a sum is normed: dropout and the residual.
//
//   summed = x*keep/(1 - p) + residual        d = dx of the norm + dsummed    dresidual = d    dx = d*keep/(1 - p)
//
// The first is a pass of its own over a few rows, which the norm then finds in cache. dsummed is added where the norm's backward has dx in
// registers, and where dx is another than d, it is made of runs of d that lie unrounded in L1.
#pragma once

#include "kernels.h"
#include "philox.h"
#include "rows.h"
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

// `index` is that of the first element, counted over all rows; `keep` is a Keep, or Nothing. The sum goes to `held` as well, in the order of
// T's registers, unless that is null; then what goes to `summed` will not be read soon.
template <typename T, typename X, typename K, typename A = Acc<T>>
FUSED_NORM_INLINE void add_row(
    const X* x, const T* residual, T* summed, A* held, bool past_cache, int64_t n, int64_t index, K& keep) {
  constexpr int64_t L = kLanes<A>;
  constexpr bool Drop = !__is_same(K, Nothing);
  for (int64_t begin = 0, end; begin < n; begin = end) {
    end = Drop ? run_end<A>(begin, n) : n;
    if constexpr (Drop) keep.draw(index + begin, end - begin);
    const auto add = [&](Two<A> v, Two<A> r, int64_t i) {
      if constexpr (Drop) {
        const Two<A> k = order_two<T>(keep.at(i), keep.at(i + L));
        v = {fma(v.a, k.a, r.a), fma(v.b, k.b, r.b)};
      } else {
        v = {v.a + r.a, v.b + r.b};
      }
      if (held) {
        v = {rounded<T>(v.a), rounded<T>(v.b)};
        store(held + begin + i, v.a);
        store(held + begin + i + L, v.b);
      }
      return v;
    };
    const auto at = [&](int64_t i) { return add(load_two_of<T>(x + begin + i), load_two(residual + begin + i), i); };
    const auto last = [&](int64_t i) {
      const int64_t count = end - begin - i;
      return add(load_end<T>(x + begin + i, count), load_end<T>(residual + begin + i, count), i);
    };
    write_row(summed + begin, end - begin, held && past_cache, at, last, [](int64_t) {});
  }
}

template <typename T, typename X, bool Drop, typename A = Acc<T>>
FUSED_NORM_NOINLINE void add_some_rows(const AddRows& a, int64_t begin, int64_t end, A* held, int64_t held_stride) {
  typename Choice<Drop, Keep<A>, Nothing>::type keep(a.dropout);
  const X* x = (const X*)a.x + begin * a.x_stride;
  const T* residual = (const T*)a.residual + begin * a.residual_stride;
  T* summed = (T*)a.summed + begin * a.n;
  // No element of a row minds where the row ends.
  if (a.x_stride == a.n && a.residual_stride == a.n && (!held || held_stride == a.n)) {
    const int64_t n = (end - begin) * a.n;
    return add_row(x, residual, summed, held, a.past_cache, n, begin * a.n, keep);
  }
  for (int64_t row = begin; row < end; row++, x += a.x_stride, residual += a.residual_stride, summed += a.n) {
    add_row(x, residual, summed, held, a.past_cache, a.n, row * a.n, keep);
    if (held) held += held_stride;
  }
}

template <typename T, typename X, typename A = Acc<T>>
FUSED_NORM_INLINE void add_dropped(const AddRows& a, int64_t begin, int64_t end, A* held, int64_t held_stride) {
  return a.dropout.any ? add_some_rows<T, X, true>(a, begin, end, held, held_stride)
                       : add_some_rows<T, X, false>(a, begin, end, held, held_stride);
}

// Rows [begin, end) of the sum; where `held` is not null also there, `held_stride` elements from one row to the next.
template <typename T, typename A = Acc<T>>
FUSED_NORM_INLINE void add_rows(const AddRows& a, int64_t begin, int64_t end, A* held, int64_t held_stride) {
  // Beside a 16-bit sum there is no other 16-bit type.
  if constexpr (__is_same(T, float)) {
    if (a.x_dtype == Dtype::bf16) return add_dropped<T, BFloat16>(a, begin, end, held, held_stride);
    if (a.x_dtype == Dtype::f16) return add_dropped<T, Half>(a, begin, end, held, held_stride);
  }
  add_dropped<T, T>(a, begin, end, held, held_stride);
}

// Where the norm's backward leaves d of a few rows' columns [begin, end), for the results to be rounded from.
template <typename T, int Rows, typename A = Acc<T>>
class AfterBackward {
 public:
  explicit AfterBackward(const NormBackward& a) : after_(*a.after), n_(a.n), past_cache_(a.past_cache), keep_(a.after->dropout) {}

  // Memory that run will write for this row (in 16-bit dx beside fp32 it takes half of what a row of T would).
  FUSED_NORM_INLINE T* written(int64_t row) const {
    if (after_.dresidual) return (T*)after_.dresidual + row * n_;
    return (T*)((char*)after_.dx + row * n_ * (after_.x_dtype == Dtype::bf16 || after_.x_dtype == Dtype::f16 ? 2 : sizeof(T)));
  }

  // Column `begin` of row r, in the order of T's registers.
  FUSED_NORM_INLINE A* at(int r) { return d_ + r * kStride; }

  FUSED_NORM_NOINLINE void run(int64_t row, int rows, int64_t begin, int64_t end) {
    // Beside a 16-bit sum there is no other 16-bit type.
    if constexpr (__is_same(T, float)) {
      if (after_.x_dtype == Dtype::bf16) return run_rows<BFloat16>(row, rows, begin, end);
      if (after_.x_dtype == Dtype::f16) return run_rows<Half>(row, rows, begin, end);
    }
    run_rows<T>(row, rows, begin, end);
  }

 private:
  template <typename X>
  FUSED_NORM_INLINE void run_rows(int64_t row, int rows, int64_t begin, int64_t end) {
    for (int r = 0; r < rows; r++) {
      after_.dropout.any ? run_row<X, true>(row + r, at(r), begin, end) : run_row<X, false>(row + r, at(r), begin, end);
    }
  }

  template <typename X, bool Drop>
  FUSED_NORM_INLINE void run_row(int64_t row, const A* d, int64_t begin, int64_t end) {
    constexpr int64_t L = kLanes<A>;
    if constexpr (Drop) keep_.draw(row * n_ + begin, end - begin);
    const auto d_at = [&](int64_t i) { return Two<A>{load(d + i), load(d + i + L)}; };
    const auto dx_at = [&](int64_t i) {
      Two<A> v = d_at(i);
      if constexpr (Drop) {
        const Two<A> k = order_two<T>(keep_.at(i), keep_.at(i + L));
        v = {v.a * k.a, v.b * k.b};
      }
      if constexpr (!__is_same(X, T)) v = order_two<X>(v.a, v.b);
      return v;
    };
    const auto nothing_ahead = [](int64_t) {};
    if (after_.dresidual) write_row((T*)after_.dresidual + row * n_ + begin, end - begin, past_cache_, d_at, d_at, nothing_ahead);
    write_row((X*)after_.dx + row * n_ + begin, end - begin, past_cache_, dx_at, dx_at, nothing_ahead);
  }

  const AddBackward& after_;
  int64_t n_;
  bool past_cache_;
  Keep<A> keep_;
  // A run may end with registers that are not full.
  static constexpr int64_t kStride = kLongestRun<A> + 2 * kLanes<A>;
  A d_[Rows * kStride];
};

}  // namespace
}  // namespace fused_norm
