// fused_norm._C_cuda: the CUDA implementations of the ops whose schemas csrc/ops.cpp and ops_ticks.cpp define (fused_norm._C), by libtorch's stable ABI.
// Shapes were validated in Python; here stand only the checks without which a kernel would touch memory that is not its own.
#include <Python.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <climits>
#include <cstdint>
#include <exception>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "device.h"
#include "norm.h"
#include "ticks.h"

// torch has it since 2.13, and declares it to none who want to run with 2.11.
extern "C" __attribute__((weak, visibility("default"))) const char* torch_exception_get_what_without_backtrace();

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Longer rows would overflow the kernels' 32-bit chunk index.
constexpr int64_t kLongestRow = int64_t(1) << 31;

// "(2, 3)"
std::string text(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::string s = "(";
  for (size_t i = 0; i < sizes.size(); ++i) s += (i == 0 ? "" : ", ") + std::to_string(sizes[i]);
  return s + (sizes.size() == 1 ? ",)" : ")");
}

// `op` is the operator whose argument `name` t is, for the message.
fused_norm::DType dtype_of(const Tensor& t, const char* op, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return fused_norm::DType::kFloat64;
    case ScalarType::Float: return fused_norm::DType::kFloat32;
    case ScalarType::BFloat16: return fused_norm::DType::kBFloat16;
    case ScalarType::Half: return fused_norm::DType::kFloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, op, ": ", name, " has dtype ", torch::headeronly::toString(t.scalar_type()),
                  ", expected Double, Float, BFloat16 or Half");
}

// The stream that torch would launch on. Its getter lives in libtorch_cuda.so, which a CPU build of torch lacks: taken from the loaded library
// rather than linked, one build of this module imports everywhere.
void* current_stream(int32_t device, const char* op) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter getter = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr : reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(getter != nullptr, op, ": given a CUDA tensor, but libtorch_cuda.so is not loaded or has no "
                                         "aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(getter(device, &stream));
  return stream;
}

// Where t's elements lie. A tensor whose storage has been freed has a size and no data: reading it would fault, and for weight and bias a
// null pointer means that there is none.
const void* data_of(const Tensor& t, const char* op, const char* name) {
  const void* const data = t.const_data_ptr();
  STD_TORCH_CHECK(data != nullptr, op, ": ", name, " has shape ", text(t.sizes()), " and no storage: its memory has been freed");
  return data;
}

bool is_low_precision(fused_norm::DType dtype) { return dtype == fused_norm::DType::kBFloat16 || dtype == fused_norm::DType::kFloat16; }

// t is on the device of `other`.
void check_device(const Tensor& t, const char* op, const char* name, const Tensor& other, const char* other_name) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == other.get_device_index(), op, ": ", name, " is on ",
                  t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "another device", ", ", other_name, " is on cuda:",
                  other.get_device_index());
}

// A new tensor beside `like`, of its dtype unless another is named. What the stable ABI throws where torch cannot make one says nothing of the
// reason, which is mostly that there is no memory left: where torch tells it, it is in the message, and csrc/python.cpp and native.py know it.
Tensor new_empty(const char* op, const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, std::optional<ScalarType> dtype = {}) {
  try {
    return torch::stable::new_empty(like, sizes, dtype);
  } catch (const std::exception& error) {
    const bool told = torch_exception_get_what_without_backtrace != nullptr;
    STD_TORCH_CHECK(false, op, ": no tensor of shape ", text(sizes), ": ", told ? torch_exception_get_what_without_backtrace() : error.what());
  }
}

