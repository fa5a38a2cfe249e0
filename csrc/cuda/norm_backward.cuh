// LayerNorm and RMSNorm, backward: the kernels, and the choice of their instantiation. Launched by norm_backward.cu.
//
//     xhat = (x - mean)*rstd    g = dy*w    c1 = sum(g)/n (left out for RMSNorm)    c2 = sum(g*xhat)/n
//     dx   = rstd*(g - c1 - xhat*c2)        dw = sum over the group's rows of dy*xhat        db = sum of dy
//
// Data movement. A block walks down its part of a group's rows (norm_backward_config.h), several narrow rows at a time. Every thread has its
// own columns, and keeps their dw and db in registers from the first row to the last. x and dy are read once and dx written once, M*N*E
// bytes each: the thread copies its chunks of the coming rows into a ring in shared memory, and fills each place again as soon as it has
// used it for the last time, so that memory is always busy. What it reads there it has written itself: the only barrier is that of the sums over
// a row, one a row, none where a warp or less has it. A row too wide for a block is shared out among those of a cluster (cluster.cuh), each
// with its slice of the columns. Partial sums of dw and db, two rows of accumulators a part, are added up by a second kernel; where there is
// a single part it writes the results itself.
//
// Where the device has too little shared memory for that, or no clusters, x and dy are read a second time instead (norm_backward_plain_kernel).
//
// Order. Thread t of a slice's T threads sums its chunks t, t + T, ... element by element; then threads in a warp are added, then warps of all
// slices (common.cuh). dw and db: the rows of a thread in order, then the rows that a block has under way at once, then the parts. Neither
// where bytes come from nor which of the kernels it is changes anything of it.
#pragma once

#include <type_traits>

#include "async_copy.cuh"
#include "cluster.cuh"
#include "common.cuh"
#include "norm.h"
#include "norm_backward_config.h"

namespace fused_norm {

template <typename A>
struct NormBackwardShape {
  int64_t rows;
  int64_t n;
  int64_t dy_row_stride;
  int64_t x_row_stride;
  int64_t weight_row_stride;  // n with a weight per group, 0 with a shared one
  int64_t rows_per_group;
  int64_t rows_per_part;
  A one_nth;
  int parts;   // of a group
  int chunks;  // of a row: ceil(n / elements per chunk)
  int slices;
  int slice_chunks;
  int chunks_per_thread;
  int depth;            // of the ring
  int sums_bytes;       // at the front of shared memory
  bool rms;             // for the kernels that serve both
  bool weight_is_fp32;  // beside a 2-byte x, whose type it has otherwise
  bool out_is_x_type;   // dw and db are results of x's type; else of the accumulators', results or partial sums
};

// The sums over a row that one call takes, and two sets of their shared memory: while some threads still read one, others write the next.
constexpr int kBackwardSums = 2;
constexpr int kBackwardSets = 2;
template <typename T>
constexpr int kHeldChunks = backward_chunks(sizeof(T));

// Elements of shared memory from one set of sums to the next, and those of all sets of a block that takes slices one after the other. They
// lie as ClusterSums has them.
__host__ __device__ __forceinline__ int backward_set(int threads_per_row, int slices) { return kBackwardSums * (threads_per_row / kWarp) * slices; }
__host__ __device__ __forceinline__ int backward_sets(int threads_per_row, int rows_per_block, int slices) {
  return threads_per_row > kWarp ? kBackwardSets * rows_per_block * backward_set(threads_per_row, slices) : 0;
}

// Sums over rows that one block has to itself, as ClusterSums has those of more.
template <typename A>
class BlockSums {
 public:
  __device__ __forceinline__ explicit BlockSums(void* shared)
      : sets_(static_cast<A*>(shared) + backward_sets(blockDim.x, static_cast<int>(threadIdx.y), 1)) {}

  __device__ __forceinline__ void begin() {}

  template <int COUNT>
  __device__ __forceinline__ void add(A (&v)[COUNT]) {
    sum_over_row(v, sets_ + set_ * backward_set(blockDim.x, 1));
    set_ = kBackwardSets - 1 - set_;
  }

 private:
  A* sets_;
  int set_ = 0;
};

// A row's part of the formulas. IS_RMS: not even zeros are added.
template <bool IS_RMS, typename A>
struct BackwardRow {
  A mean, rstd, c1, c2;

