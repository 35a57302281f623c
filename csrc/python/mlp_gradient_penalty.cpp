// lipgan._C: the op mlp_gradient_penalty.
#include "lipgan/mlp_gradient_penalty.h"

#include <pybind11/stl.h>

#include <string>
#include <string_view>
#include <vector>

#include "python/arguments.h"
#include "python/bindings.h"

namespace lipgan::python {
namespace {

lipgan::MlpActivation activation_of(std::string_view name) {
  using lipgan::MlpActivation;
  if (name.empty()) return MlpActivation::leaky_relu;
  if (name == "tanh") return MlpActivation::tanh;
  if (name == "sigmoid") return MlpActivation::sigmoid;
  if (name == "softplus") return MlpActivation::softplus;
  if (name == "silu") return MlpActivation::silu;
  if (name == "gelu") return MlpActivation::gelu;
  if (name == "gelu-tanh") return MlpActivation::gelu_tanh;
  if (name == "elu") return MlpActivation::elu;
  const std::string got(name);
  throw std::invalid_argument(
      "a curve must be one of tanh, sigmoid, softplus, silu, gelu, gelu-tanh, elu, or empty, got '" + got + "'");
}

py::tuple mlp_gradient_penalty_fwd(const py::object& x, const py::sequence& weights, const py::sequence& biases,
                                   const std::vector<double>& slopes, const py::sequence& scales, std::string_view kind,
                                   double weight, double target, const py::object& score_grads,
                                   const py::sequence& activations, int64_t first, int64_t last,
                                   const std::vector<std::string>& curves, const std::vector<double>& constants,
                                   int num_threads) {
  const size_t count = weights.size();
  check_lengths(count, {biases.size(), slopes.size() + 1, scales.size() + 1});
  bool smooth = false;
  if (constants.size() != 3 * curves.size()) {
    throw std::invalid_argument("constants must hold 3 numbers for each curve, got " + std::to_string(constants.size()));
  }
  if (!curves.empty()) check_lengths(count, {curves.size() + 1});
  for (const std::string& curve : curves) smooth = smooth || !curve.empty();
  const View input(x, "x");
  check_samples(input, "x");
  const Dtype dtype = input.dtype();
  if (dtype != Dtype::float32 && dtype != Dtype::float64) throw std::invalid_argument("x must be float32 or float64");
  if (input.ndim() != 2) throw std::invalid_argument("x must have 2 dimensions");
  const int64_t batch = input.size(0);
  int64_t before = input.size(1);
  std::vector<View> inputs;  // copies of tensors that were not contiguous live until the kernel has run
  std::vector<lipgan::MlpLayer> layers;
  inputs.reserve(4 * count + 1);
  const bool known = activations.size() != 0;
  if (known && activations.size() + 1 != count) throw std::invalid_argument("the lists of a group differ in length");
  layers.reserve(count);
  if (first < 0 || first >= last || last > batch) throw std::invalid_argument("first and last must be of samples");
  const bool by_bias = smooth || !score_grads.is_none();
  py::list grads(count), bias_grads(by_bias ? count : 0);
  const auto optional = [&](const py::object& object, int64_t numel, const char* name) -> const void* {
    return object.is_none() ? nullptr : inputs.emplace_back(object, name).expect(dtype, numel, name).data();
  };
  for (size_t l = 0; l < count; ++l) {
    const bool is_last = l + 1 == count;
    const View& matrix = inputs.emplace_back(weights[l], "weight");
    if (matrix.ndim() != 2) throw std::invalid_argument("a weight must have 2 dimensions");
    const int64_t width = matrix.size(0);
    if (width == 0) throw std::invalid_argument("a weight must not be empty");
    matrix.expect(dtype, width * before, "weight");
    const void* bias = optional(biases[l], width, "bias");
    const void* scale = is_last ? nullptr : optional(scales[l], batch * width, "scale");
    const void* activation = is_last || !known ? nullptr : optional(activations[l], batch * width, "activation");
    const auto phi = is_last || !smooth ? lipgan::MlpActivation::leaky_relu : activation_of(curves[l]);
    if (activation && (scale || (slopes[l] < 0 && phi == lipgan::MlpActivation::leaky_relu))) {
      throw std::invalid_argument("an activation that is known must have no scale, and a slope that is not negative");
    }
    const NewTensor grad(matrix.shape(), dtype);
    grads[l] = grad.object();
    void* grad_bias = nullptr;
    if (by_bias) {
      const NewTensor sums({width}, dtype);
      bias_grads[l] = sums.object();
      grad_bias = sums.data();
    }
    layers.push_back({matrix.data(), bias, scale, activation, grad.data(), grad_bias, is_last ? 1.0 : slopes[l], width, phi});
    for (size_t k = 0; k < 3 && !is_last && smooth; ++k) layers[l].constants[k] = constants[3 * l + k];
    before = width;
  }
  if (before != 1) throw std::invalid_argument("the last weight must have one row");
  const lipgan::MlpLoss loss{optional(score_grads, batch, "score_grads"), first, last};
  const NewTensor penalty({}, dtype), norms({last - first}, dtype);
  const PenaltyKind penalty_of = penalty_kind(kind);
  {
    py::gil_scoped_release release;
    lipgan::cpu::mlp_gradient_penalty_fwd(dtype, penalty_of, input.data(), layers.data(), static_cast<int64_t>(count),
                                          loss, penalty.data(), norms.data(), batch, input.size(1), weight, target,
                                          num_threads);
  }
  return py::make_tuple(penalty.object(), norms.object(), grads, bias_grads);
}

}  // namespace

void def_mlp_gradient_penalty(py::module_& module) {
  module.def("mlp_gradient_penalty_fwd", &mlp_gradient_penalty_fwd, py::arg("x"), py::arg("weights"), py::arg("biases"),
             py::arg("slopes"), py::arg("scales"), py::arg("kind"), py::arg("weight"), py::arg("target"),
             py::arg("score_grads"), py::arg("activations"), py::arg("first"), py::arg("last"), py::arg("curves"),
             py::arg("constants"), py::arg("num_threads"),
             "(penalty, norms, grads, bias_grads) of the op lipgan::mlp_gradient_penalty_fwd.");
}

}  // namespace lipgan::python
