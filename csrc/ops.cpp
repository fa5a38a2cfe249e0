// The norms' operators: their schemas, and their CPU entry points, which check what memory safety needs, allocate, and run a kernel of
// csrc/cpu over the rows. csrc/ops_ticks.cpp has the loss's.
//
// Only the libtorch stable ABI is used here, so that one build serves every torch since 2.11. csrc/cuda/bindings.cpp registers
// the CUDA side of the same schemas.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "cpu/kernels.h"
#include "ops.h"
#include "ops_common.h"

namespace fused_norm {
namespace {

// Elements from one row of n to the next, after checking that t is made of such rows.
int64_t row_stride(const Tensor& t, int64_t n, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), name, " is not on the CPU");
  if (t.is_contiguous()) return n;
  STD_TORCH_CHECK(
      t.dim() == 2 && t.size(1) == n && (n == 1 || t.stride(1) == 1), name, " has shape ", shape(t),
      " and is not contiguous, expected contiguous or 2-D with rows of n = ", n, " adjacent elements");
  return t.stride(0);
}

struct Rows {
  Dtype dtype;
  int64_t n, count, per_group, stride;
};

Rows rows_of(const Tensor& x, int64_t n, int64_t groups, const char* name = "x") {
  STD_TORCH_CHECK(n >= 1, "n is ", n, ", expected at least 1");
  STD_TORCH_CHECK(groups >= 1, "groups is ", groups, ", expected at least 1");
  Rows r{dtype_of(x, name), n, x.numel() / n, 0, row_stride(x, n, name)};
  STD_TORCH_CHECK(r.count * n == x.numel(), name, " has ", x.numel(), " elements, not a multiple of n = ", n);
  STD_TORCH_CHECK(r.count % groups == 0, name, " has ", r.count, " rows, not a multiple of groups = ", groups);
  r.per_group = r.count / groups;
  return r;
}

// 0 where the parameter is shared by all groups, n where each has its own.
int64_t check_param(const Tensor& p, const Rows& rows, int64_t groups, const char* name, const char* x_name = "x") {
  STD_TORCH_CHECK(p.is_cpu(), name, " is not on the CPU, ", x_name, " is");
  STD_TORCH_CHECK(p.is_contiguous(), name, " is not contiguous");
  const Dtype d = dtype_of(p, name);
  STD_TORCH_CHECK(
      param_dtype_fits(d, rows.dtype), name, " has dtype ", dtype_name(d), ", ", x_name, " has ", dtype_name(rows.dtype));
  const int64_t numel = p.numel();
  STD_TORCH_CHECK(
      numel == rows.n || (numel / groups == rows.n && numel % groups == 0), name, " has shape ", shape(p),
      ", expected n = ", rows.n, " elements, or n for each of ", groups, " groups");
  return numel == rows.n ? 0 : rows.n;
}

// norm_forward's arguments and results, but for x, its stride and y.
struct Forward {
  NormForward a{};
  Dtype param;
  std::optional<Tensor> stats;
};

Forward prepare_forward(
    const Rows& rows, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, int64_t groups, double eps, bool rms,
    bool need_stats, bool cast, const char* x_name = "x") {
  Forward f;
  f.param = rows.dtype;
  if (weight) {
    f.a.weight_stride = check_param(*weight, rows, groups, "weight", x_name);
    f.param = dtype_of(*weight, "weight");
    f.a.weight = data_of(*weight, "weight");
  }
  if (bias) {
    f.a.bias_stride = check_param(*bias, rows, groups, "bias", x_name);
    const Dtype d = dtype_of(*bias, "bias");
    STD_TORCH_CHECK(!weight || d == f.param, "bias has dtype ", dtype_name(d), ", weight has ", dtype_name(f.param));
    f.param = d;
    f.a.bias = data_of(*bias, "bias");
  }
  if (need_stats) {
    f.stats = empty({rms ? 1 : 2, rows.count}, accumulation(rows.dtype));
    f.a.rstd = f.stats->mutable_data_ptr();
    if (!rms) f.a.mean = (char*)f.a.rstd + rows.count * size_of(accumulation(rows.dtype));
  }
  f.a.n = rows.n;
  f.a.rows_per_group = rows.per_group;
  f.a.eps = eps;
  f.a.cast = cast;
  return f;
}

}  // namespace

