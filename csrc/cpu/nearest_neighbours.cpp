// nearest_neighbours on the CPU. Definitions: include/lipgan/nearest_neighbours.h.
//
// The threads share the rows of x. A block of rows meets one panel of y after the other: a product in float gives
// -2 <x, y> for the points moved by a common offset, and with the squares of their lengths bounds below and above D.
// Few pairs are near enough to be looked at, and fewer still need D itself. Among the points of one set, a pair is met
// once and offered to both.
#include "lipgan/nearest_neighbours.h"

#include <cmath>
#include <limits>

#include "arena.h"
#include "integers.h"
#include "matmul.h"
#include "memory.h"
#include "threads.h"

namespace lipgan::cpu::LIPGAN_ISA {
namespace {

constexpr int64_t kProductsPerThread = 1 << 20;  // multiplications that pay for waking a thread
constexpr int64_t kBlockRows = 48;               // of x: with 512 features 96 KiB, beside a panel in an L2 cache

// The distance that decides. Eight sums, so that its order is the same on every processor with vectors of doubles.
template <class T>
double squared_distance(const T* x, const T* y, int64_t d) {
  double sums[8] = {};
  int64_t k = 0;
  for (; k + 8 <= d; k += 8) {
#pragma GCC unroll 8
    for (int64_t lane = 0; lane < 8; ++lane) {
      const double difference = static_cast<double>(x[k + lane]) - static_cast<double>(y[k + lane]);
      sums[lane] += difference * difference;
    }
  }
  for (int64_t lane = 0; k < d; ++k, ++lane) {
    const double difference = static_cast<double>(x[k]) - static_cast<double>(y[k]);
    sums[lane] += difference * difference;
  }
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

template <class T>
struct Search {
  static constexpr int64_t L = kLanes<float>;
  static constexpr int64_t kWidth = kTileVectors * L;                           // columns of a panel
  static constexpr int64_t kDepth = kPanelBytes / (kTileVectors * kVectorBytes);  // of the part in the L1 cache

  const T *x, *y;
  int64_t m, n, d;
  // nearest_neighbours_fwd
  bool same;
  int64_t k;
  double *squared, *indices;
  // ball_counts. Not told by its pointers: those of empty arrays may be null.
  bool counting;
  const double *x_radii, *y_radii;
  bool closed;
  double *x_counts, *y_counts;

  double* offset = nullptr;    // [d]: the mean of y
  double* extremes = nullptr;  // [threads]: the largest |x - offset|, |y - offset|
  float* rows = nullptr;       // [m, d]: x, moved, scaled and rounded
  float* panels = nullptr;     // [ceil(n / width), d, width]: -2 y, in the same way
  double *x_norms = nullptr, *y_norms = nullptr;  // squares of lengths, moved and scaled
  float *y_low = nullptr;      // [n, filled up]: what y adds to the lower bound of D
  float *y_reach = nullptr;    // [n, filled up]: the rest of a y's radius
  float* products = nullptr;   // [threads, rows of a block, width]
  float* spare = nullptr;      // [threads, lanes, d]
  double* counts = nullptr;    // [threads, 2, n]
  // Where a pair is met once: what each thread has found.
  double *own_squared = nullptr, *own_indices = nullptr;  // [threads, n, k], like squared and indices
  float* own_reach = nullptr;                             // [threads, n, filled up]: as `reach`, of the k-th of them
  double slack = 0, tiny = 0;  // |bound - D| <= slack (|x|^2 + |y|^2) + tiny
  double scale = 1;            // of squares: a power of 2

  int64_t num_panels() const { return ceil_div(n, kWidth); }

  // Whether a pair is met once. Then each thread has lists of its own for all points: they should take no more memory
  // than the copies of the points, and the pairs that each list begins with, none near, be few among all.
  bool pairs(int num_threads) const {
    return same && !counting && 16 * num_threads * k <= 8 * d && 64 * num_threads * k <= n;
  }

  void prepare(Arena& arena, int num_threads) {
    offset = arena.take<double>(d);
    extremes = arena.take<double>(num_threads);
    rows = arena.take<float>(m * d);
    panels = arena.take<float>(num_panels() * d * kWidth);
    x_norms = arena.take<double>(m);
    y_norms = arena.take<double>(n);
    y_low = arena.take<float>(num_panels() * kWidth);
    y_reach = arena.take<float>(num_panels() * kWidth);
    products = arena.take<float>(num_threads * kBlockRows * kWidth);
    spare = arena.take<float>(num_threads * L * d);
    counts = arena.take<double>(counting ? num_threads * 2 * n : 0);
    const int64_t lists = pairs(num_threads) ? num_threads : 0;
    own_squared = arena.take<double>(lists * n * k);
    own_indices = arena.take<double>(lists * n * k);
    own_reach = arena.take<float>(lists * num_panels() * kWidth);
    // The sum of d products, the roundings of their factors, and those of the norms and of what is added to them.
    slack = static_cast<double>(d + 32) * 0x1p-24 * (1 + static_cast<double>(d + 32) * 0x1p-23);
    tiny = static_cast<double>(d + 1) * 0x1p-120;  // of factors and products that are too small for float
  }

  static void run(void* self, const Team& team) { static_cast<Search*>(self)->run(team); }

  void run(const Team& team) {
    move(team);
    if (pairs(team.num_threads)) return run_pairs(team);
    if (counting) {
      double* own = counts + team.thread * 2 * n;
      for (int64_t j = 0; j < 2 * n; ++j) own[j] = 0;
    }
    const int64_t blocks = ceil_div(m, kBlockRows);
    for (int64_t block = team.thread; block < blocks; block += team.num_threads) {
      const int64_t first = block * kBlockRows, last = min(first + kBlockRows, m);
      for (int64_t i = first; i < last; ++i) begin_row(i);
      for (int64_t p = 0; p < num_panels(); ++p) {
        float* product = products + team.thread * kBlockRows * kWidth;
        multiply_panel(first, last, p, product);
        const int64_t columns = min(kWidth, n - p * kWidth);
        for (int64_t i = first; i < last; ++i, product += kWidth) {
          if (counting) {
            count(i, p * kWidth, columns, product, counts + team.thread * 2 * n);
          } else {
            search(i, p * kWidth, columns, product);
          }
        }
      }
    }
    if (counting) {
      team.barrier();
      for (int64_t j = 2 * n * team.thread / team.num_threads; j < 2 * n * (team.thread + 1) / team.num_threads; ++j) {
        double total = 0;
        for (int thread = 0; thread < team.num_threads; ++thread) total += counts[thread * 2 * n + j];
        y_counts[j] = total;
      }
    }
  }

  void run_pairs(const Team& team) {
    const int64_t filled = num_panels() * kWidth;
    double *best = own_squared + team.thread * n * k, *index = own_indices + team.thread * n * k;
    float* limits = own_reach + team.thread * filled;
    for (int64_t t = 0; t < n * k; ++t) best[t] = std::numeric_limits<double>::infinity(), index[t] = 0;
    for (int64_t j = 0; j < filled; ++j) limits[j] = std::numeric_limits<float>::infinity();
    const int64_t blocks = ceil_div(n, kBlockRows);
    for (int64_t block = team.thread; block < blocks; block += team.num_threads) {
      const int64_t first = block * kBlockRows, last = min(first + kBlockRows, n);
      for (int64_t p = first / kWidth; p < num_panels(); ++p) {
        float* product = products + team.thread * kBlockRows * kWidth;
        multiply_panel(first, last, p, product);
        const int64_t columns = min(kWidth, n - p * kWidth);
        for (int64_t i = first; i < last; ++i, product += kWidth) {
          meet(i, p * kWidth, max(i + 1 - p * kWidth, 0), columns, product, best, index, limits);
        }
      }
    }
    team.barrier();
    for (int64_t i = n * team.thread / team.num_threads; i < n * (team.thread + 1) / team.num_threads; ++i) {
      begin_row(i);
      for (int64_t t = 0; t < team.num_threads * k; ++t) {
        const int64_t place = (t / k * n + i) * k + t % k;
        offer(own_squared[place], own_indices[place], squared + i * k, indices + i * k);
      }
    }
  }

  // ---- the points as the products need them ----

  void move(const Team& team) {
    const int64_t begin = d * team.thread / team.num_threads, end = d * (team.thread + 1) / team.num_threads;
    for (int64_t f = begin; f < end; ++f) offset[f] = 0;
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t f = begin; f < end; ++f) offset[f] += static_cast<double>(y[j * d + f]) / static_cast<double>(n);
    }
    team.barrier();
    double extreme = 0;
    for (int64_t i = team.thread; i < m; i += team.num_threads) extreme = farthest(x + i * d, extreme);
    for (int64_t j = team.thread; j < n; j += team.num_threads) extreme = farthest(y + j * d, extreme);
    extremes[team.thread] = extreme;
    team.barrier();
    for (int t = 0; t < team.num_threads; ++t) extreme = extremes[t] > extreme ? extremes[t] : extreme;
    // At most 1 in float, so that no square overflows; the exponent is kept where that of its square is one of a double.
    int exponent = extreme > 0 ? std::ilogb(extreme) + 1 : 0;
    exponent = exponent > 480 ? 480 : exponent < -480 ? -480 : exponent;
    const double factor = std::ldexp(1.0, -exponent);
    if (team.thread == 0) scale = factor * factor;
    for (int64_t i = team.thread; i < m; i += team.num_threads) x_norms[i] = place(x + i * d, factor, 1, rows + i * d);
    float* lane = spare + team.thread * L * d;
    for (int64_t v = team.thread; v < num_panels() * kTileVectors; v += team.num_threads) {
      const int64_t first = v * L, valid = min(max(n - first, 0), L);
      for (int64_t j = first; j < first + valid; ++j) y_norms[j] = place(y + j * d, factor, -2, lane + (j - first) * d);
      pack_transposed(lane, d, valid, d, panels + v / kTileVectors * d * kWidth + v % kTileVectors * L, kWidth);
      for (int64_t j = first; j < first + L; ++j) {
        const bool real = j < first + valid;
        y_low[j] = real ? static_cast<float>(y_norms[j] * (1 - slack)) : std::numeric_limits<float>::infinity();
        y_reach[j] = -std::numeric_limits<float>::infinity();
        if (real && counting) y_reach[j] = reach(y_radii[j], factor * factor, y_norms[j]);
      }
    }
    team.barrier();
  }

