// The ticks loss, forward: each row is read from memory once, block by block.
//
//   loss = sum_j a_j*(ce*nll_j + ticks*(p_j + nll_j)),    nll_j = log1p(others) + (m - z'_j)
//
// Of each block first the largest logit is found. Where it is the row's largest so far, what has been summed is scaled down to it. Logits
// equal to it are then counted apart: others = rest + (top - 1) gives the sum without one of them and without a difference that loses
// digits. In later blocks such logits are like any other.
#pragma once

#include "ticks.h"

namespace fused_norm {
namespace {

// How the masses of a row are known: one target of mass w_t (the sums need no mass at all); `uniform` for every class besides; or an array.
enum class Mass { one, uniform, array };

// Sums over the logits of a block or a row, in terms of e_j = exp(z'_j - m) and d_j = m - z'_j. "top" are those with z'_j == m
// that were counted apart, "rest" all others.
template <typename S>
struct TicksSums {
  S rest = {};    // e_j of the rest
  S top = {};     // the number of top
  S a_rest = {};  // a_j of the rest
  S a_top = {};   // a_j of top
  S ae_rest = {}; // a_j*e_j of the rest
  S ad = {};      // a_j*d_j of all; for Mass::uniform d_j alone
};

template <typename S, typename A = Acc<S>>
FUSED_NORM_INLINE A largest_of_block(const S* z, int64_t count, const Tail<A>* tail) {
  using V = Vec<A>;
  constexpr int64_t L = kLanes<A>;
  const V lowest = splat<A>((A)-__builtin_inf());
  V m0 = lowest, m1 = lowest, m2 = lowest, m3 = lowest;
  int64_t i = 0;
  for (; i + 4 * L <= count; i += 4 * L) {
    m0 = larger(load(z + i), m0);
    m1 = larger(load(z + i + L), m1);
    m2 = larger(load(z + i + 2 * L), m2);
    m3 = larger(load(z + i + 3 * L), m3);
  }
  for (; i + L <= count; i += L) m0 = larger(load(z + i), m0);
  if (i < count) m1 = larger(tail->keep(tail->load(z), lowest), m1);
  return largest_lane(larger(larger(m0, m1), larger(m2, m3)));
}

template <typename S, Mass Kind, bool Top, typename A = Acc<S>>
FUSED_NORM_INLINE void add_block(const S* z, const A* mass, A m, int64_t count, const Tail<A>* tail, TicksSums<double>& sums) {
  using V = Vec<A>;
  constexpr int64_t L = kLanes<A>;
  const V vm = splat<A>(m);
  // Four of each sum: the exponentials' latency is long. A vector that only some kinds need costs the others nothing.
  TicksSums<V> s[4];
  const auto add = [&](TicksSums<V>& s, V v, auto&& mass_at, auto&& keep) {
    const V d = vm - v;
    V e = keep(exp_of_nonpositive(v - vm));
    const Mask<A> top = Top ? (Mask<A>)(v == vm) : Mask<A>{};
    if constexpr (Top) {
      s.top += keep((V)((Mask<A>)splat<A>(1) & top));
      e = clear(top, e);
    }
    s.rest += e;
    if constexpr (Kind == Mass::uniform) s.ad += keep(d);
    if constexpr (Kind == Mass::array) {
      const V a = keep(mass_at());
      if constexpr (Top) {
        s.a_top += (V)((Mask<A>)a & top);
        s.a_rest += clear(top, a);
      } else {
        s.a_rest += a;
      }
      s.ae_rest = fma(a, e, s.ae_rest);
      s.ad += clear(a == 0, a * d);  // no mass, no loss, also where d is infinite
    }
  };
  const auto all = [](V v) { return v; };
  int64_t i = 0;
  for (; i + 4 * L <= count; i += 4 * L) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
      __builtin_prefetch((const char*)(z + i + k * L) + 8192);
      add(s[k], load(z + i + k * L), [&] { return load(mass + i + k * L); }, all);
    }
  }
  for (; i + L <= count; i += L) add(s[0], load(z + i), [&] { return load(mass + i); }, all);
  if (i < count) add(s[1], tail->load(z), [&] { return tail->load(mass); }, [&](V v) { return tail->keep(v); });
  const auto total = [&](V TicksSums<V>::*which) { return (double)sum_lanes((s[0].*which + s[1].*which) + (s[2].*which + s[3].*which)); };
  sums.rest += total(&TicksSums<V>::rest);
  if (Top) sums.top += total(&TicksSums<V>::top);
  if (Kind != Mass::one) sums.ad += total(&TicksSums<V>::ad);
  if (Kind == Mass::array) {
    sums.a_rest += total(&TicksSums<V>::a_rest);
    if (Top) sums.a_top += total(&TicksSums<V>::a_top);
    sums.ae_rest += total(&TicksSums<V>::ae_rest);
  }
}

