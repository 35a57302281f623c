// Grouped forward of spectral_norm on CUDA: one cooperative launch for all layers.
//
// Per layer, W [h, w], and per power iteration (PyTorch's order; see the header):
//
//   rows     t = W v,  r = W^T t      one pass over W: a tile of rows is still in cache when its t is known
//   columns  s = r / max(|t|, eps)    the column sums of the rows' partial results, and |s|
//
// with v = s / max(|s|, eps) of the iteration before, applied as it is loaded, and u = t / max(|t|, eps). A last step
// scales W by 1 / sigma. The steps are separated by grid-wide barriers; each step's work items are counted through all
// layers and dealt to the blocks in turn:
//
//   rows     (layer, block of rows)          each writes one row of partials [row_blocks, w] and one of t_sums
//   columns  (layer, kColumns columns)       each writes its part of s [w] and one of s_sums
//   scale    (layer, kChunk elements of W)   each writes its parts of y, u, v
//
// The division into items and the order of every sum depend on the shapes, dtype and alignment alone, so that the
// result is the same bits on any number of blocks. W is read n + 1 times; the partials cost about 2 / rows per block of
// one such pass.
//
// W stays as it lies in memory, [outer, h, inner]; its columns are counted as they lie, and s and the partial results are
// in that order. A v that is in another order (channels last) is put into s by the launch that fills the table, so that
// the steps of the iteration need not know. How the rows step goes through W is one of three (Order).
//
// Un-normalized, r grows as |t|^2 |W| / |t| and can leave the range of the accumulation type where s does not. A block
// of columns for which that may have happened reads its columns of W again, with u in place of t.
//
// Where t or s themselves come near the end of the range, a block says so, and each layer with such a W is taken again
// by one block, of W times a power of two, between two barriers that there are only then.
#pragma once
#include <cstdint>
#include <cstring>

#include "common.cuh"
#include "lipgan/spectral_norm.h"

