// A vector register of floats or doubles, as wide as the instruction set that this file is compiled for, and the loads and stores that
// convert bf16 and fp16 on their way in and out of it.
//
// Arithmetic is that of the compilers' vector extension (GCC, Clang): + - * on whole registers, and comparisons that give masks. What it
// cannot say (fused multiply-add, conversions, sums across lanes) has an intrinsic per instruction set and a portable form.
//
// Everything here has internal linkage: three copies of this code, compiled with different flags, live in one library, and the
// linker must never take one for another. For that reason no function of the standard library is used either.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(CPU_CAPABILITY_AVX512)
#define FUSED_NORM_VEC_BYTES 64
#elif defined(CPU_CAPABILITY_AVX2)
#define FUSED_NORM_VEC_BYTES 32
#else
#define FUSED_NORM_VEC_BYTES 16
#endif

#define FUSED_NORM_INLINE inline __attribute__((always_inline))
#define FUSED_NORM_NOINLINE __attribute__((noinline))

namespace fused_norm {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

typedef float VecF __attribute__((vector_size(FUSED_NORM_VEC_BYTES)));
typedef double VecD __attribute__((vector_size(FUSED_NORM_VEC_BYTES)));
typedef int32_t MaskF __attribute__((vector_size(FUSED_NORM_VEC_BYTES)));
typedef int64_t MaskD __attribute__((vector_size(FUSED_NORM_VEC_BYTES)));
typedef uint32_t VecU __attribute__((vector_size(FUSED_NORM_VEC_BYTES)));

// The type that sums are taken in, and its registers.
template <typename T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <typename T>
using Acc = typename AccOf<T>::type;

template <typename A>
struct VecOf;
template <>
struct VecOf<float> {
  using type = VecF;
  using mask = MaskF;
  using lane = int32_t;
};
template <>
struct VecOf<double> {
  using type = VecD;
  using mask = MaskD;
  using lane = int64_t;
};
template <typename A>
using Vec = typename VecOf<A>::type;
template <typename A>
using Mask = typename VecOf<A>::mask;

template <typename A>
constexpr int kLanes = FUSED_NORM_VEC_BYTES / sizeof(A);

template <typename A>
FUSED_NORM_INLINE Vec<A> splat(A a) {
  return a - Vec<A>{};  // a - 0 is a, for -0.0 and NaN too
}

// a * b + c, rounded once where the instruction set can.
FUSED_NORM_INLINE VecF fma(VecF a, VecF b, VecF c) {
#if defined(CPU_CAPABILITY_AVX512)
  return (VecF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(CPU_CAPABILITY_AVX2)
  return (VecF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
FUSED_NORM_INLINE VecD fma(VecD a, VecD b, VecD c) {
#if defined(CPU_CAPABILITY_AVX512)
  return (VecD)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(CPU_CAPABILITY_AVX2)
  return (VecD)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// c - a * b
FUSED_NORM_INLINE VecF fnma(VecF a, VecF b, VecF c) {
#if defined(CPU_CAPABILITY_AVX512)
  return (VecF)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(CPU_CAPABILITY_AVX2)
  return (VecF)_mm256_fnmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return c - a * b;
#endif
}
FUSED_NORM_INLINE VecD fnma(VecD a, VecD b, VecD c) {
#if defined(CPU_CAPABILITY_AVX512)
  return (VecD)_mm512_fnmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(CPU_CAPABILITY_AVX2)
  return (VecD)_mm256_fnmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return c - a * b;
#endif
}

// The sum of the lanes, by halves: lanes l and l + L/2 are added, then l and l + L/4, and so on.
#if defined(__SSE2__)
FUSED_NORM_INLINE float sum_lanes128(__m128 v) {
  v = _mm_add_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps(v, v, 1)));
}
FUSED_NORM_INLINE double sum_lanes128(__m128d v) { return _mm_cvtsd_f64(_mm_add_sd(v, _mm_unpackhi_pd(v, v))); }
#endif
FUSED_NORM_INLINE float sum_lanes(VecF v) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
  return sum_lanes128(_mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
#elif defined(CPU_CAPABILITY_AVX2)
  return sum_lanes128(_mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1)));
#elif defined(__SSE2__)
  return sum_lanes128((__m128)v);
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}
FUSED_NORM_INLINE double sum_lanes(VecD v) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m256d h = _mm256_add_pd(_mm512_castpd512_pd256((__m512d)v), _mm512_extractf64x4_pd((__m512d)v, 1));
  return sum_lanes128(_mm_add_pd(_mm256_castpd256_pd128(h), _mm256_extractf128_pd(h, 1)));
#elif defined(CPU_CAPABILITY_AVX2)
  return sum_lanes128(_mm_add_pd(_mm256_castpd256_pd128((__m256d)v), _mm256_extractf128_pd((__m256d)v, 1)));
#else
  return v[0] + v[1];
#endif
}

