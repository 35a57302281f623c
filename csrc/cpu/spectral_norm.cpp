// The forward pass of spectral_norm on the CPU. Formulas and layouts: include/lipgan/spectral_norm.h.
//
// Memory traffic is the cost. For outer == 1 the two matrix-vector products of an iteration are one sweep over W: once
// t_i = <W_i, v> is known, t_i W_i is added to the thread's part of W^T t while row i is still in the cache, and
// s = W^T t / max(|t|, eps) afterwards. So W comes from memory once per iteration and once for the scaling. Layers are
// taken in chunks that fit the caches, and the scaling walks a chunk backwards, to meet first what was read last.
//
// A layer whose numbers leave the range of a float or, squared, that of a double is taken again, alone, of W times a
// power of two. That costs an ordinary layer nothing but a look at two norms.
//
// What is done in which order, and by which thread: spectral_norm_schedule.h.
#include "lipgan/spectral_norm.h"

#include <limits>

#include "spectral_norm_pass.h"
#include "vector.h"

namespace lipgan::cpu::LIPGAN_ISA {
namespace {

template <class T, class A>
struct Forward {
  const SpectralNormFwdLayer* layers;
  int64_t num_layers;
  A* sigma;
  int64_t n_power_iterations;
  double eps;
  bool stream;
  Schedule schedule;

  struct Work {
    A* u;             // [h]: t, then u (only t where outer == 1)
    A* v;             // [w]: v of the running iteration
    A* partial;       // [blocks, w] or, where outer > 1, [blocks, h]: sums over the block
    double* squares;  // [blocks]: |t|^2 (outer == 1) or |s|^2 over the block
    A unit;           // sigma and the scaling are of W times this power of two
    A sigma;          // of that
    bool left_range;
  };
  Work* work;

  void prepare(Arena& arena, int64_t chunk_bytes) {
    schedule.build(arena, layers, num_layers, sizeof(T), chunk_bytes);
    work = arena.take<Work>(num_layers);
    for (int64_t l = 0; l < num_layers; ++l) {
      const auto& layer = layers[l];
      const int64_t w = layer.outer * layer.inner, blocks = tile(layer, sizeof(T)).blocks;
      Work piece;
      piece.u = arena.take<A>(layer.h);
      piece.v = arena.take<A>(w);
      piece.partial = arena.take<A>(blocks * (layer.outer == 1 ? w : layer.h));
      piece.squares = arena.take<double>(blocks);
      piece.unit = 1, piece.sigma = 0, piece.left_range = false;
      if (!work) continue;
      work[l] = piece;
      const T* v_in = static_cast<const T*>(layer.v_in);
      for (int64_t j = 0; j < w; ++j) piece.v[j] = widen(v_in[j]);
    }
  }

  static void run(void* self, const Team& team) { static_cast<Forward*>(self)->run(team); }

  void run(const Team& team) {
    for (int64_t c = 0; c < schedule.num_chunks; ++c) {
      const Chunk& chunk = schedule.chunks[c];
      for (int64_t iteration = 0; iteration < max(1, n_power_iterations); ++iteration) {
        for (int64_t b = chunk.first_block; b < chunk.last_block; ++b) {
          if (mine(schedule.blocks[b], team)) sweep(b);
        }
        team.barrier();
        const bool last = iteration + 1 >= n_power_iterations;
        for (int64_t l = chunk.first_layer + team.thread; l < chunk.last_layer; l += team.num_threads) {
          finish(l);
          if (last && (layers[l].outer == 1 || n_power_iterations == 0)) mend(l);
        }
        team.barrier();
        if (!chunk.slabs || n_power_iterations == 0) continue;
        for (int64_t b = chunk.first_block; b < chunk.last_block; ++b) {
          if (mine(schedule.blocks[b], team)) sweep_slabs_back(b);
        }
        team.barrier();
        for (int64_t l = chunk.first_layer + team.thread; l < chunk.last_layer; l += team.num_threads) {
          finish_slabs(l);
          if (last && layers[l].outer > 1) mend(l);
        }
        team.barrier();
      }
      for (int64_t b = chunk.last_block; b-- > chunk.first_block;) {
        if (mine(schedule.blocks[b], team)) scale(b);
      }
    }
    stream_fence();
  }

