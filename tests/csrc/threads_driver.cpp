// The kernels of csrc/cpu called from several threads at once, each call with threads of its own: for ThreadSanitizer
// (scripts/sanitize.sh). There is no OpenMP runtime in this program, so that csrc/cpu starts std::threads, whose
// synchronization the sanitizer understands. Each result must be, bit by bit, that of one thread.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "cpu/memory.h"
#include "cpu/threads.h"
#include "lipgan/gradient_penalty.h"
#include "lipgan/matrix_sqrt.h"
#include "lipgan/mlp_gradient_penalty.h"
#include "lipgan/nearest_neighbours.h"
#include "lipgan/polar_factor.h"
#include "lipgan/spectral_norm.h"

// What csrc/cpu/isa.cpp chooses from, with the one instruction set that is compiled.
namespace lipgan::cpu::baseline {
void spectral_norm_fwd(Dtype, const SpectralNormFwdLayer*, int64_t, void*, int64_t, double, int);
void spectral_norm_bwd(Dtype, const SpectralNormBwdLayer*, int64_t, const void*, const void*, int);
void gradient_penalty_interpolate(Dtype, const void*, const void*, const void*, void*, int64_t, int64_t, int);
void gradient_penalty_fwd(Dtype, PenaltyKind, const void*, void*, void*, void*, int64_t, int64_t, int64_t, double, double,
                          int);
void mlp_gradient_penalty_fwd(Dtype, PenaltyKind, const void*, const MlpLayer*, int64_t, const MlpLoss&, void*, void*,
                              int64_t, int64_t, double, double, int);
void matrix_sqrt_fwd(Dtype, const MatrixSqrtFwd&, int);
bool polar_factor_fwd(Dtype, const PolarFactorFwd&, int);
bool polar_factor_bwd(Dtype, const PolarFactorBwd&, int);
void nearest_neighbours_fwd(Dtype, const Points&, bool, int64_t, double*, double*, int);
void ball_counts(Dtype, const Points&, const double*, const double*, bool, double*, double*, int);
}  // namespace lipgan::cpu::baseline

