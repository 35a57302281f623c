// Loops over contiguous elements, written so that every instruction set vectorises them, and the storage types.
//
// Everything here is in the namespace of the instruction set it is compiled for. The linker keeps one copy of an inline
// function for the whole program: without that, an AVX-512 copy could end up in the baseline path.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef LIPGAN_ISA
#error "compile with -DLIPGAN_ISA=<name>"
#endif

namespace lipgan::cpu::LIPGAN_ISA {

struct float16 { uint16_t bits; };
struct bfloat16 { uint16_t bits; };

// The type in which sums over T are taken.
template <class T> struct Accumulate { using type = float; };
template <> struct Accumulate<double> { using type = double; };

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
// float16 by arithmetic on bits: compilers vectorise that, but no instruction that converts a single number.
inline float widen(float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // inf and NaN
  // Shifted into place, the exponent is short by 112; one exact multiplication mends it, also for subnormals.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
}

template <class T> T narrow(typename Accumulate<T>::type x);
template <> inline float narrow<float>(float x) { return x; }
template <> inline double narrow<double>(double x) { return x; }
template <> inline bfloat16 narrow<bfloat16>(float x) {  // round to nearest even
  const uint32_t bits = float_to_bits(x);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <> inline float16 narrow<float16>(float x) {  // round to nearest even
  const uint32_t bits = float_to_bits(x);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};  // NaN
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to inf
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 leaves its 10 bits, rounded to nearest even, at the bottom of the float's mantissa.
    const uint32_t rounded = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
    return {static_cast<uint16_t>(sign | rounded)};
  }
  return {static_cast<uint16_t>(sign | (((magnitude + 0xfffu + (magnitude >> 13 & 1u)) >> 13) - 0x1c000u))};
}

// out[r] = <row r, x> for R consecutive rows, `stride` apart.
template <int R, class T, class A>
inline void dot_rows(const T* rows, int64_t stride, const A* x, int64_t n, A* out) {
  static_assert(R == 1 || R == 4 || R == 8);
  if constexpr (R == 1) {
    A a = 0;
#pragma omp simd reduction(+ : a)
    for (int64_t j = 0; j < n; ++j) a += widen(rows[j]) * x[j];
    out[0] = a;
  } else if constexpr (R == 4) {
    const T *r0 = rows, *r1 = r0 + stride, *r2 = r1 + stride, *r3 = r2 + stride;
    A a0 = 0, a1 = 0, a2 = 0, a3 = 0;
#pragma omp simd reduction(+ : a0, a1, a2, a3)
    for (int64_t j = 0; j < n; ++j) {
      const A xj = x[j];
      a0 += widen(r0[j]) * xj;
      a1 += widen(r1[j]) * xj;
      a2 += widen(r2[j]) * xj;
      a3 += widen(r3[j]) * xj;
    }
    out[0] = a0, out[1] = a1, out[2] = a2, out[3] = a3;
  } else {
    const T *r0 = rows, *r1 = r0 + stride, *r2 = r1 + stride, *r3 = r2 + stride;
    const T *r4 = r3 + stride, *r5 = r4 + stride, *r6 = r5 + stride, *r7 = r6 + stride;
    A a0 = 0, a1 = 0, a2 = 0, a3 = 0, a4 = 0, a5 = 0, a6 = 0, a7 = 0;
#pragma omp simd reduction(+ : a0, a1, a2, a3, a4, a5, a6, a7)
    for (int64_t j = 0; j < n; ++j) {
      const A xj = x[j];
      a0 += widen(r0[j]) * xj;
      a1 += widen(r1[j]) * xj;
      a2 += widen(r2[j]) * xj;
      a3 += widen(r3[j]) * xj;
      a4 += widen(r4[j]) * xj;
      a5 += widen(r5[j]) * xj;
      a6 += widen(r6[j]) * xj;
      a7 += widen(r7[j]) * xj;
    }
    out[0] = a0, out[1] = a1, out[2] = a2, out[3] = a3, out[4] = a4, out[5] = a5, out[6] = a6, out[7] = a7;
  }
}

// out += sum over R consecutive rows of c[r] * row r. One pass over `out` serves R rows.
template <int R, class T, class A>
inline void add_rows(const T* rows, int64_t stride, const A* c, int64_t n, A* __restrict out) {
  static_assert(R == 1 || R == 4 || R == 8);
  if constexpr (R == 1) {
    const A c0 = c[0];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) out[j] += c0 * widen(rows[j]);
  } else if constexpr (R == 4) {
    const T *r0 = rows, *r1 = r0 + stride, *r2 = r1 + stride, *r3 = r2 + stride;
    const A c0 = c[0], c1 = c[1], c2 = c[2], c3 = c[3];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      out[j] += (c0 * widen(r0[j]) + c1 * widen(r1[j])) + (c2 * widen(r2[j]) + c3 * widen(r3[j]));
    }
  } else {
    const T *r0 = rows, *r1 = r0 + stride, *r2 = r1 + stride, *r3 = r2 + stride;
    const T *r4 = r3 + stride, *r5 = r4 + stride, *r6 = r5 + stride, *r7 = r6 + stride;
    const A c0 = c[0], c1 = c[1], c2 = c[2], c3 = c[3], c4 = c[4], c5 = c[5], c6 = c[6], c7 = c[7];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      out[j] += ((c0 * widen(r0[j]) + c1 * widen(r1[j])) + (c2 * widen(r2[j]) + c3 * widen(r3[j]))) +
                ((c4 * widen(r4[j]) + c5 * widen(r5[j])) + (c6 * widen(r6[j]) + c7 * widen(r7[j])));
    }
  }
}

