// The order in which a group of weights is worked on: layers in chunks that fit the caches, their rows in blocks, and the
// thread that takes a block.
//
// The blocks that partial sums are taken over depend on the shapes alone, so the result does not depend on the number
// of threads.
#pragma once

#include "arena.h"
#include "integers.h"
#include "threads.h"

namespace lipgan::cpu::LIPGAN_ISA {
namespace {

constexpr int64_t kBlockBytes = 128 << 10;      // of weight in a block, at least, unless the layer is smaller
constexpr int64_t kMaxBlocks = 32;              // per layer: each has a partial sum of the width of the layer

// Consecutive rows [begin, end) of a layer; slabs of [h, inner] where outer > 1.
struct Block {
  int64_t layer, begin, end;
  double position;  // in [0, 1): where its middle lies in the bytes of its chunk; decides the thread
};

// Layers [first_layer, last_layer) with blocks [first_block, last_block), finished before the next chunk is begun.
struct Chunk {
  int64_t first_layer, last_layer, first_block, last_block;
  bool slabs;  // some layer has outer > 1
};

struct Span {
  int64_t first, last;
};

// The rows or slabs of a layer, in blocks.
struct Tiling {
  int64_t units, per_block, blocks;
};

template <class Layer>
Tiling tile(const Layer& layer, int64_t element_size) {
  const int64_t units = layer.outer == 1 ? layer.h : layer.outer;
  const int64_t bytes = layer.outer * layer.h * layer.inner * element_size;
  const int64_t wanted = max(1, min(kMaxBlocks, bytes / kBlockBytes));
  const int64_t per_block = ((units + wanted - 1) / wanted + 7) / 8 * 8;
  return {units, per_block, (units + per_block - 1) / per_block};
}

template <class Layer>
int64_t total_bytes(const Layer* layers, int64_t num_layers, int64_t element_size) {
  int64_t bytes = 0;
  for (int64_t l = 0; l < num_layers; ++l) bytes += layers[l].outer * layers[l].h * layers[l].inner * element_size;
  return bytes;
}

// Blocks and chunks of a group; `blocks_of[l]` are the blocks of layer l.
struct Schedule {
  Block* blocks;
  Chunk* chunks;
  Span* blocks_of;
  int64_t num_blocks = 0, num_chunks = 0;

  template <class Layer>
  void build(Arena& arena, const Layer* layers, int64_t num_layers, int64_t element_size, int64_t chunk_bytes) {
    int64_t count = 0;
    for (int64_t l = 0; l < num_layers; ++l) count += tile(layers[l], element_size).blocks;
    blocks = arena.take<Block>(count);
    chunks = arena.take<Chunk>(num_layers);
    blocks_of = arena.take<Span>(num_layers);
    num_blocks = num_chunks = 0;
    if (!blocks) return;
    int64_t in_chunk = 0;
    for (int64_t l = 0; l < num_layers; ++l) {
      const Layer& layer = layers[l];
      const int64_t bytes = total_bytes(&layer, 1, element_size);
      if (l == 0 || in_chunk + bytes > chunk_bytes) {
        if (l > 0) place(in_chunk);
        chunks[num_chunks++] = {l, l, num_blocks, num_blocks, false};
        in_chunk = 0;
      }
      const Tiling tiling = tile(layer, element_size);
      blocks_of[l] = {num_blocks, num_blocks + tiling.blocks};
      for (int64_t b = 0; b < tiling.blocks; ++b) {
        const int64_t begin = b * tiling.per_block, end = min(tiling.units, begin + tiling.per_block);
        const double middle = 0.5 * static_cast<double>(begin + end) / static_cast<double>(tiling.units);
        blocks[num_blocks++] = {l, begin, end, static_cast<double>(in_chunk) + middle * static_cast<double>(bytes)};
      }
      Chunk& chunk = chunks[num_chunks - 1];
      chunk.last_layer = l + 1;
      chunk.last_block = num_blocks;
      chunk.slabs |= layer.outer > 1;
      in_chunk += bytes;
    }
    place(in_chunk);
  }

 private:
  // Turns the bytes before the middle of each block of the last chunk into a fraction of the chunk.
  void place(int64_t chunk_bytes) {
    const Chunk& chunk = chunks[num_chunks - 1];
    for (int64_t b = chunk.first_block; b < chunk.last_block; ++b) {
      blocks[b].position /= static_cast<double>(max(1, chunk_bytes));
    }
  }
};

bool mine(const Block& block, const Team& team) {
  return static_cast<int>(block.position * team.num_threads) == team.thread;
}

}  // namespace
}  // namespace lipgan::cpu::LIPGAN_ISA