namespace {

using namespace lipgan;
namespace kernels = lipgan::cpu::baseline;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;

Floats draw(size_t count, float scale = 1) {
  static std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  Floats values(count);
  for (float& value : values) value = scale * normal(generator);
  return values;
}

// What an op gives on `num_threads` threads, as bytes.
using Bytes = std::vector<unsigned char>;
using Op = std::function<Bytes(int num_threads)>;

template <class... Arrays>
Bytes bytes_of(const Arrays&... arrays) {
  Bytes bytes;
  const auto add = [&](const auto& array) {
    const auto* begin = reinterpret_cast<const unsigned char*>(array.data());
    bytes.insert(bytes.end(), begin, begin + array.size() * sizeof(array[0]));
  };
  (add(arrays), ...);
  return bytes;
}

// Three weights of 600 KB and less; the second along another dimension, the third so large that it is taken again.
Op spectral_norm() {
  struct Weight {
    int64_t outer, h, inner;
    float scale;
  };
  const std::vector<Weight> shapes = {{1, 300, 500, 1}, {20, 64, 90, 1}, {1, 200, 300, 1e38f}};
  std::vector<Floats> weights, us, vs;
  for (const Weight& shape : shapes) {
    weights.push_back(draw(static_cast<size_t>(shape.outer * shape.h * shape.inner), shape.scale / 8));
    us.push_back(draw(static_cast<size_t>(shape.h), 0.05f));
    vs.push_back(draw(static_cast<size_t>(shape.outer * shape.inner), 0.05f));
  }
  return [=](int num_threads) {
    std::vector<Floats> ys = weights, us_out = us, vs_out = vs, grads = weights;
    Floats sigma(shapes.size());
    std::vector<SpectralNormFwdLayer> forward;
    std::vector<SpectralNormBwdLayer> backward;
    for (size_t l = 0; l < shapes.size(); ++l) {
      const Weight& shape = shapes[l];
      forward.push_back({weights[l].data(), us[l].data(), vs[l].data(), ys[l].data(), us_out[l].data(), vs_out[l].data(),
                         shape.outer, shape.h, shape.inner});
      backward.push_back({weights[l].data(), ys[l].data(), us_out[l].data(), vs_out[l].data(), grads[l].data(),
                          shape.outer, shape.h, shape.inner});
    }
    const auto count = static_cast<int64_t>(shapes.size());
    kernels::spectral_norm_fwd(Dtype::float32, forward.data(), count, sigma.data(), 2, 1e-12, num_threads);
    kernels::spectral_norm_bwd(Dtype::float32, backward.data(), count, sigma.data(), nullptr, num_threads);
    Bytes bytes = bytes_of(sigma);
    for (size_t l = 0; l < shapes.size(); ++l) {
      const Bytes own = bytes_of(ys[l], us_out[l], vs_out[l], grads[l]);
      bytes.insert(bytes.end(), own.begin(), own.end());
    }
    return bytes;
  };
}

Op penalty(PenaltyKind kind, int64_t outer, int64_t length, int64_t inner) {
  const Floats grads = draw(static_cast<size_t>(outer * length * inner)), fake = draw(grads.size());
  const Floats mix = draw(static_cast<size_t>(outer));
  return [=](int num_threads) {
    Floats sum(1), norms(static_cast<size_t>(outer * inner)), cotangent(grads.size()), x_hat(grads.size());
    kernels::gradient_penalty_fwd(Dtype::float32, kind, grads.data(), sum.data(), norms.data(), cotangent.data(), outer,
                                  length, inner, 10, 1, num_threads);
    kernels::gradient_penalty_interpolate(Dtype::float32, grads.data(), fake.data(), mix.data(), x_hat.data(), outer,
                                          length * inner, num_threads);
    return bytes_of(sum, norms, cotangent, x_hat);
  };
}

Op perceptron(int64_t batch, int64_t width, bool with_loss, MlpActivation phi = MlpActivation::leaky_relu) {
  const std::vector<int64_t> widths = {20, width, width, 1};
  const Floats x = draw(static_cast<size_t>(batch * widths[0]));
  std::vector<Floats> weights;
  for (size_t l = 1; l < widths.size(); ++l) weights.push_back(draw(static_cast<size_t>(widths[l] * widths[l - 1]), 0.1f));
  const Floats score_grads = draw(static_cast<size_t>(batch));
  return [=](int num_threads) {
    std::vector<Floats> grads = weights, bias_grads;
    for (size_t l = 1; l < widths.size(); ++l) bias_grads.emplace_back(static_cast<size_t>(widths[l]));
    std::vector<MlpLayer> layers;
    for (size_t l = 0; l < weights.size(); ++l) {
      const bool is_last = l + 1 == weights.size();
      layers.push_back({weights[l].data(), nullptr, nullptr, nullptr, grads[l].data(), bias_grads[l].data(), 0.2,
                        widths[l + 1], is_last ? MlpActivation::leaky_relu : phi});
    }
    const MlpLoss loss{with_loss ? score_grads.data() : nullptr, with_loss ? batch / 3 : 0, batch};
    Floats sum(1), norms(static_cast<size_t>(batch));
    kernels::mlp_gradient_penalty_fwd(Dtype::float32, PenaltyKind::max, x.data(), layers.data(),
                                      static_cast<int64_t>(layers.size()), loss, sum.data(), norms.data(), batch,
                                      widths[0], 10, 1, num_threads);
    return bytes_of(sum, norms, grads[0], grads[1], grads[2], bias_grads[0], bias_grads[1], bias_grads[2]);
  };
}

Op roots() {
  constexpr int64_t count = 40, n = 16;
  Doubles a(count * n * n);
  for (int64_t k = 0; k < count; ++k) {
    const Floats row = draw(n);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        a[static_cast<size_t>((k * n + i) * n + j)] =
            static_cast<double>(row[static_cast<size_t>(i)] * row[static_cast<size_t>(j)]) + (i == j ? 1 : 0);
      }
    }
  }
  return [=](int num_threads) {
    Doubles root(a.size()), values(count * n), vectors(a.size()), seen(4 * count);
    kernels::matrix_sqrt_fwd(Dtype::float64,
                             {a.data(), root.data(), values.data(), vectors.data(), seen.data(), count, n, false, 0, 1e-14},
                             num_threads);
    return bytes_of(root, values, vectors, seen);
  };
}

