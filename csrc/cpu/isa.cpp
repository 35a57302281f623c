#include "isa.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "lipgan/gradient_penalty.h"
#include "lipgan/matrix_sqrt.h"
#include "lipgan/mlp_gradient_penalty.h"
#include "lipgan/nearest_neighbours.h"
#include "lipgan/polar_factor.h"
#include "lipgan/spectral_norm.h"
#include "lipgan/symmetrize.h"

// A build for a sanitizer may do with the instruction set that needs no detection.
#if defined(__x86_64__) && !defined(LIPGAN_BASELINE_ONLY)
#define LIPGAN_HAS_AVX 1
#else
#define LIPGAN_HAS_AVX 0
#endif

// Each kernel file is compiled once per instruction set, into a namespace named after it.
#define LIPGAN_DECLARE(isa)                                                                                      \
  namespace isa {                                                                                                \
  void spectral_norm_fwd(Dtype, const SpectralNormFwdLayer*, int64_t, void*, int64_t, double, int);              \
  void spectral_norm_bwd(Dtype, const SpectralNormBwdLayer*, int64_t, const void*, const void*, int);            \
  void spectral_norm_double_bwd(Dtype, const SpectralNormDoubleBwdLayer*, int64_t, const void*, void*, void*,    \
                                int);                                                                            \
  void gradient_penalty_interpolate(Dtype, const void*, const void*, const void*, void*, int64_t, int64_t, int); \
  void gradient_penalty_fwd(Dtype, PenaltyKind, const void*, void*, void*, void*, int64_t, int64_t, int64_t,     \
                            double, double, int);                                                                \
  void mlp_gradient_penalty_fwd(Dtype, PenaltyKind, const void*, const MlpLayer*, int64_t, const MlpLoss&, void*, \
                                void*, int64_t, int64_t, double, double, int);                                   \
  void matrix_sqrt_fwd(Dtype, const MatrixSqrtFwd&, int);                                                        \
  bool polar_factor_fwd(Dtype, const PolarFactorFwd&, int);                                                      \
  bool polar_factor_bwd(Dtype, const PolarFactorBwd&, int);                                                      \
  void nearest_neighbours_fwd(Dtype, const Points&, bool, int64_t, double*, double*, int);                       \
  void ball_counts(Dtype, const Points&, const double*, const double*, bool, double*, double*, int);             \
  void symmetrize_look(Dtype, const void*, int64_t, double*, int);                                               \
  void symmetrize_fwd(Dtype, const void*, int64_t, double*, int);                                                \
  }

namespace lipgan::cpu {

LIPGAN_DECLARE(baseline)
#if LIPGAN_HAS_AVX
LIPGAN_DECLARE(avx2)
LIPGAN_DECLARE(avx512)
#endif

namespace {

enum Isa : int { kBaseline, kAvx2, kAvx512 };
const char* const kNames[] = {"baseline", "avx2", "avx512"};

int best() {
#if LIPGAN_HAS_AVX
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return avx512 ? kAvx512 : avx2 ? kAvx2 : kBaseline;
#else
  return kBaseline;
#endif
}

int find(const std::string& name) {
  const auto names = supported_isas();
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end()) {
    std::string message = "isa must be one of";
    for (const auto& supported : names) message += " '" + supported + "'";
    throw std::invalid_argument(message + ", got '" + name + "'");
  }
  return static_cast<int>(found - names.begin());
}

std::atomic<int>& current() {
  static std::atomic<int> isa = [] {
    const char* name = std::getenv("LIPGAN_ISA");
    return name ? find(name) : best();
  }();
  return isa;
}

}  // namespace

std::vector<std::string> supported_isas() { return {kNames, kNames + best() + 1}; }

std::string isa() { return kNames[current().load()]; }

void set_isa(const std::string& name) { current().store(find(name)); }

#if LIPGAN_HAS_AVX
#define LIPGAN_DISPATCH(call)              \
  switch (current().load()) {              \
    case kAvx512: return avx512::call;     \
    case kAvx2: return avx2::call;         \
    default: return baseline::call;        \
  }