// ---- loads: kLanes<Acc<T>> elements from an address of any alignment ----

FUSED_NORM_INLINE VecF load(const float* p) {
  VecF v;
  memcpy(&v, p, sizeof v);
  return v;
}
FUSED_NORM_INLINE VecD load(const double* p) {
  VecD v;
  memcpy(&v, p, sizeof v);
  return v;
}

// Sixteen-bit elements, each widened to 32 bits by zeros.
FUSED_NORM_INLINE VecU load_u16(const void* p) {
#if defined(CPU_CAPABILITY_AVX512)
  return (VecU)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(CPU_CAPABILITY_AVX2)
  return (VecU)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__SSE2__)
  return (VecU)_mm_unpacklo_epi16(_mm_loadl_epi64((const __m128i*)p), _mm_setzero_si128());
#else
  uint16_t h[4];
  memcpy(h, p, sizeof h);
  return VecU{h[0], h[1], h[2], h[3]};
#endif
}
// The low 16 bits of each lane.
FUSED_NORM_INLINE void store_u16(void* p, VecU v) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)v));
#elif defined(CPU_CAPABILITY_AVX2)
  // The lanes hold at most 0xffff, so the saturating pack leaves them alone; it works on 128-bit halves, hence the permutation.
  const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#elif defined(__SSE2__)
  // SSE2 packs signed lanes only: shift each 16-bit value up and down again to sign-extend it, and the saturation never acts.
  const __m128i s = _mm_srai_epi32(_mm_slli_epi32((__m128i)v, 16), 16);
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi32(s, s));
#else
  const uint16_t h[4] = {(uint16_t)v[0], (uint16_t)v[1], (uint16_t)v[2], (uint16_t)v[3]};
  memcpy(p, h, sizeof h);
#endif
}

// mask ? a : b, lane by lane
FUSED_NORM_INLINE VecU select(MaskF mask, VecU a, VecU b) { return (a & (VecU)mask) | (b & ~(VecU)mask); }

// bf16 is the upper half of an fp32.
FUSED_NORM_INLINE VecF load(const BFloat16* p) { return (VecF)(load_u16(p) << 16); }

FUSED_NORM_INLINE VecF load(const Half* p) {
#if defined(CPU_CAPABILITY_AVX512)
  return (VecF)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(CPU_CAPABILITY_AVX2)
  return (VecF)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  // Move exponent and mantissa into fp32's place; the exponent's bias is then 112 too small, which a product with 2^112 mends, exactly,
  // for subnormals too. Infinity and NaN come out with too small an exponent and get all its bits.
  const VecU h = load_u16(p);
  const VecU magnitude = h & 0x7fffu;
  const VecU scaled = (VecU)((VecF)(magnitude << 13) * 0x1p112f);
  const VecU special = (VecU)((MaskF)magnitude > 0x7bff) & 0x7f800000u;
  return (VecF)(scaled | special | ((h & 0x8000u) << 16));
#endif
}

// ---- stores, rounding to nearest even ----

FUSED_NORM_INLINE void store(float* p, VecF v) { memcpy(p, &v, sizeof v); }
FUSED_NORM_INLINE void store(double* p, VecD v) { memcpy(p, &v, sizeof v); }

FUSED_NORM_INLINE void store(BFloat16* p, VecF v) {
  // Adding 0x7fff, and 1 more if the kept part is odd, carries into the kept part exactly when rounding up is due.
  const VecU u = (VecU)v;
  const VecU rounded = (u + (((u >> 16) & 1u) + 0x7fffu)) >> 16;
#if defined(CPU_CAPABILITY_AVX512)
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  store_u16(p, (VecU)_mm512_mask_mov_epi32((__m512i)rounded, nan, _mm512_set1_epi32(0x7fc0)));
#else
  store_u16(p, select(v != v, VecU{} + 0x7fc0u, rounded));
#endif
}

