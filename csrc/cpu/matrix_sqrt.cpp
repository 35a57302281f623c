// matrix_sqrt on the CPU. Formulas and layouts: include/lipgan/matrix_sqrt.h.
//
// Small matrices are too short for the lanes of a vector register, and LAPACK spends its time in calls. Here a register
// holds the same element of as many matrices as it has lanes, and all of them go through one eigendecomposition side by
// side: Householder's reduction to a tridiagonal matrix, then QL steps with implicit shifts (Golub and Van Loan,
// "Matrix Computations", 8.3). A lane that is done goes on with rotations by the angle 0, which change nothing; so what
// a matrix gives does not depend on its neighbours, nor on the number of threads.
#include "lipgan/matrix_sqrt.h"

#include <limits>
#include <type_traits>

#include "integers.h"
#include "lanes.h"
#include "threads.h"

namespace lipgan::cpu::LIPGAN_ISA {
namespace {

// A vector holds one element of several matrices. Comparisons give masks of integers; `mask ? x : y` chooses by lane.

template <class V>
inline V sqrt_of(V x) {
  using T = std::remove_reference_t<decltype(x[0])>;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 8) {
    return (V)_mm512_sqrt_pd((__m512d)x);
  } else {
    return (V)_mm512_sqrt_ps((__m512)x);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 8) {
    return (V)_mm256_sqrt_pd((__m256d)x);
  } else {
    return (V)_mm256_sqrt_ps((__m256)x);
  }
#else
  V y{};
  for (int k = 0; k < kLanes<T>; ++k) y[k] = static_cast<T>(__builtin_sqrt(x[k]));  // of a float: rounded once all the same
  return y;
#endif
}

template <class V> inline V abs_of(V x) { return x < 0 ? -x : x; }
template <class V> inline V max_of(V x, V y) { return x > y ? x : y; }
template <class V> inline V min_of(V x, V y) { return x < y ? x : y; }

template <class M>
inline bool any_of(M mask) {
  auto joined = mask[0];
  for (size_t k = 1; k < sizeof(M) / sizeof(mask[0]); ++k) joined |= mask[k];
  return joined != 0;
}

constexpr int64_t kProductsPerThread = 1 << 20;  // multiplications that pay for waking a thread
constexpr int kRows = 4;           // rows of eigenvectors that a rotation takes at a time
constexpr int kSteps = 60;         // QL steps for an eigenvalue, at most; two or three are common
constexpr int64_t kRotations = 512;  // kept before they are applied to the eigenvectors

template <class T>
struct Group {
  using V = Vector<T>;
  static constexpr int W = kLanes<T>;

  const MatrixSqrtFwd& args;
  const int64_t n, blocks;
  V *a;        // [n, n]: the matrix, of which the reduction uses the lower triangle; then the reflectors; then the root
  V *z;        // [blocks, n, kRows]: eigenvectors; z[b, i, r] is element b * kRows + r of vector i
  V *d, *e;    // [n]: the tridiagonal matrix; e[i] is beside d[i] and d[i + 1]
  V *beta, *p;  // [n]
  V *c, *s;    // [kRotations + n]
  struct Sweep {
    int64_t first, low, high;  // rotations [first, first + high - low), of the pairs (high - 1, high) down to low
  };
  Sweep* sweeps;  // [kRotations]
  int64_t num_sweeps = 0, num_rotations = 0;

  static int64_t bytes(int64_t n) {
    const int64_t blocks = (n + kRows - 1) / kRows;
    return kVectorBytes * (n * n + blocks * kRows * n + 4 * n + 2 * (kRotations + n)) +
           (static_cast<int64_t>(sizeof(Sweep)) * kRotations + 63) / 64 * 64;
  }

  Group(const MatrixSqrtFwd& job, void* memory) : args(job), n(job.n), blocks((job.n + kRows - 1) / kRows) {
    V* next = static_cast<V*>(memory);
    const auto take = [&](int64_t count) {
      V* piece = next;
      next += count;
      return piece;
    };
    a = take(n * n), z = take(blocks * kRows * n);
    d = take(n), e = take(n), beta = take(n), p = take(n);
    c = take(kRotations + n), s = take(kRotations + n);
    sweeps = reinterpret_cast<Sweep*>(next);
  }

  // The roots of the matrices [first, first + W), of those that exist.
  void run(int64_t first) {
    const int64_t count = min(W, args.count - first);
    V scale;
    load(first, count, scale);
    tridiagonalize();
    accumulate();
    num_sweeps = num_rotations = 0;
    diagonalize();
    apply_rotations();
    finish(first, count, scale);
  }

