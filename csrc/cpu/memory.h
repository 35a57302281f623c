// Memory for large outputs, kept for the next output of that size.
//
// A fresh output of some hundred kilobytes costs more in page faults than in arithmetic: the C library gives such
// memory back to the system when it is freed, and takes it anew, page by page, for the next output
// (docs/numerics/spectral_norm.md has figures). A normalized weight and its gradient have the same size in every step, and
// so has the workspace of a kernel that needs much.
#pragma once
#include <cstddef>

namespace lipgan::cpu {

// At least `bytes` bytes, aligned to a cache line, or to a huge page where one fits; contents undefined. Throws
// std::bad_alloc. Less than kWorthwhile bytes come from the C library, which reuses small memory by itself.
void* acquire(size_t bytes);

// Gives memory of acquire(bytes) back. It is kept for reuse while the memory kept is at most kMaxKept, and until
// kSweep large outputs have been asked for without a need of it.
void release(void* memory, size_t bytes);

// Frees all memory that is kept and not in use, and returns its size in bytes.
size_t empty_cache();

// Bytes that are kept and not in use.
size_t cached_bytes();

// From now on, memory of acquire() and scratch() is filled with NaN: a test sees an element that a kernel forgets to
// write, or reads before it has written it.
void poison(bool on);
void* poison_if_asked(void* memory, size_t bytes);

constexpr size_t kWorthwhile = size_t{64} << 10;
constexpr size_t kMaxKept = size_t{1} << 30;
constexpr size_t kSweep = 1024;

}  // namespace lipgan::cpu
