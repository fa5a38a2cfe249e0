// The CPU kernels' interface: raw pointers and sizes, no torch type. Each instruction set fills in one table of functions.
#pragma once

#include <cstdint>

namespace fused_norm {

enum class Dtype : int { f64, f32, bf16, f16 };

// Shares [0, count) out among threads, in parts worth handing out: `elements` is the size of one.
using Share = void (*)(int64_t count, int64_t elements, void (*body)(int64_t begin, int64_t end, void* context), void* context);

// An element is kept where its random word is at least `threshold`, and multiplied by `scale` then.
struct Dropout {
  bool any;            // false: nothing is dropped, and the rest is not looked at
  uint64_t seed;
  uint32_t threshold;
  double scale;
};

// summed = x*keep*scale + residual, rounded once, for rows of `n` elements.
struct AddRows {
  const void* x;
  const void* residual;
  void* summed;            // contiguous
  int64_t n;
  int64_t x_stride;        // elements from one row to the next
  int64_t residual_stride;
  Dtype x_dtype;           // the sum's, or bf16 or f16 beside f32
  int64_t x_size;          // bytes of an element of x
  Dropout dropout;
  bool past_cache;         // as in NormForward
};

// Rows of `n` elements. A group is `rows_per_group` consecutive rows; weight and bias hold one set of n, or one per group.
struct NormForward {
  const void* x;
  const void* weight;  // may be null
  const void* bias;    // may be null
  void* y;             // contiguous
  void* rstd;          // one a row, in the accumulation type; null if not wanted
  void* mean;          // likewise; null for rms too
  int64_t n;
  int64_t x_stride;        // elements from one row to the next
  int64_t rows_per_group;
  int64_t weight_stride;   // 0: shared by all groups; n: one set a group
  int64_t bias_stride;     // likewise
  double eps;
  bool cast;               // xhat is rounded to x's type before the weight and the bias
  bool past_cache;         // y is so large that it is best written past the caches
  Share share;             // given where the rows are too few to be shared out, and so wide that each is; else null
  const AddRows* before;   // the rows are this sum, which is made on the way (x and x_stride are not looked at); may be null
};

// What becomes of d = dx + dsummed, before it is rounded, where the norm is that of a sum, and x's gradient is not the sum's.
struct AddBackward {
  void* dresidual;         // d; contiguous, null if not needed
  void* dx;                // d*keep*scale in `x_dtype`; contiguous
  Dtype x_dtype;           // the sum's, or bf16 or f16 beside f32
  Dropout dropout;
};

// The rows of each group are cut into `chunks_per_group` chunks of `rows_per_chunk` rows (the last may be shorter); each chunk sums dw and
// db into partial rows of its own. The shape alone fixes the cut, so the order of the sums does not depend on threads.
struct NormBackward {
  const void* dy;
  const void* x;
  const void* rstd;
  const void* mean;    // null for rms
  const void* weight;  // null: as if all ones
  const void* dsummed;  // what is added to dx before it is rounded; may be null
  void* dx;            // contiguous; null if not needed
  const AddBackward* after;  // what else is done to dx, in place of storing it; may be null
  void* dw_partial;    // (groups * chunks_per_group, n) in the accumulation type; null if not needed
  void* db_partial;    // likewise; beside dx null too if dw_partial is
  int64_t n;
  int64_t dy_stride;
  int64_t x_stride;
  int64_t dsummed_stride;
  int64_t rows_per_group;
  int64_t weight_stride;
  int64_t chunks_per_group;
  int64_t rows_per_chunk;
  bool past_cache;       // as in NormForward, of dx, or of what `after` gives
  Share share;           // as in NormForward
};

// Chunks as for NormBackward. What ddx, ddw and ddb stand for when null are zeros.
struct NormDoubleBackward {
  const void* ddx;        // may be null
  const void* ddw;        // may be null
  const void* ddb;        // may be null
  const void* dy;         // may be null if grad_x and grad_w_partial are
  const void* x;
  const void* rstd;
  const void* mean;       // null for rms
  const void* weight;     // null: as if all ones
  void* grad_dy;          // contiguous; null if not needed
  void* grad_x;           // likewise
  void* grad_w_partial;   // (groups * chunks_per_group, n) in the accumulation type; null if not needed
  int64_t n;
  int64_t ddx_stride;
  int64_t dy_stride;
  int64_t x_stride;
  int64_t rows_per_group;
  int64_t weight_stride;  // 0: shared by all groups; n: one set a group
  int64_t ddw_stride;     // likewise
  int64_t ddb_stride;     // likewise
  int64_t chunks_per_group;
  int64_t rows_per_chunk;
};

// out[g, j] = sum over the group's chunks of partial[g, chunk, j], rounded once to `out_dtype`.
struct ReducePartials {
  const void* partial;
  void* out;
  int64_t n;
  int64_t chunks_per_group;
};

// The logits are rows of `classes` elements. Of `index` (class indices) and `target` (class probabilities) one is null. `weight` is one a class
// in the accumulation type, or null for ones; loss, stats, grad and grad_lse are in that type too.
struct TicksForward {
  const void* z;
  const int64_t* index;    // each in [0, classes), or ignore_index
  const void* target;
  const void* weight;
  void* loss;
  void* stats;             // (3, rows) for class indices without smoothing, else (4, rows)
  int64_t classes;
  int64_t rows;
  int64_t z_stride;        // elements from one row to the next
  int64_t target_stride;   // bytes
  int64_t ignore_index;
  double smoothing;
  double ce;
  double ticks;
  double softcap;          // 0: none
};

// Each row is cut into `chunks_per_row` chunks of `columns_per_chunk` columns (the last may be shorter).
struct TicksBackward {
  const void* grad;
  const void* grad_lse;    // may be null
  const void* z;
  const int64_t* index;
  const void* target;
  const void* weight;
  const void* stats;
  void* dz;                // may be z; null if not needed, for class probabilities alone
  void* dtarget;           // contiguous, for class probabilities alone; null if not needed
  int64_t classes;
  int64_t rows;
  int64_t grad_stride;     // elements
  int64_t grad_lse_stride;
  int64_t z_stride;
  int64_t dz_stride;
  int64_t target_stride;   // bytes
  int64_t chunks_per_row;
  int64_t columns_per_chunk;
  int64_t ignore_index;
  double smoothing;
  double ce;
  double ticks;
  double softcap;
};

// Of backward, in a source of their own: the compiler takes its time over them.
struct BackwardKernels {
  // chunks [begin, end), counted over all groups; `dtype` is x's, `weight_dtype` as for forward
  void (*norm_backward)(Dtype dtype, Dtype weight_dtype, bool rms, const NormBackward&, int64_t begin, int64_t end);
  // chunks [begin, end), counted over all groups; `param_dtype` is that of weight, ddw and ddb
  void (*norm_double_backward)(Dtype dtype, Dtype param_dtype, bool rms, const NormDoubleBackward&, int64_t begin, int64_t end);
  // columns [begin, end) of group g
  void (*reduce_partials)(Dtype dtype, Dtype out_dtype, const ReducePartials&, int64_t group, int64_t begin, int64_t end);
};

struct Kernels {
  const char* name;
  // rows [begin, end); `dtype` is x's, `weight_dtype` the weight's and bias's: x's own, or f32 for bf16 and f16 x
  void (*norm_forward)(Dtype dtype, Dtype weight_dtype, bool rms, const NormForward&, int64_t begin, int64_t end);
  const BackwardKernels* backward;
  // rows [begin, end); `dtype` is z's, `target_dtype` that of class probabilities: z's own, or f32 for bf16 and f16 z
  void (*ticks_forward)(Dtype dtype, Dtype target_dtype, const TicksForward&, int64_t begin, int64_t end);
  // chunks [begin, end), counted over all rows
  void (*ticks_backward)(Dtype dtype, Dtype target_dtype, const TicksBackward&, int64_t begin, int64_t end);
  // `count` elements from `dtype` to its accumulation type
  void (*widen)(Dtype dtype, const void* from, void* to, int64_t count);
};

extern const Kernels kernels_default;
extern const BackwardKernels backward_default;
#ifdef FUSED_NORM_X86
extern const Kernels kernels_avx2, kernels_avx512;
extern const BackwardKernels backward_avx2, backward_avx512;
#endif

// The table in use. Chosen once at load: the best this machine has, or less if ATEN_CPU_CAPABILITY asks for less.
const Kernels& kernels();

// The names this machine can run, best last, and a way to force one of them (false: this machine cannot). For tests and measurements.
int capabilities(const char* names[3]);
bool set_capability(const char* name);

}  // namespace fused_norm
