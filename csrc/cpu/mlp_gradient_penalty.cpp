// mlp_gradient_penalty on the CPU. Formulas: include/lipgan/mlp_gradient_penalty.h.
//
// Four products a layer are the cost: forward, backward, tangent, weight gradient; six where an activation is smooth, with
// the adjoints and their weight gradient. All but the weight gradients are independent either between samples or between columns of their results, and the threads share one or the other, whichever moves
// fewer bytes between them:
//   by samples   a thread takes its samples through all layers, meets every weight, and waits for nobody;
//   by columns   a thread keeps its columns of every weight in its own cache, and waits for the others in every layer.
// W^T is laid out as panels once and serves forward and tangent. The weight gradients are shared out by their entries.
//
// Every sum has one order, so the result does not depend on the number of threads.
#include "lipgan/mlp_gradient_penalty.h"

#include <limits>

#include "activations.h"
#include "arena.h"
#include "integers.h"
#include "matmul.h"
#include "memory.h"
#include "threads.h"

namespace lipgan::cpu::LIPGAN_ISA {
namespace {

constexpr int64_t kProductsPerThread = 1 << 20;  // multiplications that pay for waking a thread

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

  // ---- the steps ----

  void run(const Team& team) {
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

  // W^T, and the biases. A panel of vectors [a, b) begins at a * depth vectors.
  void prepare_panels(const Team& team) {
    for (int64_t l = 1; l < num_layers; ++l) {
      Work& own = work[l];
      const int64_t depth = work[l - 1].width;
      // By columns a thread lays out what it will use; by samples all of it is shared out.
      const int64_t blocks = ceil_div(depth, L), parts = by_samples ? team.num_threads : 1;
      const Range mine = Range{0, blocks}.part(by_samples ? team.thread : 0, parts);
      const int64_t begin = mine.first * L, end = min(depth, mine.last * L);
      for_panels(columns(l, team), [&](int64_t first, int64_t vectors) {
        for (int64_t v = first; v < first + vectors; ++v) {
          pack_transposed(matrix(l) + v * L * depth + begin, depth, own.width - v * L, end - begin,
                          own.panels + first * L * depth + begin * vectors * L + (v - first) * L, vectors * L);
        }
      });
      const T* bias = static_cast<const T*>(layer(l).bias);
      const Range part = Range{0, own.vectors}.part(team.thread, team.num_threads);
      for (int64_t j = part.first * L; j < part.last * L; ++j) own.bias[j] = bias && j < own.width ? bias[j] : T(0);
    }
  }

  // c = (start + a W_l^T) * factor, in the panels.
  void times_transposed(int64_t l, Range rows, const Team& team, const T* a, int64_t a_row, T* c, const T* start,
                        const T* factor) {
    const Work& own = work[l];
    const int64_t depth = work[l - 1].width, chunks = ceil_div(depth, kDepth);
    for_panels(columns(l, team), [&](int64_t first, int64_t vectors) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const Range part = Range{0, depth}.part(chunk, chunks);
        T* to = c + rows.first * own.row + first * L;
        const bool begins = chunk == 0, ends = chunk + 1 == chunks;
        multiply<T>({a + rows.first * a_row + part.first, a_row, 1,
                     own.panels + (first * depth + part.first * vectors) * L, vectors * L, to, own.row,
                     !begins ? to : start ? start + first * L : nullptr, begins ? 0 : own.row,
                     ends && factor ? factor + rows.first * own.row + first * L : nullptr, own.row, part.size()},
                    rows.size(), vectors);
      }
    });
  }

