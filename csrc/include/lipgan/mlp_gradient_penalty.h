// The op mlp_gradient_penalty: the gradient penalty of a multilayer perceptron, and its gradients, without a double
// backward.
//
//   a_0 = x    z_l = a_{l-1} W_l^T + b_l    a_l = scale_l lrelu(z_l, slope_l)  (l < L)    critic(x)_i = z_L,i,  d_L = 1
//
// With m_l = scale_l lrelu'(z_l) (lrelu' = slope_l at 0), everything is a product by these factors:
//
//   delta_L = 1    delta_l = m_l (delta_{l+1} W_{l+1})    g = dcritic/dx = delta_1 W_1
//   P(|g_1|, ..., |g_B|) as in lipgan/gradient_penalty.h, v = dP/dg
//   t_0 = v        t_l = m_l (t_{l-1} W_l^T)              dP/dW_l = delta_l^T t_{l-1}
//
// since dP = sum <v_i, dg_i>, and g is a product of weights with factors that are constant where the critic is
// differentiable. The biases occur in the factors alone: their gradients are zero. A NaN in z makes its factor NaN.
//
// A loss of the scores comes along by its derivatives w_i = dloss/dcritic(x)_i, for the sum of both:
//
//   d/dW_l = delta_l^T (t_{l-1} + w a_{l-1})    d/db_l = sum w_i delta_l,i
//
// The penalty is one of some of the samples, whose number takes the place of B in P; the t of the others are 0.
#pragma once
#include <cstdint>

#include "lipgan/dtype.h"
#include "lipgan/gradient_penalty.h"

namespace lipgan {

// Layer l of L, l = 1 ... L. T is the storage type, float or double.
struct MlpLayer {
  const void* weight;  // T [width, width of the layer before]
  const void* bias;    // T [width], or null for zeros; of the last layer it is not read
  const void* scale;   // T [batch, width], or null for ones; null for the last layer
  const void* activation;  // T [batch, width]: a_l where it is known, without a scale; else null, and it is computed
  void* grad_weight;   // T [width, width of the layer before]
  void* grad_bias;     // T [width], or null without a loss
  double slope;        // 0: ReLU, 1: no activation
  int64_t width;       // of the last layer: 1
};

struct MlpLoss {
  const void* score_grads;  // T [batch]: w; null for none
  int64_t first, last;      // the samples with a penalty, first <= i < last: at least one
};

namespace cpu {

void mlp_gradient_penalty_fwd(Dtype dtype, PenaltyKind kind,
                              const void* x,  // T [batch, width]
                              const MlpLayer* layers, int64_t num_layers, const MlpLoss& loss,
                              void* penalty,  // T []
                              void* norms,    // T [last - first]
                              int64_t batch, int64_t width, double weight, double target, int num_threads);

}  // namespace cpu
}  // namespace lipgan
