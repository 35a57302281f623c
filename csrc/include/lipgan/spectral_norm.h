// The op spectral_norm: power iteration, sigma and W / sigma for a group of weights, and its backward.
//
// A weight W is a matrix [h, w] held as a contiguous array [outer, h, inner] with w = outer * inner: outer is 1 for
// Linear and Conv weights (dim 0), and the leading extent for weights normalized along another dimension
// (ConvTranspose: dim 1). Row i's element of column m is at i inner + (m / inner) h inner + m % inner, and v's is v[m];
// the CUDA forms also take weights whose columns lie otherwise than v, channels last: v[(m % channels) (w / channels) +
// m / channels]. One iteration, in the order of torch.nn.utils.parametrizations.spectral_norm:
//
//   t = W v        u = t / max(|t|, eps)
//   s = W^T u      v = s / max(|s|, eps)      sigma = u^T W v = <s, v>
//
// followed by Y = W / sigma. With no iteration, sigma = u^T W v of the u and v given. Y = W where sigma is 0.
// Backward, with u and v constant:  dW = (dY - (<dY, Y> - sigma * dsigma) u v^T) / sigma.
// Its own backward, for G, the gradient of a number by dW, with q = u^T G v and r = 1 / sigma: the gradients of the number
//
//   by dY     r (G - q Y)        by sigma    -r^2 (<G, dY> - <dY, Y> q)
//   by Y      -r q dY            by dsigma   q
#pragma once
#include <cstdint>

#include "lipgan/dtype.h"

namespace lipgan {

// One weight of a group. T is the storage type, A its accumulation type (float for float32, float16 and bfloat16;
// double for float64). The rows of all layers are independent of each other.
struct SpectralNormFwdLayer {
  const void* weight;  // T [outer, h, inner]
  const void* u_in;    // T [h]
  const void* v_in;    // T [w]
  void* y;             // T [outer, h, inner]
  void* u;             // T [h]
  void* v;             // T [w]
  int64_t outer, h, inner;
  int64_t channels = 0;  // for the CUDA form alone: w where v is in the order of the columns
};

struct SpectralNormBwdLayer {
  const void* grad_y;  // T [outer, h, inner]
  const void* y;       // T [outer, h, inner]
  const void* u;       // T [h]
  const void* v;       // T [w]
  void* grad_weight;   // T [outer, h, inner]; on the CPU it may be y, which is then overwritten
  int64_t outer, h, inner;
  int64_t channels = 0;  // as above
};

struct SpectralNormDoubleBwdLayer {
  const void* grad;    // T [outer, h, inner]: G
  const void* grad_y;  // T [outer, h, inner]
  const void* y;       // T [outer, h, inner]
  const void* u;       // T [h]
  const void* v;       // T [w]
  void* to_grad_y;     // T [outer, h, inner]
  void* to_y;          // T [outer, h, inner]
  int64_t outer, h, inner;
};

namespace cpu {

void spectral_norm_fwd(Dtype dtype, const SpectralNormFwdLayer* layers, int64_t num_layers,
                       void* sigma,  // A [num_layers]
                       int64_t n_power_iterations, double eps, int num_threads);

void spectral_norm_bwd(Dtype dtype, const SpectralNormBwdLayer* layers, int64_t num_layers,
                       const void* sigma,       // A [num_layers]
                       const void* grad_sigma,  // A [num_layers], or null for zeros
                       int num_threads);

void spectral_norm_double_bwd(Dtype dtype, const SpectralNormDoubleBwdLayer* layers, int64_t num_layers,
                              const void* sigma,    // A [num_layers]
                              void* to_sigma,       // A [num_layers]
                              void* to_grad_sigma,  // A [num_layers]
                              int num_threads);

}  // namespace cpu

namespace cuda {

// `channels` divides w. `layers` is on the host and may be freed after the call; the arrays that it names, sigma,
// workspace and table are on the current device, the last two aligned to 16 bytes.

// Bytes of workspace and of table that spectral_norm_fwd needs for these shapes (host computations, for every dtype).
int64_t spectral_norm_fwd_workspace(const SpectralNormFwdLayer* layers, int64_t num_layers);
int64_t spectral_norm_fwd_table_size(int64_t num_layers);

// One cooperative launch for the whole group on `stream` (a cudaStream_t), after small launches that fill `table`.
// Returns a cudaError_t as int; the host does not wait for the device.
int spectral_norm_fwd(Dtype dtype, const SpectralNormFwdLayer* layers, int64_t num_layers,
                      void* sigma,  // A [num_layers]
                      int64_t n_power_iterations, double eps, void* workspace, void* table, void* stream);

// Bytes of workspace that spectral_norm_bwd needs for these shapes.
int64_t spectral_norm_bwd_workspace(const SpectralNormBwdLayer* layers, int64_t num_layers);

// One cooperative launch on `stream` for each 48 layers of the group. The other remarks hold as well.
int spectral_norm_bwd(Dtype dtype, const SpectralNormBwdLayer* layers, int64_t num_layers,
                      const void* sigma,       // A [num_layers]
                      const void* grad_sigma,  // A [num_layers], or null for zeros
                      void* workspace, void* stream);

}  // namespace cuda
}  // namespace lipgan
