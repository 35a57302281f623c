// The op mlp_gradient_penalty: the gradient penalty of a multilayer perceptron, and its gradients, without a double
// backward.
//
//   a_0 = x    z_l = a_{l-1} W_l^T + b_l    a_l = scale_l phi_l(z_l)  (l < L)    critic(x)_i = z_L,i,  d_L = 1
//
// Where every phi_l is a leaky ReLU, m_l = scale_l lrelu'(z_l) (lrelu' = slope_l at 0), and everything is a product by these
// factors:
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
//
// Where a phi_l is smooth, its factor m_l = scale_l phi_l'(z_l) changes with z. The score's derivative along v, which is
// sum <v_i, g_i> for a fixed v, has derivatives p_l by z_l too, and so does the loss: one more backward pass has those of
// both. With e_l = delta_{l+1} W_{l+1} and s_l = t_{l-1} W_l^T:
//
//   p_L = w (or 0)    p_l = scale_l phi_l''(z_l) s_l e_l + m_l (p_{l+1} W_{l+1})
//   d/dW_l = delta_l^T t_{l-1} + p_l^T a_{l-1}    d/db_l = sum p_l,i
#pragma once
#include <cstdint>

#include "lipgan/dtype.h"
#include "lipgan/gradient_penalty.h"

namespace lipgan {

// phi. The constants of a layer: beta and threshold of softplus; alpha, scale and input_scale of elu.
enum class MlpActivation { leaky_relu, tanh, sigmoid, softplus, silu, gelu, gelu_tanh, elu };

// Layer l of L, l = 1 ... L. T is the storage type, float or double.
struct MlpLayer {
  const void* weight;  // T [width, width of the layer before]
  const void* bias;    // T [width], or null for zeros; of the last layer it is not read
  const void* scale;   // T [batch, width], or null for ones; null for the last layer
  const void* known;   // T [batch, width]: a_l of a leaky ReLU, z_l of others, where it is known and there is no scale; else
                       // null, and it is computed
  void* grad_weight;   // T [width, width of the layer before]
  void* grad_bias;     // T [width]; null where no layer is smooth and there is no loss
  double slope;        // of leaky_relu; 0: ReLU, 1: no activation
  int64_t width;       // of the last layer: 1
  MlpActivation phi = MlpActivation::leaky_relu;
  double constants[3] = {};
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
