// The ticks loss, backward: the kernel, and the choice of its instantiation. Launched by ticks_backward.cu.
//
//     dz'_k = grad*(p_k*(ce*(A - a_k) + ticks*(B - a_k*q_k)) - a_k*q_k*(ce + ticks*q_k)) + grad_lse*p_k
//     PLAIN: (alpha + grad_lse)*p_k, at the target grad_lse*p_t - alpha*q_t, with alpha = grad*w_t*(ce + ticks*q_t)
//     dz_k = dz'_k*(1 - tanh(z_k/s)^2)            dtarget_j = grad*(1 - smoothing)*w_j*(ce*nll_j + ticks*(p_j + nll_j))
//
// Data movement. Forward's statistics leave nothing to sum: each logit is read once and its gradient written once, 2*M*V*E bytes, soft
// targets and their gradient likewise. A row is split over blocks where it is wide (ticks_config.h). Every element is read and written by
// the same thread, so that dz may be z itself. An ignored row is written and not read.
//
// Rows of odd lengths do not begin at multiples of 16 bytes. Where all operands of a row pass such a boundary at the same element,
// as z and dz of the same strides do, the elements before it and the last few are taken one by one and those between by 16 bytes. Else
// all are taken one by one, neighbours by neighbouring threads. No result depends on it.
#pragma once

#include <type_traits>

#include "ticks.cuh"
#include "ticks_config.h"

namespace fused_norm {

template <typename A>
struct TicksGradients {
  const A* grad;
  const A* grad_lse;  // nullptr: zeros
  int64_t grad_stride;
  int64_t grad_lse_stride;
  int64_t dz_row_stride;
  uint32_t blocks_per_row;
  uint32_t chunks_per_block;
};

// A row's part of the formulas above.
template <typename A>
struct RowGradient {
  A largest;
  A inverse;    // 1/total
  A lse_scale;  // grad_lse/total
  A softcap;

