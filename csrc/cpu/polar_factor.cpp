// polar_factor on the CPU. Formulas and layouts: include/lipgan/polar_factor.h.
//
// Of matrices with a hundred rows a product takes as long as a few calls of PyTorch. Here all of them are one call, the
// symmetric ones cost little more than half, and matrices lie in rows of a length that the caches like. Threads share the
// rows of a product; all else, which is a tenth of the time, the calling thread does.
#include "lipgan/polar_factor.h"

#include "arena.h"
#include "integers.h"
#include "matmul.h"
#include "memory.h"
#include "threads.h"
#include "vector.h"

namespace lipgan::cpu::LIPGAN_ISA {
namespace {

constexpr int64_t kPad = 16;                         // lanes of the widest vector
constexpr int64_t kProductsPerThread = int64_t{1} << 21;  // multiplications that pay for a region of threads

// Rows of matrices with n columns: whole vectors, and not a multiple of so much memory that rows meet in the same sets of
// a cache. Columns from n on are zeros, as are the rows of square matrices.
struct Shape {
  Shape(int64_t columns, int threads_at_most)
      : n(columns),
        padded(ceil_div(columns, kPad) * kPad),
        row(padded % 64 == 0 ? padded + kPad : padded),
        num_threads(threads_at_most) {}
  const int64_t n, padded, row;
  const int num_threads;
};

// out[i, j] = sum over k < depth of a[i * a_row + k * a_depth] b[k, j]; with `upper`, what lies on the diagonal and above.
template <class T>
struct WholeProduct {
  const T* a;
  int64_t a_row, a_depth;
  const T* b;
  T* out;
  int64_t rows, depth;
  const Shape& shape;
  bool upper;

  static void run(void* self, const Team& team) {
    constexpr int64_t L = kLanes<T>;
    const WholeProduct& p = *static_cast<WholeProduct*>(self);
    const int64_t vectors = p.shape.padded / L, row = p.shape.row;
    // In turn, because the upper rows of a triangle are the longer ones.
    for (int64_t i = team.thread * kTileRows; i < p.rows; i += team.num_threads * kTileRows) {
      for (int64_t v = p.upper ? i / L : 0; v < vectors; v += kTileVectors) {
        multiply(Product<T>{p.a + i * p.a_row, p.a_row, p.a_depth, p.b + v * L, row, p.out + i * row + v * L, row, nullptr,
                            0, nullptr, 0, p.depth},
                 min(kTileRows, p.rows - i), min(kTileVectors, vectors - v));
      }
    }
  }
};

template <class T>
void multiply(const T* a, int64_t a_row, int64_t a_depth, const T* b, T* out, int64_t rows, int64_t depth,
              const Shape& shape, bool upper) {
  WholeProduct<T> product{a, a_row, a_depth, b, out, rows, depth, shape, upper};
  const int64_t work = rows * depth * shape.padded / (upper ? 2 : 1);
  run_parallel(&WholeProduct<T>::run, &product, threads_for(work, kProductsPerThread, shape.num_threads));
}

// Below the diagonal what lies above it.
template <class T>
void mirror(T* a, const Shape& shape) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t i = 0; i < shape.padded; i += L) {
    for (int64_t j = 0; j < i; j += L) {
      Vector<T> block[static_cast<size_t>(L)];
      for (int64_t k = 0; k < L; ++k) block[k] = load(a + (j + k) * shape.row + i);
      transpose<L / 2, T>(block);
      for (int64_t k = 0; k < L; ++k) store(a + (i + k) * shape.row + j, block[k]);
    }
    for (int64_t k = 0; k < L; ++k) {
      for (int64_t l = 0; l < k; ++l) a[(i + k) * shape.row + i + l] = a[(i + l) * shape.row + i + k];
    }
  }
}