FUSED_NORM_INLINE void store(Half* p, VecF v) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(CPU_CAPABILITY_AVX2)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const VecU u = (VecU)v;
  const VecU magnitude = u & 0x7fffffffu;
  // Normal: rebias the exponent by -112 and round away 13 bits as for bf16. A carry out of the mantissa is the next exponent.
  const VecU normal = (magnitude - (112u << 23) + (((magnitude >> 13) & 1u) + 0xfffu)) >> 13;
  // Below 2^-14 the result is a multiple of 2^-24: adding 0.5 puts that unit at the end of fp32's mantissa, and the addition rounds.
  const VecU subnormal = (VecU)((VecF)magnitude + 0.5f) - 0x3f000000u;
  VecU h = select((MaskF)magnitude < (113 << 23), subnormal, normal);
  h = select((MaskF)magnitude > 0x477fefff, VecU{} + 0x7c00u, h);  // 65520 and above round to infinity
  h = select((MaskF)magnitude > 0x7f800000, VecU{} + 0x7e00u, h);  // NaN
  store_u16(p, h | ((u >> 16) & 0x8000u));
#endif
}

// v rounded to T and back.
template <typename T>
FUSED_NORM_INLINE Vec<Acc<T>> rounded(Vec<Acc<T>> v) {
  if constexpr (sizeof(T) == sizeof(Acc<T>)) return v;
  T lanes[kLanes<Acc<T>>];
  store(lanes, v);
  return load(lanes);
}
template <>
FUSED_NORM_INLINE VecF rounded<BFloat16>(VecF v) {
  const VecU u = (VecU)v;
  const VecU r = (u + (((u >> 16) & 1u) + 0x7fffu)) & 0xffff0000u;  // as store does
  return (VecF)select(v != v, u, r);
}
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
template <>
FUSED_NORM_INLINE VecF rounded<Half>(VecF v) {
#if defined(CPU_CAPABILITY_AVX512)
  return (VecF)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  return (VecF)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
}
#endif

// ---- selection, extremes, elementary functions ----

// mask ? a : b, lane by lane
FUSED_NORM_INLINE VecF select(MaskF mask, VecF a, VecF b) { return (VecF)(((MaskF)a & mask) | ((MaskF)b & ~mask)); }
FUSED_NORM_INLINE VecD select(MaskD mask, VecD a, VecD b) { return (VecD)(((MaskD)a & mask) | ((MaskD)b & ~mask)); }
// v where the mask is not set, 0 where it is
FUSED_NORM_INLINE VecF clear(MaskF mask, VecF v) { return (VecF)((MaskF)v & ~mask); }
FUSED_NORM_INLINE VecD clear(MaskD mask, VecD v) { return (VecD)((MaskD)v & ~mask); }

// The larger; b where a is NaN, so that a running maximum in b takes no notice of NaN.
FUSED_NORM_INLINE VecF larger(VecF a, VecF b) {
#if defined(CPU_CAPABILITY_AVX512)
  return (VecF)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(CPU_CAPABILITY_AVX2)
  return (VecF)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (VecF)_mm_max_ps((__m128)a, (__m128)b);
#else
  return select(a > b, a, b);
#endif
}
FUSED_NORM_INLINE VecD larger(VecD a, VecD b) {
#if defined(CPU_CAPABILITY_AVX512)
  return (VecD)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(CPU_CAPABILITY_AVX2)
  return (VecD)_mm256_max_pd((__m256d)a, (__m256d)b);
#elif defined(__SSE2__)
  return (VecD)_mm_max_pd((__m128d)a, (__m128d)b);
#else
  return select(a > b, a, b);
#endif
}
template <typename V>
FUSED_NORM_INLINE auto largest_lane(V v) {
  auto largest = v[0];
  for (unsigned i = 1; i < sizeof v / sizeof v[0]; i++) largest = v[i] > largest ? v[i] : largest;
  return largest;
}

FUSED_NORM_INLINE VecF magnitude(VecF v) { return (VecF)((MaskF)v & 0x7fffffff); }
FUSED_NORM_INLINE VecD magnitude(VecD v) { return (VecD)((MaskD)v & 0x7fffffffffffffff); }

