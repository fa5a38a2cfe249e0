// The fibers behind emulation.h.
#include "emulation.h"

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <vector>

Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace fused_norm {
// The kernels declare it inside their namespace. As large as any device's: 227 KB. It is the memory of the block that runs: those of the
// others in its cluster are put away meanwhile.
alignas(16) unsigned char fused_norm_shared[232448];
}  // namespace fused_norm

namespace emulation {
namespace {

using fused_norm::fused_norm_shared;

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr int kMaxCluster = 16;
constexpr size_t kStack = 32 * 1024;
constexpr size_t kPage = 4096;

enum class State { kRunnable, kShuffle, kBarrier, kCluster, kMail, kDone };

struct Fiber {
  ucontext_t context;
  Dim3 index;
  State state;
  uint64_t value;
  int offset;
  int arrived, waited;  // at the cluster's barriers, so far
};

// What a mailbox's flag holds here.
struct Flag {
  int32_t missing;  // bytes that were said to come and have not, less those that have and were not said to
  uint8_t phase;
  bool said;
  uint16_t mark;
};
constexpr uint16_t kFlagMark = 0x4d42;
static_assert(sizeof(Flag) == sizeof(uint64_t));

struct Block {
  Dim3 index;
  Fiber* fibers;
  bool begun, gone;
  std::vector<unsigned char> shared;  // while another block runs
};

std::vector<Fiber> fibers;  // of a cluster, block by block
std::vector<Block> blocks;
int threads_per_block;
size_t shared_per_block;
ucontext_t scheduler;
Fiber* current = nullptr;
Block* current_block = nullptr;
const std::function<void()>* body = nullptr;
bool progress;  // has been made since the scheduler looked

char* stack_of(size_t i) {
  static char* const stacks = [] {
    void* const p = mmap(nullptr, kMaxCluster * kMaxThreads * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) fail("no memory for the fibers' stacks");
    return static_cast<char*>(p);
  }();
  static size_t guarded = 0;
  for (; guarded <= i; ++guarded) mprotect(stacks + guarded * kStack, kPage, PROT_NONE);
  return stacks + i * kStack;
}

void run_fiber() {
  (*body)();
  current->state = State::kDone;
  progress = true;
  swapcontext(&current->context, &scheduler);
}

void start(size_t i) {
  Fiber& fiber = fibers[i];
  const unsigned t = static_cast<unsigned>(i % threads_per_block);
  fiber.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
  fiber.state = State::kRunnable;
  fiber.arrived = fiber.waited = 0;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack_of(i) + kPage;
  fiber.context.uc_stack.ss_size = kStack - kPage;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_fiber, 0);
}

void wait(State state) {
  Fiber* const self = current;
  self->state = state;
  swapcontext(&self->context, &scheduler);
}

int count(const Block& block, State state) {
  return static_cast<int>(std::count_if(block.fibers, block.fibers + threads_per_block, [&](const Fiber& f) { return f.state == state; }));
}

// Lets every lane of a warp run until none can.
void run_warp(Fiber* lanes) {
  for (;;) {
    int shuffling = 0, runnable = 0, expecting = 0;
    for (int i = 0; i < kWarp; ++i) {
      if (lanes[i].state == State::kRunnable) {
        current = &lanes[i];
        threadIdx = current->index;
        swapcontext(&scheduler, &current->context);
      }
    }
    for (int i = 0; i < kWarp; ++i) {
      shuffling += lanes[i].state == State::kShuffle;
      runnable += lanes[i].state == State::kRunnable;
      expecting += lanes[i].state == State::kMail;
    }
    if (shuffling == 0 && runnable == 0) return;
    if (shuffling + expecting == kWarp && expecting > 0) return;  // some lanes have looked into their mailbox before the last of it came
    if (shuffling != kWarp) fail("%d of 32 lanes are at a shuffle, the others are not", shuffling);
    uint64_t given[kWarp];
    for (int i = 0; i < kWarp; ++i) {
      if (lanes[i].offset != lanes[0].offset) fail("lanes of one warp shuffle over offsets %d and %d", lanes[0].offset, lanes[i].offset);
      given[i] = lanes[i].value;
    }
    for (int i = 0; i < kWarp; ++i) {
      if ((i ^ lanes[i].offset) >= kWarp) fail("a shuffle over offset %d leaves the warp", lanes[i].offset);
      lanes[i].value = given[i ^ lanes[i].offset];
      lanes[i].state = State::kRunnable;
    }
  }
}

// Lets a block run until all its threads have returned or wait for something outside it.
void run_block(Block& block, bool ascending) {
  const int warps = threads_per_block / kWarp;
  current_block = &block;
  blockIdx = block.index;
  block.begun = true;
  std::copy_n(block.shared.begin(), shared_per_block, fused_norm_shared);
  for (int i = 0; i < threads_per_block; ++i) {
    if (block.fibers[i].state == State::kMail) block.fibers[i].state = State::kRunnable;  // to look again
  }
  for (;;) {
    for (int w = 0; w < warps; ++w) run_warp(&block.fibers[(ascending ? w : warps - 1 - w) * kWarp]);
    if (count(block, State::kBarrier) < threads_per_block) break;
    for (int i = 0; i < threads_per_block; ++i) block.fibers[i].state = State::kRunnable;
  }
  std::copy_n(fused_norm_shared, shared_per_block, block.shared.begin());
  block.gone = count(block, State::kDone) == threads_per_block;
}

// Lets those go on who wait at a cluster's barrier that all have arrived at.
void release_cluster() {
  int arrived = INT32_MAX;
  for (const Fiber& f : fibers) {
    if (f.state != State::kDone) arrived = std::min(arrived, f.arrived);
  }
  for (Fiber& f : fibers) {
    if (f.state != State::kCluster || f.waited > arrived) continue;
    f.state = State::kRunnable;
    progress = true;
  }
}

void run_cluster(bool ascending) {
  for (size_t i = 0; i < fibers.size(); ++i) start(i);
  do {
    progress = false;
    for (size_t b = 0; b < blocks.size(); ++b) {
      Block& block = blocks[ascending ? b : blocks.size() - 1 - b];
      if (!block.gone) run_block(block, ascending);
    }
    release_cluster();
  } while (progress);
  for (const Block& block : blocks) {
    const auto report = [&](State state, const char* what) {
      const int waiting = count(block, state);
      if (waiting > 0) fail("%d of %d threads wait %s, %d have returned", waiting, threads_per_block, what, count(block, State::kDone));
    };
    report(State::kBarrier, "at a barrier");
    report(State::kCluster, "at a cluster's barrier");
    report(State::kMail, "for their mailbox");
  }
}

Flag load_flag(const void* p) {
  Flag flag;
  memcpy(&flag, p, sizeof flag);
  if (flag.mark != kFlagMark) fail("a mailbox that was not opened");
  return flag;
}

void store_flag(void* p, Flag flag) {
  if (flag.said && flag.missing == 0) {
    ++flag.phase;
    flag.said = false;
  }
  memcpy(p, &flag, sizeof flag);
}

}  // namespace

