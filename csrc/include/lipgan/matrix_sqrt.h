// The op matrix_sqrt: roots of many small symmetric positive semi-definite matrices at once.
//
// A = V diag(t) V^T gives A^(1/2) = V diag(t^(1/2)) V^T, of the symmetric part of A. Negative t count as 0.
#pragma once
#include <cstdint>

#include "lipgan/dtype.h"

namespace lipgan {

// The largest n: beyond it, the matrices of a register's lanes do not fit the caches, and LAPACK's blocks pay.
constexpr int64_t kMatrixSqrtLimit = 64;

// T is float or double.
struct MatrixSqrtFwd {
  const void* a;      // T [count, n, n]
  void* root;         // T [count, n, n]: (A + eps I)^(1/2), or its inverse
  void* roots;        // T [count, n], or null: the square roots of the eigenvalues of A + eps I, 0 where t is at most
                      // `resolution` times the largest
  void* vectors;      // T [count, n, n], or null: the eigenvectors, as columns in the order of roots
  void* seen;         // T [4, count]: max|A| (NaN where A is not finite), max|A - A^T|, the extreme eigenvalues of A
  int64_t count, n;
  bool inverse;
  double eps, resolution;
};

namespace cpu {

void matrix_sqrt_fwd(Dtype dtype, const MatrixSqrtFwd& args, int num_threads);

}  // namespace cpu
}  // namespace lipgan