// exp(x) for x <= 0 (or a few roundings above), to about 1 unit in the last place: exactly 1 at 0, 0 where exp(x) is no normal number
// (-inf included), NaN for NaN. A `Short` one has a polynomial of one degree less, and an error of up to 2e-7 more.
//
// n is x/ln 2 rounded to an integer, by adding a number so large that its unit in the last place is 1, and r = x - n*ln 2, with ln 2 in
// two parts, the first so short that n times it is exact. With fused multiply-add one part does for fp32: its rounding costs exp(x) a
// relative error of 2.8e-9*|x|, where a difference x of two numbers as large as itself has about ten times as much. exp(r) = 1 + r + r^2*q(r) by a minimax
// polynomial on |r| <= ln(2)/2, with a relative error of 3e-9 (fp64: 4e-18). The low bits of the large sum are n plus the exponent's bias:
// shifted up, they are 2^n. The bound on x makes that 0, not nonsense, where 2^n is no normal number; `larger` lets NaN pass.
//
// Of N registers at once, each step of all before the next of any: one's latencies are longer than a processor looks ahead.
#define FUSED_NORM_EACH _Pragma("GCC unroll 8") for (int k = 0; k < N; k++)
template <bool Short = false, int N>
FUSED_NORM_INLINE void exp_of_nonpositive(VecF (&x)[N]) {
  const VecF shift = splat<float>(0x1.8p23f + 127);
  VecF t[N], q[N];
  FUSED_NORM_EACH x[k] = larger(splat<float>(-88), x[k]);
  FUSED_NORM_EACH t[k] = fma(x[k], splat<float>(0x1.715476p+0f), shift);
  FUSED_NORM_EACH q[k] = t[k] - shift;
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
  FUSED_NORM_EACH x[k] = fnma(q[k], splat<float>(0x1.62e43p-1f), x[k]);
#else
  FUSED_NORM_EACH x[k] = fnma(q[k], splat<float>(0x1.63p-1f), x[k]);
  FUSED_NORM_EACH x[k] = fnma(q[k], splat<float>(-0x1.bd0106p-13f), x[k]);
#endif
  if constexpr (Short) {
    FUSED_NORM_EACH q[k] = fma(x[k], splat<float>(0x1.0e5bd2p-7f), splat<float>(0x1.57111ap-5f));
    FUSED_NORM_EACH q[k] = fma(q[k], x[k], splat<float>(0x1.555ba6p-3f));
    FUSED_NORM_EACH q[k] = fma(q[k], x[k], splat<float>(0x1.fffe66p-2f));
  } else {
    FUSED_NORM_EACH q[k] = fma(x[k], splat<float>(0x1.6a2352p-10f), splat<float>(0x1.123a6cp-7f));
    FUSED_NORM_EACH q[k] = fma(q[k], x[k], splat<float>(0x1.5558f4p-5f));
    FUSED_NORM_EACH q[k] = fma(q[k], x[k], splat<float>(0x1.55549p-3f));
    FUSED_NORM_EACH q[k] = fma(q[k], x[k], splat<float>(0x1.fffffcp-2f));
  }
  FUSED_NORM_EACH q[k] = fma(q[k], x[k], splat<float>(1));
  FUSED_NORM_EACH q[k] = fma(q[k], x[k], splat<float>(1));
  FUSED_NORM_EACH x[k] = q[k] * (VecF)((VecU)t[k] << 23);
}
template <bool Short = false, int N>
FUSED_NORM_INLINE void exp_of_nonpositive(VecD (&x)[N]) {
  constexpr double kCoefficients[] = {
      0x1.28ada23aca184p-22, 0x1.71df4f0638a89p-19, 0x1.a0199a05498bep-16, 0x1.a01a0114e697ep-13, 0x1.6c16c18413658p-10, 0x1.111111112c506p-7,
      0x1.55555555509a7p-5,  0x1.55555555554e5p-3,  0x1.0000000000009p-1,  1,                     1,
  };
  const VecD shift = splat<double>(0x1.8p52 + 1023);
  VecD t[N], q[N];
  FUSED_NORM_EACH x[k] = larger(splat<double>(-709), x[k]);
  FUSED_NORM_EACH t[k] = fma(x[k], splat<double>(0x1.71547652b82fep+0), shift);
  FUSED_NORM_EACH q[k] = t[k] - shift;
  FUSED_NORM_EACH x[k] = fnma(q[k], splat<double>(0x1.62e4p-1), x[k]);
  FUSED_NORM_EACH x[k] = fnma(q[k], splat<double>(0x1.7f7d1cf79abcap-20), x[k]);
  FUSED_NORM_EACH q[k] = splat<double>(0x1.ad45af4432ddcp-26);
  for (const double c : kCoefficients) {
    FUSED_NORM_EACH q[k] = fma(q[k], x[k], splat<double>(c));
  }
  FUSED_NORM_EACH x[k] = q[k] * (VecD)((MaskD)t[k] << 52);
}
#undef FUSED_NORM_EACH
template <bool Short = false, typename V>
FUSED_NORM_INLINE V exp_of_nonpositive(V x) {
  V one[1] = {x};
  exp_of_nonpositive<Short>(one);
  return one[0];
}

