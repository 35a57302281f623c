// The launcher of the grouped forward of spectral_norm on CUDA: the work items of every layer, the table that tells the
// kernel of them, one cooperative launch.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "lipgan/spectral_norm.h"
#include "spectral_norm.cuh"

namespace lipgan {
namespace cuda {
namespace {

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

int64_t element_size(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

// The smallest n with 2^n >= x, and the largest n with 2^n <= x, for x >= 1.
int log2_ceil(int64_t x) {
  int n = 0;
  while ((int64_t{1} << n) < x) ++n;
  return n;
}
int log2_floor(int64_t x) { return log2_ceil(x + 1) - 1; }

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
  int device = 0, multiprocessors = 0, blocks = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0);
  if (error != cudaSuccess) return error;

  // An eps below the smallest normal number would let 1 / max(|x|, eps) overflow.
  eps = std::max(eps, Numeric<T>::smallest_normal);
  auto* sigma_out = static_cast<typename Numeric<T>::A*>(sigma);
  const int64_t grid = std::min<int64_t>(std::max({row_blocks, column_blocks, chunks}),
                                         static_cast<int64_t>(multiprocessors) * blocks);
  void* arguments[] = {&table,  &num_layers, &row_blocks,         &column_blocks,
                       &chunks, &sigma_out,  &n_power_iterations, &eps};
  return cudaLaunchCooperativeKernel(kernel, dim3(static_cast<unsigned>(grid)), dim3(kThreads), arguments, 0, stream);
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

}  // namespace cuda
}  // namespace lipgan
