// Smooth activations: a = phi(z), phi'(z) and phi''(z) of a vector of z. lipgan/reference/mlp_gradient_penalty.py has the
// formulas as well.
//
// Derivatives are written without differences of nearly equal numbers, 1 - tanh^2 z as 4 e / (1 + e)^2 with e = e^{-2|z|}: they
// keep their relative precision where an activation saturates.
#pragma once
#include "elementary.h"

namespace lipgan::cpu::LIPGAN_ISA {

template <class T>
struct Activated {
  Vector<T> value, slope, bend;
};

// s(x) = 1 / (1 + e^-x), s'(x), and tanh(x / 2) = 2 s(x) - 1.
template <class T>
struct Logistic {
  Vector<T> value, slope, centred;
};

template <class T>
inline Logistic<T> logistic(Vector<T> x) {
  using V = Vector<T>;
  const auto e = exponential<T>(-magnitude<T>(x));
  const V decayed = e.value(), below = e.minus_one();
  const V inverse = T(1) / (decayed + T(1));
  const V centred = below / (below + T(2));
  const auto positive = x > T(0);
  return {(positive ? splat<T>(T(1)) : decayed) * inverse, decayed * inverse * inverse, positive ? -centred : centred};
}

template <class T>
struct Tanh {
  Activated<T> operator()(Vector<T> z) const {
    const auto s = logistic<T>(z + z);
    const Vector<T> slope = s.slope * T(4);
    return {s.centred, slope, T(-2) * s.centred * slope};
  }
};

template <class T>
struct Sigmoid {
  Activated<T> operator()(Vector<T> z) const {
    const auto s = logistic<T>(z);
    return {s.value, s.slope, -s.centred * s.slope};
  }
};

// log(1 + e^{beta z}) / beta, and z itself where beta z > threshold.
template <class T>
struct Softplus {
  T beta, threshold;
  Activated<T> operator()(Vector<T> z) const {
    using V = Vector<T>;
    const V x = z * beta;
    const auto s = logistic<T>(x);
    const V decayed = exponential<T>(-magnitude<T>(x)).value();
    const V value = ((x < T(0) ? V{} : x) + log_of_one_plus<T>(decayed)) / beta;
    const auto linear = x > threshold;
    return {linear ? z : value, linear ? splat<T>(T(1)) : s.value, linear ? V{} : beta * s.slope};
  }
};

// z s(z).
template <class T>
struct Silu {
  Activated<T> operator()(Vector<T> z) const {
    const auto s = logistic<T>(z);
    return {z * s.value, s.value + z * s.slope, s.slope * (T(2) - z * s.centred)};
  }
};

// z within [-far, far]; NaN stays.
template <class T>
inline Vector<T> within(Vector<T> z, T far) {
  return z < -far ? splat<T>(-far) : z > far ? splat<T>(far) : z;
}

// z Phi(z). Beyond |z| = 50 the density is 0, and z^2 need not be.
template <class T>
struct Gelu {
  Activated<T> operator()(Vector<T> z) const {
    const Vector<T> near = within<T>(z, T(50));
    const auto normal = normal_distribution<T>(near);
    return {z * normal.below, normal.below + near * normal.density, normal.density * (T(2) - near * near)};
  }
};

// z s(x), x = sqrt(8 / pi) (z + 0.044715 z^3), since (1 + tanh u) / 2 = s(2 u). Beyond |z| = 30, s' is 0, and x need not be.
template <class T>
struct GeluTanh {
  Activated<T> operator()(Vector<T> z) const {
    using V = Vector<T>;
    constexpr T kFactor = T(1.5957691216057308), kCubic = T(0.044715);
    const V near = within<T>(z, T(30));
    const V square = near * near;
    const auto s = logistic<T>(kFactor * near * (T(1) + kCubic * square));
    const V first = kFactor * (T(1) + T(3) * kCubic * square), second = T(6) * kFactor * kCubic * near;
    const V bend = s.slope * (T(2) * first + near * (second - s.centred * first * first));
    return {z * s.value, s.value + near * s.slope * first, bend};
  }
};

// scale z above 0, alpha scale (e^{input_scale z} - 1) below.
template <class T>
struct Elu {
  T alpha, scale, input_scale;
  Activated<T> operator()(Vector<T> z) const {
    using V = Vector<T>;
    const T factor = alpha * scale;
    const V x = z * input_scale;
    const auto e = exponential<T>(x > T(0) ? V{} : x);
    const V decayed = factor * input_scale * e.value();
    const auto positive = z > T(0);
    return {positive ? scale * z : factor * e.minus_one(), positive ? splat<T>(scale) : decayed,
            positive ? V{} : input_scale * decayed};
  }
};

}  // namespace lipgan::cpu::LIPGAN_ISA