  void forward(int64_t l, Range rows, const Team& team) {
    const Work &own = work[l], &before = work[l - 1];
    const bool first = l == 1;
    const Range vectors = columns(l, team);
    const int64_t begin = vectors.first * L, end = min(vectors.last * L, own.width);
    const T slope = static_cast<T>(layer(l).slope);
    T* activations = const_cast<T*>(own.activation);  // which are memory of this call, but for those that are known
    if (const T* known = static_cast<const T*>(layer(l).known)) {
      for (int64_t i = rows.first; last_smooth && i < rows.last; ++i) {
        for (int64_t j = begin; j < end; ++j) activations[i * own.row + j] = known[i * own.width + j];
      }
      if (smooth(l)) return activate(l, rows, vectors);
      for (int64_t i = rows.first; i < rows.last; ++i) {
        const T* activation = known + i * own.width;
        T* factor = own.factor + i * own.row;
#pragma omp simd
        for (int64_t j = begin; j < end; ++j) {
          const T a = activation[j];  // of the sign of z, for the slope is not negative
          factor[j] = a > 0 ? T(1) : a <= 0 ? slope : a;
        }
      }
      return;
    }
    times_transposed(l, rows, team, first ? x : before.activation, first ? width : before.activation_row, activations,
                     own.bias, nullptr);
    if (smooth(l)) return activate(l, rows, vectors);
    const T* scales = static_cast<const T*>(layer(l).scale);
    for (int64_t i = rows.first; i < rows.last; ++i) {
      T *activation = activations + i * own.row, *factor = own.factor + i * own.row;
      const auto activate_one = [=](int64_t j, T scale) {
        const T z = activation[j];
        const T m = (z > 0 ? scale : z <= 0 ? scale * slope : z);
        factor[j] = m;
        activation[j] = m * z;
      };
      if (scales) {
        const T* scale = scales + i * own.width;
#pragma omp simd
        for (int64_t j = begin; j < end; ++j) activate_one(j, scale[j]);
      } else {
#pragma omp simd
        for (int64_t j = begin; j < end; ++j) activate_one(j, T(1));
      }
    }
  }

  // a smooth layer's z, which is in the place of a, to a, m and scale phi''(z).
  void activate(int64_t l, Range rows, Range vectors) {
    const auto [c0, c1, c2] = layer(l).constants;
    const T a = static_cast<T>(c0), b = static_cast<T>(c1), c = static_cast<T>(c2);
    switch (layer(l).phi) {
      case MlpActivation::leaky_relu: return;
      case MlpActivation::tanh: return activate(l, rows, vectors, Tanh<T>{});
      case MlpActivation::sigmoid: return activate(l, rows, vectors, Sigmoid<T>{});
      case MlpActivation::softplus: return activate(l, rows, vectors, Softplus<T>{a, b});
      case MlpActivation::silu: return activate(l, rows, vectors, Silu<T>{});
      case MlpActivation::gelu: return activate(l, rows, vectors, Gelu<T>{});
      case MlpActivation::gelu_tanh: return activate(l, rows, vectors, GeluTanh<T>{});
      case MlpActivation::elu: return activate(l, rows, vectors, Elu<T>{a, b, c});
    }
  }

  template <class Phi>
  void activate(int64_t l, Range rows, Range vectors, Phi phi) {
    const Work& own = work[l];
    T* activations = const_cast<T*>(own.activation);
    const T* scales = static_cast<const T*>(layer(l).scale);
    for (int64_t i = rows.first; i < rows.last; ++i) {
      for (int64_t j = vectors.first * L; j < vectors.last * L; j += L) {
        const int64_t place = i * own.row + j;
        Activated<T> at = phi(load(activations + place));
        if (scales) {
          const Vector<T> scale = load_first(scales + i * own.width + j, min(L, own.width - j));
          at.value *= scale, at.slope *= scale, at.bend *= scale;
        }
        store(activations + place, at.value);
        store(own.factor + place, at.slope);
        store(own.adjoint + place, at.bend);
      }
    }
  }

