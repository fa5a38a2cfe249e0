// The ticks loss, backward: each logit is read once and its gradient written once, over it where the caller asks for that.
//
//   dz'_k = grad*(p_k*(ce*(A - a_k) + ticks*(B - a_k*q_k)) - a_k*q_k*(ce + ticks*q_k)) + grad_lse*p_k,   A = sum a_j, B = sum a_j*q_j
//   dtarget_k = grad*(1 - smoothing)*w_k*(ce*nll_k + ticks*(p_k + nll_k))
//
// Nothing is summed, so columns may be shared out as one likes.
#pragma once

#include "ticks.h"

namespace fused_norm {
namespace {

// What is the same for all columns of a row, each rounded once: with it the fewest operations are left for a column, and so the fewest
// roundings.
template <typename A>
struct TicksRow {
  A largest, per_total, q_largest, log_total, mass_sum, mass_q;
  A ce, ticks, lse;  // grad*ce, grad*ticks, grad_lse
  A nll, p;          // dtarget's multiples of nll and p
};

// dz = exp(z - m)*factor + offset
template <typename T, typename A = Acc<T>>
FUSED_NORM_NOINLINE void scaled_exp_block(const T* z, int64_t count, A m, A factor, A offset, T* dz) {
  constexpr int64_t L = kLanes<A>;
  const Vec<A> vm = splat<A>(m), f = splat<A>(factor), o = splat<A>(offset);
  int64_t i = 0;
  // No logit is NaN without a NaN in its row's factor.
  if (factor - factor == 0 && offset - offset == 0) {
    for (; i + 4 * L <= count; i += 4 * L) {
      const Two<A> v = load_two(z + i), w = load_two(z + i + 2 * L);
      Vec<A> e[4] = {v.a - vm, v.b - vm, w.a - vm, w.b - vm};
      exp_of_nonpositive<kShortExp<T>>(e);
      store_two(dz + i, Two<A>{fma(e[0], f, o), fma(e[1], f, o)});
      store_two(dz + i + 2 * L, Two<A>{fma(e[2], f, o), fma(e[3], f, o)});
    }
  }
  const auto compute = [&](Vec<A> v) { return fma(exp_of_nonpositive<kShortExp<T>>(v - vm), f, o); };
  for_registers<A>(
      count - i, [&](int64_t j) { store(dz + i + j, compute(load(z + i + j))); },
      [&](int64_t j, int n) { store_first(dz + i + j, compute(load_first(z + i + j, n)), n); });
}

// The gradients of z' and of the target for a block of z'. `weight` is the dtarget's own, null for ones.
template <bool Dz, bool Dtarget, typename A>
FUSED_NORM_NOINLINE void general_block(
    const A* z, const A* mass, const A* weight, const TicksRow<A>& row, int64_t count, A* dz, A* dtarget) {
  using V = Vec<A>;
  const V m = splat<A>(row.largest), per_total = splat<A>(row.per_total), q_largest = splat<A>(row.q_largest), one = splat<A>(1);
  const V ce = splat<A>(row.ce), ticks = splat<A>(row.ticks), lse = splat<A>(row.lse), log_total = splat<A>(row.log_total);
  const V mass_sum = splat<A>(row.mass_sum), mass_q = splat<A>(row.mass_q), for_nll = splat<A>(row.nll), for_p = splat<A>(row.p);
  const auto finish = [&](V v, V e, auto&& mass_at, auto&& weight_at, auto&& put_dz, auto&& put_dtarget) {
    const V p = e * per_total;
    if constexpr (Dz) {
      const V q = select(v == m, q_largest, one - p), a = mass_at();
      const V aq = a * q;
      const V rise = fma(ce, mass_sum - a, fma(ticks, mass_q - aq, lse));
      put_dz(fnma(aq, fma(ticks, q, ce), p * rise));
    }
    if constexpr (Dtarget) {
      const V each = fma(for_nll, log_total + (m - v), for_p * p);
      put_dtarget(weight ? (V)(weight_at() * each) : each);
    }
  };
  const auto at = [&](int64_t i, V v, V e) {
    finish(
        v, e, [&] { return load(mass + i); }, [&] { return load(weight + i); }, [&](V x) { store(dz + i, x); },
        [&](V x) { store(dtarget + i, x); });
  };
  constexpr int64_t L = kLanes<A>;
  int64_t i = 0;
  for (; i + 2 * L <= count; i += 2 * L) {
    const V v = load(z + i), w = load(z + i + L);
    V e[2] = {v - m, w - m};
    exp_of_nonpositive(e);
    at(i, v, e[0]);
    at(i + L, w, e[1]);
  }
  for_registers<A>(
      count - i,
      [&](int64_t j) {
        const V v = load(z + i + j);
        at(i + j, v, exp_of_nonpositive(v - m));
      },
      [&](int64_t j, int n) {
        const V v = load_first(z + i + j, n);
        finish(
            v, exp_of_nonpositive(v - m), [&] { return load_first(mass + i + j, n); }, [&] { return load_first(weight + i + j, n); },
            [&](V x) { store_first(dz + i + j, x, n); }, [&](V x) { store_first(dtarget + i + j, x, n); });
      });
}

// out = from, times `factor` unless that is null
template <typename T, typename A = Acc<T>>
FUSED_NORM_NOINLINE void narrow_block(const A* from, const A* factor, int64_t count, T* out) {
  const auto compute = [&](Vec<A> v, auto&& factor_at) { return factor ? (Vec<A>)(v * factor_at()) : v; };
  for_registers<A>(
      count, [&](int64_t i) { store(out + i, compute(load(from + i), [&] { return load(factor + i); })); },
      [&](int64_t i, int n) {
        store_first(out + i, compute(load_first(from + i, n), [&] { return load_first(factor + i, n); }), n);
      });
}

// A row with a class index, and every class of the same mass u but the target: columns [first, last). Apart from the target dz' is then
// a multiple of p_k and a constant, since p_k + q_k = 1:
//
//   dz'_k = (grad*(ce*(A - u) + ticks*B) + grad_lse)*p_k - grad*u*(ce + ticks)*q_k
//
// and without smoothing (u = 0, A = w_t, B = w_t*q_t) the multiple alone.
template <typename T, typename A = Acc<T>>
void index_columns(const TicksBackward& a, int64_t row, int64_t first, int64_t last) {
  constexpr int64_t kBlock = kTicksBlock<A>;
  const T* const z = (const T*)a.z + row * a.z_stride;
  T* const dz = (T*)a.dz + row * a.dz_stride;
  const A* const stats = (const A*)a.stats + row;
  const A m = stats[0], softcap = (A)a.softcap;
  const int64_t t = a.index[row];
  const bool has_target = first <= t && t < last;
  const double others = stats[a.rows], total = 1 + others;
  const double grad = ((const A*)a.grad)[row * a.grad_stride];
  const double grad_lse = a.grad_lse ? (double)((const A*)a.grad_lse)[row * a.grad_lse_stride] : 0.0;

  double p = 0, q = 0, slope_t = 1;
  if (has_target) {  // read it before dz may take the place of z
    A zt = load_one(z + t);
    if (softcap) {
      const Tanh<A> tanh = tanh_and_slope<A>(splat<A>(zt) / softcap);
      zt = softcap * tanh.value[0];
      slope_t = tanh.slope[0];
    }
    const double e = scalar_exp(zt - m);
    p = e / total;
    q = zt == m ? others / total : (total - e) / total;
  }
  double multiple, constant = 0, at_target;
  if (!a.smoothing) {
    const double w = a.weight ? (double)((const A*)a.weight)[t] : 1.0, q_t = stats[2 * a.rows];
    const double alpha = grad * w * (a.ce + a.ticks * q_t);
    multiple = alpha + grad_lse;
    at_target = grad_lse * p - alpha * q_t;
  } else {
    const double u = a.smoothing / (double)a.classes, a_t = (1 - a.smoothing) + u;
    const double mass_sum = stats[2 * a.rows], mass_q = stats[3 * a.rows];
    constant = grad * u * (a.ce + a.ticks);
    multiple = grad * (a.ce * (mass_sum - u) + a.ticks * mass_q) + grad_lse + constant;
    at_target = grad * (p * (a.ce * (mass_sum - a_t) + a.ticks * (mass_q - a_t * q)) - a_t * q * (a.ce + a.ticks * q)) + grad_lse * p;
  }
  const A factor = (A)(multiple / total), offset = (A)-constant;
  if (!softcap) {
    scaled_exp_block<T>(z + first, last - first, m, factor, offset, dz + first);
  } else {
    alignas(64) A capped[kBlock], slope[kBlock];
    for (int64_t start = first; start < last; start += kBlock) {
      const int64_t count = last - start < kBlock ? last - start : kBlock;
      cap_block<true>(z + start, count, softcap, capped, slope);
      scaled_exp_block<A>(capped, count, m, factor, offset, capped);
      narrow_block<T>(capped, slope, count, dz + start);
    }
  }
  if (has_target) store_one(dz + t, (A)(at_target * slope_t));
}

template <typename T, bool Dz, bool Dtarget, typename A = Acc<T>>
void general_columns(Dtype target_dtype, const TicksBackward& a, int64_t row, int64_t first, int64_t last) {
  constexpr int64_t kBlock = kTicksBlock<A> / 2;
  alignas(64) A z_block[kBlock], mass[kBlock], slope[kBlock], dtarget_block[kBlock];
  const T* const z = (const T*)a.z + row * a.z_stride;
  T* const dz = Dz ? (T*)a.dz + row * a.dz_stride : nullptr;
  const void* const target = a.target ? (const char*)a.target + row * a.target_stride : nullptr;
  const int64_t t = a.index ? a.index[row] : -1;
  const A* const weight = (const A*)a.weight;
  const A* const stats = (const A*)a.stats + row;
  const A softcap = (A)a.softcap, scale = (A)(1 - a.smoothing), uniform = (A)(a.smoothing / (double)a.classes);
  const double others = stats[a.rows], total = 1 + others;
  TicksRow<A> r;
  r.largest = stats[0];
  r.per_total = (A)(1 / total);
  r.q_largest = (A)(others / total);
  r.log_total = (A)__builtin_log1p(others);
  r.mass_sum = stats[2 * a.rows];
  r.mass_q = stats[3 * a.rows];
  const double grad = ((const A*)a.grad)[row * a.grad_stride], target_grad = grad * (1 - a.smoothing);
  r.ce = (A)(grad * a.ce);
  r.ticks = (A)(grad * a.ticks);
  r.lse = a.grad_lse ? ((const A*)a.grad_lse)[row * a.grad_lse_stride] : 0;
  r.nll = (A)(target_grad * (a.ce + a.ticks));
  r.p = (A)(target_grad * a.ticks);
  const A* const none = nullptr;
  for (int64_t start = first; start < last; start += kBlock) {
    const int64_t count = last - start < kBlock ? last - start : kBlock;
    const A* from = z_block;
    if (softcap) {
      cap_block<Dz>(z + start, count, softcap, z_block, slope);
    } else if constexpr (sizeof(T) == sizeof(A)) {
      from = z + start;
    } else {
      widen_block(z + start, count, z_block);
    }
    if constexpr (Dz) {
      masses<T>(target_dtype, target, start, weight, scale, uniform, count, mass);
      if (start <= t && t < start + count) mass[t - start] = (weight ? weight[t] : 1) * (scale + uniform);
    }
    A* to = z_block;  // over what it is computed from, or straight to its place
    if constexpr (sizeof(T) == sizeof(A)) to = softcap ? to : dz + start;
    general_block<Dz, Dtarget>(from, mass, weight ? weight + start : nullptr, r, count, to, dtarget_block);
    if constexpr (Dz) {
      if (sizeof(T) != sizeof(A) || softcap) narrow_block<T>(to, softcap ? slope : none, count, dz + start);
    }
    if constexpr (Dtarget) {
      const int64_t offset = row * a.classes + start;
      if (target_dtype == Dtype::f32) {
        if constexpr (sizeof(A) == 4) narrow_block<float>(dtarget_block, none, count, (float*)a.dtarget + offset);
      } else {
        narrow_block<T>(dtarget_block, none, count, (T*)a.dtarget + offset);
      }
    }
  }
}

template <typename T>
void ticks_backward_chunks(Dtype target_dtype, const TicksBackward& a, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; chunk++) {
    const int64_t row = chunk / a.chunks_per_row, first = chunk % a.chunks_per_row * a.columns_per_chunk;
    const int64_t last = a.classes - first < a.columns_per_chunk ? a.classes : first + a.columns_per_chunk;
    if (a.index && a.index[row] == a.ignore_index) {
      memset((T*)a.dz + row * a.dz_stride + first, 0, (last - first) * sizeof(T));
    } else if (a.index && !(a.smoothing && a.weight)) {
      index_columns<T>(a, row, first, last);
    } else if (a.dz && a.dtarget) {
      general_columns<T, true, true>(target_dtype, a, row, first, last);
    } else if (a.dz) {
      general_columns<T, true, false>(target_dtype, a, row, first, last);
    } else {
      general_columns<T, false, true>(target_dtype, a, row, first, last);
    }
  }
}

void ticks_backward(Dtype dtype, Dtype target_dtype, const TicksBackward& a, int64_t begin, int64_t end) {
  switch (dtype) {
    case Dtype::f64: return ticks_backward_chunks<double>(target_dtype, a, begin, end);
    case Dtype::f32: return ticks_backward_chunks<float>(target_dtype, a, begin, end);
    case Dtype::bf16: return ticks_backward_chunks<BFloat16>(target_dtype, a, begin, end);
    case Dtype::f16: return ticks_backward_chunks<Half>(target_dtype, a, begin, end);
  }
}

}  // namespace
}  // namespace fused_norm