#else
#define LIPGAN_DISPATCH(call) return baseline::call;
#endif

void matrix_sqrt_fwd(Dtype dtype, const MatrixSqrtFwd& args, int num_threads) {
  LIPGAN_DISPATCH(matrix_sqrt_fwd(dtype, args, num_threads))
}

bool polar_factor_fwd(Dtype dtype, const PolarFactorFwd& args, int num_threads) {
  LIPGAN_DISPATCH(polar_factor_fwd(dtype, args, num_threads))
}

bool polar_factor_bwd(Dtype dtype, const PolarFactorBwd& args, int num_threads) {
  LIPGAN_DISPATCH(polar_factor_bwd(dtype, args, num_threads))
}

void symmetrize_look(Dtype dtype, const void* a, int64_t n, double* seen, int num_threads) {
  LIPGAN_DISPATCH(symmetrize_look(dtype, a, n, seen, num_threads))
}

void symmetrize_fwd(Dtype dtype, const void* a, int64_t n, double* symmetric, int num_threads) {
  LIPGAN_DISPATCH(symmetrize_fwd(dtype, a, n, symmetric, num_threads))
}

void nearest_neighbours_fwd(Dtype dtype, const Points& points, bool same, int64_t k, double* squared, double* indices,
                            int num_threads) {
  LIPGAN_DISPATCH(nearest_neighbours_fwd(dtype, points, same, k, squared, indices, num_threads))
}

void ball_counts(Dtype dtype, const Points& points, const double* x_squared_radii, const double* y_squared_radii,
                 bool closed, double* x_counts, double* y_counts, int num_threads) {
  LIPGAN_DISPATCH(ball_counts(dtype, points, x_squared_radii, y_squared_radii, closed, x_counts, y_counts,
                              num_threads))
}

void spectral_norm_fwd(Dtype dtype, const SpectralNormFwdLayer* layers, int64_t num_layers, void* sigma,
                       int64_t n_power_iterations, double eps, int num_threads) {
  LIPGAN_DISPATCH(spectral_norm_fwd(dtype, layers, num_layers, sigma, n_power_iterations, eps, num_threads))
}

void spectral_norm_bwd(Dtype dtype, const SpectralNormBwdLayer* layers, int64_t num_layers, const void* sigma,
                       const void* grad_sigma, int num_threads) {
  LIPGAN_DISPATCH(spectral_norm_bwd(dtype, layers, num_layers, sigma, grad_sigma, num_threads))
}

void spectral_norm_double_bwd(Dtype dtype, const SpectralNormDoubleBwdLayer* layers, int64_t num_layers,
                              const void* sigma, void* to_sigma, void* to_grad_sigma, int num_threads) {
  LIPGAN_DISPATCH(spectral_norm_double_bwd(dtype, layers, num_layers, sigma, to_sigma, to_grad_sigma, num_threads))
}

void gradient_penalty_interpolate(Dtype dtype, const void* real, const void* fake, const void* mix, void* x_hat,
                                  int64_t batch, int64_t length, int num_threads) {
  LIPGAN_DISPATCH(gradient_penalty_interpolate(dtype, real, fake, mix, x_hat, batch, length, num_threads))
}

void gradient_penalty_fwd(Dtype dtype, PenaltyKind kind, const void* grads, void* penalty, void* norms, void* cotangent,
                          int64_t outer, int64_t length, int64_t inner, double weight, double target,
                          int num_threads) {
  LIPGAN_DISPATCH(gradient_penalty_fwd(dtype, kind, grads, penalty, norms, cotangent, outer, length, inner, weight,
                                       target, num_threads))
}

void mlp_gradient_penalty_fwd(Dtype dtype, PenaltyKind kind, const void* x, const MlpLayer* layers, int64_t num_layers,
                              const MlpLoss& loss, void* penalty, void* norms, int64_t batch, int64_t width,
                              double weight, double target, int num_threads) {
  LIPGAN_DISPATCH(mlp_gradient_penalty_fwd(dtype, kind, x, layers, num_layers, loss, penalty, norms, batch, width,
                                           weight, target, num_threads))
}

}  // namespace lipgan::cpu