  __device__ __forceinline__ void load(const A* __restrict__ stats, const NormBackwardShape<A>& shape, int64_t m) {
    rstd = stats[m];
    mean = IS_RMS || shape.rms ? A(0) : stats[shape.rows + m];
  }
  __device__ __forceinline__ A xhat(A x) const { return times(IS_RMS ? x : plus(x, -mean), rstd); }
  // In this order, so that a row of one element has a gradient of exactly 0.
  __device__ __forceinline__ A dx(A g, A xhat) const { return times(rstd, multiply_add(-xhat, c2, IS_RMS ? g : plus(g, -c1))); }
};

// total/n by its reciprocal, and one correction by the remainder: about one rounding. A division is a call, around which registers spill.
template <typename A>
__device__ __forceinline__ A mean_of(A total, const NormBackwardShape<A>& shape) {
  const A quotient = times(total, shape.one_nth);
  const A corrected = multiply_add(multiply_add(-quotient, static_cast<A>(shape.n), total), shape.one_nth, quotient);
  return corrected == corrected ? corrected : quotient;  // of an infinite total the remainder is NaN
}

// sum(g*xhat) and, but for RMSNorm, sum(g) of a row make its means.
template <bool IS_RMS, typename A, int COUNT>
__device__ __forceinline__ void set_means(BackwardRow<IS_RMS, A>& row, const A (&sums)[COUNT], const NormBackwardShape<A>& shape) {
  row.c2 = mean_of(sums[0], shape);
  if constexpr (!IS_RMS) row.c1 = shape.rms ? A(0) : mean_of(sums[1], shape);
}

// The rows of one part. A thread takes every blockDim.y-th of them, from row threadIdx.y on.
struct PartRows {
  int64_t group;
  int64_t first;
  int count;

  template <typename A>
  __device__ __forceinline__ PartRows(const NormBackwardShape<A>& shape, int64_t part) : group(part / shape.parts) {
    const int64_t begin = part % shape.parts * shape.rows_per_part, left = shape.rows_per_group - begin;
    first = group * shape.rows_per_group + begin;
    count = static_cast<int>(left < shape.rows_per_part ? left : shape.rows_per_part);
  }
};

// A block's chunks [first, last) of its rows.
struct ColumnSlice {
  int first, last;

