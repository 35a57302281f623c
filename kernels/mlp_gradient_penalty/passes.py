"""What lies between two matrix products: the kernels. __init__.py has the names."""

import triton
import triton.language as tl

from ..activations import activated


@triton.jit
def _tile(h, w, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Rows (int64) and columns of a program's tile of a matrix [h, w], and which of them are inside."""
    across = tl.cdiv(w, BLOCK_W)
    rows = tl.program_id(0) // across * BLOCK_H + tl.arange(0, BLOCK_H)
    cols = tl.program_id(0) % across * BLOCK_W + tl.arange(0, BLOCK_W)
    return rows.to(tl.int64)[:, None], cols[None, :], (rows < h)[:, None] & (cols < w)[None, :]


@triton.jit
def _mlp_gradient_penalty_activate_kernel(
    z,  # T [h, w], rows z_row apart: a_{l-1} W_l^T; if KNOWN z_l of a smooth activation, a_l of others
    bias,  # T [w], if BIASED
    scale,  # T [h, w], if SCALED
    last,  # T [w], if LAST: W_L
    activations,  # T [h, w], rows path_row apart, if KEEPS: a_l; may be z
    factors,  # T [h, w], rows row apart: m_l
    bends,  # T [h, w], rows row apart, of a smooth activation: scale phi''(z), if LAST times e_l, which is W_L
    deltas,  # T [h, w], rows row apart, if LAST: delta_l
    h,
    w,
    z_row,
    path_row,
    row,
    slope: tl.float64,
    c0: tl.float64,
    c1: tl.float64,
    c2: tl.float64,
    CURVE: tl.constexpr,
    KNOWN: tl.constexpr,
    BIASED: tl.constexpr,
    SCALED: tl.constexpr,
    KEEPS: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """a_l = scale phi(z + b), m_l and scale phi''; of the last hidden layer delta_l too. A program takes one tile."""
    T: tl.constexpr = factors.dtype.element_ty
    rows, cols, inside = _tile(h, w, BLOCK_H, BLOCK_W)
    x = tl.load(z + rows * z_row + cols, mask=inside, other=0.0)
    if BIASED:
        x += tl.load(bias + cols, mask=cols < w, other=0.0)
    if CURVE == "":
        # A NaN is neither above zero nor below it, and stays NaN. What is known has the sign of its z.
        m = tl.where(x > 0, 1.0, tl.where(x <= 0, tl.full([], slope, T), x))
        if KNOWN:
            a = x
        else:
            if SCALED:
                m *= tl.load(scale + rows * w + cols, mask=inside, other=0.0)
            a = m * x
    else:
        a, m, bend = activated(x, tl.full([], c0, T), tl.full([], c1, T), tl.full([], c2, T), CURVE)
        if SCALED:
            factor = tl.load(scale + rows * w + cols, mask=inside, other=0.0)
            a, m, bend = a * factor, m * factor, bend * factor
    if KEEPS:
        tl.store(activations + rows * path_row + cols, a, mask=inside)
    at = rows * row + cols
    tl.store(factors + at, m, mask=inside)
    if LAST:
        e = tl.load(last + cols, mask=cols < w, other=0.0)
        tl.store(deltas + at, m * e, mask=inside)
        if CURVE != "":
            bend *= e
    if CURVE != "":
        tl.store(bends + at, bend, mask=inside)


@triton.jit
def _mlp_gradient_penalty_backward_kernel(
    deltas,  # T [h, w], rows row apart: e_l, becomes delta_l
    factors,  # the same: m_l
    bends,  # the same, if SMOOTH: scale phi''(z), becomes that times e_l
    h,
    w,
    row,
    SMOOTH: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """delta_l = m_l e_l. A program takes one tile."""
    rows, cols, inside = _tile(h, w, BLOCK_H, BLOCK_W)
    at = rows * row + cols
    e = tl.load(deltas + at, mask=inside, other=0.0)
    tl.store(deltas + at, e * tl.load(factors + at, mask=inside, other=0.0), mask=inside)
    if SMOOTH:
        tl.store(bends + at, e * tl.load(bends + at, mask=inside, other=0.0), mask=inside)


@triton.jit
def _mlp_gradient_penalty_seed_kernel(
    x,  # T [h, w]
    v,  # T [last - first, w]
    score_grads,  # T [h], if LOSS: w
    activations,  # T [h, w], rows path_row apart: x if STACKED, else t_0 + w x
    tangents,  # the same, if STACKED: t_0
    h,
    w,
    path_row,
    first,
    last,
    LOSS: tl.constexpr,
    STACKED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """t_0 = v, 0 of samples without a penalty, where the gradient of W_1 finds it. A program takes one tile."""
    rows, cols, inside = _tile(h, w, BLOCK_H, BLOCK_W)
    steep = inside & (rows >= first) & (rows < last)
    t = tl.load(v + (rows - first) * w + cols, mask=steep, other=0.0)
    a = tl.load(x + rows * w + cols, mask=inside, other=0.0)
    at = rows * path_row + cols
    if STACKED:
        tl.store(tangents + at, t, mask=inside)
    elif LOSS:
        a = t + tl.load(score_grads + rows, mask=rows < h, other=0.0) * a
    tl.store(activations + at, a, mask=inside)


@triton.jit
def _mlp_gradient_penalty_tangent_kernel(
    tangents,  # T [h, w], rows path_row apart: of the rows first ... last s_l, becomes t_l
    activations,  # the same, if LOSS and not STACKED: a_l, becomes t_l + w a_l
    factors,  # T [h, w], rows row apart: m_l
    adjoints,  # the same, if SMOOTH: scale phi''(z) e_l; becomes p_l, but for what comes from the layer above
    deltas,  # the same, if TOP: delta_l
    score_grads,  # T [h], if LOSS: w
    h,
    w,
    path_row,
    row,
    first,
    last,
    SMOOTH: tl.constexpr,
    LOSS: tl.constexpr,
    STACKED: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """t_l = m_l s_l, and 0 of samples without a penalty. A program takes one tile.

    TOP: this is the last hidden layer of a critic with a smooth activation, and there is a loss: w delta_l is what
    comes from the layer above.
    """
    rows, cols, inside = _tile(h, w, BLOCK_H, BLOCK_W)
    steep = inside & (rows >= first) & (rows < last)
    path, at = rows * path_row + cols, rows * row + cols
    s = tl.load(tangents + path, mask=steep, other=0.0)
    t = s * tl.load(factors + at, mask=steep, other=0.0)
    tl.store(tangents + path, t, mask=inside)
    if LOSS:
        loss = tl.load(score_grads + rows, mask=rows < h, other=0.0)
        if not STACKED:
            a = tl.load(activations + path, mask=inside, other=0.0)
            tl.store(activations + path, t + loss * a, mask=inside)
    if SMOOTH or TOP:
        p = tl.zeros_like(s)
        if SMOOTH:
            p += s * tl.load(adjoints + at, mask=steep, other=0.0)
        if TOP:
            p += loss * tl.load(deltas + at, mask=inside, other=0.0)
        tl.store(adjoints + at, p, mask=inside)


@triton.jit
def _mlp_gradient_penalty_adjoint_kernel(
    adjoints,  # T [h, w], rows row apart: p_l; if SMOOTH it holds what its own phi'' makes
    above,  # T [h, w]: p_{l+1} W_{l+1}
    factors,  # T [h, w], rows row apart: m_l
    h,
    w,
    row,
    SMOOTH: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """p_l of what is above and of its own. A program takes one tile."""
    rows, cols, inside = _tile(h, w, BLOCK_H, BLOCK_W)
    at = rows * row + cols
    p = tl.load(above + rows * w + cols, mask=inside, other=0.0) * tl.load(factors + at, mask=inside, other=0.0)
    if SMOOTH:
        p += tl.load(adjoints + at, mask=inside, other=0.0)
    tl.store(adjoints + at, p, mask=inside)


@triton.jit
def _sum_of_rows(
    matrix, factors, h, row, cols, inside, HAS_FACTORS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr
):
    """The sum over i of row i, times factors[i] if HAS_FACTORS, at some columns."""
    total = tl.zeros([BLOCK_H, BLOCK_W], matrix.dtype.element_ty)
    for start in range(0, h, BLOCK_H):
        rows = start + tl.arange(0, BLOCK_H)
        at = rows.to(tl.int64)[:, None] * row + cols[None, :]
        part = tl.load(matrix + at, mask=(rows < h)[:, None] & inside[None, :], other=0.0)
        if HAS_FACTORS:
            part *= tl.load(factors + rows, mask=rows < h, other=0.0)[:, None]
        total += part
    return tl.sum(total, axis=0)


@triton.jit
def _mlp_gradient_penalty_sums_kernel(
    signals,  # T [h, width], rows row apart, if BIASES: delta_l of all hidden layers; if STACKED p_l
    score_grads,  # T [h], if LOSS: w
    tangents,  # T [steep, w], rows path_row apart: t_{L-1}; if LOSS and not STACKED with w a_{L-1}
    activations,  # T [h, w], rows activation_row apart, if APART: a_{L-1}, which is not in the tangents
    bias_grads,  # T [width + 1], if BIASES
    last_grad,  # T [w]: the gradient of W_L
    h,
    width,
    row,
    kept,  # columns of the signals that are not 0
    w,
    steep,
    path_row,
    activation_row,
    BIASES: tl.constexpr,
    LOSS: tl.constexpr,
    STACKED: tl.constexpr,
    APART: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """The gradients of all biases, and of the last layer's weights. A program takes BLOCK_W columns."""
    programs, program = tl.cdiv(w, BLOCK_W), tl.program_id(0)
    if program < programs:
        cols = program * BLOCK_W + tl.arange(0, BLOCK_W)
        total = _sum_of_rows(tangents, score_grads, steep, path_row, cols, cols < w, False, BLOCK_H, BLOCK_W)
        if APART:
            total += _sum_of_rows(activations, score_grads, h, activation_row, cols, cols < w, True, BLOCK_H, BLOCK_W)
        tl.store(last_grad + cols, total, mask=cols < w)
        if BIASES:  # noqa: SIM102 -- a constant, and a number of the GPU
            if program == 0:
                lanes = tl.zeros([BLOCK_H], last_grad.dtype.element_ty)
                if LOSS:
                    for start in range(0, h, BLOCK_H):
                        rows = start + tl.arange(0, BLOCK_H)
                        lanes += tl.load(score_grads + rows, mask=rows < h, other=0.0)
                tl.store(bias_grads + width, tl.sum(lanes, axis=0))
    else:
        if BIASES:
            cols = (program - programs) * BLOCK_W + tl.arange(0, BLOCK_W)
            total = _sum_of_rows(
                signals, score_grads, h, row, cols, cols < kept, LOSS and not STACKED, BLOCK_H, BLOCK_W
            )  # fmt: skip
            tl.store(bias_grads + cols, total, mask=cols < width)
