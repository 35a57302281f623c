// The Python module lipgan._cuda: raw device addresses in, nothing allocated on the device. Checking shapes, dtypes,
// devices and lifetimes is the caller's part (lipgan/ops), and so is making the arrays' device current.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "lipgan/gradient_penalty.h"
#include "lipgan/spectral_norm.h"

namespace py = pybind11;

namespace {

// weight, u_in, v_in, y, u, v, h, w, inner, channels
using Rows = std::vector<std::array<int64_t, 10>>;

template <typename T = void>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

// The outer of a layer [outer, h, inner] of w columns, of which v takes `channels` together.
int64_t outer_of(int64_t w, int64_t inner, int64_t channels) {
  const auto divides = [w](int64_t part) { return part == w || (part > 0 && w % part == 0); };
  if (!divides(inner) || !divides(channels)) {
    throw std::invalid_argument("inner and channels must divide w of a layer, got inner=" + std::to_string(inner) +
                                " and channels=" + std::to_string(channels) + " of w=" + std::to_string(w));
  }
  return inner == w ? 1 : w / inner;
}

std::vector<lipgan::SpectralNormFwdLayer> spectral_norm_fwd_layers(const Rows& rows) {
  std::vector<lipgan::SpectralNormFwdLayer> layers;
  layers.reserve(rows.size());
  for (const auto& row : rows) {
    layers.push_back({pointer(row[0]), pointer(row[1]), pointer(row[2]), pointer(row[3]), pointer(row[4]),
                      pointer(row[5]), outer_of(row[7], row[8], row[9]), row[6], row[8], row[9]});
  }
  return layers;
}

// grad_y, y, u, v, grad_weight, h, w, inner, channels
using BackwardRows = std::vector<std::array<int64_t, 9>>;

std::vector<lipgan::SpectralNormBwdLayer> spectral_norm_bwd_layers(const BackwardRows& rows) {
  std::vector<lipgan::SpectralNormBwdLayer> layers;
  layers.reserve(rows.size());
  for (const auto& row : rows) {
    layers.push_back({pointer(row[0]), pointer(row[1]), pointer(row[2]), pointer(row[3]), pointer(row[4]),
                      outer_of(row[6], row[7], row[8]), row[5], row[7], row[8]});
  }
  return layers;
}

void check(cudaError_t error) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // an error that was reported here is not the next call's
    throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error));
  }
}

void spectral_norm_fwd(int dtype, const Rows& rows, int64_t sigma, int64_t n_power_iterations, double eps,
                       int64_t workspace, int64_t device_table, int64_t stream) {
  const auto layers = spectral_norm_fwd_layers(rows);
  check(static_cast<cudaError_t>(lipgan::cuda::spectral_norm_fwd(
      static_cast<lipgan::Dtype>(dtype), layers.data(), static_cast<int64_t>(layers.size()), pointer(sigma),
      n_power_iterations, eps, pointer(workspace), pointer(device_table), pointer(stream))));
}

int64_t spectral_norm_fwd_workspace(const Rows& rows) {
  const auto layers = spectral_norm_fwd_layers(rows);
  return lipgan::cuda::spectral_norm_fwd_workspace(layers.data(), static_cast<int64_t>(layers.size()));
}

void spectral_norm_bwd(int dtype, const BackwardRows& rows, int64_t sigma, int64_t grad_sigma, int64_t workspace,
                       int64_t stream) {
  const auto layers = spectral_norm_bwd_layers(rows);
  check(static_cast<cudaError_t>(lipgan::cuda::spectral_norm_bwd(
      static_cast<lipgan::Dtype>(dtype), layers.data(), static_cast<int64_t>(layers.size()), pointer(sigma),
      pointer(grad_sigma), pointer(workspace), pointer(stream))));
}

int64_t spectral_norm_bwd_workspace(const BackwardRows& rows) {
  const auto layers = spectral_norm_bwd_layers(rows);
  return lipgan::cuda::spectral_norm_bwd_workspace(layers.data(), static_cast<int64_t>(layers.size()));
}

void gradient_penalty_interpolate(int dtype, int64_t real, int64_t fake, int64_t mix, int64_t x_hat, int64_t batch,
                                  int64_t length, int64_t stream) {
  check(static_cast<cudaError_t>(
      lipgan::cuda::gradient_penalty_interpolate(static_cast<lipgan::Dtype>(dtype), pointer(real), pointer(fake),
                                                 pointer(mix), pointer(x_hat), batch, length, pointer(stream))));
}

