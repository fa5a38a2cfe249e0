// The ticks loss's operators: their schemas, and their CPU entry points, as csrc/ops.cpp has for the norms.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>

#include "cpu/kernels.h"
#include "ops_common.h"

namespace fused_norm {
namespace {

// A chunk is what a thread takes at a time in backward.
constexpr int64_t kColumnsPerChunk = 16384;

// The logits and what comes with them, checked.
struct Loss {
  Dtype dtype, acc, target_dtype;
  int64_t rows, classes, z_stride, target_stride = 0;
  const void* z;
  const int64_t* index = nullptr;
  const void* target = nullptr;
  const void* weight = nullptr;  // in the accumulation type
  std::optional<Tensor> widened;
  int64_t stats_rows;
};

// In the place of a gradient that is not needed.
Tensor nothing_like(const Tensor& t) {
  const int64_t size = 0, stride = 1;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, &size, &stride, (int32_t)t.scalar_type(), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Elements from one row of (rows, classes) to the next.
int64_t matrix_stride(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), name, " is not on the CPU");
  STD_TORCH_CHECK(t.dim() == 2, name, " has shape ", shape(t), ", expected 2 dimensions");
  STD_TORCH_CHECK(
      t.size(1) <= 1 || t.stride(1) == 1, name, " has stride ", t.stride(1), " in its last dimension, expected 1");
  return t.stride(0);
}

Loss check_loss(
    const Tensor& z, const Tensor& target, const std::optional<Tensor>& weight, int64_t ignore_index, double smoothing) {
  Loss l{};
  l.dtype = dtype_of(z, "z");
  l.acc = accumulation(l.dtype);
  l.target_dtype = l.dtype;
  l.z_stride = matrix_stride(z, "z");
  l.rows = z.size(0);
  l.classes = z.size(1);
  STD_TORCH_CHECK(l.classes >= 1, "z has shape ", shape(z), ", expected at least one class");
  l.z = data_of(z, "z");
  STD_TORCH_CHECK(target.is_cpu(), "target is not on the CPU, z is");
  if (target.scalar_type() == ScalarType::Long) {
    STD_TORCH_CHECK(
        target.dim() == 1 && target.size(0) == l.rows && target.is_contiguous(), "target has shape ", shape(target),
        ", expected (", l.rows, ",), contiguous, for z of shape ", shape(z));
    l.index = (const int64_t*)data_of(target, "target");
    for (int64_t i = 0; i < l.rows; i++) {
      const int64_t t = l.index[i];
      STD_TORCH_CHECK((t >= 0 && t < l.classes) || t == ignore_index, "target ", t, " is out of range for ", l.classes, " classes");
    }
  } else {
    l.target_dtype = dtype_of(target, "target");
    STD_TORCH_CHECK(
        param_dtype_fits(l.target_dtype, l.dtype), "target has dtype ", dtype_name(l.target_dtype), ", z has ", dtype_name(l.dtype));
    l.target_stride = matrix_stride(target, "target") * size_of(l.target_dtype);
    STD_TORCH_CHECK(
        target.size(0) == l.rows && target.size(1) == l.classes, "target has shape ", shape(target), ", z has ", shape(z));
    l.target = data_of(target, "target");
  }
  if (weight) {
    STD_TORCH_CHECK(weight->is_cpu(), "weight is not on the CPU, z is");
    const Dtype d = dtype_of(*weight, "weight");
    STD_TORCH_CHECK(param_dtype_fits(d, l.dtype), "weight has dtype ", dtype_name(d), ", z has ", dtype_name(l.dtype));
    STD_TORCH_CHECK(
        weight->dim() == 1 && weight->size(0) == l.classes && weight->is_contiguous(), "weight has shape ", shape(*weight),
        ", expected (", l.classes, ",), contiguous");
    l.weight = data_of(*weight, "weight");
    if (d != l.acc) {
      l.widened = empty({l.classes}, l.acc);
      kernels().widen(d, l.weight, l.widened->mutable_data_ptr(), l.classes);
      l.weight = l.widened->const_data_ptr();
    }
  }
  l.stats_rows = l.index && smoothing == 0 ? 3 : 4;
  return l;
}

// Where a gradient of each row lies, of any stride.
const void* check_grad(const Tensor& grad, const Loss& l, const char* name, int64_t& stride) {
  STD_TORCH_CHECK(grad.is_cpu(), name, " is not on the CPU, z is");
  STD_TORCH_CHECK(
      grad.scalar_type() == scalar_type(l.acc), name, " has dtype ", torch::headeronly::toString(grad.scalar_type()), ", expected ",
      dtype_name(l.acc));
  STD_TORCH_CHECK(grad.dim() == 1 && grad.size(0) == l.rows, name, " has shape ", shape(grad), ", expected (", l.rows, ",)");
  stride = grad.stride(0);
  return data_of(grad, name);
}

std::tuple<Tensor, Tensor> ticks_forward(
    const Tensor& z, const Tensor& target, const std::optional<Tensor>& weight, int64_t ignore_index, double smoothing, double ce,
    double ticks, double softcap) {
  const Loss l = check_loss(z, target, weight, ignore_index, smoothing);
  Tensor loss = empty({l.rows}, l.acc), stats = empty({l.stats_rows, l.rows}, l.acc);
  TicksForward a{};
  a.z = l.z;
  a.index = l.index;
  a.target = l.target;
  a.weight = l.weight;
  a.loss = loss.mutable_data_ptr();
  a.stats = stats.mutable_data_ptr();
  a.classes = l.classes;
  a.rows = l.rows;
  a.z_stride = l.z_stride;
  a.target_stride = l.target_stride;
  a.ignore_index = ignore_index;
  a.smoothing = smoothing;
  a.ce = ce;
  a.ticks = ticks;
  a.softcap = softcap;
  const Kernels& k = kernels();
  parallel(l.rows, l.classes, [&](int64_t begin, int64_t end) { k.ticks_forward(l.dtype, l.target_dtype, a, begin, end); });
  return {std::move(loss), std::move(stats)};
}

// With `in_place`, dz is written over z, and no tensor for it comes back.
std::tuple<Tensor, Tensor> backward(
    const Tensor& grad, const std::optional<Tensor>& grad_lse, const Tensor& z, const Tensor& target, const Tensor& stats,
    const std::optional<Tensor>& weight, int64_t ignore_index, double smoothing, double ce, double ticks, double softcap, bool need_dz,
    bool need_dtarget, bool in_place) {
  const Loss l = check_loss(z, target, weight, ignore_index, smoothing);
  TicksBackward a{};
  a.grad = check_grad(grad, l, "grad", a.grad_stride);
  if (grad_lse) a.grad_lse = check_grad(*grad_lse, l, "grad_lse", a.grad_lse_stride);
  STD_TORCH_CHECK(stats.is_cpu() && stats.is_contiguous(), "stats is not a contiguous CPU tensor");
  STD_TORCH_CHECK(
      stats.scalar_type() == scalar_type(l.acc), "stats has dtype ", torch::headeronly::toString(stats.scalar_type()), ", expected ",
      dtype_name(l.acc));
  STD_TORCH_CHECK(
      stats.dim() == 2 && stats.size(0) == l.stats_rows && stats.size(1) == l.rows, "stats has shape ", shape(stats), ", expected (",
      l.stats_rows, ", ", l.rows, ")");
  STD_TORCH_CHECK(
      !in_place || l.rows <= 1 || l.z_stride >= l.classes, "z's rows lie ", l.z_stride, " elements apart, expected at least ", l.classes,
      ": the gradient cannot be written over rows that overlap");
  need_dtarget = need_dtarget && l.target;
  Tensor dz = need_dz && !in_place ? empty({l.rows, l.classes}, l.dtype) : nothing_like(z);
  Tensor dtarget = need_dtarget ? empty({l.rows, l.classes}, l.target_dtype) : nothing_like(target);
  if (!need_dz && !need_dtarget) return {std::move(dz), std::move(dtarget)};
  a.z = l.z;
  a.index = l.index;
  a.target = l.target;
  a.weight = l.weight;
  a.stats = data_of(stats, "stats");
  a.dz = !need_dz ? nullptr : in_place ? z.mutable_data_ptr() : dz.mutable_data_ptr();
  a.dtarget = need_dtarget ? dtarget.mutable_data_ptr() : nullptr;
  a.classes = l.classes;
  a.rows = l.rows;
  a.z_stride = l.z_stride;
  a.dz_stride = in_place ? l.z_stride : l.classes;
  a.target_stride = l.target_stride;
  a.columns_per_chunk = std::min(l.classes, kColumnsPerChunk);
  a.chunks_per_row = ceil_div(l.classes, a.columns_per_chunk);
  a.ignore_index = ignore_index;
  a.smoothing = smoothing;
  a.ce = ce;
  a.ticks = ticks;
  a.softcap = softcap;
  const Kernels& k = kernels();
  parallel(l.rows * a.chunks_per_row, a.columns_per_chunk, [&](int64_t begin, int64_t end) {
    k.ticks_backward(l.dtype, l.target_dtype, a, begin, end);
  });
  return {std::move(dz), std::move(dtarget)};
}

std::tuple<Tensor, Tensor> ticks_backward(
    const Tensor& grad, const std::optional<Tensor>& grad_lse, const Tensor& z, const Tensor& target, const Tensor& stats,
    const std::optional<Tensor>& weight, int64_t ignore_index, double smoothing, double ce, double ticks, double softcap, bool need_dz,
    bool need_dtarget) {
  return backward(
      grad, grad_lse, z, target, stats, weight, ignore_index, smoothing, ce, ticks, softcap, need_dz, need_dtarget, false);
}

Tensor ticks_backward_inplace(
    const Tensor& grad, const std::optional<Tensor>& grad_lse, const Tensor& z, const Tensor& target, const Tensor& stats,
    const std::optional<Tensor>& weight, int64_t ignore_index, double smoothing, double ce, double ticks, double softcap,
    bool need_dtarget) {
  return std::get<1>(
      backward(grad, grad_lse, z, target, stats, weight, ignore_index, smoothing, ce, ticks, softcap, true, need_dtarget, true));
}

}  // namespace
}  // namespace fused_norm

