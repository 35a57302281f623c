// The launchers of gradient_penalty on CUDA: the items of a call, and one launch.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "gradient_penalty.cuh"
#include "lipgan/gradient_penalty.h"

namespace lipgan {
namespace cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool is_long(Dtype dtype, int64_t length, int64_t inner) {
  return inner == 1 && length > kLongestRow / std::max<int64_t>(element_size(dtype), 4);
}

// Numbers of a part of a long row.
int64_t part_size(int64_t outer, int64_t length) {
  const int log2_part = log2_ceil(std::max<int64_t>(ceil_div(outer * length, kItemsWanted), 1));
  return int64_t{1} << std::min(std::max(log2_part, kLog2SmallestPart), kLog2LargestPart);
}

// Norms of an item, of which a block takes `side_by_side` at once.
void deal(PenaltyCall* call, int64_t side_by_side) {
  call->per_item = side_by_side * ceil_div(ceil_div(call->count, side_by_side), kItemsWanted);
  call->items = ceil_div(call->count, call->per_item);
}

template <typename T, Lying lying>
cudaError_t launch(PenaltyCall* call, cudaStream_t stream) {
  const auto kernel = gradient_penalty_fwd_kernel<T, lying>;
  dim3 grid;
  const cudaError_t error = grid_of(kernel, call->items, &grid);
  if (error != cudaSuccess) return error;
  void* arguments[] = {call};
  return cudaLaunchCooperativeKernel(kernel, grid, dim3(kThreads), arguments, 0, stream);
}

template <typename T>
cudaError_t launch(PenaltyCall* call, bool parts_of_rows, cudaStream_t stream) {
  constexpr int64_t V = 16 / sizeof(T);
  const auto two_to = [](int n) { return int64_t{1} << n; };
  call->vector = call->length % V == 0 && aligned(call->grads) && aligned(call->cotangent);
  if (parts_of_rows) {
    call->per_item = part_size(call->count, call->length);
    call->parts = ceil_div(call->length, call->per_item);
    call->items = call->count * call->parts;
    call->wide = call->given + 2 * call->items;
    return launch<T, Lying::long_rows>(call, stream);
  }
  if (call->inner == 1) {
    const int64_t packs = std::max<int64_t>(call->vector ? call->length / V : call->length, 1);
    const bool by_warps = packs <= kWarp || (packs <= kLongestRowOfWarp && call->count >= kManyRows);
    call->log2_threads = by_warps ? std::min(log2_ceil(packs), log2_ceil(kWarp)) : kLog2Threads;
    deal(call, two_to(kLog2Threads - call->log2_threads));
    return launch<T, Lying::rows>(call, stream);
  }
  call->vector = false;
  const int64_t shares = ceil_div(std::max<int64_t>(call->length, 1), kColumnOfThread);
  call->log2_threads = std::min(log2_ceil(shares), kLog2MostSharing);
  deal(call, two_to(kLog2Threads - call->log2_threads));
  return launch<T, Lying::columns>(call, stream);
}

template <typename T>
cudaError_t launch_interpolate(const void* real, const void* fake, const void* mix, void* x_hat, int64_t batch,
                               int64_t length, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  const bool vector = length % V == 0 && aligned(real) && aligned(fake) && aligned(x_hat);
  int64_t packs_of_row = vector ? length / V : length, packs = batch * packs_of_row;
  auto *a = static_cast<const T*>(real), *b = static_cast<const T*>(fake);
  auto* m = static_cast<const typename Numeric<T>::A*>(mix);
  T* result = static_cast<T*>(x_hat);
  void* arguments[] = {&a, &b, &m, &result, &packs, &packs_of_row};
  const int64_t blocks = ceil_div(packs, kThreads * kAtOnce);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const auto kernel = vector ? gradient_penalty_interpolate_kernel<T, V> : gradient_penalty_interpolate_kernel<T, 1>;
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments, 0, stream);
}

}  // namespace

int gradient_penalty_interpolate(Dtype dtype, const void* real, const void* fake, const void* mix, void* x_hat,
                                 int64_t batch, int64_t length, void* stream) {
  if (batch < 0 || length < 0) return cudaErrorInvalidValue;
  if (batch == 0 || length == 0) return cudaSuccess;
  const auto run = [&](auto launcher) {
    return launcher(real, fake, mix, x_hat, batch, length, static_cast<cudaStream_t>(stream));
  };
  switch (dtype) {
    case Dtype::float32: return run(launch_interpolate<float>);
    case Dtype::float64: return run(launch_interpolate<double>);
    case Dtype::float16: return run(launch_interpolate<__half>);
    case Dtype::bfloat16: return run(launch_interpolate<__nv_bfloat16>);
  }
  return cudaErrorInvalidValue;
}

int64_t gradient_penalty_fwd_workspace(Dtype dtype, int64_t outer, int64_t length, int64_t inner) {
  int64_t numbers = 2 * kItemsWanted;
  if (is_long(dtype, length, inner)) numbers = 2 * outer * ceil_div(length, part_size(outer, length)) + outer;
  return numbers * static_cast<int64_t>(sizeof(double));
}

int gradient_penalty_fwd(Dtype dtype, PenaltyKind kind, const void* grads, void* penalty, void* norms, void* cotangent,
                         int64_t outer, int64_t length, int64_t inner, double weight, double target, void* workspace,
                         void* stream) {
  if (outer < 1 || length < 0 || inner < 1 || !aligned(workspace)) return cudaErrorInvalidValue;
  if (kind < PenaltyKind::two_sided || kind > PenaltyKind::max) return cudaErrorInvalidValue;
  const int64_t count = outer * inner;
  PenaltyCall call{};
  call.grads = grads;
  call.penalty = penalty;
  call.norms = norms;
  call.cotangent = cotangent;
  call.given = static_cast<double*>(workspace);
  call.count = count;
  call.length = length;
  call.inner = inner;
  call.scale = kind == PenaltyKind::max ? weight : weight / static_cast<double>(count);
  call.target = target;
  call.kind = kind;
  const auto run = [&](auto launcher) {
    return launcher(&call, is_long(dtype, length, inner), static_cast<cudaStream_t>(stream));
  };
  switch (dtype) {
    case Dtype::float32: return run(launch<float>);
    case Dtype::float64: return run(launch<double>);
    case Dtype::float16: return run(launch<__half>);
    case Dtype::bfloat16: return run(launch<__nv_bfloat16>);
  }
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace lipgan
