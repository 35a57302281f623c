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
// tile: kTileRows * kThreads * V / w at most, with V <= 8 and kRowBlock >= kTileRows * kThreads * 8. Where rows lie side by
// side it has no fewer of them than 32 bytes hold, which are read together.
void divide(const SpectralNormFwdLayer& layer, int64_t size, Row* row) {
  static_assert(kRowBlock >= kTileRows * kThreads * 8, "a row block holds a tile");
  row->layer = layer;
  row->w = static_cast<int>(layer.outer * layer.inner);
  row->order = layer.outer <= 1 ? Order::rows : layer.inner > 1 ? Order::slabs : Order::columns;
  row->gathered = layer.channels != row->w && layer.channels != 1;
  const int64_t least_rows = std::max<int64_t>(kTileRows, row->order == Order::columns ? 32 / size : 0);
  row->log2_block_rows = log2_floor(std::max<int64_t>(kRowBlock / std::max(row->w, 1), least_rows));
  const int64_t block_rows = int64_t{1} << row->log2_block_rows;
  row->row_blocks = (layer.h + block_rows - 1) / block_rows;
  row->column_blocks = (row->w + kColumns - 1) / kColumns;
  row->chunks = std::max<int64_t>((layer.h * row->w + kChunk - 1) / kChunk, 1);  // one for sigma at least
}

// How many threads stand along a row, and whether they read 16 bytes each.
void arrange(Row* row, int64_t vector) {
  const SpectralNormFwdLayer& layer = row->layer;
  const bool columns = row->order == Order::columns;
  row->vector_flat = aligned(layer.weight) && aligned(layer.y);
  row->vector_rows = aligned(layer.weight) && (columns ? layer.h : layer.inner) % vector == 0 &&
                     (columns || row->gathered || aligned(layer.v_in));
  const int64_t pack = row->vector_rows ? vector : 1;
  if (columns) {
    const int64_t rows = std::min<int64_t>(layer.h, int64_t{1} << row->log2_block_rows);
    row->log2_column_threads = kLog2Threads - log2_ceil(std::clamp<int64_t>((rows + pack - 1) / pack, 1, kWarp));
  } else {
    row->log2_column_threads = std::min(log2_ceil(std::max<int64_t>(row->w / pack, 1)), kLog2Threads);
  }
}

// A layer as the kernels take it: columns counted in 32 bits, and channels that divide them.
template <typename Layer>
bool valid(const Layer& layer) {
  if (layer.outer < 0 || layer.h < 0 || layer.inner < 0) return false;
  if (layer.outer > kMaxExtent || layer.h > kMaxExtent || layer.inner > kMaxExtent) return false;
  const int64_t w = layer.outer * layer.inner;
  return w <= kMaxExtent && (w == 0 || (layer.channels > 0 && w % layer.channels == 0));
}

// Gives the layer its arrays from `offset` bytes into the workspace on, and returns where they end.
int64_t place(Row* row, char* workspace, int64_t offset) {
  const auto take = [&](int64_t count) {
    void* array = workspace + offset;
    offset += (count * static_cast<int64_t>(sizeof(double)) + 15) / 16 * 16;
    return array;
  };
  row->t = take(row->layer.h);
  row->s = take(row->w);
  row->partials = take(row->row_blocks * row->w);
  row->t_sums = static_cast<double*>(take(row->row_blocks));
  row->s_sums = static_cast<double*>(take(row->column_blocks));
  row->mended = static_cast<double*>(take(2));
  return offset;
}

template <typename T>
cudaError_t fill(RowsByValue* batch, int count, Row* table, cudaStream_t stream) {
  void* arguments[] = {batch, &table};
  const auto kernel = fill_table_kernel<T>;
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(count)), dim3(kThreads), arguments, 0, stream);
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
void divide(const SpectralNormBwdLayer& layer, BackwardRow* row) {
  row->h = static_cast<int>(layer.h);
  row->w = static_cast<int>(layer.outer * layer.inner);
  const int64_t count = layer.h * row->w;
  const int log2_chunk = log2_ceil(std::max<int64_t>((count + kChunksWanted - 1) / kChunksWanted, 1));
  row->log2_chunk = static_cast<signed char>(std::min(std::max(log2_chunk, kLog2SmallestChunk), kLog2LargestChunk));
  row->chunks = static_cast<int>((count + (int64_t{1} << row->log2_chunk) - 1) >> row->log2_chunk);
}

