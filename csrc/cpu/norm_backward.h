// LayerNorm and RMSNorm, backward: a few rows at a time, in two sweeps, so that the second finds x and dy in cache.
//
//   xhat = (x - mean)*rstd    g = dy*w    dw = sum_rows(dy*xhat)    db = sum_rows(dy)
//   dx = rstd*(g - c1 - xhat*c2)          c1 = sum(g)/n (left out for RMSNorm)    c2 = sum(g*xhat)/n
//
// The first sweep gives c1 and c2, the second dx, and dw and db added to the chunk's partial rows. Where the norm is that of a sum, the sum's
// other gradient is added to dx; with an `After` the second sweep goes run by run of columns, and that takes each run from there (add.h).
#pragma once

#include "add.h"
#include "kernels.h"
#include "vec.h"

namespace fused_norm {
namespace {

// One register's columns of dy, x and the weight.
template <typename A>
struct BackwardColumns {
  Vec<A> dy, x, w;
};

template <typename A>
struct RowSums {
  A g, gd;  // sum(g), sum(g*(x - mean))
};
// The same, lane by lane.
template <typename A>
struct BackwardSums {
  Vec<A> g = {}, gd = {};
  FUSED_NORM_INLINE BackwardSums operator+(const BackwardSums& o) const { return {g + o.g, gd + o.gd}; }
  FUSED_NORM_INLINE BackwardSums& operator+=(const BackwardSums& o) { return *this = *this + o; }
};

// Two registers of parameters beside elements of T: held ones are in the accumulation type and in the order of T's registers.
template <typename T, bool Held, typename P>
FUSED_NORM_INLINE Two<Acc<T>> params_at(const P* p) {
  if constexpr (Held) return {load(p), load(p + kLanes<Acc<T>>)};
  else return load_two_of<T>(p);
}
template <typename T, bool Held, typename P>
FUSED_NORM_INLINE Two<Acc<T>> params_of_end(const P* p, int64_t count) {
  if constexpr (Held) return {load(p), load(p + kLanes<Acc<T>>)};
  else return load_end<T>(p, count);
}

// sum(g) and sum(g*(x - mean)) over one row.
//
// The lines of `dx`, which the second sweep will write, are asked for meanwhile, unless they are written past the caches: a store to a line
// that is not in cache must fetch it first, and there the wait would be for memory.
template <typename T, typename P, bool Rms, bool HasWeight, bool Held, typename A = Acc<T>>
FUSED_NORM_NOINLINE RowSums<A> backward_sums(
    const T* dy, const T* x, const T* dx, const P* weight, A mean, int64_t n, const RowEnd<T>& end, Share share = nullptr) {
  using V = Vec<A>;
  using Columns = BackwardColumns<A>;
  struct TwoColumns {
    Columns a, b;
  };
  const V vmean = splat<A>(mean);
  const auto two = [](Two<A> dyv, Two<A> xv, Two<A> wv) { return TwoColumns{{dyv.a, xv.a, wv.a}, {dyv.b, xv.b, wv.b}}; };
  const Two<A> none{V{}, V{}};
  const auto at = [&](int64_t i) {
    if (dx) {
      __builtin_prefetch(dx + i, 1, 2);
      if (2 * kLanes<A> * sizeof(T) > 64) __builtin_prefetch(dx + i + kLanes<A>, 1, 2);
    }
    return two(load_two(dy + i), load_two(x + i), HasWeight ? params_at<T, Held>(weight + i) : none);
  };
  TwoColumns last{};
  if (const int64_t i = n - end.count; end.count) {
    last = two(load_end<T>(dy + i, end.count), load_end<T>(x + i, end.count), HasWeight ? params_of_end<T, Held>(weight + i, end.count) : none);
  }
  // What lies beyond the end is 0 in dy, and so in g.
  const BackwardSums<A> sums = sum_row<BackwardSums<A>>(n, end, at, last, [&](const Columns& c, auto&&, BackwardSums<A> acc) {
    const V g = HasWeight ? c.dy * c.w : c.dy;
    return BackwardSums<A>{Rms ? acc.g : acc.g + g, fma(g, Rms ? c.x : c.x - vmean, acc.gd)};
  }, share);
  return {Rms ? A(0) : sum_lanes(sums.g), sum_lanes(sums.gd)};
}

// Rows [row, row + R): c1 and c2 of each, then dx of each and their share of dw and db. With `stream` dx goes past the caches. While it is
// written, what comes `ahead` rows further on is fetched.
template <typename T, bool Rms, bool HasWeight, bool Held, bool Dx, bool Dw, bool Db, int R, typename P, typename After, typename A = Acc<T>>
FUSED_NORM_INLINE void backward_rows(
    const NormBackward& a, int64_t row, const P* weight, A* dw, A* db, int64_t ahead, bool stream, const RowEnd<T>& row_end, After& after) {
  using V = Vec<A>;
  constexpr int64_t L = kLanes<A>;
  constexpr bool HasAfter = !__is_same(After, Nothing);
  // Held rows are too short to be shared out, and of wide ones only one is taken at a time.
  constexpr bool Shared = R == 1 && !Held;
  const int64_t n = a.n;
  const T* dy[R];
  const T* x[R];
  const T* const dsummed = (const T*)a.dsummed + (Dx && a.dsummed ? row * a.dsummed_stride : 0);
  T* dx[R];
  V mean[R], rstd[R], c1[R], c2[R];
  for (int r = 0; r < R; r++) {
    dy[r] = (const T*)a.dy + (row + r) * a.dy_stride;
    x[r] = (const T*)a.x + (row + r) * a.x_stride;
    if constexpr (HasAfter) dx[r] = after.written(row + r);
    else dx[r] = (T*)a.dx + (Dx ? (row + r) * n : 0);
    if constexpr (Dx || Dw) {
      const A m = Rms ? A(0) : ((const A*)a.mean)[row + r];
      const A s = ((const A*)a.rstd)[row + r];
      mean[r] = splat<A>(m);
      rstd[r] = splat<A>(s);
      if constexpr (Dx) {
        const RowSums<A> sums =
            backward_sums<T, P, Rms, HasWeight, Held>(dy[r], x[r], a.past_cache ? nullptr : dx[r], weight, m, n, row_end, Shared ? a.share : nullptr);
        // Rounded once, as the row's every element has their error.
        c1[r] = splat<A>((A)((double)sums.g / (double)n));
        c2[r] = splat<A>((A)((double)sums.gd * s / (double)n));
      }
    }
  }

  // dx of one register of a row, and what it adds to dw and db.
  const auto column = [&](int r, V dyv, V xv, V wv, V& dw_sum, V& db_sum) -> V {
    V xhat = {};
    if constexpr (Dx || Dw) xhat = (Rms ? xv : xv - mean[r]) * rstd[r];
    if constexpr (Dw) dw_sum = r ? fma(dyv, xhat, dw_sum) : dyv * xhat;
    if constexpr (Db) db_sum = r ? db_sum + dyv : dyv;
    if constexpr (!Dx) return V{};
    const V g = HasWeight ? dyv * wv : dyv;
    // In this order, so that a row of one element has a gradient of exactly 0.
    return rstd[r] * fnma(xhat, c2[r], Rms ? g : g - c1[r]);
  };
  // Two registers of columns. All loads come before the stores: rows a multiple of 4096 bytes apart would otherwise make a load wait
  // for a store to another row with the same low address bits.
  const auto columns = [&](auto&& load_at, Two<A> wv, auto&& store_at, auto&& sum_into) {
    Two<A> dxv[R], dw_sum{V{}, V{}}, db_sum{V{}, V{}};
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const Two<A> dyv = load_at(dy[r]);
      Two<A> xv{V{}, V{}};
      if constexpr (Dx || Dw) xv = load_at(x[r]);
      dxv[r] = {column(r, dyv.a, xv.a, wv.a, dw_sum.a, db_sum.a), column(r, dyv.b, xv.b, wv.b, dw_sum.b, db_sum.b)};
    }
    if (Dx && dsummed) {
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const Two<A> v = load_at(dsummed + r * a.dsummed_stride);
        dxv[r] = {dxv[r].a + v.a, dxv[r].b + v.b};
      }
    }
    if constexpr (Dw) sum_into(dw, neighbours<T>(dw_sum));
    if constexpr (Db) sum_into(db, neighbours<T>(db_sum));
    if constexpr (Dx) {
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) store_at(r, dxv[r]);
    }
  };
  const Two<A> none{V{}, V{}};
  const auto weight_at = [&](int64_t i) {
    if constexpr (Dx && HasWeight) return params_at<T, Held>(weight + i);
    else return none;
  };
  const auto write = [&](int64_t begin, int64_t end) {
    const auto keep_for_after = [&](int r, int64_t i, Two<A> v) {
      if constexpr (HasAfter) {
        store(after.at(r) + (i - begin), v.a);
        store(after.at(r) + (i - begin) + L, v.b);
      }
    };
    int64_t i = begin;
    for (; i + 2 * L <= end; i += 2 * L) {
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        fetch_lines<2 * L * sizeof(T)>(dy[r] + i + ahead * a.dy_stride);
        if constexpr (Dx || Dw) fetch_lines<2 * L * sizeof(T)>(x[r] + i + ahead * a.x_stride);
      }
      columns(
          [&](const T* p) { return load_two(p + i); }, weight_at(i),
          [&](int r, Two<A> v) {
            if constexpr (HasAfter) keep_for_after(r, i, v);
            else if (stream) stream_two(dx[r] + i, v);
            else store_two(dx[r] + i, v);
          },
          [&](A* p, Two<A> v) {
            store(p + i, load(p + i) + v.a);
            store(p + i + L, load(p + i + L) + v.b);
          });
    }
    if (const int64_t rest = end - i; rest) {
      Two<A> wv = none;
      if constexpr (Dx && HasWeight) wv = params_of_end<T, Held>(weight + i, rest);
      columns(
          [&](const T* p) { return load_end<T>(p + i, rest); }, wv,
          [&](int r, Two<A> v) {
            if constexpr (HasAfter) keep_for_after(r, i, v);
            else store_end(dx[r] + i, rest, v);
          },
          [&](A* p, Two<A> v) {
            const Two<A> sum = load_end<A>(p + i, rest);
            store_end(p + i, rest, Two<A>{sum.a + v.a, sum.b + v.b});
          });
    }
    if constexpr (HasAfter) after.run(row, R, begin, end);
  };
  if constexpr (HasAfter) {
    for (int64_t begin = 0, end; begin < n; begin = end) write(begin, end = run_end<A>(begin, n));
  } else if constexpr (Shared) {
    constexpr int64_t kBlock = kSumBlock<A>;
    share_out(a.share, (n + kBlock - 1) / kBlock, kBlock, [&](int64_t begin, int64_t end) {
      write(begin * kBlock, end * kBlock < n ? end * kBlock : n);
      if (stream) stream_fence();
    });
  } else {
    write(0, n);
  }
}