// tanh(x), and 1 - tanh(x)^2 without a difference of numbers near 1.
//
// With h = exp(-2|x|)/(1 + exp(-2|x|)) they are 1 - 2h and 4h(1 - h), which serve from 0.625 on; below, tanh is x + x^3*p(x^2) (Cephes'
// polynomials), and so has its digits near 0 too.
FUSED_NORM_INLINE VecF tanh_below(VecF x, VecF square) {
  VecF p = splat<float>(-5.70498872745e-3f);
  p = fma(p, square, splat<float>(2.06390887954e-2f));
  p = fma(p, square, splat<float>(-5.37397155531e-2f));
  p = fma(p, square, splat<float>(1.33314422036e-1f));
  p = fma(p, square, splat<float>(-3.33332819422e-1f));
  return fma(p * square, x, x);
}
FUSED_NORM_INLINE VecD tanh_below(VecD x, VecD square) {
  VecD p = splat<double>(-9.64399179425052238628e-1);
  p = fma(p, square, splat<double>(-9.92877231001918586564e1));
  p = fma(p, square, splat<double>(-1.61468768441708447952e3));
  VecD q = square + splat<double>(1.12811678491632931402e2);
  q = fma(q, square, splat<double>(2.23548839060100448583e3));
  q = fma(q, square, splat<double>(4.84406305325125486048e3));
  return fma(p / q * square, x, x);
}
template <typename A>
struct Tanh {
  Vec<A> value, slope;
};
template <typename A>
FUSED_NORM_INLINE Tanh<A> tanh_and_slope(Vec<A> x) {
  const Vec<A> size = magnitude(x), one = splat<A>(1);
  const Vec<A> e = exp_of_nonpositive(size * splat<A>(-2));
  const Vec<A> rest = e / (one + e);
  const Mask<A> sign = (Mask<A>)x ^ (Mask<A>)size, is_small = size < (A)0.625;
  const Vec<A> small = tanh_below(x, x * x), large = (Vec<A>)((Mask<A>)fnma(rest, splat<A>(2), one) | sign);
  return {select(is_small, small, large), select(is_small, fnma(small, small, one), splat<A>(4) * (rest * (one - rest)))};
}

// ---- two registers at a time ----
//
// Elements p[0 .. 2*lanes), each in some lane of one of the two: for bf16 one has those of even, the other those of odd index, which saves
// the moves between lanes. For sums, and for elementwise results that go back by store_two or stream_two.
template <typename A>
struct Two {
  Vec<A> a, b;
};
template <typename T>
FUSED_NORM_INLINE Two<Acc<T>> load_two(const T* p) {
  return {load(p), load(p + kLanes<Acc<T>>)};
}
FUSED_NORM_INLINE Two<float> load_two(const BFloat16* p) {
  VecU both;
  memcpy(&both, p, sizeof both);
  return {(VecF)(both << 16), (VecF)(both & 0xffff0000u)};
}