  double farthest(const T* point, double largest) const {
    for (int64_t f = 0; f < d; ++f) {
      const double distance = std::fabs(static_cast<double>(point[f]) - offset[f]);
      largest = distance > largest ? distance : largest;
    }
    return largest;
  }

  // to = multiple * factor * (point - offset); returns the square of the length of factor * (point - offset).
  double place(const T* point, double factor, float multiple, float* to) const {
    double norm = 0;
#pragma omp simd reduction(+ : norm)
    for (int64_t f = 0; f < d; ++f) {
      const double moved = (static_cast<double>(point[f]) - offset[f]) * factor;
      norm += moved * moved;
      to[f] = multiple * static_cast<float>(moved);
    }
    return norm;
  }

  // What the other point and the product may add up to, if D <= limit. Rounded up: a pair that is let through only costs
  // time.
  float reach(double limit, double scale_of_squares, double norm) const {
    const double rest = limit * scale_of_squares * (1 + 0x1p-40) - norm * (1 - slack) + tiny;
    return static_cast<float>(rest + std::fabs(rest) * 0x1p-22 + tiny);
  }

  // product[i, j] = -2 <x_i, y_j>
  void multiply_panel(int64_t first, int64_t last, int64_t p, float* product) const {
    const int64_t chunks = max(ceil_div(d, kDepth), 1);
    const int64_t vectors = ceil_div(min(kWidth, n - p * kWidth), L);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t begin = d * chunk / chunks, end = d * (chunk + 1) / chunks;
      multiply<float>({rows + first * d + begin, d, 1, panels + (p * d + begin) * kWidth, kWidth, product, kWidth,
                       chunk == 0 ? nullptr : product, kWidth, nullptr, 0, end - begin},
                      last - first, vectors);
    }
  }