ScalarType accumulation(const Tensor& x) { return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// ---- Norms. `op` is the operator's name in messages. ----

struct NormRows {
  fused_norm::DType dtype;
  int64_t count, n, groups, stride;
};

// Elements from one row of n to the next.
int64_t norm_row_stride(const Tensor& t, const char* op, const char* name, int64_t n) {
  if (t.is_contiguous()) return n;
  STD_TORCH_CHECK(t.dim() == 2 && t.size(1) == n && (n == 1 || t.stride(1) == 1), op, ": ", name, " has shape ", text(t.sizes()),
                  " and strides ", text(t.strides()), ", expected a contiguous ", name, " or (rows, ", n, ") with unit stride in the row");
  return t.stride(0);
}

NormRows check_rows(const char* op, const Tensor& x, int64_t n, int64_t groups) {
  STD_TORCH_CHECK(x.is_cuda(), op, ": the CUDA kernel was given an x that is not a CUDA tensor");
  const fused_norm::DType dtype = dtype_of(x, op, "x");
  const int64_t numel = x.numel();
  STD_TORCH_CHECK(n >= 1 && n <= kLongestRow, op, ": n is ", n, ", expected 1 to ", kLongestRow);
  STD_TORCH_CHECK(numel >= 1 && numel % n == 0, op, ": x has ", numel, " elements, which are not rows of ", n);
  const int64_t rows = numel / n;
  STD_TORCH_CHECK(groups >= 1 && rows % groups == 0, op, ": x has ", rows, " rows, which do not divide into ", groups, " groups");
  return {dtype, rows, n, groups, norm_row_stride(x, op, "x", n)};
}

// Of x's dtype or, beside bf16 and fp16, fp32.
bool is_param_dtype(ScalarType dtype, const Tensor& x) {
  return dtype == x.scalar_type() || (dtype == ScalarType::Float && (x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half));
}

// Whether `p`, weight or bias, holds one set of parameters per group rather than a shared one.
bool check_param(const char* op, const Tensor& p, const char* name, const Tensor& x, const NormRows& rows) {
  check_device(p, op, name, x, "x");
  STD_TORCH_CHECK(is_param_dtype(p.scalar_type(), x), op, ": ", name, " has dtype ", torch::headeronly::toString(p.scalar_type()), ", x has ",
                  torch::headeronly::toString(x.scalar_type()));
  STD_TORCH_CHECK(p.is_contiguous(), op, ": ", name, " is not contiguous, its strides are ", text(p.strides()), " for shape ", text(p.sizes()));
  STD_TORCH_CHECK(p.numel() == rows.n || p.numel() == rows.groups * rows.n, op, ": ", name, " has ", p.numel(), " elements, expected n = ", rows.n,
                  " or groups*n = ", rows.groups * rows.n);
  return p.numel() != rows.n;
}

std::tuple<Tensor, Tensor> norm_forward(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, int64_t n,
                                        int64_t groups, double eps, bool rms, bool need_stats, bool cast) {
  const char* const op = "norm_forward";
  const NormRows rows = check_rows(op, x, n, groups);
  fused_norm::DType param_dtype = rows.dtype;
  fused_norm::NormForward args{};
  if (weight) {
    args.weight_grouped = check_param(op, *weight, "weight", x, rows);
    param_dtype = dtype_of(*weight, op, "weight");
  }
  if (bias) {
    args.bias_grouped = check_param(op, *bias, "bias", x, rows);
    param_dtype = dtype_of(*bias, op, "bias");
  }
  if (weight && bias) {
    STD_TORCH_CHECK(weight->scalar_type() == bias->scalar_type(), "norm_forward: weight has dtype ",
                    torch::headeronly::toString(weight->scalar_type()), ", bias has ", torch::headeronly::toString(bias->scalar_type()));
  }

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = new_empty(op, x, x.sizes());
  const std::vector<int64_t> stats_shape{!need_stats ? 0 : rms ? 1 : 2, rows.count};
  Tensor stats = new_empty(op, x, stats_shape, accumulation(x));

  args.x = data_of(x, op, "x");
  args.weight = weight ? data_of(*weight, op, "weight") : nullptr;
  args.bias = bias ? data_of(*bias, op, "bias") : nullptr;
  args.y = y.mutable_data_ptr();
  args.stats = need_stats ? stats.mutable_data_ptr() : nullptr;
  args.rows = rows.count;
  args.n = n;
  args.x_row_stride = rows.stride;
  args.groups = groups;
  args.dtype = rows.dtype;
  args.param_dtype = param_dtype;
  args.eps = eps;
  args.rms = rms;
  args.cast = cast;
  const char* const error = fused_norm::launch_norm_forward(args, x.get_device_index(), current_stream(x.get_device_index(), op));
  STD_TORCH_CHECK(error == nullptr, op, ": ", error, " (x ", text(x.sizes()), ", n = ", n, ", cuda:", x.get_device_index(), ")");
  return {y, stats};
}

// dx, dw and db are (0,) where they are not needed; stats are not looked at where neither dx nor dw is.
std::tuple<Tensor, Tensor, Tensor> norm_backward(const Tensor& dy, const Tensor& x, const Tensor& stats, const std::optional<Tensor>& weight,
                                                 int64_t n, int64_t groups, bool rms, ScalarType param_dtype, bool need_dx, bool need_dw,
                                                 bool need_db) {
  const char* const op = "norm_backward";
  const NormRows rows = check_rows(op, x, n, groups);
  fused_norm::NormBackward args{};
  check_device(dy, op, "dy", x, "x");
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), op, ": dy has dtype ", torch::headeronly::toString(dy.scalar_type()), ", x has ",
                  torch::headeronly::toString(x.scalar_type()));
  STD_TORCH_CHECK(dy.numel() == x.numel(), op, ": dy has shape ", text(dy.sizes()), ", x has ", text(x.sizes()));
  args.dy_row_stride = norm_row_stride(dy, op, "dy", n);
  args.dy = data_of(dy, op, "dy");
  args.x = data_of(x, op, "x");
  STD_TORCH_CHECK(is_param_dtype(param_dtype, x), op, ": param_dtype is ", torch::headeronly::toString(param_dtype), ", x has ",
                  torch::headeronly::toString(x.scalar_type()));
  if (need_dx || need_dw) {
    const int64_t kept = rms ? 1 : 2;
    check_device(stats, op, "stats", x, "x");
    STD_TORCH_CHECK(stats.scalar_type() == accumulation(x), op, ": stats has dtype ", torch::headeronly::toString(stats.scalar_type()),
                    ", expected ", torch::headeronly::toString(accumulation(x)));
    STD_TORCH_CHECK(stats.numel() == kept * rows.count && stats.is_contiguous(), op, ": stats has shape ", text(stats.sizes()), " and strides ",
                    text(stats.strides()), ", expected (", kept, ", ", rows.count, "), contiguous");
    args.stats = data_of(stats, op, "stats");
  }
  if (weight) {
    args.weight_grouped = check_param(op, *weight, "weight", x, rows);
    STD_TORCH_CHECK(weight->scalar_type() == param_dtype, op, ": weight has dtype ", torch::headeronly::toString(weight->scalar_type()),
                    ", param_dtype is ", torch::headeronly::toString(param_dtype));
    args.weight = data_of(*weight, op, "weight");
  }

  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const std::vector<int64_t> none{0}, sums{groups, n};
  Tensor dx = need_dx ? new_empty(op, x, x.sizes()) : new_empty(op, x, none);
  Tensor dw = new_empty(op, x, need_dw ? sums : none, param_dtype), db = new_empty(op, x, need_db ? sums : none, param_dtype);
  args.dx = need_dx ? dx.mutable_data_ptr() : nullptr;
  args.dw = need_dw ? dw.mutable_data_ptr() : nullptr;
  args.db = need_db ? db.mutable_data_ptr() : nullptr;
  if (!need_dx && !need_dw && !need_db) return {dx, dw, db};
  args.rows = rows.count;
  args.n = n;
  args.x_row_stride = rows.stride;
  args.groups = groups;
  args.dtype = rows.dtype;
  args.param_dtype = param_dtype == x.scalar_type() ? rows.dtype : fused_norm::DType::kFloat32;
  args.rms = rms;
  // Freed when this returns, as every tensor: its memory goes to what this stream is given after the kernels.
  std::optional<Tensor> scratch;
  if (const size_t bytes = fused_norm::norm_backward_scratch_bytes(args, device)) {
    const std::vector<int64_t> shape{static_cast<int64_t>(bytes)};
    scratch = new_empty(op, x, shape, ScalarType::Byte);
    args.scratch = scratch->mutable_data_ptr();
  }
  const char* const error = fused_norm::launch_norm_backward(args, device, current_stream(device, op));
  STD_TORCH_CHECK(error == nullptr, op, ": ", error, " (x ", text(x.sizes()), ", n = ", n, ", cuda:", device, ")");
  return {dx, dw, db};
}