// a <- a - a^T
template <class T>
void subtract_transpose(T* a, const Shape& shape) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t i = 0; i < shape.padded; i += L) {
    for (int64_t j = 0; j <= i; j += L) {
      Vector<T> block[static_cast<size_t>(L)], other[static_cast<size_t>(L)];
      for (int64_t k = 0; k < L; ++k) {
        block[k] = load(a + (i + k) * shape.row + j);
        other[k] = load(a + (j + k) * shape.row + i);
      }
      transpose<L / 2, T>(other);
      for (int64_t k = 0; k < L; ++k) {
        block[k] -= other[k];
        store(a + (i + k) * shape.row + j, block[k]);
        other[k] = -block[k];
      }
      transpose<L / 2, T>(other);
      for (int64_t k = 0; k < L; ++k) store(a + (j + k) * shape.row + i, other[k]);
    }
  }
}

// a b, or a^T b, which is symmetric up to rounding, and then exactly.
template <class T>
void symmetric_product(const T* a, const T* b, T* out, const Shape& shape) {
  multiply(a, shape.row, int64_t{1}, b, out, shape.n, shape.n, shape, true);
  mirror(out, shape);
}

template <class T>
void symmetric_product_transposed(const T* a, const T* b, T* out, int64_t m, const Shape& shape) {
  multiply(a, int64_t{1}, shape.row, b, out, shape.n, m, shape, true);
  mirror(out, shape);
}

template <class T, class U>
void copy_in(const T* from, U* to, int64_t m, const Shape& shape) {
  for (int64_t i = 0; i < m; ++i) {
    const T* source = from + i * shape.n;
    U* target = to + i * shape.row;
#pragma omp simd
    for (int64_t j = 0; j < shape.n; ++j) target[j] = static_cast<U>(source[j]);
    for (int64_t j = shape.n; j < shape.padded; ++j) target[j] = U(0);
  }
}

template <class T>
T* square(Arena& arena, const Shape& shape, bool counts) {
  T* matrix = arena.take<T>(shape.padded * shape.row);
  if (!counts) {
    for (int64_t k = shape.n * shape.row; k < shape.padded * shape.row; ++k) matrix[k] = T(0);
  }
  return matrix;
}

// f(target, sources...) of all elements.
template <class F>
void each(int64_t rows, const Shape& shape, F f) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = i * shape.row;
#pragma omp simd
    for (int64_t j = 0; j < shape.padded; ++j) f(row + j);
  }
}

template <class T>
double inner_product(const T* x, const T* y, int64_t rows, const Shape& shape) {
  double total = 0;
  for (int64_t i = 0; i < rows; ++i) total += dot(x + i * shape.row, y + i * shape.row, shape.padded);
  return total;
}

template <class T>
double frobenius(const T* x, int64_t rows, const Shape& shape) {
  return __builtin_sqrt(inner_product(x, x, rows, shape));
}

// ---- forward ----

template <class T>
class Forward {
 public:
  Forward(const PolarFactorFwd& args, void* memory, int num_threads)
      : args_(args), shape_(args.n, num_threads), arena_(memory) {
    const bool counts = !memory;
    wide_ = arena_.take<double>(args.m * shape_.row);
    u_ = arena_.take<T>(args.m * shape_.row);
    product_ = arena_.take<T>(args.m * shape_.row);
    gram_ = square<double>(arena_, shape_, counts);
    for (T*& matrix : powers_) matrix = square<T>(arena_, shape_, counts);
    left_ = square<T>(arena_, shape_, counts);
    factor_ = square<T>(arena_, shape_, counts);
  }
  size_t bytes() const { return arena_.used(); }

