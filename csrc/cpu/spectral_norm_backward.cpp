// The backward of spectral_norm on the CPU. Formulas and layouts: include/lipgan/spectral_norm.h.
//
// Each block of rows is read for its part of <dY, Y>, and backwards for dW, to meet first what was read last. dW may take
// the memory of Y, which has just been read: a store to other memory has to fetch the line first.
#include "lipgan/spectral_norm.h"

#include "spectral_norm_pass.h"
#include "vector.h"

namespace lipgan::cpu::LIPGAN_ISA {
namespace {

template <class T, class A>
struct Backward {
  const SpectralNormBwdLayer* layers;
  int64_t num_layers;
  const A* sigma;
  const A* grad_sigma;
  bool stream;
  int64_t in_caches;  // bytes of a layer whose Y is still there when its dW is written
  Schedule schedule;
  double* dots;  // [blocks]: <dY, Y> over the block

  void prepare(Arena& arena, int64_t chunk_bytes) {
    schedule.build(arena, layers, num_layers, sizeof(T), chunk_bytes);
    in_caches = chunk_bytes;
    int64_t blocks = 0;
    for (int64_t l = 0; l < num_layers; ++l) blocks += tile(layers[l], sizeof(T)).blocks;
    dots = arena.take<double>(blocks);
  }

  static void run(void* self, const Team& team) { static_cast<Backward*>(self)->run(team); }

  void run(const Team& team) {
    for (int64_t c = 0; c < schedule.num_chunks; ++c) {
      const Chunk& chunk = schedule.chunks[c];
      for (int64_t b = chunk.first_block; b < chunk.last_block; ++b) {
        const Block& block = schedule.blocks[b];
        if (!mine(block, team)) continue;
        const auto& layer = layers[block.layer];
        const int64_t unit = layer.outer == 1 ? layer.inner : layer.h * layer.inner;
        dots[b] = dot(static_cast<const T*>(layer.grad_y) + block.begin * unit,
                      static_cast<const T*>(layer.y) + block.begin * unit, (block.end - block.begin) * unit);
      }
      team.barrier();
      for (int64_t b = chunk.last_block; b-- > chunk.first_block;) {
        if (mine(schedule.blocks[b], team)) write(schedule.blocks[b]);
      }
    }
    stream_fence();
  }

  // dW = dY / sigma - (<dY, Y> / sigma - dsigma) u v^T over the block.
  void write(const Block& block) {
    const auto& layer = layers[block.layer];
    const Span span = schedule.blocks_of[block.layer];
    double product = 0;
    for (int64_t b = span.first; b < span.last; ++b) product += dots[b];
    const A factor = scale_of(sigma[block.layer]);
    const double along = product * static_cast<double>(factor) -
                         (grad_sigma ? static_cast<double>(grad_sigma[block.layer]) : 0.0);

    const T *u = static_cast<const T*>(layer.u), *v = static_cast<const T*>(layer.v);
    const T* grad_y = static_cast<const T*>(layer.grad_y);
    T* grad_weight = static_cast<T*>(layer.grad_weight);
    const bool over_y = grad_weight == layer.y && total_bytes(&layer, 1, sizeof(T)) <= in_caches;
    const bool past_caches = stream && !over_y;
    const auto row = [=](int64_t offset, int64_t n, T coefficient, const T* direction) {
      const A c = static_cast<A>(along * static_cast<double>(widen(coefficient)));
      const T* in = grad_y + offset;
      generate(grad_weight + offset, n, past_caches,
               [=](int64_t j) { return narrow<T>(widen(in[j]) * factor - c * widen(direction[j])); });
    };
    const int64_t h = layer.h, inner = layer.inner;
    if (layer.outer == 1) {
      for (int64_t i = block.begin; i < block.end; ++i) row(i * inner, inner, u[i], v);
    } else if (inner == 1) {
      for (int64_t o = block.begin; o < block.end; ++o) row(o * h, h, v[o], u);
    } else {
      for (int64_t o = block.begin; o < block.end; ++o) {
        for (int64_t i = 0; i < h; ++i) row((o * h + i) * inner, inner, u[i], v + o * inner);
      }
    }
  }
};

template <class T>
void backward(const SpectralNormBwdLayer* layers, int64_t num_layers, const void* sigma, const void* grad_sigma,
              int num_threads) {
  using A = typename Accumulate<T>::type;
  const int64_t bytes = total_bytes(layers, num_layers, sizeof(T));
  Backward<T, A> op{layers, num_layers, static_cast<const A*>(sigma), static_cast<const A*>(grad_sigma),
                    bytes > kStreamBytes, 0, {}, {}};
  launch(op, bytes, num_threads);
}

}  // namespace

void spectral_norm_bwd(Dtype dtype, const SpectralNormBwdLayer* layers, int64_t num_layers, const void* sigma,
                       const void* grad_sigma, int num_threads) {
  const auto serve = [&](auto fn) { fn(layers, num_layers, sigma, grad_sigma, num_threads); };
  switch (dtype) {
    case Dtype::float32: return serve(backward<float>);
    case Dtype::float64: return serve(backward<double>);
    case Dtype::float16: return serve(backward<float16>);
    case Dtype::bfloat16: return serve(backward<bfloat16>);
  }
}

}  // namespace lipgan::cpu::LIPGAN_ISA
