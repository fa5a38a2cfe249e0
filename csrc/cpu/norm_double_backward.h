// LayerNorm and RMSNorm, the derivatives of backward: a row or two at a time, in sweeps of which all but the first find them in cache.
//
//   u = ddx, v = ddw, c = ddb: the gradients of dx, dw, db    xhat = (x - mean)*rstd    g = dy*w
//   a = sum(u*xhat)/n    b = sum(g*xhat)/n    p = u - sum(u)/n - xhat*a
//   grad_dy = w*rstd*p + v*xhat + c           grad_w = sum_rows(dy*rstd*p)
//   t = v*dy - rstd*(b*u + a*g)               grad_x = rstd*(t - sum(t)/n - xhat*k)    k = sum(t*xhat)/n + rstd*sum(p*g)/n
//
// RMSNorm leaves sum(u)/n and sum(t)/n out. The first sweeps over a row give sum(u) and a, and where grad_x is wanted b. For grad_x another
// gives sum(t) and k, from p and t themselves: put together from the sums of the first they would cancel. The last sweep writes grad_dy
// and grad_x, and adds grad_w to the chunk's partial row. So u, x and dy are read from memory once, and dy only for grad_x or grad_w.
//
// Without u, p is zero and grad_x is backward with v in the weight's place.
#pragma once

#include "kernels.h"
#include "norm_backward.h"
#include "vec.h"

