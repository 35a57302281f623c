// gradient_penalty on CUDA: norms, penalty and cotangent in one cooperative launch. Formulas: lipgan/gradient_penalty.h.
//
//   measure   each item: the norms of its rows or columns, or the sum of squares of its part of a long row; what its
//             norms give to the penalty. Where a norm lies with one item and is all that its cotangent needs, the
//             cotangent, while the item is in the caches.
//   join      long rows: the norm of each row from those of its parts
//   finish    "max" and long rows: the cotangent, from the last item backwards, since what was read last is what the
//             caches still hold. The penalty, by one block.
//
// with grid-wide barriers in between: two for long rows, one for all else. A cooperative launch, not a ticket that the last
// block takes: the maximum, and the norm of a row that lies with several blocks, are needed by all blocks, which only a
// barrier gives them within a launch; and between launches there is no state, for each stream and graph, that would have
// to be kept, and to be right after a launch that did not end.
//
// The division into items and the order of every sum depend on the shape, dtype and alignment alone, so that the result
// is the same bits on any number of blocks. (Maxima and their ties are exact in any order.)
//
// Squares are summed in double: those of narrower types are exact there, and none leaves its range. Those of double may:
// x is then s times a ratio, with s the power of two at the largest |x_i|, and |x|^2 = s^2 q. See Square.
#pragma once
#include <cstdint>
#include <cstring>

#include "common.cuh"
#include "lipgan/gradient_penalty.h"

namespace lipgan {
namespace cuda {
namespace {

constexpr int kLog2SmallestPart = 12;  // of a long row: 16 KiB of float32
constexpr int kLog2LargestPart = 15;
constexpr int64_t kItemsWanted = 1024;          // at most, of rows and columns: one block adds up what they give
constexpr int64_t kLongestRow = 65536;          // bytes in float32 or float64 of a row that stays with one block
constexpr int64_t kLongestRowOfWarp = 1024;     // packs of a row that a warp may take where there are many rows
constexpr int64_t kManyRows = 2048;             // enough for all warps of a GPU, about
constexpr int64_t kColumnOfThread = 16;         // numbers of a column that a thread takes before others share it
constexpr int kLog2MostSharing = 3;             // threads of a column: 8 warps with 32 columns each
constexpr int kAtOnce = 4;  // packs that a thread asks for at once: 2 blocks ask for 32 KiB, which covers DRAM latency

// How the norms lie in memory.
enum class Lying : int { rows, long_rows, columns };

// The arguments of a launch.
struct PenaltyCall {
  const void* grads;  // T [outer, length, inner]
  void* penalty;      // A []
  void* norms;        // A [count]
  void* cotangent;    // T [outer, length, inner]
  double* given;      // [2, items]: what the norms of an item give; or (q, s) of parts of rows, [2, outer, parts]
  double* wide;       // [outer], the norms of long rows in double
  int64_t count;      // of norms
  int64_t length, inner;
  int64_t items;
  int64_t per_item;   // norms; of long rows, numbers
  int64_t parts;      // of a long row
  double scale;       // weight / count, or weight for "max"
  double target;
  PenaltyKind kind;
  int log2_threads;   // that share a row, or a column
  bool vector;        // 16-byte accesses of rows
};

// ---- numbers ----

// a / b of numbers up to `most`: 64 bits are divided by many instructions.
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b, int64_t most) {
  return most <= UINT32_MAX ? static_cast<uint32_t>(a) / static_cast<uint32_t>(b) : a / b;
}

// For x >= 0 the power of two s with s <= x < 2 s. Both s and 1 / s stay normal: s is the smallest normal number for what
// is below it, and half of the largest power of two from that power on.
__device__ __forceinline__ float power_of_2(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  bits = min(max(bits >> 23, 1), 253) << 23;
  memcpy(&x, &bits, sizeof(bits));
  return x;
}
__device__ __forceinline__ double power_of_2(double x) {
  int64_t bits;
  memcpy(&bits, &x, sizeof(bits));
  bits = min(max(bits >> 52, int64_t{1}), int64_t{2045}) << 52;
  memcpy(&x, &bits, sizeof(bits));
  return x;
}

// s^2 q. Only of double s is something else than 1, and only where a plain sum comes near an end of the range: what is
// lost of a sum above `least` to underflow is below its last digit, and 2^40 sums below `most` are in the range.
struct Square {
  double q, s;
  static constexpr double least = 1e-280, most = 1e290;