namespace lipgan {
namespace cuda {
namespace {

constexpr int kTileRows = 8;  // rows of a thread: v and the barriers are paid once for them
constexpr int kBatch = 4;     // rows loaded at once: 2 blocks of 256 threads ask for 32 KiB, which covers DRAM latency
constexpr int kColumns = kWarp;       // columns of one item of the columns step: one per lane, the warps share the rows
constexpr int64_t kRowBlock = 32768;  // about the elements of one item of the rows step
constexpr int64_t kChunk = 32768;     // elements of one item of the scale step
constexpr int64_t kMaxExtent = int64_t{1} << 30;  // of h and of w: indices inside an item have 32 bits

// Where the steps of an iteration stay in the range of A.
template <typename T>
struct Range {
  static constexpr double fused_t_min = 1e-10;  // |r| >= |t|^2 for a unit v: far from FLT_MIN
  static constexpr double large = 0x1p64;       // of W: below it nothing leaves the range
  static constexpr int largest_power = 120;     // of a unit
};
template <>
struct Range<double> {
  static constexpr double fused_t_min = 1e-120;
  static constexpr double large = 0x1p450;
  static constexpr int largest_power = 1000;
};

// How W lies: [h, w]; [outer, h, inner] with several columns side by side; [w, h].
enum class Order : signed char { rows, slabs, columns };

// One layer as the kernel sees it: the caller's pointers, the layer's place in the workspace, and its first work items.
struct Row {
  SpectralNormFwdLayer layer;
  void* t;         // A [h]
  void* s;         // A [w], in the order of the columns
  void* partials;  // A [row_blocks, w]
  double* t_sums;  // [row_blocks], of t_i^2 (without iterations: of u_i t_i)
  double* s_sums;  // [column_blocks], of s_j^2
  double* mended;  // [2]: the unit, a power of two, that W was multiplied by; then sigma of that, where it is not 1
  int* near_end;   // [1], of the whole group: whether some sum came near the end of its range
  int64_t first_row_block, row_blocks;
  int64_t first_column_block, column_blocks;
  int64_t first_chunk, chunks;
  int w;
  int log2_block_rows;       // rows of a row block
  int log2_column_threads;   // threads that share a row; the others take further rows
  Order order;
  bool gathered;             // v is not in the order of the columns
  bool vector_rows;          // 16-byte loads of rows of W and of v; of columns of W
  bool vector_flat;          // 16-byte loads of W and stores of y, both taken as flat arrays
};

// Rows travel as kernel arguments, which a launch copies: no lifetime of host memory to keep, and graph capture works.
// 4 KiB is the limit that every architecture and driver has.
struct RowsByValue {
  static constexpr int capacity = 20;
  Row rows[capacity];
};
static_assert(sizeof(RowsByValue) + 2 * sizeof(void*) <= 4096, "kernel arguments are limited to 4 KiB");

// Where column m of row 0 lies.
__device__ __forceinline__ int64_t column_at(const SpectralNormFwdLayer& layer, int m) {
  const int inner = static_cast<int>(layer.inner), outer = m / inner;
  return static_cast<int64_t>(outer) * inner * layer.h + (m - outer * inner);
}

// The element of v that belongs to column m, of w columns that lie as [w / channels, channels]. Its inverse is the same
// with w / channels for channels.
__device__ __forceinline__ int index_in_v(int m, int w, int channels) {
  return m % channels * (w / channels) + m / channels;
}

// One block for each row; it also puts the v given into s where they are in different orders.
template <typename T>
__global__ void fill_table_kernel(const __grid_constant__ RowsByValue source, Row* table  // [gridDim.x]
) {
  using A = typename Numeric<T>::A;
  const Row& row = source.rows[blockIdx.x];
  if (threadIdx.x == 0) {
    row.mended[0] = 1;
    if (blockIdx.x == 0) *row.near_end = 0;
    table[blockIdx.x] = row;
  }
  if (!row.gathered) return;
  const int w = row.w, channels = static_cast<int>(row.layer.channels);
  const T* v_in = global<const T>(row.layer.v_in);
  A* s = global<A>(row.s);
#pragma unroll 2
  for (int m = threadIdx.x; m < w; m += kThreads) s[m] = static_cast<A>(v_in[index_in_v(m, w, channels)]);
}

// Calls use(r, V elements of row r) for the kTileRows rows of a thread, zeros standing for those from `rows` on.
template <int V, typename T, typename Use>
__device__ __forceinline__ void for_tile_rows(const T* address, int row_stride, int rows, Use use) {
#pragma unroll
  for (int first = 0; first < kTileRows; first += kBatch) {
    Pack<T, V> x[kBatch] = {};
#pragma unroll
    for (int r = 0; r < kBatch; ++r) {
      if (first + r < rows) x[r] = load<V>(address);
      address += row_stride;
    }
#pragma unroll
    for (int r = 0; r < kBatch; ++r) use(first + r, x[r]);
  }
}

__device__ double block_sum(const double* values, int64_t count) {
  const double* global_values = global<const double>(values);
  double sum = 0;
#pragma unroll 2
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += global_values[i];
  return block_sum(sum);
}

// max(|x|, eps) of a sum of squares. The comparison lets NaN through.
__device__ __forceinline__ double clamped_norm(double sum_of_squares, double eps) {
  const double norm = sqrt(sum_of_squares);
  return norm < eps ? eps : norm;
}

// For one thread: says that a sum of squares (or a product) came near the end of its range, or is not a number. Several
// blocks may say so at once: atomically, since plain stores of them would be a race, even of one value.
template <typename T>
__device__ __forceinline__ void watch(const Row& row, double magnitude) {
  if (!(magnitude <= Numeric<T>::largest * 0x1p-40)) atomicOr(row.near_end, 1);
}

// The layer that a work item belongs to: the last one whose items do not begin after it.
__device__ int find_layer(const Row* table, int num_layers, int64_t Row::*first, int64_t item) {
  int low = 0, high = num_layers - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table[middle].*first <= item) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// The end of a rows step of one block: the sum of the squares of its t, or of u_i t_i.
template <typename T>
__device__ __forceinline__ void sum_rows(const Row& row, int64_t block, int count, bool with_columns) {
  using A = typename Numeric<T>::A;
  const int64_t begin = block << row.log2_block_rows;
  const A* t = global<const A>(row.t) + begin;
  __syncthreads();  // all of t is written
  double sum = 0;
#pragma unroll 2
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const A other = with_columns ? t[i] : static_cast<A>(global<const T>(row.layer.u_in)[begin + i]);
    sum += static_cast<double>(t[i]) * static_cast<double>(other);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    global<double>(row.t_sums)[block] = sum;
    watch<T>(row, with_columns ? sqrt(sum) : fabs(sum));
  }
}

// The shared memory of a rows step: of each thread the partial sums of a pack.
template <typename T>
struct Shared {
  typename Numeric<T>::A at[16 / sizeof(T)][kThreads];
};

// One block of rows: t_i = <W_i, v> for its rows, their sum of squares, and its partial result r = sum_i t_i W_i.
// column_threads threads share a row, each with V columns out of every column_threads * V; kThreads / column_threads
// rows stand side by side, and each thread takes kTileRows of them at once.
template <typename T, int V, bool slabs>
__device__ void row_block(const Row& row, int64_t block, bool first_iteration, bool with_columns, double eps,
                          Shared<T>* shared) {
  using A = typename Numeric<T>::A;
  __shared__ A dots[kWarps][kTileRows];
  auto& columns = shared->at;

  // 32-bit indices: h and w fit, by the launcher's check, and registers are short.
  const int w = row.w, inner = slabs ? static_cast<int>(row.layer.inner) : w;
  const int64_t begin = block << row.log2_block_rows;
  const int count = static_cast<int>(min(row.layer.h - begin, int64_t{1} << row.log2_block_rows));
  const T* weight = global<const T>(row.layer.weight) + begin * inner;
  const T* v_in = global<const T>(row.layer.v_in);
  const A* s = global<const A>(row.s);
  A* t_out = global<A>(row.t) + begin;
  A* partial = global<A>(row.partials) + block * w;

  const int column_threads = 1 << row.log2_column_threads;
  const int column_thread = threadIdx.x & (column_threads - 1);
  const int log2_side_by_side = kLog2Threads - row.log2_column_threads;
  const int side_by_side = 1 << log2_side_by_side;
  const int side = threadIdx.x >> row.log2_column_threads;
  const int row_stride = side_by_side * inner;  // fits: w > kThreads * V / 2 has no rows side by side
  const int step = V << row.log2_column_threads;

  const A s_scale = first_iteration ? A(1) : A(1 / clamped_norm(block_sum(row.s_sums, row.column_blocks), eps));
#pragma unroll 1
  for (int tile = 0; tile < count; tile += kTileRows * side_by_side) {
    const T* tile_weight = weight + static_cast<int64_t>(tile + side) * inner;
    // Of this thread's rows, those that exist: the r with r < rows.
    const int rows = (count - tile - side + side_by_side - 1) >> log2_side_by_side;
    A t[kTileRows] = {};
#pragma unroll 1
    for (int j = column_thread * V; j < w; j += step) {
      Pack<A, V> v;
      if (first_iteration && !row.gathered) {
        const Pack<T, V> stored = load<V>(v_in + j);
#pragma unroll
        for (int k = 0; k < V; ++k) v.at[k] = static_cast<A>(stored.at[k]);
      } else {
        v = load<V>(s + j);
#pragma unroll
        for (int k = 0; k < V; ++k) v.at[k] *= s_scale;
      }
      const T* column = tile_weight + (slabs ? column_at(row.layer, j) : j);
      for_tile_rows<V>(column, row_stride, rows, [&](int r, const Pack<T, V>& x) {
#pragma unroll
        for (int k = 0; k < V; ++k) t[r] += static_cast<A>(x.at[k]) * v.at[k];
      });
    }
    lane_sums(t, 1, min(column_threads, kWarp));
    if (column_threads > kWarp) {
      __syncthreads();  // the readers of the previous tile are done
      if (threadIdx.x % kWarp == 0) {
#pragma unroll
        for (int r = 0; r < kTileRows; ++r) dots[threadIdx.x / kWarp][r] = t[r];
      }
      __syncthreads();
      const int first_warp = side * (column_threads / kWarp);
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) t[r] = 0;
#pragma unroll 1
      for (int i = 0; i < column_threads / kWarp; ++i) {
#pragma unroll
        for (int r = 0; r < kTileRows; ++r) t[r] += dots[first_warp + i][r];
      }
    }
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      if (r >= rows) {
        t[r] = 0;
      } else if (column_thread == 0) {
        t_out[tile + side + r * side_by_side] = t[r];
      }
    }
    if (!with_columns) continue;

