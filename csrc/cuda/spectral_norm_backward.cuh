// Grouped backward of spectral_norm on CUDA: one cooperative launch for all layers.
//
//   dots    <dY, Y> over each chunk of a layer       reads dY and Y
//   write   dW = r dY - (r <dY, Y> - dsigma) u v^T   reads dY again, r = 1 / sigma
//
// with a grid-wide barrier in between. A chunk is a part of the arrays of one layer, dealt to the blocks in turn. The
// second step goes through a block's chunks backwards: what was read last is what the caches still hold, so that of a
// group that fits the L2 cache each array comes from memory once.
//
// dY, Y and dW are one flat array each, in whatever order of memory they share. Only the product u v^T needs to know row and
// column of an element. A v that is not in the order of the columns is put into that order by the first step.
//
// Chunks and the order of every sum depend on the shape of a layer, its dtype and alignment alone, so that the result is
// the same bits on any number of blocks and in any group.
//
// The rows of the group are an argument of the launch: no table has to be filled before it, and nothing to be kept alive.
#pragma once
#include "spectral_norm.cuh"

namespace lipgan {
namespace cuda {
namespace {

constexpr int kLog2SmallestChunk = 12;  // 16 KiB of float32: 16 loads of 16 bytes by each warp
constexpr int kLog2LargestChunk = 15;
constexpr int64_t kChunksWanted = 256;  // of a layer, for about two blocks on each multiprocessor

struct BackwardRow {
  const void* grad_y;  // T [outer, h, inner]
  const void* y;       // T [outer, h, inner]
  const void* u;       // T [h]
  const void* v;       // T [w]
  void* gathered;      // T [w], v in the order of the columns; null where v is
  void* grad_weight;   // T [outer, h, inner]
  int h, w, inner, channels;
  int first_chunk, chunks;
  signed char log2_chunk;
  bool vector;    // 16-byte accesses of dY, Y and dW
  bool whole;     // 16 bytes of them lie in one row
  bool vector_v;  // and 16 bytes of v may be loaded
};

// 4 KiB is the limit of a launch's arguments that every architecture and driver has.
struct BackwardRows {
  static constexpr int capacity = 48;
  BackwardRow rows[capacity];
  double* dots;  // [chunks]
  int num_layers;
  int chunks;  // of all layers
};
static_assert(sizeof(BackwardRows) + 2 * sizeof(void*) <= 4096, "kernel arguments are limited to 4 KiB");

// Adds the products of dY and Y of the packs of a thread in [begin, end).
template <int V, typename T, typename A>
__device__ __forceinline__ void add_products(const T* grad_y, const T* y, int64_t begin, int64_t end,
                                             Pack<A, V>* sums) {
#pragma unroll 4
  for (int64_t i = begin + static_cast<int64_t>(threadIdx.x) * V; i < end; i += kThreads * V) {
    const Pack<T, V> a = load<V>(grad_y + i), b = load<V>(y + i);
#pragma unroll
    for (int k = 0; k < V; ++k) sums->at[k] += static_cast<A>(a.at[k]) * static_cast<A>(b.at[k]);
  }
}

// <dY, Y> over a chunk, for every thread.
template <typename T>
__device__ double chunk_dot(const BackwardRow& row, int64_t begin, int64_t end) {
  using A = typename Numeric<T>::A;
  constexpr int V = 16 / sizeof(T);
  const T *grad_y = global<const T>(row.grad_y), *y = global<const T>(row.y);
  const int64_t vector_end = row.vector ? end / V * V : begin;  // a chunk begins at a multiple of V
  Pack<A, V> sums = {};
  add_products<V, T, A>(grad_y, y, begin, vector_end, &sums);
  Pack<A, 1> rest = {};
  add_products<1, T, A>(grad_y, y, vector_end, end, &rest);
  double sum = static_cast<double>(rest.at[0]);
#pragma unroll
  for (int k = 0; k < V; ++k) sum += static_cast<double>(sums.at[k]);
  return block_sum(sum);
}

// dW = r dY - (along u_i) v_j for the packs of a thread in [begin, end). Slabs: outer > 1.
template <int V, bool whole, bool slabs, typename T, typename A>
__device__ __forceinline__ void write_packs(const BackwardRow& row, int64_t begin, int64_t end, A r, A along) {
  const T *grad_y = global<const T>(row.grad_y), *u = global<const T>(row.u);
  const T* v = global<const T>(row.gathered ? row.gathered : row.v);
  T* grad_weight = global<T>(row.grad_weight);
  const int w = slabs ? row.inner : row.w, h = row.h;  // of a slab
  const bool vector_v = whole && row.vector_v;
  int64_t at = begin + static_cast<int64_t>(threadIdx.x) * V;
  if (at >= end) return;
  // Where an element lies: one division, and from then on the step of it. Rows are below 2^30, as columns are. Slabs are
  // counted by the columns before them.
  const int64_t row_at = at / w;
  int slab = slabs ? static_cast<int>(row_at / h) * w : 0;
  int i = static_cast<int>(slabs ? row_at % h : row_at), j = static_cast<int>(at - row_at * w);
  const int rows = kThreads * V / w, columns_of_step = kThreads * V - rows * w;
  const int rows_of_step = slabs ? rows % h : rows, slab_of_step = slabs ? rows / h * w : 0;
#pragma unroll 2
  for (; at < end; at += kThreads * V) {
    Pack<T, V> x = load<V>(grad_y + at);
    if constexpr (whole) {
      const A coefficient = along * static_cast<A>(u[i]);
      Pack<T, V> direction;
      if (vector_v) {
        direction = load<V>(v + slab + j);
      } else {
#pragma unroll
        for (int k = 0; k < V; ++k) direction.at[k] = v[slab + j + k];
      }
#pragma unroll
      for (int k = 0; k < V; ++k) {
        x.at[k] = static_cast<T>(static_cast<A>(x.at[k]) * r - coefficient * static_cast<A>(direction.at[k]));
      }
    } else {
      int row_of_k = i, column_of_k = j, slab_of_k = slab;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const A coefficient = along * static_cast<A>(u[row_of_k]);
        x.at[k] = static_cast<T>(static_cast<A>(x.at[k]) * r -
                                 coefficient * static_cast<A>(v[slab_of_k + column_of_k]));
        if (++column_of_k == w && k + 1 < V) {
          column_of_k = 0, ++row_of_k;
          if (slabs && row_of_k == h) row_of_k = 0, slab_of_k += w;
        }
      }
    }
    store<V>(grad_weight + at, x);
    i += rows_of_step;
    j += columns_of_step;
    slab += slab_of_step;
    if (j >= w) j -= w, ++i;
    if (slabs && i >= h) i -= h, slab += w;
  }
}

// The same for a chunk.
template <bool slabs, typename T, typename A>
__device__ __forceinline__ void write_chunk(const BackwardRow& row, int64_t begin, int64_t end, A r, A along) {
  constexpr int V = 16 / sizeof(T);
  const int64_t vector_end = row.vector ? end / V * V : begin;
  if (row.whole) {
    write_packs<V, true, slabs, T>(row, begin, vector_end, r, along);
  } else {
    write_packs<V, false, slabs, T>(row, begin, vector_end, r, along);
  }
  write_packs<1, true, slabs, T>(row, vector_end, end, r, along);
}

// This chunk's share of v in the order of the columns.
template <typename T>
__device__ __forceinline__ void gather(const BackwardRow& row, int chunk) {
  const T* v = global<const T>(row.v);
  T* gathered = global<T>(row.gathered);
  const int64_t first = static_cast<int64_t>(chunk) * kThreads + threadIdx.x;
  for (int64_t m = first; m < row.w; m += static_cast<int64_t>(row.chunks) * kThreads) {
    gathered[m] = v[index_in_v(static_cast<int>(m), row.w, row.channels)];
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    spectral_norm_bwd_kernel(const __grid_constant__ BackwardRows group,
                             const typename Numeric<T>::A* sigma,      // [num_layers]
                             const typename Numeric<T>::A* grad_sigma  // [num_layers], or null for zeros
    ) {
  using A = typename Numeric<T>::A;
  const auto layer_of = [&](int chunk) {
    int low = 0, high = group.num_layers - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (group.rows[middle].first_chunk <= chunk) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  };
  const auto begin_of = [](const BackwardRow& row, int chunk) {
    return static_cast<int64_t>(chunk - row.first_chunk) << row.log2_chunk;
  };
  const auto end_of = [](const BackwardRow& row, int64_t begin) {
    return min(static_cast<int64_t>(row.h) * row.w, begin + (int64_t{1} << row.log2_chunk));
  };

  for (int chunk = static_cast<int>(blockIdx.x); chunk < group.chunks; chunk += static_cast<int>(gridDim.x)) {
    const BackwardRow& row = group.rows[layer_of(chunk)];
    const int64_t begin = begin_of(row, chunk);
    const double dot = chunk_dot<T>(row, begin, end_of(row, begin));
    if (threadIdx.x == 0) global<double>(group.dots)[chunk] = dot;
    if (row.gathered) gather<T>(row, chunk - row.first_chunk);
  }
  cooperative_groups::this_grid().sync();

  const int last = (group.chunks - 1 - static_cast<int>(blockIdx.x)) / static_cast<int>(gridDim.x);
  for (int turn = last; turn >= 0; --turn) {
    const int chunk = static_cast<int>(blockIdx.x) + turn * static_cast<int>(gridDim.x);
    const int layer = layer_of(chunk);
    const BackwardRow& row = group.rows[layer];
    const A value = sigma[layer];
    // 1 for a zero matrix, as in the forward. Not value >= ..., which would take a NaN for 0.
    const A r = fabs(value) < A(Numeric<T>::smallest_normal) ? A(1) : A(1) / value;
    const double dot = block_sum(group.dots + row.first_chunk, row.chunks);
    const A along = A(dot * static_cast<double>(r) - (grad_sigma ? static_cast<double>(grad_sigma[layer]) : 0.0));
    const int64_t begin = begin_of(row, chunk), end = end_of(row, begin);
    if (row.inner == row.w) {
      write_chunk<false, T>(row, begin, end, r, along);
    } else {
      write_chunk<true, T>(row, begin, end, r, along);
    }
  }
}

}  // namespace
}  // namespace cuda
}  // namespace lipgan