  __device__ static bool plain(double sum) { return sum >= least && sum <= most; }  // 0 may be what underflow left
  __device__ double norm() const { return s * sqrt(q); }
};

__device__ __forceinline__ bool is_greater(double a, double b) { return a > b || a != a; }  // a NaN is the greatest

// The largest norm, and how many have it.
struct Top {
  double norm, ties;

  __device__ void add(double other, double others) {
    if (is_greater(other, norm)) {
      norm = other;
      ties = others;
    } else if (other == norm) {
      ties += others;
    }
  }
};
constexpr double kNone = -1;  // less than any norm

// Of the block, for every thread.
__device__ Top block_top(Top top) {
  __shared__ double norms[kThreads], ties[kThreads];
  __syncthreads();  // the readers of the previous maximum are done
  norms[threadIdx.x] = top.norm;
  ties[threadIdx.x] = top.ties;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) {
      top.add(norms[threadIdx.x + half], ties[threadIdx.x + half]);
      norms[threadIdx.x] = top.norm;
      ties[threadIdx.x] = top.ties;
    }
    __syncthreads();
  }
  return {norms[0], ties[0]};
}

__device__ double block_max(double value) { return block_top({value, 0}).norm; }

// ---- what a norm gives ----

// n - target, or max(0, n - target); a NaN stays one.
__device__ __forceinline__ double distance(const PenaltyCall& call, double n) {
  const double d = n - call.target;
  return call.kind == PenaltyKind::one_sided && d <= 0 ? 0 : d;
}

__device__ __forceinline__ double phi(const PenaltyCall& call, double n) {
  if (call.kind == PenaltyKind::squared) return 0.5 * call.scale * n * n;
  const double d = distance(call, n);
  return call.scale * d * d;
}

// The cotangent of g is (g inverse) slope, where the inverse, a power of two, brings g to the size of 1. It is 0 where the
// slope is, but for squared, which takes g as it is.
template <typename A>
struct Factors {
  A inverse, slope;
};

template <typename A>
__device__ __forceinline__ Factors<A> factors_of(double n, double slope) {
  if (A(n) < A(Numeric<A>::smallest_normal)) return {A(1), A(0)};
  const A inverse = A(1) / power_of_2(A(n));
  return {inverse, A(slope / (n * static_cast<double>(inverse)))};
}

template <typename A>
__device__ __forceinline__ Factors<A> factors(const PenaltyCall& call, double n) {
  if (call.kind == PenaltyKind::squared) return {A(1), A(call.scale)};
  return factors_of<A>(n, 2 * call.scale * distance(call, n));
}

// Norms are compared as they are returned. NaN are the maximum wherever there are some.
template <typename A>
__device__ __forceinline__ Factors<A> factors(const PenaltyCall& call, double n, const Top& top) {
  const bool attains = n == top.norm || n != n;
  return factors_of<A>(n, attains ? 2 * call.scale / top.ties * (top.norm - call.target) : 0.0);
}

// ---- walks over memory ----

// The threads of a row, of a part of one or of a column walk over it by packs: `first` is where a thread begins, `step` how
// far all of them come at once. use(where, pack) may write where no one reads: loads go before it, kAtOnce at a time.
template <int V, typename T, typename Use>
__device__ __forceinline__ void walk(const T* x, int64_t first, int64_t end, int64_t step, Use use) {
  int64_t j = first;
#pragma unroll 1
  for (; j + (kAtOnce - 1) * step < end; j += kAtOnce * step) {
    Pack<T, V> packs[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) packs[i] = load<V>(x + j + i * step);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) use(j + i * step, packs[i]);
  }
#pragma unroll 1
  for (; j < end; j += step) use(j, load<V>(x + j));
}

template <int V, typename T>
__device__ __forceinline__ double squares(const T* x, int64_t first, int64_t end, int64_t step, double inverse = 1) {
  double sums[V] = {};
  walk<V>(x, first, end, step, [&](int64_t, const Pack<T, V>& pack) {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const double value = static_cast<double>(static_cast<typename Numeric<T>::A>(pack.at[k])) * inverse;
      sums[k] += value * value;
    }
  });
  double sum = 0;
