// The op gradient_penalty: samples between real and generated ones, and the penalty on the norms of a critic's
// gradients at them, together with the penalty's own gradient.
//
//   x_hat_i = mix_i real_i + (1 - mix_i) fake_i        bit by bit real_i or fake_i where mix_i is 1 or 0
//
// Gradients g are a dense array [outer, length, inner]; a norm n is taken over `length`: N = outer * inner of them.
// One norm a sample is [B, elements, 1]; one norm a pixel is [B, C, pixels], or [B * pixels, C, 1] for channels_last.
//
//   two_sided   P = weight / N sum (n - target)^2             dP/dg = 2 weight / N (n - target) g / n
//   one_sided   P = weight / N sum max(0, n - target)^2       dP/dg = 2 weight / N max(0, n - target) g / n
//   squared     P = weight / N sum n^2 / 2                    dP/dg = weight / N g
//   max         P = weight (max n - target)^2                 dP/dg = 2 weight / ties (max n - target) g / n at maxima
//
// g / n is 0 where n is below the smallest normal number. Norms that are equal as they are returned share a maximum.
#pragma once
#include <cstdint>

#include "lipgan/dtype.h"

namespace lipgan {

enum class PenaltyKind : int { two_sided, one_sided, squared, max };

namespace cpu {

// T is the storage type, A its accumulation type (float for float32, float16 and bfloat16; double for float64).
void gradient_penalty_interpolate(Dtype dtype,
                                  const void* real,  // T [batch, length]
                                  const void* fake,  // T [batch, length]
                                  const void* mix,   // A [batch]
                                  void* x_hat,       // T [batch, length]
                                  int64_t batch, int64_t length, int num_threads);

void gradient_penalty_fwd(Dtype dtype, PenaltyKind kind,
                          const void* grads,  // T [outer, length, inner]
                          void* penalty,      // A []
                          void* norms,        // A [outer, inner]
                          void* cotangent,    // T [outer, length, inner]
                          int64_t outer, int64_t length, int64_t inner, double weight, double target, int num_threads);

}  // namespace cpu

namespace cuda {

// Both launch once on `stream` (a cudaStream_t), synchronize nothing, and return a cudaError_t. A result is the same bits
// on any GPU and at every call.
int gradient_penalty_interpolate(Dtype dtype,
                                 const void* real,  // T [batch, length]
                                 const void* fake,  // T [batch, length]
                                 const void* mix,   // A [batch]
                                 void* x_hat,       // T [batch, length]
                                 int64_t batch, int64_t length, void* stream);

// Bytes of `workspace`.
int64_t gradient_penalty_fwd_workspace(Dtype dtype, int64_t outer, int64_t length, int64_t inner);

int gradient_penalty_fwd(Dtype dtype, PenaltyKind kind,
                         const void* grads,  // T [outer, length, inner]
                         void* penalty,      // A []
                         void* norms,        // A [outer, inner]
                         void* cotangent,    // T [outer, length, inner]
                         int64_t outer, int64_t length, int64_t inner, double weight, double target,
                         void* workspace,  // 16-byte aligned; written before it is read
                         void* stream);

}  // namespace cuda
}  // namespace lipgan