  // ---- the two searches ----

  void begin_row(int64_t i) {
    if (counting) {
      x_counts[i] = x_counts[m + i] = 0;
      return;
    }
    for (int64_t t = 0; t < k; ++t) {
      squared[i * k + t] = std::numeric_limits<double>::infinity();
      indices[i * k + t] = 0;
    }
  }

  void search(int64_t i, int64_t first, int64_t columns, const float* product) {
    double *best = squared + i * k, *index = indices + i * k;
    const float* low = y_low + first;
    float limit = reach(best[k - 1], scale, x_norms[i]);
    int any = 0;
#pragma omp simd reduction(| : any)
    for (int64_t j = 0; j < columns; ++j) any |= product[j] + low[j] <= limit;
    if (!any) return;
    for (int64_t j = 0; j < columns; ++j) {
      if (!(product[j] + low[j] <= limit) || (same && first + j == i)) continue;
      const double distance = squared_distance(x + i * d, y + (first + j) * d, d);
      if (offer(distance, static_cast<double>(first + j), best, index)) limit = reach(best[k - 1], scale, x_norms[i]);
    }
  }

  // Puts a point at its place among the k nearest, if it is one of them; among equal distances the lower index first.
  bool offer(double distance, double point, double* best, double* index) const {
    const auto precedes = [&](int64_t t) { return distance < best[t] || (distance == best[t] && point < index[t]); };
    int64_t t = k - 1;
    if (!precedes(t)) return false;
    for (; t > 0 && precedes(t - 1); --t) best[t] = best[t - 1], index[t] = index[t - 1];
    best[t] = distance;
    index[t] = point;
    return true;
  }

