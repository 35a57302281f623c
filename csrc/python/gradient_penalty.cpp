// lipgan._C: the op gradient_penalty.
#include "lipgan/gradient_penalty.h"

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "python/arguments.h"
#include "python/bindings.h"

namespace lipgan::python {
namespace {

py::object gradient_penalty_interpolate(const py::object& real, const py::object& fake, const py::object& mix,
                                        int num_threads) {
  View real_view(real, "real", Layout::samples), fake_view(fake, "fake", Layout::samples);
  if (!real_view.same_shape(fake_view)) throw std::invalid_argument("fake must have the shape of real");
  if (!real_view.same_strides(fake_view)) real_view = View(real, "real"), fake_view = View(fake, "fake");
  check_samples(real_view, "real");
  const Dtype dtype = real_view.dtype();
  const int64_t batch = real_view.size(0);
  fake_view.expect(dtype, real_view.numel(), "fake");
  const View mix_view(mix, "mix");
  mix_view.expect(accumulation_dtype(dtype), batch, "mix");
  const NewTensor x_hat(real_view.shape(), dtype, real_view.strides());
  {
    py::gil_scoped_release release;
    lipgan::cpu::gradient_penalty_interpolate(dtype, real_view.data(), fake_view.data(), mix_view.data(), x_hat.data(),
                                              batch, real_view.numel() / batch, num_threads);
  }
  return x_hat.object();
}

py::tuple gradient_penalty_fwd(const py::object& grads, std::string_view kind, double weight, double target,
                               std::string_view norm, int num_threads) {
  const bool per_pixel = norm == "pixel";
  if (!per_pixel && norm != "sample") {
    throw std::invalid_argument("norm must be one of sample, pixel, got '" + std::string(norm) + "'");
  }
  const View view(grads, "grads", per_pixel ? Layout::pixels : Layout::samples);
  check_samples(view, "grads");
  std::vector<int64_t> norms_shape = {view.size(0)};
  int64_t outer = view.size(0), length = view.numel() / outer, inner = 1;
  if (per_pixel) {
    if (view.ndim() < 2) throw std::invalid_argument("grads must have at least 2 dimensions for norm='pixel'");
    for (int dim = 2; dim < view.ndim(); ++dim) norms_shape.push_back(view.size(dim));
    inner = length / view.size(1);
    length = view.size(1);
    if (!view.contiguous()) outer *= inner, inner = 1;  // channels_last: every pixel is a sample of its channels
  }
  const Dtype dtype = view.dtype();
  const NewTensor penalty({}, accumulation_dtype(dtype)), norms(std::move(norms_shape), accumulation_dtype(dtype)),
      cotangent(view.shape(), dtype, view.strides());
  const PenaltyKind penalty_of = penalty_kind(kind);
  {
    py::gil_scoped_release release;
    lipgan::cpu::gradient_penalty_fwd(dtype, penalty_of, view.data(), penalty.data(), norms.data(), cotangent.data(),
                                      outer, length, inner, weight, target, num_threads);
  }
  return py::make_tuple(penalty.object(), norms.object(), cotangent.object());
}

}  // namespace

void def_gradient_penalty(py::module_& module) {
  module.def("gradient_penalty_interpolate", &gradient_penalty_interpolate, py::arg("real"), py::arg("fake"),
             py::arg("mix"), py::arg("num_threads"), "x_hat of the op lipgan::gradient_penalty_interpolate.");
  module.def("gradient_penalty_fwd", &gradient_penalty_fwd, py::arg("grads"), py::arg("kind"), py::arg("weight"),
             py::arg("target"), py::arg("norm"), py::arg("num_threads"),
             "(penalty, norms, cotangent) of the op lipgan::gradient_penalty_fwd.");
}

}  // namespace lipgan::python