  // What both losses need of a logit: e = exp(z' - largest), z' itself, and dz'/dz.
  template <bool CAPPED>
  __device__ __forceinline__ A exponential_of(A z, A& value, A& slope) const {
    value = z;
    slope = 1;
    if (CAPPED && softcap != 0) value = capped(z, softcap, slope);
    return exponential(value - largest);
  }
};

// Elements p[0], ..., p[KE - 1] as they lie in memory: one, or a chunk of T in one access.
template <int KE, typename T>
using Piece = std::conditional_t<KE == 1, T, Chunk>;

template <int KE, typename T>
__device__ __forceinline__ void unpack(const Piece<KE, T>& piece, Acc<T> (&out)[KE]) {
  if constexpr (KE == 1) {
    out[0] = to_acc(piece);
  } else {
#pragma unroll
    for (int j = 0; j < KE; ++j) out[j] = to_acc(chunk_get<T>(piece, j));
  }
}

// KE elements to p, of which those of W fill one chunk or more.
template <int KE, typename W>
__device__ __forceinline__ void store_piece(W* p, const Acc<W> (&v)[KE]) {
  if constexpr (KE == 1) {
    p[0] = from_acc<W>(v[0]);
  } else {
    constexpr int kStep = kPerChunk<W>;
    static_assert(KE % kStep == 0, "a chunk of z has fewer elements than one of another operand");
#pragma unroll
    for (int i = 0; i < KE / kStep; ++i) {
      Chunk chunk;
#pragma unroll
      for (int j = 0; j < kStep; ++j) chunk_set(chunk, j, from_acc<W>(v[i * kStep + j]));
      *reinterpret_cast<Chunk*>(p + i * kStep) = chunk;
    }
  }
}

template <int KE, typename T>
__device__ __forceinline__ void operand_piece(const void* operand, bool is_fp32, int64_t i, Acc<T> (&out)[KE]) {
  if constexpr (KE == 1) {
    out[0] = operand_at<T>(operand, is_fp32, i);
  } else {
    load_operand<true, T>(operand, is_fp32, i, 0, KE, out);
  }
}

// Block (threads per row, rows per block); grid (blocks per row * ceil(rows / rows per block)), a row's blocks side by side. VECTOR: every
// operand passes 16-byte boundaries where z does, in each row. CAPPED: there may be a softcap. z and dz may be the same memory, and so
// are not __restrict__. dz and dtarget are null where they are not wanted.
template <typename T, bool GENERAL, bool CAPPED, bool VECTOR>
__global__ void __launch_bounds__(kTicksBackwardThreads, ticks_backward_min_blocks(sizeof(T), GENERAL))
    ticks_backward_kernel(const T* z, T* dz, void* __restrict__ dtarget, const Acc<T>* __restrict__ stats, const TicksShape<Acc<T>> shape,
                          const TicksGradients<Acc<T>> gradients) {
  using A = Acc<T>;
  constexpr int K = kPerChunk<T>;
  const int64_t m = static_cast<int64_t>(blockIdx.x / gradients.blocks_per_row) * blockDim.y + threadIdx.y;
  if (m >= shape.rows) return;
  const uint32_t part = blockIdx.x % gradients.blocks_per_row;
  const HardTarget target(shape, m);

  // An ignored row asks for nothing more. One whose target is out of range comes out as NaN.
  RowGradient<A> row{0, 0, 0, shape.softcap};
  A grad = 0, scale = 0, at_target = 0, all_mass = 0, sum_q = 0, q_largest = 0, log_total = 0, dtarget_scale = 0;
  if (!target.ignored) {
    row.largest = stats[m];
    const A others = stats[shape.rows + m], total = 1 + others;
    row.inverse = 1 / total;
    grad = target.valid ? gradients.grad[m * gradients.grad_stride] : static_cast<A>(NAN);
    const A grad_lse = gradients.grad_lse == nullptr ? A(0) : gradients.grad_lse[m * gradients.grad_lse_stride];
    row.lse_scale = times(grad_lse, row.inverse);
    if constexpr (GENERAL) {
      all_mass = stats[2 * shape.rows + m];
      sum_q = stats[3 * shape.rows + m];
      q_largest = times(others, row.inverse);
      log_total = log_of_1_plus(others);
      dtarget_scale = times(grad, shape.keep);
    } else {
      const A q_t = stats[2 * shape.rows + m];
      A alpha = times(grad, multiply_add(shape.ticks, q_t, shape.ce));
      if (shape.weight != nullptr && target.valid) {
        alpha = times(alpha, operand_at<T>(shape.weight, shape.weight_is_fp32, target.index));
      }
      scale = times(plus(alpha, grad_lse), row.inverse);
      at_target = -times(alpha, q_t);
    }
  }

  const T* const z_row = z + m * shape.z_row_stride;
  T* const dz_row = dz == nullptr ? nullptr : dz + m * gradients.dz_row_stride;
  const int64_t target_row = m * shape.target_row_stride, dtarget_row = m * shape.classes;

  // The gradients of elements i, ..., i + KE - 1, whose logits are `piece`.
  const auto apply = [&](auto width, uint32_t i, const Piece<decltype(width)::value, T>& piece) {
    constexpr int KE = decltype(width)::value;
    A v[KE], d[KE] = {};
    if (!target.ignored) {
      unpack<KE, T>(piece, v);
      const int place = target.place_in(i, KE);
      if constexpr (!GENERAL) {
#pragma unroll
        for (int j = 0; j < KE; ++j) {
          A value, slope;
          const A e = row.template exponential_of<CAPPED>(v[j], value, slope);
          d[j] = place == j ? multiply_add(e, row.lse_scale, at_target) : times(e, scale);
          if (CAPPED) d[j] = times(d[j], slope);
        }
      } else {
        A a[KE] = {}, w[KE];
        if (shape.soft && dz != nullptr) operand_piece<KE, T>(shape.target, shape.target_is_fp32, target_row + i, a);
        if (shape.weight != nullptr) operand_piece<KE, T>(shape.weight, shape.weight_is_fp32, i, w);
        A dt[KE];
#pragma unroll
        for (int j = 0; j < KE; ++j) {
          A value, slope;
          const A e = row.template exponential_of<CAPPED>(v[j], value, slope);
          const A p = times(e, row.inverse), q = value == row.largest ? q_largest : multiply_add(-e, row.inverse, A(1));
          A mass = mass_of(shape, a[j], place == j);
          if (shape.weight != nullptr) mass = times(mass, w[j]);
          const A mass_q = times(mass, q);
          const A drawn = multiply_add(shape.ce, all_mass - mass, times(shape.ticks, sum_q - mass_q));
          const A pushed = times(mass_q, multiply_add(shape.ticks, q, shape.ce));
          d[j] = multiply_add(grad, multiply_add(p, drawn, -pushed), times(e, row.lse_scale));
          if (CAPPED) d[j] = times(d[j], slope);
          const A nll = log_total + (row.largest - value);
          dt[j] = times(dtarget_scale, multiply_add(shape.both, nll, times(shape.ticks, p)));
          if (shape.weight != nullptr) dt[j] = times(dt[j], w[j]);
        }
        if (dtarget != nullptr) {
          if constexpr (sizeof(T) == 2) {
            if (shape.target_is_fp32) {
              store_piece<KE>(static_cast<float*>(dtarget) + dtarget_row + i, dt);
            } else {
              store_piece<KE>(static_cast<T*>(dtarget) + dtarget_row + i, dt);
            }
          } else {
            store_piece<KE>(static_cast<T*>(dtarget) + dtarget_row + i, dt);
          }
        }
      }
    }
    if (dz != nullptr) store_piece<KE>(dz_row + i, d);
  };

  // Pieces first, first + 1, ..., last - 1 of KE elements, the 0th of which begins at element `begin`: thread t takes t, t + T, ... of them,
  // some at a time, their loads first, for those may not pass the stores before them.
  const auto sweep = [&](auto width, uint32_t begin, uint32_t first, uint32_t last) {
    constexpr int KE = decltype(width)::value;
    constexpr int kInFlight = GENERAL ? kTicksGeneralInFlight : kTicksInFlight;
    const uint32_t step = blockDim.x;
    for (uint32_t c = first + threadIdx.x; c < last; c += kInFlight * step) {
      Piece<KE, T> held[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (c + i * step < last && !target.ignored) held[i] = *reinterpret_cast<const Piece<KE, T>*>(z_row + begin + (c + i * step) * KE);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (c + i * step < last) apply(width, begin + (c + i * step) * KE, held[i]);
      }
    }
  };
  const auto classes = static_cast<uint32_t>(shape.classes), first = part * gradients.chunks_per_block, last = first + gradients.chunks_per_block;
  if constexpr (VECTOR) {
    const auto past = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(z_row) % kChunkBytes / sizeof(T));
    const uint32_t before = (K - past) % K, head = before < classes ? before : classes;
    const uint32_t chunks = (classes - head) / K, tail = head + chunks * K;
    sweep(std::integral_constant<int, K>(), head, first, last < chunks ? last : chunks);
    if (part == 0) {
      for (uint32_t i = threadIdx.x; i < head + (classes - tail); i += blockDim.x) {
        const uint32_t k = i < head ? i : i - head + tail;
        apply(std::integral_constant<int, 1>(), k, target.ignored ? from_acc<T>(0) : z_row[k]);
      }
    }
  } else {
    sweep(std::integral_constant<int, 1>(), 0, first * K, last * K < classes ? last * K : classes);
  }
}