// A chunk's rows, with the weight as it is or held.
template <typename T, bool Rms, bool HasWeight, bool Held, bool Dx, bool Dw, bool Db, typename P, typename After, typename A = Acc<T>>
FUSED_NORM_INLINE void backward_chunk(
    const NormBackward& a, int64_t row, int64_t stop, const P* weight, A* dw, A* db, bool stream, const RowEnd<T>& row_end, After& after) {
  // Four rows share one visit to w, dw and db, as long as all of them, and the next four, stay in cache from the one sweep to the other.
  // Beyond the chunk's end there is nothing to fetch; the same rows again cost next to nothing.
  const int64_t row_bytes = a.n * (int64_t)sizeof(T);
  // 16-bit rows that are too long to hold a weight for are taken one by one, also without a weight: dw has the same bits then.
  if constexpr (Held || !HasWeight || sizeof(T) > 2) {
    if (sizeof(T) > 2 ? row_bytes <= (64 << 10) : a.n <= kHeldColumns) {
      for (; row + 4 <= stop; row += 4) {
        backward_rows<T, Rms, HasWeight, Held, Dx, Dw, Db, 4>(a, row, weight, dw, db, row + 8 <= stop ? 4 : 0, stream, row_end, after);
      }
    }
  }
  for (; row < stop; row++) {
    const int64_t ahead = row_bytes <= (128 << 10) && row + 1 < stop ? 1 : 0;
    backward_rows<T, Rms, HasWeight, Held, Dx, Dw, Db, 1>(a, row, weight, dw, db, ahead, stream, row_end, after);
  }
}