  // t = W v over the rows of the block and, where an iteration follows, its part of W^T t.
  void sweep(int64_t b) {
    const Block& block = schedule.blocks[b];
    const auto& layer = layers[block.layer];
    const Work& own = work[block.layer];
    const int64_t index = b - schedule.blocks_of[block.layer].first;
    const T* weight = static_cast<const T*>(layer.weight);
    if (layer.outer > 1) return sweep_slabs(block, layer, own, own.partial + index * layer.h);

    const int64_t w = layer.inner;
    A* partial = own.partial + index * w;
    for (int64_t j = 0; j < w; ++j) partial[j] = 0;
    const auto rows = [&](auto count, int64_t i) {
      constexpr int R = decltype(count)::value;
      dot_rows<R>(weight + i * w, w, own.v, w, own.u + i);
      if (n_power_iterations > 0) add_rows<R>(weight + i * w, w, own.u + i, w, partial);
    };
    int64_t i = block.begin;
    for (; i + 8 <= block.end; i += 8) rows(Count<8>(), i);
    for (; i + 4 <= block.end; i += 4) rows(Count<4>(), i);
    for (; i < block.end; ++i) rows(Count<1>(), i);
    own.squares[index] = sum_of_squares(own.u + block.begin, block.end - block.begin);
  }

  template <int R>
  struct Count {
    static constexpr int value = R;
  };

  // t += sum over the slabs of the block of W_o v_o.
  void sweep_slabs(const Block& block, const SpectralNormFwdLayer& layer, const Work& own, A* t) {
    const int64_t h = layer.h, inner = layer.inner;
    for (int64_t i = 0; i < h; ++i) t[i] = 0;
    for (int64_t o = block.begin; o < block.end; ++o) {
      const T* slab = static_cast<const T*>(layer.weight) + o * h * inner;
      if (inner == 1) {
        add_rows<1>(slab, 0, own.v + o, h, t);
        continue;
      }
      for (int64_t i = 0; i < h; ++i) {
        A product;
        dot_rows<1>(slab + i * inner, 0, own.v + o * inner, inner, &product);
        t[i] += product;
      }
    }
  }

  // s_o = W_o^T u for the slabs of the block.
  void sweep_slabs_back(int64_t b) {
    const Block& block = schedule.blocks[b];
    const auto& layer = layers[block.layer];
    if (layer.outer == 1) return;
    const Work& own = work[block.layer];
    const int64_t h = layer.h, inner = layer.inner;
    for (int64_t o = block.begin; o < block.end; ++o) {
      const T* slab = static_cast<const T*>(layer.weight) + o * h * inner;
      A* s = own.v + o * inner;
      if (inner == 1) {
        dot_rows<1>(slab, 0, own.u, h, s);
        continue;
      }
      for (int64_t j = 0; j < inner; ++j) s[j] = 0;
      for (int64_t i = 0; i < h; ++i) add_rows<1>(slab + i * inner, 0, own.u + i, inner, s);
    }
    own.squares[b - schedule.blocks_of[block.layer].first] =
        sum_of_squares(own.v + block.begin * inner, (block.end - block.begin) * inner);
  }

  // Joins the partial sums of a layer: u, and v and sigma where outer == 1.
  void finish(int64_t l) {
    const auto& layer = layers[l];
    Work& own = work[l];
    const int64_t h = layer.h, w = layer.outer * layer.inner;
    const Span span = schedule.blocks_of[l];
    const int64_t blocks = span.last - span.first;
    const bool slabs = layer.outer > 1;
    if (slabs) join(own.partial, blocks, h, own.u);

    if (n_power_iterations == 0) {
      const T* u_in = static_cast<const T*>(layer.u_in);
      const double product = dot_wide(u_in, own.u, h);
      own.left_range = !in_range(product, 0);
      own.sigma = static_cast<A>(product);
      copy(static_cast<T*>(layer.u), u_in, h);
      copy(static_cast<T*>(layer.v), static_cast<const T*>(layer.v_in), w);
      return;
    }
    double t_square = 0;
    if (slabs) {
      t_square = sum_of_squares(own.u, h);
    } else {
      for (int64_t b = 0; b < blocks; ++b) t_square += own.squares[b];
    }
    const double t_norm = __builtin_sqrt(t_square);
    const double t_scale = 1.0 / (t_norm < eps ? eps : t_norm);
    own.left_range |= !in_range(t_norm, eps);
    T* u = static_cast<T*>(layer.u);
    for (int64_t i = 0; i < h; ++i) u[i] = narrow<T>(static_cast<A>(own.u[i] * t_scale));
    if (slabs) {
      for (int64_t i = 0; i < h; ++i) own.u[i] = static_cast<A>(own.u[i] * t_scale);
      return;
    }
    // W^T t is of the order |t|^2: outside of this range it is taken again, of the normalized t.
    constexpr bool is_float = sizeof(A) == sizeof(float);
    constexpr double smallest = is_float ? 1e-12 : 1e-70, largest = is_float ? 1e15 : 1e70;
    A* s = own.v;
    double s_scale = t_scale;
    if (t_norm != 0 && (t_norm < smallest || t_norm > largest)) {
      const T* weight = static_cast<const T*>(layer.weight);
      for (int64_t j = 0; j < w; ++j) s[j] = 0;
      for (int64_t i = 0; i < h; ++i) {
        const A u_i = static_cast<A>(own.u[i] * t_scale);
        add_rows<1>(weight + i * w, 0, &u_i, w, s);
      }
      s_scale = 1.0;
    } else {
      join(own.partial, blocks, w, s);
    }
    normalize(l, s, s_scale, __builtin_sqrt(sum_of_squares(s, w)));
  }