  template <typename A>
  __device__ __forceinline__ ColumnSlice(const NormBackwardShape<A>& shape, int slice) : first(slice * shape.slice_chunks) {
    last = first + shape.slice_chunks < shape.chunks ? first + shape.slice_chunks : shape.chunks;
  }
};

// The elements of chunk c that its owner's formulas meet: f(j) for each that exists.
template <bool VECTOR, int K, typename F>
__device__ __forceinline__ void each_element(int c, int64_t n, F&& f) {
#pragma unroll
  for (int j = 0; j < K; ++j) {
    if (present<VECTOR, K>(c, j, n)) f(j);
  }
}

// What chunk c adds to sum(g*xhat) and, but for RMSNorm, sum(g).
template <bool IS_RMS, bool VECTOR, typename T, int K, int COUNT>
__device__ __forceinline__ void add_to_row_sums(Acc<T> (&sums)[COUNT], const BackwardRow<IS_RMS, Acc<T>>& row, const Chunk& dy, const Chunk& x,
                                                const Acc<T> (&w)[K], int c, int64_t n) {
  each_element<VECTOR, K>(c, n, [&](int j) {
    const Acc<T> g = times(to_acc(chunk_get<T>(dy, j)), w[j]);
    sums[0] = multiply_add(g, row.xhat(to_acc(chunk_get<T>(x, j))), sums[0]);
    if constexpr (!IS_RMS) sums[1] = plus(sums[1], g);
  });
}

// dx of chunk c, and what it adds to dw and db.
template <bool IS_RMS, bool VECTOR, typename T, int K>
__device__ __forceinline__ Chunk gradients(Acc<T> (&dw)[K], Acc<T> (&db)[K], const BackwardRow<IS_RMS, Acc<T>>& row, const Chunk& dy,
                                           const Chunk& x, const Acc<T> (&w)[K], int c, int64_t n) {
  using A = Acc<T>;
  Chunk out;
#pragma unroll
  for (int j = 0; j < K; ++j) {
    const A dyj = to_acc(chunk_get<T>(dy, j)), xhat = row.xhat(to_acc(chunk_get<T>(x, j)));
    chunk_set(out, j, from_acc<T>(row.dx(times(dyj, w[j]), xhat)));
    if (present<VECTOR, K>(c, j, n)) {
      dw[j] = multiply_add(dyj, xhat, dw[j]);
      db[j] = plus(db[j], dyj);
    }
  }
  return out;
}

// The weight beside chunk c; ones where there is none.
template <bool VECTOR, typename T, int K>
__device__ __forceinline__ void load_weight(const void* __restrict__ weight, int64_t group, int c, const NormBackwardShape<Acc<T>>& shape, Acc<T> (&w)[K]) {
  const int64_t at = group * shape.weight_row_stride;
  if (weight == nullptr) {
#pragma unroll
    for (int j = 0; j < K; ++j) w[j] = 1;
  } else if (sizeof(T) == 2 && shape.weight_is_fp32) {
    if constexpr (sizeof(T) == 2) load_params<VECTOR>(static_cast<const float*>(weight) + at, c, shape.n, w);
  } else {
    load_params<VECTOR>(static_cast<const T*>(weight) + at, c, shape.n, w);
  }
}

// K values beside chunk c to a row of dw or db: the reverse of load_params.
template <bool VECTOR, int K, typename W>
__device__ __forceinline__ void store_params(W* __restrict__ row, int c, int64_t n, const Acc<W> (&v)[K]) {
  constexpr int kStep = kPerChunk<W>;
#pragma unroll
  for (int i = 0; i < K / kStep; ++i) {
    Chunk chunk;
#pragma unroll
    for (int j = 0; j < kStep; ++j) chunk_set(chunk, j, from_acc<W>(v[i * kStep + j]));
    store_chunk<VECTOR>(row, c * (K / kStep) + i, n, chunk);
  }
}

// Adds up the sums v over the rows that the block has under way at once, and writes those of its columns to row `part` of `out`. `shared` has
// room for the accumulators of all threads; rows that share a warp are added up before.
template <bool VECTOR, typename T, int C, int K, typename A = Acc<T>>
__device__ __forceinline__ void store_column_sums(A (&v)[C][K], void* __restrict__ out, int64_t part, const ColumnSlice& columns,
                                                  const NormBackwardShape<A>& shape, A* shared) {
  const int width = static_cast<int>(blockDim.x), first = columns.first, last = columns.last;
  // Rows that share a warp; they have one chunk a thread.
  for (int offset = width; offset < kWarp; offset *= 2) {
#pragma unroll
    for (int j = 0; j < K; ++j) v[0][j] += __shfl_xor_sync(0xffffffffu, v[0][j], offset);
  }
  const int slab_threads = width < kWarp ? kWarp : width, me = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  const int threads = static_cast<int>(blockDim.x * blockDim.y), slabs = threads / slab_threads;
  if (slabs == 1) {
#pragma unroll
    for (int i = 0; i < C; ++i) {
      const int c = first + i * width + static_cast<int>(threadIdx.x);
      if (c >= last) continue;
      if (shape.out_is_x_type) {
        store_params<VECTOR>(static_cast<T*>(out) + part * shape.n, c, shape.n, v[i]);
      } else {
        store_params<VECTOR>(static_cast<A*>(out) + part * shape.n, c, shape.n, v[i]);
      }
    }
    return;
  }
  const int count = (last - first) * K;
  __syncthreads();
  if (me % slab_threads < width) {
#pragma unroll
    for (int i = 0; i < C; ++i) {
      const int l = i * width + static_cast<int>(threadIdx.x);
      if (first + l < last) store_params<true>(shared + me / slab_threads * count, l, count, v[i]);
    }
  }
  __syncthreads();
  const int64_t begin = static_cast<int64_t>(first) * K, at = part * shape.n + begin;
  for (int k = me; k < count && begin + k < shape.n; k += threads) {
    A sum = shared[k];
    for (int s = 1; s < slabs; ++s) sum += shared[s * count + k];
    if (shape.out_is_x_type) {
      static_cast<T*>(out)[at + k] = from_acc<T>(sum);
    } else {
      static_cast<A*>(out)[at + k] = sum;
    }
  }
}

// Block (threads per row, rows under way at once); grid (parts of all groups), with CLUSTER each a cluster of shape.slices blocks. VECTOR: n
// fills whole chunks, and all rows are 16-byte aligned. dx, dw and db are null where they are not wanted. Shared memory: see
// NormBackwardMemory.
template <typename T, bool IS_RMS, bool VECTOR, bool CLUSTER>
__global__ void __launch_bounds__(kBackwardWideThreads, 1)
    norm_backward_kernel(const T* __restrict__ dy, const T* __restrict__ x, const Acc<T>* __restrict__ stats, const void* __restrict__ weight,
                         T* __restrict__ dx, void* __restrict__ dw, void* __restrict__ db, const NormBackwardShape<Acc<T>> shape) {
  using A = Acc<T>;
  using Row = BackwardRow<IS_RMS, A>;
  constexpr int K = kPerChunk<T>, C = kHeldChunks<T>, kPlanes = K / kPerChunk<A>;
  const int width = static_cast<int>(blockDim.x), across = static_cast<int>(blockDim.y), threads = width * across;
  const int me = static_cast<int>(threadIdx.y) * width + static_cast<int>(threadIdx.x);
  const int64_t part = CLUSTER ? blockIdx.x / shape.slices : blockIdx.x;
  const PartRows rows(shape, part);
  const ColumnSlice columns(shape, CLUSTER ? cluster_rank() : 0);
  const int first = columns.first, last = columns.last;

  extern __shared__ __align__(16) unsigned char fused_norm_shared[];
  std::conditional_t<CLUSTER, ClusterSums<kBackwardSums, A>, BlockSums<A>> row_sums(fused_norm_shared);
  Chunk* const held_weight = reinterpret_cast<Chunk*>(fused_norm_shared + shape.sums_bytes);
  Chunk* const ring = held_weight + kPlanes * shape.slice_chunks;
  Chunk* const dy_ring = ring + me;
  Chunk* const x_ring = dy_ring + shape.depth * threads;

  // The next chunk to be fetched is the `coming`-th of this thread in row coming_row of the part.
  const bool need_x = dx != nullptr || dw != nullptr;
  const T* coming_dy = dy + (rows.first + threadIdx.y) * shape.dy_row_stride;
  const T* coming_x = x + (rows.first + threadIdx.y) * shape.x_row_stride;
  int coming = 0, coming_row = static_cast<int>(threadIdx.y);
  const auto fetch_into = [&](int place) {
    const int c = first + coming * width + static_cast<int>(threadIdx.x);
    if (coming_row < rows.count && c < last) {
      copy_chunk_async<VECTOR>(dy_ring + place * threads, coming_dy, c, shape.n);
      if (need_x) copy_chunk_async<VECTOR>(x_ring + place * threads, coming_x, c, shape.n);
    }
    commit_copies();
    if (++coming == shape.chunks_per_thread) {
      coming = 0;
      coming_row += across;
      coming_dy += across * shape.dy_row_stride;
      coming_x += across * shape.x_row_stride;
    }
  };
  for (int place = 0; place < shape.depth; ++place) fetch_into(place);

  // The first row of threads brings the weight for all.
  for (int l = threadIdx.x; threadIdx.y == 0 && first + l < last; l += width) {
    A w[K];
    load_weight<VECTOR, T>(dx == nullptr ? nullptr : weight, rows.group, first + l, shape, w);
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
#pragma unroll
      for (int j = 0; j < kPerChunk<A>; ++j) chunk_set(held_weight[p * shape.slice_chunks + l], j, w[p * kPerChunk<A> + j]);
    }
  }
  const auto weight_beside = [&](int l, A(&w)[K]) {
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      const Chunk chunk = held_weight[p * shape.slice_chunks + l];
#pragma unroll
      for (int j = 0; j < kPerChunk<A>; ++j) w[p * kPerChunk<A> + j] = chunk_get<A>(chunk, j);
    }
  };
  if (across > 1) __syncthreads();
  row_sums.begin();

  A dw_sums[C][K] = {}, db_sums[C][K] = {};
  Row next{};
  if (need_x && static_cast<int>(threadIdx.y) < rows.count) next.load(stats, shape, rows.first + threadIdx.y);
  int place = 0;
  const auto after = [&](int p) { return p + 1 == shape.depth ? 0 : p + 1; };
  for (int top = 0; top < rows.count; top += across) {  // row top + threadIdx.y of the part
    const int r = top + static_cast<int>(threadIdx.y);
    const int end = r < rows.count ? last : first;  // beyond the part's last row there are sums to take part in, of nothing
    Row row = next;
    if (need_x && r + across < rows.count) next.load(stats, shape, rows.first + r + across);
    wait_for_copies(shape.depth - shape.chunks_per_thread);

    if (dx != nullptr) {
      A sums[IS_RMS ? 1 : 2] = {};
      int p = place;
#pragma unroll 2
      for (int i = 0; i < shape.chunks_per_thread; ++i) {
        const int l = i * width + static_cast<int>(threadIdx.x);
        if (first + l < end) {
          A w[K];
          weight_beside(l, w);
          add_to_row_sums<IS_RMS, VECTOR, T>(sums, row, dy_ring[p * threads], x_ring[p * threads], w, first + l, shape.n);
        }
        p = after(p);
      }
      row_sums.add(sums);
      set_means(row, sums, shape);
    }

#pragma unroll
    for (int i = 0; i < C; ++i) {
      if (i >= shape.chunks_per_thread) continue;
      const int l = i * width + static_cast<int>(threadIdx.x);
      if (first + l < end) {
        A w[K];
        weight_beside(l, w);
        const Chunk dy_chunk = dy_ring[place * threads], x_chunk = need_x ? x_ring[place * threads] : dy_chunk;
        const Chunk out = gradients<IS_RMS, VECTOR, T>(dw_sums[i], db_sums[i], row, dy_chunk, x_chunk, w, first + l, shape.n);
        if (dx != nullptr) store_chunk<VECTOR>(dx + (rows.first + r) * shape.n, first + l, shape.n, out);
      }
      fetch_into(place);
      place = after(place);
    }
  }

  A* const shared = reinterpret_cast<A*>(ring);
  if (dw != nullptr) store_column_sums<VECTOR, T>(dw_sums, dw, part, columns, shape, shared);
  if (db != nullptr) store_column_sums<VECTOR, T>(db_sums, db, part, columns, shape, shared);
}

