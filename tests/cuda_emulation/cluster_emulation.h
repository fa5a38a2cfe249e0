// Stands in for the cluster instructions of csrc/cuda/cluster.cuh.
#pragma once

#include "emulation.h"

namespace fused_norm {

inline int cluster_blocks() { return emulation::cluster_blocks(); }
inline int cluster_rank() { return emulation::cluster_rank(); }
inline void cluster_arrive() { emulation::cluster_arrive(); }
inline void cluster_wait() { emulation::cluster_wait(); }
inline void mailbox_open(uint64_t* flag) { emulation::mailbox_open(flag); }
inline void mailbox_expect(uint64_t* flag, int bytes) { emulation::mailbox_expect(flag, bytes); }
inline void mailbox_wait(uint64_t* flag, int parity) { emulation::mailbox_wait(flag, parity); }

template <typename A>
void mailbox_send(A* place, uint64_t* flag, int rank, A v) {
  emulation::mailbox_send(place, flag, rank, &v, sizeof v);
}

}  // namespace fused_norm
