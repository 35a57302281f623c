// The op polar_factor: the orthogonal matrix nearest to A, and its derivative, by products of matrices.
//
// Derivation: docs/numerics/matrix_sqrt.md, "Orthogonal weights". Matrices are [m, n] with m >= n, one behind the other.
#pragma once
#include <cstdint>

#include "lipgan/dtype.h"

namespace lipgan {

// The largest n: beyond it the matrices leave the caches, and a BLAS arranges them for that.
constexpr int64_t kPolarFactorLimit = 1024;

// A polynomial for (1 + x)^(-1/2) on [-radius, radius]; a row of the levels.
constexpr int64_t kPolarTerms = 12;
struct PolarLevel {
  double radius;
  double terms;      // 3, 5 or 12: coefficients beyond those are 0
  double is_final;   // whether its error is below rounding, else 0
  double coefficients[kPolarTerms];
};

// A step far from orthogonal matrices: u <- u (p I + q u^T u + r (u^T u)^2), with singular values up to 1.
struct PolarStep {
  double p, q, r;
};

// T is float or double.
struct PolarFactorFwd {
  const void* a;  // T [count, m, n]
  void* u;        // T [count, m, n], with orthonormal columns
  int64_t count, m, n;
  const PolarLevel* levels;  // [num_levels]: of each number of terms by ascending radius
  int64_t num_levels;
  const PolarStep* schedule;  // [num_steps]; the last goes on
  int64_t num_steps, further;  // steps at most: num_steps + further
};

struct PolarFactorBwd {
  const void *grad, *u, *a;  // T [count, m, n]
  void* to_a;                // T [count, m, n]: u Y + (I - u u^T) grad h^-1, with h = u^T a and
                             // h Y + Y h = u^T grad - grad^T u
  int64_t count, m, n;
  int64_t iterations;  // of conjugate gradients, at most
  double tolerance;    // of their residual, in the Frobenius norm, relative to the right side
};

namespace cpu {

// False where the steps do not arrive: A loses rank or nearly so, is not finite, or has squares that leave the range.
// u is then not written in full.
bool polar_factor_fwd(Dtype dtype, const PolarFactorFwd& args, int num_threads);
bool polar_factor_bwd(Dtype dtype, const PolarFactorBwd& args, int num_threads);

}  // namespace cpu
}  // namespace lipgan