// The same without shared memory for rows: x and dy are read once for c1 and c2, which go to `row_means`, (2, rows), and then again for all else,
// a chunk a thread at a time down all rows. It is for devices that are older or smaller, and for what no cluster holds: what distinguishes
// the kernels above is asked here at run time, so that there are fewer.
template <typename T>
__global__ void __launch_bounds__(kBackwardWideThreads, 1)
    norm_backward_plain_kernel(const T* __restrict__ dy, const T* __restrict__ x, const Acc<T>* __restrict__ stats, const void* __restrict__ weight,
                               T* __restrict__ dx, void* __restrict__ dw, void* __restrict__ db, Acc<T>* row_means, const bool vector,
                               const NormBackwardShape<Acc<T>> shape) {
  using A = Acc<T>;
  using Row = BackwardRow<false, A>;
  constexpr int K = kPerChunk<T>;
  const int width = static_cast<int>(blockDim.x), across = static_cast<int>(blockDim.y);
  const PartRows rows(shape, blockIdx.x);

  extern __shared__ __align__(16) unsigned char fused_norm_shared[];
  A* const sets = reinterpret_cast<A*>(fused_norm_shared) + backward_sets(width, static_cast<int>(threadIdx.y), shape.slices);
  A* const shared = reinterpret_cast<A*>(fused_norm_shared + shape.sums_bytes);

  const auto chunk_of = [&](const T* row, int c) { return vector ? load_chunk<true>(row, c, shape.n) : load_chunk<false>(row, c, shape.n); };
  const auto weight_beside = [&](int c, A(&w)[K]) { load_weight<false, T>(dx == nullptr ? nullptr : weight, rows.group, c, shape, w); };

  for (int top = 0, set = 0; dx != nullptr && top < rows.count; top += across) {
    const int64_t m = rows.first + top + threadIdx.y;
    const bool live = top + static_cast<int>(threadIdx.y) < rows.count;
    Row row{};
    if (live) row.load(stats, shape, m);
    A sums[kBackwardSums];
    for (int slice = 0; slice < shape.slices; ++slice) {
      const ColumnSlice columns(shape, slice);
      sums[0] = sums[1] = 0;
      for (int c = columns.first + threadIdx.x; live && c < columns.last; c += width) {
        A w[K];
        weight_beside(c, w);
        add_to_row_sums<false, false, T>(sums, row, chunk_of(dy + m * shape.dy_row_stride, c), chunk_of(x + m * shape.x_row_stride, c), w, c, shape.n);
      }
      if (width > kWarp) leave_warp_sums(sums, sets + set * backward_set(width, shape.slices), slice, shape.slices);
    }
    if (width > kWarp) {
      __syncthreads();
      add_warp_sums(sums, sets + set * backward_set(width, shape.slices), width / kWarp * shape.slices);
      set = kBackwardSets - 1 - set;
    } else {
      sum_over_lanes(sums, width);
    }
    if (live && threadIdx.x == 0) {
      set_means(row, sums, shape);
      row_means[m] = row.c2;
      row_means[shape.rows + m] = row.c1;
    }
  }
  __syncthreads();

  for (int slice = 0; slice < shape.slices; ++slice) {
    ColumnSlice columns(shape, slice);
    const int end = columns.last;
    for (; columns.first < end; columns.first += width) {
      columns.last = columns.first + width < end ? columns.first + width : end;
      const int c = columns.first + static_cast<int>(threadIdx.x);
      A w[K], dw_sums[1][K] = {}, db_sums[1][K] = {};
      if (c < columns.last) weight_beside(c, w);
      for (int r = static_cast<int>(threadIdx.y); c < columns.last && r < rows.count; r += across) {
        const int64_t m = rows.first + r;
        Row row{};
        if (dx != nullptr || dw != nullptr) row.load(stats, shape, m);
        if (dx != nullptr) {
          row.c2 = row_means[m];
          row.c1 = row_means[shape.rows + m];
        }
        const Chunk dy_chunk = chunk_of(dy + m * shape.dy_row_stride, c);
        const Chunk x_chunk = dx != nullptr || dw != nullptr ? chunk_of(x + m * shape.x_row_stride, c) : dy_chunk;
        const Chunk out = gradients<false, false, T>(dw_sums[0], db_sums[0], row, dy_chunk, x_chunk, w, c, shape.n);
        if (dx == nullptr) continue;
        if (vector) {
          store_chunk<true>(dx + m * shape.n, c, shape.n, out);
        } else {
          store_chunk<false>(dx + m * shape.n, c, shape.n, out);
        }
      }
      if (dw != nullptr) store_column_sums<false, T>(dw_sums, dw, blockIdx.x, columns, shape, shared);
      if (db != nullptr) store_column_sums<false, T>(db_sums, db, blockIdx.x, columns, shape, shared);
    }
  }
}