  void finish_slabs(int64_t l) {
    if (layers[l].outer == 1) return;
    const Span span = schedule.blocks_of[l];
    double s_square = 0;
    for (int64_t b = 0; b < span.last - span.first; ++b) s_square += work[l].squares[b];
    normalize(l, work[l].v, 1.0, __builtin_sqrt(s_square));
  }

  // v = s / max(|s|, eps) and sigma = <s, v> of s = scale * raw, in place; |raw| is known.
  void normalize(int64_t l, A* raw, double scale, double raw_norm) {
    const int64_t w = layers[l].outer * layers[l].inner;
    // Far below eps, a sum of squares of float64 has no number where sigma = |s|^2 / eps may have one.
    if (sizeof(A) == sizeof(double) && raw_norm < 1e-140) raw_norm = norm_in_range(raw, w, 1, raw_norm);
    const double s_norm = raw_norm * scale;
    const double v_scale = 1.0 / (s_norm < eps ? eps : s_norm);
    const double factor = scale * v_scale;
    work[l].left_range |= !in_range(s_norm, eps);
    T* v = static_cast<T*>(layers[l].v);
    for (int64_t j = 0; j < w; ++j) {
      raw[j] = static_cast<A>(raw[j] * factor);
      v[j] = narrow<T>(raw[j]);
    }
    work[l].sigma = static_cast<A>(s_norm * (s_norm * v_scale));
  }

  // Whether a number that a sum gave is one, and its square too. Where eps is larger, a small one is taken care of there.
  static bool in_range(double norm, double floor_of_norms) {
    constexpr double largest = static_cast<double>(std::numeric_limits<A>::max());
    if (!(norm <= largest && norm >= -largest)) return false;
    return sizeof(A) == sizeof(float) || norm > 1e-140 || floor_of_norms > 1e-140 || floor_of_norms == 0;
  }

  // The whole iteration again, by one thread, of W times a power of two that brings its largest entry near 1; sums in
  // double. Where W is zero or not finite nothing can be mended.
  void mend(int64_t l) {
    Work& own = work[l];
    const auto& layer = layers[l];
    const T *weight = static_cast<const T*>(layer.weight), *u_in = static_cast<const T*>(layer.u_in);
    const T* v_in = static_cast<const T*>(layer.v_in);
    const int64_t h = layer.h, inner = layer.inner, w = layer.outer * inner;
    if (own.left_range) {
      A largest = 0;
      bool finite = true;
      for (int64_t k = 0; k < h * w; ++k) {
        const A size = widen(weight[k]) < 0 ? -widen(weight[k]) : widen(weight[k]);
        finite &= size <= std::numeric_limits<A>::max();
        largest = largest < size ? size : largest;
      }
      if (finite && largest > 0) {
        constexpr int64_t kExponent = sizeof(A) == sizeof(float) ? 120 : 1000;  // of a unit and of its inverse
        int exponent = 0;
        __builtin_frexp(static_cast<double>(largest), &exponent);
        const auto power = static_cast<int>(max(-kExponent, min(kExponent, exponent)));
        own.unit = static_cast<A>(__builtin_ldexp(1.0, -power));
        iterate_scaled(own, layer, weight, u_in, v_in, h, w, inner);
      }
    }
    sigma[l] = own.sigma / own.unit;
  }

