// What the CPU entry points of all operators share: dtypes, the checks' words, new tensors, torch's threads.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <string>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "cpu/kernels.h"
#include "ops.h"

namespace fused_norm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Work of fewer elements than this is done by the calling thread: waking another costs more.
constexpr int64_t kGrain = 32768;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline std::string shape(const Tensor& t) {
  std::string s = "(";
  for (int64_t i = 0; i < t.dim(); i++) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + (t.dim() == 1 ? ",)" : ")");
}

inline Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: STD_TORCH_CHECK(false, name, " has dtype ", torch::headeronly::toString(t.scalar_type()), ", expected Double, Float, BFloat16 or Half");
  }
}

inline ScalarType scalar_type(Dtype d) {
  switch (d) {
    case Dtype::f64: return ScalarType::Double;
    case Dtype::f32: return ScalarType::Float;
    case Dtype::bf16: return ScalarType::BFloat16;
    default: return ScalarType::Half;
  }
}

inline const char* dtype_name(Dtype d) { return torch::headeronly::toString(scalar_type(d)); }
inline Dtype accumulation(Dtype d) { return d == Dtype::f64 ? Dtype::f64 : Dtype::f32; }
inline int64_t size_of(Dtype d) { return d == Dtype::f64 ? 8 : d == Dtype::f32 ? 4 : 2; }
inline bool param_dtype_fits(Dtype param, Dtype x) { return param == x || (param == Dtype::f32 && x != Dtype::f64); }

// Where t's elements lie. A tensor whose storage has been freed (as FSDP does between uses) has a size and no data: reading it would
// fault, and for weight and bias a null pointer means that there is none.
inline const void* data_of(const Tensor& t, const char* name) {
  const void* const data = t.const_data_ptr();
  STD_TORCH_CHECK(data != nullptr || t.numel() == 0, name, " has shape ", shape(t), " and no storage: its memory has been freed");
  return data;
}

// Ask for huge pages for a large new tensor, before anything has touched it: a fresh 64 MB costs far more in page faults of 4 KB than in
// arithmetic. Only whole huge pages inside the tensor are named, so it never takes more memory than it would have.
// FUSED_NORM_HUGEPAGES=0 turns this off.
inline void advise_huge_pages(const Tensor& t, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kHugePage = 2 << 20;
  if (bytes < 2 * kHugePage) return;
  static const bool wanted = [] {
    const char* value = std::getenv("FUSED_NORM_HUGEPAGES");
    return !value || std::string(value) != "0";
  }();
  if (!wanted) return;
  const uintptr_t data = (uintptr_t)t.mutable_data_ptr();
  const uintptr_t first = (data + kHugePage - 1) / kHugePage * kHugePage, last = (data + bytes) / kHugePage * kHugePage;
  if (first < last) (void)madvise((void*)first, last - first, MADV_HUGEPAGE);  // advice: a refusal changes nothing
#endif
}

// Whether t, which is new, is best written past the caches. Not so memory that the system hands out first now: it comes zeroed, by way of them.
inline bool past_cache(const Tensor& t, int64_t bytes) {
  if (bytes < past_cache_bytes) return false;
#ifdef __linux__
  static const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
  unsigned char resident = 1;
  (void)mincore((void*)(((uintptr_t)t.mutable_data_ptr() + bytes / 2) / page * page), 1, &resident);
  return resident & 1;
#else
  return true;
#endif
}

inline Tensor empty_contiguous(const int64_t* sizes, int64_t dim, Dtype dtype) {
  int64_t inline_strides[8];
  std::vector<int64_t> more_strides;
  int64_t* strides = inline_strides;
  if (dim > 8) {
    more_strides.resize(dim);
    strides = more_strides.data();
  }
  int64_t numel = 1;
  for (int64_t i = dim; i-- > 0; numel *= sizes[i]) strides[i] = std::max<int64_t>(1, numel);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes, strides, (int32_t)scalar_type(dtype), aoti_torch_device_type_cpu(), 0, &handle));
  Tensor t(handle);
  advise_huge_pages(t, numel * size_of(dtype));
  return t;
}

inline Tensor empty(std::initializer_list<int64_t> sizes, Dtype dtype) {
  return empty_contiguous(sizes.begin(), (int64_t)sizes.size(), dtype);
}

inline Tensor empty_like(const Tensor& x, Dtype dtype) {
  const auto sizes = x.sizes();
  return empty_contiguous(sizes.data(), (int64_t)sizes.size(), dtype);
}

inline void run(int64_t count, int64_t elements_each, void (*body)(int64_t, int64_t, void*), void* context) {
  if (count == 0) return;
  if (count == 1 || count * elements_each <= kGrain) return body(0, count, context);
  const int64_t grain = std::max<int64_t>(1, kGrain / elements_each);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
}

// For rows of n elements that are too few to keep all threads busy, but wide: the way to share out each. Else null.
inline Share share_each(int64_t count, int64_t n) {
  return n >= 2 * kGrain && count < (int64_t)torch::stable::get_num_threads() ? &run : nullptr;
}

// torch's own pool over [0, count), or the calling thread alone where the work is small.
template <typename F>
inline void parallel(int64_t count, int64_t elements_each, const F& f) {
  run(count, elements_each, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<F*>(&f));
}

}  // namespace fused_norm