// Adds up the parts: block (kWarp columns, W warps, each of a part at once), grid (blocks of columns, groups, one or two of dw and db). A warp
// adds parts w, w + W, ... in order, then warps are added in order. There are several parts of no more than kBackwardBlocks groups.
template <typename A, typename W>
__global__ void __launch_bounds__(kWarp * kReduceWarps)
    norm_backward_reduce_kernel(const A* __restrict__ dw_parts, const A* __restrict__ db_parts, W* __restrict__ dw, W* __restrict__ db,
                                const int64_t n, const int parts) {
  extern __shared__ __align__(16) unsigned char fused_norm_shared[];
  A* const shared = reinterpret_cast<A*>(fused_norm_shared);
  const bool second = blockIdx.z == 1 || dw == nullptr;
  const int warps = static_cast<int>(blockDim.y);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x, group = blockIdx.y;
  const A* const from = (second ? db_parts : dw_parts) + group * parts * n + column;
  const bool live = column < n;
  A sum = 0;
#pragma unroll 8
  for (int p = static_cast<int>(threadIdx.y); p < parts; p += warps) {
    if (live) sum += from[p * n];
  }
  shared[threadIdx.y * kWarp + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || !live) return;
  for (int s = 1; s < warps; ++s) sum += shared[s * kWarp + threadIdx.x];
  (second ? db : dw)[group * n + column] = from_acc<W>(sum);
}

