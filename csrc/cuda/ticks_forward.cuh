// The ticks loss, forward: the kernel, and the choice of its instantiation. Launched by ticks_forward.cu.
//
//     loss = sum_j a_j*(ce*nll_j + ticks*(p_j + nll_j))      (backends/__init__.py; one a_j is not 0 where PLAIN)
//
// Data movement. A row belongs to part of a warp, a warp or a block (ticks_config.h), and its logits are read once: M*V*E bytes. Soft
// targets likewise; class weights come from L2 after the first rows. Where V fills whole chunks and all of it is aligned, 16 bytes at a
// time, else element by element.
//
// Online. A thread keeps the largest logit it has seen and the sum of exp(z - largest) over the others, a single largest left out: its
// own exp(0) = 1 would cost the digits of a sum that is small beside it, and 1 - p and -log p with them. Where a chunk has a larger
// one, the former largest joins the others, which are scaled down once. The general loss keeps four sums more in the same way.
//
// Order. Thread t of a row's T threads takes chunks t, t + T, t + 2T, ... element by element, then a tree that depends on T alone
// adds the threads up. Whether a chunk is read by 16 bytes or one element at a time changes nothing of it.
#pragma once

#include "ticks.cuh"
#include "ticks_config.h"

namespace fused_norm {

// What was seen of a row, relative to `largest`. Nothing: largest is -inf, and all else 0.
template <typename A, bool GENERAL>
struct Seen;

template <typename A>
struct Seen<A, false> {
  A largest = -infinity<A>();
  A others = 0;  // sum of exp(z - largest), one largest left out

  template <typename F>
  __device__ __forceinline__ void each(F&& f) {
    f(largest), f(others);
  }
};

template <typename A>
struct Seen<A, true> {
  A largest = -infinity<A>();
  A others = 0;
  A top_mass = 0;   // a of the largest that is left out
  A mass = 0;       // sum of the others' a
  A mass_e = 0;     // sum of the others' a*exp(z - largest)
  A mass_gaps = 0;  // sum of a*(largest - z)

