// fused_norm._C_cuda: the CUDA implementations of the ops whose schemas csrc/ops.cpp defines (fused_norm._C), by libtorch's stable ABI.
// Shapes were validated in Python; here stand only the checks without which a kernel would touch memory that is not its own.
#include <Python.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "norm.h"

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

fused_norm::DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return fused_norm::DType::kFloat64;
    case ScalarType::Float: return fused_norm::DType::kFloat32;
    case ScalarType::BFloat16: return fused_norm::DType::kBFloat16;
    case ScalarType::Half: return fused_norm::DType::kFloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, "norm_forward: ", name, " has dtype ", torch::headeronly::toString(t.scalar_type()),
                  ", expected Double, Float, BFloat16 or Half");
}

// The stream that torch would launch on. Its getter lives in libtorch_cuda.so, which a CPU build of torch lacks: taken from the loaded library
// rather than linked, one build of this module imports everywhere.
void* current_stream(int32_t device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter getter = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr : reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(getter != nullptr, "norm_forward: x is a CUDA tensor, but libtorch_cuda.so is not loaded or has no "
                                     "aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(getter(device, &stream));
  return stream;
}

// Where t's elements lie. A tensor whose storage has been freed has a size and no data: reading it would fault, and for weight and bias a
// null pointer means that there is none.
const void* data_of(const Tensor& t, const char* name) {
  const void* const data = t.const_data_ptr();
  STD_TORCH_CHECK(data != nullptr, "norm_forward: ", name, " has shape ", text(t.sizes()), " and no storage: its memory has been freed");
  return data;
}

// Whether `p`, weight or bias, holds one set of parameters per group rather than a shared one.
bool check_param(const Tensor& p, const char* name, const Tensor& x, int64_t n, int64_t groups) {
  STD_TORCH_CHECK(p.is_cuda() && p.get_device_index() == x.get_device_index(), "norm_forward: ", name, " is on ",
                  p.is_cuda() ? "cuda:" + std::to_string(p.get_device_index()) : "another device", ", x is on cuda:", x.get_device_index());
  const auto dtype = dtype_of(p, name), x_dtype = dtype_of(x, "x");
  const bool low_precision = x_dtype == fused_norm::DType::kBFloat16 || x_dtype == fused_norm::DType::kFloat16;
  STD_TORCH_CHECK(dtype == x_dtype || (low_precision && dtype == fused_norm::DType::kFloat32), "norm_forward: ", name, " has dtype ",
                  torch::headeronly::toString(p.scalar_type()), ", x has ", torch::headeronly::toString(x.scalar_type()));
  STD_TORCH_CHECK(p.is_contiguous(), "norm_forward: ", name, " is not contiguous, its strides are ", text(p.strides()), " for shape ", text(p.sizes()));
  STD_TORCH_CHECK(p.numel() == n || p.numel() == groups * n, "norm_forward: ", name, " has ", p.numel(), " elements, expected n = ", n,
                  " or groups*n = ", groups * n);
  return p.numel() != n;
}

std::tuple<Tensor, Tensor> norm_forward(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, int64_t n,
                                        int64_t groups, double eps, bool rms, bool need_stats) {
  STD_TORCH_CHECK(x.is_cuda(), "norm_forward: the CUDA kernel was given an x that is not a CUDA tensor");
  const fused_norm::DType dtype = dtype_of(x, "x");
  const int64_t numel = x.numel();
  STD_TORCH_CHECK(n >= 1 && n <= kLongestRow, "norm_forward: n is ", n, ", expected 1 to ", kLongestRow);
  STD_TORCH_CHECK(numel >= 1 && numel % n == 0, "norm_forward: x has ", numel, " elements, which are not rows of ", n);
  const int64_t rows = numel / n;
  STD_TORCH_CHECK(groups >= 1 && rows % groups == 0, "norm_forward: x has ", rows, " rows, which do not divide into ", groups, " groups");
  int64_t x_row_stride = n;
  if (!x.is_contiguous()) {
    STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == n && (n == 1 || x.stride(1) == 1), "norm_forward: x has shape ", text(x.sizes()),
                    " and strides ", text(x.strides()), ", expected a contiguous x or (rows, ", n, ") with unit stride in the row");
    x_row_stride = x.stride(0);
  }
  fused_norm::DType param_dtype = dtype;
  bool weight_grouped = false, bias_grouped = false;
  if (weight) {
    weight_grouped = check_param(*weight, "weight", x, n, groups);
    param_dtype = dtype_of(*weight, "weight");
  }
  if (bias) {
    bias_grouped = check_param(*bias, "bias", x, n, groups);
    param_dtype = dtype_of(*bias, "bias");
  }
  if (weight && bias) {
    STD_TORCH_CHECK(weight->scalar_type() == bias->scalar_type(), "norm_forward: weight has dtype ",
                    torch::headeronly::toString(weight->scalar_type()), ", bias has ", torch::headeronly::toString(bias->scalar_type()));
    STD_TORCH_CHECK(weight_grouped == bias_grouped, "norm_forward: weight has ", weight->numel(), " elements, bias has ", bias->numel());
  }

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = torch::stable::new_empty(x, x.sizes());
  const std::vector<int64_t> stats_shape{!need_stats ? 0 : rms ? 1 : 2, rows};
  Tensor stats = torch::stable::new_empty(x, stats_shape, dtype == fused_norm::DType::kFloat64 ? ScalarType::Double : ScalarType::Float);

  fused_norm::NormForward args{};
  args.x = data_of(x, "x");
  args.weight = weight ? data_of(*weight, "weight") : nullptr;
  args.bias = bias ? data_of(*bias, "bias") : nullptr;
  args.y = y.mutable_data_ptr();
  args.stats = need_stats ? stats.mutable_data_ptr() : nullptr;
  args.rows = rows;
  args.n = n;
  args.x_row_stride = x_row_stride;
  args.groups = groups;
  args.params_grouped = weight_grouped || bias_grouped;
  args.dtype = dtype;
  args.param_dtype = param_dtype;
  args.eps = eps;
  args.rms = rms;
  const char* const error = fused_norm::launch_norm_forward(args, x.get_device_index(), current_stream(x.get_device_index()));
  STD_TORCH_CHECK(error == nullptr, "norm_forward: ", error, " (x ", text(x.sizes()), ", n = ", n, ", cuda:", x.get_device_index(), ")");
  return {y, stats};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_norm, CUDA, m) { m.impl("norm_forward", TORCH_BOX(&norm_forward)); }

// Importing the module is what registers the ops.
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C_cuda(void) { return PyModule_Create(&module); }