    // Every thread goes through the loop alike, because of the barriers in it.
#pragma unroll 1
    for (int j_first = 0; j_first < w; j_first += step) {
      const int j = j_first + column_thread * V;
      Pack<A, V> r_sum = {};
      if (j < w) {
        const T* column = tile_weight + (slabs ? column_at(row.layer, j) : j);
        for_tile_rows<V>(column, row_stride, rows, [&](int r, const Pack<T, V>& x) {
#pragma unroll
          for (int k = 0; k < V; ++k) r_sum.at[k] += t[r] * static_cast<A>(x.at[k]);
        });
      }
      if (side_by_side > 1) {
        lane_sums(r_sum.at, column_threads, kWarp);
        __syncthreads();  // the readers of the previous tile are done
#pragma unroll
        for (int k = 0; k < V; ++k) columns[k][threadIdx.x] = r_sum.at[k];
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x + max(column_threads, kWarp); i < kThreads; i += max(column_threads, kWarp)) {
#pragma unroll
          for (int k = 0; k < V; ++k) r_sum.at[k] += columns[k][i];
        }
      }
      // The same thread adds to the same columns for every tile.
      if (side == 0 && j < w) {
        if (tile > 0) {
          const Pack<A, V> before = load<V>(partial + j);
#pragma unroll
          for (int k = 0; k < V; ++k) r_sum.at[k] += before.at[k];
        }
        store<V>(partial + j, r_sum);
      }
    }
  }
  sum_rows<T>(row, block, count, with_columns);
}

