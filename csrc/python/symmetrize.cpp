// lipgan._C: the op symmetrize.
#include "lipgan/symmetrize.h"

#include "python/arguments.h"
#include "python/bindings.h"

namespace lipgan::python {
namespace {

py::tuple symmetrize(const py::object& a, int num_threads) {
  const View view(a, "a");
  if (view.ndim() != 2 || view.size(0) != view.size(1)) throw std::invalid_argument("a must be a square matrix");
  const Dtype dtype = view.dtype();
  const int64_t n = view.size(0);
  double seen[2];
  {
    py::gil_scoped_release release;
    lipgan::cpu::symmetrize_look(dtype, view.data(), n, seen, num_threads);
  }
  if (dtype == Dtype::float64 && seen[1] == 0) return py::make_tuple(seen[0], seen[1], py::none());
  const NewTensor symmetric({n, n}, Dtype::float64);
  {
    py::gil_scoped_release release;
    lipgan::cpu::symmetrize_fwd(dtype, view.data(), n, static_cast<double*>(symmetric.data()), num_threads);
  }
  return py::make_tuple(seen[0], seen[1], symmetric.object());
}

}  // namespace

void def_symmetrize(py::module_& module) {
  module.def("symmetrize", &symmetrize, py::arg("a"), py::arg("num_threads"),
             "(max|a|, max|a - a^T|, symmetric) of the op symmetrize; None for the last where a serves as it is.");
}

}  // namespace lipgan::python