// ---- On the host: which instantiations serve a call. The launches themselves are the caller's, so that the emulation runs this very code. ----

struct NormBackwardLaunch {
  int64_t blocks;
  int threads_per_row, rows_per_block;
  size_t shared_bytes;
  int cluster = 1;              // adjacent blocks that make a cluster
  int groups = 1, tensors = 1;  // the grid's other dimensions, of the sum of the parts
};

// What a call's shape and the device make of it.
struct NormBackwardPlan {
  NormBackwardConfig config;
  NormBackwardPartition partition;
  NormBackwardMemory memory;
  size_t sums_bytes, plain_sums_bytes;
  int64_t partials;   // accumulators at the front of the scratch: partial sums of dw, then of db; none where one part makes the results
  int64_t row_means;  // accumulators after those, for the plain kernel
};

inline NormBackwardPlan norm_backward_plan(const NormBackward& a, size_t shared_limit) {
  NormBackwardPlan plan{};
  const int size = size_of(a.dtype), acc = size == 8 ? 8 : 4;
  plan.config = norm_backward_config(a.n, size);
  plan.partition = norm_backward_partition(a.rows / a.groups, a.groups, plan.config);
  const int threads = plan.config.threads_per_row, slices = plan.config.slices;
  plan.plain_sums_bytes = static_cast<size_t>(backward_sets(threads, plan.config.rows_per_block, slices)) * acc;
  plan.sums_bytes = slices > 1 ? cluster_sums_bytes(kBackwardSums, acc, slices, threads / kWarp) : plan.plain_sums_bytes;
  const size_t weight_bytes = static_cast<size_t>(plan.config.slice_chunks) * (kChunkBytes / size) * acc;
  plan.memory = norm_backward_memory(plan.config, size, plan.sums_bytes + weight_bytes, shared_limit);
  const int64_t tensors = (a.dw != nullptr) + (a.db != nullptr);
  if (plan.partition.parts > 1) plan.partials = tensors * plan.partition.parts * a.groups * a.n;
  if (a.dx != nullptr && (plan.memory.depth == 0 || slices > 1)) plan.row_means = 2 * a.rows;
  return plan;
}