// The same of a W that lies as [w, h]. row_threads threads stand along the rows, each with V of them, so that a warp reads
// runs of row_threads * V numbers; the other threads take further columns.
template <typename T, int V>
__device__ void row_block_of_columns(const Row& row, int64_t block, bool first_iteration, bool with_columns, double eps,
                                     Shared<T>* shared) {
  using A = typename Numeric<T>::A;
  auto& parts = shared->at;

  const int w = row.w;
  const int64_t h = row.layer.h, begin = block << row.log2_block_rows;
  const int count = static_cast<int>(min(h - begin, int64_t{1} << row.log2_block_rows));
  const T* weight = global<const T>(row.layer.weight) + begin;
  const T* v_in = global<const T>(row.layer.v_in);
  const A* s = global<const A>(row.s);
  A* t_out = global<A>(row.t) + begin;
  A* partial = global<A>(row.partials) + block * w;

  const int log2_row_threads = kLog2Threads - row.log2_column_threads;
  const int row_threads = 1 << log2_row_threads;  // kWarp at most
  const int row_thread = threadIdx.x & (row_threads - 1);
  const int column_thread = threadIdx.x >> log2_row_threads;
  const int column_threads = 1 << row.log2_column_threads;
  const int step = kBatch << row.log2_column_threads;

  const A s_scale = first_iteration ? A(1) : A(1 / clamped_norm(block_sum(row.s_sums, row.column_blocks), eps));
#pragma unroll 1
  for (int tile = 0; tile < count; tile += row_threads * V) {
    const int i = tile + row_thread * V;  // a pack lies within the rows or beyond them
    const bool exists = i < count;
    const T* rows = weight + i;
    A t[V] = {};
    // Several columns at once, as for_tile_rows has several rows.
    const auto load_columns = [&](int j, Pack<T, V>(&x)[kBatch]) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (exists && j + b * column_threads < w) x[b] = load<V>(rows + (j + b * column_threads) * h);
      }
    };
#pragma unroll 1
    for (int j = column_thread; j < w; j += step) {
      Pack<T, V> x[kBatch] = {};
      load_columns(j, x);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int column = min(j + b * column_threads, w - 1);
        const A v = first_iteration && !row.gathered ? static_cast<A>(v_in[column]) : s[column] * s_scale;
#pragma unroll
        for (int k = 0; k < V; ++k) t[k] += static_cast<A>(x[b].at[k]) * v;
      }
    }
    lane_sums(t, row_threads, kWarp);
    __syncthreads();  // the readers of the previous tile are done
