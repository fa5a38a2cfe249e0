// Thread-block clusters (sm_90 and later): blocks that run at the same time and may write to each other's shared memory, so that a row can
// be shared out among them; and the sums over such a row. Device code only; before sm_90 nothing here may be reached.
#pragma once

#include "common.cuh"

#ifndef __CUDACC__
#include "cluster_emulation.h"
#endif

namespace fused_norm {

#ifdef __CUDACC__

#if __CUDA_ARCH__ >= 900

__device__ __forceinline__ int cluster_blocks() {
  int blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
}

// This block's place in the cluster.
__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// A barrier of all threads of all blocks, in two halves, each of whole warps. It orders no memory but mailboxes that were opened before: a release of
// all that a thread has written waits for all of that to reach L2.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// A mailbox's flag: its phase ends when its block has said once how many bytes are to come in all, and they have. By one thread.
__device__ __forceinline__ void mailbox_open(uint64_t* flag) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n\tfence.mbarrier_init.release.cluster;" ::"r"(shared_address(flag)) : "memory");
}
__device__ __forceinline__ void mailbox_expect(uint64_t* flag, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(flag)), "r"(bytes) : "memory");
}
// Until the phase has ended, the flag's first phase being of parity 0, its second of 1, its third of 0. (With acquire.cluster it would throw away
// all of L1 as well, and no mail lies there.)
__device__ __forceinline__ void mailbox_wait(uint64_t* flag, int parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n"
      "WAIT:\n\tmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t@!done bra WAIT;\n\t}" ::"r"(shared_address(flag)),
      "r"(parity)
      : "memory");
}

// Sends v to where block `rank` has what this block has at `place`, to be counted by that block's flag.
template <typename A>
__device__ __forceinline__ void mailbox_send(A* place, uint64_t* flag, int rank, A v) {
  uint32_t there, flag_there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(place)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(flag_there) : "r"(shared_address(flag)), "r"(rank));
  if constexpr (sizeof(A) == 4) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(there), "f"(v), "r"(flag_there) : "memory");
  } else {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f64 [%0], %1, [%2];" ::"r"(there), "d"(v), "r"(flag_there) : "memory");
  }
}

#else

__device__ __forceinline__ int cluster_blocks() { return 1; }
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_arrive() { __trap(); }
__device__ __forceinline__ void cluster_wait() { __trap(); }
__device__ __forceinline__ void mailbox_open(uint64_t*) { __trap(); }
__device__ __forceinline__ void mailbox_expect(uint64_t*, int) { __trap(); }
__device__ __forceinline__ void mailbox_wait(uint64_t*, int) { __trap(); }
template <typename A>
__device__ __forceinline__ void mailbox_send(A*, uint64_t*, int, A) {
  __trap();
}

#endif
#endif

// Sums over rows that all blocks of the cluster share, with blockDim (threads, 1) in each, whole warps. Each warp sends its sums to every block,
// and every warp adds up what its block was sent: the order is that of rank and warp, and every thread of every block gets the same bits, as
// it would where one block takes one slice of the row after the other (leave_warp_sums). A block alone needs no mail.
//
// Mailboxes. There are two, used in turn: who sends to one again has been sent the sums after it by all warps, and these had read it before.
// A block may be sent to from the time that it has opened its mailboxes to its last sum, and gets all that it is sent before that ends: it
// may leave then.
//
//     ClusterSums<kMost, A> sums(shared);   first of all, in all threads: `shared` is cluster_sums_bytes, at the same place in every block
//     ...                                   loads, for instance
//     sums.begin();                         before the first sum
//     sums.add(v);                          any number of times, at most kMost sums at once
template <int MOST, typename A>
class ClusterSums {
 public:
  __device__ __forceinline__ explicit ClusterSums(void* shared)
      : flags_(static_cast<uint64_t*>(shared)), boxes_(reinterpret_cast<A*>(flags_ + 2)), blocks_(cluster_blocks()), rank_(cluster_rank()) {
    if (blocks_ == 1) return;
    if (threadIdx.x == 0) {
      mailbox_open(flags_);
      mailbox_open(flags_ + 1);
    }
    cluster_arrive();
  }

  __device__ __forceinline__ void begin() {
    if (blocks_ > 1) cluster_wait();
  }

  template <int COUNT>
  __device__ __forceinline__ void add(A (&v)[COUNT]) {
    static_assert(COUNT <= MOST, "more sums at once than a mailbox holds");
    const int warps = static_cast<int>(blockDim.x) / kWarp, entries = blocks_ * warps;
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    uint64_t* const flag = flags_ + round_ % 2;
    A* const box = boxes_ + round_ % 2 * MOST * entries;
    if (blocks_ == 1) {
      ++round_;
      return sum_over_row(v, box);
    }
    if (threadIdx.x == 0) mailbox_expect(flag, COUNT * entries * static_cast<int>(sizeof(A)));
    sum_over_lanes(v, kWarp);
    // A lane for each block to send to: all have the sum.
    if (lane < blocks_) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) mailbox_send(box + i * entries + rank_ * warps + warp, flag, lane, v[i]);
    }
    mailbox_wait(flag, round_ / 2 % 2);
    add_warp_sums(v, box, entries);
    ++round_;
  }

 private:
  uint64_t* flags_;
  A* boxes_;
  int blocks_, rank_;
  unsigned round_ = 0;
};

// Shared memory of ClusterSums for `most` sums at once of accumulators of this size; a multiple of 16.
__host__ __device__ constexpr size_t cluster_sums_bytes(int most, int accumulator_size, int blocks, int warps) {
  return (2 * sizeof(uint64_t) + 2 * static_cast<size_t>(most) * accumulator_size * blocks * warps + 15) / 16 * 16;
}

}  // namespace fused_norm