// Adds a block to a row's sums; `seen` columns came before it.
template <typename S, Mass Kind, typename A = Acc<S>>
FUSED_NORM_NOINLINE void add_to_row(
    const S* z, const A* mass, int64_t seen, int64_t count, const Tail<A>* tail, A& m, TicksSums<double>& sums) {
  const A largest = largest_of_block(z, count, tail);
  if (largest > m) {
    const double scale = scalar_exp(m - largest), rise = (double)largest - (double)m;
    if constexpr (Kind == Mass::uniform) {
      if (seen) sums.ad += (double)seen * rise;
    }
    if constexpr (Kind == Mass::array) {
      sums.a_rest += sums.a_top;
      if (sums.a_rest != 0) sums.ad += sums.a_rest * rise;
      sums.ae_rest = (sums.ae_rest + sums.a_top) * scale;
      sums.a_top = 0;
    }
    sums.rest = (sums.rest + sums.top) * scale;
    sums.top = 0;
    m = largest;
    return add_block<S, Kind, true>(z, mass, m, count, tail, sums);
  }
  // A row of nothing but -inf so far: their exponentials are 0 whatever else is subtracted.
  const A finite = m == (A)-__builtin_inf() ? (sizeof(A) == 8 ? (A)-__DBL_MAX__ : (A)-__FLT_MAX__) : m;
  add_block<S, Kind, false>(z, mass, finite, count, tail, sums);
}

template <typename T, Mass Kind>
void ticks_forward_rows(Dtype target_dtype, const TicksForward& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr int64_t kBlock = kTicksBlock<A>;
  alignas(64) A capped[kBlock], mass[kBlock];
  const int64_t classes = a.classes;
  const Tail<A> tail((classes - 1) % kBlock + 1);
  const A* const weight = (const A*)a.weight;
  const A softcap = (A)a.softcap, scale = (A)(1 - a.smoothing), uniform = (A)(a.smoothing / (double)classes);
  const auto weight_of = [&](int64_t j) { return weight ? (double)weight[j] : 1.0; };
  const auto save = [&](int64_t row, double loss, A largest, double others, double third, double fourth) {
    ((A*)a.loss)[row] = (A)loss;
    A* const stats = (A*)a.stats + row;
    stats[0] = largest;
    stats[a.rows] = (A)others;
    stats[2 * a.rows] = (A)third;
    if (Kind != Mass::one) stats[3 * a.rows] = (A)fourth;
  };
  for (int64_t row = begin; row < end; row++) {
    if (a.index && a.index[row] == a.ignore_index) {
      save(row, 0, 0, 0, 0, 0);
      continue;
    }
    const T* const z = (const T*)a.z + row * a.z_stride;
    const void* const target = a.target ? (const char*)a.target + row * a.target_stride : nullptr;
    A m = (A)-__builtin_inf();
    TicksSums<double> sums;
    for (int64_t start = 0; start < classes; start += kBlock) {
      const int64_t count = classes - start < kBlock ? classes - start : kBlock;
      if constexpr (Kind == Mass::array) masses<T>(target_dtype, target, start, weight, scale, uniform, count, mass);
      if (softcap) {
        cap_block<false>(z + start, count, softcap, capped, (A*)nullptr);
        add_to_row<A, Kind>(capped, mass, start, count, &tail, m, sums);
      } else {
        add_to_row<T, Kind>(z + start, mass, start, count, &tail, m, sums);
      }
    }
    const double others = sums.rest + (sums.top - 1) + (double)(m - m), total = 1 + others, log_total = __builtin_log1p(others);
    if constexpr (Kind == Mass::uniform) {
      sums.a_top = sums.top * uniform;
      sums.a_rest = ((double)classes - sums.top) * uniform;
      sums.ae_rest = sums.rest * uniform;
      sums.ad *= uniform;
    }
    double mass_sum = sums.a_rest + sums.a_top;
    double nll = mass_sum * log_total + sums.ad;                                           // sum of a_j*nll_j
    double p = (sums.ae_rest + sums.a_top) / total;                                        // sum of a_j*p_j
    double q = (sums.a_rest * total - sums.ae_rest + sums.a_top * others) / total;         // sum of a_j*q_j
    double q_target = 0;
    if (a.index) {  // a target has all the mass, or what smoothing leaves to it
      const int64_t t = a.index[row];
      const A zt = softcapped(load_one(z + t), softcap);
      const double e = scalar_exp(zt - m), own = Kind == Mass::one ? weight_of(t) : weight_of(t) * scale;
      q_target = zt == m ? others / total : (total - e) / total;
      if (own != 0 || others != others) {
        mass_sum += own;
        nll += own * (log_total + ((double)m - (double)zt));
        p += own * (e / total);
        q += own * q_target;
      }
    }
    const double loss = (a.ce + a.ticks) * nll + a.ticks * p;
    if constexpr (Kind == Mass::one) save(row, loss, m, others, q_target, 0);
    else save(row, loss, m, others, mass_sum, q);
  }
}

template <typename T>
void ticks_forward_kind(Dtype target_dtype, const TicksForward& a, int64_t begin, int64_t end) {
  if (a.index && !a.smoothing) return ticks_forward_rows<T, Mass::one>(target_dtype, a, begin, end);
  if (a.index && !a.weight) return ticks_forward_rows<T, Mass::uniform>(target_dtype, a, begin, end);
  return ticks_forward_rows<T, Mass::array>(target_dtype, a, begin, end);
}

void ticks_forward(Dtype dtype, Dtype target_dtype, const TicksForward& a, int64_t begin, int64_t end) {
  switch (dtype) {
    case Dtype::f64: return ticks_forward_kind<double>(target_dtype, a, begin, end);
    case Dtype::f32: return ticks_forward_kind<float>(target_dtype, a, begin, end);
    case Dtype::bf16: return ticks_forward_kind<BFloat16>(target_dtype, a, begin, end);
    case Dtype::f16: return ticks_forward_kind<Half>(target_dtype, a, begin, end);
  }
}

}  // namespace
}  // namespace fused_norm
