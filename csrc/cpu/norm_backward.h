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

template <typename A>
struct RowSums {
  A g, gd;  // sum(g), sum(g*(x - mean))
};

// sum(g) and sum(g*(x - mean)) over one row, accumulated as in sum_row (norm_forward.h).
//
// The lines of `dx`, which the second sweep will write, are asked for meanwhile: a store to a line that is not in cache must fetch it
// first, and there the wait would be for memory.
template <typename T, typename W, bool Rms, bool HasWeight, typename A = Acc<T>>
FUSED_NORM_NOINLINE RowSums<A> backward_sums(const T* dy, const T* x, const T* dx, const W* weight, A mean, int64_t n, const Tail<A>& tail) {
  using V = Vec<A>;
  constexpr int64_t L = kLanes<A>, kRounds = 64;
  const V vmean = splat<A>(mean);
  const auto add = [&](V dyv, V xv, V wv, V& g_sum, V& gd_sum) {
    const V g = HasWeight ? dyv * wv : dyv;
    if constexpr (!Rms) g_sum += g;
    gd_sum = fma(g, Rms ? xv : xv - vmean, gd_sum);
  };
  const auto add_at = [&](int64_t i, V& g_sum, V& gd_sum) {
    __builtin_prefetch(dx + i, 1, 2);
    add(load(dy + i), load(x + i), HasWeight ? (V)load(weight + (HasWeight ? i : 0)) : V{}, g_sum, gd_sum);
  };
  V g_total = {}, gd_total = {};
  int64_t i = 0;
  while (n - i >= 4 * L) {
    const int64_t rounds = (n - i) / (4 * L);
    const int64_t end = i + 4 * L * (rounds < kRounds ? rounds : kRounds);
    V g0 = {}, g1 = {}, g2 = {}, g3 = {}, d0 = {}, d1 = {}, d2 = {}, d3 = {};
    for (; i < end; i += 4 * L) {
      add_at(i, g0, d0);
      add_at(i + L, g1, d1);
      add_at(i + 2 * L, g2, d2);
      add_at(i + 3 * L, g3, d3);
    }
    if constexpr (!Rms) g_total += (g0 + g1) + (g2 + g3);
    gd_total += (d0 + d1) + (d2 + d3);
  }
  for (; n - i >= L; i += L) add_at(i, g_total, gd_total);
  if (tail.any) {
    V g = {}, gd = {};
    add(tail.load(dy), tail.load(x), HasWeight ? (V)tail.load(weight) : V{}, g, gd);
    g_total += tail.keep(g);
    gd_total += tail.keep(gd);
  }
  return {Rms ? A(0) : sum_lanes(g_total), sum_lanes(gd_total)};
}

// Rows [row, row + R): c1 and c2 of each, then dx of each and their share of dw and db.
template <typename T, typename W, bool Rms, bool HasWeight, bool Dx, bool Dw, bool Db, int R, typename After, typename A = Acc<T>>
FUSED_NORM_INLINE void backward_rows(
    const NormBackward& a, int64_t row, const W* weight, A* dw, A* db, const Tail<A>& tail, After& after) {
  using V = Vec<A>;
  constexpr int64_t L = kLanes<A>;
  constexpr bool HasAfter = !__is_same(After, Nothing);
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
        const RowSums<A> sums = backward_sums<T, W, Rms, HasWeight>(dy[r], x[r], dx[r], weight, m, n, tail);
        c1[r] = splat<A>(sums.g / (A)n);
        c2[r] = splat<A>(sums.gd * s / (A)n);
      }
    }
  }

  // One register of columns. All loads come before the stores: rows a multiple of 4096 bytes apart would otherwise make a load wait
  // for a store to another row with the same low address bits.
  const auto columns = [&](auto&& load_at, auto&& weight_at, auto&& store_at, auto&& sum_into) {
    V dxv[R], dw_sum = {}, db_sum = {};
    V wv = {};
    if constexpr (Dx && HasWeight) wv = weight_at();
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const V dyv = load_at(dy[r]);
      V xhat = {};
      if constexpr (Dx || Dw) {
        const V xv = load_at(x[r]);
        xhat = (Rms ? xv : xv - mean[r]) * rstd[r];
      }
      if constexpr (Dw) dw_sum = r ? fma(dyv, xhat, dw_sum) : dyv * xhat;
      if constexpr (Db) db_sum = r ? db_sum + dyv : dyv;
      if constexpr (Dx) {
        const V g = HasWeight ? dyv * wv : dyv;
        dxv[r] = rstd[r] * fnma(xhat, c2[r], Rms ? g : g - c1[r]);
      }
    }
    if (Dx && dsummed) {
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) dxv[r] += load_at(dsummed + r * a.dsummed_stride);
    }
    if constexpr (Dw) sum_into(dw, dw_sum);
    if constexpr (Db) sum_into(db, db_sum);
    if constexpr (Dx) {
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) store_at(r, dxv[r]);
    }
  };
  for (int64_t begin = 0, end; begin < n; begin = end) {
    end = HasAfter ? run_end<A>(begin, n) : n;
    for (int64_t i = begin; i + L <= end; i += L) {
      columns(
          [&](const T* p) { return load(p + i); }, [&] { return load(weight + i); },
          [&](int r, V v) {
            if constexpr (HasAfter) store(after.at(r) + (i - begin), v);
            else store(dx[r] + i, v);
          },
          [&](A* p, V v) { store(p + i, load(p + i) + v); });
    }
    if (tail.any && end == n) {
      columns(
          [&](const T* p) { return tail.load(p); }, [&] { return tail.load(weight); },
          [&](int r, V v) {
            if constexpr (HasAfter) tail.store(after.at(r), v, begin);
            else tail.store(dx[r], v);
          },
          [&](A* p, V v) { tail.store(p, tail.load(p) + tail.keep(v)); });
    }
    if constexpr (HasAfter) after.run(row, R, begin, end, tail);
  }
}

template <typename T, typename W, bool Rms, bool HasWeight, bool Dx, bool Dw, bool Db, bool HasAfter = false>
void backward_chunks(const NormBackward& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t n = a.n;
  const Tail<A> tail(n);
  typename Choice<HasAfter, AfterBackward<T, 4>, Nothing>::type after(a);
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
    int64_t row = group * a.rows_per_group + first;
    const int64_t stop = row + rows;
    // Four rows share one visit to w, dw and db.
    for (; row + 4 <= stop; row += 4) backward_rows<T, W, Rms, HasWeight, Dx, Dw, Db, 4>(a, row, weight, dw, db, tail, after);
    for (; row < stop; row++) backward_rows<T, W, Rms, HasWeight, Dx, Dw, Db, 1>(a, row, weight, dw, db, tail, after);
  }
}

template <typename T, typename W, bool Rms, bool HasWeight, bool HasAfter>
void backward_params(const NormBackward& a, int64_t begin, int64_t end) {
  const bool dw = a.dw_partial, db = a.db_partial;
  if (dw && db) return backward_chunks<T, W, Rms, HasWeight, true, true, true, HasAfter>(a, begin, end);
  if (dw) return backward_chunks<T, W, Rms, HasWeight, true, true, false, HasAfter>(a, begin, end);
  if (db) return backward_chunks<T, W, Rms, HasWeight, true, false, true, HasAfter>(a, begin, end);
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