#pragma unroll
    for (int k = 0; k < V; ++k) parts[k][threadIdx.x] = t[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < V; ++k) {
      t[k] = 0;
#pragma unroll 1
      for (int lane = threadIdx.x % kWarp; lane < kThreads; lane += kWarp) t[k] += parts[k][lane];
      if (!exists) {
        t[k] = 0;
      } else if (column_thread == 0) {
        t_out[i + k] = t[k];
      }
    }
    if (!with_columns) continue;

    // Every thread goes through the loop alike, because of the shuffles in it.
#pragma unroll 1
    for (int j_first = 0; j_first < w; j_first += step) {
      const int j = j_first + column_thread;
      Pack<T, V> x[kBatch] = {};
      load_columns(j, x);
      A r_sum[kBatch] = {};
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
#pragma unroll
        for (int k = 0; k < V; ++k) r_sum[b] += t[k] * static_cast<A>(x[b].at[k]);
      }
      lane_sums(r_sum, 1, row_threads);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int column = j + b * column_threads;
        // The same thread adds to the same columns for every tile.
        if (row_thread == 0 && column < w) partial[column] = tile > 0 ? partial[column] + r_sum[b] : r_sum[b];
      }
    }
  }
  sum_rows<T>(row, block, count, with_columns);
}

// kColumns columns of s = W^T t / max(|t|, eps), and their sum of squares.
template <typename T>
__device__ void column_block(const Row& row, int64_t block, double eps) {
  using A = typename Numeric<T>::A;
  __shared__ A columns[kWarps][kColumns];

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t h = row.layer.h, w = row.w;
  const int64_t j = block * kColumns + lane;
  const double t_square = block_sum(row.t_sums, row.row_blocks);
  const A t_scale = A(1 / clamped_norm(t_square, eps));

  // Called by all threads: the sum over the warps, for every warp. A barrier between the readers of one sum and the
  // next call is the caller's part: block_sum and __syncthreads_or have one.
  const auto sum_warps = [&](A value) {
    columns[warp][lane] = value;
    __syncthreads();
    A sum = 0;
    for (int i = 0; i < kWarps; ++i) sum += columns[i][lane];
    return sum;
  };

  A s = 0;
  if (j < w) {
    const A* partials = global<const A>(row.partials) + j;
#pragma unroll 4
    for (int64_t i = warp; i < row.row_blocks; i += kWarps) s += partials[i * w];
  }
  s = sum_warps(s) * t_scale;

  // A NaN takes this way too, and stays one. t_square 0 is exact: s is 0.
  const bool t_in_range = t_square == 0 || sqrt(t_square) >= Range<T>::fused_t_min;
  const bool in_range = t_in_range && fabs(s) <= A(Numeric<T>::largest);
  if (__syncthreads_or(!in_range)) {
    s = 0;
    if (j < w) {
      const T* weight = global<const T>(row.layer.weight) + column_at(row.layer, static_cast<int>(j));
      const int64_t inner = row.layer.inner;
      const A* t = global<const A>(row.t);
#pragma unroll 4
      for (int64_t i = warp; i < h; i += kWarps) s += t[i] * t_scale * static_cast<A>(weight[i * inner]);
    }
    s = sum_warps(s);
  }
  if (warp == 0) {
    if (j < w) global<A>(row.s)[j] = s;
    const double sum = warp_sum(static_cast<double>(s) * static_cast<double>(s));
    if (lane == 0) {
      global<double>(row.s_sums)[block] = sum;
      watch<T>(row, sqrt(sum));
    }
  }
}

// The whole iteration of a layer with a large W, by one block: of W times a power of two, with sums in double. Leaves u
// in t and v in s. A W that is not finite stays as it is. What a block shares over one layer is read before the barriers
// that the next one has before it writes that again.
template <typename T>
__device__ void mend(const Row& row, int64_t n_power_iterations, double eps) {
  using A = typename Numeric<T>::A;
  __shared__ double parts[kThreads];

  const int h = static_cast<int>(row.layer.h), w = row.w, channels = static_cast<int>(row.layer.channels);
  const T* weight = global<const T>(row.layer.weight);
  A *t = global<A>(row.t), *s = global<A>(row.s);
  double largest = 0;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < int64_t{h} * w; i += kThreads) {
    const double size = fabs(static_cast<double>(static_cast<A>(weight[i])));
    largest = size > largest || size != size ? size : largest;  // a NaN stays
  }
  parts[threadIdx.x] = largest;
  __syncthreads();
