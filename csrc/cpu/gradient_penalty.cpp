// gradient_penalty on the CPU. Formulas and layouts: include/lipgan/gradient_penalty.h.
//
// Memory traffic is the cost. The gradients are taken in blocks that fit the caches: the norms of a block, then its
// part of the cotangent, so that g comes from memory once. Only "max" needs all norms first. Sums are taken in double,
// in which no square of a narrower type leaves the range.
//
// The blocks that partial sums are taken over depend on the shapes alone, so the result does not depend on the number
// of threads.
#include "lipgan/gradient_penalty.h"

#include <limits>

#include "integers.h"
#include "threads.h"
#include "vector.h"

namespace lipgan::cpu::LIPGAN_ISA {
namespace {

constexpr int64_t kBlockElements = 16384;       // of a block of short rows, of a piece of a long one, or of columns
constexpr int64_t kMaxNorms = 1024;             // in a block: what is known of each lies on the stack
constexpr int64_t kMinColumns = 64;             // side by side, lest a row of a block be shorter than its cost
constexpr int64_t kShortRow = 32;               // below it, rows are joined to one run
constexpr int64_t kStreamBytes = 32 << 20;       // of an array: beyond it, the arrays of the call fit no common cache
constexpr int64_t kBytesPerThread = 128 << 10;  // of an array that pay for waking a thread

// The thread's share of `count` blocks.
struct Share {
  int64_t first, last;
  Share(int64_t count, const Team& team)
      : first(count * team.thread / team.num_threads), last(count * (team.thread + 1) / team.num_threads) {}
};

// ---- interpolation ----

template <class T, class A>
struct Interpolate {
  const T* real;
  const T* fake;
  const A* mix;
  T* x_hat;
  int64_t batch, length;
  bool stream;

  static void run(void* self, const Team& team) { static_cast<Interpolate*>(self)->run(team); }

  void run(const Team& team) {
    if (length < kShortRow) {
      const int64_t per_block = kMaxNorms / length;
      const Share share(ceil_div(batch, per_block), team);
      for (int64_t b = share.first; b < share.last; ++b) short_rows(b * per_block, min(batch, (b + 1) * per_block));
    } else {
      const Share share(batch * length, team);
      for (int64_t j = share.first; j < share.last;) {
        const int64_t i = j / length, end = min(share.last, (i + 1) * length);
        row(mix[i], j, end - j);
        j = end;
      }
    }
    stream_fence();
  }

  void row(A m, int64_t offset, int64_t n) {
    const T *a = real + offset, *b = fake + offset;
    if (m == A(1) || m == A(0)) {
      std::memcpy(x_hat + offset, m == A(1) ? a : b, static_cast<size_t>(n) * sizeof(T));
    } else {
      generate(x_hat + offset, n, stream,
               [=](int64_t j) { return narrow<T>(m * widen(a[j]) + (A(1) - m) * widen(b[j])); });
    }
  }

  void short_rows(int64_t first, int64_t last) {
    A repeated[kMaxNorms];
    const A* m = mix + first;
    const int64_t n = (last - first) * length;
    if (length > 1) {
      for (int64_t i = first; i < last; ++i) {
        for (int64_t k = 0; k < length; ++k) repeated[(i - first) * length + k] = mix[i];
      }
      m = repeated;
    }
    const T *a = real + first * length, *b = fake + first * length;
    generate(x_hat + first * length, n, stream, [=](int64_t j) {
      const A real_j = widen(a[j]), fake_j = widen(b[j]), mixed = m[j] * real_j + (A(1) - m[j]) * fake_j;
      return narrow<T>(m[j] == A(1) ? real_j : m[j] == A(0) ? fake_j : mixed);
    });
  }
};

template <class T>
void interpolate(const void* real, const void* fake, const void* mix, void* x_hat, int64_t batch, int64_t length,
                 int num_threads) {
  using A = typename Accumulate<T>::type;
  const int64_t bytes = batch * length * static_cast<int64_t>(sizeof(T));
  Interpolate<T, A> op{static_cast<const T*>(real), static_cast<const T*>(fake), static_cast<const A*>(mix),
                       static_cast<T*>(x_hat), batch, length, bytes > kStreamBytes};
  run_parallel(&Interpolate<T, A>::run, &op, threads_for(bytes, kBytesPerThread, num_threads));
}

// ---- the penalty ----

// What the cotangent of a norm is made of: g times `inverse` is g / n (g itself for the kind "squared").
template <class A>
struct Factors {
  A* inverse;
  A* slope;  // dP/dn
};

template <class T, class A>
struct Penalty {
  PenaltyKind kind;
  const T* grads;
  A* norms;
  T* cotangent;
  int64_t outer, length, inner;
  double weight, target;
  bool stream;

