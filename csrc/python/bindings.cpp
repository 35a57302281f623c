// The module lipgan._C. It reads and makes PyTorch's tensors through DLPack's exchange table, so it is built without
// PyTorch; the GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "python/tensor.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/threads.h"
#include "lipgan/gradient_penalty.h"
#include "lipgan/matrix_sqrt.h"
#include "lipgan/mlp_gradient_penalty.h"
#include "lipgan/nearest_neighbours.h"
#include "lipgan/polar_factor.h"
#include "lipgan/spectral_norm.h"
#include "lipgan/symmetrize.h"

namespace {

namespace py = pybind11;
using lipgan::Dtype;
using lipgan::PenaltyKind;
using lipgan::python::element_size;
using lipgan::python::Layout;
using lipgan::python::NewTensor;
using lipgan::python::Outputs;
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

void check_samples(const View& samples, const char* name) {
  if (samples.ndim() < 1 || samples.numel() == 0) {
    throw std::invalid_argument(std::string(name) + " must hold at least one sample");
  }
}

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

PenaltyKind penalty_kind(std::string_view kind) {
  if (kind == "two-sided") return PenaltyKind::two_sided;
  if (kind == "one-sided") return PenaltyKind::one_sided;
  if (kind == "squared") return PenaltyKind::squared;
  if (kind == "max") return PenaltyKind::max;
  const std::string got(kind);
  throw std::invalid_argument("kind must be one of two-sided, one-sided, squared, max, got '" + got + "'");
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

PYBIND11_MODULE(_C, module) {
  module.def("use_dlpack", &lipgan::python::use_dlpack, py::arg("tensor"),
             "Take torch.Tensor, and its table __dlpack_c_exchange_api__; before anything else.");
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
  module.def("matrix_sqrt_fwd", &matrix_sqrt_fwd, py::arg("a"), py::arg("inverse"), py::arg("eps"),
             py::arg("resolution"), py::arg("spectrum"), py::arg("num_threads"),
             "(root, roots, vectors) of the op lipgan::matrix_sqrt_fwd, and what was seen of a.");
  module.def("polar_factor_fwd", &polar_factor_fwd, py::arg("a"), py::arg("levels"), py::arg("schedule"),
             py::arg("further"), py::arg("num_threads"), "u of the op lipgan::polar_factor_fwd, or None.");
  module.def("polar_factor_bwd", &polar_factor_bwd, py::arg("grad"), py::arg("u"), py::arg("a"), py::arg("iterations"),
             py::arg("tolerance"), py::arg("num_threads"), "The result of the op lipgan::polar_factor_bwd, or None.");
  module.def("symmetrize", &symmetrize, py::arg("a"), py::arg("num_threads"),
             "(max|a|, max|a - a^T|, symmetric) of the op symmetrize; None for the last where a serves as it is.");
  module.def("nearest_neighbours_fwd", &nearest_neighbours_fwd, py::arg("x"), py::arg("y"), py::arg("k"),
             py::arg("num_threads"), "(squared, indices) of the op lipgan::nearest_neighbours, both float64.");
  module.def("ball_counts", &ball_counts, py::arg("x"), py::arg("y"), py::arg("x_squared_radii"),
             py::arg("y_squared_radii"), py::arg("closed"), py::arg("num_threads"),
             "(x_counts, y_counts) of the op lipgan::ball_counts, both float64.");
  module.def("gradient_penalty_interpolate", &gradient_penalty_interpolate, py::arg("real"), py::arg("fake"),
             py::arg("mix"), py::arg("num_threads"), "x_hat of the op lipgan::gradient_penalty_interpolate.");
  module.def("gradient_penalty_fwd", &gradient_penalty_fwd, py::arg("grads"), py::arg("kind"), py::arg("weight"),
             py::arg("target"), py::arg("norm"), py::arg("num_threads"),
             "(penalty, norms, cotangent) of the op lipgan::gradient_penalty_fwd.");
  module.def("mlp_gradient_penalty_fwd", &mlp_gradient_penalty_fwd, py::arg("x"), py::arg("weights"), py::arg("biases"),
             py::arg("slopes"), py::arg("scales"), py::arg("kind"), py::arg("weight"), py::arg("target"),
             py::arg("score_grads"), py::arg("activations"), py::arg("first"), py::arg("last"), py::arg("curves"),
             py::arg("constants"), py::arg("num_threads"),
             "(penalty, norms, grads, bias_grads) of the op lipgan::mlp_gradient_penalty_fwd.");
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
