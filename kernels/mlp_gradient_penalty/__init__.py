"""The gradient penalty of a multilayer perceptron and its gradients: PyTorch's products, and all that lies between.

Layer l of L is a_l = scale_l phi_l(a_{l-1} W_l^T + b_l), the last one without phi and scale. m_l = scale_l phi'(z_l):

  backward   delta_L = 1, e_l = delta_{l+1} W_{l+1}, delta_l = m_l e_l, g = delta_1 W_1
  penalty    its norms, P, and v = dP/dg: kernels/gradient_penalty
  tangent    t_0 = v, s_l = t_{l-1} W_l^T, t_l = m_l s_l
  adjoint    p_L = w or 0, p_l = scale_l phi''(z_l) s_l e_l + m_l (p_{l+1} W_{l+1}), if a phi is smooth
  gradients  dW_l = delta_l^T t_{l-1} + p_l^T a_{l-1} and db_l = sum_i p_l,i if a phi is smooth, else
             dW_l = delta_l^T (t_{l-1} + w a_{l-1}) and db_l = sum_i w_i delta_l,i; w = dloss/dscores

Each product is one matrix product of PyTorch, which takes TF32 where torch.backends allows it. Between two of them one
launch reads its result, and writes what the next one reads; nothing waits for the GPU, no allocation hangs on values.
All hidden layers lie side by side in the columns of a few matrices, so that one launch at the end sums the columns of
all. Where a phi is smooth, delta lies below p and t below a, so that both parts of dW_l are one product. Every sum of
a kernel has one order, so equal inputs give equal bits as far as the products' library does.
"""

from .launch import mlp_gradient_penalty_fwd

__all__ = ["mlp_gradient_penalty_fwd"]