  int64_t per_block = 0, blocks_per_outer = 1, num_blocks = 0;  // norms in a block; blocks of columns
  int64_t pieces = 0;  // of a row, where few long rows are shared among the threads; else 0

  double* sums = nullptr;     // [blocks]: of the terms of P
  A* maxima = nullptr;        // [blocks]
  double* partial = nullptr;  // [rows, pieces]: sums of squares
  Factors<A> of_rows{};       // [rows], with pieces

  // ---- blocks ----

  struct Block {
    int64_t first, count;  // norms
    int64_t offset;        // of its first element; its columns are `inner` apart
  };

  void build(int num_threads) {
    if (inner == 1) {
      per_block = max(1, min(kMaxNorms, kBlockElements / length));
      num_blocks = ceil_div(outer, per_block);
      // Whole rows keep a row in the cache of one thread, but leave a thread idle where there are few.
      if (num_threads > 1 && per_block == 1 && outer < 8 * num_threads) pieces = ceil_div(length, kBlockElements);
    } else {
      per_block = min(inner, max(kMinColumns, min(kMaxNorms, kBlockElements / length / kMinColumns * kMinColumns)));
      blocks_per_outer = ceil_div(inner, per_block);
      num_blocks = outer * blocks_per_outer;
    }
  }

  Block block(int64_t b) const {
    if (inner == 1) {
      const int64_t first = b * per_block;
      return {first, min(outer, first + per_block) - first, first * length};
    }
    const int64_t o = b / blocks_per_outer, begin = b % blocks_per_outer * per_block;
    return {o * inner + begin, min(inner, begin + per_block) - begin, o * length * inner + begin};
  }

  size_t scratch_bytes() const {
    const int64_t rows = pieces ? outer : 0;
    return sizeof(double) * static_cast<size_t>(num_blocks + rows * pieces) +
           sizeof(A) * static_cast<size_t>(num_blocks + 2 * rows);
  }

  void take(void* memory) {
    const int64_t rows = pieces ? outer : 0;
    sums = static_cast<double*>(memory);
    partial = sums + num_blocks;
    maxima = reinterpret_cast<A*>(partial + rows * pieces);
    of_rows = {maxima + num_blocks, maxima + num_blocks + rows};
  }

  static void run(void* self, const Team& team) { static_cast<Penalty*>(self)->run(team); }

  void run(const Team& team) {
    if (pieces) return run_pieces(team);
    A inverse[kMaxNorms], slope[kMaxNorms];
    const Factors<A> factors{inverse, slope};
    const Share share(num_blocks, team);
    for (int64_t b = share.first; b < share.last; ++b) {
      const Block own = block(b);
      double square[kMaxNorms];
      if (inner > 1) {
        squares_of_columns(own, square);
      } else {
        squares_of_rows(own, square);
      }
      finish(b, own, square, factors);
      if (kind != PenaltyKind::max) write(own, factors);
    }
    if (kind == PenaltyKind::max) {
      team.barrier();
      const Maximum top = maximum();
      for (int64_t b = share.first; b < share.last; ++b) {
        const Block own = block(b);
        maximum_factors(own, top, factors);
        write(own, factors);
      }
    }
    stream_fence();
  }

  void run_pieces(const Team& team) {
    const Share share(outer * pieces, team);
    for (int64_t k = share.first; k < share.last; ++k) {
      const int64_t begin = k % pieces * kBlockElements, end = min(length, begin + kBlockElements);
      partial[k] = sum_of_squares(grads + k / pieces * length + begin, end - begin);
    }
    team.barrier();
    for (int64_t i = team.thread; i < outer; i += team.num_threads) {
      double square = 0;
      for (int64_t p = 0; p < pieces; ++p) square += partial[i * pieces + p];
      finish(i, block(i), &square, {of_rows.inverse + i, of_rows.slope + i});
    }
    team.barrier();
    const bool is_max = kind == PenaltyKind::max;
    const Maximum top = is_max ? maximum() : Maximum{};
    for (int64_t k = share.last; k-- > share.first;) {
      const int64_t i = k / pieces, begin = k % pieces * kBlockElements, end = min(length, begin + kBlockElements);
      A inverse = of_rows.inverse[i], slope = of_rows.slope[i];
      if (is_max) maximum_factors(block(i), top, {&inverse, &slope});
      write_run(i * length + begin, end - begin, inverse, slope);
    }
    stream_fence();
  }

  // ---- sums of squares ----