// ---- The ticks loss. `op` is the operator's name in messages. ----

// t is on z's device and of dtype `expected`, or of either of two.
void check_tensor(const Tensor& t, const char* op, const char* name, const Tensor& z, ScalarType expected, std::optional<ScalarType> or_this = {}) {
  check_device(t, op, name, z, "z");
  STD_TORCH_CHECK(t.scalar_type() == expected || (or_this && t.scalar_type() == *or_this), op, ": ", name, " has dtype ",
                  torch::headeronly::toString(t.scalar_type()), ", expected ", torch::headeronly::toString(expected),
                  or_this && *or_this != expected ? std::string(" or ") + torch::headeronly::toString(*or_this) : std::string());
}

// Elements from one row of t, (rows, classes), to the next.
int64_t row_stride(const Tensor& t, const char* op, const char* name, int64_t rows, int64_t classes) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == classes, op, ": ", name, " has shape ", text(t.sizes()),
                  ", expected (", rows, ", ", classes, ")");
  STD_TORCH_CHECK(classes == 1 || t.stride(1) == 1, op, ": ", name, " has strides ", text(t.strides()), ", expected unit stride in the row");
  return t.stride(0);
}

// What forward and backward have in common.
fused_norm::Ticks check_ticks(const char* op, const Tensor& z, const Tensor& target, const std::optional<Tensor>& weight, int64_t ignore_index,
                              double smoothing, double ce, double ticks, double softcap) {
  STD_TORCH_CHECK(z.is_cuda(), op, ": the CUDA kernel was given a z that is not a CUDA tensor");
  STD_TORCH_CHECK(z.dim() == 2 && z.numel() >= 1, op, ": z has shape ", text(z.sizes()), ", expected (rows, classes), at least 1 of each");
  fused_norm::Ticks a{};
  a.dtype = a.target_dtype = a.weight_dtype = dtype_of(z, op, "z");
  a.rows = z.size(0);
  a.classes = z.size(1);
  STD_TORCH_CHECK(a.classes <= kLongestRow, op, ": z has ", a.classes, " classes, expected at most ", kLongestRow);
  a.z = data_of(z, op, "z");
  a.z_row_stride = row_stride(z, op, "z", a.rows, a.classes);
  a.ignore_index = ignore_index;
  a.smoothing = smoothing;
  a.ce = ce;
  a.ticks = ticks;
  a.softcap = softcap;
  const std::optional<ScalarType> or_fp32 = is_low_precision(a.dtype) ? std::optional(ScalarType::Float) : std::nullopt;
  a.soft = target.scalar_type() != ScalarType::Long;
  if (a.soft) {
    check_tensor(target, op, "target", z, z.scalar_type(), or_fp32);
    a.target_dtype = dtype_of(target, op, "target");
    a.target_row_stride = row_stride(target, op, "target", a.rows, a.classes);
  } else {
    check_tensor(target, op, "target", z, ScalarType::Long);
    STD_TORCH_CHECK(target.dim() == 1 && target.size(0) == a.rows && target.is_contiguous(), op, ": target has shape ", text(target.sizes()),
                    " and strides ", text(target.strides()), ", expected (", a.rows, ",), contiguous");
  }
  a.target = data_of(target, op, "target");
  if (weight) {
    check_tensor(*weight, op, "weight", z, z.scalar_type(), or_fp32);
    STD_TORCH_CHECK(weight->dim() == 1 && weight->size(0) == a.classes && weight->is_contiguous(), op, ": weight has shape ", text(weight->sizes()),
                    " and strides ", text(weight->strides()), ", expected (", a.classes, ",), contiguous");
    a.weight_dtype = dtype_of(*weight, op, "weight");
    a.weight = data_of(*weight, op, "weight");
  }
  return a;
}

