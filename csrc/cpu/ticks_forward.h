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

  FUSED_NORM_INLINE TicksSums operator+(const TicksSums& o) const {
    return {rest + o.rest, top + o.top, a_rest + o.a_rest, a_top + o.a_top, ae_rest + o.ae_rest, ad + o.ad};
  }
};

template <typename S, typename A = Acc<S>>
FUSED_NORM_INLINE A largest_of_block(const S* z, int64_t count, const RowEnd<S>& end) {
  using V = Vec<A>;
  constexpr int64_t L = kLanes<A>;
  const V lowest = splat<A>((A)-__builtin_inf());
  Two<A> m = {lowest, lowest}, n = m;
  const auto raise = [](Two<A> v, Two<A>& m) { m = {larger(v.a, m.a), larger(v.b, m.b)}; };
  int64_t i = 0;
  for (; i + 4 * L <= count; i += 4 * L) {
    raise(load_two(z + i), m);
    raise(load_two(z + i + 2 * L), n);
  }
  if (i + 2 * L <= count) {
    raise(load_two(z + i), m);
    i += 2 * L;
  }
  if (i < count) {
    const Two<A> v = load_end<S>(z + i, end.count);
    raise({select(end.a, v.a, lowest), select(end.b, v.b, lowest)}, n);
  }
  return largest_lane(larger(larger(m.a, m.b), larger(n.a, n.b)));
}

// Adds the sums of a block relative to m. With `Top`, logits equal to m are counted apart.
template <typename S, Mass Kind, bool Top, typename A = Acc<S>>
FUSED_NORM_INLINE void add_block(const S* z, const A* mass, A m, int64_t count, const RowEnd<S>& end, TicksSums<double>& sums) {
  using V = Vec<A>;
  constexpr int64_t L = kLanes<A>;
  const V vm = splat<A>(m);
  const auto terms = [&](V v, V e, V a, auto&& keep) {
    TicksSums<V> t;
    const Mask<A> top = v == vm;
    t.rest = keep(Top ? clear(top, e) : e);
    if constexpr (Top) t.top = keep((V)((Mask<A>)splat<A>(1) & top));
    if constexpr (Kind == Mass::uniform) t.ad = keep(vm - v);
    if constexpr (Kind == Mass::array) {
      a = keep(a);
      t.a_rest = Top ? clear(top, a) : a;
      if constexpr (Top) t.a_top = (V)((Mask<A>)a & top);
      t.ae_rest = a * t.rest;
      t.ad = clear(a == 0, a * (vm - v));  // no mass, no loss, also where v is -inf
    }
    return t;
  };
  const auto terms_of_two = [&](Two<A> v, Two<A> a, auto&& keep_a, auto&& keep_b) {
    V e[2] = {v.a - vm, v.b - vm};
    exp_of_nonpositive<kShortExp<S>>(e);
    return terms(v.a, e[0], a.a, keep_a) + terms(v.b, e[1], a.b, keep_b);
  };
  const auto mass_of_two = [&](int64_t i) { return Kind == Mass::array ? load_two(mass + i) : Two<A>{}; };
  const auto whole = [](V v) { return v; };
  // Every 16 rounds are added up by themselves: a chain of additions is never long, and so neither is its error.
  constexpr int64_t kRounds = 16;
  TicksSums<V> s;
  int64_t i = 0;
  while (i + 4 * L <= count) {
    const int64_t rounds = (count - i) / (4 * L), end_of_rounds = i + 4 * L * (rounds < kRounds ? rounds : kRounds);
    TicksSums<V> some;
    for (; i < end_of_rounds; i += 4 * L) {
      // What comes next, while this is computed.
      for (int64_t byte = 0; byte < 4 * L * (int64_t)sizeof(S); byte += 64) __builtin_prefetch((const char*)(z + i) + 8192 + byte);
      const Two<A> v = load_two(z + i), w = load_two(z + i + 2 * L), a = mass_of_two(i), b = mass_of_two(i + 2 * L);
      V e[4] = {v.a - vm, v.b - vm, w.a - vm, w.b - vm};
      exp_of_nonpositive<kShortExp<S>>(e);
      some = some + ((terms(v.a, e[0], a.a, whole) + terms(v.b, e[1], a.b, whole)) +
                     (terms(w.a, e[2], b.a, whole) + terms(w.b, e[3], b.b, whole)));
    }
    s = s + some;
  }
  if (i + 2 * L <= count) {
    s = s + terms_of_two(load_two(z + i), mass_of_two(i), whole, whole);
    i += 2 * L;
  }
  if (i < count) {
    const Two<A> a = Kind == Mass::array ? load_end<S>(mass + i, end.count) : Two<A>{};
    s = s + terms_of_two(load_end<S>(z + i, end.count), a, [&](V v) { return clear(~end.a, v); }, [&](V v) { return clear(~end.b, v); });
  }
  sums.rest += (double)sum_lanes(s.rest);
  if constexpr (Top) sums.top += (double)sum_lanes(s.top);
  if constexpr (Kind != Mass::one) sums.ad += (double)sum_lanes(s.ad);
  if constexpr (Kind == Mass::array) {
    sums.a_rest += (double)sum_lanes(s.a_rest);
    if constexpr (Top) sums.a_top += (double)sum_lanes(s.a_top);
    sums.ae_rest += (double)sum_lanes(s.ae_rest);
  }
}

// Adds a block to a row's sums; `seen` columns came before it.
template <typename S, Mass Kind, typename A = Acc<S>>
FUSED_NORM_NOINLINE void add_to_row(
    const S* z, const A* mass, int64_t seen, int64_t count, const RowEnd<S>& end, A& m, TicksSums<double>& sums) {
  const A largest = largest_of_block(z, count, end);
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
    return add_block<S, Kind, true>(z, mass, m, count, end, sums);
  }
  // A row of nothing but -inf so far: their exponentials are 0 whatever else is subtracted.
  const A finite = m == (A)-__builtin_inf() ? (sizeof(A) == 8 ? (A)-__DBL_MAX__ : (A)-__FLT_MAX__) : m;
  add_block<S, Kind, false>(z, mass, finite, count, end, sums);
}

template <typename T, Mass Kind>
void ticks_forward_rows(Dtype target_dtype, const TicksForward& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr int64_t kBlock = kTicksBlock<A>;
  alignas(64) A block[kBlock], mass[kBlock];
  const int64_t classes = a.classes;
  // Masses lie in the order of their columns, as two registers of bf16 do not: such logits are widened first.
  const RowEnd<T> end_of_row(classes);
  const RowEnd<A> end_of_block(classes);
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
        cap_block<false>(z + start, count, softcap, block, (A*)nullptr);
        add_to_row<A, Kind>(block, mass, start, count, end_of_block, m, sums);
      } else if constexpr (Kind == Mass::array && sizeof(T) != sizeof(A)) {
        widen_block(z + start, count, block);
        add_to_row<A, Kind>(block, mass, start, count, end_of_block, m, sums);
      } else {
        add_to_row<T, Kind>(z + start, mass, start, count, end_of_row, m, sums);
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