  // Offers the points first + j to i, and i to them, for begin <= j < columns.
  void meet(int64_t i, int64_t first, int64_t begin, int64_t columns, const float* product, double* best,
            double* index, float* limits) const {
    const float *low = y_low + first, *theirs = limits + first;
    const float mine = y_low[i];
    float limit = limits[i];
    int any = 0;
#pragma omp simd reduction(| : any)
    for (int64_t j = begin; j < columns; ++j) any |= (product[j] + low[j] <= limit) | (product[j] + mine <= theirs[j]);
    if (!any) return;
    for (int64_t j = begin; j < columns; ++j) {
      const bool by_i = product[j] + low[j] <= limit, by_j = product[j] + mine <= theirs[j];
      if (!by_i && !by_j) continue;
      const int64_t column = first + j;
      const double distance = squared_distance(x + i * d, y + column * d, d);
      const auto give = [&](int64_t to, int64_t point) {
        if (!offer(distance, static_cast<double>(point), best + to * k, index + to * k)) return;
        limits[to] = reach(best[to * k + k - 1], scale, x_norms[to]);
      };
      if (by_i) give(i, column), limit = limits[i];
      if (by_j) give(column, i);
    }
  }

  bool holds(double radius, double distance) const { return closed ? distance <= radius : distance < radius; }

  void count(int64_t i, int64_t first, int64_t columns, const float* product, double* own) {
    const float limit = reach(x_radii[i], scale, x_norms[i]);
    const auto mine = static_cast<float>(x_norms[i] * (1 - slack));
    const float *low = y_low + first, *far = y_reach + first;
    int any = 0;
#pragma omp simd reduction(| : any)
    for (int64_t j = 0; j < columns; ++j) any |= (product[j] + low[j] <= limit) | (product[j] + mine <= far[j]);
    if (!any) return;
    for (int64_t j = 0; j < columns; ++j) {
      const bool by_x = product[j] + low[j] <= limit, by_y = product[j] + mine <= far[j];
      if (!by_x && !by_y) continue;
      const int64_t column = first + j;
      const double high = (x_norms[i] + y_norms[column]) * (1 + slack) + static_cast<double>(product[j]) + tiny;
      double distance = -1;
      const auto inside = [&](double radius) {
        // The upper bound, if it decides; D has roundings of its own.
        if (high < radius * scale * (1 - 0x1p-40)) return true;
        if (distance < 0) distance = squared_distance(x + i * d, y + column * d, d);
        return holds(radius, distance);
      };
      if (by_x && inside(x_radii[i])) x_counts[i] += 1, own[n + column] += 1;
      if (by_y && inside(y_radii[column])) x_counts[m + i] += 1, own[column] += 1;
    }
  }
};

template <class T>
void serve(Search<T> op, int num_threads) {
  const int64_t products = op.m * op.n * (op.d + 1);
  const int threads = threads_for(products, kProductsPerThread, num_threads);
  Arena count(nullptr);
  op.prepare(count, threads);
  // Not scratch(): the points of a large set would stay with the thread for good.
  void* memory = acquire(count.used());
  Arena arena(memory);
  op.prepare(arena, threads);
  run_parallel(&Search<T>::run, &op, threads);
  release(memory, count.used());
}

template <class T>
Search<T> search_of(const Points& points) {
  Search<T> op{};
  op.x = static_cast<const T*>(points.x);
  op.y = static_cast<const T*>(points.y);
  op.m = points.m, op.n = points.n, op.d = points.d;
  return op;
}

}  // namespace

void nearest_neighbours_fwd(Dtype dtype, const Points& points, bool same, int64_t k, double* squared, double* indices,
                            int num_threads) {
  const auto call = [&](auto op) {
    op.same = same, op.k = k, op.squared = squared, op.indices = indices;
    serve(op, num_threads);
  };
  if (dtype == Dtype::float32) return call(search_of<float>(points));
  if (dtype == Dtype::float64) return call(search_of<double>(points));
}

void ball_counts(Dtype dtype, const Points& points, const double* x_squared_radii, const double* y_squared_radii,
                 bool closed, double* x_counts, double* y_counts, int num_threads) {
  const auto call = [&](auto op) {
    op.counting = true, op.x_radii = x_squared_radii, op.y_radii = y_squared_radii, op.closed = closed;
    op.x_counts = x_counts, op.y_counts = y_counts;
    serve(op, num_threads);
  };
  if (dtype == Dtype::float32) return call(search_of<float>(points));
  if (dtype == Dtype::float64) return call(search_of<double>(points));
}

}  // namespace lipgan::cpu::LIPGAN_ISA
