// lipgan._C: the op matrix_sqrt.
#include "lipgan/matrix_sqrt.h"

#include <string>
#include <vector>

#include "python/arguments.h"
#include "python/bindings.h"

namespace lipgan::python {
namespace {

py::tuple matrix_sqrt_fwd(const py::object& a, bool inverse, double eps, double resolution, bool spectrum,
                          int num_threads) {
  const View view(a, "a");
  const Dtype dtype = view.dtype();
  if (dtype != Dtype::float32 && dtype != Dtype::float64) throw std::invalid_argument("a must be float32 or float64");
  const int ndim = view.ndim();
  const int64_t n = ndim < 2 ? 0 : view.size(ndim - 1);
  if (ndim < 2 || view.size(ndim - 2) != n || n > lipgan::kMatrixSqrtLimit) {
    throw std::invalid_argument("a must be square, of at most " + std::to_string(lipgan::kMatrixSqrtLimit) + " rows");
  }
  const int64_t count = n == 0 ? 0 : view.numel() / (n * n);
  std::vector<int64_t> square = view.shape(), line(square.begin(), square.end() - 1);
  const NewTensor root(square, dtype), seen({4, count}, dtype);
  if (!spectrum) square.back() = square[square.size() - 2] = line.back() = 0;
  const NewTensor roots(line, dtype), vectors(square, dtype);
  const lipgan::MatrixSqrtFwd args{view.data(), root.data(), spectrum ? roots.data() : nullptr,
                                   spectrum ? vectors.data() : nullptr, seen.data(), count, n, inverse, eps, resolution};
  {
    py::gil_scoped_release release;
    lipgan::cpu::matrix_sqrt_fwd(dtype, args, num_threads);
  }
  return py::make_tuple(root.object(), roots.object(), vectors.object(), seen.object());
}

}  // namespace

void def_matrix_sqrt(py::module_& module) {
  module.def("matrix_sqrt_fwd", &matrix_sqrt_fwd, py::arg("a"), py::arg("inverse"), py::arg("eps"),
             py::arg("resolution"), py::arg("spectrum"), py::arg("num_threads"),
             "(root, roots, vectors) of the op lipgan::matrix_sqrt_fwd, and what was seen of a.");
}

}  // namespace lipgan::python