  bool run(const T* a, T* u) {
    copy_in(a, wide_, args_.m, shape_);
    measure();
    // Scaled so that the mean square of the singular values is 1: what an orthogonal matrix becomes, whatever its scale.
    double trace = 0;
    for (int64_t i = 0; i < shape_.n; ++i) trace += gram_[i * shape_.row + i];
    const double mean = trace / static_cast<double>(shape_.n);
    if (!(mean > 1e-280 && mean < 1e300)) return false;  // squares far below it keep their digits
    rescale(mean);
    bool bounded = false;
    int64_t far = 0, step = 0;
    while (step++ < args_.num_steps + args_.further) {
      // E = u^T u - I, from numbers near to each other that have not been rounded to T.
      each(shape_.n, shape_, [gram = gram_, e = powers_[0]](int64_t k) { e[k] = static_cast<T>(gram[k]); });
      for (int64_t i = 0; i < shape_.n; ++i) {
        powers_[0][i * shape_.row + i] = static_cast<T>(gram_[i * shape_.row + i] - 1);
      }
      if (const PolarLevel* level = level_for_powers()) {
        evaluate(*level);
        advance(1);
        if (level->is_final != 0) {
          for (int64_t i = 0; i < args_.m; ++i) {
            for (int64_t j = 0; j < shape_.n; ++j) u[i * shape_.n + j] = static_cast<T>(wide_[i * shape_.row + j]);
          }
          return true;
        }
      } else {
        if (!(norm_ < 1e300)) return false;
        // G^2, of G = I + E.
        const T *e = powers_[0], *e2 = powers_[1];
        each(shape_.n, shape_, [e, e2, to = left_](int64_t k) { to[k] = e2[k] + 2 * e[k]; });
        for (int64_t i = 0; i < shape_.n; ++i) left_[i * shape_.row + i] += 1;
        if (!bounded) {
          bounded = true;
          const double bound = __builtin_sqrt(frobenius(left_, shape_.n, shape_));
          rescale(bound * (1 + static_cast<double>(shape_.n) * (sizeof(T) == 4 ? 1.2e-7 : 2.3e-16)));
          each(shape_.n, shape_, [to = left_, share = static_cast<T>(1 / bound / bound)](int64_t k) { to[k] *= share; });
        }
        const PolarStep& next = args_.schedule[min(far++, args_.num_steps - 1)];
        each(shape_.n, shape_, [gram = gram_, square = left_, to = factor_, &next](int64_t k) {
          to[k] = static_cast<T>(next.q * gram[k] + next.r * static_cast<double>(square[k]));
        });
        advance(next.p);
      }
      measure();
    }
    return false;
  }

 private:
  // The Gram matrix, in double.
  void measure() { symmetric_product_transposed(wide_, wide_, gram_, args_.m, shape_); }

  // u / square^(1/2)
  void rescale(double square) {
    const double share = 1 / __builtin_sqrt(square);
    each(args_.m, shape_, [wide = wide_, u = u_, share](int64_t k) {
      wide[k] *= share;
      u[k] = static_cast<T>(wide[k]);
    });
    each(shape_.n, shape_, [gram = gram_, square](int64_t k) { gram[k] /= square; });
  }

  // The least costly polynomial that serves, with the powers of E that it takes; else null, and E^2.
  const PolarLevel* level_for_powers() {
    norm_ = frobenius(powers_[0], shape_.n, shape_);
    symmetric_product(powers_[0], powers_[0], powers_[1], shape_);
    // Of eigenvalues, |x|^k is at most the norm of E^k.
    const double second = frobenius(powers_[1], shape_.n, shape_);
    double radius = min_of(norm_, __builtin_sqrt(second));
    if (const PolarLevel* level = find(radius, false)) return level;
    // Far, or not a number: the norm of E^4 would give no less than this.
    const double least = radius / __builtin_sqrt(__builtin_sqrt(static_cast<double>(shape_.n)));
    if (!(least <= args_.levels[args_.num_levels - 1].radius)) return nullptr;
    symmetric_product(powers_[1], powers_[1], powers_[3], shape_);
    radius = min_of(radius, __builtin_sqrt(__builtin_sqrt(frobenius(powers_[3], shape_.n, shape_))));
    const PolarLevel* level = find(radius, true);
    if (level) symmetric_product(powers_[0], powers_[1], powers_[2], shape_);
    return level;
  }

  static double min_of(double a, double b) { return a < b ? a : b; }

  const PolarLevel* find(double radius, bool long_ones) const {
    for (int64_t k = 0; k < args_.num_levels; ++k) {
      const PolarLevel& level = args_.levels[k];
      if ((level.terms > 5) == long_ones && radius <= level.radius) return &level;
    }
    return nullptr;
  }

