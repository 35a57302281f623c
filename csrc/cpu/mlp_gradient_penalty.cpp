// mlp_gradient_penalty on the CPU. Formulas: include/lipgan/mlp_gradient_penalty.h.
//
// Four products a layer are the cost: forward, backward, tangent, weight gradient; six where an activation is smooth, with
// the adjoints and their weight gradient. All but the weight gradients are independent either between samples or between
// columns of their results, and the threads share one or the other, whichever moves fewer bytes between them:
//   by samples   a thread takes its samples through all layers, meets every weight, and waits for nobody;
//   by columns   a thread keeps its columns of every weight in its own cache, and waits for the others in every layer.
// W^T is laid out as panels once and serves forward and tangent. The weight gradients are shared out by their entries.
//
// Every sum has one order, so the result does not depend on the number of threads.
#include "lipgan/mlp_gradient_penalty.h"

#include <limits>

#include "memory.h"
#include "mlp_gradient_penalty_signals.h"
#include "mlp_gradient_penalty_weights.h"

namespace lipgan::cpu::LIPGAN_ISA {
namespace {

constexpr int64_t kProductsPerThread = 1 << 20;  // multiplications that pay for waking a thread

template <class T>
void Penalty<T>::run(const Team& team) {
  const Range rows = samples(team);
  prepare_panels(team);
  if (by_samples) team.barrier();
  for (int64_t l = 1; l < num_layers; ++l) {
    forward(l, rows, team);
    meet(team);
  }
  begin_backward(rows, team);
  meet(team);
  for (int64_t l = num_layers - 1; l > 0; --l) {
    backward(l, rows, team);
    meet(team);
  }
  const Range own = Range{0, batch}.part(team.thread, team.num_threads);
  const Range steep = own.common(penalized);
  for (int64_t i = steep.first; i < steep.last; ++i) take_norm(i);
  if (kind == PenaltyKind::max) team.barrier();
  scale_gradients(steep);
  meet(team);
  for (int64_t l = 1; l < num_layers; ++l) {
    tangent(l, rows.common(penalized), team);
    if (l + 1 < num_layers) meet(team);
  }
  if (last_smooth) {
    copy_input(own);
    begin_adjoint(rows, team);
    for (int64_t l = top_adjoint(); l > 1; --l) {
      meet(team);
      adjoint(l, rows, team);
    }
  }
  team.barrier();
  if (score_grads && !last_smooth) {
    add_activations(own);
    team.barrier();
  }
  for (int64_t l = 1; l < num_layers; ++l) weight_gradient(l, team);
  last_weight_gradient(team);
  for (int64_t l = 1; layer(1).grad_bias && l < num_layers; ++l) bias_gradient(l, team);
  if (team.thread == 0) finish();
}

// ---- norms ----

template <class T>
void Penalty<T>::take_norm(int64_t i) {
  const T* g = work[0].signal + i * work[0].row;
  double norm = __builtin_sqrt(sum_of_squares(g, width));
  // The squares of float64 leave the range where the norm does not.
  if (sizeof(T) == sizeof(double) && !(norm > 1e-140 && norm < 1e150)) norm = norm_in_range(g, width, 1, norm);
  exact[i] = norm;
  norms[i - penalized.first] = static_cast<T>(norm);
}

// v = dP/dg, in the place of g.
template <class T>
void Penalty<T>::scale_gradients(Range rows) {
  const int64_t count = penalized.size();
  const double n = static_cast<double>(count), step = 2 * weight / n;
  T largest = norms[0];
  int64_t ties = 0;
  if (kind == PenaltyKind::max) {
    // Equal maxima share the gradient; a NaN is the maximum.
    for (int64_t i = 1; i < count; ++i) largest = greater(largest, norms[i]);
    for (int64_t i = 0; i < count; ++i) ties += is_maximum(norms[i], largest);
  }
  for (int64_t i = rows.first; i < rows.last; ++i) {
    const double norm = exact[i], excess = norm - target;
    const bool zero = norm < static_cast<double>(std::numeric_limits<T>::min());
    T inverse = static_cast<T>(zero ? 0.0 : 1 / norm), slope = 0;
    switch (kind) {
      case PenaltyKind::two_sided: slope = static_cast<T>(step * excess); break;
      case PenaltyKind::one_sided: slope = static_cast<T>(step * (excess < 0 ? 0 : excess)); break;
      case PenaltyKind::squared: inverse = 1, slope = static_cast<T>(weight / n); break;
      case PenaltyKind::max:
        if (is_maximum(norms[i - penalized.first], largest)) {
          slope = static_cast<T>(2 * weight / static_cast<double>(ties) * (static_cast<double>(largest) - target));
        }
    }
    T* g = work[0].signal + i * work[0].row;
    for (int64_t j = 0; j < width; ++j) g[j] = g[j] * inverse * slope;
  }
}

template <class T>
T Penalty<T>::greater(T a, T b) { return a < b || b != b ? b : a; }

template <class T>
bool Penalty<T>::is_maximum(T norm, T largest) { return norm == largest || norm != norm; }

template <class T>
void Penalty<T>::finish() {
  double total = 0;
  T largest = norms[0];
  for (int64_t i = penalized.first; i < penalized.last; ++i) {
    const double norm = exact[i], excess = norm - target;
    largest = greater(largest, norms[i - penalized.first]);
    if (kind == PenaltyKind::squared) {
      total += norm * norm / 2;
    } else if (kind == PenaltyKind::two_sided || !(excess < 0)) {
      total += excess * excess;
    }
  }
  const double top = static_cast<double>(largest) - target;
  *penalty = static_cast<T>(weight * (kind == PenaltyKind::max ? top * top : total / static_cast<double>(penalized.size())));
  if (!layer(num_layers).grad_bias) return;
  double sum = 0;
  for (int64_t i = 0; score_grads && i < batch; ++i) sum += static_cast<double>(score_grads[i]);
  *static_cast<T*>(layer(num_layers).grad_bias) = static_cast<T>(sum);
}

template <class T>
void serve(PenaltyKind kind, const void* x, const MlpLayer* layers, int64_t num_layers, const MlpLoss& loss,
           void* penalty, void* norms, int64_t batch, int64_t width, double weight, double target, int num_threads) {
  Penalty<T> op{kind,  static_cast<const T*>(x), layers, num_layers, static_cast<T*>(penalty), static_cast<T*>(norms),
                batch, width, weight, target, static_cast<const T*>(loss.score_grads), {loss.first, loss.last}};
  int64_t weights = 0, signals = 0;  // in whole vectors, as they are computed
  for (int64_t l = 1; l < num_layers; ++l) {
    if (op.smooth(l)) op.last_smooth = l;
    const int64_t before = ceil_div(op.width_of(l - 1), op.L) * op.L;
    signals += before;
    weights += before * ceil_div(op.width_of(l), op.L) * op.L;
  }
  const int products = op.last_smooth ? 6 : 4;
  const int threads = threads_for(products * batch * weights, kProductsPerThread, num_threads);
  op.by_samples = threads == 1 || 2 * batch * signals > weights;
  Arena count(nullptr);
  op.prepare(count, threads);
  // Not scratch(): the signals of a large batch would stay with the thread for good.
  void* memory = acquire(count.used());
  Arena arena(memory);
  op.prepare(arena, threads);
  run_parallel(&Penalty<T>::run, &op, threads);
  release(memory, count.used());
}

}  // namespace

void mlp_gradient_penalty_fwd(Dtype dtype, PenaltyKind kind, const void* x, const MlpLayer* layers, int64_t num_layers,
                              const MlpLoss& loss, void* penalty, void* norms, int64_t batch, int64_t width,
                              double weight, double target, int num_threads) {
  const auto call = [&](auto fn) {
    fn(kind, x, layers, num_layers, loss, penalty, norms, batch, width, weight, target, num_threads);
  };
  if (dtype == Dtype::float32) return call(serve<float>);
  if (dtype == Dtype::float64) return call(serve<double>);
}

}  // namespace lipgan::cpu::LIPGAN_ISA