  void squares_of_rows(const Block& own, double* square) const {
    const T* x = grads + own.offset;
    switch (length) {
      case 1: return squares_of_short_rows<1>(x, own.count, square);
      case 2: return squares_of_short_rows<2>(x, own.count, square);
      case 3: return squares_of_short_rows<3>(x, own.count, square);
      case 4: return squares_of_short_rows<4>(x, own.count, square);
    }
    for (int64_t i = 0; i < own.count; ++i) {
      const T* row = x + i * length;
      double total = 0;
      for (int64_t begin = 0; begin < length; begin += kBlockElements) {
        total += sum_of_squares(row + begin, min(kBlockElements, length - begin));
      }
      square[i] = total;
    }
  }

  template <int N>
  static void squares_of_short_rows(const T* x, int64_t count, double* __restrict square) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      double total = 0;
      for (int k = 0; k < N; ++k) {
        const double value = widen(x[i * N + k]);
        total += value * value;
      }
      square[i] = total;
    }
  }

  void squares_of_columns(const Block& own, double* __restrict square) const {
    const int64_t count = own.count;
    for (int64_t s = 0; s < count; ++s) square[s] = 0;
    for (int64_t c = 0; c < length; ++c) {
      const T* x = grads + own.offset + c * inner;
#pragma omp simd
      for (int64_t s = 0; s < count; ++s) {
        const double value = widen(x[s]);
        square[s] += value * value;
      }
    }
  }

  // ---- norms, their terms and factors ----

  void finish(int64_t b, const Block& own, double* square, const Factors<A>& factors) {
    A* out = norms + own.first;
    const int64_t count = own.count;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) square[i] = __builtin_sqrt(square[i]);
    if constexpr (sizeof(T) == sizeof(double)) mend(own, square);
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<A>(square[i]);
    const double n = static_cast<double>(outer * inner), t = target;
    const double step = 2 * weight / n;
    switch (kind) {
      case PenaltyKind::two_sided:
        sums[b] = terms(square, count, factors, step, [=](double norm) { return norm - t; });
        break;
      case PenaltyKind::one_sided:
        sums[b] = terms(square, count, factors, step, [=](double norm) { return norm - t < 0 ? 0 : norm - t; });
        break;
      case PenaltyKind::squared: {
        double total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < count; ++i) total += square[i] * square[i];
        sums[b] = total / 2;
        for (int64_t i = 0; i < count; ++i) factors.inverse[i] = 1, factors.slope[i] = static_cast<A>(weight / n);
        break;
      }
      case PenaltyKind::max: {
        A largest = out[0];
        for (int64_t i = 1; i < count; ++i) largest = greater(largest, out[i]);
        maxima[b] = largest;
      }
    }
  }

  // sum f(n)^2, and the factors of f(n) step.
  template <class F>
  static double terms(const double* norm, int64_t count, const Factors<A>& factors, double step, F f) {
    A *inverse = factors.inverse, *slope = factors.slope;
    double total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < count; ++i) {
      const double excess = f(norm[i]);
      total += excess * excess;
      inverse[i] = inverse_of(norm[i]);
      slope[i] = static_cast<A>(step * excess);
    }
    return total;
  }

  static A inverse_of(double norm) {
    return static_cast<A>(norm < static_cast<double>(std::numeric_limits<A>::min()) ? 0.0 : 1.0 / norm);
  }

  // The squares of float64 leave the range where the norm does not: those norms are taken again.
  void mend(const Block& own, double* norm) const {
    const int64_t stride = inner == 1 ? 1 : inner;
    for (int64_t i = 0; i < own.count; ++i) {
      if (norm[i] > 1e-140 && norm[i] < 1e150) continue;
      norm[i] = norm_in_range(grads + own.offset + i * (inner == 1 ? length : 1), length, stride, norm[i]);
    }
  }

  // The larger one; NaN if one is.
  static A greater(A a, A b) { return b > a || b != b ? b : a; }

  struct Maximum {
    A norm;
    A slope;
  };

  Maximum maximum() const {
    A norm = maxima[0];
    for (int64_t b = 1; b < num_blocks; ++b) norm = greater(norm, maxima[b]);
    int64_t ties = 0;
    for (int64_t b = 0; b < num_blocks; ++b) {
      if (!shares(maxima[b], norm)) continue;
      const Block own = block(b);
      for (int64_t i = 0; i < own.count; ++i) ties += shares(norms[own.first + i], norm);
    }
    const double excess = static_cast<double>(norm) - target;
    return {norm, static_cast<A>(2 * weight / static_cast<double>(ties) * excess)};
  }

  static bool shares(A norm, A largest) { return norm == largest || norm != norm; }

  void maximum_factors(const Block& own, const Maximum& top, const Factors<A>& factors) const {
    for (int64_t i = 0; i < own.count; ++i) {
      const A norm = norms[own.first + i];
      factors.inverse[i] = inverse_of(norm);
      factors.slope[i] = shares(norm, top.norm) ? top.slope : A(0);
    }
  }

  double total() const {
    if (kind == PenaltyKind::max) {
      A norm = maxima[0];
      for (int64_t b = 1; b < num_blocks; ++b) norm = greater(norm, maxima[b]);
      const double excess = static_cast<double>(norm) - target;
      return weight * (excess * excess);
    }
    double sum = 0;
    for (int64_t b = 0; b < num_blocks; ++b) sum += sums[b];
    return weight * (sum / static_cast<double>(outer * inner));
  }

  // ---- the cotangent ----

  void write(const Block& own, const Factors<A>& factors) {
    if (inner > 1) return write_columns(own, factors);
    switch (length) {
      case 1: return write_short_rows<1>(own, factors);
      case 2: return write_short_rows<2>(own, factors);
      case 3: return write_short_rows<3>(own, factors);
      case 4: return write_short_rows<4>(own, factors);
    }
    for (int64_t i = 0; i < own.count; ++i) {
      write_run(own.offset + i * length, length, factors.inverse[i], factors.slope[i]);
    }
  }

  void write_run(int64_t offset, int64_t n, A inverse, A slope) {
    const T* x = grads + offset;
    if (slope == A(0)) {  // a norm on its target, below it, or not the maximum: it is finite
      generate(cotangent + offset, n, stream, [](int64_t) { return T{}; });
    } else {
      generate(cotangent + offset, n, stream, [=](int64_t j) { return narrow<T>(widen(x[j]) * inverse * slope); });
    }
  }

  void write_columns(const Block& own, const Factors<A>& factors) {
    const A *inverse = factors.inverse, *slope = factors.slope;
    for (int64_t c = 0; c < length; ++c) {
      const T* x = grads + own.offset + c * inner;
      generate(cotangent + own.offset + c * inner, own.count, stream,
               [=](int64_t s) { return narrow<T>(widen(x[s]) * inverse[s] * slope[s]); });
    }
  }

  template <int N>
  void write_short_rows(const Block& own, const Factors<A>& factors) {
    const A *inverse = factors.inverse, *slope = factors.slope;
    const T* x = grads + own.offset;
    T* __restrict out = cotangent + own.offset;
    const int64_t count = own.count;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      for (int k = 0; k < N; ++k) out[i * N + k] = narrow<T>(widen(x[i * N + k]) * inverse[i] * slope[i]);
    }
  }
};