inline size_t norm_backward_scratch(const NormBackward& a, size_t shared_limit) {
  const NormBackwardPlan plan = norm_backward_plan(a, shared_limit);
  return static_cast<size_t>(plan.partials + plan.row_means) * (a.dtype == DType::kFloat64 ? 8 : 4);
}

template <typename T, typename Launch>
const char* choose_backward_rows(const NormBackward& a, const NormBackwardPlan& plan, Launch& launch) {
  using A = Acc<T>;
  constexpr int K = kPerChunk<T>;
  const NormBackwardConfig& config = plan.config;
  NormBackwardShape<A> shape{};
  shape.rows = a.rows;
  shape.n = a.n;
  shape.dy_row_stride = a.dy_row_stride;
  shape.x_row_stride = a.x_row_stride;
  shape.weight_row_stride = a.weight_grouped ? a.n : 0;
  shape.rows_per_group = a.rows / a.groups;
  shape.rows_per_part = plan.partition.rows_per_part;
  shape.one_nth = static_cast<A>(1.0 / static_cast<double>(a.n));
  shape.parts = plan.partition.parts;
  shape.chunks = static_cast<int>((a.n - 1) / K + 1);
  shape.slices = config.slices;
  shape.slice_chunks = config.slice_chunks;
  shape.chunks_per_thread = config.chunks_per_thread;
  shape.depth = plan.memory.depth;
  shape.sums_bytes = static_cast<int>(plan.sums_bytes);
  shape.rms = a.rms;
  shape.weight_is_fp32 = a.param_dtype == DType::kFloat32;
  const bool direct = plan.partition.parts == 1;
  shape.out_is_x_type = direct && a.param_dtype == a.dtype;

  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % kChunkBytes == 0; };
  const auto whole = [&](int64_t stride) { return a.rows == 1 || stride % K == 0; };
  const bool vector = a.n % K == 0 && whole(a.dy_row_stride) && whole(a.x_row_stride) && aligned(a.dy) && aligned(a.x) && aligned(a.weight) &&
                      aligned(a.dx) && aligned(a.dw) && aligned(a.db);

  A* const dw_parts = static_cast<A*>(a.scratch);
  A* const db_parts = a.dw == nullptr ? dw_parts : dw_parts + shape.parts * a.groups * a.n;
  const auto call = [&](const NormBackwardLaunch& how, auto kernel, auto... more) {
    return launch(how, kernel, static_cast<const T*>(a.dy), static_cast<const T*>(a.x), static_cast<const A*>(a.stats), a.weight,
                  static_cast<T*>(a.dx), a.dw == nullptr || direct ? a.dw : dw_parts, a.db == nullptr || direct ? a.db : db_parts, more..., shape);
  };
  NormBackwardLaunch how{shape.parts * a.groups, config.threads_per_row, config.rows_per_block, plan.memory.bytes};
  if (shape.depth > 0 && shape.slices == 1) {
    if (!vector) return call(how, norm_backward_kernel<T, false, false, false>);
    return a.rms ? call(how, norm_backward_kernel<T, true, true, false>) : call(how, norm_backward_kernel<T, false, true, false>);
  }
  if (shape.depth > 0 && vector) {
    NormBackwardLaunch cluster = how;
    cluster.cluster = shape.slices;
    cluster.blocks *= shape.slices;
    const auto kernel = a.rms ? norm_backward_kernel<T, true, true, true> : norm_backward_kernel<T, false, true, true>;
    if (launch.holds(cluster, kernel)) return call(cluster, kernel);
  }
  shape.sums_bytes = static_cast<int>(plan.plain_sums_bytes);
  const size_t threads = static_cast<size_t>(config.threads_per_row) * config.rows_per_block;
  how.shared_bytes = plan.plain_sums_bytes + (config.rows_per_block > 1 ? threads * K * sizeof(A) : 0);
  return call(how, norm_backward_plain_kernel<T>, dw_parts + plan.partials, vector);
}