// Two registers of neighbours in the order that load_two has for T, for what stands beside elements of T.
template <typename T>
FUSED_NORM_INLINE Two<Acc<T>> order_two(Vec<Acc<T>> a, Vec<Acc<T>> b) {
  if constexpr (!__is_same(T, BFloat16)) return {a, b};
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {(Vec<Acc<T>>)_mm512_permutex2var_ps((__m512)a, even, (__m512)b), (Vec<Acc<T>>)_mm512_permutex2var_ps((__m512)a, odd, (__m512)b)};
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256 even = _mm256_shuffle_ps((__m256)a, (__m256)b, 0x88), odd = _mm256_shuffle_ps((__m256)a, (__m256)b, 0xdd);
  return {
      (Vec<Acc<T>>)_mm256_permute4x64_pd((__m256d)even, 0xd8), (Vec<Acc<T>>)_mm256_permute4x64_pd((__m256d)odd, 0xd8)};
#else
  constexpr int L = kLanes<Acc<T>>;
  Two<Acc<T>> v;
  for (int i = 0; i < L; i++) {
    v.a[i] = 2 * i < L ? a[2 * i] : b[2 * i - L];
    v.b[i] = 2 * i < L ? a[2 * i + 1] : b[2 * i + 1 - L];
  }
  return v;
#endif
}
// And back.
template <typename T>
FUSED_NORM_INLINE Two<Acc<T>> neighbours(Two<Acc<T>> v) {
  if constexpr (!__is_same(T, BFloat16)) return v;
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  return {
      (Vec<Acc<T>>)_mm512_permutex2var_ps((__m512)v.a, low, (__m512)v.b), (Vec<Acc<T>>)_mm512_permutex2var_ps((__m512)v.a, high, (__m512)v.b)};
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256 low = _mm256_unpacklo_ps((__m256)v.a, (__m256)v.b), high = _mm256_unpackhi_ps((__m256)v.a, (__m256)v.b);
  return {(Vec<Acc<T>>)_mm256_permute2f128_ps(low, high, 0x20), (Vec<Acc<T>>)_mm256_permute2f128_ps(low, high, 0x31)};
#else
  constexpr int L = kLanes<Acc<T>>;
  Two<Acc<T>> out;
  for (int i = 0; i < L; i++) {
    out.a[i] = i % 2 ? v.b[i / 2] : v.a[i / 2];
    out.b[i] = i % 2 ? v.b[(L + i) / 2] : v.a[(L + i) / 2];
  }
  return out;
#endif
}
template <typename T, typename P>
FUSED_NORM_INLINE Two<Acc<T>> load_two_of(const P* p) {
  if constexpr (__is_same(T, P)) return load_two(p);
  else return order_two<T>(load(p), load(p + kLanes<Acc<T>>));
}

// bf16's bits in the upper half of each lane, to nearest even as store has it (there a NaN becomes the usual one, here it stays what it is:
// no NaN that arithmetic gives is one in the lower half alone), and whatever in the lower.
FUSED_NORM_INLINE VecU round_bf16(VecF v) {
  const VecU u = (VecU)v;
#if defined(CPU_CAPABILITY_AVX512)
  const __mmask16 odd = _mm512_test_epi32_mask((__m512i)u, _mm512_set1_epi32(0x10000));
  const __mmask16 number = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_ORD_Q);
  const __m512i half = _mm512_mask_blend_epi32(odd, _mm512_set1_epi32(0x7fff), _mm512_set1_epi32(0x8000));
  return (VecU)_mm512_mask_add_epi32((__m512i)u, number, (__m512i)u, half);
#else
  return u + ((((u >> 16) & 1u) + 0x7fffu) & (VecU)(v == v));
#endif
}
FUSED_NORM_INLINE VecU merge_bf16(Two<float> v) { return (round_bf16(v.a) >> 16) | (round_bf16(v.b) & 0xffff0000u); }

template <typename T>
FUSED_NORM_INLINE void store_two(T* p, Two<Acc<T>> v) {
  store(p, v.a);
  store(p + kLanes<Acc<T>>, v.b);
}
FUSED_NORM_INLINE void store_two(BFloat16* p, Two<float> v) {
  const VecU both = merge_bf16(v);
  memcpy(p, &both, sizeof both);
}

// The same past the caches: no line is fetched only to be written over, and none that is in use makes way. For results larger than the caches.
// p must be a multiple of kStreamBytes<T>, and stream_fence must follow the last.
template <typename T>
constexpr int64_t kStreamBytes = 2 * kLanes<Acc<T>> * sizeof(T) < 64 ? 2 * kLanes<Acc<T>> * sizeof(T) : 64;

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#if defined(CPU_CAPABILITY_AVX512)
FUSED_NORM_INLINE void stream(void* p, VecU v) { _mm512_stream_si512((__m512i*)p, (__m512i)v); }
#else
FUSED_NORM_INLINE void stream(void* p, VecU v) { _mm256_stream_si256((__m256i*)p, (__m256i)v); }
#endif
template <typename T>
FUSED_NORM_INLINE void stream_two(T* p, Two<Acc<T>> v) {
  if constexpr (__is_same(T, BFloat16)) {
    stream(p, merge_bf16(v));
  } else if constexpr (__is_same(T, Half)) {
    T both[2 * kLanes<float>];
    store_two(both, v);
    VecU bits;
    memcpy(&bits, both, sizeof bits);
    stream(p, bits);
  } else {
    stream(p, (VecU)v.a);
    stream(p + kLanes<T>, (VecU)v.b);
  }
}
FUSED_NORM_INLINE void stream_fence() { _mm_sfence(); }
#else
template <typename T>
FUSED_NORM_INLINE void stream_two(T* p, Two<Acc<T>> v) { store_two(p, v); }
FUSED_NORM_INLINE void stream_fence() {}
#endif

