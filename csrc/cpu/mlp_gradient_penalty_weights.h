// The gradients of a perceptron's weights and biases: sums over samples of what has gone through the layers.
#pragma once

#include "mlp_gradient_penalty_work.h"

namespace lipgan::cpu::LIPGAN_ISA {
namespace {

// t_l + w a_l in the place of t_l, which is 0 where there is no penalty.
template <class T>
void Penalty<T>::add_activations(Range rows) {
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
template <class T>
void Penalty<T>::weight_gradient(int64_t l, const Team& team) {
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

// The sum of w delta_l, where a layer is smooth of p_l. In double: for a unit whose slope is the same at all samples what real
// and fake ones give may cancel, and has to: optimizers that divide by the size of gradients make steps of what rounding
// leaves.
template <class T>
void Penalty<T>::bias_gradient(int64_t l, const Team& team) {
  const Work& own = work[l];
  T* grad = static_cast<T*>(layer(l).grad_bias);
  if (last_smooth && l > top_adjoint()) {
    if (team.thread == 0) {
      for (int64_t j = 0; j < own.width; ++j) grad[j] = 0;
    }
    return;
  }
  const Range samples = last_smooth ? adjoined() : Range{0, batch};
  const T* rows = last_smooth ? own.adjoint : own.signal;
  const T* factors = last_smooth ? nullptr : score_grads;
  double sums[static_cast<size_t>(kTileVectors * L)];
  for_panels(Range{0, own.vectors}.part(team.thread, team.num_threads), [&](int64_t first, int64_t vectors) {
    const int64_t columns = min(vectors * L, own.width - first * L);
    for (int64_t j = 0; j < columns; ++j) sums[j] = 0;
    for (int64_t i = samples.first; i < samples.last; ++i) {
      const T* row = rows + i * own.row + first * L;
      const double factor = factors ? static_cast<double>(factors[i]) : 1.0;
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) sums[j] += factor * static_cast<double>(row[j]);
    }
    for (int64_t j = 0; j < columns; ++j) grad[first * L + j] = static_cast<T>(sums[j]);
  });
}

// The sum of the tangents of the last hidden layer, and of its activations times w.
template <class T>
void Penalty<T>::last_weight_gradient(const Team& team) {
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
template <class T>
template <class F>
void Penalty<T>::sum_rows(int64_t l, const Team& team, T* to, F add) {
  const Work& own = work[l];
  T sums[static_cast<size_t>(kTileVectors * L)];
  for_panels(Range{0, own.vectors}.part(team.thread, team.num_threads), [&](int64_t first, int64_t vectors) {
    add(first, vectors, sums);
    for (int64_t j = 0; j < min(vectors * L, own.width - first * L); ++j) to[first * L + j] = sums[j];
  });
}

// The sum over samples i of factors[i], or 1, times row i; added to the sums there are unless it begins them.
template <class T>
void Penalty<T>::add_rows_of(Range terms, const T* factors, const T* rows, int64_t row, T* sums, int64_t vectors, bool begins) {
  const T one = 1;
  multiply<T>({factors ? factors + terms.first : &one, 0, factors ? 1 : 0, rows + terms.first * row, row, sums, 0,
               begins ? nullptr : sums, 0, nullptr, 0, terms.size()},
              1, vectors);
}

}  // namespace
}  // namespace lipgan::cpu::LIPGAN_ISA
