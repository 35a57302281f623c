// symmetrize on the CPU. Definitions: include/lipgan/symmetrize.h.
//
// A tile and its mirror image are read together, row by row, so that each comes from memory once; the image is turned in
// the nearest cache.
#include "lipgan/symmetrize.h"

#include "integers.h"
#include "threads.h"
#include "vector.h"

namespace lipgan::cpu::LIPGAN_ISA {
namespace {

constexpr int64_t kTile = 32;  // rows: two tiles of doubles are 16 KiB
constexpr int64_t kNumbersPerThread = 1 << 16;

double widened(double x) { return x; }
template <class T> double widened(T x) { return static_cast<double>(widen(x)); }

struct Seen {
  double largest = 0, difference = 0, nothing = 0;  // the last is NaN where a number is not finite
  char apart[40];                                   // threads write to cache lines of their own
};

template <class T>
struct Job {
  const T* a;
  int64_t n;
  double* symmetric;  // null: only look
  Seen* seen;         // [threads]

  // turned[i][j] = a[first_row + j][first_column + i], in double.
  void turn(int64_t first_row, int64_t first_column, int64_t rows, int64_t columns, double (*turned)[kTile]) const {
    for (int64_t j = 0; j < rows; ++j) {
      const T* row = a + (first_row + j) * n + first_column;
      for (int64_t i = 0; i < columns; ++i) turned[i][j] = widened(row[i]);
    }
  }

  void look(int64_t i, int64_t j, int64_t rows, int64_t columns, const double (*turned)[kTile], Seen& own) const {
    double largest = own.largest, difference = own.difference, nothing = own.nothing;
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = a + (i + r) * n + j;
      const double* other = turned[r];
#pragma omp simd reduction(max : largest, difference) reduction(+ : nothing)
      for (int64_t c = 0; c < columns; ++c) {
        const double x = widened(row[c]), y = other[c];
        const double x_size = x < 0 ? -x : x, y_size = y < 0 ? -y : y, apart = x < y ? y - x : x - y;
        largest = largest < x_size ? x_size : largest;
        largest = largest < y_size ? y_size : largest;
        difference = difference < apart ? apart : difference;
        nothing += x * 0 + y * 0;
      }
    }
    own.largest = largest, own.difference = difference, own.nothing = nothing;
  }

  void write(int64_t i, int64_t j, int64_t rows, int64_t columns, double (*turned)[kTile]) const {
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = a + (i + r) * n + j;
      double *out = symmetric + (i + r) * n + j, *mean = turned[r];
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) out[c] = mean[c] = 0.5 * (widened(row[c]) + mean[c]);
    }
    for (int64_t c = 0; c < columns; ++c) {
      double* out = symmetric + (j + c) * n + i;
      for (int64_t r = 0; r < rows; ++r) out[r] = turned[r][c];
    }
  }

  static void run(void* self, const Team& team) {
    const Job& job = *static_cast<Job*>(self);
    double turned[kTile][kTile];
    Seen own;
    const int64_t tiles = ceil_div(job.n, kTile);
    for (int64_t t = team.thread; t < tiles; t += team.num_threads) {
      const int64_t i = t * kTile, rows = min(kTile, job.n - i);
      for (int64_t j = 0; j <= i; j += kTile) {
        const int64_t columns = min(kTile, job.n - j);
        job.turn(j, i, columns, rows, turned);
        if (job.symmetric) {
          job.write(i, j, rows, columns, turned);
        } else {
          job.look(i, j, rows, columns, turned, own);
        }
      }
    }
    if (job.seen) job.seen[team.thread] = own;
  }
};

template <class T>
void run(const void* a, int64_t n, double* symmetric, double* seen, int num_threads) {
  const int threads = threads_for(n * n, kNumbersPerThread, num_threads);
  Job<T> job{static_cast<const T*>(a), n, symmetric, nullptr};
  if (seen) {
    job.seen = static_cast<Seen*>(scratch(sizeof(Seen) * static_cast<size_t>(threads)));
    // The runtime may grant fewer threads.
    for (int t = 0; t < threads; ++t) job.seen[t] = Seen();
  }
  run_parallel(&Job<T>::run, &job, threads);
  if (!seen) return;
  Seen all;
  for (int t = 0; t < threads; ++t) {
    all.largest = all.largest < job.seen[t].largest ? job.seen[t].largest : all.largest;
    all.difference = all.difference < job.seen[t].difference ? job.seen[t].difference : all.difference;
    all.nothing += job.seen[t].nothing;
  }
  seen[0] = all.largest + all.nothing;
  seen[1] = all.difference;
}

void run_of(Dtype dtype, const void* a, int64_t n, double* symmetric, double* seen, int num_threads) {
  switch (dtype) {
    case Dtype::float32: return run<float>(a, n, symmetric, seen, num_threads);
    case Dtype::float64: return run<double>(a, n, symmetric, seen, num_threads);
    case Dtype::float16: return run<float16>(a, n, symmetric, seen, num_threads);
    case Dtype::bfloat16: return run<bfloat16>(a, n, symmetric, seen, num_threads);
  }
}

}  // namespace

void symmetrize_look(Dtype dtype, const void* a, int64_t n, double* seen, int num_threads) {
  run_of(dtype, a, n, nullptr, seen, num_threads);
}

void symmetrize_fwd(Dtype dtype, const void* a, int64_t n, double* symmetric, int num_threads) {
  run_of(dtype, a, n, symmetric, nullptr, num_threads);
}

}  // namespace lipgan::cpu::LIPGAN_ISA