std::tuple<Tensor, std::optional<Tensor>> norm_forward(
    const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, int64_t n, int64_t groups, double eps,
    bool rms, bool need_stats, bool cast) {
  const Rows rows = rows_of(x, n, groups);
  // The largest first: it then finds the place that the last one left, which small ones before it would cut into.
  Tensor y = empty_like(x, rows.dtype);
  Forward f = prepare_forward(rows, weight, bias, groups, eps, rms, need_stats, cast);
  f.a.x = data_of(x, "x");
  f.a.x_stride = rows.stride;
  f.a.y = y.mutable_data_ptr();
  f.a.past_cache = past_cache(y, x.numel() * size_of(rows.dtype));
  f.a.share = share_each(rows.count, n);
  const Kernels& k = kernels();
  if (f.a.share) k.norm_forward(rows.dtype, f.param, rms, f.a, 0, rows.count);
  else parallel(rows.count, n, [&](int64_t begin, int64_t end) { k.norm_forward(rows.dtype, f.param, rms, f.a, begin, end); });
  return {std::move(y), std::move(f.stats)};
}

namespace {

// Where the rows' rstd lie, after checking that stats holds one of each row, and a mean too unless rms.
const void* check_stats(const Tensor& stats, const Rows& rows, bool rms) {
  const Dtype acc = accumulation(rows.dtype);
  STD_TORCH_CHECK(stats.is_cpu() && stats.is_contiguous(), "stats is not a contiguous CPU tensor");
  STD_TORCH_CHECK(
      stats.scalar_type() == scalar_type(acc), "stats has dtype ", torch::headeronly::toString(stats.scalar_type()), ", expected ",
      dtype_name(acc));
  STD_TORCH_CHECK(
      stats.numel() == (rms ? 1 : 2) * rows.count, "stats has shape ", shape(stats), ", expected (", rms ? 1 : 2, ", ", rows.count, ")");
  return data_of(stats, "stats");
}

// The row stride of a tensor that has an element for each of x's.
int64_t check_like_x(const Tensor& t, const Tensor& x, int64_t n, const char* name, const char* x_name = "x") {
  STD_TORCH_CHECK(
      t.scalar_type() == x.scalar_type(), name, " has dtype ", torch::headeronly::toString(t.scalar_type()), ", ", x_name, " has ",
      torch::headeronly::toString(x.scalar_type()));
  STD_TORCH_CHECK(t.numel() == x.numel(), name, " has shape ", shape(t), ", ", x_name, " has ", shape(x));
  return row_stride(t, n, name);
}

// How a group's rows are cut into chunks, each with partial rows of dw and db of its own. By the shape alone.
struct Chunks {
  int64_t per_group, rows;
};
Chunks chunks_of(const Rows& rows) {
  // Enough chunks to keep many cores busy; but at least 16 rows a chunk, so that partial rows stay a small part of the traffic, and
  // 16384 elements, so that a chunk is worth handing out. A power of two divides evenly among 2, 4, 8... threads.
  int64_t most = std::min<int64_t>({128, rows.per_group / 16, rows.per_group * rows.n / 16384});
  int64_t chunks = 1;
  while (chunks * 2 <= most) chunks *= 2;
  // The kernels take four rows at a time.
  const int64_t per_chunk = std::max<int64_t>(4, ceil_div(ceil_div(rows.per_group, chunks), 4) * 4);
  return {ceil_div(rows.per_group, per_chunk), per_chunk};
}

Tensor reduce(const Tensor& partial, const Rows& rows, int64_t groups, int64_t chunks, Dtype out_dtype) {
  Tensor out = empty({groups, rows.n}, out_dtype);
  const ReducePartials a{partial.const_data_ptr(), out.mutable_data_ptr(), rows.n, chunks};
  const BackwardKernels& k = *kernels().backward;
  // Blocks of a few columns walk down the partial rows; a block's bounds do not depend on the number of threads.
  constexpr int64_t kColumns = 1024;
  const int64_t blocks = ceil_div(rows.n, kColumns);
  parallel(groups * blocks, std::min(rows.n, kColumns) * std::max<int64_t>(1, chunks), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t first = i % blocks * kColumns;
      k.reduce_partials(rows.dtype, out_dtype, a, i / blocks, first, std::min(rows.n, first + kColumns));
    }
  });
  return out;
}

}  // namespace

