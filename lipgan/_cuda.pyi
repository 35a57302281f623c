def spectral_norm_fwd(
    dtype: int,
    layers: list[tuple[int, ...]],
    sigma: int,
    n_power_iterations: int,
    eps: float,
    workspace: int,
    device_table: int,
    stream: int,
) -> None: ...
def spectral_norm_fwd_workspace(layers: list[tuple[int, ...]]) -> int: ...
def spectral_norm_fwd_table_size(num_layers: int) -> int: ...
def spectral_norm_bwd(
    dtype: int, layers: list[tuple[int, ...]], sigma: int, grad_sigma: int, workspace: int, stream: int
) -> None: ...
def spectral_norm_bwd_workspace(layers: list[tuple[int, ...]]) -> int: ...
def gradient_penalty_interpolate(
    dtype: int, real: int, fake: int, mix: int, x_hat: int, batch: int, length: int, stream: int
) -> None: ...
def gradient_penalty_fwd_workspace(dtype: int, outer: int, length: int, inner: int) -> int: ...
def gradient_penalty_fwd(
    dtype: int,
    kind: int,
    grads: int,
    penalty: int,
    norms: int,
    cotangent: int,
    outer: int,
    length: int,
    inner: int,
    weight: float,
    target: float,
    workspace: int,
    stream: int,
) -> None: ...
def device_count() -> int: ...
def runtime_version() -> int: ...
