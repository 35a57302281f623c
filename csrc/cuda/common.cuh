// What the kernels of several ops share: blocks of one size, wide accesses, sums over a block; of their launchers, the
// grid of a cooperative launch.
#pragma once
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <cstring>

#include "lipgan/dtype.h"

namespace lipgan {
namespace cuda {
namespace {

constexpr int kLog2Threads = 8;
constexpr int kThreads = 1 << kLog2Threads;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

// The type that a kernel computes in, and its range.
template <typename T>
struct Numeric {
  using A = float;
  static constexpr double smallest_normal = FLT_MIN;
  static constexpr double largest = FLT_MAX;
};
template <>
struct Numeric<double> {
  using A = double;
  static constexpr double smallest_normal = DBL_MIN;
  static constexpr double largest = DBL_MAX;
};

// An address that the compiler could not know to be in global memory, having been read from a table or from a struct: a
// load through it would be a generic one.
template <typename T, typename Address>
__device__ __forceinline__ T* global(Address* address) {
  __builtin_assume(__isGlobal(address));
  return static_cast<T*>(address);
}

template <typename T, int V>
struct Pack {
  T at[V];
};

// V consecutive elements; for V > 1 the address is a multiple of 16 and V * sizeof(T) too.
template <int V, typename T>
__device__ __forceinline__ Pack<T, V> load(const T* address) {
  Pack<T, V> pack;
  if constexpr (V == 1) {
    pack.at[0] = address[0];
  } else {
    static_assert(V * sizeof(T) % sizeof(uint4) == 0, "a pack is a number of 16-byte words");
    constexpr int words = V * sizeof(T) / sizeof(uint4);
    uint4 raw[words];
#pragma unroll
    for (int i = 0; i < words; ++i) raw[i] = reinterpret_cast<const uint4*>(address)[i];
    memcpy(&pack, raw, sizeof(pack));
  }
  return pack;
}

template <int V, typename T>
__device__ __forceinline__ void store(T* address, const Pack<T, V>& pack) {
  if constexpr (V == 1) {
    address[0] = pack.at[0];
  } else {
    constexpr int words = V * sizeof(T) / sizeof(uint4);
    uint4 raw[words];
    memcpy(raw, &pack, sizeof(pack));
#pragma unroll
    for (int i = 0; i < words; ++i) reinterpret_cast<uint4*>(address)[i] = raw[i];
  }
}

// N sums over the lanes whose numbers differ in the bits from log2(from) to below log2(to), for every lane.
template <typename A, int N>
__device__ __forceinline__ void lane_sums(A (&values)[N], int from, int to) {
#pragma unroll 1
  for (int offset = from; offset < to; offset *= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] += __shfl_xor_sync(0xffffffffu, values[i], offset);
  }
}

__device__ __forceinline__ double warp_sum(double value) {
  double values[1] = {value};
  lane_sums(values, 1, kWarp);
  return values[0];
}

// Sum over the block, for every thread.
__device__ double block_sum(double value) {
  __shared__ double warp_sums[kWarps];
  value = warp_sum(value);
  __syncthreads();  // the readers of the previous sum are done
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0;
  for (int i = 0; i < kWarps; ++i) sum += warp_sums[i];
  return sum;
}

// ---- of launchers ----

inline bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

inline int64_t element_size(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

// The smallest n with 2^n >= x, and the largest n with 2^n <= x, for x >= 1.
inline int log2_ceil(int64_t x) {
  int n = 0;
  while ((int64_t{1} << n) < x) ++n;
  return n;
}
inline int log2_floor(int64_t x) { return log2_ceil(x + 1) - 1; }

// The blocks of a cooperative launch for so many work items: no more than are resident at once.
template <typename Kernel>
cudaError_t grid_of(Kernel kernel, int64_t items, dim3* grid) {
  int device = 0, multiprocessors = 0, blocks = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0);
  *grid = dim3(static_cast<unsigned>(std::min<int64_t>(items, static_cast<int64_t>(multiprocessors) * blocks)));
  return error;
}

}  // namespace
}  // namespace cuda
}  // namespace lipgan