namespace {

// dw and db, and what the kernel writes through a.dx or a.after. `x_name` is what messages call x.
std::tuple<Tensor, Tensor> run_backward(
    NormBackward& a, const Rows& rows, const Tensor& dy, const Tensor& x, const Tensor& stats, const std::optional<Tensor>& weight,
    int64_t groups, bool rms, ScalarType param_dtype, bool need_dw, bool need_db, const char* x_name = "x") {
  const int64_t n = rows.n;
  const Dtype acc = accumulation(rows.dtype);
  a.dy_stride = check_like_x(dy, x, n, "dy", x_name);
  a.dy = data_of(dy, "dy");
  a.x = data_of(x, x_name);
  a.n = n;
  a.x_stride = rows.stride;
  if (a.dx || a.after || need_dw) {
    a.rstd = check_stats(stats, rows, rms);
    if (!rms) a.mean = (const char*)a.rstd + rows.count * size_of(acc);
  }
  Dtype weight_dtype = rows.dtype;
  if (weight) {
    a.weight_stride = check_param(*weight, rows, groups, "weight", x_name);
    weight_dtype = dtype_of(*weight, "weight");
    a.weight = data_of(*weight, "weight");
  }
  Dtype out_dtype = rows.dtype;
  if (param_dtype != x.scalar_type()) {
    STD_TORCH_CHECK(
        param_dtype == ScalarType::Float && rows.dtype != Dtype::f64, "param_dtype is ", torch::headeronly::toString(param_dtype), ", ",
        x_name, " has ", dtype_name(rows.dtype));
    out_dtype = Dtype::f32;
  }

  const Chunks chunks = chunks_of(rows);
  a.rows_per_group = rows.per_group;
  a.chunks_per_group = chunks.per_group;
  a.rows_per_chunk = chunks.rows;
  a.share = share_each(groups * chunks.per_group, n);
  // Beside dx, the kernel has no variant for db without dw: it is wanted too seldom.
  const bool sums_dw = need_dw || (need_db && (a.dx || a.after));
  Tensor dw_partial = empty({sums_dw ? groups * chunks.per_group : 0, n}, acc);
  Tensor db_partial = empty({need_db ? groups * chunks.per_group : 0, n}, acc);
  a.dw_partial = sums_dw ? dw_partial.mutable_data_ptr() : nullptr;
  a.db_partial = need_db ? db_partial.mutable_data_ptr() : nullptr;
  const BackwardKernels& k = *kernels().backward;
  if (a.share) {
    k.norm_backward(rows.dtype, weight_dtype, rms, a, 0, groups * chunks.per_group);
  } else {
    parallel(groups * chunks.per_group, chunks.rows * n, [&](int64_t begin, int64_t end) {
      k.norm_backward(rows.dtype, weight_dtype, rms, a, begin, end);
    });
  }
  Tensor dw = need_dw ? reduce(dw_partial, rows, groups, chunks.per_group, out_dtype) : empty({0}, out_dtype);
  Tensor db = need_db ? reduce(db_partial, rows, groups, chunks.per_group, out_dtype) : empty({0}, out_dtype);
  return {std::move(dw), std::move(db)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> norm_backward(
    const Tensor& dy, const Tensor& x, const Tensor& stats, const std::optional<Tensor>& weight, int64_t n, int64_t groups, bool rms,
    ScalarType param_dtype, bool need_dx, bool need_dw, bool need_db) {
  const Rows rows = rows_of(x, n, groups);
  NormBackward a{};
  Tensor dx = need_dx ? empty_like(x, rows.dtype) : empty({0}, rows.dtype);
  a.dx = need_dx ? dx.mutable_data_ptr() : nullptr;
  a.past_cache = need_dx && past_cache(dx, x.numel() * size_of(rows.dtype));
  auto [dw, db] = run_backward(a, rows, dy, x, stats, weight, groups, rms, param_dtype, need_dw, need_db);
  return {std::move(dx), std::move(dw), std::move(db)};
}

std::tuple<Tensor, Tensor, Tensor> norm_double_backward(
    const std::optional<Tensor>& ddx, const std::optional<Tensor>& ddw, const std::optional<Tensor>& ddb, const std::optional<Tensor>& dy,
    const Tensor& x, const Tensor& stats, const std::optional<Tensor>& weight, int64_t n, int64_t groups, bool rms,
    ScalarType param_dtype, bool need_ddy, bool need_dx, bool need_dw) {
  const Rows rows = rows_of(x, n, groups);
  const Dtype acc = accumulation(rows.dtype);
  const Dtype param = param_dtype == x.scalar_type() ? rows.dtype : Dtype::f32;
  STD_TORCH_CHECK(
      param_dtype == scalar_type(param) && param_dtype_fits(param, rows.dtype), "param_dtype is ",
      torch::headeronly::toString(param_dtype), ", x has ", dtype_name(rows.dtype));
  NormDoubleBackward a{};
  a.x = data_of(x, "x");
  a.x_stride = rows.stride;
  a.rstd = check_stats(stats, rows, rms);
  if (!rms) a.mean = (const char*)a.rstd + rows.count * size_of(acc);
  if (ddx) {
    a.ddx_stride = check_like_x(*ddx, x, n, "ddx");
    a.ddx = data_of(*ddx, "ddx");
  }
  if (need_dx || need_dw) {
    STD_TORCH_CHECK(dy, "dy is None, expected a tensor: ", need_dx ? "need_dx" : "need_dw", " is true");
    a.dy_stride = check_like_x(*dy, x, n, "dy");
    a.dy = data_of(*dy, "dy");
  }
  const auto use_param = [&](const std::optional<Tensor>& p, const char* name, const void*& data, int64_t& stride) {
    if (!p) return;
    stride = check_param(*p, rows, groups, name);
    STD_TORCH_CHECK(
        p->scalar_type() == param_dtype, name, " has dtype ", torch::headeronly::toString(p->scalar_type()), ", param_dtype is ",
        torch::headeronly::toString(param_dtype));
    data = data_of(*p, name);
  };
  use_param(weight, "weight", a.weight, a.weight_stride);
  use_param(ddw, "ddw", a.ddw, a.ddw_stride);
  use_param(ddb, "ddb", a.ddb, a.ddb_stride);

  // Only the sums over rows need the cut that backward makes. Without them rows do not meet, and a few at a time share out best.
  const Chunks chunks = need_dw ? chunks_of(rows) : Chunks{ceil_div(rows.per_group, 4), 4};
  a.n = n;
  a.rows_per_group = rows.per_group;
  a.chunks_per_group = chunks.per_group;
  a.rows_per_chunk = chunks.rows;
  Tensor grad_dy = need_ddy ? empty_like(x, rows.dtype) : empty({0}, rows.dtype);
  Tensor grad_x = need_dx ? empty_like(x, rows.dtype) : empty({0}, rows.dtype);
  Tensor partial = empty({need_dw ? groups * chunks.per_group : 0, n}, acc);
  a.grad_dy = need_ddy ? grad_dy.mutable_data_ptr() : nullptr;
  a.grad_x = need_dx ? grad_x.mutable_data_ptr() : nullptr;
  a.grad_w_partial = need_dw ? partial.mutable_data_ptr() : nullptr;
  if (need_ddy || need_dx || need_dw) {
    const BackwardKernels& k = *kernels().backward;
    parallel(groups * chunks.per_group, chunks.rows * n, [&](int64_t begin, int64_t end) {
      k.norm_double_backward(rows.dtype, param, rms, a, begin, end);
    });
  }
  Tensor grad_w = need_dw ? reduce(partial, rows, groups, chunks.per_group, param) : empty({0}, param);
  return {std::move(grad_dy), std::move(grad_x), std::move(grad_w)};
}

namespace {

// The dtype of x, which is added to a sum of dtype `sum`.
Dtype check_addend(ScalarType x, Dtype sum, const char* name, const char* sum_name) {
  const bool fits = x == scalar_type(sum) || (sum == Dtype::f32 && (x == ScalarType::BFloat16 || x == ScalarType::Half));
  STD_TORCH_CHECK(fits, name, " is ", torch::headeronly::toString(x), ", ", sum_name, " has ", dtype_name(sum));
  return x == scalar_type(sum) ? sum : x == ScalarType::BFloat16 ? Dtype::bf16 : Dtype::f16;
}

Dropout dropout_of(const std::optional<Tensor>& seed, double p) {
  STD_TORCH_CHECK(p >= 0 && p < 1, "dropout_p is ", p, ", expected at least 0 and below 1");
  STD_TORCH_CHECK(seed.has_value() == (p > 0), "seed is ", seed ? "a tensor" : "None", ", dropout_p is ", p, ": one takes the other");
  if (!seed) return {};
  STD_TORCH_CHECK(seed->is_cpu(), "seed is not on the CPU, the sum is");
  STD_TORCH_CHECK(
      seed->scalar_type() == ScalarType::Long, "seed has dtype ", torch::headeronly::toString(seed->scalar_type()), ", expected Long");
  STD_TORCH_CHECK(seed->numel() == 1, "seed has shape ", shape(*seed), ", expected one element");
  const uint64_t threshold = (uint64_t)(p * 0x1p32 + 0.5);
  return {true, *(const uint64_t*)data_of(*seed, "seed"), (uint32_t)std::min<uint64_t>(threshold, 0xffffffffu), 1 / (1 - p)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> add_norm_forward(
    const Tensor& x, const Tensor& residual, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& seed, int64_t n, double eps, bool rms, double dropout_p, bool need_stats, bool cast) {
  const Rows rows = rows_of(residual, n, 1, "residual");
  AddRows add{};
  add.x_dtype = check_addend(x.scalar_type(), rows.dtype, "x's dtype", "residual");
  add.x_size = size_of(add.x_dtype);
  STD_TORCH_CHECK(x.numel() == residual.numel(), "x has shape ", shape(x), ", residual has ", shape(residual));
  add.x_stride = row_stride(x, n, "x");
  add.residual_stride = rows.stride;
  add.dropout = dropout_of(seed, dropout_p);
  add.x = data_of(x, "x");
  add.residual = data_of(residual, "residual");
  add.n = n;
  Tensor summed = empty_like(residual, rows.dtype), y = empty_like(residual, rows.dtype);
  Forward f = prepare_forward(rows, weight, bias, 1, eps, rms, need_stats, cast, "residual");
  add.summed = summed.mutable_data_ptr();
  add.past_cache = f.a.past_cache = past_cache(y, x.numel() * size_of(rows.dtype));
  f.a.before = &add;
  f.a.y = y.mutable_data_ptr();
  const Kernels& k = kernels();
  parallel(rows.count, n, [&](int64_t begin, int64_t end) { k.norm_forward(rows.dtype, f.param, rms, f.a, begin, end); });
  if (!f.stats) f.stats = empty({0, rows.count}, accumulation(rows.dtype));
  return {std::move(y), std::move(summed), std::move(*f.stats)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_backward(
    const Tensor& dy, const std::optional<Tensor>& dsummed, const Tensor& summed, const Tensor& stats, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& seed, int64_t n, bool rms, double dropout_p, ScalarType param_dtype, ScalarType x_dtype, bool need_dx,
    bool need_dresidual, bool need_dw, bool need_db) {
  const Rows rows = rows_of(summed, n, 1, "summed");
  NormBackward a{};
  AddBackward after{};
  after.x_dtype = check_addend(x_dtype, rows.dtype, "x_dtype", "summed");
  after.dropout = dropout_of(seed, dropout_p);
  if (dsummed) {
    a.dsummed_stride = check_like_x(*dsummed, summed, n, "dsummed", "summed");
    a.dsummed = data_of(*dsummed, "dsummed");
  }
  // Where dx would be dresidual, there is one of them.
  const bool same = !after.dropout.any && after.x_dtype == rows.dtype;
  const bool gives_dresidual = need_dresidual || (need_dx && same), gives_dx = need_dx && !same;
  Tensor dx = gives_dx ? empty_like(summed, after.x_dtype) : empty({0}, after.x_dtype);
  Tensor dresidual = gives_dresidual ? empty_like(summed, rows.dtype) : empty({0}, rows.dtype);
  after.dx = gives_dx ? dx.mutable_data_ptr() : nullptr;
  after.dresidual = gives_dresidual ? dresidual.mutable_data_ptr() : nullptr;
  if (gives_dx) {
    a.after = &after;
  } else {
    a.dx = after.dresidual;
  }
  if (gives_dx || gives_dresidual) a.past_cache = past_cache(gives_dx ? dx : dresidual, summed.numel() * size_of(gives_dx ? after.x_dtype : rows.dtype));
  auto [dw, db] = run_backward(a, rows, dy, summed, stats, weight, 1, rms, param_dtype, need_dw, need_db, "summed");
  return {std::move(dx), std::move(dresidual), std::move(dw), std::move(db)};
}

// An operator's result is a tensor, where the function has none.
std::tuple<Tensor, Tensor> norm_forward_operator(
    const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, int64_t n, int64_t groups, double eps,
    bool rms, bool need_stats, bool cast) {
  auto [y, stats] = norm_forward(x, weight, bias, n, groups, eps, rms, need_stats, cast);
  if (!stats) stats = empty({0, x.numel() / n}, accumulation(dtype_of(x, "x")));
  return {std::move(y), std::move(*stats)};
}

}  // namespace fused_norm

STABLE_TORCH_LIBRARY(fused_norm, m) {
  m.def(
      "norm_forward(Tensor x, Tensor? weight, Tensor? bias, int n, int groups, float eps, bool rms, bool need_stats,"
      " bool cast=False) -> (Tensor y, Tensor stats)");
  m.def(
      "norm_backward(Tensor dy, Tensor x, Tensor stats, Tensor? weight, int n, int groups, bool rms, ScalarType param_dtype,"
      " bool need_dx, bool need_dw, bool need_db) -> (Tensor dx, Tensor dw, Tensor db)");
  m.def(
      "norm_double_backward(Tensor? ddx, Tensor? ddw, Tensor? ddb, Tensor? dy, Tensor x, Tensor stats, Tensor? weight, int n, int groups,"
      " bool rms, ScalarType param_dtype, bool need_ddy, bool need_dx, bool need_dw)"
      " -> (Tensor grad_dy, Tensor grad_x, Tensor grad_w)");
  m.def(
      "add_norm_forward(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor? seed, int n, float eps, bool rms, float dropout_p,"
      " bool need_stats, bool cast) -> (Tensor y, Tensor summed, Tensor stats)");
  m.def(
      "add_norm_backward(Tensor dy, Tensor? dsummed, Tensor summed, Tensor stats, Tensor? weight, Tensor? seed, int n, bool rms,"
      " float dropout_p, ScalarType param_dtype, ScalarType x_dtype, bool need_dx, bool need_dresidual, bool need_dw, bool need_db)"
      " -> (Tensor dx, Tensor dresidual, Tensor dw, Tensor db)");
}

STABLE_TORCH_LIBRARY_IMPL(fused_norm, CPU, m) {
  m.impl("norm_forward", TORCH_BOX(&fused_norm::norm_forward_operator));
  m.impl("norm_backward", TORCH_BOX(&fused_norm::norm_backward));
  m.impl("norm_double_backward", TORCH_BOX(&fused_norm::norm_double_backward));
  m.impl("add_norm_forward", TORCH_BOX(&fused_norm::add_norm_forward));
  m.impl("add_norm_backward", TORCH_BOX(&fused_norm::add_norm_backward));
}
