// lipgan._C: the op polar_factor.
#include "lipgan/polar_factor.h"

#include <string>

#include "python/arguments.h"
#include "python/bindings.h"

namespace lipgan::python {
namespace {

// The matrices [..., m, n] of a tensor that the kernels of polar_factor take.
struct Matrices {
  explicit Matrices(const View& view) {
    if (view.dtype() != Dtype::float32 && view.dtype() != Dtype::float64) {
      throw std::invalid_argument("a must be float32 or float64");
    }
    const int ndim = view.ndim();
    m = ndim < 2 ? 0 : view.size(ndim - 2), n = ndim < 2 ? 0 : view.size(ndim - 1);
    if (n < 1 || m < n || n > lipgan::kPolarFactorLimit) {
      throw std::invalid_argument("a must be matrices of 1 to " + std::to_string(lipgan::kPolarFactorLimit) +
                                  " columns, and no fewer rows");
    }
    count = view.numel() / (m * n);
  }
  int64_t m, n, count;
};

py::object polar_factor_fwd(const py::object& a, const py::object& levels, const py::object& schedule, int64_t further,
                            int num_threads) {
  constexpr int64_t kLevel = sizeof(lipgan::PolarLevel) / sizeof(double), kStep = sizeof(lipgan::PolarStep) / sizeof(double);
  const View view(a, "a"), level_view(levels, "levels"), schedule_view(schedule, "schedule");
  const Matrices matrices(view);
  const int64_t num_levels = level_view.numel() / kLevel, num_steps = schedule_view.numel() / kStep;
  if (num_levels < 1 || num_steps < 1) throw std::invalid_argument("levels and schedule must not be empty");
  level_view.expect(Dtype::float64, num_levels * kLevel, "levels");
  schedule_view.expect(Dtype::float64, num_steps * kStep, "schedule");
  const NewTensor u(view.shape(), view.dtype());
  const lipgan::PolarFactorFwd args{view.data(), u.data(), matrices.count, matrices.m, matrices.n,
                                    static_cast<const lipgan::PolarLevel*>(level_view.data()), num_levels,
                                    static_cast<const lipgan::PolarStep*>(schedule_view.data()), num_steps, further};
  bool arrived;
  {
    py::gil_scoped_release release;
    arrived = lipgan::cpu::polar_factor_fwd(view.dtype(), args, num_threads);
  }
  return arrived ? u.object() : py::none();
}

py::object polar_factor_bwd(const py::object& grad, const py::object& u, const py::object& a, int64_t iterations,
                            double tolerance, int num_threads) {
  const View view(a, "a"), grad_view(grad, "grad"), u_view(u, "u");
  const Matrices matrices(view);
  for (const View* other : {&grad_view, &u_view}) {
    other->expect(view.dtype(), view.numel(), other == &u_view ? "u" : "grad");
  }
  const NewTensor to_a(view.shape(), view.dtype());
  const lipgan::PolarFactorBwd args{grad_view.data(), u_view.data(), view.data(), to_a.data(), matrices.count,
                                    matrices.m, matrices.n, iterations, tolerance};
  bool arrived;
  {
    py::gil_scoped_release release;
    arrived = lipgan::cpu::polar_factor_bwd(view.dtype(), args, num_threads);
  }
  return arrived ? to_a.object() : py::none();
}

}  // namespace

void def_polar_factor(py::module_& module) {
  module.def("polar_factor_fwd", &polar_factor_fwd, py::arg("a"), py::arg("levels"), py::arg("schedule"),
             py::arg("further"), py::arg("num_threads"), "u of the op lipgan::polar_factor_fwd, or None.");
  module.def("polar_factor_bwd", &polar_factor_bwd, py::arg("grad"), py::arg("u"), py::arg("a"), py::arg("iterations"),
             py::arg("tolerance"), py::arg("num_threads"), "The result of the op lipgan::polar_factor_bwd, or None.");
}

}  // namespace lipgan::python
