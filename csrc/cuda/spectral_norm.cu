// The launchers of the grouped forward and backward of spectral_norm on CUDA: the work items of every layer, what tells the
// kernel of them (a table; the arguments of the launch), one cooperative launch.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "lipgan/spectral_norm.h"
#include "spectral_norm.cuh"
#include "spectral_norm_backward.cuh"

namespace lipgan {
namespace cuda {
namespace {

constexpr int64_t kHeader = 16;  // bytes of the workspace that the whole group shares

// The work items of one layer. A row block has at least kTileRows rows, and no fewer than stand side by side in one
// tile: kTileRows * kThreads * V / w at most, with V <= 8 and kRowBlock >= kTileRows * kThreads * 8.
void divide(const SpectralNormFwdLayer& layer, Row* row) {
  const int64_t w = std::max<int64_t>(layer.inner, 1);
  static_assert(kRowBlock >= kTileRows * kThreads * 8, "a row block holds a tile");
  row->layer = layer;
  row->log2_block_rows = log2_floor(std::max<int64_t>(kRowBlock / w, kTileRows));
  const int64_t block_rows = int64_t{1} << row->log2_block_rows;
  row->row_blocks = (layer.h + block_rows - 1) / block_rows;
  row->column_blocks = (layer.inner + kColumns - 1) / kColumns;
  row->chunks = std::max<int64_t>((layer.h * layer.inner + kChunk - 1) / kChunk, 1);  // one for sigma at least
}

// Gives the layer its arrays from `offset` bytes into the workspace on, and returns where they end.
int64_t place(Row* row, char* workspace, int64_t offset) {
  const auto take = [&](int64_t count) {
    void* array = workspace + offset;
    offset += (count * static_cast<int64_t>(sizeof(double)) + 15) / 16 * 16;
    return array;
  };
  row->t = take(row->layer.h);
  row->s = take(row->layer.inner);
  row->partials = take(row->row_blocks * row->layer.inner);
  row->t_sums = static_cast<double*>(take(row->row_blocks));
  row->s_sums = static_cast<double*>(take(row->column_blocks));
  row->mended = static_cast<double*>(take(2));
  return offset;
}

template <typename T>
cudaError_t launch(const Row* table, int num_layers, int64_t row_blocks, int64_t column_blocks, int64_t chunks,
                   void* sigma, int64_t n_power_iterations, double eps, cudaStream_t stream) {
  const auto kernel = spectral_norm_fwd_kernel<T>;
  dim3 grid;
  const cudaError_t error = grid_of(kernel, std::max({row_blocks, column_blocks, chunks}), &grid);
  if (error != cudaSuccess) return error;

  // An eps below the smallest normal number would let 1 / max(|x|, eps) overflow.
  eps = std::max(eps, Numeric<T>::smallest_normal);
  auto* sigma_out = static_cast<typename Numeric<T>::A*>(sigma);
  void* arguments[] = {&table,  &num_layers, &row_blocks,         &column_blocks,
                       &chunks, &sigma_out,  &n_power_iterations, &eps};
  return cudaLaunchCooperativeKernel(kernel, grid, dim3(kThreads), arguments, 0, stream);
}

// The chunks of one layer of the backward, but for their place among those of the others.
void divide(const SpectralNormBwdLayer& layer, int64_t vector, BackwardRow* row) {
  row->grad_y = layer.grad_y;
  row->y = layer.y;
  row->u = layer.u;
  row->v = layer.v;
  row->grad_weight = layer.grad_weight;
  row->count = layer.h * layer.inner;
  row->w = static_cast<int>(std::max<int64_t>(layer.inner, 1));
  const int log2_chunk = log2_ceil(std::max<int64_t>((row->count + kChunksWanted - 1) / kChunksWanted, 1));
  row->log2_chunk = static_cast<signed char>(std::min(std::max(log2_chunk, kLog2SmallestChunk), kLog2LargestChunk));
  row->chunks = static_cast<int>((row->count + (int64_t{1} << row->log2_chunk) - 1) >> row->log2_chunk);
  row->vector = aligned(layer.grad_y) && aligned(layer.y) && aligned(layer.grad_weight);
  row->whole = row->vector && layer.inner % vector == 0;
  row->vector_v = aligned(layer.v);
}

template <typename T>
cudaError_t launch_backward(BackwardRows* group, const void* sigma, const void* grad_sigma, cudaStream_t stream) {
  using A = typename Numeric<T>::A;
  const auto kernel = spectral_norm_bwd_kernel<T>;
  dim3 grid;
  const cudaError_t error = grid_of(kernel, group->chunks, &grid);
  if (error != cudaSuccess) return error;
  auto *values = static_cast<const A*>(sigma), *gradients = static_cast<const A*>(grad_sigma);
  void* arguments[] = {group, &values, &gradients};
  return cudaLaunchCooperativeKernel(kernel, grid, dim3(kThreads), arguments, 0, stream);
}

}  // namespace

int64_t spectral_norm_fwd_table_size(int64_t num_layers) { return num_layers * static_cast<int64_t>(sizeof(Row)); }

int64_t spectral_norm_fwd_workspace(const SpectralNormFwdLayer* layers, int64_t num_layers) {
  int64_t bytes = kHeader;
  for (int64_t l = 0; l < num_layers; ++l) {
    Row row;
    divide(layers[l], &row);
    bytes = place(&row, nullptr, bytes);
  }
  return bytes;
}

int spectral_norm_fwd(Dtype dtype, const SpectralNormFwdLayer* layers, int64_t num_layers, void* sigma,
                      int64_t n_power_iterations, double eps, void* workspace, void* table, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  if (num_layers == 0) return cudaSuccess;
  if (num_layers < 0 || num_layers > INT32_MAX || n_power_iterations < 0) return cudaErrorInvalidValue;
  if (!aligned(workspace) || !aligned(table)) return cudaErrorInvalidValue;
  if (dtype < Dtype::float32 || dtype > Dtype::bfloat16) return cudaErrorInvalidValue;

  const int64_t vector = 16 / element_size(dtype);
  int64_t offset = kHeader, row_blocks = 0, column_blocks = 0, chunks = 0;
  RowsByValue batch;
  for (int64_t begin = 0; begin < num_layers; begin += RowsByValue::capacity) {
    int count = static_cast<int>(std::min<int64_t>(num_layers - begin, RowsByValue::capacity));
    for (int i = 0; i < count; ++i) {
      const SpectralNormFwdLayer& layer = layers[begin + i];
      if (layer.outer != 1 || layer.h < 0 || layer.inner < 0) return cudaErrorInvalidValue;
      if (layer.h > kMaxExtent || layer.inner > kMaxExtent) return cudaErrorInvalidValue;
      Row& row = batch.rows[i];
      divide(layer, &row);
      offset = place(&row, static_cast<char*>(workspace), offset);
      row.near_end = static_cast<int*>(workspace);
      row.vector_rows = layer.inner % vector == 0 && aligned(layer.weight) && aligned(layer.v_in);
      row.vector_flat = aligned(layer.weight) && aligned(layer.y);
      const int64_t packs = row.vector_rows ? layer.inner / vector : layer.inner;
      row.log2_column_threads = std::min(log2_ceil(std::max<int64_t>(packs, 1)), kLog2Threads);
      row.first_row_block = row_blocks;
      row.first_column_block = column_blocks;
      row.first_chunk = chunks;
      row_blocks += row.row_blocks;
      column_blocks += row.column_blocks;
      chunks += row.chunks;
    }
    Row* destination = static_cast<Row*>(table) + begin;
    void* arguments[] = {&batch, &count, &destination};
    const cudaError_t error = cudaLaunchKernel(fill_table_kernel, dim3(1), dim3(kWarp), arguments, 0, stream);
    if (error != cudaSuccess) return error;
  }

  const auto run = [&](auto launcher) {
    return launcher(static_cast<const Row*>(table), static_cast<int>(num_layers), row_blocks, column_blocks, chunks,
                    sigma, n_power_iterations, eps, stream);
  };
  switch (dtype) {
    case Dtype::float32:
      return run(launch<float>);
    case Dtype::float64:
      return run(launch<double>);
    case Dtype::float16:
      return run(launch<__half>);
    case Dtype::bfloat16:
      return run(launch<__nv_bfloat16>);
  }
  return cudaErrorInvalidValue;
}

int64_t spectral_norm_bwd_workspace(const SpectralNormBwdLayer* layers, int64_t num_layers) {
  int64_t chunks = 0;
  for (int64_t l = 0; l < num_layers; ++l) {
    BackwardRow row;
    divide(layers[l], 1, &row);
    chunks += row.chunks;
  }
  return chunks * static_cast<int64_t>(sizeof(double));
}

int spectral_norm_bwd(Dtype dtype, const SpectralNormBwdLayer* layers, int64_t num_layers, const void* sigma,
                      const void* grad_sigma, void* workspace, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  if (num_layers < 0 || !aligned(workspace)) return cudaErrorInvalidValue;
  if (dtype < Dtype::float32 || dtype > Dtype::bfloat16) return cudaErrorInvalidValue;

  const int64_t size = element_size(dtype), wide = std::max<int64_t>(size, 4);  // of T and of A
  double* dots = static_cast<double*>(workspace);
  for (int64_t begin = 0; begin < num_layers; begin += BackwardRows::capacity) {
    BackwardRows group;
    group.num_layers = static_cast<int>(std::min<int64_t>(num_layers - begin, BackwardRows::capacity));
    int64_t chunks = 0;
    for (int i = 0; i < group.num_layers; ++i) {
      const SpectralNormBwdLayer& layer = layers[begin + i];
      if (layer.outer != 1 || layer.h < 0 || layer.inner < 0) return cudaErrorInvalidValue;
      if (layer.h > kMaxExtent || layer.inner > kMaxExtent) return cudaErrorInvalidValue;
      if (layer.h * layer.inner > int64_t{1} << 40) return cudaErrorInvalidValue;  // the number of chunks is an int
      BackwardRow& row = group.rows[i];
      divide(layer, 16 / size, &row);
      row.first_chunk = static_cast<int>(chunks);
      row.dots = dots;
      dots += row.chunks;
      chunks += row.chunks;
    }
    if (chunks == 0) continue;  // of layers without elements
    if (chunks > INT32_MAX) return cudaErrorInvalidValue;
    group.chunks = static_cast<int>(chunks);
    const auto offset = [&](const void* values) { return static_cast<const char*>(values) + begin * wide; };
    const auto run = [&](auto launcher) {
      return launcher(&group, offset(sigma), grad_sigma ? offset(grad_sigma) : nullptr, stream);
    };
    cudaError_t error = cudaErrorInvalidValue;
    switch (dtype) {
      case Dtype::float32: error = run(launch_backward<float>); break;
      case Dtype::float64: error = run(launch_backward<double>); break;
      case Dtype::float16: error = run(launch_backward<__half>); break;
      case Dtype::bfloat16: error = run(launch_backward<__nv_bfloat16>); break;
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace cuda
}  // namespace lipgan
