// Memory for the arrays of a call, taken from one piece. In the namespace of the instruction set: see vector.h.
#pragma once
#include <cstddef>
#include <cstdint>

#ifndef LIPGAN_ISA
#error "compile with -DLIPGAN_ISA=<name>"
#endif

namespace lipgan::cpu::LIPGAN_ISA {

// Hands out pieces of the scratch memory; the first walk, over no memory, only counts.
class Arena {
 public:
  explicit Arena(void* memory) : base_(static_cast<char*>(memory)) {}
  template <class P>
  P* take(int64_t count) {
    char* piece = base_ ? base_ + used_ : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(P) + 63) / 64 * 64;
    return reinterpret_cast<P*>(piece);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace lipgan::cpu::LIPGAN_ISA
