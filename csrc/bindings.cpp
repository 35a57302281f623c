// The module lipgan._C: raw addresses in, nothing allocated for the caller, the GIL released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/threads.h"
#include "lipgan/spectral_norm.h"

namespace py = pybind11;

namespace {

// Reads a flat list of Python integers as rows of `columns` numbers each.
class Rows {
 public:
  Rows(const py::list& numbers, size_t columns) : columns_(columns), values_(numbers.size()) {
    if (values_.empty() || values_.size() % columns != 0) {
      throw std::invalid_argument("layers must hold " + std::to_string(columns) + " integers each, got " +
                                  std::to_string(values_.size()) + " in all");
    }
    for (size_t k = 0; k < values_.size(); ++k) {
      values_[k] = PyLong_AsLongLong(numbers[k].ptr());
      if (values_[k] == -1 && PyErr_Occurred()) throw py::error_already_set();
    }
  }
  size_t size() const { return values_.size() / columns_; }
  int64_t number(size_t row, size_t column) const { return values_[row * columns_ + column]; }
  void* address(size_t row, size_t column) const { return reinterpret_cast<void*>(number(row, column)); }

 private:
  size_t columns_;
  std::vector<long long> values_;
};

lipgan::Dtype to_dtype(int dtype) {
  if (dtype < 0 || dtype > 3) throw std::invalid_argument("dtype must be 0 to 3, got " + std::to_string(dtype));
  return static_cast<lipgan::Dtype>(dtype);
}

void check_extents(int64_t outer, int64_t h, int64_t inner) {
  if (outer < 1 || h < 1 || inner < 1) throw std::invalid_argument("outer, h and inner must be positive");
}

void spectral_norm_fwd(int dtype, const py::list& numbers, uintptr_t sigma, int64_t n_power_iterations, double eps,
                       int num_threads) {
  const Rows rows(numbers, 9);
  std::vector<lipgan::SpectralNormFwdLayer> layers(rows.size());
  for (size_t l = 0; l < layers.size(); ++l) {
    layers[l] = {rows.address(l, 0), rows.address(l, 1), rows.address(l, 2), rows.address(l, 3), rows.address(l, 4),
                 rows.address(l, 5), rows.number(l, 6),  rows.number(l, 7),  rows.number(l, 8)};
    check_extents(layers[l].outer, layers[l].h, layers[l].inner);
  }
  const auto type = to_dtype(dtype);
  py::gil_scoped_release release;
  lipgan::cpu::spectral_norm_fwd(type, layers.data(), static_cast<int64_t>(layers.size()),
                                 reinterpret_cast<void*>(sigma), n_power_iterations, eps, num_threads);
}

void spectral_norm_bwd(int dtype, const py::list& numbers, uintptr_t sigma, uintptr_t grad_sigma, int num_threads) {
  const Rows rows(numbers, 8);
  std::vector<lipgan::SpectralNormBwdLayer> layers(rows.size());
  for (size_t l = 0; l < layers.size(); ++l) {
    layers[l] = {rows.address(l, 0), rows.address(l, 1), rows.address(l, 2), rows.address(l, 3),
                 rows.address(l, 4), rows.number(l, 5),  rows.number(l, 6),  rows.number(l, 7)};
    check_extents(layers[l].outer, layers[l].h, layers[l].inner);
  }
  const auto type = to_dtype(dtype);
  py::gil_scoped_release release;
  lipgan::cpu::spectral_norm_bwd(type, layers.data(), static_cast<int64_t>(layers.size()),
                                 reinterpret_cast<const void*>(sigma), reinterpret_cast<const void*>(grad_sigma),
                                 num_threads);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.def("spectral_norm_fwd", &spectral_norm_fwd, py::arg("dtype"), py::arg("layers"), py::arg("sigma"),
             py::arg("n_power_iterations"), py::arg("eps"), py::arg("num_threads"),
             "layers: flat list; per layer the addresses of weight, u_in, v_in, y, u, v, then outer, h, inner.");
  module.def("spectral_norm_bwd", &spectral_norm_bwd, py::arg("dtype"), py::arg("layers"), py::arg("sigma"),
             py::arg("grad_sigma"), py::arg("num_threads"),
             "layers: flat list; per layer the addresses of grad_y, y, u, v, grad_weight, then outer, h, inner.");
  module.def("isa", &lipgan::cpu::isa, "Name of the instruction set in use.");
  module.def("set_isa", &lipgan::cpu::set_isa, py::arg("name"), "Use another of supported_isas().");
  module.def("supported_isas", &lipgan::cpu::supported_isas, "What this build has and this processor runs, best last.");
  module.def("thread_pool", &lipgan::cpu::thread_pool_name, "'openmp' (PyTorch's threads) or 'std::thread'.");
}