  // The symmetric part, divided by an even power of two near its largest entry, so that no square leaves the range.
  void load(int64_t first, int64_t count, V& scale) {
    const T* in = static_cast<const T*>(args.a) + first * n * n;
    if (count < W) {
      for (int64_t k = 0; k < n * n; ++k) z[k] = V{};
    }
    gather(in, n * n, count, z);
    V largest{}, difference{}, nothing{};
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        const V x = z[i * n + j], y = z[j * n + i];
        largest = max_of(largest, max_of(abs_of(x), abs_of(y)));
        difference = max_of(difference, abs_of(x - y));
        nothing += x * 0 + y * 0;  // NaN where an entry is not finite
        a[i * n + j] = T(0.5) * x + T(0.5) * y;
      }
    }
    V factor;
    for (int k = 0; k < W; ++k) {
      int exponent = 0;
      if (largest[k] > 0 && nothing[k] == 0) __builtin_frexp(static_cast<double>(largest[k]), &exponent);
      constexpr int kLowest = std::numeric_limits<T>::min_exponent + 2;
      exponent = 2 * (static_cast<int>(max(exponent, kLowest)) / 2);
      scale[k] = static_cast<T>(__builtin_ldexp(1.0, exponent));
      factor[k] = nothing[k] == 0 ? static_cast<T>(__builtin_ldexp(1.0, -exponent)) : T(0);
    }
    const auto finite = nothing == V{};
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j <= i; ++j) a[i * n + j] = finite ? a[i * n + j] * factor : V{};
    }
    largest += nothing;
    T* seen = static_cast<T*>(args.seen);
    for (int64_t k = 0; k < count; ++k) {
      seen[first + k] = largest[k];
      seen[args.count + first + k] = difference[k];
    }
  }

  // d, e and the reflectors: H_i = I - beta_i v v^T acts on the first i elements, and v takes the place of row i.
  void tridiagonalize() {
    constexpr T kSmall = sizeof(T) == 8 ? T(1e-290) : T(1e-32);  // a sum of squares that says nothing about 1
    for (int64_t i = n - 1; i > 0; --i) {
      V* v = a + i * n;
      V rest{};
      for (int64_t j = 0; j < i - 1; ++j) rest += v[j] * v[j];
      const V last = v[i - 1];
      const auto none = rest < kSmall;
      const V norm = sqrt_of(rest + last * last);
      const V turned = last > 0 ? -norm : norm;
      e[i - 1] = none ? last : turned;
      const V head = last - turned;
      beta[i] = none ? V{} : 2 / (rest + head * head);
      v[i - 1] = head;
      if (i == 1 || !any_of(rest >= kSmall)) continue;

      for (int64_t j = 0; j < i; ++j) p[j] = V{};
      for (int64_t r = 0; r < i; ++r) {
        const V* row = a + r * n;
        const V vr = v[r];
        V sum = row[r] * vr;
        for (int64_t j = 0; j < r; ++j) {
          sum += row[j] * v[j];
          p[j] += row[j] * vr;
        }
        p[r] += sum;
      }
      V along{};
      for (int64_t j = 0; j < i; ++j) {
        p[j] *= beta[i];  // before the sum: the square of beta may leave the range
        along += p[j] * v[j];
      }
      along *= T(0.5) * beta[i];
      for (int64_t j = 0; j < i; ++j) p[j] -= along * v[j];
      for (int64_t r = 0; r < i; ++r) {
        V* row = a + r * n;
        const V vr = v[r], pr = p[r];
        for (int64_t j = 0; j <= r; ++j) row[j] -= vr * p[j] + pr * v[j];
      }
    }
    for (int64_t i = 0; i < n; ++i) d[i] = a[i * n + i];
    e[n - 1] = V{};
  }

  // z = H_(n-1) ... H_2, row by row.
  void accumulate() {
    for (int64_t b = 0; b < blocks; ++b) {
      V* rows = z + b * n * kRows;
      for (int64_t i = 0; i < n; ++i) {
        for (int r = 0; r < kRows; ++r) rows[i * kRows + r] = V{} + T(b * kRows + r == i ? 1 : 0);
      }
      for (int64_t i = n - 1; i > 1; --i) {
        const V* v = a + i * n;
        V along[kRows] = {};
        for (int64_t j = 0; j < i; ++j) {
          for (int r = 0; r < kRows; ++r) along[r] += rows[j * kRows + r] * v[j];
        }
        for (int r = 0; r < kRows; ++r) along[r] *= beta[i];
        for (int64_t j = 0; j < i; ++j) {
          for (int r = 0; r < kRows; ++r) rows[j * kRows + r] -= along[r] * v[j];
        }
      }
    }
  }

  // QL steps: the eigenvalues come to d, the rotations that lead there to z.
  void diagonalize() {
    constexpr T kEps = std::numeric_limits<T>::epsilon();
    // The matrix is of the size of 1. Below kNothing an element is nothing, and its square has not all of its digits.
    constexpr T kSquare = std::numeric_limits<T>::min() / kEps, kNothing = sizeof(T) == 8 ? T(1e-146) : T(4e-16);
    const V one = V{} + T(1);
    for (int64_t low = 0; low < n - 1; ++low) {
      for (int step = 0; step < kSteps; ++step) {
        // Each lane's block ends at the first element beside the diagonal that is nothing beside its neighbours.
        auto open = one > 0;
        V end{}, last = d[low];
        int64_t high = low;
        for (int64_t i = low; i < n - 1 && any_of(open); ++i) {
          open = open & (abs_of(e[i]) > kEps * (abs_of(d[i]) + abs_of(d[i + 1])) + kNothing);
          last = open ? d[i + 1] : last;
          end = open ? V{} + T(i + 1) : end;
          if (any_of(open)) high = i + 1;
        }
        if (high == low) break;
        const auto active = end > T(low);

        const V half = (d[low + 1] - d[low]) / (2 * (active ? e[low] : one));
        const V length = sqrt_of(half * half + 1);
        const V shift = half + (half < 0 ? -length : length);
        V g = last - d[low] + e[low] / (active ? shift : one);
        V sine = one, cosine = one, moved{};
        V *cs = c + num_rotations, *ss = s + num_rotations;
        for (int64_t i = high - 1; i >= low; --i) {
          const auto in = active & (end > T(i));
          const V f = sine * e[i], b = cosine * e[i];
          const V square = f * f + g * g;
          const auto turn = square > kSquare;
          const V r = sqrt_of(turn ? square : V{});
          const V inverse = 1 / (turn ? r : one);
          const V sine_new = turn ? f * inverse : V{}, cosine_new = turn ? g * inverse : one;
          e[i + 1] = (in & (end > T(i + 1))) ? r : e[i + 1];
          const V base = d[i + 1] - moved;
          const V t = (d[i] - base) * sine_new + 2 * cosine_new * b;
          const V moved_new = sine_new * t;
          d[i + 1] = in ? base + moved_new : d[i + 1];
          g = in ? cosine_new * t - b : g;
          moved = in ? moved_new : moved;
          sine = in ? sine_new : sine;
          cosine = in ? cosine_new : cosine;
          *cs++ = in ? cosine_new : one;
          *ss++ = in ? sine_new : V{};
        }
        d[low] = active ? d[low] - moved : d[low];
        e[low] = active ? g : e[low];
        sweeps[num_sweeps++] = {num_rotations, low, high};
        num_rotations += high - low;
        if (num_rotations >= kRotations || num_sweeps == kRotations) apply_rotations();
      }
    }
  }

  // A block of rows stays in the nearest cache while all the rotations kept go through it.
  void apply_rotations() {
    for (int64_t b = 0; b < blocks; ++b) {
      V* rows = z + b * n * kRows;
      for (int64_t k = 0; k < num_sweeps; ++k) {
        const Sweep& sweep = sweeps[k];
        const V *cs = c + sweep.first, *ss = s + sweep.first;
        V upper[kRows];
        for (int r = 0; r < kRows; ++r) upper[r] = rows[sweep.high * kRows + r];
        for (int64_t i = sweep.high - 1; i >= sweep.low; --i) {
          const V cosine = *cs++, sine = *ss++;
          for (int r = 0; r < kRows; ++r) {
            const V lower = rows[i * kRows + r];
            rows[(i + 1) * kRows + r] = sine * lower + cosine * upper[r];
            upper[r] = cosine * lower - sine * upper[r];
          }
        }
        for (int r = 0; r < kRows; ++r) rows[sweep.low * kRows + r] = upper[r];
      }
    }
    num_sweeps = num_rotations = 0;
  }

  // Eigenvalues and eigenvectors to the outputs, and the root.
  void finish(int64_t first, int64_t count, V scale) {
    V low = d[0], high = d[0], largest{};
    for (int64_t i = 0; i < n; ++i) {
      low = min_of(low, d[i]), high = max_of(high, d[i]);
      const V value = d[i] * scale + T(args.eps);
      d[i] = sqrt_of(value > 0 ? value : V{});
      largest = max_of(largest, d[i]);
    }
    low *= scale, high *= scale;
    T* seen = static_cast<T*>(args.seen);
    for (int64_t k = 0; k < count; ++k) {
      seen[2 * args.count + first + k] = low[k];
      seen[3 * args.count + first + k] = high[k];
    }
    if (args.roots) {
      const V smallest = largest * T(__builtin_sqrt(args.resolution));
      T* roots = static_cast<T*>(args.roots) + first * n;
      for (int64_t i = 0; i < n; ++i) {
        const V kept = d[i] > smallest ? d[i] : V{};
        for (int64_t k = 0; k < count; ++k) roots[k * n + i] = kept[k];
      }
    }
    if (args.vectors) {
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) a[j * n + i] = z[(j / kRows * n + i) * kRows + j % kRows];
      }
      scatter(a, n * n, count, static_cast<T*>(args.vectors) + first * n * n);
    }
    for (int64_t i = 0; i < n; ++i) {
      const V factor = sqrt_of(args.inverse ? 1 / d[i] : d[i]);
      for (int64_t b = 0; b < blocks; ++b) {
        for (int r = 0; r < kRows; ++r) z[(b * n + i) * kRows + r] *= factor;
      }
    }
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t other = 0; other <= b; ++other) product(b, other);
    }
    scatter(a, n * n, count, static_cast<T*>(args.root) + first * n * n);
  }

  // The block (b, other) of z z^T, and its mirror image.
  void product(int64_t b, int64_t other) {
    const V *left = z + b * n * kRows, *right = z + other * n * kRows;
    V sum[kRows][kRows] = {};
    for (int64_t i = 0; i < n; ++i) {
      for (int r = 0; r < kRows; ++r) {
        for (int k = 0; k < kRows; ++k) sum[r][k] += left[i * kRows + r] * right[i * kRows + k];
      }
    }
    for (int64_t r = b * kRows; r < min(n, (b + 1) * kRows); ++r) {
      for (int64_t k = other * kRows; k < min(n, (other + 1) * kRows); ++k) {
        a[r * n + k] = a[k * n + r] = sum[r - b * kRows][k - other * kRows];
      }
    }
  }

  // Element by element of `count` arrays of `size` numbers that follow each other, into lanes.
  static void gather(const T* in, int64_t size, int64_t count, V* out) {
    T* flat = reinterpret_cast<T*>(out);
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t j = 0; j < size; ++j) flat[j * W + k] = in[k * size + j];
    }
  }

  static void scatter(const V* in, int64_t size, int64_t count, T* out) {
    const T* flat = reinterpret_cast<const T*>(in);
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t j = 0; j < size; ++j) out[k * size + j] = flat[j * W + k];
    }
  }
};