  template <typename F>
  __device__ __forceinline__ void each(F&& f) {
    f(largest), f(others), f(top_mass), f(mass), f(mass_e), f(mass_gaps);
  }
};

// Makes all of it relative to `to`, at least the largest so far, which joins the others.
template <typename A, bool GENERAL>
__device__ __forceinline__ void raise(Seen<A, GENERAL>& seen, A to) {
  // Nothing seen, or only what adds 0 to the others wherever the largest lies.
  if (seen.largest == -infinity<A>()) return;
  const A by = to - seen.largest, factor = exponential(-by);
  seen.others = times(plus(seen.others, A(1)), factor);
  if constexpr (GENERAL) {
    seen.mass_e = times(plus(seen.mass_e, seen.top_mass), factor);
    seen.mass = plus(seen.mass, seen.top_mass);
    seen.top_mass = 0;
    if (seen.mass != 0) seen.mass_gaps = multiply_add(seen.mass, by, seen.mass_gaps);  // `by` may have overflowed
  }
}

// Takes in K elements: logits v of masses a (general loss). An absent one is -inf, of mass 0. Both arrays are used up.
template <typename A, bool GENERAL, int K>
__device__ __forceinline__ void see(Seen<A, GENERAL>& seen, A (&v)[K], A (&a)[K]) {
  A top = v[0];
#pragma unroll
  for (int j = 1; j < K; ++j) top = larger(top, v[j]);
  if (top > seen.largest) {
    raise(seen, top);
    seen.largest = top;
    bool found = false;
#pragma unroll
    for (int j = 0; j < K; ++j) {
      if (!found && v[j] == top) {
        found = true;
        v[j] = -infinity<A>();
        if constexpr (GENERAL) {
          seen.top_mass = a[j];
          a[j] = 0;
        }
      }
    }
  }
  // -inf less itself would be NaN, and a row's first -inf are no reason for that; NaN logits pass.
  const A reference = seen.largest == -infinity<A>() ? A(0) : seen.largest;
#pragma unroll
  for (int j = 0; j < K; ++j) {
    const A e = exponential(v[j] - reference);
    seen.others = plus(seen.others, e);
    if constexpr (GENERAL) {
      seen.mass = plus(seen.mass, a[j]);
      seen.mass_e = multiply_add(a[j], e, seen.mass_e);
      if (a[j] != 0) seen.mass_gaps = multiply_add(a[j], reference - v[j], seen.mass_gaps);
    }
  }
}

// Exchanges the two where `swap`, by selects: a choice between addresses would send them through local memory.
template <typename A, bool GENERAL>
__device__ __forceinline__ void exchange(bool swap, Seen<A, GENERAL>& x, Seen<A, GENERAL>& y) {
  const auto one = [swap](A& u, A& v) {
    const A kept = u;
    u = swap ? v : u;
    v = swap ? kept : v;
  };
  one(x.largest, y.largest), one(x.others, y.others);
  if constexpr (GENERAL) one(x.top_mass, y.top_mass), one(x.mass, y.mass), one(x.mass_e, y.mass_e), one(x.mass_gaps, y.mass_gaps);
}

// Adds `low` to `high`, where they tie too, or the other way round: the result is in `high`.
template <typename A, bool GENERAL>
__device__ __forceinline__ void unite(Seen<A, GENERAL>& high, Seen<A, GENERAL>& low) {
  exchange(low.largest > high.largest, high, low);
  raise(low, high.largest);
  high.others = plus(high.others, low.others);
  if constexpr (GENERAL) {
    high.mass = plus(high.mass, low.mass);
    high.mass_e = plus(high.mass_e, low.mass_e);
    high.mass_gaps = plus(high.mass_gaps, low.mass_gaps);
  }
}

// What the threads of one row saw, put together by a tree that depends on blockDim.x alone; every thread gets the same bits. As
// sum_over_row: a butterfly inside each warp, then one over the warps' own in `partial`, kWarp elements of shared memory.
template <typename A, bool GENERAL>
__device__ __forceinline__ void see_over_row(Seen<A, GENERAL>& seen, Seen<A, GENERAL>* partial) {
  const auto butterfly = [&](int width) {
    for (int offset = width / 2; offset > 0; offset /= 2) {
      Seen<A, GENERAL> other = seen;
      other.each([&](A& v) { v = __shfl_xor_sync(0xffffffffu, v, offset); });
      exchange((threadIdx.x & offset) != 0, seen, other);  // both lanes put the same one first
      unite(seen, other);
    }
  };
  const int threads = static_cast<int>(blockDim.x);
  butterfly(threads < kWarp ? threads : kWarp);
  if (threads <= kWarp) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  if (lane == 0) partial[warp] = seen;
  __syncthreads();
  seen = Seen<A, GENERAL>();
  if (lane < threads / kWarp) seen = partial[lane];
  butterfly(kWarp);
}

// Block (threads per row, rows per block), grid (ceil(rows / rows per block)). VECTOR: V fills whole chunks, and z, soft targets and
// weight are 16-byte aligned in every row. PLAIN is !GENERAL: hard targets, no smoothing. CAPPED: there may be a softcap. Shared memory:
// kWarp of Seen where a row has more than one warp.
template <typename T, bool GENERAL, bool CAPPED, bool VECTOR>
__global__ void __launch_bounds__(kTicksForwardThreads, ticks_forward_min_blocks(sizeof(T)))
    ticks_forward_kernel(const T* __restrict__ z, Acc<T>* __restrict__ loss, Acc<T>* __restrict__ stats, const TicksShape<Acc<T>> shape,
                         int all_chunks) {
  using A = Acc<T>;
  constexpr int K = kPerChunk<T>;
  constexpr int kInFlight = !VECTOR ? 1 : GENERAL ? kTicksGeneralInFlight : kTicksInFlight;
  extern __shared__ __align__(16) unsigned char fused_norm_shared[];

  // Threads past the last row, and those of a row that is not read, take part in the shuffles with an empty row.
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool live = row < shape.rows;
  const int64_t m = live ? row : 0;
  const HardTarget target(shape, m);
  const int chunks = live && target.valid ? all_chunks : 0;
  const T* const z_row = z + m * shape.z_row_stride;

  // The target's own logit and weight are asked for before all others, to be there when they are needed.
  A z_t = 0, weight_t = 1;
  if (!GENERAL && threadIdx.x == 0 && target.valid) {
    z_t = capped<CAPPED>(to_acc(z_row[target.index]), shape.softcap);
    if (shape.weight != nullptr) weight_t = operand_at<T>(shape.weight, shape.weight_is_fp32, target.index);
  }

  Seen<A, GENERAL> seen;
  const int step = static_cast<int>(blockDim.x);
  for (int c0 = static_cast<int>(threadIdx.x); c0 < chunks; c0 += kInFlight * step) {
    Chunk held[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (c0 + i * step < chunks) held[i] = load_chunk<VECTOR>(z_row, c0 + i * step, shape.classes);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int c = c0 + i * step;
      if (c >= chunks) break;
      A v[K], a[K] = {};
#pragma unroll
      for (int j = 0; j < K; ++j) {
        v[j] = present<VECTOR, K>(c, j, shape.classes) ? to_acc(chunk_get<T>(held[i], j)) : -infinity<A>();
      }
      if (CAPPED && shape.softcap != 0) {
#pragma unroll
        for (int j = 0; j < K; ++j) {
          if (present<VECTOR, K>(c, j, shape.classes)) v[j] = capped<CAPPED>(v[j], shape.softcap);
        }
      }
      if constexpr (GENERAL) {
        const int place = target.place_in(static_cast<uint32_t>(c) * K, K);
        if (shape.soft) load_operand<VECTOR, T>(shape.target, shape.target_is_fp32, m * shape.target_row_stride, c, shape.classes, a);
#pragma unroll
        for (int j = 0; j < K; ++j) a[j] = mass_of(shape, a[j], place == j);
        if (shape.weight != nullptr) {
          A w[K];
          load_operand<VECTOR, T>(shape.weight, shape.weight_is_fp32, 0, c, shape.classes, w);
#pragma unroll
          for (int j = 0; j < K; ++j) a[j] = times(a[j], w[j]);
        }
#pragma unroll
        for (int j = 0; j < K; ++j) {
          if (!present<VECTOR, K>(c, j, shape.classes)) a[j] = 0;
        }
      }
      see(seen, v, a);
    }
  }
  see_over_row(seen, reinterpret_cast<Seen<A, GENERAL>*>(fused_norm_shared));

  if (!live || threadIdx.x != 0) return;
  constexpr int kStats = GENERAL ? 4 : 3;
  if (!target.valid) {  // ignored: 0; out of range: NaN
    const A value = target.ignored ? A(0) : static_cast<A>(NAN);
    loss[m] = value;
#pragma unroll
    for (int i = 0; i < kStats; ++i) stats[i * shape.rows + m] = value;
    return;
  }
  const A others = seen.others + (seen.largest - seen.largest);  // NaN for a row that holds an infinity
  const A total = 1 + others, log_total = log_of_1_plus(others);
  stats[m] = seen.largest;
  stats[shape.rows + m] = others;
  if constexpr (GENERAL) {
    const A all_mass = plus(seen.top_mass, seen.mass);
    // sum(a*q) with q = (others + (1 - e))/total, and 1 - e = 0 at the largest.
    const A sum_q = multiply_add(all_mass, others, seen.mass - seen.mass_e) / total;
    const A sum_nll = multiply_add(all_mass, log_total, seen.mass_gaps), sum_p = plus(seen.top_mass, seen.mass_e) / total;
    loss[m] = multiply_add(shape.both, sum_nll, times(shape.ticks, sum_p));
    stats[2 * shape.rows + m] = all_mass;
    stats[3 * shape.rows + m] = sum_q;
  } else {
    const A gap = seen.largest - z_t, p = exponential(-gap) / total, nll = log_total + gap;
    const A term = multiply_add(shape.both, nll, times(shape.ticks, p));
    // A class of no weight counts for nothing, also where its logit is -inf.
    loss[m] = weight_t == 0 && nll == infinity<A>() ? A(0) : times(weight_t, term);
    stats[2 * shape.rows + m] = gap == 0 ? others / total : 1 - p;
  }
}

// ---- On the host: which instantiation serves a call. The launch itself is the caller's, so that the emulation runs this very code. ----

// Whether `operand`, whose rows are `stride` elements of `size` bytes apart, is 16-byte aligned in every row.
inline bool is_aligned(const void* operand, int64_t stride, int64_t rows, int64_t size) {
  return reinterpret_cast<uintptr_t>(operand) % kChunkBytes == 0 && (rows == 1 || stride * size % kChunkBytes == 0);
}

template <typename T, bool GENERAL, bool CAPPED, bool VECTOR, typename Launch>
auto choose_ticks_forward_done(const TicksForward& a, Launch& launch) {
  using A = Acc<T>;
  const int64_t rows = a.ticks.rows, classes = a.ticks.classes;
  const TicksConfig config = ticks_forward_config(classes, static_cast<int>(sizeof(T)));
  TicksLaunch how{(rows - 1) / config.rows_per_block + 1, config.threads_per_row, config.rows_per_block, 0, VECTOR};
  if (config.threads_per_row > kWarp) how.shared_bytes = kWarp * sizeof(Seen<A, GENERAL>);
  return launch(how, ticks_forward_kernel<T, GENERAL, CAPPED, VECTOR>, static_cast<const T*>(a.ticks.z), static_cast<A*>(a.loss),
                static_cast<A*>(a.stats), ticks_shape<T>(a.ticks), static_cast<int>(ticks_chunks(classes, sizeof(T))));
}

template <typename T, typename Launch>
auto choose_ticks_forward_of(const TicksForward& a, Launch& launch) {
  const Ticks& t = a.ticks;
  bool vector = t.classes % kPerChunk<T> == 0 && is_aligned(t.z, t.z_row_stride, t.rows, sizeof(T));
  if (!is_plain(t)) {
    vector = vector && (t.weight == nullptr || is_aligned(t.weight, 0, 1, 0));
    vector = vector && (!t.soft || is_aligned(t.target, t.target_row_stride, t.rows, size_of(t.target_dtype)));
    return vector ? choose_ticks_forward_done<T, true, true, true>(a, launch) : choose_ticks_forward_done<T, true, true, false>(a, launch);
  }
  if (t.softcap != 0) {
    return vector ? choose_ticks_forward_done<T, false, true, true>(a, launch) : choose_ticks_forward_done<T, false, true, false>(a, launch);
  }
  return vector ? choose_ticks_forward_done<T, false, false, true>(a, launch) : choose_ticks_forward_done<T, false, false, false>(a, launch);
}

// Calls launch(TicksLaunch, kernel, its arguments...) with the instantiation that serves `a` and returns what it returns.
template <typename Launch>
auto choose_ticks_forward(const TicksForward& a, Launch&& launch) {
  switch (a.ticks.dtype) {
    case DType::kFloat64: return choose_ticks_forward_of<double>(a, launch);
    case DType::kFloat32: return choose_ticks_forward_of<float>(a, launch);
    case DType::kBFloat16: return choose_ticks_forward_of<__nv_bfloat16>(a, launch);
    default: return choose_ticks_forward_of<__half>(a, launch);
  }
}

}  // namespace fused_norm