template <typename A, typename W, typename Launch>
const char* choose_backward_reduce(const NormBackward& a, const NormBackwardPlan& plan, Launch& launch) {
  const int warps = plan.partition.parts < kReduceWarps ? plan.partition.parts : kReduceWarps;
  NormBackwardLaunch how{(a.n - 1) / kWarp + 1, kWarp, warps, kWarp * warps * sizeof(A)};
  how.groups = static_cast<int>(a.groups);
  how.tensors = (a.dw != nullptr) + (a.db != nullptr);
  const A* const dw_parts = static_cast<const A*>(a.scratch);
  const A* const db_parts = a.dw == nullptr ? dw_parts : dw_parts + plan.partition.parts * a.groups * a.n;
  return launch(how, norm_backward_reduce_kernel<A, W>, dw_parts, db_parts, static_cast<W*>(a.dw), static_cast<W*>(a.db), a.n,
                plan.partition.parts);
}

template <typename T, typename Launch>
const char* choose_backward_of(const NormBackward& a, size_t shared_limit, Launch& launch) {
  const NormBackwardPlan plan = norm_backward_plan(a, shared_limit);
  const char* const error = choose_backward_rows<T>(a, plan, launch);
  if (error != nullptr || plan.partials == 0) return error;
  return a.param_dtype == a.dtype ? choose_backward_reduce<Acc<T>, T>(a, plan, launch) : choose_backward_reduce<Acc<T>, Acc<T>>(a, plan, launch);
}

// Calls launch(NormBackwardLaunch, kernel, its arguments...) for each kernel that serves `a`, one or two, until it returns an error; before a
// launch of clusters asks launch.holds(NormBackwardLaunch, kernel) whether the device has room for one. `shared_limit` is the most shared
// memory that a block may have there.
template <typename Launch>
const char* choose_norm_backward(const NormBackward& a, size_t shared_limit, Launch&& launch) {
  switch (a.dtype) {
    case DType::kFloat64: return choose_backward_of<double>(a, shared_limit, launch);
    case DType::kFloat32: return choose_backward_of<float>(a, shared_limit, launch);
    case DType::kBFloat16: return choose_backward_of<__nv_bfloat16>(a, shared_limit, launch);
    default: return choose_backward_of<__half>(a, shared_limit, launch);
  }
}

}  // namespace fused_norm