template <class T>
struct Job {
  const MatrixSqrtFwd& args;
  char* memory;
  int64_t bytes;

  static void run(void* self, const Team& team) {
    const Job& job = *static_cast<Job*>(self);
    const int64_t groups = (job.args.count + kLanes<T> - 1) / kLanes<T>;
    Group<T> group(job.args, job.memory + team.thread * job.bytes);
    const int64_t end = groups * (team.thread + 1) / team.num_threads;
    for (int64_t g = groups * team.thread / team.num_threads; g < end; ++g) group.run(g * kLanes<T>);
  }
};

template <class T>
void forward(const MatrixSqrtFwd& args, int num_threads) {
  if (args.count == 0 || args.n == 0) return;
  const int64_t groups = (args.count + kLanes<T> - 1) / kLanes<T>;
  // Reduction, rotations and products take about 10 n^3 a matrix.
  const int64_t products = 10 * groups * kLanes<T> * args.n * args.n * args.n;
  const int threads = threads_for(products, kProductsPerThread, static_cast<int>(min(num_threads, groups)));
  const int64_t bytes = (Group<T>::bytes(args.n) + 63) / 64 * 64;
  Job<T> job{args, static_cast<char*>(scratch(static_cast<size_t>(bytes * threads))), bytes};
  run_parallel(&Job<T>::run, &job, threads);
}

}  // namespace

void matrix_sqrt_fwd(Dtype dtype, const MatrixSqrtFwd& args, int num_threads) {
  dtype == Dtype::float64 ? forward<double>(args, num_threads) : forward<float>(args, num_threads);
}

}  // namespace lipgan::cpu::LIPGAN_ISA