  // delta of the last hidden layer, or g of a linear critic.
  void begin_backward(Range rows, const Team& team) {
    const int64_t l = num_layers - 1;
    const Work& own = work[l];
    const T* last = matrix(num_layers);
    const Range vectors = columns(l, team);
    const int64_t begin = vectors.first * L, end = min(vectors.last * L, own.width);
    for (int64_t i = rows.first; i < rows.last; ++i) {
      T* signal = own.signal + i * own.row;
      const T* factor = own.factor + i * own.row;
      if (l > 0) {
        T* adjoint = own.adjoint + i * own.row;
        for (int64_t j = begin; smooth(l) && j < end; ++j) adjoint[j] *= last[j];
#pragma omp simd
        for (int64_t j = begin; j < end; ++j) signal[j] = last[j] * factor[j];
      } else {
        for (int64_t j = begin; j < end; ++j) signal[j] = last[j];
      }
    }
  }

  // delta_{l-1} = m_{l-1} (delta_l W_l), or g.
  void backward(int64_t l, Range rows, const Team& team) {
    const Work &own = work[l], &before = work[l - 1];
    if (!smooth(l - 1)) return times(l, rows, team, own.signal, before.signal, l > 1 ? before.factor : nullptr);
    times(l, rows, team, own.signal, before.signal, nullptr);
    bend(l - 1, rows, team, before.signal);
  }

