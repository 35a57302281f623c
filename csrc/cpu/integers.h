// Sizes and shares. In the namespace of the instruction set, as std's templates cannot be: see vector.h.
#pragma once
#include <cstdint>

#include "threads.h"

#ifndef LIPGAN_ISA
#error "compile with -DLIPGAN_ISA=<name>"
#endif

namespace lipgan::cpu::LIPGAN_ISA {

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The threads that pay for themselves where each is to do `per_thread` of the `work` (bytes moved, products).
inline int threads_for(int64_t work, int64_t per_thread, int num_threads) {
  return usable_threads(min(num_threads, work / per_thread));
}

}  // namespace lipgan::cpu::LIPGAN_ISA