STABLE_TORCH_LIBRARY_FRAGMENT(fused_norm, m) {
  m.def(
      "ticks_forward(Tensor z, Tensor target, Tensor? weight, int ignore_index, float smoothing, float ce, float ticks, float softcap)"
      " -> (Tensor loss, Tensor stats)");
  m.def(
      "ticks_backward(Tensor grad, Tensor? grad_lse, Tensor z, Tensor target, Tensor stats, Tensor? weight, int ignore_index,"
      " float smoothing, float ce, float ticks, float softcap, bool need_dz, bool need_dtarget) -> (Tensor dz, Tensor dtarget)");
  m.def(
      "ticks_backward_inplace(Tensor grad, Tensor? grad_lse, Tensor(a!) z, Tensor target, Tensor stats, Tensor? weight, int ignore_index,"
      " float smoothing, float ce, float ticks, float softcap, bool need_dtarget) -> Tensor dtarget");
}

STABLE_TORCH_LIBRARY_IMPL(fused_norm, CPU, m) {
  m.impl("ticks_forward", TORCH_BOX(&fused_norm::ticks_forward));
  m.impl("ticks_backward", TORCH_BOX(&fused_norm::ticks_backward));
  m.impl("ticks_backward_inplace", TORCH_BOX(&fused_norm::ticks_backward_inplace));
}
