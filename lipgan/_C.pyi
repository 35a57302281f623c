from collections.abc import Sequence

from torch import Tensor

def use_dlpack(tensor: type[Tensor]) -> None: ...
def spectral_norm_fwd(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    n_power_iterations: int,
    eps: float,
    dims: Sequence[int],
    num_threads: int,
) -> tuple[list[Tensor], Tensor, Tensor]: ...
def spectral_norm_bwd(
    grad_ys: Sequence[Tensor],
    grad_sigma: Tensor | None,
    ys: Sequence[Tensor],
    sigma: Tensor,
    uv: Tensor,
    dims: Sequence[int],
    num_threads: int,
) -> list[Tensor]: ...
def spectral_norm_double_bwd(
    grads: Sequence[Tensor],
    grad_ys: Sequence[Tensor],
    ys: Sequence[Tensor],
    sigma: Tensor,
    uv: Tensor,
    dims: Sequence[int],
    num_threads: int,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]: ...
def matrix_sqrt_fwd(
    a: Tensor, inverse: bool, eps: float, resolution: float, spectrum: bool, num_threads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def symmetrize(a: Tensor, num_threads: int) -> tuple[float, float, Tensor | None]: ...
def nearest_neighbours_fwd(x: Tensor, y: Tensor | None, k: int, num_threads: int) -> tuple[Tensor, Tensor]: ...
def ball_counts(
    x: Tensor, y: Tensor, x_squared_radii: Tensor, y_squared_radii: Tensor, closed: bool, num_threads: int
) -> tuple[Tensor, Tensor]: ...
def gradient_penalty_interpolate(real: Tensor, fake: Tensor, mix: Tensor, num_threads: int) -> Tensor: ...
def gradient_penalty_fwd(
    grads: Tensor, kind: str, weight: float, target: float, norm: str, num_threads: int
) -> tuple[Tensor, Tensor, Tensor]: ...
def mlp_gradient_penalty_fwd(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    slopes: Sequence[float],
    scales: Sequence[Tensor | None],
    kind: str,
    weight: float,
    target: float,
    score_grads: Tensor | None,
    activations: Sequence[Tensor],
    first: int,
    last: int,
    curves: Sequence[str],
    constants: Sequence[float],
    num_threads: int,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]: ...
def empty_cache() -> int: ...
def cached_bytes() -> int: ...
def poison_outputs(on: bool) -> None: ...
def empty(numel: int) -> Tensor: ...
def empty_matrix(rows: int, columns: int) -> Tensor: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def supported_isas() -> list[str]: ...
def insist_on_threads(on: bool) -> None: ...
def thread_pool() -> str: ...