template <class T>
void penalty(PenaltyKind kind, const void* grads, void* penalty, void* norms, void* cotangent, int64_t outer,
             int64_t length, int64_t inner, double weight, double target, int num_threads) {
  using A = typename Accumulate<T>::type;
  const int64_t bytes = outer * length * inner * static_cast<int64_t>(sizeof(T));
  const int threads = threads_for(bytes, kBytesPerThread, num_threads);
  Penalty<T, A> op{kind,  static_cast<const T*>(grads), static_cast<A*>(norms), static_cast<T*>(cotangent),
                   outer, length, inner, weight, target, bytes > kStreamBytes};
  op.build(threads);
  op.take(scratch(op.scratch_bytes()));
  run_parallel(&Penalty<T, A>::run, &op, threads);
  *static_cast<A*>(penalty) = static_cast<A>(op.total());
}

}  // namespace

void gradient_penalty_interpolate(Dtype dtype, const void* real, const void* fake, const void* mix, void* x_hat,
                                  int64_t batch, int64_t length, int num_threads) {
  const auto serve = [&](auto fn) { fn(real, fake, mix, x_hat, batch, length, num_threads); };
  switch (dtype) {
    case Dtype::float32: return serve(interpolate<float>);
    case Dtype::float64: return serve(interpolate<double>);
    case Dtype::float16: return serve(interpolate<float16>);
    case Dtype::bfloat16: return serve(interpolate<bfloat16>);
  }
}

void gradient_penalty_fwd(Dtype dtype, PenaltyKind kind, const void* grads, void* penalty_out, void* norms,
                          void* cotangent, int64_t outer, int64_t length, int64_t inner, double weight, double target,
                          int num_threads) {
  const auto serve = [&](auto fn) {
    fn(kind, grads, penalty_out, norms, cotangent, outer, length, inner, weight, target, num_threads);
  };
  switch (dtype) {
    case Dtype::float32: return serve(penalty<float>);
    case Dtype::float64: return serve(penalty<double>);
    case Dtype::float16: return serve(penalty<float16>);
    case Dtype::bfloat16: return serve(penalty<bfloat16>);
  }
}

}  // namespace lipgan::cpu::LIPGAN_ISA