// Bytes of workspace for v in the order of the columns, for every dtype.
int64_t gathered_bytes(const SpectralNormBwdLayer& layer) {
  const int64_t w = layer.outer * layer.inner;
  return layer.channels == w || layer.channels == 1 ? 0 : (w * static_cast<int64_t>(sizeof(double)) + 15) / 16 * 16;
}

// What the kernel is told beside that.
void arrange(const SpectralNormBwdLayer& layer, int64_t vector, char* gathered, BackwardRow* row) {
  row->grad_y = layer.grad_y;
  row->y = layer.y;
  row->u = layer.u;
  row->v = layer.v;
  row->gathered = gathered_bytes(layer) > 0 ? gathered : nullptr;
  row->grad_weight = layer.grad_weight;
  row->inner = static_cast<int>(layer.inner);
  row->channels = static_cast<int>(layer.channels);
  row->vector = aligned(layer.grad_y) && aligned(layer.y) && aligned(layer.grad_weight);
  row->whole = row->vector && layer.inner % vector == 0;
  row->vector_v = row->gathered != nullptr || aligned(layer.v);
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
    divide(layers[l], 8, &row);  // no dtype has more blocks of rows
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

  const int64_t size = element_size(dtype);
  int64_t offset = kHeader, row_blocks = 0, column_blocks = 0, chunks = 0;
  RowsByValue batch;
  for (int64_t begin = 0; begin < num_layers; begin += RowsByValue::capacity) {
    const int count = static_cast<int>(std::min<int64_t>(num_layers - begin, RowsByValue::capacity));
    for (int i = 0; i < count; ++i) {
      if (!valid(layers[begin + i])) return cudaErrorInvalidValue;
      Row& row = batch.rows[i];
      divide(layers[begin + i], size, &row);
      arrange(&row, 16 / size);
      offset = place(&row, static_cast<char*>(workspace), offset);
      row.near_end = static_cast<int*>(workspace);
      row.first_row_block = row_blocks;
      row.first_column_block = column_blocks;
      row.first_chunk = chunks;
      row_blocks += row.row_blocks;
      column_blocks += row.column_blocks;
      chunks += row.chunks;
    }
    Row* destination = static_cast<Row*>(table) + begin;
    cudaError_t error = cudaErrorInvalidValue;
    switch (dtype) {
      case Dtype::float32: error = fill<float>(&batch, count, destination, stream); break;
      case Dtype::float64: error = fill<double>(&batch, count, destination, stream); break;
      case Dtype::float16: error = fill<__half>(&batch, count, destination, stream); break;
      case Dtype::bfloat16: error = fill<__nv_bfloat16>(&batch, count, destination, stream); break;
    }
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
  int64_t bytes = 0;
  for (int64_t l = 0; l < num_layers; ++l) {
    BackwardRow row;
    divide(layers[l], &row);
    bytes += row.chunks * static_cast<int64_t>(sizeof(double)) + gathered_bytes(layers[l]);
  }
  return bytes;
}

int spectral_norm_bwd(Dtype dtype, const SpectralNormBwdLayer* layers, int64_t num_layers, const void* sigma,
                      const void* grad_sigma, void* workspace, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  if (num_layers < 0 || !aligned(workspace)) return cudaErrorInvalidValue;
  if (dtype < Dtype::float32 || dtype > Dtype::bfloat16) return cudaErrorInvalidValue;

  const int64_t size = element_size(dtype), wide = std::max<int64_t>(size, 4);  // of T and of A
  // The vectors v that need another order, then the sums of the chunks.
  char* gathered = static_cast<char*>(workspace);
  char* dots = gathered;
  for (int64_t l = 0; l < num_layers; ++l) {
    if (!valid(layers[l])) return cudaErrorInvalidValue;
    dots += gathered_bytes(layers[l]);
  }
  for (int64_t begin = 0; begin < num_layers; begin += BackwardRows::capacity) {
    BackwardRows group;
    group.num_layers = static_cast<int>(std::min<int64_t>(num_layers - begin, BackwardRows::capacity));
    group.dots = reinterpret_cast<double*>(dots);
    int64_t chunks = 0;
    for (int i = 0; i < group.num_layers; ++i) {
      const SpectralNormBwdLayer& layer = layers[begin + i];
      // The number of chunks is an int.
      if (layer.h * layer.outer * layer.inner > int64_t{1} << 40) return cudaErrorInvalidValue;
      BackwardRow& row = group.rows[i];
      divide(layer, &row);
      arrange(layer, 16 / size, gathered, &row);
      gathered += gathered_bytes(layer);
      row.first_chunk = static_cast<int>(chunks);
      chunks += row.chunks;
    }
    dots += chunks * static_cast<int64_t>(sizeof(double));
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