#pragma unroll
  for (int k = 0; k < V; ++k) sum += sums[k];
  return sum;
}

template <int V, typename T>
__device__ __forceinline__ double largest(const T* x, int64_t first, int64_t end, int64_t step) {
  double found = 0;
  walk<V>(x, first, end, step, [&](int64_t, const Pack<T, V>& pack) {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const double value = fabs(static_cast<double>(static_cast<typename Numeric<T>::A>(pack.at[k])));
      found = value > found ? value : found;  // passes NaN over, which the squares find
    }
  });
  return found;
}

template <int V, typename T, typename A>
__device__ __forceinline__ void write(const T* x, T* y, int64_t first, int64_t end, int64_t step,
                                      const Factors<A>& factors) {
  if (factors.slope == 0) {  // all are finite: a norm on its target, below it, or not the maximum
    for (int64_t j = first; j < end; j += step) store<V>(y + j, Pack<T, V>{});
    return;
  }
  walk<V>(x, first, end, step, [&](int64_t j, Pack<T, V> pack) {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      pack.at[k] = static_cast<T>(static_cast<A>(pack.at[k]) * factors.inverse * factors.slope);
    }
    store<V>(y + j, pack);
  });
}

// ---- rows ----

// A sum, or a maximum, over the threads that share a row; for all of them.
__device__ __forceinline__ double row_sum(double value, int log2_threads) {
  if (log2_threads == kLog2Threads) return block_sum(value);
  double values[1] = {value};
  lane_sums(values, 1, 1 << log2_threads);
  return values[0];
}
__device__ __forceinline__ double row_max(double value, int log2_threads) {
  if (log2_threads == kLog2Threads) return block_max(value);
#pragma unroll 1
  for (int offset = 1; offset < 1 << log2_threads; offset *= 2) {
    value = max(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  return value;
}

// Of numbers that the threads of a row, or of a part of one, share. All threads of the block come here.
template <int V, typename T>
__device__ __forceinline__ Square square_of(const T* x, int64_t first, int64_t end, int64_t step, int log2_threads) {
  Square square{row_sum(squares<V>(x, first, end, step), log2_threads), 1};
  if constexpr (sizeof(T) == sizeof(double)) {
    if (__syncthreads_or(end > 0 && !Square::plain(square.q))) {  // of any row of the block: its threads go together
      const double s = power_of_2(row_max(largest<V>(x, first, end, step), log2_threads));
      const double q = row_sum(squares<V>(x, first, end, step, 1 / s), log2_threads);
      if (!Square::plain(square.q)) square = {q, s};
    }
  }
  return square;
}

// What the norms of the threads of a block give to the penalty, each thread having added up its own.
__device__ __forceinline__ void put_given(const PenaltyCall& call, int64_t item, double sum, const Top& top) {
  double* given = global<double>(call.given);
  if (call.kind == PenaltyKind::max) {
    const Top all = block_top(top);
    if (threadIdx.x == 0) {
      given[item] = all.norm;
      given[call.items + item] = all.ties;
    }
  } else {
    sum = block_sum(sum);
    if (threadIdx.x == 0) given[item] = sum;
  }
}

// Calls use(row, whether there is such a row, its first number, the thread's place in it, the step) for the rows of an
// item; all threads of the block go through them together.
template <int V, typename Use>
__device__ __forceinline__ void for_rows(const PenaltyCall& call, int64_t item, Use use) {
  const int threads = 1 << call.log2_threads, side_by_side = kThreads >> call.log2_threads;
  const int place = static_cast<int>(threadIdx.x) & (threads - 1);
  const int side = static_cast<int>(threadIdx.x) >> call.log2_threads;
  const int64_t end = min(call.count, (item + 1) * call.per_item);
  for (int64_t base = item * call.per_item; base < end; base += side_by_side) {
    const int64_t row = base + side;
    use(row, row < end, static_cast<int64_t>(place) * V, static_cast<int64_t>(threads) * V);
  }
}

template <int V, typename T>
__device__ __forceinline__ void measure_rows(const PenaltyCall& call, int64_t item) {
  using A = typename Numeric<T>::A;
  const T* grads = global<const T>(call.grads);
  T* cotangent = global<T>(call.cotangent);
  A* norms = global<A>(call.norms);
  double sum = 0;
  Top top{kNone, 0};
  for_rows<V>(call, item, [&](int64_t row, bool exists, int64_t first, int64_t step) {
    const int64_t end = exists ? call.length : 0, begin = row * call.length;
    const double n = square_of<V>(grads + begin, first, end, step, call.log2_threads).norm();
    if (exists && first == 0) {
      norms[row] = A(n);
      if (call.kind == PenaltyKind::max) {
        top.add(static_cast<double>(A(n)), 1);
      } else {
        sum += phi(call, n);
      }
    }
    if (call.kind != PenaltyKind::max) {
      write<V>(grads + begin, cotangent + begin, first, end, step, factors<A>(call, n));
    }
  });
  put_given(call, item, sum, top);
}

template <int V, typename T>
__device__ __forceinline__ void finish_rows(const PenaltyCall& call, int64_t item, const Top& top) {
  using A = typename Numeric<T>::A;
  const T* grads = global<const T>(call.grads);
  T* cotangent = global<T>(call.cotangent);
  const A* norms = global<const A>(call.norms);
  for_rows<V>(call, item, [&](int64_t row, bool exists, int64_t first, int64_t step) {
    if (!exists) return;
    const int64_t begin = row * call.length;
    const auto factor = factors<A>(call, static_cast<double>(norms[row]), top);
    write<V>(grads + begin, cotangent + begin, first, call.length, step, factor);
  });
}

// ---- long rows: an item is a part of one ----

template <int V, typename T>
__device__ __forceinline__ void measure_part(const PenaltyCall& call, int64_t item) {
  const int64_t begin = item % call.parts * call.per_item, row = item / call.parts;
  const T* x = global<const T>(call.grads) + row * call.length + begin;
  const int64_t end = min(call.per_item, call.length - begin);
  const Square square = square_of<V>(x, static_cast<int64_t>(threadIdx.x) * V, end, kThreads * V, kLog2Threads);
  if (threadIdx.x == 0) {
    global<double>(call.given)[item] = square.q;
    global<double>(call.given)[call.items + item] = square.s;
  }
}

template <typename T>
__device__ __forceinline__ void join_row(const PenaltyCall& call, int64_t row) {
  using A = typename Numeric<T>::A;
  const double* q = global<const double>(call.given) + row * call.parts;
  const double* s = q + call.items;
  double unit = 1;
  if constexpr (sizeof(T) == sizeof(double)) {
    double most = 0;
    for (int64_t i = threadIdx.x; i < call.parts; i += kThreads) {
      if (q[i] != 0 && s[i] > most) most = s[i];
    }
    most = block_max(most);
    if (most > 0) unit = most;
  }
  double sum = 0;
  for (int64_t i = threadIdx.x; i < call.parts; i += kThreads) {
    double ratio = 1;
    if constexpr (sizeof(T) == sizeof(double)) ratio = q[i] == 0 ? 0 : s[i] / unit;
    sum += ratio * ratio * q[i];
  }
  const double n = Square{block_sum(sum), unit}.norm();
  if (threadIdx.x == 0) {
    global<double>(call.wide)[row] = n;
    global<A>(call.norms)[row] = A(n);
  }
}

template <int V, typename T>
__device__ __forceinline__ void finish_part(const PenaltyCall& call, int64_t item, const Top& top) {
  using A = typename Numeric<T>::A;
  const int64_t begin = item % call.parts * call.per_item, row = item / call.parts;
  const int64_t offset = row * call.length + begin, end = min(call.per_item, call.length - begin);
  const auto factor = call.kind == PenaltyKind::max
                          ? factors<A>(call, static_cast<double>(global<const A>(call.norms)[row]), top)
                          : factors<A>(call, global<const double>(call.wide)[row]);
  write<V>(global<const T>(call.grads) + offset, global<T>(call.cotangent) + offset,
           static_cast<int64_t>(threadIdx.x) * V, end, kThreads * V, factor);
}

// ---- columns ----

// Of a column the threads of a block whose numbers agree in the lower bits take every so many numbers.
struct Column {
  int64_t index;             // of the norm
  bool exists, leads;        // there is such a column; the thread is the first of it
  int64_t offset;            // of the column's first number
  int64_t first, end, step;  // of the thread's walk from there
};

// Calls use(column) for the columns of an item; all threads of the block go through them together.
template <typename Use>
__device__ __forceinline__ void for_columns(const PenaltyCall& call, int64_t item, Use use) {
  const int columns = kThreads >> call.log2_threads;
  const int64_t end = min(call.count, (item + 1) * call.per_item);
  for (int64_t base = item * call.per_item; base < end; base += columns) {
    const int64_t index = base + (static_cast<int>(threadIdx.x) & (columns - 1));
    const int64_t matrix = quotient(index, call.inner, call.count + kThreads);
    const int64_t offset = matrix * call.length * call.inner + (index - matrix * call.inner);
    const int share = static_cast<int>(threadIdx.x) >> (kLog2Threads - call.log2_threads);
    const bool exists = index < end;
    use(Column{index, exists, share == 0, offset, share * call.inner, exists ? call.length * call.inner : 0,
               call.inner << call.log2_threads});
  }
}

// A sum, or a maximum, over the threads that share a column; for all of them. All threads of the block come here.
template <typename Join>
__device__ __forceinline__ double column_joined(double value, int log2_threads, Join join) {
  __shared__ double values[kThreads];
  if (log2_threads == 0) return value;
  const int columns = kThreads >> log2_threads;
  __syncthreads();  // the readers of the previous columns are done
  values[threadIdx.x] = value;
  __syncthreads();
  const int own = static_cast<int>(threadIdx.x) & (columns - 1);
  double joined = values[own];
#pragma unroll 1
  for (int i = own + columns; i < kThreads; i += columns) joined = join(joined, values[i]);
  return joined;
}

template <typename T>
__device__ __forceinline__ Square square_of(const PenaltyCall& call, const Column& column) {
  const T* x = global<const T>(call.grads) + column.offset;
  const auto sum = [](double a, double b) { return a + b; };
  const auto sum_of_squares = [&](double inverse) {
    return column_joined(squares<1>(x, column.first, column.end, column.step, inverse), call.log2_threads, sum);
  };
  Square square{sum_of_squares(1), 1};
  if constexpr (sizeof(T) == sizeof(double)) {
    if (__syncthreads_or(column.exists && !Square::plain(square.q))) {
      const double most = column_joined(largest<1>(x, column.first, column.end, column.step), call.log2_threads,
                                        [](double a, double b) { return max(a, b); });
      const double s = power_of_2(most), q = sum_of_squares(1 / s);
      if (!Square::plain(square.q)) square = {q, s};
    }
  }
  return square;
}

template <typename T, typename A>
__device__ __forceinline__ void write_column(const PenaltyCall& call, const Column& column, const Factors<A>& factors) {
  write<1>(global<const T>(call.grads) + column.offset, global<T>(call.cotangent) + column.offset, column.first,
           column.end, column.step, factors);
}

template <typename T>
__device__ __forceinline__ void measure_columns(const PenaltyCall& call, int64_t item) {
  using A = typename Numeric<T>::A;
  A* norms = global<A>(call.norms);
  double sum = 0;
  Top top{kNone, 0};
  for_columns(call, item, [&](const Column& column) {
    const double n = square_of<T>(call, column).norm();
    if (column.exists && column.leads) {
      norms[column.index] = A(n);
      if (call.kind == PenaltyKind::max) {
        top.add(static_cast<double>(A(n)), 1);
      } else {
        sum += phi(call, n);
      }
    }
    if (call.kind != PenaltyKind::max) write_column<T>(call, column, factors<A>(call, n));
  });
  put_given(call, item, sum, top);
}

template <typename T>
__device__ __forceinline__ void finish_columns(const PenaltyCall& call, int64_t item, const Top& top) {
  using A = typename Numeric<T>::A;
  const A* norms = global<const A>(call.norms);
  for_columns(call, item, [&](const Column& column) {
    if (!column.exists) return;
    write_column<T>(call, column, factors<A>(call, static_cast<double>(norms[column.index]), top));
  });
}

// ---- the launch ----

// What all norms give together, for every thread of a block: their maximum, or the penalty.
template <typename A, bool is_long>
__device__ Top top_of_all(const PenaltyCall& call) {
  Top top{kNone, 0};
  const A* norms = global<const A>(call.norms);
  const double* given = global<const double>(call.given);
  for (int64_t i = threadIdx.x; i < (is_long ? call.count : call.items); i += kThreads) {
    if constexpr (is_long) {
      top.add(static_cast<double>(norms[i]), 1);
    } else {
      top.add(given[i], given[call.items + i]);
    }
  }
  return block_top(top);
}

template <bool is_long>
__device__ double sum_of_all(const PenaltyCall& call) {
  const double* values = global<const double>(is_long ? call.wide : call.given);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < (is_long ? call.count : call.items); i += kThreads) {
    sum += is_long ? phi(call, values[i]) : values[i];
  }
  return block_sum(sum);
}

template <typename T, Lying lying, int V>
__device__ __forceinline__ void measure(const PenaltyCall& call, int64_t item) {
  if constexpr (lying == Lying::rows) measure_rows<V, T>(call, item);
  if constexpr (lying == Lying::long_rows) measure_part<V, T>(call, item);
  if constexpr (lying == Lying::columns) measure_columns<T>(call, item);
}

template <typename T, Lying lying, int V>
__device__ __forceinline__ void finish(const PenaltyCall& call, int64_t item, const Top& top) {
  if constexpr (lying == Lying::rows) finish_rows<V, T>(call, item, top);
  if constexpr (lying == Lying::long_rows) finish_part<V, T>(call, item, top);
  if constexpr (lying == Lying::columns) finish_columns<T>(call, item, top);
}

template <typename T, Lying lying>
__global__ void __launch_bounds__(kThreads, 2)
    gradient_penalty_fwd_kernel(const __grid_constant__ PenaltyCall call) {
  using A = typename Numeric<T>::A;
  constexpr bool is_long = lying == Lying::long_rows;
  constexpr int V = lying == Lying::columns ? 1 : 16 / sizeof(T);
  const cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  const bool is_max = call.kind == PenaltyKind::max;

  for (int64_t item = blockIdx.x; item < call.items; item += gridDim.x) {
    if (V > 1 && call.vector) {
      measure<T, lying, V>(call, item);
    } else {
      measure<T, lying, 1>(call, item);
    }
  }
  grid.sync();
  if constexpr (is_long) {
    for (int64_t row = blockIdx.x; row < call.count; row += gridDim.x) join_row<T>(call, row);
    grid.sync();
  }

  const Top top = is_max ? top_of_all<A, is_long>(call) : Top{kNone, 0};
  if (is_max || is_long) {
    const int64_t last = (call.items - 1 - blockIdx.x) / gridDim.x;
    for (int64_t turn = last; turn >= 0; --turn) {
      const int64_t item = blockIdx.x + turn * gridDim.x;
      if (V > 1 && call.vector) {
        finish<T, lying, V>(call, item, top);
      } else {
        finish<T, lying, 1>(call, item, top);
      }
    }
  }
  if (blockIdx.x == gridDim.x - 1) {  // it has no more items than any other
    const double d = top.norm - call.target;
    const double penalty = is_max ? call.scale * d * d : sum_of_all<is_long>(call);
    if (threadIdx.x == 0) *global<A>(call.penalty) = A(penalty);
  }
}

// ---- interpolation ----

template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    gradient_penalty_interpolate_kernel(const T* real, const T* fake,          // [batch, length]
                                        const typename Numeric<T>::A* mix,     // [batch]
                                        T* x_hat,                              // [batch, length]
                                        int64_t packs, int64_t packs_of_row) {  // of V numbers; a row is whole packs
  using A = typename Numeric<T>::A;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kAtOnce * kThreads + threadIdx.x;
  Pack<T, V> a[kAtOnce], b[kAtOnce];
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    const int64_t at = first + i * kThreads;
    if (at < packs) a[i] = load<V>(real + at * V), b[i] = load<V>(fake + at * V);
  }
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    const int64_t at = first + i * kThreads;
    if (at >= packs) return;
    const A m = mix[quotient(at, packs_of_row, packs)];
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A from_real = static_cast<A>(a[i].at[k]), from_fake = static_cast<A>(b[i].at[k]);
      // 0 times infinity is NaN, and 0 times a negative number plus 0 is not -0.
      const A value = m == 1 ? from_real : m == 0 ? from_fake : m * from_real + (1 - m) * from_fake;
      a[i].at[k] = static_cast<T>(value);
    }
    store<V>(x_hat + at * V, a[i]);
  }
}

}  // namespace
}  // namespace cuda
}  // namespace lipgan
