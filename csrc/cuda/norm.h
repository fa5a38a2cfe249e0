// The host interface of the CUDA normalisation kernels: raw pointers in, an error text out. No CUDA and no torch header is needed
// to include it, so that bindings.cpp is compiled by the C++ compiler alone and the launchers by nvcc alone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout.h"

namespace fused_norm {

// y = normalise(x)*weight + bias for `rows` rows of `n` elements, both at least 1.
struct NormForward {
  const void* x;       // row r begins at element r*x_row_stride; its n elements are adjacent
  const void* weight;  // nullptr: none
  const void* bias;    // nullptr: none
  void* y;             // (rows, n), contiguous
  void* stats;         // (2, rows): rstd, mean; (1, rows) for rms: rstd; nullptr: not wanted. fp32, or fp64 for fp64 x
  int64_t rows;
  int64_t n;
  int64_t x_row_stride;
  int64_t groups;       // divides rows
  bool weight_grouped;  // weight is (groups, n) rather than (n)
  bool bias_grouped;    // likewise
  DType dtype;          // of x and y
  DType param_dtype;    // of weight and bias: dtype, or kFloat32 for kBFloat16 and kFloat16
  double eps;
  bool rms;
  bool cast;  // normalise(x) is rounded to dtype before weight and bias
};

// Enqueues the kernel on `stream` (a cudaStream_t of device `device`) and returns without waiting for it: nullptr, or what went wrong.
const char* launch_norm_forward(const NormForward& args, int device, void* stream);

// dx, and dw and db summed over each group's rows, as fused_norm/backends/__init__.py says it. `rows`, `n` and `groups` as above.
struct NormBackward {
  const void* dy;      // row r begins at element r*dy_row_stride; its n elements are adjacent
  const void* x;       // likewise
  const void* stats;   // as forward left them
  const void* weight;  // nullptr: none
  void* dx;            // (rows, n), contiguous; nullptr: not wanted
  void* dw;            // (groups, n); nullptr: not wanted
  void* db;            // likewise
  void* scratch;       // norm_backward_scratch_bytes of these args, 16-byte aligned
  int64_t rows;
  int64_t n;
  int64_t dy_row_stride;
  int64_t x_row_stride;
  int64_t groups;
  bool weight_grouped;  // weight is (groups, n) rather than (n)
  DType dtype;          // of dy, x and dx
  DType param_dtype;    // of weight, dw and db: dtype, or kFloat32 for kBFloat16 and kFloat16
  bool rms;
};

// Pointers do not matter, but which of dw and db are there.
size_t norm_backward_scratch_bytes(const NormBackward& args, int device);
// At most two kernels, as launch_norm_forward.
const char* launch_norm_backward(const NormBackward& args, int device, void* stream);

}  // namespace fused_norm
