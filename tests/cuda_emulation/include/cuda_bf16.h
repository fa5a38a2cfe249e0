// Stands in for the CUDA toolkit's header of this name: what the kernels use of it.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t word = static_cast<uint32_t>(v.bits) << 16;
  float f;
  memcpy(&f, &word, sizeof f);
  return f;
}

inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  uint32_t word;
  memcpy(&word, &f, sizeof word);
  if (f != f) return {0x7fff};
  const uint64_t rounded = uint64_t(word) + 0x7fff + (word >> 16 & 1);  // ties to even
  return {static_cast<uint16_t>(rounded >> 16)};
}
