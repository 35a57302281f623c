// The module lipgan._C. It reads and makes PyTorch's tensors through DLPack's exchange table, so it is built without
// PyTorch; the GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bindings_tensor.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/threads.h"
#include "lipgan/matrix_sqrt.h"
#include "lipgan/spectral_norm.h"

namespace {

namespace py = pybind11;
using lipgan::Dtype;
using lipgan::python::element_size;
using lipgan::python::NewTensor;
using lipgan::python::View;

Dtype accumulation_dtype(Dtype dtype) { return dtype == Dtype::float64 ? dtype : Dtype::float32; }

void* advance(void* address, int64_t elements, Dtype dtype) {
  return static_cast<char*>(address) + elements * element_size(dtype);
}

void check_lengths(size_t count, std::initializer_list<size_t> others) {
  if (count == 0) throw std::invalid_argument("a group must have at least one layer");
  for (const size_t other : others) {
    if (other != count) throw std::invalid_argument("the lists of a group differ in length");
  }
}

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
  return extents;
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
  py::list ys(count);
  for (size_t l = 0; l < count; ++l) {
    const View& weight = inputs.emplace_back(weights[l], "weight");
    const Dtype dtype = inputs[0].dtype();
    weight.expect(dtype, weight.numel(), "weight");
    const Extents& e = extents.emplace_back(extents_of(weight, dims[l]));
    const void* u = inputs.emplace_back(us[l], "u").expect(dtype, e.h, "u").data();
    const void* v = inputs.emplace_back(vs[l], "v").expect(dtype, e.w(), "v").data();
    const NewTensor y(weight.shape(), dtype);
    ys[l] = y.object();
    layers.push_back({weight.data(), u, v, y.data(), nullptr, nullptr, e.outer, e.h, e.inner});
    vectors += e.h + e.w();
  }
  const Dtype dtype = inputs[0].dtype();
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

py::list spectral_norm_bwd(const py::sequence& grad_ys, const py::object& grad_sigma, const py::sequence& ys,
                           const py::object& sigma, const py::object& uv, const std::vector<int64_t>& dims,
                           int num_threads) {
  const size_t count = ys.size();
  check_lengths(count, {grad_ys.size(), dims.size()});
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
    const NewTensor grad(y.shape(), dtype);
    grads[l] = grad.object();
    layers.push_back({grad_y, y.data(), nullptr, nullptr, grad.data(), e.outer, e.h, e.inner});
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
  if (!spectrum) square[ndim - 1] = square[ndim - 2] = line[ndim - 2] = 0;
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

PYBIND11_MODULE(_C, module) {
  module.def("use_dlpack", &lipgan::python::use_dlpack, py::arg("tensor"),
             "Take torch.Tensor, and its table __dlpack_c_exchange_api__; before anything else.");
  module.def("spectral_norm_fwd", &spectral_norm_fwd, py::arg("weights"), py::arg("us"), py::arg("vs"),
             py::arg("n_power_iterations"), py::arg("eps"), py::arg("dims"), py::arg("num_threads"),
             "(ys, sigma, uv) of the op lipgan::spectral_norm_fwd.");
  module.def("spectral_norm_bwd", &spectral_norm_bwd, py::arg("grad_ys"), py::arg("grad_sigma"), py::arg("ys"),
             py::arg("sigma"), py::arg("uv"), py::arg("dims"), py::arg("num_threads"),
             "The gradients of the op lipgan::spectral_norm_bwd.");
  module.def("matrix_sqrt_fwd", &matrix_sqrt_fwd, py::arg("a"), py::arg("inverse"), py::arg("eps"),
             py::arg("resolution"), py::arg("spectrum"), py::arg("num_threads"),
             "(root, roots, vectors) of the op lipgan::matrix_sqrt_fwd, and what was seen of a.");
  module.def("empty_cache", &lipgan::cpu::empty_cache, "Free the memory kept for outputs; returns its bytes.");
  module.def("cached_bytes", &lipgan::cpu::cached_bytes, "Bytes kept for outputs and not in use.");
  module.def("poison_outputs", &lipgan::cpu::poison, py::arg("on"), "Fill outputs with NaN first, for tests.");
  module.def("isa", &lipgan::cpu::isa, "Name of the instruction set in use.");
  module.def("set_isa", &lipgan::cpu::set_isa, py::arg("name"), "Use another of supported_isas().");
  module.def("supported_isas", &lipgan::cpu::supported_isas, "What this build has and this processor runs, best last.");
  module.def("thread_pool", &lipgan::cpu::thread_pool_name, "'openmp' (PyTorch's threads) or 'std::thread'.");
}
