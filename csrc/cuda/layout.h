// What the kernels, their launch tables and their host interfaces agree on. Plain C++.
#pragma once

namespace fused_norm {

enum class DType { kFloat64, kFloat32, kBFloat16, kFloat16 };

constexpr int size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// A row is cut into chunks of 16 bytes, the widest access a thread can make. Chunk c belongs to thread c % threads_per_row.
constexpr int kChunkBytes = 16;
constexpr int kWarp = 32;

}  // namespace fused_norm