int64_t gradient_penalty_fwd_workspace(int dtype, int64_t outer, int64_t length, int64_t inner) {
  return lipgan::cuda::gradient_penalty_fwd_workspace(static_cast<lipgan::Dtype>(dtype), outer, length, inner);
}

void gradient_penalty_fwd(int dtype, int kind, int64_t grads, int64_t penalty, int64_t norms, int64_t cotangent,
                          int64_t outer, int64_t length, int64_t inner, double weight, double target,
                          int64_t workspace, int64_t stream) {
  check(static_cast<cudaError_t>(lipgan::cuda::gradient_penalty_fwd(
      static_cast<lipgan::Dtype>(dtype), static_cast<lipgan::PenaltyKind>(kind), pointer(grads), pointer(penalty),
      pointer(norms), pointer(cotangent), outer, length, inner, weight, target, pointer(workspace),
      pointer(stream))));
}

// 0 where there is no driver, or no device.
int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

int runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version));
  return version;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of lipgan, called with raw addresses by lipgan.ops.";
  const auto no_gil = py::call_guard<py::gil_scoped_release>();

  m.def("spectral_norm_fwd", &spectral_norm_fwd, no_gil, py::arg("dtype"), py::arg("layers"), py::arg("sigma"),
        py::arg("n_power_iterations"), py::arg("eps"), py::arg("workspace"), py::arg("device_table"), py::arg("stream"),
        "layers: rows of (weight, u_in, v_in, y, u, v, h, w, inner, channels), the last two as in\n"
        "lipgan.ops.spectral_norm.layout. Asynchronous on `stream`.");
  m.def("spectral_norm_fwd_workspace", &spectral_norm_fwd_workspace, no_gil, py::arg("layers"),
        "Bytes of `workspace` for these layers, whatever their dtype; 16-byte aligned.");
  m.def("spectral_norm_fwd_table_size", &lipgan::cuda::spectral_norm_fwd_table_size, py::arg("num_layers"),
        "Bytes of `device_table` for this many layers; 16-byte aligned.");
  m.def("spectral_norm_bwd", &spectral_norm_bwd, no_gil, py::arg("dtype"), py::arg("layers"), py::arg("sigma"),
        py::arg("grad_sigma"), py::arg("workspace"), py::arg("stream"),
        "layers: rows of (grad_y, y, u, v, grad_weight, h, w, inner, channels), the last two as in\n"
        "lipgan.ops.spectral_norm.layout. grad_sigma: 0 for none. Asynchronous on `stream`.");
  m.def("spectral_norm_bwd_workspace", &spectral_norm_bwd_workspace, no_gil, py::arg("layers"),
        "Bytes of `workspace` for these layers, of which no address counts; 16-byte aligned.");
  m.def("gradient_penalty_interpolate", &gradient_penalty_interpolate, no_gil, py::arg("dtype"), py::arg("real"),
        py::arg("fake"), py::arg("mix"), py::arg("x_hat"), py::arg("batch"), py::arg("length"), py::arg("stream"),
        "Asynchronous on `stream`.");
  m.def("gradient_penalty_fwd_workspace", &gradient_penalty_fwd_workspace, py::arg("dtype"), py::arg("outer"),
        py::arg("length"), py::arg("inner"), "Bytes of `workspace`, 16-byte aligned.");
  m.def("gradient_penalty_fwd", &gradient_penalty_fwd, no_gil, py::arg("dtype"), py::arg("kind"), py::arg("grads"),
        py::arg("penalty"), py::arg("norms"), py::arg("cotangent"), py::arg("outer"), py::arg("length"),
        py::arg("inner"), py::arg("weight"), py::arg("target"), py::arg("workspace"), py::arg("stream"),
        "kind: the number of a lipgan::PenaltyKind. Asynchronous on `stream`.");
  m.def("device_count", &device_count, no_gil, "The number of CUDA devices; 0 without a driver.");
  m.def("runtime_version", &runtime_version, no_gil,
        "The CUDA runtime that this module contains, as 1000 major + 10 minor.");
}
