// What the bindings of several ops check and compute of their arguments.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>

#include "lipgan/gradient_penalty.h"
#include "python/tensor.h"

namespace lipgan::python {

inline Dtype accumulation_dtype(Dtype dtype) { return dtype == Dtype::float64 ? dtype : Dtype::float32; }

inline void* advance(void* address, int64_t elements, Dtype dtype) {
  return static_cast<char*>(address) + elements * element_size(dtype);
}

inline void check_lengths(size_t count, std::initializer_list<size_t> others) {
  if (count == 0) throw std::invalid_argument("a group must have at least one layer");
  for (const size_t other : others) {
    if (other != count) throw std::invalid_argument("the lists of a group differ in length");
  }
}

inline void check_samples(const View& samples, const char* name) {
  if (samples.ndim() < 1 || samples.numel() == 0) {
    throw std::invalid_argument(std::string(name) + " must hold at least one sample");
  }
}

inline PenaltyKind penalty_kind(std::string_view kind) {
  if (kind == "two-sided") return PenaltyKind::two_sided;
  if (kind == "one-sided") return PenaltyKind::one_sided;
  if (kind == "squared") return PenaltyKind::squared;
  if (kind == "max") return PenaltyKind::max;
  const std::string got(kind);
  throw std::invalid_argument("kind must be one of two-sided, one-sided, squared, max, got '" + got + "'");
}

}  // namespace lipgan::python