std::tuple<Tensor, Tensor> ticks_forward(const Tensor& z, const Tensor& target, const std::optional<Tensor>& weight, int64_t ignore_index,
                                         double smoothing, double ce, double ticks, double softcap) {
  const char* const op = "ticks_forward";
  fused_norm::TicksForward args{};
  args.ticks = check_ticks(op, z, target, weight, ignore_index, smoothing, ce, ticks, softcap);
  const int32_t device = z.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const std::vector<int64_t> loss_shape{args.ticks.rows}, stats_shape{fused_norm::is_plain(args.ticks) ? 3 : 4, args.ticks.rows};
  Tensor loss = new_empty(op, z, loss_shape, accumulation(z)), stats = new_empty(op, z, stats_shape, accumulation(z));
  args.loss = loss.mutable_data_ptr();
  args.stats = stats.mutable_data_ptr();
  const char* const error = fused_norm::launch_ticks_forward(args, device, current_stream(device, op));
  STD_TORCH_CHECK(error == nullptr, op, ": ", error, " (z ", text(z.sizes()), ", cuda:", device, ")");
  return {loss, stats};
}

// `in_place`: dz is written over z. dz and dtarget are (0,) where they are not needed, and dz where it is z.
std::tuple<Tensor, Tensor> backward_of_ticks(const char* op, const Tensor& grad, const std::optional<Tensor>& grad_lse, const Tensor& z,
                                             const Tensor& target, const Tensor& stats, const std::optional<Tensor>& weight,
                                             int64_t ignore_index, double smoothing, double ce, double ticks, double softcap, bool need_dz,
                                             bool need_dtarget, bool in_place) {
  fused_norm::TicksBackward args{};
  args.ticks = check_ticks(op, z, target, weight, ignore_index, smoothing, ce, ticks, softcap);
  const int64_t rows = args.ticks.rows, classes = args.ticks.classes, kept = fused_norm::is_plain(args.ticks) ? 3 : 4;
  const ScalarType acc = accumulation(z);
  check_tensor(stats, op, "stats", z, acc);
  STD_TORCH_CHECK(stats.dim() == 2 && stats.size(0) == kept && stats.size(1) == rows && stats.is_contiguous(), op, ": stats has shape ",
                  text(stats.sizes()), " and strides ", text(stats.strides()), ", expected (", kept, ", ", rows, "), contiguous");
  args.stats = data_of(stats, op, "stats");
  const auto check_grad = [&](const Tensor& g, const char* name) {
    check_tensor(g, op, name, z, acc);
    STD_TORCH_CHECK(g.dim() == 1 && g.size(0) == rows, op, ": ", name, " has shape ", text(g.sizes()), ", expected (", rows, ",)");
    return g.stride(0);
  };
  args.grad_stride = check_grad(grad, "grad");
  args.grad = data_of(grad, op, "grad");
  if (grad_lse) {
    args.grad_lse_stride = check_grad(*grad_lse, "grad_lse");
    args.grad_lse = data_of(*grad_lse, op, "grad_lse");
  }
  STD_TORCH_CHECK(!need_dtarget || args.ticks.soft, op, ": need_dtarget is true, and target has dtype Long, which has no gradient");
  STD_TORCH_CHECK(!in_place || rows == 1 || args.ticks.z_row_stride >= classes, op, ": z has strides ", text(z.strides()), " for shape ",
                  text(z.sizes()), ": its rows overlap, and cannot be written over");

  const int32_t device = z.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const std::vector<int64_t> none{0}, all{rows, classes};
  Tensor dz = new_empty(op, z, need_dz && !in_place ? all : none);
  Tensor dtarget = new_empty(op, z, need_dtarget ? all : none, args.ticks.soft ? target.scalar_type() : z.scalar_type());
  args.dz = in_place ? z.mutable_data_ptr() : need_dz ? dz.mutable_data_ptr() : nullptr;
  args.dz_row_stride = in_place ? args.ticks.z_row_stride : classes;
  args.dtarget = need_dtarget ? dtarget.mutable_data_ptr() : nullptr;
  if (args.dz != nullptr || args.dtarget != nullptr) {
    const char* const error = fused_norm::launch_ticks_backward(args, device, current_stream(device, op));
    STD_TORCH_CHECK(error == nullptr, op, ": ", error, " (z ", text(z.sizes()), ", cuda:", device, ")");
  }
  return {dz, dtarget};
}