// ---- On the host: which instantiation serves a call. The launch itself is the caller's, so that the emulation runs this very code. ----

template <typename T, bool GENERAL, bool CAPPED, bool VECTOR, typename Launch>
auto choose_ticks_backward_done(const TicksBackward& a, Launch& launch) {
  using A = Acc<T>;
  const int64_t rows = a.ticks.rows, classes = a.ticks.classes;
  const TicksConfig config = ticks_backward_config(classes, static_cast<int>(sizeof(T)));
  const int64_t row_blocks = (rows - 1) / config.rows_per_block + 1, chunks = ticks_chunks(classes, sizeof(T));
  const TicksLaunch how{row_blocks * config.blocks_per_row, config.threads_per_row, config.rows_per_block, 0, VECTOR};
  const TicksGradients<A> gradients{static_cast<const A*>(a.grad),
                                    static_cast<const A*>(a.grad_lse),
                                    a.grad_stride,
                                    a.grad_lse_stride,
                                    a.dz_row_stride,
                                    static_cast<uint32_t>(config.blocks_per_row),
                                    static_cast<uint32_t>((chunks - 1) / config.blocks_per_row + 1)};
  return launch(how, ticks_backward_kernel<T, GENERAL, CAPPED, VECTOR>, static_cast<const T*>(a.ticks.z), static_cast<T*>(a.dz), a.dtarget,
                static_cast<const A*>(a.stats), ticks_shape<T>(a.ticks), gradients);
}

template <typename T, typename Launch>
auto choose_ticks_backward_of(const TicksBackward& a, Launch& launch) {
  const Ticks& t = a.ticks;
  // Elements past a 16-byte boundary, and whether `operand` has in every row as many as z, modulo what fills a chunk of its own.
  const auto past = [](const void* p, int64_t size) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) % kChunkBytes) / size; };
  const auto with_z = [&](const void* operand, int64_t stride, DType dtype) {
    if (operand == nullptr) return true;
    const int64_t size = size_of(dtype), per_chunk = kChunkBytes / size;
    return (past(operand, size) - past(t.z, sizeof(T))) % per_chunk == 0 && (t.rows == 1 || (stride - t.z_row_stride) % per_chunk == 0);
  };
  bool vector = with_z(a.dz, a.dz_row_stride, t.dtype);
  if (!is_plain(t)) {
    vector = vector && with_z(t.weight, 0, t.weight_dtype) && with_z(a.dtarget, t.classes, t.target_dtype);
    vector = vector && (!t.soft || with_z(t.target, t.target_row_stride, t.target_dtype));
    return vector ? choose_ticks_backward_done<T, true, true, true>(a, launch) : choose_ticks_backward_done<T, true, true, false>(a, launch);
  }
  if (t.softcap != 0) {
    return vector ? choose_ticks_backward_done<T, false, true, true>(a, launch) : choose_ticks_backward_done<T, false, true, false>(a, launch);
  }
  return vector ? choose_ticks_backward_done<T, false, false, true>(a, launch) : choose_ticks_backward_done<T, false, false, false>(a, launch);
}

// Calls launch(TicksLaunch, kernel, its arguments...) with the instantiation that serves `a` and returns what it returns.
template <typename Launch>
auto choose_ticks_backward(const TicksBackward& a, Launch&& launch) {
  switch (a.ticks.dtype) {
    case DType::kFloat64: return choose_ticks_backward_of<double>(a, launch);
    case DType::kFloat32: return choose_ticks_backward_of<float>(a, launch);
    case DType::kBFloat16: return choose_ticks_backward_of<__nv_bfloat16>(a, launch);
    default: return choose_ticks_backward_of<__half>(a, launch);
  }
}

}  // namespace fused_norm