// One element, for what is not worth a vector.
FUSED_NORM_INLINE float load_one(const float* p) { return *p; }
FUSED_NORM_INLINE double load_one(const double* p) { return *p; }
template <typename T>
FUSED_NORM_INLINE float load_one(const T* p) {
  T lanes[kLanes<float>] = {};
  lanes[0] = *p;
  return load(lanes)[0];
}

// Runs f(i) for every register of `count` elements, and `last` for what is left.
template <typename A, typename F, typename Last>
FUSED_NORM_INLINE void for_registers(int64_t count, const F& f, const Last& last) {
  constexpr int64_t L = kLanes<A>;
  int64_t i = 0;
  for (; i + L <= count; i += L) f(i);
  if (i < count) last(i, (int)(count - i));
}

// The first `count` elements at p, fewer than a register holds; the other lanes are 0.
template <typename T>
FUSED_NORM_INLINE Vec<Acc<T>> load_first(const T* p, int count) {
  T copy[kLanes<Acc<T>>] = {};
  for (int i = 0; i < count; i++) copy[i] = p[i];
  return load(copy);
}
template <typename T>
FUSED_NORM_INLINE void store_first(T* p, Vec<Acc<T>> v, int count) {
  T copy[kLanes<Acc<T>>];
  store(copy, v);
  for (int i = 0; i < count; i++) p[i] = copy[i];
}

// The last n % lanes elements of a row, where there are any.
//
// In a row of at least one register they are read by a register that ends where the row ends: it holds some elements that came before
// as well. Elementwise results are simply stored again, with the same values; what goes into a sum passes through `keep`, which
// clears those lanes. A shorter row is copied to and from a register's worth of memory.
template <typename A>
struct Tail {
  static constexpr int lanes = kLanes<A>;
  int64_t start;  // the column of lane 0
  int count;      // elements of the row in the register: lanes, or n for a short row
  bool any;
  Mask<A> mask;   // all ones for elements not yet seen

  explicit Tail(int64_t n) {
    const int rest = (int)(n % lanes);
    any = rest != 0;
    const bool whole = n >= lanes;
    start = whole ? n - lanes : 0;
    count = whole ? lanes : (int)n;
    const int first = whole ? lanes - rest : 0;
    for (int i = 0; i < lanes; i++) mask[i] = (i >= first && i < count) ? -1 : 0;
  }

  // `row` is the row from column `first` on, which is 0 in a short row and at most `start` in another.
  template <typename T>
  FUSED_NORM_INLINE Vec<A> load(const T* row, int64_t first = 0) const {
    if (__builtin_expect(count == lanes, 1)) return fused_norm::load(row + (start - first));
    return load_short(row);
  }
  template <typename T>
  FUSED_NORM_INLINE void store(T* row, Vec<A> v, int64_t first = 0) const {
    if (__builtin_expect(count == lanes, 1)) return fused_norm::store(row + (start - first), v);
    store_short(row, v);
  }
  FUSED_NORM_INLINE Vec<A> keep(Vec<A> v) const { return (Vec<A>)((Mask<A>)v & mask); }
  // v for elements not yet seen, `seen` for the others
  FUSED_NORM_INLINE Vec<A> keep(Vec<A> v, Vec<A> seen) const { return (Vec<A>)(((Mask<A>)v & mask) | ((Mask<A>)seen & ~mask)); }

 private:
  template <typename T>
  FUSED_NORM_NOINLINE Vec<A> load_short(const T* row) const {
    T copy[lanes] = {};
    for (int i = 0; i < count; i++) copy[i] = row[i];
    return fused_norm::load(copy);
  }
  template <typename T>
  FUSED_NORM_NOINLINE void store_short(T* row, Vec<A> v) const {
    T copy[lanes];
    fused_norm::store(copy, v);
    for (int i = 0; i < count; i++) row[i] = copy[i];
  }
};

}  // namespace
}  // namespace fused_norm
