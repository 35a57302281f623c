// lipgan._C: the op spectral_norm.
#include "lipgan/spectral_norm.h"

#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "python/arguments.h"
#include "python/bindings.h"

namespace lipgan::python {
namespace {

struct Extents {
  int64_t outer = 1, h = 1, inner = 1;
  int64_t w() const { return outer * inner; }
};

Extents extents_of(const View& weight, int64_t dim) {
  if (weight.numel() == 0) throw std::invalid_argument("a weight must not be empty");
  if (dim < 0 || dim >= weight.ndim()) throw std::invalid_argument("dim is out of range");
  Extents extents;
  for (int d = 0; d < weight.ndim(); ++d) {
    (d < dim ? extents.outer : d == dim ? extents.h : extents.inner) *= weight.size(d);
  }
  // One row is one piece of memory.
  return extents.h == 1 ? Extents{1, 1, extents.w()} : extents;
}

py::tuple spectral_norm_fwd(const py::sequence& weights, const py::sequence& us, const py::sequence& vs,
                            int64_t n_power_iterations, double eps, const std::vector<int64_t>& dims,
                            int num_threads) {
  const size_t count = weights.size();
  check_lengths(count, {us.size(), vs.size(), dims.size()});
  std::vector<View> inputs;  // copies of tensors that were not contiguous live until the kernel has run
  std::vector<Extents> extents;
  std::vector<lipgan::SpectralNormFwdLayer> layers;
  inputs.reserve(3 * count);
  int64_t vectors = 0;
  size_t bytes = 0;
  for (size_t l = 0; l < count; ++l) {
    const View& weight = inputs.emplace_back(weights[l], "weight");
    const Dtype dtype = inputs[0].dtype();
    weight.expect(dtype, weight.numel(), "weight");
    const Extents& e = extents.emplace_back(extents_of(weight, dims[l]));
    const void* u = inputs.emplace_back(us[l], "u").expect(dtype, e.h, "u").data();
    const void* v = inputs.emplace_back(vs[l], "v").expect(dtype, e.w(), "v").data();
    layers.push_back({weight.data(), u, v, nullptr, nullptr, nullptr, e.outer, e.h, e.inner});
    vectors += e.h + e.w();
    bytes += Outputs::room_for(weight.bytes());
  }
  const Dtype dtype = inputs[0].dtype();
  const Outputs outputs(bytes);
  py::list ys(count);
  for (size_t l = 0; l < count; ++l) {
    const NewTensor y(inputs[3 * l].shape(), dtype, {}, &outputs);
    ys[l] = y.object();
    layers[l].y = y.data();
  }
  const NewTensor sigma({static_cast<int64_t>(count)}, accumulation_dtype(dtype)), uv({vectors}, dtype);
  void* position = uv.data();
  for (size_t l = 0; l < count; ++l) {
    layers[l].u = position;
    layers[l].v = advance(position, extents[l].h, dtype);
    position = advance(layers[l].v, extents[l].w(), dtype);
  }
  {
    py::gil_scoped_release release;
    lipgan::cpu::spectral_norm_fwd(dtype, layers.data(), static_cast<int64_t>(count), sigma.data(), n_power_iterations,
                                   eps, num_threads);
  }
  return py::make_tuple(ys, sigma.object(), uv.object());
}

// u and v of a group, one after the other, into the buffers of its layers; nothing where a buffer has gaps or
// another dtype.
bool spectral_norm_move(const py::object& uv, const py::sequence& vectors) {
  const View source(uv, "uv");
  std::vector<View> targets;
  targets.reserve(vectors.size());
  int64_t numbers = 0;
  for (const py::handle vector : vectors) {
    const View& target = targets.emplace_back(vector, "vector");
    if (!target.object().is(vector) || target.dtype() != source.dtype()) return false;
    if (target.overlaps(source)) throw std::invalid_argument("a vector shares memory with uv");
    numbers += target.numel();
  }
  source.expect(source.dtype(), numbers, "uv");
  const void* position = source.data();
  for (const View& target : targets) {
    std::memcpy(target.data(), position, target.bytes());
    position = advance(const_cast<void*>(position), target.numel(), source.dtype());
  }
  return true;
}

// Refuses a spent y whose memory another tensor of the call has: it would be written before that is read.
void check_spent(const std::vector<View>& layers,  // y, grad_y, y, grad_y, ...
                 const std::vector<bool>& spent, std::initializer_list<std::pair<const char*, const View*>> others) {
  for (size_t l = 0; l < spent.size(); ++l) {
    if (!spent[l]) continue;
    const View& y = layers[2 * l];
    const auto refuse = [l](const std::string& name) {
      throw std::invalid_argument("y " + std::to_string(l) + " is spent, but shares memory with " + name);
    };
    for (size_t i = 0; i < layers.size(); ++i) {
      if (i != 2 * l && y.overlaps(layers[i])) refuse((i % 2 ? "grad_y " : "y ") + std::to_string(i / 2));
    }
    for (const auto& [name, other] : others) {
      if (other && y.overlaps(*other)) refuse(name);
    }
  }
}

py::list spectral_norm_bwd(const py::sequence& grad_ys, const py::object& grad_sigma, const py::sequence& ys,
                           const py::object& sigma, const py::object& uv, const std::vector<int64_t>& dims,
                           const std::vector<bool>& spent, int num_threads) {
  const size_t count = ys.size();
  check_lengths(count, {grad_ys.size(), dims.size(), spent.size()});
  std::vector<View> inputs;
  std::vector<Extents> extents;
  std::vector<lipgan::SpectralNormBwdLayer> layers;
  inputs.reserve(2 * count);
  int64_t vectors = 0;
  py::list grads(count);
  for (size_t l = 0; l < count; ++l) {
    const View& y = inputs.emplace_back(ys[l], "y");
    const Dtype dtype = inputs[0].dtype();
    y.expect(dtype, y.numel(), "y");
    const Extents& e = extents.emplace_back(extents_of(y, dims[l]));
    const void* grad_y = inputs.emplace_back(grad_ys[l], "grad_y").expect(dtype, y.numel(), "grad_y").data();
    void* grad = nullptr;
    if (spent[l]) {
      grads[l] = y.object().attr("detach")();
      grad = y.data();
    } else {
      const NewTensor fresh(y.shape(), dtype);
      grads[l] = fresh.object();
      grad = fresh.data();
    }
    layers.push_back({grad_y, y.data(), nullptr, nullptr, grad, e.outer, e.h, e.inner});
    vectors += e.h + e.w();
  }
  const Dtype dtype = inputs[0].dtype(), wide = accumulation_dtype(dtype);
  const View vectors_view(uv, "uv"), sigma_view(sigma, "sigma");
  void* position = vectors_view.expect(dtype, vectors, "uv").data();
  const void* sigmas = sigma_view.expect(wide, static_cast<int64_t>(count), "sigma").data();
  const void* grad_sigmas = nullptr;
  std::vector<View> grad_sigma_view;
  if (!grad_sigma.is_none()) {
    grad_sigmas = grad_sigma_view.emplace_back(grad_sigma, "grad_sigma")
                      .expect(wide, static_cast<int64_t>(count), "grad_sigma")
                      .data();
  }
  check_spent(inputs, spent, {{"uv", &vectors_view}, {"sigma", &sigma_view},
                              {"grad_sigma", grad_sigma_view.empty() ? nullptr : grad_sigma_view.data()}});
  for (size_t l = 0; l < count; ++l) {
    layers[l].u = position;
    layers[l].v = advance(position, extents[l].h, dtype);
    position = advance(const_cast<void*>(layers[l].v), extents[l].w(), dtype);
  }
  {
    py::gil_scoped_release release;
    lipgan::cpu::spectral_norm_bwd(dtype, layers.data(), static_cast<int64_t>(count), sigmas, grad_sigmas, num_threads);
  }
  return grads;
}

py::tuple spectral_norm_double_bwd(const py::sequence& grads, const py::sequence& grad_ys, const py::sequence& ys,
                                   const py::object& sigma, const py::object& uv, const std::vector<int64_t>& dims,
                                   int num_threads) {
  const size_t count = ys.size();
  check_lengths(count, {grads.size(), grad_ys.size(), dims.size()});
  std::vector<View> inputs;
  std::vector<Extents> extents;
  std::vector<lipgan::SpectralNormDoubleBwdLayer> layers;
  inputs.reserve(3 * count);
  int64_t vectors = 0;
  py::list to_grad_ys(count), to_ys(count);
  for (size_t l = 0; l < count; ++l) {
    const View& y = inputs.emplace_back(ys[l], "y");
    const Dtype dtype = inputs[0].dtype();
    y.expect(dtype, y.numel(), "y");
    const Extents& e = extents.emplace_back(extents_of(y, dims[l]));
    const void* grad = inputs.emplace_back(grads[l], "grad").expect(dtype, y.numel(), "grad").data();
    const void* grad_y = inputs.emplace_back(grad_ys[l], "grad_y").expect(dtype, y.numel(), "grad_y").data();
    const NewTensor to_grad_y(y.shape(), dtype), to_y(y.shape(), dtype);
    to_grad_ys[l] = to_grad_y.object();
    to_ys[l] = to_y.object();
    layers.push_back({grad, grad_y, y.data(), nullptr, nullptr, to_grad_y.data(), to_y.data(), e.outer, e.h, e.inner});
    vectors += e.h + e.w();
  }
  const Dtype dtype = inputs[0].dtype(), wide = accumulation_dtype(dtype);
  const View vectors_view(uv, "uv"), sigma_view(sigma, "sigma");
  void* position = vectors_view.expect(dtype, vectors, "uv").data();
  const int64_t size = static_cast<int64_t>(count);
  const void* sigmas = sigma_view.expect(wide, size, "sigma").data();
  const NewTensor to_sigma({size}, wide), to_grad_sigma({size}, wide);
  for (size_t l = 0; l < count; ++l) {
    layers[l].u = position;
    layers[l].v = advance(position, extents[l].h, dtype);
    position = advance(const_cast<void*>(layers[l].v), extents[l].w(), dtype);
  }
  {
    py::gil_scoped_release release;
    lipgan::cpu::spectral_norm_double_bwd(dtype, layers.data(), size, sigmas, to_sigma.data(), to_grad_sigma.data(),
                                          num_threads);
  }
  return py::make_tuple(to_grad_ys, to_ys, to_sigma.object(), to_grad_sigma.object());
}

}  // namespace

void def_spectral_norm(py::module_& module) {
  module.def("spectral_norm_fwd", &spectral_norm_fwd, py::arg("weights"), py::arg("us"), py::arg("vs"),
             py::arg("n_power_iterations"), py::arg("eps"), py::arg("dims"), py::arg("num_threads"),
             "(ys, sigma, uv) of the op lipgan::spectral_norm_fwd.");
  module.def("spectral_norm_move", &spectral_norm_move, py::arg("uv"), py::arg("vectors"),
             "uv into the vectors u, v, u, v, ... of a group; False, and nothing done, where one has gaps or another dtype.");
  module.def("spectral_norm_bwd", &spectral_norm_bwd, py::arg("grad_ys"), py::arg("grad_sigma"), py::arg("ys"),
             py::arg("sigma"), py::arg("uv"), py::arg("dims"), py::arg("spent"),
             py::arg("num_threads"),
             "The gradients of the op lipgan::spectral_norm_bwd, for a spent y in its memory.");
  module.def("spectral_norm_double_bwd", &spectral_norm_double_bwd, py::arg("grads"), py::arg("grad_ys"), py::arg("ys"),
             py::arg("sigma"), py::arg("uv"), py::arg("dims"), py::arg("num_threads"),
             "The gradients of those: by dY and Y, of each weight, by sigma and by dsigma.");
}

}  // namespace lipgan::python