// <x, y>, in runs short enough that the error of a float sum stays below that of its terms; the runs add up in double.
template <class T, class U>
inline double dot(const T* x, const U* y, int64_t n) {
  using A = typename Accumulate<T>::type;
  constexpr int64_t kRun = 16384;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t end = begin + kRun < n ? begin + kRun : n;
    A a = 0, b = 0, c = 0, d = 0;
    int64_t j = begin;
    const int64_t quarter = (end - begin) / 4;
#pragma omp simd reduction(+ : a, b, c, d)
    for (int64_t k = 0; k < quarter; ++k) {
      a += widen(x[begin + k]) * widen(y[begin + k]);
      b += widen(x[begin + quarter + k]) * widen(y[begin + quarter + k]);
      c += widen(x[begin + 2 * quarter + k]) * widen(y[begin + 2 * quarter + k]);
      d += widen(x[begin + 3 * quarter + k]) * widen(y[begin + 3 * quarter + k]);
    }
    for (j = begin + 4 * quarter; j < end; ++j) a += widen(x[j]) * widen(y[j]);
    total += static_cast<double>(a + b) + static_cast<double>(c + d);
  }
  return total;
}

// sum of squares, in double. Of doubles in runs first: the rounding of a sum grows with the numbers added one by one, and
// a vector of the baseline takes only two of them at a time. For narrower types that is far below their own rounding.
template <class T>
inline double sum_of_squares(const T* x, int64_t n) {
  constexpr int64_t kRun = sizeof(T) == sizeof(double) ? 256 : 1 << 20;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t end = begin + kRun < n ? begin + kRun : n;
    double run = 0;
#pragma omp simd reduction(+ : run)
    for (int64_t j = begin; j < end; ++j) {
      const double value = widen(x[j]);
      run += value * value;
    }
    total += run;
  }
  return total;
}

// The norm of n numbers, `stride` apart, whose squares leave the range of a double: of the numbers times a power of two.
// `norm` is what comes without it, which stays where the numbers are 0, infinite or NaN.
template <class T>
inline double norm_in_range(const T* x, int64_t n, int64_t stride, double norm) {
  double largest = 0;
  for (int64_t k = 0; k < n; ++k) {
    const double size = __builtin_fabs(widen(x[k * stride]));
    largest = largest < size ? size : largest;
  }
  if (largest == 0 || largest > std::numeric_limits<double>::max()) return norm;
  const double scale = largest < 1 ? 0x1p600 : 0x1p-600;
  constexpr int64_t kRun = 256;  // as in sum_of_squares
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t end = begin + kRun < n ? begin + kRun : n;
    double run = 0;
    for (int64_t k = begin; k < end; ++k) {
      const double value = widen(x[k * stride]) * scale;
      run += value * value;
    }
    total += run;
  }
  return __builtin_sqrt(total) / scale;
}

// Elements in a cache line.
template <class T> constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));

// Stores one line that will not be read soon, past the caches: an ordinary store would first read the line.
template <class T>
inline void stream_line(T* out, const T* line) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(out), _mm512_loadu_si512(line));
#elif defined(__AVX2__)
  for (int k = 0; k < 2; ++k) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out) + k,
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line) + k));
  }
#elif defined(__SSE2__)
  for (int k = 0; k < 4; ++k) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(out) + k, _mm_loadu_si128(reinterpret_cast<const __m128i*>(line) + k));
  }
#else
  std::memcpy(out, line, 64);
#endif
}

// out[j] = f(j) for j in [0, n); with `stream`, whole cache lines bypass the caches.
template <class T, class F>
inline void generate(T* __restrict out, int64_t n, bool stream, F f) {
  int64_t j = 0;
  if (stream) {
    while (j < n && reinterpret_cast<uintptr_t>(out + j) % 64 != 0) out[j] = f(j), ++j;
    for (; j + kLine<T> <= n; j += kLine<T>) {
      alignas(64) T line[kLine<T>];
#pragma omp simd
      for (int64_t k = 0; k < kLine<T>; ++k) line[k] = f(j + k);
      stream_line(out + j, line);
    }
  }
  const int64_t rest = j;
#pragma omp simd
  for (int64_t k = rest; k < n; ++k) out[k] = f(k);
}

// Orders streamed stores before whatever the thread does next.
inline void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace lipgan::cpu::LIPGAN_ISA