template <typename T, typename W, bool Rms, bool HasWeight, bool Dx, bool Dw, bool Db, bool HasAfter = false>
void backward_chunks(const NormBackward& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr bool Narrow = sizeof(T) == 2 && HasWeight;
  const int64_t n = a.n;
  const RowEnd<T> row_end(n);
  typename Choice<HasAfter, AfterBackward<T, 4>, Nothing>::type after(a);
  alignas(64) A held[Narrow ? kHeldColumns : 1];
  const bool holds = Narrow && n <= kHeldColumns;
  // Four rows are written in turn: a store that does not fill a line would let go of it half full.
  const bool stream = !HasAfter && Dx && a.past_cache && kStreamBytes<T> == 64 && ((uintptr_t)a.dx | n * sizeof(T)) % kStreamBytes<T> == 0;
  const W* held_from = nullptr;
  for (int64_t chunk = begin; chunk < end; chunk++) {
    const int64_t group = chunk / a.chunks_per_group;
    const int64_t first = (chunk - group * a.chunks_per_group) * a.rows_per_chunk;
    const int64_t rest = a.rows_per_group - first;
    const int64_t rows = rest < a.rows_per_chunk ? rest : a.rows_per_chunk;
    const W* weight = (const W*)a.weight + (HasWeight ? group * a.weight_stride : 0);
    A* dw = (A*)a.dw_partial + (Dw ? chunk * n : 0);
    A* db = (A*)a.db_partial + (Db ? chunk * n : 0);
    if constexpr (Dw) memset(dw, 0, n * sizeof(A));
    if constexpr (Db) memset(db, 0, n * sizeof(A));
    const int64_t row = group * a.rows_per_group + first;
    if constexpr (Narrow) {
      if (holds) {
        if (weight != held_from) hold<T>(weight, n, held);
        held_from = weight;
        backward_chunk<T, Rms, HasWeight, true, Dx, Dw, Db>(a, row, row + rows, (const A*)held, dw, db, stream, row_end, after);
        continue;
      }
    }
    backward_chunk<T, Rms, HasWeight, false, Dx, Dw, Db>(a, row, row + rows, weight, dw, db, stream, row_end, after);
  }
  if (HasAfter ? a.past_cache : stream) stream_fence();
}

