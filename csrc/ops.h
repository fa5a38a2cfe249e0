// The operators' CPU entry points (csrc/ops.cpp), for callers inside the extension that go past torch's dispatcher. The schemas in ops.cpp
// say what they take; an argument that does not fit is an exception.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace fused_norm {

// From how many bytes on a result is written past the caches. Below, what reads it next finds it there more cheaply than it was written; measured
// with the readers that follow a norm. For tests it can be set.
inline int64_t past_cache_bytes = (int64_t)8 << 20;

// No stats unless they are needed: to allocate even an empty tensor is a tenth of a small call.
std::tuple<torch::stable::Tensor, std::optional<torch::stable::Tensor>> norm_forward(
    const torch::stable::Tensor& x, const std::optional<torch::stable::Tensor>& weight, const std::optional<torch::stable::Tensor>& bias,
    int64_t n, int64_t groups, double eps, bool rms, bool need_stats, bool cast);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> norm_backward(
    const torch::stable::Tensor& dy, const torch::stable::Tensor& x, const torch::stable::Tensor& stats,
    const std::optional<torch::stable::Tensor>& weight, int64_t n, int64_t groups, bool rms, torch::headeronly::ScalarType param_dtype,
    bool need_dx, bool need_dw, bool need_db);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> norm_double_backward(
    const std::optional<torch::stable::Tensor>& ddx, const std::optional<torch::stable::Tensor>& ddw,
    const std::optional<torch::stable::Tensor>& ddb, const std::optional<torch::stable::Tensor>& dy, const torch::stable::Tensor& x,
    const torch::stable::Tensor& stats, const std::optional<torch::stable::Tensor>& weight, int64_t n, int64_t groups, bool rms,
    torch::headeronly::ScalarType param_dtype, bool need_ddy, bool need_dx, bool need_dw);

}  // namespace fused_norm
