"""CUDA sources as tests compile them, for the host executor and for the emulator: with functions that ctypes finds."""

SPECTRAL_NORM = r"""
#include "cuda/spectral_norm.cu"

using lipgan::SpectralNormBwdLayer;
using lipgan::SpectralNormFwdLayer;

extern "C" {
int64_t bwd_workspace_size(const SpectralNormBwdLayer* layers, int64_t num_layers) {
  return lipgan::cuda::spectral_norm_bwd_workspace(layers, num_layers);
}
int spectral_norm_bwd(int dtype, const SpectralNormBwdLayer* layers, int64_t num_layers, const void* sigma,
                      const void* grad_sigma, void* workspace) {
  return lipgan::cuda::spectral_norm_bwd(static_cast<lipgan::Dtype>(dtype), layers, num_layers, sigma, grad_sigma,
                                         workspace, nullptr);
}
int64_t workspace_size(const SpectralNormFwdLayer* layers, int64_t num_layers) {
  return lipgan::cuda::spectral_norm_fwd_workspace(layers, num_layers);
}
int64_t table_size(int64_t num_layers) { return lipgan::cuda::spectral_norm_fwd_table_size(num_layers); }
int spectral_norm_fwd(int dtype, const SpectralNormFwdLayer* layers, int64_t num_layers, void* sigma,
                      int64_t n_power_iterations, double eps, void* workspace, void* table) {
  return lipgan::cuda::spectral_norm_fwd(static_cast<lipgan::Dtype>(dtype), layers, num_layers, sigma,
                                         n_power_iterations, eps, workspace, table, nullptr);
}
}
"""

GRADIENT_PENALTY = r"""
#include "cuda/gradient_penalty.cu"

extern "C" {
int64_t workspace_size(int dtype, int64_t outer, int64_t length, int64_t inner) {
  return lipgan::cuda::gradient_penalty_fwd_workspace(static_cast<lipgan::Dtype>(dtype), outer, length, inner);
}
int gradient_penalty_fwd(int dtype, int kind, const void* grads, void* penalty, void* norms, void* cotangent,
                         int64_t outer, int64_t length, int64_t inner, double weight, double target, void* workspace) {
  return lipgan::cuda::gradient_penalty_fwd(static_cast<lipgan::Dtype>(dtype), static_cast<lipgan::PenaltyKind>(kind),
                                            grads, penalty, norms, cotangent, outer, length, inner, weight, target,
                                            workspace, nullptr);
}
int gradient_penalty_interpolate(int dtype, const void* real, const void* fake, const void* mix, void* x_hat,
                                 int64_t batch, int64_t length) {
  return lipgan::cuda::gradient_penalty_interpolate(static_cast<lipgan::Dtype>(dtype), real, fake, mix, x_hat, batch,
                                                    length, nullptr);
}
}
"""