std::tuple<Tensor, Tensor> ticks_backward(const Tensor& grad, const std::optional<Tensor>& grad_lse, const Tensor& z, const Tensor& target,
                                          const Tensor& stats, const std::optional<Tensor>& weight, int64_t ignore_index, double smoothing,
                                          double ce, double ticks, double softcap, bool need_dz, bool need_dtarget) {
  return backward_of_ticks("ticks_backward", grad, grad_lse, z, target, stats, weight, ignore_index, smoothing, ce, ticks, softcap, need_dz,
                           need_dtarget, false);
}

Tensor ticks_backward_inplace(const Tensor& grad, const std::optional<Tensor>& grad_lse, const Tensor& z, const Tensor& target,
                              const Tensor& stats, const std::optional<Tensor>& weight, int64_t ignore_index, double smoothing, double ce,
                              double ticks, double softcap, bool need_dtarget) {
  return std::get<1>(backward_of_ticks("ticks_backward_inplace", grad, grad_lse, z, target, stats, weight, ignore_index, smoothing, ce, ticks,
                                       softcap, true, need_dtarget, true));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_norm, CUDA, m) {
  m.impl("norm_forward", TORCH_BOX(&norm_forward));
  m.impl("norm_backward", TORCH_BOX(&norm_backward));
  m.impl("ticks_forward", TORCH_BOX(&ticks_forward));
  m.impl("ticks_backward", TORCH_BOX(&ticks_backward));
  m.impl("ticks_backward_inplace", TORCH_BOX(&ticks_backward_inplace));
}

static PyObject* unavailable(PyObject*, PyObject* device) {
  const long index = PyLong_AsLong(device);
  if (index == -1 && PyErr_Occurred()) return nullptr;
  // No device has an index outside int's range.
  const int narrow = index < 0 || index > INT_MAX ? -1 : static_cast<int>(index);
  std::string reason;
  Py_BEGIN_ALLOW_THREADS  // the first question to a device makes its context, which takes a while
  reason = fused_norm::cuda_unavailable(narrow);
  Py_END_ALLOW_THREADS
  return PyUnicode_FromStringAndSize(reason.data(), static_cast<Py_ssize_t>(reason.size()));
}

// Importing the module is what registers the ops; what it holds itself is asked of no tensor.
static PyMethodDef methods[] = {
    {"unavailable", unavailable, METH_O, "unavailable(device): the reason why the kernels cannot run on the device of that index, or ''."},
    {nullptr, nullptr, 0, nullptr},
};

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C_cuda(void) { return PyModule_Create(&module); }
