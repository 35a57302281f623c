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
