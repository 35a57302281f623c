// What the passes of spectral_norm share: 1 / sigma, and the launch of a pass over the group.
#pragma once

#include <limits>

#include "arena.h"
#include "integers.h"
#include "spectral_norm_schedule.h"
#include "threads.h"

namespace lipgan::cpu::LIPGAN_ISA {
namespace {

constexpr int64_t kChunkBytesPerThread = 512 << 10;  // of weight: half of a common L2 cache
constexpr int64_t kStreamBytes = 8 << 20;       // of weight in a call: beyond it, the arrays of the call fit no common cache
constexpr int64_t kBytesPerThread = 128 << 10;  // of weight that pay for waking a thread

// 1 / sigma; 1 for a zero matrix, which so stays zero, with finite gradients.
template <class A>
A scale_of(A sigma) {
  const A magnitude = sigma < 0 ? -sigma : sigma;
  return magnitude < std::numeric_limits<A>::min() ? A(1) : A(1) / sigma;
}

template <class Op>
void launch(Op& op, int64_t bytes, int num_threads) {
  const int threads = threads_for(bytes, kBytesPerThread, num_threads);
  const int64_t chunk_bytes = kChunkBytesPerThread * threads;
  Arena count(nullptr);
  op.prepare(count, chunk_bytes);
  Arena arena(scratch(count.used()));
  op.prepare(arena, chunk_bytes);
  run_parallel(&Op::run, &op, threads);
}

}  // namespace
}  // namespace lipgan::cpu::LIPGAN_ISA
