// Rows: their end, which does not fill two registers, and what is done with a row as a whole.
#pragma once

#include <cstdlib>

#include "kernels.h"
#include "vec.h"

namespace fused_norm {
namespace {

// Copies `bytes` bytes, fewer than two registers hold.
FUSED_NORM_INLINE void copy_end(void* to, const void* from, int64_t bytes) {
#if defined(CPU_CAPABILITY_AVX512)
  // What a mask leaves out is neither read nor written.
  for (int64_t at = 0; at < bytes; at += 64) {
    const __mmask64 mask = bytes - at >= 64 ? ~0ull : (1ull << (bytes - at)) - 1;
    _mm512_mask_storeu_epi8((char*)to + at, mask, _mm512_maskz_loadu_epi8(mask, (const char*)from + at));
  }
#else
  memcpy(to, from, bytes);
#endif
}

// The last `count` elements of a row, fewer than two registers hold; the other lanes are 0. In the order of T's registers.
template <typename T, typename P>
FUSED_NORM_INLINE Two<Acc<T>> load_end(const P* p, int64_t count) {
  P copy[2 * kLanes<Acc<T>>] = {};
  copy_end(copy, p, count * sizeof(P));
  return load_two_of<T>(copy);
}
template <typename T>
FUSED_NORM_INLINE void store_end(T* p, int64_t count, Two<Acc<T>> v) {
  T copy[2 * kLanes<Acc<T>>];
  store_two(copy, v);
  copy_end(p, copy, count * sizeof(T));
}

// Which lanes of its last two registers a row of n elements of T fills.
template <typename T, typename A = Acc<T>>
struct RowEnd {
  int64_t count;  // elements there: 0 if the row fills whole registers
  Mask<A> a, b;   // all ones for lanes that hold one

