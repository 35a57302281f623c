// Sizes and shares. In the namespace of the instruction set, as std's templates cannot be: see vector.h.
#pragma once
#include <cstdint>

#ifndef LIPGAN_ISA
#error "compile with -DLIPGAN_ISA=<name>"
#endif

namespace lipgan::cpu::LIPGAN_ISA {

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The threads that pay for themselves where each is to move `bytes_per_thread`.
inline int threads_for(int64_t bytes, int64_t bytes_per_thread, int num_threads) {
  return static_cast<int>(max(1, min(num_threads, bytes / bytes_per_thread)));
}

}  // namespace lipgan::cpu::LIPGAN_ISA