void fail(const char* format, ...) {
  va_list args;
  va_start(args, format);
  fprintf(stderr, "EMULATION: ");
  vfprintf(stderr, format, args);
  fprintf(stderr, "\n");
  va_end(args);
  exit(3);
}

uint64_t shuffle_xor(uint64_t value, int offset) {
  Fiber* const self = current;
  self->value = value;
  self->offset = offset;
  wait(State::kShuffle);
  return self->value;
}

int cluster_blocks() { return static_cast<int>(blocks.size()); }

int cluster_rank() { return static_cast<int>(current_block - blocks.data()); }

void cluster_arrive() {
  if (current->arrived++ != current->waited) fail("a thread arrives at a cluster's barrier again and has not waited");
}

void cluster_wait() {
  if (++current->waited != current->arrived) fail("a thread waits at a cluster's barrier and has not arrived");
  wait(State::kCluster);
}

void mailbox_open(uint64_t* flag) { store_flag(flag, {0, 0, false, kFlagMark}); }

void mailbox_expect(uint64_t* flag, int bytes) {
  Flag f = load_flag(flag);
  if (f.said) fail("a mailbox is told twice what is to come");
  f.said = true;
  f.missing += bytes;
  store_flag(flag, f);
}

void mailbox_wait(uint64_t* flag, int parity) {
  while (load_flag(flag).phase % 2 == parity) wait(State::kMail);
  progress = true;
}

void mailbox_send(void* place, uint64_t* flag, int rank, const void* from, size_t bytes) {
  if (rank < 0 || rank >= cluster_blocks()) fail("block %d of a cluster of %d", rank, cluster_blocks());
  Block& block = blocks[rank];
  if (!block.begun) fail("a block is sent to that has not begun");
  if (block.gone) fail("a block is sent to that is gone");
  const auto there = [&](void* p, size_t size) {
    const size_t offset = static_cast<size_t>(static_cast<unsigned char*>(p) - fused_norm_shared);
    if (offset + size > shared_per_block) fail("a write past another block's shared memory, at byte %zu of %zu", offset, shared_per_block);
    return &block == current_block ? static_cast<unsigned char*>(p) : block.shared.data() + offset;
  };
  memcpy(there(place, bytes), from, bytes);
  unsigned char* const its_flag = there(flag, sizeof(Flag));
  Flag f = load_flag(its_flag);
  f.missing -= static_cast<int32_t>(bytes);
  store_flag(its_flag, f);
}

void launch(const std::function<void()>& kernel, Dim3 grid, Dim3 block, size_t shared_bytes, bool ascending, int cluster) {
  const size_t threads = size_t(block.x) * block.y * block.z;
  if (threads > kMaxThreads || threads % kWarp != 0) fail("a block of %zu threads", threads);
  if (shared_bytes > sizeof fused_norm_shared) fail("%zu bytes of shared memory", shared_bytes);
  if (cluster < 1 || cluster > kMaxCluster || grid.x % cluster != 0) fail("clusters of %d in a grid of %u", cluster, grid.x);
  body = &kernel;
  gridDim = grid;
  blockDim = block;
  threads_per_block = static_cast<int>(threads);
  shared_per_block = shared_bytes;
  fibers.resize(cluster * threads);
  blocks.resize(cluster);
  ASAN_UNPOISON_MEMORY_REGION(fused_norm_shared, sizeof fused_norm_shared);
  ASAN_POISON_MEMORY_REGION(fused_norm_shared + shared_bytes, sizeof fused_norm_shared - shared_bytes);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; x += cluster) {
        for (int b = 0; b < cluster; ++b) {
          // NaN in every type
          blocks[b] = {{x + b, y, z}, fibers.data() + b * threads, false, false, std::vector<unsigned char>(shared_bytes, 0xff)};
        }
        run_cluster(ascending);
      }
    }
  }
}

}  // namespace emulation

void __syncthreads() { emulation::wait(emulation::State::kBarrier); }
