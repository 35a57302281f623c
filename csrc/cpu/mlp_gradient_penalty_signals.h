// What goes through the layers of a perceptron, sample by sample: activations forward, deltas backward, tangents forward,
// and the adjoints of smooth layers backward.
#pragma once

#include "activations.h"
#include "mlp_gradient_penalty_work.h"

namespace lipgan::cpu::LIPGAN_ISA {
namespace {

// W^T, and the biases. A panel of vectors [a, b) begins at a * depth vectors.
template <class T>
void Penalty<T>::prepare_panels(const Team& team) {
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
template <class T>
void Penalty<T>::times_transposed(int64_t l, Range rows, const Team& team, const T* a, int64_t a_row, T* c,
                                  const T* start, const T* factor) {
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

template <class T>
void Penalty<T>::forward(int64_t l, Range rows, const Team& team) {
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
template <class T>
void Penalty<T>::activate(int64_t l, Range rows, Range vectors) {
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

template <class T>
template <class Phi>
void Penalty<T>::activate(int64_t l, Range rows, Range vectors, Phi phi) {
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
template <class T>
void Penalty<T>::begin_backward(Range rows, const Team& team) {
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
template <class T>
void Penalty<T>::backward(int64_t l, Range rows, const Team& team) {
  const Work &own = work[l], &before = work[l - 1];
  if (!smooth(l - 1)) return times(l, rows, team, own.signal, before.signal, l > 1 ? before.factor : nullptr);
  times(l, rows, team, own.signal, before.signal, nullptr);
  bend(l - 1, rows, team, before.signal);
}

// to = (from W_l) * factor, in the columns of layer l - 1; with `adds`, that is added to it.
template <class T>
void Penalty<T>::times(int64_t l, Range rows, const Team& team, const T* from, T* to_rows, const T* factor, bool adds) {
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

template <class T>
void Penalty<T>::tangent(int64_t l, Range rows, const Team& team) {
  const Work &own = work[l], &before = work[l - 1];
  times_transposed(l, rows, team, before.tangent, before.row, own.tangent, nullptr, smooth(l) ? nullptr : own.factor);
  if (smooth(l)) bend(l, rows, team, own.tangent);
}

// What will be p_l takes up `passing`, e_l or s_l, which then goes on to the other side of phi, as delta_l or t_l.
template <class T>
void Penalty<T>::bend(int64_t l, Range rows, const Team& team, T* passing) {
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

// x with the rows that the products of a weight gradient read.
template <class T>
void Penalty<T>::copy_input(Range rows) {
  for (int64_t i = rows.first; i < rows.last; ++i) {
    T* to = const_cast<T*>(work[0].activation) + i * work[0].row;
    for (int64_t j = 0; j < width; ++j) to[j] = x[i * width + j];
  }
}

// p of the last layer that has one: from the scores, w m_{L-1} W_L comes, from the penalty what its own phi'' makes.
template <class T>
void Penalty<T>::begin_adjoint(Range rows, const Team& team) {
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
template <class T>
void Penalty<T>::clear(int64_t l, Range rows, const Team& team) {
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
template <class T>
void Penalty<T>::adjoint(int64_t l, Range rows, const Team& team) {
  const Work &own = work[l], &before = work[l - 1];
  const Range some = rows.common(adjoined());
  times(l, some, team, own.adjoint, before.adjoint, before.factor, smooth(l - 1));
}

}  // namespace
}  // namespace lipgan::cpu::LIPGAN_ISA
