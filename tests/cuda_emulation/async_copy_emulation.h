// Stands in for the asynchronous copies of csrc/cuda/async_copy.cuh. They happen as early as they may, on the spot, or as late, when their
// thread waits for them: what is read or written in between without waiting differs between the two.
#pragma once

#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include "emulation.h"

namespace emulation {

inline bool copies_are_late = false;

// Of one thread: what it has asked for since its last commit, and its groups that are not done, oldest first.
struct Copies {
  struct Copy {
    void* to;
    const void* from;
    size_t bytes;
  };
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
};

// By block and thread.
inline std::map<std::pair<unsigned, unsigned>, Copies>& all_copies() {
  static std::map<std::pair<unsigned, unsigned>, Copies> all;
  return all;
}

inline Copies& my_copies() { return all_copies()[{blockIdx.x, (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x}]; }

inline void wait_for_groups_but(size_t pending) {
  auto& groups = my_copies().groups;
  const size_t done = groups.size() < pending ? 0 : groups.size() - pending;
  for (size_t i = 0; i < done; ++i) {
    for (const auto& copy : groups[i]) memcpy(copy.to, copy.from, copy.bytes);
  }
  groups.erase(groups.begin(), groups.begin() + done);
}

// After a launch: nobody may have left before the copies it asked for.
inline void expect_no_copies() {
  for (const auto& entry : all_copies()) {
    if (!entry.second.open.empty()) fail("copies that were never committed");
    for (const auto& group : entry.second.groups) {
      if (!group.empty()) fail("copies that were never waited for");
    }
  }
  all_copies().clear();
}

}  // namespace emulation

namespace fused_norm {

template <int BYTES>
void copy_async(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(to) % BYTES != 0 || reinterpret_cast<uintptr_t>(from) % BYTES != 0) {
    emulation::fail("a misaligned copy of %d bytes", BYTES);
  }
  if (emulation::copies_are_late) {
    emulation::my_copies().open.push_back({to, from, BYTES});
  } else {
    memcpy(to, from, BYTES);
  }
}

inline void commit_copies() {
  auto& mine = emulation::my_copies();
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

template <int PENDING>
void wait_for_copies_but() {
  emulation::wait_for_groups_but(PENDING);
}

}  // namespace fused_norm
