// The fibers behind emulation.h.
#include "emulation.h"

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <vector>

Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace fused_norm {
// The kernels declare it inside their namespace. As large as any device's: 227 KB.
alignas(16) unsigned char fused_norm_shared[232448];
}  // namespace fused_norm

namespace emulation {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kStack = 32 * 1024;
constexpr size_t kPage = 4096;

enum class State { kRunnable, kShuffle, kBarrier, kDone };

struct Fiber {
  ucontext_t context;
  Dim3 index;
  State state;
  uint64_t value;
  int offset;
};

std::vector<Fiber> fibers(kMaxThreads);
ucontext_t scheduler;
Fiber* current = nullptr;
const std::function<void()>* body = nullptr;

char* stack_of(size_t i) {
  static char* const stacks = [] {
    void* const p = mmap(nullptr, kMaxThreads * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) fail("no memory for the fibers' stacks");
    for (size_t i = 0; i < kMaxThreads; ++i) mprotect(static_cast<char*>(p) + i * kStack, kPage, PROT_NONE);
    return static_cast<char*>(p);
  }();
  return stacks + i * kStack;
}

void run_fiber() {
  (*body)();
  current->state = State::kDone;
  swapcontext(&current->context, &scheduler);
}

void start(unsigned i) {
  Fiber& fiber = fibers[i];
  fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
  fiber.state = State::kRunnable;
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

// Lets every lane of a warp run until none can.
void run_warp(Fiber* lanes) {
  for (;;) {
    int shuffling = 0, runnable = 0;
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
    }
    if (shuffling == 0 && runnable == 0) return;
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

void run_block(int threads, bool ascending) {
  const int warps = threads / kWarp;
  for (int i = 0; i < threads; ++i) start(i);
  for (;;) {
    for (int w = 0; w < warps; ++w) run_warp(&fibers[(ascending ? w : warps - 1 - w) * kWarp]);
    int done = 0, waiting = 0;
    for (int i = 0; i < threads; ++i) {
      done += fibers[i].state == State::kDone;
      waiting += fibers[i].state == State::kBarrier;
    }
    if (done == threads) return;
    if (waiting != threads) fail("%d of %d threads wait at a barrier, %d have returned", waiting, threads, done);
    for (int i = 0; i < threads; ++i) fibers[i].state = State::kRunnable;
  }
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

void launch(const std::function<void()>& kernel, Dim3 grid, Dim3 block, size_t shared_bytes, bool ascending) {
  const size_t threads = size_t(block.x) * block.y * block.z;
  if (threads > kMaxThreads || threads % kWarp != 0) fail("a block of %zu threads", threads);
  if (shared_bytes > sizeof fused_norm::fused_norm_shared) fail("%zu bytes of shared memory", shared_bytes);
  body = &kernel;
  gridDim = grid;
  blockDim = block;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        ASAN_UNPOISON_MEMORY_REGION(fused_norm::fused_norm_shared, sizeof fused_norm::fused_norm_shared);
        memset(fused_norm::fused_norm_shared, 0xff, sizeof fused_norm::fused_norm_shared);  // NaN in every type
        ASAN_POISON_MEMORY_REGION(fused_norm::fused_norm_shared + shared_bytes, sizeof fused_norm::fused_norm_shared - shared_bytes);
        run_block(static_cast<int>(threads), ascending);
      }
    }
  }
}

}  // namespace emulation

void __syncthreads() { emulation::wait(emulation::State::kBarrier); }
