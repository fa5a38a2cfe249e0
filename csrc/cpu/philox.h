// Dropout's mask: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011), a function of the seed and an element's
// index alone, so that backward draws again what forward drew, and nothing is kept.
//
// A block of four words belongs to each counter. One of ten rounds, on the words c0..c3 with the key k0, k1:
//   a = c0*0xD2511F53    b = c2*0xCD9E8D57    c0, c1, c2, c3 = high(b) ^ c1 ^ k0, low(b), high(a) ^ c3 ^ k1, low(a)
#pragma once

#include "kernels.h"
#include "vec.h"

namespace fused_norm {
namespace {

// Words of 32 bits in lanes of 64: the product of two is where it belongs, and what stands in the upper halves otherwise matters to nobody.
typedef uint64_t VecQ __attribute__((vector_size(FUSED_NORM_VEC_BYTES)));
constexpr int kCounters = FUSED_NORM_VEC_BYTES / 8;

FUSED_NORM_INLINE VecQ multiply_words(VecQ a, VecQ b) {
#if defined(CPU_CAPABILITY_AVX512)
  return (VecQ)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(CPU_CAPABILITY_AVX2)
  return (VecQ)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (VecQ)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// The blocks of a register's counters, in the order of memory: first those of the even lanes, then those of the odd.
FUSED_NORM_INLINE void store_blocks(uint32_t* p, VecQ c0, VecQ c1, VecQ c2, VecQ c3) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 c01 = _mm512_shuffle_ps((__m512)c0, (__m512)c1, 0x88), c23 = _mm512_shuffle_ps((__m512)c2, (__m512)c3, 0x88);
  _mm512_storeu_ps((float*)p, _mm512_shuffle_ps(c01, c23, 0x88));
  _mm512_storeu_ps((float*)p + 16, _mm512_shuffle_ps(c01, c23, 0xdd));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256 c01 = _mm256_shuffle_ps((__m256)c0, (__m256)c1, 0x88), c23 = _mm256_shuffle_ps((__m256)c2, (__m256)c3, 0x88);
  _mm256_storeu_ps((float*)p, _mm256_shuffle_ps(c01, c23, 0x88));
  _mm256_storeu_ps((float*)p + 8, _mm256_shuffle_ps(c01, c23, 0xdd));
#elif defined(__SSE2__)
  const __m128 c01 = _mm_shuffle_ps((__m128)c0, (__m128)c1, 0x88), c23 = _mm_shuffle_ps((__m128)c2, (__m128)c3, 0x88);
  _mm_storeu_ps((float*)p, _mm_shuffle_ps(c01, c23, 0x88));
  _mm_storeu_ps((float*)p + 4, _mm_shuffle_ps(c01, c23, 0xdd));
#else
  for (int i = 0; i < kCounters; i++) {
    const int lane = i % (kCounters / 2) * 2 + i / (kCounters / 2);
    const uint32_t block[4] = {(uint32_t)c0[lane], (uint32_t)c1[lane], (uint32_t)c2[lane], (uint32_t)c3[lane]};
    memcpy(p + 4 * i, block, sizeof block);
  }
#endif
}

class Philox {
 public:
  // Two registers of counters at a time: one's ten rounds are a chain of latencies.
  static constexpr int kGroups = 2, kStep = kGroups * kCounters;

  explicit Philox(uint64_t seed) {
    for (int i = 0; i < 10; i++) {
      keys_[i][0] = VecQ{} + (uint32_t)((uint32_t)seed + i * 0x9E3779B9u);
      keys_[i][1] = VecQ{} + (uint32_t)((uint32_t)(seed >> 32) + i * 0xBB67AE85u);
    }
  }

  // The words of `blocks` counters from `first` on, and as many more as make that a multiple of kStep.
  void words(uint64_t first, int64_t blocks, uint32_t* out) const {
    VecQ start;
    for (int i = 0; i < kCounters; i++) start[i] = first + i / 2 + i % 2 * (kCounters / 2);
    const VecQ m0 = VecQ{} + 0xD2511F53u, m1 = VecQ{} + 0xCD9E8D57u;
    for (int64_t done = 0; done < blocks; done += kStep, out += 4 * kStep, start += kStep) {
      VecQ c0[kGroups], c1[kGroups], c2[kGroups], c3[kGroups];
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; g++) {
        const VecQ counter = start + (uint64_t)(g * kCounters);
        // The first round, in which c2 and c3 are 0.
        const VecQ a = multiply_words(counter, m0);
        c0[g] = (counter >> 32) ^ keys_[0][0];
        c1[g] = VecQ{};
        c2[g] = (a >> 32) ^ keys_[0][1];
        c3[g] = a;
      }
#pragma GCC unroll 9
      for (int i = 1; i < 10; i++) {
#pragma GCC unroll 2
        for (int g = 0; g < kGroups; g++) {
          const VecQ a = multiply_words(c0[g], m0), b = multiply_words(c2[g], m1);
          c0[g] = (b >> 32) ^ (c1[g] ^ keys_[i][0]);
          c2[g] = (a >> 32) ^ (c3[g] ^ keys_[i][1]);
          c1[g] = b;
          c3[g] = a;
        }
      }
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; g++) store_blocks(out + 4 * g * kCounters, c0[g], c1[g], c2[g], c3[g]);
    }
  }

 private:
  VecQ keys_[10][2];
};

// Columns that are taken together, their words lying in L1 meanwhile. The last run is as long as kRun and a register: so each, if not the row
// itself, holds at least one register, and the one that ends with the row (Tail) lies in the last run.
constexpr int64_t kRun = 128;
template <typename A>
constexpr int64_t kLongestRun = kRun + kLanes<A>;
template <typename A>
FUSED_NORM_INLINE int64_t run_end(int64_t begin, int64_t n) {
  return n - begin < kLongestRun<A> ? n : begin + kRun;
}

// keep/(1 - p) of the elements of a run.
template <typename A>
class Keep {
 public:
  explicit Keep(const Dropout& d) : philox_(d.seed), threshold_(d.threshold), scale_(splat<A>((A)d.scale)) {}

  // `index` is that of the run's first element, counted over all rows.
  FUSED_NORM_NOINLINE void draw(uint64_t index, int64_t count) {
    offset_ = (int)(index % 4);
    philox_.words(index / 4, (offset_ + count + 3) / 4, words_);
  }

  // Of a register that begins at the run's element i. Beyond the run's end it is anything.
  FUSED_NORM_INLINE Vec<A> at(int64_t i) const {
    const uint32_t* const words = words_ + offset_ + i;
    if constexpr (sizeof(A) == sizeof(uint32_t)) {
      VecU w;
      memcpy(&w, words, sizeof w);
      return (Vec<A>)((Mask<A>)(w >= VecU{} + threshold_) & (Mask<A>)scale_);
    } else {
      typedef uint32_t HalfU __attribute__((vector_size(FUSED_NORM_VEC_BYTES / 2)));
      HalfU w;
      memcpy(&w, words, sizeof w);
      return (Vec<A>)((__builtin_convertvector(w, Mask<A>) >= (int64_t)threshold_) & (Mask<A>)scale_);
    }
  }

 private:
  Philox philox_;
  uint32_t threshold_;
  Vec<A> scale_;
  int offset_ = 0;
  uint32_t words_[((kLongestRun<A> + 3 + 3) / 4 + Philox::kStep) * 4];
};

}  // namespace
}  // namespace fused_norm