  // to = c[0] I + c[1] E + c[2] E^2 (+ c[3] E^3) + the matrix that is there, with `adds`.
  template <bool Cubic, bool Adds>
  void combine(const double* c, T* to) const {
    const T *e = powers_[0], *e2 = powers_[1], *e3 = powers_[2];
    const T c1 = static_cast<T>(c[1]), c2 = static_cast<T>(c[2]), c3 = static_cast<T>(c[3]);
    each(shape_.n, shape_, [=](int64_t k) {
      T sum = c1 * e[k] + c2 * e2[k];
      if constexpr (Cubic) sum += c3 * e3[k];
      to[k] = Adds ? to[k] + sum : sum;
    });
    for (int64_t i = 0; i < shape_.n; ++i) to[i * shape_.row + i] += static_cast<T>(c[0]);
  }

  // factor = p(E) - I
  void evaluate(const PolarLevel& level) {
    double c[kPolarTerms];
    for (int64_t k = 0; k < kPolarTerms; ++k) c[k] = level.coefficients[k];
    c[0] -= 1;
    if (level.terms <= 3) return combine<false, false>(c, factor_);
    if (level.terms <= 5) {
      const double upper[] = {0, c[3], c[4], 0};
      combine<false, false>(upper, left_);
      symmetric_product(powers_[1], left_, factor_, shape_);
      return combine<false, true>(c, factor_);
    }
    combine<true, false>(c + 8, left_);
    symmetric_product(powers_[3], left_, factor_, shape_);
    combine<true, true>(c + 4, factor_);
    symmetric_product(powers_[3], factor_, left_, shape_);
    combine<true, true>(c, left_);
    T* other = left_;
    left_ = factor_;
    factor_ = other;
  }

  // u <- beta u + u factor, the sum in double.
  void advance(double beta) {
    multiply(u_, shape_.row, int64_t{1}, factor_, product_, args_.m, shape_.n, shape_, false);
    each(args_.m, shape_, [wide = wide_, u = u_, product = product_, beta](int64_t k) {
      wide[k] = beta * wide[k] + static_cast<double>(product[k]);
      u[k] = static_cast<T>(wide[k]);
    });
  }

  const PolarFactorFwd& args_;
  const Shape shape_;
  Arena arena_;
  double norm_ = 0;
  double *wide_, *gram_;
  T *u_, *product_, *left_, *factor_;
  T* powers_[4];  // E^1 to E^4
};

// ---- backward ----

template <class T>
class Backward {
 public:
  Backward(const PolarFactorBwd& args, void* memory, int num_threads)
      : args_(args), shape_(args.n, num_threads), arena_(memory) {
    const bool counts = !memory;
    T** const like_a[] = {&grad_, &u_, &a_, &beside_};
    for (T** matrix : like_a) *matrix = arena_.take<T>(args.m * shape_.row);
    T** const squares[] = {&h_, &inner_, &right_, &y_, &direction_, &image_};
    for (T** matrix : squares) *matrix = square<T>(arena_, shape_, counts);
  }
  size_t bytes() const { return arena_.used(); }