  void iterate_scaled(Work& own, const SpectralNormFwdLayer& layer, const T* weight, const T* u_in, const T* v_in,
                      int64_t h, int64_t w, int64_t inner) {
    const double unit = static_cast<double>(own.unit);
    const double scaled_eps = max_of(eps * unit, std::numeric_limits<double>::min());
    const auto entry = [=](int64_t i, int64_t j) {
      return static_cast<double>(widen(weight[(j / inner * h + i) * inner + j % inner]) * own.unit);
    };
    A *u = own.u, *v = own.v;
    const auto divide = [=](A* x, int64_t n) {
      double square = 0;
      for (int64_t k = 0; k < n; ++k) square += static_cast<double>(x[k]) * static_cast<double>(x[k]);
      const double inverse = 1 / max_of(__builtin_sqrt(square), scaled_eps);
      for (int64_t k = 0; k < n; ++k) x[k] = static_cast<A>(static_cast<double>(x[k]) * inverse);
      return square * inverse;
    };
    const auto rows = [=] {
      for (int64_t i = 0; i < h; ++i) {
        double sum = 0;
        for (int64_t j = 0; j < w; ++j) sum += entry(i, j) * static_cast<double>(v[j]);
        u[i] = static_cast<A>(sum);
      }
    };
    for (int64_t j = 0; j < w; ++j) v[j] = widen(v_in[j]);
    if (n_power_iterations == 0) {
      rows();
      own.sigma = static_cast<A>(dot_wide(u_in, u, h));
      return;
    }
    for (int64_t iteration = 0; iteration < n_power_iterations; ++iteration) {
      rows();
      divide(u, h);
      for (int64_t j = 0; j < w; ++j) {
        double sum = 0;
        for (int64_t i = 0; i < h; ++i) sum += entry(i, j) * static_cast<double>(u[i]);
        v[j] = static_cast<A>(sum);
      }
      own.sigma = static_cast<A>(divide(v, w));
    }
    T *u_out = static_cast<T*>(layer.u), *v_out = static_cast<T*>(layer.v);
    for (int64_t i = 0; i < h; ++i) u_out[i] = narrow<T>(u[i]);
    for (int64_t j = 0; j < w; ++j) v_out[j] = narrow<T>(v[j]);
  }

  static double max_of(double a, double b) { return a < b ? b : a; }  // a NaN of a stays

  void scale(int64_t b) {
    const Block& block = schedule.blocks[b];
    const auto& layer = layers[block.layer];
    const int64_t unit = layer.outer == 1 ? layer.inner : layer.h * layer.inner;
    const T* weight = static_cast<const T*>(layer.weight) + block.begin * unit;
    T* y = static_cast<T*>(layer.y) + block.begin * unit;
    const A power = work[block.layer].unit;
    const int64_t n = (block.end - block.begin) * unit;
    A factor = scale_of(sigma[block.layer]);
    const bool is_zero = factor == A(1) && !(sigma[block.layer] == A(1));
    if (power != A(1) && !is_zero) factor = A(1) / work[block.layer].sigma;
    if (power == A(1) || is_zero) {
      generate(y, n, stream, [=](int64_t j) { return narrow<T>(widen(weight[j]) * factor); });
    } else {
      generate(y, n, stream, [=](int64_t j) { return narrow<T>(widen(weight[j]) * power * factor); });
    }
  }

  // out = the sum of `blocks` arrays of n, in their order.
  static void join(const A* partial, int64_t blocks, int64_t n, A* out) {
    for (int64_t j = 0; j < n; ++j) out[j] = partial[j];
    for (int64_t b = 1; b < blocks; ++b) {
      const A* part = partial + b * n;
      for (int64_t j = 0; j < n; ++j) out[j] += part[j];
    }
  }

  static double dot_wide(const T* x, const A* y, int64_t n) {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += static_cast<double>(widen(x[i])) * static_cast<double>(y[i]);
    return total;
  }

  static void copy(T* out, const T* in, int64_t n) { std::memcpy(out, in, static_cast<size_t>(n) * sizeof(T)); }
};

template <class T>
void forward(const SpectralNormFwdLayer* layers, int64_t num_layers, void* sigma, int64_t n_power_iterations,
             double eps, int num_threads) {
  using A = typename Accumulate<T>::type;
  const int64_t bytes = total_bytes(layers, num_layers, sizeof(T));
  Forward<T, A> op{layers, num_layers, static_cast<A*>(sigma), n_power_iterations, eps, bytes > kStreamBytes, {}, {}};
  launch(op, bytes, num_threads);
}

}  // namespace

void spectral_norm_fwd(Dtype dtype, const SpectralNormFwdLayer* layers, int64_t num_layers, void* sigma,
                       int64_t n_power_iterations, double eps, int num_threads) {
  const auto serve = [&](auto fn) { fn(layers, num_layers, sigma, n_power_iterations, eps, num_threads); };
  switch (dtype) {
    case Dtype::float32: return serve(forward<float>);
    case Dtype::float64: return serve(forward<double>);
    case Dtype::float16: return serve(forward<float16>);
    case Dtype::bfloat16: return serve(forward<bfloat16>);
  }
}

}  // namespace lipgan::cpu::LIPGAN_ISA
