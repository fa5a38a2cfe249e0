// The ticks loss, backward: each logit is read once and its gradient written once, over it where the caller asks for that.
//
//   dz'_k = grad*(p_k*(ce*(A - a_k) + ticks*(B - a_k*q_k)) - a_k*q_k*(ce + ticks*q_k)) + grad_lse*p_k,   A = sum a_j, B = sum a_j*q_j
//   dtarget_k = grad*(1 - smoothing)*w_k*(ce*nll_k + ticks*(p_k + nll_k))
//
// With one target of mass w_t that is (alpha + grad_lse)*p_k, and -alpha*q_t + grad_lse*p_t at the target, alpha = grad*w_t*(ce + ticks*q_t).
// Nothing is summed, so columns may be shared out as one likes.
#pragma once

#include "ticks.h"

namespace fused_norm {
namespace {

// What is the same for all columns of a row.
template <typename A>
struct TicksRow {
  A grad, grad_lse, largest, per_total, q_largest, log_total, mass_sum, mass_q, ce, ticks;
};

template <typename T, typename A = Acc<T>>
FUSED_NORM_NOINLINE void scaled_exp_block(const T* z, int64_t count, A m, A factor, T* dz) {
  constexpr int64_t L = kLanes<A>;
  const Vec<A> vm = splat<A>(m), f = splat<A>(factor);
  const auto compute = [&](Vec<A> v) { return exp_of_nonpositive(v - vm) * f; };
  int64_t i = 0;
  for (; i + 4 * L <= count; i += 4 * L) {
    Vec<A> v[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) v[k] = compute(load(z + i + k * L));
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) store(dz + i + k * L, v[k]);
  }
  for_registers<A>(
      count - i, [&](int64_t j) { store(dz + i + j, compute(load(z + i + j))); },
      [&](int64_t j, int n) { store_first(dz + i + j, compute(load_first(z + i + j, n)), n); });
}

// The gradients of z' and of the target for a block of z'. `weight` is the dtarget's own, null for ones.
template <bool Dz, bool Dtarget, typename A>
FUSED_NORM_NOINLINE void general_block(
    const A* z, const A* mass, const A* weight, const TicksRow<A>& row, A target_grad, int64_t count, A* dz, A* dtarget) {
  using V = Vec<A>;
  const V m = splat<A>(row.largest), per_total = splat<A>(row.per_total), q_largest = splat<A>(row.q_largest), one = splat<A>(1);
  const V ce = splat<A>(row.ce), ticks = splat<A>(row.ticks), both = splat<A>(row.ce + row.ticks), log_total = splat<A>(row.log_total);
  const V mass_sum = splat<A>(row.mass_sum), mass_q = splat<A>(row.mass_q), grad = splat<A>(row.grad), grad_lse = splat<A>(row.grad_lse);
  const V dt = splat<A>(target_grad);
  const auto compute = [&](V v, auto&& mass_at, auto&& weight_at, auto&& put_dz, auto&& put_dtarget) {
    const V p = exp_of_nonpositive(v - m) * per_total;
    if constexpr (Dz) {
      const V q = select(v == m, q_largest, one - p), a = mass_at();
      const V aq = a * q;
      const V rise = fma(ce, mass_sum - a, ticks * (mass_q - aq));
      put_dz(fma(p, grad_lse, grad * fnma(aq, fma(ticks, q, ce), p * rise)));
    }
    if constexpr (Dtarget) {
      const V each = fma(both, log_total + (m - v), ticks * p);
      put_dtarget(weight ? (V)(dt * weight_at() * each) : (V)(dt * each));
    }
  };
  for_registers<A>(
      count,
      [&](int64_t i) {
        compute(
            load(z + i), [&] { return load(mass + i); }, [&] { return load(weight + i); }, [&](V v) { store(dz + i, v); },
            [&](V v) { store(dtarget + i, v); });
      },
      [&](int64_t i, int n) {
        compute(
            load_first(z + i, n), [&] { return load_first(mass + i, n); }, [&] { return load_first(weight + i, n); },
            [&](V v) { store_first(dz + i, v, n); }, [&](V v) { store_first(dtarget + i, v, n); });
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

// A row with one target and no smoothing: columns [first, last).
template <typename T, typename A = Acc<T>>
void one_target_columns(const TicksBackward& a, int64_t row, int64_t first, int64_t last) {
  constexpr int64_t kBlock = kTicksBlock<A>;
  const T* const z = (const T*)a.z + row * a.z_stride;
  T* const dz = (T*)a.dz + row * a.dz_stride;
  const A* const stats = (const A*)a.stats + row;
  const A m = stats[0], softcap = (A)a.softcap;
  const double total = 1 + (double)stats[a.rows], q = stats[2 * a.rows];
  const int64_t t = a.index[row];
  const double w = a.weight ? (double)((const A*)a.weight)[t] : 1.0;
  const double grad_lse = a.grad_lse ? (double)((const A*)a.grad_lse)[row * a.grad_lse_stride] : 0.0;
  const double alpha = (double)((const A*)a.grad)[row * a.grad_stride] * w * (a.ce + a.ticks * q);
  const A factor = (A)((alpha + grad_lse) / total);
  double at_target = 0;
  if (first <= t && t < last) {  // before dz may take the place of z
    A zt = load_one(z + t), slope = 1;
    if (softcap) {
      const Tanh<A> tanh = tanh_and_slope<A>(splat<A>(zt) / softcap);
      zt = softcap * tanh.value[0];
      slope = tanh.slope[0];
    }
    at_target = (grad_lse * (scalar_exp(zt - m) / total) - alpha * q) * slope;
  }
  if (!softcap) {
    scaled_exp_block<T>(z + first, last - first, m, factor, dz + first);
  } else {
    alignas(64) A capped[kBlock], slope[kBlock];
    for (int64_t start = first; start < last; start += kBlock) {
      const int64_t count = last - start < kBlock ? last - start : kBlock;
      cap_block<true>(z + start, count, softcap, capped, slope);
      scaled_exp_block<A>(capped, count, m, factor, capped);
      narrow_block<T>(capped, slope, count, dz + start);
    }
  }
  if (first <= t && t < last) store_one(dz + t, (A)at_target);
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
  r.grad = ((const A*)a.grad)[row * a.grad_stride];
  r.grad_lse = a.grad_lse ? ((const A*)a.grad_lse)[row * a.grad_lse_stride] : 0;
  r.largest = stats[0];
  r.per_total = (A)(1 / total);
  r.q_largest = (A)(others / total);
  r.log_total = (A)__builtin_log1p(others);
  r.mass_sum = stats[2 * a.rows];
  r.mass_q = stats[3 * a.rows];
  r.ce = (A)a.ce;
  r.ticks = (A)a.ticks;
  const A target_grad = r.grad * scale;
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
    general_block<Dz, Dtarget>(from, mass, weight ? weight + start : nullptr, r, target_grad, count, to, dtarget_block);
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
    } else if (a.index && !a.smoothing) {
      one_target_columns<T>(a, row, first, last);
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
