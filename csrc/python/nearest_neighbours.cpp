// lipgan._C: the op nearest_neighbours.
#include "lipgan/nearest_neighbours.h"

#include "python/arguments.h"
#include "python/bindings.h"

namespace lipgan::python {
namespace {

lipgan::cpu::Points points_of(const View& x, const View& y) {
  if (x.dtype() != Dtype::float32 && x.dtype() != Dtype::float64) {
    throw std::invalid_argument("x must be float32 or float64");
  }
  if (x.ndim() != 2 || y.ndim() != 2 || x.size(1) != y.size(1)) {
    throw std::invalid_argument("x and y must have 2 dimensions, and the same number of features");
  }
  y.expect(x.dtype(), y.numel(), "y");
  return {x.data(), y.data(), x.size(0), y.size(0), x.size(1)};
}

py::tuple nearest_neighbours_fwd(const py::object& x, const py::object& y, int64_t k, int num_threads) {
  const bool same = y.is_none();
  const View x_view(x, "x"), y_view(same ? x : y, "y");
  const lipgan::cpu::Points points = points_of(x_view, y_view);
  if (k < 1 || k > points.n - (same ? 1 : 0)) throw std::invalid_argument("k is out of range");
  const NewTensor squared({points.m, k}, Dtype::float64), indices({points.m, k}, Dtype::float64);
  {
    py::gil_scoped_release release;
    lipgan::cpu::nearest_neighbours_fwd(x_view.dtype(), points, same, k, static_cast<double*>(squared.data()),
                                        static_cast<double*>(indices.data()), num_threads);
  }
  return py::make_tuple(squared.object(), indices.object());
}

py::tuple ball_counts(const py::object& x, const py::object& y, const py::object& x_squared_radii,
                      const py::object& y_squared_radii, bool closed, int num_threads) {
  const View x_view(x, "x"), y_view(y, "y");
  const View x_radii(x_squared_radii, "x_squared_radii"), y_radii(y_squared_radii, "y_squared_radii");
  const lipgan::cpu::Points points = points_of(x_view, y_view);
  x_radii.expect(Dtype::float64, points.m, "x_squared_radii");
  y_radii.expect(Dtype::float64, points.n, "y_squared_radii");
  const NewTensor x_counts({2, points.m}, Dtype::float64), y_counts({2, points.n}, Dtype::float64);
  {
    py::gil_scoped_release release;
    lipgan::cpu::ball_counts(x_view.dtype(), points, static_cast<const double*>(x_radii.data()),
                             static_cast<const double*>(y_radii.data()), closed, static_cast<double*>(x_counts.data()),
                             static_cast<double*>(y_counts.data()), num_threads);
  }
  return py::make_tuple(x_counts.object(), y_counts.object());
}

}  // namespace

void def_nearest_neighbours(py::module_& module) {
  module.def("nearest_neighbours_fwd", &nearest_neighbours_fwd, py::arg("x"), py::arg("y"), py::arg("k"),
             py::arg("num_threads"), "(squared, indices) of the op lipgan::nearest_neighbours, both float64.");
  module.def("ball_counts", &ball_counts, py::arg("x"), py::arg("y"), py::arg("x_squared_radii"),
             py::arg("y_squared_radii"), py::arg("closed"), py::arg("num_threads"),
             "(x_counts, y_counts) of the op lipgan::ball_counts, both float64.");
}

}  // namespace lipgan::python