namespace fused_norm {
namespace {

// What a row's last two sweeps take from the sums before them, each in every lane of a register.
template <typename A>
struct DoubleBackwardRow {
  Vec<A> mean, rstd;  // mean is unused for RMSNorm
  Vec<A> u_mean, a;
  Vec<A> minus_rstd_a, minus_rstd_b;
};

template <bool Rms, typename A>
FUSED_NORM_INLINE Vec<A> xhat_of(const DoubleBackwardRow<A>& row, Vec<A> x) {
  return (Rms ? x : x - row.mean) * row.rstd;
}
template <bool Rms, typename A>
FUSED_NORM_INLINE Vec<A> p_of(const DoubleBackwardRow<A>& row, Vec<A> u, Vec<A> xhat) {
  return fnma(xhat, row.a, Rms ? u : u - row.u_mean);
}
// t, less v*dy
template <typename A>
FUSED_NORM_INLINE Vec<A> t_of(const DoubleBackwardRow<A>& row, Vec<A> u, Vec<A> g) {
  return fma(row.minus_rstd_a, g, row.minus_rstd_b * u);
}

template <typename A>
struct DoubleBackwardSums {
  Vec<A> t = {}, t_xhat = {}, p_g = {};
};

// sum(t), sum(t*xhat) and sum(p*g) over one row: as sum_row (rows.h), but two accumulators of each kind are chains enough.
template <typename T, typename W, bool Rms, bool HasWeight, bool HasV, typename A = Acc<T>>
FUSED_NORM_NOINLINE void double_backward_sums(
    const DoubleBackwardRow<A>& constants, const T* u, const T* dy, const T* x, const W* weight, const W* v, int64_t n, const Tail<A>& tail,
    A* t_sum, A* t_xhat_sum, A* p_g_sum) {
  using V = Vec<A>;
  using Sums = DoubleBackwardSums<A>;
  constexpr int64_t L = kLanes<A>, kRounds = 64;
  const DoubleBackwardRow<A> row = constants;  // a copy that no store can change
  const auto add = [&](auto&& load_at, Sums& sums) {
    const V uv = load_at(u), dyv = load_at(dy), xhat = xhat_of<Rms>(row, load_at(x));
    V g = dyv;
    if constexpr (HasWeight) g = dyv * load_at(weight);
    V t = t_of(row, uv, g);
    if constexpr (HasV) t = fma(load_at(v), dyv, t);
    if constexpr (!Rms) sums.t += t;
    sums.t_xhat = fma(t, xhat, sums.t_xhat);
    sums.p_g = fma(p_of<Rms>(row, uv, xhat), g, sums.p_g);
  };
  const auto add_at = [&](int64_t i, Sums& sums) { add([&](const auto* from) { return load(from + i); }, sums); };
  Sums total;
  int64_t i = 0;
  while (n - i >= 2 * L) {
    const int64_t rounds = (n - i) / (2 * L);
    const int64_t end = i + 2 * L * (rounds < kRounds ? rounds : kRounds);
    Sums s0, s1;
    for (; i < end; i += 2 * L) {
      add_at(i, s0);
      add_at(i + L, s1);
    }
    if constexpr (!Rms) total.t += s0.t + s1.t;
    total.t_xhat += s0.t_xhat + s1.t_xhat;
    total.p_g += s0.p_g + s1.p_g;
  }
  if (n - i >= L) add_at(i, total);
  if (tail.any) {
    Sums last;
    add([&](const auto* from) { return tail.load(from); }, last);
    total.t += tail.keep(last.t);
    total.t_xhat += tail.keep(last.t_xhat);
    total.p_g += tail.keep(last.p_g);
  }
  *t_sum = Rms ? A(0) : sum_lanes(total.t);
  *t_xhat_sum = sum_lanes(total.t_xhat);
  *p_g_sum = sum_lanes(total.p_g);
}

// Where one group's parameters and one chunk's partial row lie; each may be null.
template <typename W, typename A>
struct DoubleBackwardParams {
  const W* weight;
  const W* v;
  const W* c;
  A* grad_w;
};

// Rows [row, row + R).
//
// Parameters and results that are not there are looked for anew at every register of columns, in all rows at once: a branch that always
// goes the same way is nothing beside the loads, and one kernel serves every subset.
template <typename T, typename W, bool Rms, bool Dx, int R, typename A = Acc<T>>
FUSED_NORM_INLINE void double_backward_rows(
    const NormDoubleBackward& args, int64_t first, const DoubleBackwardParams<W, A>& params, const Tail<A>& tail, const RowEnd<T>& row_end) {
  using V = Vec<A>;
  constexpr int64_t L = kLanes<A>;
  const int64_t n = args.n;
  const W* const weight = params.weight;
  const W* const v = params.v;
  const W* const c = params.c;
  A* const grad_w = params.grad_w;
  const bool has_grad_dy = args.grad_dy;
  const T* u[R];
  const T* dy[R];
  const T* x[R];
  T* grad_dy[R];
  T* grad_x[R];
  DoubleBackwardRow<A> row[R];
  V t_mean[R], k[R];
  for (int r = 0; r < R; r++) {
    u[r] = (const T*)args.ddx + (first + r) * args.ddx_stride;
    dy[r] = (const T*)args.dy + (first + r) * args.dy_stride;  // null if neither grad_x nor grad_w is wanted; and never read then
    x[r] = (const T*)args.x + (first + r) * args.x_stride;
    grad_dy[r] = has_grad_dy ? (T*)args.grad_dy + (first + r) * n : nullptr;
    grad_x[r] = Dx ? (T*)args.grad_x + (first + r) * n : nullptr;

    const A count = (A)n, rstd = ((const A*)args.rstd)[first + r], mean = Rms ? A(0) : ((const A*)args.mean)[first + r];
    // These sweeps ask for the lines that the last will write, those of grad_dy and of grad_x. With neither there is the partial row.
    const T* const written = Dx ? grad_x[r] : (const T*)grad_w;
    const RowSums<A> us = backward_sums<T, T, Rms, false, false>(u[r], x[r], has_grad_dy ? grad_dy[r] : written, nullptr, mean, n, row_end);
    const A a = us.gd * rstd / count;
    row[r].mean = splat<A>(mean);
    row[r].rstd = splat<A>(rstd);
    row[r].u_mean = splat<A>(us.g / count);
    row[r].a = splat<A>(a);
    if constexpr (Dx) {
      const RowSums<A> gs = weight ? backward_sums<T, W, Rms, true, false>(dy[r], x[r], grad_x[r], weight, mean, n, row_end)
                                   : backward_sums<T, T, Rms, false, false>(dy[r], x[r], grad_x[r], nullptr, mean, n, row_end);
      const A b = gs.gd * rstd / count;
      row[r].minus_rstd_a = splat<A>(-rstd * a);
      row[r].minus_rstd_b = splat<A>(-rstd * b);
      A t, t_xhat, p_g;
      const auto sums = weight ? v ? double_backward_sums<T, W, Rms, true, true> : double_backward_sums<T, W, Rms, true, false>
                               : v ? double_backward_sums<T, W, Rms, false, true> : double_backward_sums<T, W, Rms, false, false>;
      sums(row[r], u[r], dy[r], x[r], weight, v, n, tail, &t, &t_xhat, &p_g);
      t_mean[r] = splat<A>(t / count);
      k[r] = splat<A>((t_xhat + rstd * p_g) / count);
    }
  }

  // One register of columns. All loads come before the stores, as in backward_rows. grad_w is added up row by row, and so has the same bits
  // for any R.
  const V zero = {}, one = splat<A>(1);
  const auto columns = [&](auto&& load_at, auto&& store_at, auto&& store_sum) {
    const V wv = weight ? load_at(weight) : one, vv = v ? load_at(v) : zero, cv = c ? load_at(c) : zero;
    const V sum_before = grad_w ? load_at(grad_w) : zero;
    V grad_dy_v[R], grad_x_v[R], sum = sum_before;
#pragma GCC unroll 2
    for (int r = 0; r < R; r++) {
      const V uv = load_at(u[r]), xhat = xhat_of<Rms>(row[r], load_at(x[r]));
      const V rstd_p = row[r].rstd * p_of<Rms>(row[r], uv, xhat);
      grad_dy_v[r] = fma(rstd_p, wv, fma(vv, xhat, cv));
      if (Dx || grad_w) {
        const V dyv = load_at(dy[r]);
        sum = fma(dyv, rstd_p, sum);
        if constexpr (Dx) {
          const V t = fma(vv, dyv, t_of(row[r], uv, dyv * wv));
          grad_x_v[r] = row[r].rstd * fnma(xhat, k[r], Rms ? t : t - t_mean[r]);
        }
      }
    }
    if (grad_w) store_sum(sum, sum_before);
    if (has_grad_dy) {
#pragma GCC unroll 2
      for (int r = 0; r < R; r++) store_at(grad_dy[r], grad_dy_v[r]);
    }
    if constexpr (Dx) {
#pragma GCC unroll 2
      for (int r = 0; r < R; r++) store_at(grad_x[r], grad_x_v[r]);
    }
  };
  for (int64_t i = 0; i + L <= n; i += L) {
    columns(
        [&](const auto* from) { return load(from + i); }, [&](T* to, V value) { store(to + i, value); },
        [&](V sum, V) { store(grad_w + i, sum); });
  }
  if (tail.any) {
    columns(
        [&](const auto* from) { return tail.load(from); }, [&](T* to, V value) { tail.store(to, value); },
        [&](V sum, V before) { tail.store(grad_w, tail.keep(sum, before)); });
  }
}

template <typename T, typename W, bool Rms, bool Dx>
FUSED_NORM_NOINLINE void double_backward_chunk(
    const NormDoubleBackward& args, int64_t row, int64_t stop, const DoubleBackwardParams<W, Acc<T>>& params) {
  const Tail<Acc<T>> tail(args.n);
  const RowEnd<T> row_end(args.n);
  // Two rows share one visit to the parameters and to grad_w. With grad_x the constants of two fill the registers, and they gain next to
  // nothing.
  if constexpr (!Dx) {
    for (; row + 2 <= stop; row += 2) double_backward_rows<T, W, Rms, Dx, 2>(args, row, params, tail, row_end);
  }
  for (; row < stop; row++) double_backward_rows<T, W, Rms, Dx, 1>(args, row, params, tail, row_end);
}

// grad_dy without u: v*xhat + c.
template <typename T, typename W, bool Rms>
FUSED_NORM_NOINLINE void double_backward_affine(
    const NormDoubleBackward& args, int64_t row, int64_t stop, const DoubleBackwardParams<W, Acc<T>>& params) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int64_t L = kLanes<A>;
  const int64_t n = args.n;
  const Tail<A> tail(n);
  const W* const v = params.v;
  const W* const c = params.c;
  for (; row < stop; row++) {
    const T* const x = (const T*)args.x + row * args.x_stride;
    T* const grad_dy = (T*)args.grad_dy + row * n;
    DoubleBackwardRow<A> constants;
    constants.mean = splat<A>(Rms ? A(0) : ((const A*)args.mean)[row]);
    constants.rstd = splat<A>(((const A*)args.rstd)[row]);
    const auto value = [&](auto&& load_at) {
      V result = {};
      if (c) result = load_at(c);
      if (v) result = fma(load_at(v), xhat_of<Rms>(constants, load_at(x)), result);
      return result;
    };
    for (int64_t i = 0; i + L <= n; i += L) store(grad_dy + i, value([&](const auto* from) { return load(from + i); }));
    if (tail.any) tail.store(grad_dy, value([&](const auto* from) { return tail.load(from); }));
  }
}

template <typename T, typename W, bool Rms>
void double_backward_chunks(const NormDoubleBackward& args, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t n = args.n;
  for (int64_t chunk = begin; chunk < end; chunk++) {
    const int64_t group = chunk / args.chunks_per_group;
    const int64_t first = (chunk - group * args.chunks_per_group) * args.rows_per_chunk;
    const int64_t rest = args.rows_per_group - first;
    const int64_t rows = rest < args.rows_per_chunk ? rest : args.rows_per_chunk;
    const int64_t row = group * args.rows_per_group + first;
    DoubleBackwardParams<W, A> params{};
    if (args.weight) params.weight = (const W*)args.weight + group * args.weight_stride;
    if (args.ddw) params.v = (const W*)args.ddw + group * args.ddw_stride;
    if (args.ddb) params.c = (const W*)args.ddb + group * args.ddb_stride;
    if (args.grad_w_partial) {
      params.grad_w = (A*)args.grad_w_partial + chunk * n;
      memset(params.grad_w, 0, n * sizeof(A));
    }
    if (args.ddx) {
      if (args.grad_x) double_backward_chunk<T, W, Rms, true>(args, row, row + rows, params);
      else double_backward_chunk<T, W, Rms, false>(args, row, row + rows, params);
      continue;
    }
    if (args.grad_dy) double_backward_affine<T, W, Rms>(args, row, row + rows, params);
    if (args.grad_x && !params.v) memset((T*)args.grad_x + row * n, 0, rows * n * sizeof(T));
  }
  if (!args.ddx && args.grad_x && args.ddw) {
    NormBackward b{};
    b.dy = args.dy;
    b.x = args.x;
    b.rstd = args.rstd;
    b.mean = args.mean;
    b.weight = args.ddw;
    b.dx = args.grad_x;
    b.n = n;
    b.dy_stride = args.dy_stride;
    b.x_stride = args.x_stride;
    b.rows_per_group = args.rows_per_group;
    b.weight_stride = args.ddw_stride;
    b.chunks_per_group = args.chunks_per_group;
    b.rows_per_chunk = args.rows_per_chunk;
    backward_chunks<T, W, Rms, true, true, false, false>(b, begin, end);
  }
}

template <typename T, typename W>
void double_backward_rms(bool rms, const NormDoubleBackward& args, int64_t begin, int64_t end) {
  return rms ? double_backward_chunks<T, W, true>(args, begin, end) : double_backward_chunks<T, W, false>(args, begin, end);
}

void norm_double_backward(Dtype dtype, Dtype param_dtype, bool rms, const NormDoubleBackward& args, int64_t begin, int64_t end) {
  const bool mixed = param_dtype != dtype;
  switch (dtype) {
    case Dtype::f64: return double_backward_rms<double, double>(rms, args, begin, end);
    case Dtype::f32: return double_backward_rms<float, float>(rms, args, begin, end);
    case Dtype::bf16:
      return mixed ? double_backward_rms<BFloat16, float>(rms, args, begin, end)
                   : double_backward_rms<BFloat16, BFloat16>(rms, args, begin, end);
    case Dtype::f16:
      return mixed ? double_backward_rms<Half, float>(rms, args, begin, end) : double_backward_rms<Half, Half>(rms, args, begin, end);
  }
}

}  // namespace
}  // namespace fused_norm
