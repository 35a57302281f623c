// What the steps of mlp_gradient_penalty share: the arrays of a call, and which thread takes which part of them.
#pragma once

#include "lipgan/mlp_gradient_penalty.h"

#include "arena.h"
#include "integers.h"
#include "matmul.h"
#include "threads.h"

namespace lipgan::cpu::LIPGAN_ISA {
namespace {

struct Range {
  int64_t first, last;
  int64_t size() const { return last - first; }
  // Part `index` of `parts` nearly equal ones.
  Range part(int64_t index, int64_t parts) const {
    return {first + size() * index / parts, first + size() * (index + 1) / parts};
  }
  Range common(Range other) const {
    const int64_t begin = max(first, other.first);
    return {begin, max(begin, min(last, other.last))};
  }
};

template <class T>
struct Penalty {
  static constexpr int64_t L = kLanes<T>;
  static constexpr int64_t kDepth = kPanelBytes / (kTileVectors * kVectorBytes);  // of a panel in the L1 cache

  PenaltyKind kind;
  const T* x;
  const MlpLayer* layers;
  int64_t num_layers;
  T* penalty;
  T* norms;
  int64_t batch, width;
  double weight, target;
  const T* score_grads;  // w, null without a loss
  Range penalized;       // samples
  bool by_samples = true;
  int64_t last_smooth = 0;  // the last layer with a smooth activation; 0: there is none

  // Of layer l, 0 ... num_layers - 1; the arrays of layer 0 belong to the input. Rows are filled up to whole vectors with
  // numbers that reach no result.
  struct Work {
    int64_t width, vectors, row;  // row: elements between samples, an odd number of cache lines, lest rows share a set
    T* panels;      // W_l^T
    T* bias;        // [vectors], padded
    T* factor;      // m_l
    const T* activation;  // a_l, l > 0; of the input a copy where a layer is smooth
    int64_t activation_row;
    T* signal;      // delta_l, without a loss in the place of a_l; of the input: g, then v
    T* tangent;     // t_l, then t_l + w a_l; of the input: v in the place of g
    T* adjoint;     // p_l where a layer is smooth; of a smooth one before: scale phi''(z_l), that times e_l, and times s_l
  };
  Work* work = nullptr;
  double* exact = nullptr;  // [batch]: the norms
  T* spare = nullptr;       // [threads]: a panel, and columns of a result
  int64_t spare_size = 0;

  void prepare(Arena& arena, int num_threads) {
    work = arena.take<Work>(num_layers);
    exact = arena.take<double>(batch);
    int64_t widest = 1;
    for (int64_t l = 0; l < num_layers; ++l) {
      Work own{};
      own.width = width_of(l);
      own.vectors = ceil_div(own.width, L);
      constexpr int64_t kLineElements = 64 / static_cast<int64_t>(sizeof(T));
      own.row = (ceil_div(own.width, kLineElements) / 2 * 2 + 1) * kLineElements;
      widest = max(widest, own.width);
      own.signal = arena.take<T>(batch * own.row);
      own.tangent = own.signal;
      own.activation = own.signal;
      own.activation_row = own.row;
      if (last_smooth) own.activation = arena.take<T>(batch * own.row);
      if (l > 0) {
        if (last_smooth) {
          own.adjoint = arena.take<T>(batch * own.row);
        } else if (const void* known = layer(l).known) {
          own.activation = static_cast<const T*>(known);
          own.activation_row = own.width;
        } else if (score_grads) {
          own.activation = arena.take<T>(batch * own.row);
        }
        own.panels = arena.take<T>(own.vectors * L * width_of(l - 1));
        own.bias = arena.take<T>(own.vectors * L);
        own.factor = arena.take<T>(batch * own.row);
        own.tangent = arena.take<T>(batch * own.row);
      }
      if (work) work[l] = own;
    }
    spare_size = (kDepth + widest) * kTileVectors * L;
    spare = arena.take<T>(num_threads * spare_size);
  }

  int64_t width_of(int64_t l) const { return l == 0 ? width : layers[l - 1].width; }
  const MlpLayer& layer(int64_t l) const { return layers[l - 1]; }
  bool smooth(int64_t l) const { return l > 0 && layer(l).phi != MlpActivation::leaky_relu; }
  const T* matrix(int64_t l) const { return static_cast<const T*>(layer(l).weight); }

  static void run(void* self, const Team& team) { static_cast<Penalty*>(self)->run(team); }

  // ---- who does what ----

  Range samples(const Team& team) const {
    const Range all{0, batch};
    return by_samples ? all.part(team.thread, team.num_threads) : all;
  }
  // Vectors of columns of layer l.
  Range columns(int64_t l, const Team& team) const {
    const Range all{0, work[l].vectors};
    return by_samples ? all : all.part(team.thread, team.num_threads);
  }
  // Between two layers.
  void meet(const Team& team) const {
    if (!by_samples) team.barrier();
  }
  // f(first vector, vectors) for the panels that a range of vectors is cut into.
  template <class F>
  static void for_panels(Range vectors, F f) {
    const int64_t panels = ceil_div(vectors.size(), kTileVectors);
    for (int64_t p = 0; p < panels; ++p) {
      const Range own = vectors.part(p, panels);
      f(own.first, own.size());
    }
  }

  // The samples that have adjoints p_l, where a layer is smooth.
  Range adjoined() const { return score_grads ? Range{0, batch} : penalized; }
  // The last layer that has them: with a loss every layer has.
  int64_t top_adjoint() const { return score_grads ? num_layers - 1 : last_smooth; }

  // ---- the steps, in their order: mlp_gradient_penalty.cpp ----

  void run(const Team& team);

  // ---- what goes through the layers: mlp_gradient_penalty_signals.h ----

  void prepare_panels(const Team& team);
  void times_transposed(int64_t l, Range rows, const Team& team, const T* a, int64_t a_row, T* c, const T* start,
                        const T* factor);
  void forward(int64_t l, Range rows, const Team& team);
  void activate(int64_t l, Range rows, Range vectors);
  template <class Phi>
  void activate(int64_t l, Range rows, Range vectors, Phi phi);
  void begin_backward(Range rows, const Team& team);
  void backward(int64_t l, Range rows, const Team& team);
  void times(int64_t l, Range rows, const Team& team, const T* from, T* to_rows, const T* factor, bool adds = false);
  void tangent(int64_t l, Range rows, const Team& team);
  void bend(int64_t l, Range rows, const Team& team, T* passing);
  void copy_input(Range rows);
  void begin_adjoint(Range rows, const Team& team);
  void clear(int64_t l, Range rows, const Team& team);
  void adjoint(int64_t l, Range rows, const Team& team);

  // ---- the gradients of the weights: mlp_gradient_penalty_weights.h ----

  void add_activations(Range rows);
  void weight_gradient(int64_t l, const Team& team);
  void bias_gradient(int64_t l, const Team& team);
  void last_weight_gradient(const Team& team);
  template <class F>
  void sum_rows(int64_t l, const Team& team, T* to, F add);
  static void add_rows_of(Range terms, const T* factors, const T* rows, int64_t row, T* sums, int64_t vectors, bool begins);

  // ---- norms: mlp_gradient_penalty.cpp ----

  void take_norm(int64_t i);
  void scale_gradients(Range rows);
  static T greater(T a, T b);
  static bool is_maximum(T norm, T largest);
  void finish();
};

}  // namespace
}  // namespace lipgan::cpu::LIPGAN_ISA
