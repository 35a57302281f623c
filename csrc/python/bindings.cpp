// The module lipgan._C: each op has a file of its own beside this one. It reads and makes PyTorch's tensors through DLPack's
// exchange table, so it is built without PyTorch; the GIL is released while a kernel runs.
#include "python/bindings.h"

#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/threads.h"
#include "python/tensor.h"

PYBIND11_MODULE(_C, module) {
  namespace py = pybind11;
  using lipgan::Dtype;
  using lipgan::python::NewTensor;
  module.def("use_dlpack", &lipgan::python::use_dlpack, py::arg("tensor"),
             "Take torch.Tensor, and its table __dlpack_c_exchange_api__; before anything else.");
  lipgan::python::def_spectral_norm(module);
  lipgan::python::def_matrix_sqrt(module);
  lipgan::python::def_polar_factor(module);
  lipgan::python::def_symmetrize(module);
  lipgan::python::def_nearest_neighbours(module);
  lipgan::python::def_gradient_penalty(module);
  lipgan::python::def_mlp_gradient_penalty(module);
  module.def("empty_cache", &lipgan::cpu::empty_cache, "Free the memory kept for outputs; returns its bytes.");
  module.def("cached_bytes", &lipgan::cpu::cached_bytes, "Bytes kept for outputs and not in use.");
  module.def("poison_outputs", &lipgan::cpu::poison, py::arg("on"), "Fill outputs with NaN first, for tests.");
  module.def(
      "empty", [](int64_t numel) { return NewTensor({numel}, Dtype::float32).object(); }, py::arg("numel"),
      "A new float32 tensor as the kernels get it, for tests.");
  module.def(
      "empty_matrix",
      [](int64_t rows, int64_t columns) { return NewTensor({rows, columns}, Dtype::float64).object(); }, py::arg("rows"),
      py::arg("columns"), "A new float64 matrix in the memory that is kept for outputs.");
  module.def("isa", &lipgan::cpu::isa, "Name of the instruction set in use.");
  module.def("set_isa", &lipgan::cpu::set_isa, py::arg("name"), "Use another of supported_isas().");
  module.def("supported_isas", &lipgan::cpu::supported_isas, "What this build has and this processor runs, best last.");
  module.def("insist_on_threads", &lipgan::cpu::insist_on_threads, py::arg("on"),
             "Use threads whether they pay or not, for tests.");
  module.def("thread_pool", &lipgan::cpu::thread_pool_name, "'openmp' (PyTorch's threads) or 'std::thread'.");
}
