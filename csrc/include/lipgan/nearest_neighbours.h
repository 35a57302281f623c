// The op nearest_neighbours: the nearest of n points to each of m points, and how many points lie in balls around
// others. No array of m * n numbers is made.
//
//   D(x, y) = sum over d of (x_d - y_d)^2, in double: 0 for equal points, D(x, y) = D(y, x), the same number wherever the
//             same two points occur
//
// Every decision is that of D. Most are taken by a bound on D from a product in single precision, and D itself is
// computed only where the bound does not decide (docs/numerics/nearest_neighbours.md).
#pragma once
#include <cstdint>

#include "lipgan/dtype.h"

namespace lipgan::cpu {

// T is float for float32, double for float64. Points are rows of finite numbers; d >= 0.
struct Points {
  const void* x;  // T [m, d]
  const void* y;  // T [n, d]
  int64_t m, n, d;
};

// For each x the k smallest D to a y, smallest first, the lower index first among equals; k <= n.
// `same`: y is x, and no point is its own neighbour; k < n.
void nearest_neighbours_fwd(Dtype dtype, const Points& points, bool same, int64_t k,
                            double* squared,  // [m, k]
                            double* indices,  // [m, k], whole numbers
                            int num_threads);

// The ball of a point holds the points with D < its radius squared, or D <= it if `closed`.
void ball_counts(Dtype dtype, const Points& points,
                 const double* x_squared_radii,  // [m]
                 const double* y_squared_radii,  // [n]
                 bool closed,
                 double* x_counts,  // [2, m]: of the ys in the ball of x; of the balls of ys that x is in
                 double* y_counts,  // [2, n]: of the xs in the ball of y; of the balls of xs that y is in
                 int num_threads);

}  // namespace lipgan::cpu
