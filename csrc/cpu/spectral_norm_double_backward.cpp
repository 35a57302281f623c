// The backward of the backward of spectral_norm on the CPU. Formulas and layouts: include/lipgan/spectral_norm.h.
//
// Two sweeps: three sums over each block at once, then both results of it.
#include "lipgan/spectral_norm.h"

#include <limits>

#include "spectral_norm_pass.h"
#include "vector.h"

namespace lipgan::cpu::LIPGAN_ISA {
namespace {

template <class T, class A>
struct DoubleBackward {
  const SpectralNormDoubleBwdLayer* layers;
  int64_t num_layers;
  const A* sigma;
  A* to_sigma;
  A* to_grad_sigma;
  bool stream;
  Schedule schedule;

  struct Sums {
    double along;  // u^T G v
    double grads;  // <G, dY>
    double dot;    // <dY, Y>
  };
  Sums* sums;  // [blocks]

  void prepare(Arena& arena, int64_t chunk_bytes) {
    schedule.build(arena, layers, num_layers, sizeof(T), chunk_bytes);
    int64_t blocks = 0;
    for (int64_t l = 0; l < num_layers; ++l) blocks += tile(layers[l], sizeof(T)).blocks;
    sums = arena.take<Sums>(blocks);
  }

  static void run(void* self, const Team& team) { static_cast<DoubleBackward*>(self)->run(team); }

  void run(const Team& team) {
    for (int64_t c = 0; c < schedule.num_chunks; ++c) {
      const Chunk& chunk = schedule.chunks[c];
      for (int64_t b = chunk.first_block; b < chunk.last_block; ++b) {
        if (mine(schedule.blocks[b], team)) sums[b] = sums_of(schedule.blocks[b]);
      }
      team.barrier();
      for (int64_t b = chunk.last_block; b-- > chunk.first_block;) {
        if (mine(schedule.blocks[b], team)) write(b);
      }
    }
    stream_fence();
  }

  // All three sums in one sweep over the block.
  Sums sums_of(const Block& block) {
    const auto& layer = layers[block.layer];
    const int64_t h = layer.h, inner = layer.inner;
    const T *u = static_cast<const T*>(layer.u), *v = static_cast<const T*>(layer.v);
    Sums total{};
    const auto add = [&](int64_t offset, int64_t n, T coefficient, const T* direction) {
      add_row(layer, offset, n, static_cast<double>(widen(coefficient)), direction, total);
    };
    if (layer.outer == 1) {
      for (int64_t i = block.begin; i < block.end; ++i) add(i * inner, inner, u[i], v);
    } else if (inner == 1) {
      for (int64_t o = block.begin; o < block.end; ++o) add(o * h, h, v[o], u);
    } else {
      for (int64_t o = block.begin; o < block.end; ++o) {
        for (int64_t i = 0; i < h; ++i) add((o * h + i) * inner, inner, u[i], v + o * inner);
      }
    }
    return total;
  }

  static void add_row(const SpectralNormDoubleBwdLayer& layer, int64_t offset, int64_t n, double coefficient,
                      const T* direction, Sums& total) {
    constexpr int64_t kRun = 4096;  // short enough that the error of a float sum stays below that of its terms
    const T* grad = static_cast<const T*>(layer.grad) + offset;
    const T* grad_y = static_cast<const T*>(layer.grad_y) + offset;
    const T* y = static_cast<const T*>(layer.y) + offset;
    for (int64_t begin = 0; begin < n; begin += kRun) {
      const int64_t end = min(n, begin + kRun);
      A along = 0, grads = 0, dot = 0;
#pragma omp simd reduction(+ : along, grads, dot)
      for (int64_t j = begin; j < end; ++j) {
        const A g = widen(grad[j]), dy = widen(grad_y[j]);
        along += g * widen(direction[j]);
        grads += g * dy;
        dot += dy * widen(y[j]);
      }
      total.along += coefficient * static_cast<double>(along);
      total.grads += static_cast<double>(grads);
      total.dot += static_cast<double>(dot);
    }
  }

  // r (G - q Y) and -r q dY over the block; the first one of a layer also writes what goes to sigma and its gradient.
  void write(int64_t b) {
    const Block& block = schedule.blocks[b];
    const auto& layer = layers[block.layer];
    const Span span = schedule.blocks_of[block.layer];
    Sums total{};
    for (int64_t k = span.first; k < span.last; ++k) {
      total.along += sums[k].along, total.grads += sums[k].grads, total.dot += sums[k].dot;
    }
    const A value = sigma[block.layer], factor = scale_of(value);
    if (b == span.first) {
      const double r = static_cast<double>(factor);
      // Where sigma counts as 0 the scale is the constant 1.
      const bool is_zero = (value < 0 ? -value : value) < std::numeric_limits<A>::min();
      to_sigma[block.layer] = is_zero ? A(0) : static_cast<A>(-r * r * (total.grads - total.dot * total.along));
      to_grad_sigma[block.layer] = static_cast<A>(total.along);
    }
    const int64_t unit = layer.outer == 1 ? layer.inner : layer.h * layer.inner;
    const int64_t offset = block.begin * unit, n = (block.end - block.begin) * unit;
    const T* grad = static_cast<const T*>(layer.grad) + offset;
    const T* grad_y = static_cast<const T*>(layer.grad_y) + offset;
    const T* y = static_cast<const T*>(layer.y) + offset;
    const A along = static_cast<A>(total.along);
    const A coefficient = static_cast<A>(-static_cast<double>(factor) * total.along);
    generate(static_cast<T*>(layer.to_grad_y) + offset, n, stream,
             [=](int64_t j) { return narrow<T>(factor * (widen(grad[j]) - along * widen(y[j]))); });
    generate(static_cast<T*>(layer.to_y) + offset, n, stream,
             [=](int64_t j) { return narrow<T>(coefficient * widen(grad_y[j])); });
  }
};

template <class T>
void double_backward(const SpectralNormDoubleBwdLayer* layers, int64_t num_layers, const void* sigma, void* to_sigma,
                     void* to_grad_sigma, int num_threads) {
  using A = typename Accumulate<T>::type;
  const int64_t bytes = total_bytes(layers, num_layers, sizeof(T));
  DoubleBackward<T, A> op{layers, num_layers, static_cast<const A*>(sigma), static_cast<A*>(to_sigma),
                          static_cast<A*>(to_grad_sigma), bytes > kStreamBytes, {}, {}};
  launch(op, bytes, num_threads);
}

}  // namespace

void spectral_norm_double_bwd(Dtype dtype, const SpectralNormDoubleBwdLayer* layers, int64_t num_layers,
                              const void* sigma, void* to_sigma, void* to_grad_sigma, int num_threads) {
  const auto serve = [&](auto fn) { fn(layers, num_layers, sigma, to_sigma, to_grad_sigma, num_threads); };
  switch (dtype) {
    case Dtype::float32: return serve(double_backward<float>);
    case Dtype::float64: return serve(double_backward<double>);
    case Dtype::float16: return serve(double_backward<float16>);
    case Dtype::bfloat16: return serve(double_backward<bfloat16>);
  }
}

}  // namespace lipgan::cpu::LIPGAN_ISA
