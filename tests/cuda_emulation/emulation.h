// CUDA on a CPU, as far as csrc/cuda/*.cuh uses it: a kernel is an ordinary function, called once for each thread on a fiber of its own.
// The fibers of a block take turns on one thread of the CPU and give way only at shuffles and barriers; clusters of blocks run one by one.
//
// A warp runs as far as it can before the next one starts, and a block of a cluster as far as it can before the next, warps and blocks in
// ascending or descending order. That is the schedule least kind to a missing barrier: whatever others should have written is not
// there yet, and shared memory starts as NaN.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__  // all shared memory is the dynamic array, defined in emulation.cpp
#define __align__(bytes) __attribute__((aligned(bytes)))

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};
extern Dim3 threadIdx, blockIdx, blockDim, gridDim;

void __syncthreads();

// The flags forbid the compiler to fuse anything.
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline float __frsqrt_rn(float v) { return static_cast<float>(1 / std::sqrt(static_cast<double>(v))); }

namespace emulation {

// Every lane of the warp gives a value, and takes the one that lane ^ offset gave.
uint64_t shuffle_xor(uint64_t value, int offset);

// Of the cluster that runs: its blocks, all there at once, each with its own shared memory.
int cluster_blocks();
int cluster_rank();
// The halves of a barrier of all its threads; one that has returned counts as arrived.
void cluster_arrive();
void cluster_wait();
// The flag of a mailbox in shared memory, as cluster.cuh has it.
void mailbox_open(uint64_t* flag);
void mailbox_expect(uint64_t* flag, int bytes);
void mailbox_wait(uint64_t* flag, int parity);
// Writes to where the shared memory of block `rank` has what this block has at `place`. Exits with a message where that block has not begun
// or is gone.
void mailbox_send(void* place, uint64_t* flag, int rank, const void* from, size_t bytes);

// Runs kernel() for every thread of every block, `cluster` blocks adjacent in x making a cluster. Exits with a message where threads wait
// for each other in vain.
void launch(const std::function<void()>& kernel, Dim3 grid, Dim3 block, size_t shared_bytes, bool ascending, int cluster = 1);

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace emulation

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
  if (mask != 0xffffffffu) emulation::fail("a shuffle with a partial mask is not emulated");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = emulation::shuffle_xor(bits, offset);
  memcpy(&value, &bits, sizeof value);
  return value;
}