#pragma unroll 1
  for (int i = 0; i < kThreads; ++i) largest = parts[i] > largest || parts[i] != parts[i] ? parts[i] : largest;
  __syncthreads();
  if (!(largest > Range<T>::large && largest <= Numeric<T>::largest)) return;

  const double unit = scalbn(1.0, -min(ilogb(largest), Range<T>::largest_power));
  eps = fmax(eps * unit, DBL_MIN);
#pragma unroll 1
  for (int j = threadIdx.x; j < w; j += kThreads) {
    s[j] = static_cast<A>(global<const T>(row.layer.v_in)[index_in_v(j, w, channels)]);
  }
  __syncthreads();
  // out = W x, or W^T x, and the sum of squares.
  const auto product = [&](bool transposed, A* out, int count, const A* x, int depth) {
    double square = 0;
#pragma unroll 1
    for (int k = threadIdx.x; k < count; k += kThreads) {
      double sum = 0;
#pragma unroll 1
      for (int l = 0; l < depth; ++l) {
        const int64_t at = column_at(row.layer, transposed ? k : l) + (transposed ? l : k) * row.layer.inner;
        const double entry = static_cast<double>(static_cast<A>(weight[at]));
        sum += entry * unit * static_cast<double>(x[l]);
      }
      out[k] = static_cast<A>(sum);
      square += sum * sum;
    }
    return block_sum(square);
  };
  const auto divide = [&](A* x, int count, double norm) {
#pragma unroll 1
    for (int k = threadIdx.x; k < count; k += kThreads) x[k] = static_cast<A>(static_cast<double>(x[k]) / norm);
    __syncthreads();
  };
  double sigma = 0;
  if (n_power_iterations == 0) {
    product(false, t, h, s, w);
    double sum = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < h; i += kThreads) {
      sum += static_cast<double>(static_cast<A>(global<const T>(row.layer.u_in)[i])) * static_cast<double>(t[i]);
    }
    sigma = block_sum(sum);
  }
#pragma unroll 1
  for (int64_t iteration = 0; iteration < n_power_iterations; ++iteration) {
    divide(t, h, clamped_norm(product(false, t, h, s, w), eps));
    const double square = product(true, s, w, t, h), norm = clamped_norm(square, eps);
    sigma = square / norm;
    divide(s, w, norm);
  }
  if (threadIdx.x == 0) {
    row.mended[0] = unit;
    row.mended[1] = sigma;
  }
}

// Y = W / sigma for kChunk elements, this chunk's share of u and v, and the first chunk's sigma.
template <typename T>
__device__ void scale_chunk(const Row& row, int64_t chunk, bool iterated, double eps,
                            typename Numeric<T>::A* sigma_out) {
  using A = typename Numeric<T>::A;
  constexpr int V = 16 / sizeof(T);

  const SpectralNormFwdLayer& layer = row.layer;
  const int64_t h = layer.h, w = row.w;
  const double t_sum = block_sum(row.t_sums, row.row_blocks);
  const double s_sum = iterated ? block_sum(row.s_sums, row.column_blocks) : 0;
  const double s_norm = clamped_norm(s_sum, eps);
  const double* mended = global<const double>(row.mended);
  A unit = A(mended[0]);
  const bool is_mended = unit != A(1);
  // t_sum is u^T W v where nothing was iterated. That of W times the unit may have a number where that of W has none.
  const A scaled_sigma = is_mended ? A(mended[1]) : iterated ? A(s_sum / s_norm) : A(t_sum);
  const A sigma = scaled_sigma / unit;
  // Not sigma >= ..., which would take a NaN for 0.
  const bool is_zero = fabs(sigma) < A(Numeric<T>::smallest_normal);
  const A scale = is_zero ? A(1) : A(1) / scaled_sigma;
  if (is_zero) unit = A(1);
  if (chunk == 0 && threadIdx.x == 0) *sigma_out = sigma;

  const A t_scale = is_mended ? A(1) : A(1 / clamped_norm(t_sum, eps)), s_scale = is_mended ? A(1) : A(1 / s_norm);
  const int64_t first = chunk * kThreads + threadIdx.x, stride = row.chunks * kThreads;
#pragma unroll 2
  for (int64_t i = first; i < h; i += stride) {
    global<T>(layer.u)[i] =
        iterated ? static_cast<T>(global<const A>(row.t)[i] * t_scale) : global<const T>(layer.u_in)[i];
  }
#pragma unroll 2
  for (int64_t j = first; j < w; j += stride) {
    int64_t column = j;
    if (row.gathered) column = index_in_v(static_cast<int>(j), row.w, row.w / static_cast<int>(layer.channels));
    global<T>(layer.v)[j] =
        iterated ? static_cast<T>(global<const A>(row.s)[column] * s_scale) : global<const T>(layer.v_in)[j];
  }

  const T* weight = global<const T>(layer.weight);
  T* y = global<T>(layer.y);
  const int64_t begin = chunk * kChunk, end = min(h * w, begin + kChunk);
  const int64_t vector_end = row.vector_flat ? end / V * V : begin;  // kChunk is a multiple of V
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x * V; i < vector_end; i += kThreads * V) {
    Pack<T, V> x = load<V>(weight + i);
#pragma unroll
    for (int k = 0; k < V; ++k) x.at[k] = static_cast<T>(static_cast<A>(x.at[k]) * unit * scale);
    store<V>(y + i, x);
  }