  bool run(const T* grad, const T* u, const T* a, T* to_a) {
    const int64_t m = args_.m, n = shape_.n, row = shape_.row;
    copy_in(grad, grad_, m, shape_);
    copy_in(u, u_, m, shape_);
    copy_in(a, a_, m, shape_);
    symmetric_product_transposed(u_, a_, h_, m, shape_);
    double trace = 0;
    for (int64_t i = 0; i < n; ++i) trace += static_cast<double>(h_[i * row + i]);
    const double mean = trace / static_cast<double>(n);
    multiply(u_, int64_t{1}, row, grad_, inner_, n, m, shape_, false);
    each(n, shape_, [from = inner_, to = right_](int64_t k) { to[k] = from[k]; });
    subtract_transpose(right_, shape_);
    if (!solve<true>(1 / (2 * mean))) return false;
    T* result = a_;
    multiply(u_, row, int64_t{1}, y_, result, m, n, shape_, false);
    if (m > n) {
      each(n, shape_, [to = right_](int64_t k) { to[k] = T(0); });
      for (int64_t i = 0; i < n; ++i) right_[i * row + i] = T(1);
      if (!solve<false>(1 / mean)) return false;
      multiply(u_, row, int64_t{1}, inner_, beside_, m, n, shape_, false);
      each(m, shape_, [grad = grad_, beside = beside_](int64_t k) { grad[k] -= beside[k]; });
      multiply(grad_, row, int64_t{1}, y_, beside_, m, n, shape_, false);
      each(m, shape_, [result, beside = beside_](int64_t k) { result[k] += beside[k]; });
    }
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) to_a[i * n + j] = result[i * row + j];
    }
    return true;
  }

 private:
  // image = h x + x h of a skew x, else h x of a symmetric one that commutes with h.
  template <bool Skew>
  void apply(const T* x) {
    if constexpr (Skew) {
      multiply(h_, shape_.row, int64_t{1}, x, image_, shape_.n, shape_.n, shape_, false);
      subtract_transpose(image_, shape_);
    } else {
      symmetric_product(h_, x, image_, shape_);
    }
  }

  // y of apply(y) = right, by conjugate gradients from the multiple of right that h = mean I would have; the residual takes
  // the place of right. False if they take long.
  template <bool Skew>
  bool solve(double start) {
    const int64_t n = shape_.n;
    const double goal = args_.tolerance * args_.tolerance * inner_product(right_, right_, n, shape_);
    each(n, shape_, [y = y_, right = right_, share = static_cast<T>(start)](int64_t k) { y[k] = share * right[k]; });
    apply<Skew>(y_);
    each(n, shape_, [right = right_, image = image_, direction = direction_](int64_t k) {
      right[k] -= image[k];
      direction[k] = right[k];
    });
    double length = inner_product(right_, right_, n, shape_);
    for (int64_t k = 0; k < args_.iterations; ++k) {
      if (length <= goal) return true;
      apply<Skew>(direction_);
      const double curvature = inner_product(direction_, image_, n, shape_);
      if (!(curvature > 0)) return false;
      const T share = static_cast<T>(length / curvature);
      each(n, shape_, [y = y_, right = right_, direction = direction_, image = image_, share](int64_t l) {
        y[l] += share * direction[l];
        right[l] -= share * image[l];
      });
      const double before = length;
      length = inner_product(right_, right_, n, shape_);
      each(n, shape_, [right = right_, direction = direction_, share = static_cast<T>(length / before)](int64_t l) {
        direction[l] = right[l] + share * direction[l];
      });
    }
    return false;
  }

  const PolarFactorBwd& args_;
  const Shape shape_;
  Arena arena_;
  T *grad_, *u_, *a_, *beside_;                               // [m, n]
  T *h_, *inner_, *right_, *y_, *direction_, *image_;  // [n, n]
};

// Whether run(pass, k) of every matrix k succeeds.
template <class Pass, class Args, class F>
bool of_all(const Args& args, int num_threads, F run) {
  const size_t bytes = Pass(args, nullptr, num_threads).bytes();
  void* memory = poison_if_asked(acquire(bytes), bytes);
  bool arrived = true;
  for (int64_t k = 0; k < args.count && arrived; ++k) {
    Pass pass(args, memory, num_threads);
    arrived = run(pass, k * args.m * args.n);
  }
  release(memory, bytes);
  return arrived;
}

template <class T>
bool forward(const PolarFactorFwd& args, int num_threads) {
  return of_all<Forward<T>>(args, num_threads, [&args](Forward<T>& pass, int64_t k) {
    return pass.run(static_cast<const T*>(args.a) + k, static_cast<T*>(args.u) + k);
  });
}

template <class T>
bool backward(const PolarFactorBwd& args, int num_threads) {
  return of_all<Backward<T>>(args, num_threads, [&args](Backward<T>& pass, int64_t k) {
    return pass.run(static_cast<const T*>(args.grad) + k, static_cast<const T*>(args.u) + k,
                    static_cast<const T*>(args.a) + k, static_cast<T*>(args.to_a) + k);
  });
}

}  // namespace

bool polar_factor_fwd(Dtype dtype, const PolarFactorFwd& args, int num_threads) {
  return dtype == Dtype::float64 ? forward<double>(args, num_threads) : forward<float>(args, num_threads);
}

bool polar_factor_bwd(Dtype dtype, const PolarFactorBwd& args, int num_threads) {
  return dtype == Dtype::float64 ? backward<double>(args, num_threads) : backward<float>(args, num_threads);
}

}  // namespace lipgan::cpu::LIPGAN_ISA