  // to = (from W_l) * factor, in the columns of layer l - 1; with `adds`, that is added to it.
  void times(int64_t l, Range rows, const Team& team, const T* from, T* to_rows, const T* factor, bool adds = false) {
    const Work &own = work[l], &before = work[l - 1];
    const int64_t depth = own.width, chunks = ceil_div(depth, kDepth);
    T* panel = spare + team.thread * spare_size;
    for_panels(columns(l - 1, team), [&](int64_t first, int64_t vectors) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const Range part = Range{0, depth}.part(chunk, chunks);
        pack(matrix(l) + part.first * before.width + first * L, before.width, before.width - first * L, part.size(),
             panel, vectors * L);
        T* to = to_rows + rows.first * before.row + first * L;
        const bool begins = chunk == 0, ends = chunk + 1 == chunks;
        multiply<T>({from + rows.first * own.row + part.first, own.row, 1, panel, vectors * L, to, before.row,
                     begins || adds ? nullptr : to, before.row,
                     (ends || adds) && factor ? factor + rows.first * before.row + first * L : nullptr, before.row,
                     part.size(), adds},
                    rows.size(), vectors);
      }
    });
  }

  void tangent(int64_t l, Range rows, const Team& team) {
    const Work &own = work[l], &before = work[l - 1];
    times_transposed(l, rows, team, before.tangent, before.row, own.tangent, nullptr, smooth(l) ? nullptr : own.factor);
    if (smooth(l)) bend(l, rows, team, own.tangent);
  }

  // What will be p_l takes up `passing`, e_l or s_l, which then goes on to the other side of phi, as delta_l or t_l.
  void bend(int64_t l, Range rows, const Team& team, T* passing) {
    const Work& own = work[l];
    const Range vectors = columns(l, team);
    for (int64_t i = rows.first; i < rows.last; ++i) {
      const int64_t row = i * own.row;
#pragma omp simd
      for (int64_t j = row + vectors.first * L; j < row + vectors.last * L; ++j) {
        own.adjoint[j] *= passing[j];
        passing[j] *= own.factor[j];
      }
    }
  }

  // ---- the adjoints p_l, where a layer is smooth ----

  // The samples that have them.
  Range adjoined() const { return score_grads ? Range{0, batch} : penalized; }
  // The last layer that has them: with a loss every layer has.
  int64_t top_adjoint() const { return score_grads ? num_layers - 1 : last_smooth; }

  // x with the rows that the products of a weight gradient read.
  void copy_input(Range rows) {
    for (int64_t i = rows.first; i < rows.last; ++i) {
      T* to = const_cast<T*>(work[0].activation) + i * work[0].row;
      for (int64_t j = 0; j < width; ++j) to[j] = x[i * width + j];
    }
  }

  // p of the last layer that has one: from the scores, w m_{L-1} W_L comes, from the penalty what its own phi'' makes.
  void begin_adjoint(Range rows, const Team& team) {
    // Where there is no penalty there is no tangent.
    for (int64_t l = 1; l < num_layers; ++l) {
      if (smooth(l)) clear(l, rows, team);
    }
    if (!score_grads) return;
    const int64_t l = num_layers - 1;
    const Work& own = work[l];
    const Range vectors = columns(l, team);
    for (int64_t i = rows.first; i < rows.last; ++i) {
      const T w = score_grads[i];
      T* adjoint = own.adjoint + i * own.row;
      const T* signal = own.signal + i * own.row;  // m_{L-1} W_L
      if (smooth(l)) {
#pragma omp simd
        for (int64_t j = vectors.first * L; j < vectors.last * L; ++j) adjoint[j] += w * signal[j];
      } else {
#pragma omp simd
        for (int64_t j = vectors.first * L; j < vectors.last * L; ++j) adjoint[j] = w * signal[j];
      }
    }
  }

  // 0 where samples have no penalty.
  void clear(int64_t l, Range rows, const Team& team) {
    const Work& own = work[l];
    const Range vectors = columns(l, team);
    const Range parts[] = {{0, penalized.first}, {penalized.last, batch}};
    for (const Range part : parts) {
      const Range others = rows.common(part);
      for (int64_t i = others.first; i < others.last; ++i) {
        for (int64_t j = vectors.first * L; j < vectors.last * L; ++j) own.adjoint[i * own.row + j] = 0;
      }
    }
  }

  // p_{l-1} = what its phi'' makes + m_{l-1} (p_l W_l).
  void adjoint(int64_t l, Range rows, const Team& team) {
    const Work &own = work[l], &before = work[l - 1];
    const Range some = rows.common(adjoined());
    times(l, some, team, own.adjoint, before.adjoint, before.factor, smooth(l - 1));
  }

  // t_l + w a_l in the place of t_l, which is 0 where there is no penalty.
  void add_activations(Range rows) {
    for (int64_t l = 0; l < num_layers; ++l) {
      const Work& own = work[l];
      for (int64_t i = rows.first; i < rows.last; ++i) {
        const T* activation = l == 0 ? x + i * width : own.activation + i * own.activation_row;
        T* tangent = own.tangent + i * own.row;
        const T w = score_grads[i];
        if (i >= penalized.first && i < penalized.last) {
#pragma omp simd
          for (int64_t j = 0; j < own.width; ++j) tangent[j] += w * activation[j];
        } else {
#pragma omp simd
          for (int64_t j = 0; j < own.width; ++j) tangent[j] = w * activation[j];
        }
      }
    }
  }

  // delta_l^T t_{l-1}, with the loss delta_l^T (t_{l-1} + w a_{l-1}), which is in the place of t_{l-1}; where a layer is smooth
  // delta_l^T t_{l-1} + p_l^T a_{l-1}. Entries in the order of panels, then rows, are shared out.
  void weight_gradient(int64_t l, const Team& team) {
    const Work &own = work[l], &before = work[l - 1];
    T* grad = static_cast<T*>(layer(l).grad_weight);
    T* columns = spare + team.thread * spare_size + kDepth * kTileVectors * L;
    const int64_t height = own.width;
    const int64_t panels = ceil_div(before.vectors, kTileVectors);
    const Range share = Range{0, panels * height}.part(team.thread, team.num_threads);
    int64_t p = 0;
    for_panels({0, before.vectors}, [&](int64_t first, int64_t vectors) {
      const Range rows{max(share.first - p * height, 0), min(share.last - p * height, height)};
      ++p;
      if (rows.first >= rows.last) return;
      const int64_t valid = min(before.width - first * L, vectors * L);
      const bool whole = valid == vectors * L;  // otherwise a vector would be stored beyond its row
      T* to = whole ? grad + rows.first * before.width + first * L : columns;
      const int64_t to_row = whole ? before.width : vectors * L;
      bool begins = true;
      const auto add = [&](Range terms, const T* one, const T* other) {
        const int64_t chunks = ceil_div(terms.size(), kDepth);
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          const Range part = terms.part(chunk, chunks);
          multiply<T>({one + part.first * own.row + rows.first, 1, own.row,
                       other + part.first * before.row + first * L, before.row, to, to_row,
                       begins ? nullptr : to, to_row, nullptr, 0, part.size()},
                      rows.size(), vectors);
          begins = false;
        }
      };
      add(last_smooth ? penalized : Range{0, batch}, own.signal, before.tangent);
      if (last_smooth && l <= top_adjoint()) add(adjoined(), own.adjoint, before.activation);
      for (int64_t i = rows.first; !whole && i < rows.last; ++i) {
        const T* from = columns + (i - rows.first) * to_row;
        for (int64_t j = 0; j < valid; ++j) grad[i * before.width + first * L + j] = from[j];
      }
    });
  }

  // The sum of w delta_l, where a layer is smooth of p_l.
  void bias_gradient(int64_t l, const Team& team) {
    const Work& own = work[l];
    T* grad = static_cast<T*>(layer(l).grad_bias);
    if (last_smooth && l > top_adjoint()) {
      if (team.thread == 0) {
        for (int64_t j = 0; j < own.width; ++j) grad[j] = 0;
      }
      return;
    }
    sum_rows(l, team, grad, [&](int64_t first, int64_t vectors, T* sums) {
      if (last_smooth) return add_rows_of(adjoined(), nullptr, own.adjoint + first * L, own.row, sums, vectors, true);
      add_rows_of({0, batch}, score_grads, own.signal + first * L, own.row, sums, vectors, true);
    });
  }

  // The sum of the tangents of the last hidden layer, and of its activations times w.
  void last_weight_gradient(const Team& team) {
    const Work& own = work[num_layers - 1];
    sum_rows(num_layers - 1, team, static_cast<T*>(layer(num_layers).grad_weight),
             [&](int64_t first, int64_t vectors, T* sums) {
               add_rows_of(last_smooth ? penalized : Range{0, batch}, nullptr, own.tangent + first * L, own.row, sums, vectors,
                           true);
               if (!last_smooth || !score_grads) return;
               add_rows_of({0, batch}, score_grads, own.activation + first * L, own.row, sums, vectors, false);
             });
  }

  // to[j] = the sums that `add` makes of the columns of layer l.
  template <class F>
  void sum_rows(int64_t l, const Team& team, T* to, F add) {
    const Work& own = work[l];
    T sums[static_cast<size_t>(kTileVectors * L)];
    for_panels(Range{0, own.vectors}.part(team.thread, team.num_threads), [&](int64_t first, int64_t vectors) {
      add(first, vectors, sums);
      for (int64_t j = 0; j < min(vectors * L, own.width - first * L); ++j) to[first * L + j] = sums[j];
    });
  }

  // The sum over samples i of factors[i], or 1, times row i; added to the sums there are unless it begins them.
  static void add_rows_of(Range terms, const T* factors, const T* rows, int64_t row, T* sums, int64_t vectors, bool begins) {
    const T one = 1;
    multiply<T>({factors ? factors + terms.first : &one, 0, factors ? 1 : 0, rows + terms.first * row, row, sums, 0,
                 begins ? nullptr : sums, 0, nullptr, 0, terms.size()},
                1, vectors);
  }

  // ---- norms ----

  void take_norm(int64_t i) {
    const T* g = work[0].signal + i * work[0].row;
    double norm = __builtin_sqrt(sum_of_squares(g, width));
    // The squares of float64 leave the range where the norm does not.
    if (sizeof(T) == sizeof(double) && !(norm > 1e-140 && norm < 1e150)) norm = norm_in_range(g, width, 1, norm);
    exact[i] = norm;
    norms[i - penalized.first] = static_cast<T>(norm);
  }

  // v = dP/dg, in the place of g.
  void scale_gradients(Range rows) {
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

  static T greater(T a, T b) { return a < b || b != b ? b : a; }
  static bool is_maximum(T norm, T largest) { return norm == largest || norm != norm; }

  void finish() {
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
};

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