#pragma unroll 4
  for (int64_t i = vector_end + threadIdx.x; i < end; i += kThreads) {
    y[i] = static_cast<T>(static_cast<A>(weight[i]) * unit * scale);
  }
}

// Two blocks on a multiprocessor: while one waits at a barrier the other keeps the memory busy.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    spectral_norm_fwd_kernel(const Row* table,  // [num_layers]
                             int num_layers, int64_t row_blocks, int64_t column_blocks, int64_t chunks,
                             typename Numeric<T>::A* sigma,  // [num_layers]
                             int64_t n_power_iterations, double eps) {
  const cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  constexpr int V = 16 / sizeof(T);
  __shared__ Shared<T> shared;
  const bool iterated = n_power_iterations > 0;

  int64_t iteration = 0;
  do {
    for (int64_t item = blockIdx.x; item < row_blocks; item += gridDim.x) {
      const Row& row = table[find_layer(table, num_layers, &Row::first_row_block, item)];
      const int64_t block = item - row.first_row_block;
      const bool first = iteration == 0;
      if (row.order == Order::rows) {
        if (row.vector_rows) {
          row_block<T, V, false>(row, block, first, iterated, eps, &shared);
        } else {
          row_block<T, 1, false>(row, block, first, iterated, eps, &shared);
        }
      } else if (row.order == Order::slabs) {
        if (row.vector_rows) {
          row_block<T, V, true>(row, block, first, iterated, eps, &shared);
        } else {
          row_block<T, 1, true>(row, block, first, iterated, eps, &shared);
        }
      } else if (row.vector_rows) {
        row_block_of_columns<T, V>(row, block, first, iterated, eps, &shared);
      } else {
        row_block_of_columns<T, 1>(row, block, first, iterated, eps, &shared);
      }
    }
    grid.sync();
    if (!iterated) break;
    for (int64_t item = blockIdx.x; item < column_blocks; item += gridDim.x) {
      const Row& row = table[find_layer(table, num_layers, &Row::first_column_block, item)];
      column_block<T>(row, item - row.first_column_block, eps);
    }
    grid.sync();
  } while (++iteration < n_power_iterations);

  if (*static_cast<volatile int*>(table[0].near_end)) {  // the same answer for every block
    for (int l = static_cast<int>(blockIdx.x); l < num_layers; l += static_cast<int>(gridDim.x)) {
      mend<T>(table[l], n_power_iterations, eps);
    }
    grid.sync();
  }

  // From the last layer backwards: what the rows step read last is what the L2 cache still holds.
  for (int64_t item = chunks - 1 - blockIdx.x; item >= 0; item -= gridDim.x) {
    const int l = find_layer(table, num_layers, &Row::first_chunk, item);
    scale_chunk<T>(table[l], item - table[l].first_chunk, iterated, eps, sigma + l);
  }
}

}  // namespace
}  // namespace cuda
}  // namespace lipgan
