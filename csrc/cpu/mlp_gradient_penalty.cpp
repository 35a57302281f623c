// mlp_gradient_penalty on the CPU. Formulas: include/lipgan/mlp_gradient_penalty.h.
//
// Four products a layer are the cost: forward, backward, tangent, weight gradient. The first three are independent
// either between samples or between columns of their results, and the threads share one or the other, whichever moves
// fewer bytes between them:
//   by samples   a thread takes its samples through all layers, meets every weight, and waits for nobody;
//   by columns   a thread keeps its columns of every weight in its own cache, and waits for the others in every layer.
// W^T is laid out as panels once and serves forward and tangent. The weight gradients are shared out by their entries.
//
// Every sum has one order, so the result does not depend on the number of threads.
#include "lipgan/mlp_gradient_penalty.h"

#include <limits>

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

  // Of layer l, 0 ... num_layers - 1; the arrays of layer 0 belong to the input. Rows are filled up to whole vectors with
  // numbers that reach no result.
  struct Work {
    int64_t width, vectors, row;  // row: elements between samples, an odd number of cache lines, lest rows share a set
    T* panels;      // W_l^T
    T* bias;        // [vectors], padded
    T* factor;      // m_l
    const T* activation;  // a_l, l > 0
    int64_t activation_row;
    T* signal;      // delta_l, without a loss in the place of a_l; of the input: g, then v
    T* tangent;     // t_l, then t_l + w a_l; of the input: v in the place of g
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
      if (l > 0) {
        if (const void* known = layer(l).activation) {
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
    team.barrier();
    if (score_grads) {
      add_activations(own);
      team.barrier();
    }
    for (int64_t l = 1; l < num_layers; ++l) weight_gradient(l, team);
    last_weight_gradient(team);
    for (int64_t l = 1; score_grads && l < num_layers; ++l) bias_gradient(l, team);
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
    if (layer(l).activation) {
      for (int64_t i = rows.first; i < rows.last; ++i) {
        const T* activation = own.activation + i * own.activation_row;
        T* factor = own.factor + i * own.row;
#pragma omp simd
        for (int64_t j = begin; j < end; ++j) {
          const T a = activation[j];  // of the sign of z, for the slope is not negative
          factor[j] = a > 0 ? T(1) : a <= 0 ? slope : a;
        }
      }
      return;
    }
    T* activations = const_cast<T*>(own.activation);  // which are memory of this call
    times_transposed(l, rows, team, first ? x : before.activation, first ? width : before.activation_row, activations,
                     own.bias, nullptr);
    const T* scales = static_cast<const T*>(layer(l).scale);
    for (int64_t i = rows.first; i < rows.last; ++i) {
      T *activation = activations + i * own.row, *factor = own.factor + i * own.row;
      const auto activate = [=](int64_t j, T scale) {
        const T z = activation[j];
        const T m = (z > 0 ? scale : z <= 0 ? scale * slope : z);
        factor[j] = m;
        activation[j] = m * z;
      };
      if (scales) {
        const T* scale = scales + i * own.width;
#pragma omp simd
        for (int64_t j = begin; j < end; ++j) activate(j, scale[j]);
      } else {
#pragma omp simd
        for (int64_t j = begin; j < end; ++j) activate(j, T(1));
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
    const int64_t depth = own.width, chunks = ceil_div(depth, kDepth);
    T* panel = spare + team.thread * spare_size;
    for_panels(columns(l - 1, team), [&](int64_t first, int64_t vectors) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const Range part = Range{0, depth}.part(chunk, chunks);
        pack(matrix(l) + part.first * before.width + first * L, before.width, before.width - first * L, part.size(),
             panel, vectors * L);
        T* to = before.signal + rows.first * before.row + first * L;
        const bool begins = chunk == 0, ends = chunk + 1 == chunks;
        multiply<T>({own.signal + rows.first * own.row + part.first, own.row, 1, panel, vectors * L, to, before.row,
                     begins ? nullptr : to, before.row,
                     ends && l > 1 ? before.factor + rows.first * before.row + first * L : nullptr, before.row,
                     part.size()},
                    rows.size(), vectors);
      }
    });
  }

  void tangent(int64_t l, Range rows, const Team& team) {
    const Work &own = work[l], &before = work[l - 1];
    times_transposed(l, rows, team, before.tangent, before.row, own.tangent, nullptr, own.factor);
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

  // With the loss: delta_l^T (t_{l-1} + w a_{l-1}), which is in the place of t_{l-1}: entries in the order of panels, then rows, are shared out.
  void weight_gradient(int64_t l, const Team& team) {
    const Work &own = work[l], &before = work[l - 1];
    T* grad = static_cast<T*>(layer(l).grad_weight);
    T* columns = spare + team.thread * spare_size + kDepth * kTileVectors * L;
    const int64_t height = own.width, chunks = ceil_div(batch, kDepth);
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
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const Range part = Range{0, batch}.part(chunk, chunks);
        multiply<T>({own.signal + part.first * own.row + rows.first, 1, own.row,
                     before.tangent + part.first * before.row + first * L, before.row, to, to_row,
                     chunk == 0 ? nullptr : to, to_row, nullptr, 0, part.size()},
                    rows.size(), vectors);
      }
      for (int64_t i = rows.first; !whole && i < rows.last; ++i) {
        const T* from = columns + (i - rows.first) * to_row;
        for (int64_t j = 0; j < valid; ++j) grad[i * before.width + first * L + j] = from[j];
      }
    });
  }

  // The sum of w delta_l.
  void bias_gradient(int64_t l, const Team& team) {
    const Work& own = work[l];
    T* grad = static_cast<T*>(layer(l).grad_bias);
    T sums[static_cast<size_t>(kTileVectors * L)];
    for_panels(Range{0, own.vectors}.part(team.thread, team.num_threads), [&](int64_t first, int64_t vectors) {
      multiply<T>({score_grads, 0, 1, own.signal + first * L, own.row, sums, 0, nullptr, 0, nullptr, 0, batch}, 1,
                  vectors);
      for (int64_t j = 0; j < min(vectors * L, own.width - first * L); ++j) grad[first * L + j] = sums[j];
    });
  }

  // The sum of the tangents of the last hidden layer.
  void last_weight_gradient(const Team& team) {
    const Work& own = work[num_layers - 1];
    T* grad = static_cast<T*>(layer(num_layers).grad_weight);
    T sums[static_cast<size_t>(kTileVectors * L)];
    const T one = 1;
    for_panels(Range{0, own.vectors}.part(team.thread, team.num_threads), [&](int64_t first, int64_t vectors) {
      multiply<T>({&one, 0, 0, own.tangent + first * L, own.row, sums, 0, nullptr, 0, nullptr, 0, batch}, 1, vectors);
      for (int64_t j = 0; j < min(vectors * L, own.width - first * L); ++j) grad[first * L + j] = sums[j];
    });
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
    if (!score_grads) return;
    double sum = 0;
    for (int64_t i = 0; i < batch; ++i) sum += static_cast<double>(score_grads[i]);
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
    const int64_t before = ceil_div(op.width_of(l - 1), op.L) * op.L;
    signals += before;
    weights += before * ceil_div(op.width_of(l), op.L) * op.L;
  }
  const int threads = threads_for(4 * batch * weights, kProductsPerThread, num_threads);
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
