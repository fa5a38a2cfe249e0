// Copies from global to shared memory that go on while the thread does other work (cp.async, sm_80 and later; before that they are done on
// the spot). A thread's copies make groups, in the order in which it commits them, and it waits for its own alone.
#pragma once

#include "common.cuh"

#ifndef __CUDACC__
#include "async_copy_emulation.h"
#endif

namespace fused_norm {

#ifdef __CUDACC__

// 4, 8 or 16 bytes, aligned to as many on both sides. 16 bytes pass L1 by.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(from), "n"(BYTES) : "memory");
  }
#else
  for (int i = 0; i < BYTES / 4; ++i) static_cast<uint32_t*>(to)[i] = static_cast<const uint32_t*>(from)[i];
#endif
}

// Closes a group; one without copies counts too.
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int PENDING>
__device__ __forceinline__ void wait_for_copies_but() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

#endif

constexpr int kMostPendingCopies = 8;

// Until no more than the `pending` youngest groups, at most kMostPendingCopies, are under way. The same number in the whole block: the
// instruction takes a constant.
__device__ __forceinline__ void wait_for_copies(int pending) {
  switch (pending) {
    case 0: return wait_for_copies_but<0>();
    case 1: return wait_for_copies_but<1>();
    case 2: return wait_for_copies_but<2>();
    case 3: return wait_for_copies_but<3>();
    case 4: return wait_for_copies_but<4>();
    case 5: return wait_for_copies_but<5>();
    case 6: return wait_for_copies_but<6>();
    case 7: return wait_for_copies_but<7>();
    default: return wait_for_copies_but<8>();
  }
}

// Chunk c of a row of n elements to `to`: 16 bytes at once where VECTOR, as load_chunk. Else element by element, and those of 2 bytes, which no
// copy of this kind takes, on the spot. Elements past the row's end are not touched, here nor there.
template <bool VECTOR, typename T>
__device__ __forceinline__ void copy_chunk_async(Chunk* to, const T* row, int c, int64_t n) {
  constexpr int K = kPerChunk<T>;
  const T* const from = row + static_cast<int64_t>(c) * K;
  if constexpr (VECTOR) {
    copy_async<kChunkBytes>(to, from);
  } else if constexpr (sizeof(T) == 2) {
    *to = load_chunk<false>(row, c, n);
  } else {
#pragma unroll
    for (int j = 0; j < K; ++j) {
      if (present<false, K>(c, j, n)) copy_async<sizeof(T)>(reinterpret_cast<T*>(to) + j, from + j);
    }
  }
}

}  // namespace fused_norm
