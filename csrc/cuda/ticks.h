// The host interface of the CUDA kernels of the ticks loss: as norm.h is for the norms. The mathematics stands in
// fused_norm/backends/__init__.py, section "Ticks".
#pragma once

#include <cstdint>

#include "layout.h"

namespace fused_norm {

// What forward and backward are both told: `rows` rows of `classes` logits, both at least 1, and how the loss is made of them.
struct Ticks {
  const void* z;       // row r begins at element r*z_row_stride; its logits are adjacent
  const void* target;  // soft: rows of probabilities, target_row_stride apart, else (rows) int64 indices
  const void* weight;  // (classes); nullptr: none
  int64_t rows;
  int64_t classes;
  int64_t z_row_stride;
  int64_t target_row_stride;
  int64_t ignore_index;
  bool soft;
  DType dtype;         // of z and dz
  DType target_dtype;  // of soft targets: dtype, or kFloat32 for kBFloat16 and kFloat16
  DType weight_dtype;  // likewise
  double smoothing, ce, ticks, softcap;  // softcap 0: none
};

// Hard targets without smoothing: only the target has mass. Three rows of statistics serve it, all else takes four.
inline bool is_plain(const Ticks& a) { return !a.soft && a.smoothing == 0; }

// loss and stats are fp32, or fp64 for fp64 z.
struct TicksForward {
  Ticks ticks;
  void* loss;   // (rows)
  void* stats;  // (3, rows): largest, others, q_t where is_plain; else (4, rows): largest, others, A, B
};

struct TicksBackward {
  Ticks ticks;
  const void* stats;     // as forward left them
  const void* grad;      // (rows), grad_stride apart (0: one for all), of stats' type
  const void* grad_lse;  // likewise; nullptr: zeros
  int64_t grad_stride;
  int64_t grad_lse_stride;
  void* dz;       // rows dz_row_stride apart: z itself, or memory that overlaps no other; nullptr: not wanted
  void* dtarget;  // soft targets alone: (rows, classes), contiguous, of target's type; nullptr: not wanted
  int64_t dz_row_stride;
};

// Each enqueues its kernel on `stream` (a cudaStream_t of device `device`) and returns without waiting for it: nullptr, or what went wrong.
const char* launch_ticks_forward(const TicksForward& args, int device, void* stream);
const char* launch_ticks_backward(const TicksBackward& args, int device, void* stream);

}  // namespace fused_norm
