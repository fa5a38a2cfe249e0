// Stands in for the CUDA toolkit's header of this name: what the kernels use of it.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half v) {
  const int exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
  const float size = exponent == 31 ? (fraction ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity())
                     : exponent     ? std::ldexp(1024.0f + fraction, exponent - 25)
                                    : std::ldexp(static_cast<float>(fraction), -24);
  return v.bits & 0x8000 ? -size : size;
}

inline __half __float2half_rn(float f) {
  if (f != f) return {0x7fff};
  const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  const float size = std::fabs(f);
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};  // the midpoint above 65504 rounds to infinity
  int exponent;
  std::frexp(size, &exponent);
  exponent = exponent < -13 ? -13 : exponent;  // below 2^-14: subnormal
  // In units of the last place; a carry into the next binade yields the right bits by itself. nearbyint: ties to even.
  const int units = static_cast<int>(std::nearbyint(std::ldexp(size, 11 - exponent)));
  return {static_cast<uint16_t>(sign | (size == 0 ? 0 : units + ((exponent + 13) << 10)))};
}
