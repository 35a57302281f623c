// Elementary functions of vectors: Taylor polynomials after an exact reduction of the argument, no tables, no branches.
//
// Errors are those of rounding, a few units in the last place; tests/ops/test_mlp_gradient_penalty.py has their bounds. NaN
// stays NaN. A result below the smallest normal number is 0.
#pragma once
#include "lanes.h"

namespace lipgan::cpu::LIPGAN_ISA {

template <class T>
inline Vector<T> splat(T value) {
  return value - Vector<T>{};
}

template <class T>
inline Vector<T> magnitude(Vector<T> x) {
  using Bits = typename VectorOf<T>::bits;
  Bits bits;
  __builtin_memcpy(&bits, &x, sizeof x);
  bits &= ~(Bits{} + 1) >> 1;  // all but the sign
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// The sum of coefficients[k] x^k.
template <class T, size_t N>
inline Vector<T> polynomial(Vector<T> x, const T (&coefficients)[N]) {
  Vector<T> sum = splat<T>(coefficients[N - 1]);
#pragma GCC unroll 32
  for (size_t k = N - 1; k > 0; --k) sum = sum * x + coefficients[k - 1];
  return sum;
}

// e^x = power (1 + rest): `power` a power of two, and |rest| < 0.42, of small relative error.
template <class T>
struct Exponential {
  Vector<T> power, rest;
  Vector<T> value() const { return power * rest + power; }
  Vector<T> minus_one() const { return power * rest + (power - T(1)); }
};

// For x <= 0.
//
// x = k ln 2 + r with |r| <= ln 2 / 2 = 0.347; rest = r + r^2 (1/2! + r/3! + ...). The terms that are left out are below
// r^14/14! < 5e-18 of r in float64, r^8/8! < 6e-9 in float32. The first part of ln 2 has so few bits that k times it is
// exact. Adding 1.5 times 2^52 (2^23) rounds to an integer k, and leaves it in the lowest bits.
template <class T>
inline Exponential<T> exponential(Vector<T> x) {
  using V = Vector<T>;
  using Bits = typename VectorOf<T>::bits;
  constexpr bool wide = sizeof(T) == sizeof(double);
  constexpr T kLowest = wide ? T(-708) : T(-87);  // a little above ln 2^-1022, ln 2^-126
  constexpr T kRound = wide ? T(0x1.8p52) : T(0x1.8p23);
  constexpr T kHigh = wide ? T(0x1.62e42feep-1) : T(0x1.63p-1);
  constexpr T kLow = wide ? T(0x1.a39ef35793c76p-33) : T(-0x1.bd0106p-13);
  constexpr int kMantissa = wide ? 52 : 23;
  constexpr uint64_t kOne = wide ? uint64_t{1023} << 52 : uint64_t{127} << 23;
  const V bounded = x < kLowest ? splat<T>(kLowest) : x;
  const V shifted = bounded * T(1.4426950408889634) + kRound;
  const V k = shifted - kRound;
  const V r = (bounded - k * kHigh) - k * kLow;
  V series;
  if constexpr (wide) {
    constexpr T kInverseFactorials[] = {1.0 / 2,         1.0 / 6,          1.0 / 24,          1.0 / 120,
                                        1.0 / 720,       1.0 / 5040,       1.0 / 40320,       1.0 / 362880,
                                        1.0 / 3628800,   1.0 / 39916800,   1.0 / 479001600,   1.0 / 6227020800};
    series = polynomial<T>(r, kInverseFactorials);
  } else {
    constexpr T kInverseFactorials[] = {1.0f / 2, 1.0f / 6, 1.0f / 24, 1.0f / 120, 1.0f / 720, 1.0f / 5040};
    series = polynomial<T>(r, kInverseFactorials);
  }
  Bits bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << kMantissa) + static_cast<decltype(bits[0] + 0u)>(kOne);
  V power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return {x < kLowest ? V{} : power, r + r * r * series};
}

// log(1 + x) for 0 <= x <= 1.
//
// With f = x, or 1 + x = 2 (1 + f) for the larger ones, log(1 + f) = 2 atanh s, s = f / (2 + f), |s| < 0.172, by the series
// s + s^3/3 + s^5/5 + ..., of which terms below s^22/23 < 1e-18 of s (s^12/13 < 6e-11 in float32) are left out.
template <class T>
inline Vector<T> log_of_one_plus(Vector<T> x) {
  using V = Vector<T>;
  const auto large = x > T(0.41421356);
  const V f = large ? (x - T(1)) * T(0.5) : x;
  const V s = f / (f + T(2)), square = s * s;
  V series;
  if constexpr (sizeof(T) == sizeof(double)) {
    constexpr T kOdd[] = {1.0 / 3,  1.0 / 5,  1.0 / 7,  1.0 / 9,  1.0 / 11,
                          1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21};
    series = polynomial<T>(square, kOdd);
  } else {
    constexpr T kOdd[] = {1.0f / 3, 1.0f / 5, 1.0f / 7, 1.0f / 9, 1.0f / 11};
    series = polynomial<T>(square, kOdd);
  }
  const V half = s + s * square * series;
  return (large ? splat<T>(T(0.69314718055994531)) : V{}) + (half + half);
}

// Phi(z) and phi(z): the integral up to z of the density of the standard normal distribution, and that density.
//
// Phi(-z) = e^{-z^2/2} t p(t) for z >= 0, with t = 1 / (1 + z/4.5). Nearly all of the decay is in the first factor; p was
// interpolated at Chebyshev nodes between t = 1 and where the exponential vanishes (z = 38; 13.5 in float32), with a
// relative error of 2e-17 (2e-9). Its argument is t taken to [-1, 1].
template <class T>
struct Normal {
  Vector<T> below, density;
};

template <class T>
inline Normal<T> normal_distribution(Vector<T> z) {
  using V = Vector<T>;
  const V size = magnitude<T>(z);
  const V bell = exponential<T>(z * z * T(-0.5)).value();
  const V t = T(1) / (size * T(1 / 4.5) + T(1));
  V p;
  if constexpr (sizeof(T) == sizeof(double)) {
    constexpr T kTail[] = {
        0.185853930625506086,    0.147800646038525251,    0.0950033788044301054,  0.0483211885552978696,
        0.0184553589615136196,   0.00458197498373080088,  0.000299946718059925885, -0.000255050573419050669,
        -7.85266771458399018e-5, 9.58755856329211489e-6,  8.65484910133667451e-6, -2.56648422402034878e-7,
        -9.43292687184780154e-7, 1.62068114265607425e-8,  1.11441153544383506e-7, -7.00158299439667547e-9,
        -1.37626209583681985e-8, 2.1131698491284744e-9,   1.6154446644091869e-9,  -4.11510226539573914e-10,
        -1.54166944442620193e-10, 4.16474098487542859e-11, 8.60042114964860216e-12};
    p = polynomial<T>(t * T(85.0 / 38) - T(47.0 / 38), kTail);
  } else {
    constexpr T kTail[] = {0.212360592934572829f,    0.153098728011863399f,     0.0854468918318088019f,
                           0.0362555430851146671f,   0.0110024599581367749f,    0.00195796208254388903f,
                           -1.41484591983505381e-5f, -9.96303108111037518e-5f, -1.32818924374150348e-5f,
                           3.93407251751478426e-6f,  9.49049070544732768e-7f};
    p = polynomial<T>(t * T(8.0 / 3) - T(5.0 / 3), kTail);
  }
  const V tail = bell * t * p;
  return {z > T(0) ? T(1) - tail : tail, bell * T(0.39894228040143268)};
}

}  // namespace lipgan::cpu::LIPGAN_ISA