  explicit RowEnd(int64_t n) : count(n % (2 * kLanes<A>)) {
    for (int i = 0; i < kLanes<A>; i++) {
      a[i] = i < count ? -1 : 0;
      b[i] = i + kLanes<A> < count ? -1 : 0;
    }
    const Two<A> v = order_two<T>((Vec<A>)a, (Vec<A>)b);
    a = (Mask<A>)v.a;
    b = (Mask<A>)v.b;
  }
};

// Writes n elements from y on. `value(i)` gives the two registers that begin at element i, in the order of T's, `last(i)` those of the end, and
// `ahead(i)` is called before each. What begins at a multiple of kStreamBytes may go past the caches.
template <typename T, typename Value, typename Last, typename Next>
FUSED_NORM_INLINE void write_row(T* y, int64_t n, bool past_cache, const Value& value, const Last& last, const Next& ahead) {
  constexpr int64_t kTwo = 2 * kLanes<Acc<T>>, kLine = kStreamBytes<T>;
  int64_t i = 0;
  // Where the registers may begin anywhere, whole lines are written after the first few elements, which are written twice; and so are the last.
  constexpr bool kAnywhere = !__is_same(T, BFloat16);
  const bool around = kAnywhere && n >= 2 * kTwo;
  if (around && (uintptr_t)y % kLine) {
    store_two(y, value(0));
    i = (kLine - (uintptr_t)y % kLine) / sizeof(T);
  }
  if (past_cache && (uintptr_t)(y + i) % kLine == 0) {
    for (; i + kTwo <= n; i += kTwo) {
      ahead(i);
      stream_two(y + i, value(i));
    }
  } else {
    for (; i + kTwo <= n; i += kTwo) {
      ahead(i);
      store_two(y + i, value(i));
    }
  }
  if (i == n) return;
  if (around) store_two(y + n - kTwo, value(n - kTwo));
  else store_end(y + i, n - i, last(i));
}

// Without `share` the calling thread does it all.
template <typename F>
FUSED_NORM_INLINE void share_out(Share share, int64_t count, int64_t elements, const F& f) {
  const auto body = [](int64_t begin, int64_t end, void* context) { (*(const F*)context)(begin, end); };
  if (share) share(count, elements, body, (void*)&f);
  else (+body)(0, count, (void*)&f);
}

// Columns that are added up by themselves: a chain of additions is never long, and so neither is its error. And one wide row can be cut there.
template <typename A>
constexpr int64_t kSumBlock = 64 * kLanes<A>;

// Sums over a row of n columns, of type R (a register, or several): `add(v, keep, acc)` returns acc plus the terms of v, one of the two that
// `at(i)` gives for the columns [i, i + two). `last` is the RowEnd's two; what they hold beyond the row's end `keep` clears from the terms.
// With `share` the blocks are shared out, to the same bits.
template <typename R, typename T, typename At, typename Last, typename Add, typename A = Acc<T>>
FUSED_NORM_INLINE R sum_row(int64_t n, const RowEnd<T>& end, const At& at, const Last& last, const Add& add, Share share = nullptr) {
  constexpr int64_t kTwo = 2 * kLanes<A>, kBlock = kSumBlock<A>;
  const auto whole = [](Vec<A> v) { return v; };
  const int64_t fours = n - n % (2 * kTwo);
  const auto block = [&](int64_t i) {
    const int64_t stop = fours - i < kBlock ? fours : i + kBlock;
    R a0 = {}, a1 = {}, a2 = {}, a3 = {};
    for (; i < stop; i += 2 * kTwo) {
      const Last v = at(i), w = at(i + kTwo);
      a0 = add(v.a, whole, a0);
      a1 = add(v.b, whole, a1);
      a2 = add(w.a, whole, a2);
      a3 = add(w.b, whole, a3);
    }
    return (a0 + a1) + (a2 + a3);
  };
  R total = {};
  R* const sums = share ? (R*)malloc((fours / kBlock + 1) * sizeof(R)) : nullptr;
  if (sums) {
    const int64_t blocks = (fours + kBlock - 1) / kBlock;
    share_out(share, blocks, kBlock, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; k++) {
        const R sum = block(k * kBlock);
        memcpy((void*)(sums + k), &sum, sizeof sum);  // to where it may not be aligned
      }
    });
    for (int64_t k = 0; k < blocks; k++) {
      R sum;
      memcpy((void*)&sum, sums + k, sizeof sum);
      total += sum;
    }
    free(sums);
  } else {
    for (int64_t i = 0; i < fours; i += kBlock) total += block(i);
  }
  int64_t i = fours;
  if (n - i >= kTwo) {
    const Last v = at(i);
    total = add(v.b, whole, add(v.a, whole, total));
  }
  if (end.count) {
    const auto keep = [](Mask<A> mask) { return [mask](Vec<A> v) { return (Vec<A>)((Mask<A>)v & mask); }; };
    total = add(last.b, keep(end.b), add(last.a, keep(end.a), total));
  }
  return total;
}

// Columns that are held in the type of the arithmetic, in L1 or little beyond it.
constexpr int64_t kHeldColumns = 8192;

// Up to two lines of memory that will be read next.
template <int64_t Bytes>
FUSED_NORM_INLINE void fetch_lines(const void* p) {
  __builtin_prefetch(p);
  if constexpr (Bytes > 64) __builtin_prefetch((const char*)p + 64);
}

// Memory that will be read next: the row's elements, `size` bytes each, and those of a second row, if there is one.
struct Ahead {
  const char* first;
  const char* second;  // may be null
  int64_t first_size, second_size;

  // What `Bytes` bytes are of the wider of the two, from element i on.
  template <int64_t Bytes>
  FUSED_NORM_INLINE void fetch(int64_t i) const {
    fetch_lines<Bytes>(first + i * first_size);
    if (second) fetch_lines<Bytes>(second + i * second_size);
  }
};

// Elements of `from` in the accumulation type and in the order of T's registers, with zeros to fill the last.
template <typename T, typename P, typename A = Acc<T>>
FUSED_NORM_NOINLINE void hold(const P* from, int64_t n, A* held) {
  constexpr int64_t L = kLanes<A>;
  const auto put = [&](int64_t i, Two<A> v) {
    store(held + i, v.a);
    store(held + i + L, v.b);
  };
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) put(i, load_two_of<T>(from + i));
  if (i < n) put(i, load_end<T>(from + i, n - i));
}

}  // namespace
}  // namespace fused_norm
