"""The op ``spectral_norm`` by CUDA C++: the group as one cooperative launch, each weight as it lies."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from lipgan._dtypes import accumulation_dtype
from lipgan.ops import _backend
from lipgan.ops._address import DTYPE_NUMBERS, address, addresses
from lipgan.ops.spectral_norm.layout import Layouts, as_lying, laid_alike, layouts_of


def _layers(
    shapes: Sequence[torch.Size], dims: Sequence[int], layouts: Layouts
) -> tuple[list[tuple[int, int, int, int]], list[int]]:
    """h, w, inner and channels of weights, and their numbers of elements."""
    layers, numels = [], [shape.numel() for shape in shapes]
    for layer, (shape, dim) in enumerate(zip(shapes, dims, strict=True)):
        h = shape[dim]
        w = numels[layer] // h
        _, inner, channels = (dim, w, w) if layouts is None else layouts[layer]
        layers.append((h, w, inner, channels))
    return layers, numels


def fwd(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    n_power_iterations: int,
    eps: float,
    dims: Sequence[int],
) -> tuple[list[Tensor], Tensor, Tensor]:
    module = _backend.cuda()
    assert module is not None
    device, dtype = weights[0].device, weights[0].dtype
    lying, layouts = layouts_of(weights, dims)
    layers, numels = _layers([weight.shape for weight in weights], dims, layouts)
    copies: list[Tensor] = []
    us, vs = [u.contiguous() for u in us], [v.contiguous() for v in vs]
    weight_addresses = addresses(lying, dtype, numels, device, copies, is_plain=layouts is None)
    u_addresses = addresses(us, dtype, [h for h, _, _, _ in layers], device, copies)
    v_addresses = addresses(vs, dtype, [w for _, w, _, _ in layers], device, copies)
    ys = [torch.empty_like(weight) for weight in lying]
    uv = torch.empty(sum([h + w for h, w, _, _ in layers]), dtype=dtype, device=device)
    sigma = torch.empty(len(weights), dtype=accumulation_dtype(dtype), device=device)
    rows, new_u, itemsize = [], uv.data_ptr(), dtype.itemsize
    for weight, u, v, y, layer in zip(weight_addresses, u_addresses, v_addresses, ys, layers, strict=True):
        new_v = new_u + layer[0] * itemsize
        rows.append((weight, u, v, y.data_ptr(), new_u, new_v, *layer))
        new_u = new_v + layer[1] * itemsize
    workspace_size = module.spectral_norm_fwd_workspace(rows)
    table_size = module.spectral_norm_fwd_table_size(len(rows))
    workspace = torch.empty(workspace_size, dtype=torch.uint8, device=device)
    table = torch.empty(table_size, dtype=torch.uint8, device=device)
    with torch.cuda.device(device):
        module.spectral_norm_fwd(
            DTYPE_NUMBERS[dtype],
            rows,
            address(sigma, sigma.dtype, len(rows), device.type),
            n_power_iterations,
            eps,
            address(workspace, torch.uint8, workspace_size, device.type),
            address(table, torch.uint8, table_size, device.type),
            torch.cuda.current_stream(device).cuda_stream,
        )
    return as_lying(ys, weights, lying), sigma, uv


@functools.lru_cache(maxsize=256)
def _bwd_sizes(
    shapes: tuple[torch.Size, ...], dims: tuple[int, ...], layouts: Layouts
) -> tuple[list[tuple[int, int, int, int]], list[int], int]:
    """:func:`_layers` of weights, and the bytes of workspace for them."""
    module = _backend.cuda()
    assert module is not None
    layers, numels = _layers(shapes, dims, layouts)
    return layers, numels, module.spectral_norm_bwd_workspace([(0, 0, 0, 0, 0, *layer) for layer in layers])


def bwd(
    grad_ys: Sequence[Tensor],
    grad_sigma: Tensor | None,
    ys: Sequence[Tensor],
    sigma: Tensor,
    uv: Tensor,
    dims: Sequence[int],
) -> list[Tensor]:
    module = _backend.cuda()
    assert module is not None
    device, dtype, count = ys[0].device, ys[0].dtype, len(ys)
    lying, layouts = layouts_of(ys, dims)
    grads = laid_alike(grad_ys, lying, layouts)
    uv, sigma = uv.contiguous(), sigma.contiguous()
    scalars = accumulation_dtype(dtype)
    copies: list[Tensor] = []
    layers, numels, size = _bwd_sizes(tuple([y.shape for y in ys]), tuple(dims), layouts)
    (u,) = addresses((uv,), dtype, (sum([h + w for h, w, _, _ in layers]),), device, copies)
    values = (sigma,) if grad_sigma is None else (sigma, grad_sigma.contiguous())
    sigma_address, *grad_sigma_address = addresses(values, scalars, (count,) * len(values), device, copies)
    grad_addresses = addresses(grads, dtype, numels, device, copies, is_plain=layouts is None)
    y_addresses = addresses(lying, dtype, numels, device, copies, is_plain=layouts is None)
    results = [torch.empty_like(y) for y in lying]
    rows, itemsize = [], dtype.itemsize
    for grad, y, result, layer in zip(grad_addresses, y_addresses, results, layers, strict=True):
        v = u + layer[0] * itemsize
        rows.append((grad, y, u, v, result.data_ptr(), *layer))
        u = v + layer[1] * itemsize
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    with torch.cuda.device(device):
        module.spectral_norm_bwd(
            DTYPE_NUMBERS[dtype],
            rows,
            sigma_address,
            *(grad_sigma_address or (0,)),
            address(workspace, torch.uint8, size, device.type),
            torch.cuda.current_stream(device).cuda_stream,
        )
    return as_lying(results, ys, lying)