template <typename T, typename W, bool Rms, bool HasWeight, bool HasAfter>
void backward_params(const NormBackward& a, int64_t begin, int64_t end) {
  const bool dw = a.dw_partial, db = a.db_partial;
  if (dw && db) return backward_chunks<T, W, Rms, HasWeight, true, true, true, HasAfter>(a, begin, end);
  if (dw) return backward_chunks<T, W, Rms, HasWeight, true, true, false, HasAfter>(a, begin, end);
  return backward_chunks<T, W, Rms, HasWeight, true, false, false, HasAfter>(a, begin, end);
}

template <typename T, typename W, bool Rms>
void backward_needs(const NormBackward& a, int64_t begin, int64_t end) {
  const bool dw = a.dw_partial, db = a.db_partial;
  if (a.after) {
    return a.weight ? backward_params<T, W, Rms, true, true>(a, begin, end) : backward_params<T, T, Rms, false, true>(a, begin, end);
  }
  if (a.dx) {
    return a.weight ? backward_params<T, W, Rms, true, false>(a, begin, end) : backward_params<T, T, Rms, false, false>(a, begin, end);
  }
  // The weight plays no part.
  if (dw && db) return backward_chunks<T, T, Rms, false, false, true, true>(a, begin, end);
  if (dw) return backward_chunks<T, T, Rms, false, false, true, false>(a, begin, end);
  if (db) return backward_chunks<T, T, Rms, false, false, false, true>(a, begin, end);
}

template <typename T, typename W>
void backward_rms(bool rms, const NormBackward& a, int64_t begin, int64_t end) {
  return rms ? backward_needs<T, W, true>(a, begin, end) : backward_needs<T, W, false>(a, begin, end);
}

void norm_backward(Dtype dtype, Dtype weight_dtype, bool rms, const NormBackward& a, int64_t begin, int64_t end) {
  const bool mixed = weight_dtype != dtype;
  switch (dtype) {
    case Dtype::f64: return backward_rms<double, double>(rms, a, begin, end);
    case Dtype::f32: return backward_rms<float, float>(rms, a, begin, end);
    case Dtype::bf16:
      return mixed ? backward_rms<BFloat16, float>(rms, a, begin, end) : backward_rms<BFloat16, BFloat16>(rms, a, begin, end);
    case Dtype::f16:
      return mixed ? backward_rms<Half, float>(rms, a, begin, end) : backward_rms<Half, Half>(rms, a, begin, end);
  }
}

// Four accumulators over the chunks: chunk c goes to number c % 4.
template <typename T, typename A = Acc<T>>
void reduce_columns(const ReducePartials& a, int64_t group, int64_t begin, int64_t end) {
  using V = Vec<A>;
  constexpr int64_t L = kLanes<A>;
  const int64_t n = a.n, chunks = a.chunks_per_group;
  const A* partial = (const A*)a.partial + group * chunks * n + begin;
  T* out = (T*)a.out + group * n + begin;
  const auto sum = [&](auto&& load_at) {
    V s[4] = {};
    int64_t c = 0;
    for (; c + 4 <= chunks; c += 4) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) s[k] += load_at(partial + (c + k) * n);
    }
    for (int k = 0; c + k < chunks; k++) s[k] += load_at(partial + (c + k) * n);
    return (V)((s[0] + s[1]) + (s[2] + s[3]));
  };
  const int64_t columns = end - begin;
  for (int64_t i = 0; i + L <= columns; i += L) {
    store(out + i, sum([&](const A* p) { return load(p + i); }));
  }
  const Tail<A> tail(columns);
  if (tail.any) tail.store(out, sum([&](const A* p) { return tail.load(p); }));
}

void reduce_partials(Dtype dtype, Dtype out_dtype, const ReducePartials& a, int64_t group, int64_t begin, int64_t end) {
  switch (out_dtype) {
    case Dtype::f64:
      // fp64 x has fp64 partials and results, and nothing else has.
      return dtype == Dtype::f64 ? reduce_columns<double>(a, group, begin, end) : void();
    case Dtype::f32: return reduce_columns<float>(a, group, begin, end);
    case Dtype::bf16: return reduce_columns<BFloat16>(a, group, begin, end);
    case Dtype::f16: return reduce_columns<Half>(a, group, begin, end);
  }
}

}  // namespace
}  // namespace fused_norm