Op polar_factor() {
  constexpr int64_t m = 240, n = 200;  // threads share the rows of products
  Floats a = draw(m * n, 0.005f);
  for (size_t k = 0; k < n; ++k) a[k * n + k] += 1;
  const Floats grad = draw(a.size());
  return [=](int num_threads) {
    Floats u(a.size()), to_a(a.size());
    // Terms of Taylor's series, which take the singular values, near to 1, to 1 within rounding in two steps.
    PolarLevel level{0.5, 5, 0, {1, -1 / 2.0, 3 / 8.0, -5 / 16.0, 35 / 128.0}}, last = level;
    last.radius = 0.01, last.is_final = 1;
    const PolarLevel levels[] = {last, level};
    const PolarStep schedule{15 / 8.0, -10 / 8.0, 3 / 8.0};
    bool arrived = kernels::polar_factor_fwd(Dtype::float32, {a.data(), u.data(), 1, m, n, levels, 2, &schedule, 1, 20},
                                             num_threads);
    arrived = kernels::polar_factor_bwd(Dtype::float32,
                                        {grad.data(), u.data(), a.data(), to_a.data(), 1, m, n, 40, 1e-6}, num_threads) &&
              arrived;
    if (!arrived) std::fprintf(stderr, "the polar factor was not reached\n");
    return bytes_of(u, to_a);
  };
}

Op neighbours() {
  constexpr int64_t m = 500, n = 400, d = 24, k = 3;
  const Floats x = draw(m * d), y = draw(n * d);
  const Doubles x_radii(m, 40.0), y_radii(n, 44.0);
  return [=](int num_threads) {
    Doubles squared(m * k), indices(m * k), x_counts(2 * m), y_counts(2 * n);
    const cpu::Points points{x.data(), y.data(), m, n, d};
    kernels::nearest_neighbours_fwd(Dtype::float32, points, false, k, squared.data(), indices.data(), num_threads);
    kernels::ball_counts(Dtype::float32, points, x_radii.data(), y_radii.data(), true, x_counts.data(), y_counts.data(),
                         num_threads);
    return bytes_of(squared, indices, x_counts, y_counts);
  };
}

// The cache of outputs, with sizes that come and go.
Op outputs() {
  return [](int) {
    for (size_t round = 0; round < 300; ++round) {
      const size_t bytes = (size_t{64} << 10) * (1 + round % 5);
      auto* memory = static_cast<unsigned char*>(cpu::acquire(bytes));
      memory[0] = memory[bytes - 1] = 1;
      cpu::release(memory, bytes);
      if (round % 100 == 0) cpu::empty_cache();
    }
    return Bytes{};
  };
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 3;
  if (std::strcmp(lipgan::cpu::thread_pool_name(), "std::thread") != 0) {
    std::fprintf(stderr, "an OpenMP runtime has been loaded, which ThreadSanitizer does not understand\n");
    return 1;
  }
  const std::vector<Op> ops = {spectral_norm(),
                               penalty(PenaltyKind::two_sided, 4, 60000, 1),  // long rows, shared in pieces
                               penalty(PenaltyKind::max, 8, 12, 900),
                               penalty(PenaltyKind::max, 40000, 3, 1),
                               perceptron(200, 64, false),  // threads share the samples
                               perceptron(8, 700, false),   // threads share the columns
                               perceptron(200, 64, true),
                               perceptron(8, 700, true),
                               perceptron(200, 64, true, MlpActivation::tanh),
                               perceptron(8, 700, false, MlpActivation::gelu),
                               perceptron(8, 700, true, MlpActivation::softplus),
                               roots(),
                               polar_factor(),
                               neighbours(),
                               outputs()};
  cpu::insist_on_threads(true);  // under a sanitizer, more than there are processors, they never pay
  std::vector<Bytes> expected;
  for (const Op& op : ops) expected.push_back(op(1));
  std::vector<int> wrong(ops.size());
  for (int round = 0; round < rounds; ++round) {
    std::vector<std::thread> callers;
    for (size_t k = 0; k < ops.size(); ++k) {
      callers.emplace_back([&, k] { wrong[k] += ops[k](2 + round % 3) != expected[k]; });
    }
    for (std::thread& caller : callers) caller.join();
  }
  int total = 0;
  for (size_t k = 0; k < ops.size(); ++k) {
    if (wrong[k]) std::fprintf(stderr, "op %zu: %d of %d results differ from those of one thread\n", k, wrong[k], rounds);
    total += wrong[k];
  }
  std::printf("%zu ops, %d rounds, %d results that depend on the threads\n", ops.size(), rounds, total);
  return total != 0;
}
