"""How steep a critic is: a certified upper bound on its Lipschitz constant, and an empirical lower one.

The upper bound follows one forward pass, operation by operation; ``_RULES`` is the table of what is known of each. See
docs/numerics/lipschitz.md.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm as _TorchHook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from lipgan.linalg import conv_spectral_norm_bound, spectral_norm_bound
from lipgan.nn.group_sort import GroupSort
from lipgan.nn.orthogonal import windows_per_input
from lipgan.nn.spectral_norm_group import SpectralNormGroup

__all__ = ["Bounds", "bounds"]

aten = torch.ops.aten

# Of matrices: rank^(2^-25) is within 3e-7 of 1 for every rank up to 10^4. The products cost little next to the blocks
# of a convolution.
_MATRIX_ITERATIONS = 24

# Bytes of the frequency blocks of a convolution beyond which only its reshaped kernel is bounded.
_BLOCK_BYTES = 2**30


@dataclass(frozen=True)
class Bounds:
    """Enclosure of a Lipschitz constant in the Euclidean norm: ``lower <= constant <= upper``.

    Attributes:
        upper: certified, for all inputs of the shape that was met.
        lower: the largest norm of a gradient that was found.
    """

    upper: float
    lower: float


# ---- arithmetic that rounds up ----


def _up(x: float) -> float:
    """The next larger number; 0 stays, as a product of factors far from underflow."""
    return math.nextafter(x, math.inf) if x > 0 else x


def _times(a: float, b: float) -> float:
    return a if b == 1 else b if a == 1 else _up(a * b)


def _plus(a: float, b: float) -> float:
    return a if b == 0 else b if a == 0 else _up(a + b)


def _root(x: float) -> float:
    root = math.sqrt(x)
    return root if root * root == x and root.is_integer() else _up(root)


def _joint(parts: Iterable[float]) -> float:
    """Norm of the vector of the constants of several results."""
    total = 0.0
    for part in parts:
        total = _plus(total, _times(part, part))
    return _root(total)


def _largest(t: Tensor) -> float:
    return float(t.detach().abs().max()) if t.numel() else 0.0


# ---- the walk along a forward pass ----


class _Unknown(Exception):
    """An operation without a rule; the text says which."""


Rule = Callable[["_Walk", Any, Sequence[Any], dict[str, Any], Any], float]

_RULES: dict[Any, Rule] = {}


def _rule(*funcs: Any) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for func in funcs:
            _RULES[func] = function
        return function

    return register


class _Walk(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes for each tensor an upper bound on the Lipschitz constant of the map from the input to it.

    Tensors count as vectors of all their entries, the batch included, so an operation may mix what it likes.
    """

    def __init__(self, x: Tensor, n_iterations: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.constants: Any = WeakIdKeyDictionary()
        self.constants[x] = 1.0
        self.n_iterations = n_iterations
        self.suspended = False
        self.modules: list[str] = []

    def constant(self, item: Any) -> float:
        """That of a tensor; 0 for what does not depend on the input."""
        return float(self.constants.get(item, 0.0)) if isinstance(item, Tensor) else 0.0

    def depends(self, item: Any) -> bool:
        return isinstance(item, Tensor) and item in self.constants

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.suspended or not any(self.depends(item) for item in _tensors((args, kwargs))):
            return func(*args, **kwargs)
        if func in _IN_PLACE:
            return self._in_place(func, args, kwargs)
        rule = _RULES.get(func)
        if rule is None:
            raise self.unknown(f"operation {func}")
        result = func(*args, **kwargs)
        try:
            constant = rule(self, func, args, kwargs, result)
        except _Unknown as error:
            raise self.unknown(str(error)) from None
        self.note(constant, result)
        return result

    def note(self, constant: float, result: Any) -> None:
        for output in _tensors(result):
            if not output.is_floating_point():
                # Indices and masks have no Lipschitz constant.
                self.constants[output] = math.inf
            elif math.isfinite(constant):
                self.constants[output] = constant
            else:
                raise ValueError(
                    f"no finite Lipschitz bound in {self.where()}: weights or divisors are zero or not finite"
                )

    def _in_place(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if not self.depends(args[0]):
            raise self.unknown(f"operation {func} on a tensor that does not depend on the samples")
        rule, storage = _IN_PLACE[func], args[0].untyped_storage().data_ptr()
        # Other tensors in this memory change in some of their entries, by the map of the operation.
        sharing = [t for t in self.constants if t.untyped_storage().data_ptr() == storage]
        new = {id(t): _RULES[rule](self, rule, [t, *args[1:]], kwargs, args[0]) for t in sharing}
        result = func(*args, **kwargs)
        for t in sharing:
            self.note(new[id(t)] if t is args[0] else max(self.constant(t), new[id(t)]), t)
        self.note(self.constant(args[0]), result)
        return result

    def where(self) -> str:
        return f"module {self.modules[-1]}" if self.modules else "the critic"

    def unknown(self, what: str) -> ValueError:
        return ValueError(f"no Lipschitz bound is known for {what}, in {self.where()}")


def _tensors(item: Any) -> list[Tensor]:
    if isinstance(item, Tensor):
        return [item]
    if isinstance(item, dict):
        item = list(item.values())
    return [t for inner in item for t in _tensors(inner)] if isinstance(item, (list, tuple)) else []


# ---- the rules: operation, arguments, result -> constant of the result ----


@_rule(
    # Choices and orders of entries, zeros beside them.
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.alias.default,
    aten.detach.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
    aten.flip.default,
    aten.roll.default,
    aten.constant_pad_nd.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    # Extrema over separate sets of entries.
    aten.amax.default,
    aten.amin.default,
    # Activations with slopes of at most 1.
    aten.relu.default,
    aten.tanh.default,
    aten.hardtanh.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.clamp_max.default,
    aten.abs.default,
    aten.neg.default,
    aten.softplus.default,
    aten.log_sigmoid_forward.default,
    aten.sin.default,
    aten.cos.default,
)
def _same(walk: _Walk, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    return walk.constant(args[0])


# The largest slopes: of gelu at 2^(1/2), of its tanh form near it, of silu at 2.3994, rounded up.
_SLOPES = {aten.sigmoid.default: 0.25, aten.gelu.default: 1.13, aten.silu.default: 1.1}


@_rule(*_SLOPES)
def _slope(walk: _Walk, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    return _times(walk.constant(args[0]), _SLOPES[func])


@_rule(aten.leaky_relu.default)
def _leaky_relu(walk: _Walk, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    slope = args[1] if len(args) > 1 else 0.01
    return _times(walk.constant(args[0]), max(1.0, abs(slope)))


@_rule(aten.elu.default)
def _elu(walk: _Walk, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    options: list[float] = [*args[1:], *[1.0, 1.0, 1.0][len(args) - 1 :]]
    alpha, scale, input_scale = options
    # Slope scale on the right, at most scale alpha input_scale on the left.
    return _times(walk.constant(args[0]), _times(abs(scale), max(1.0, _times(abs(alpha), abs(input_scale)))))


@_rule(aten._prelu_kernel.default)
def _prelu(walk: _Walk, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    if walk.depends(args[1]):
        raise _Unknown(f"operation {func} with slopes that depend on the samples")
    return _times(walk.constant(args[0]), max(1.0, _largest(args[1])))


def _repeats(item: Any, result: Tensor) -> float:
    """The norm of broadcasting: each entry appears as often as the sizes say."""
    return max(1.0, _root(result.numel() / item.numel())) if isinstance(item, Tensor) and item.numel() else 1.0


@_rule(aten.expand.default)
def _expand(walk: _Walk, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    return _times(walk.constant(args[0]), _repeats(args[0], result))


@_rule(aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.rsub.Tensor)
def _add(walk: _Walk, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    alpha = abs(kwargs.get("alpha", args[2] if len(args) > 2 else 1))
    factors = (alpha, 1.0) if func in (aten.rsub.Scalar, aten.rsub.Tensor) else (1.0, alpha)
    parts = [
        _times(_times(walk.constant(t), _repeats(t, result)), factor)
        for t, factor in zip(args[:2], factors, strict=True)
    ]
    return _plus(*parts)


@_rule(aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar)
def _scale(walk: _Walk, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    a, b = args
    divides = func in (aten.div.Tensor, aten.div.Scalar)
    if walk.depends(b) and (divides or walk.depends(a)):
        raise _Unknown(f"operation {func} of two tensors that depend on the samples")
    x, c = (b, a) if walk.depends(b) else (a, b)
    if divides:
        smallest = float(c.detach().abs().min()) if isinstance(c, Tensor) else abs(c)
        factor = _up(1 / smallest) if smallest else math.inf
    else:
        factor = _largest(c) if isinstance(c, Tensor) else abs(c)
    return _times(_times(walk.constant(x), _repeats(x, result)), factor)


@_rule(aten.maximum.default, aten.minimum.default)
def _extremum(walk: _Walk, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    return _joint(_times(walk.constant(t), _repeats(t, result)) for t in args[:2])


@_rule(aten.cat.default, aten.stack.default)
def _join(walk: _Walk, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    return _joint(walk.constant(t) for t in args[0])


@_rule(aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim)
def _sum(walk: _Walk, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    count = args[0].numel() / max(result.numel(), 1)
    factor = _root(count) if func in (aten.sum.default, aten.sum.dim_IntList) else _root(_up(1 / count))
    return _times(walk.constant(args[0]), factor)


def _matrix_bound(matrix: Tensor) -> float:
    """Of the largest in a batch of matrices."""
    return _largest(spectral_norm_bound(matrix, n_iterations=_MATRIX_ITERATIONS))


@_rule(aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default)
def _product(walk: _Walk, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    a, b = args
    if walk.depends(a) and walk.depends(b):
        raise _Unknown(f"operation {func} of two tensors that depend on the samples")
    x, matrix = (a, b) if walk.depends(a) else (b, a)
    return _times(walk.constant(x), _matrix_bound(matrix if matrix.ndim > 1 else matrix[None]))


@_rule(aten.addmm.default, aten.addmv.default)
def _add_product(walk: _Walk, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    term, *operands = args[:3]
    product = _times(_product(walk, func, operands, {}, result), abs(kwargs.get("alpha", 1)))
    return _plus(product, _times(_times(walk.constant(term), _repeats(term, result)), abs(kwargs.get("beta", 1))))


def _conv_bound(
    weight: Tensor, size: Sequence[int], n_iterations: int, padding_mode: str = "zeros", **options: Any
) -> float:
    """The smaller one of two bounds: of the frequency blocks, and of the reshaped kernel times its windows."""
    transposed, groups, stride = options["transposed"], options["groups"], options["stride"]
    candidates = []
    windows = 0
    if padding_mode == "zeros":
        # A transposed convolution is the transpose of one whose kernel has the same reshaped matrix.
        blocks = weight.detach().reshape(groups, weight.shape[0] // groups, -1)
        windows = windows_per_input(tuple(weight.shape[2:]), tuple(stride), tuple(options["dilation"]))
        candidates.append(_times(_matrix_bound(blocks), _root(windows)))
    positions = 1
    for n, k, s, p in zip(size, weight.shape[2:], stride, options["padding"], strict=True):
        positions *= (n * s + k if transposed else n + p) + s
    # With one window for each input the reshaped kernel is the operator.
    if windows != 1 and 8 * weight.shape[0] * weight.shape[1] * positions <= _BLOCK_BYTES:
        bound = conv_spectral_norm_bound(
            weight.detach(), tuple(size), n_iterations=n_iterations, padding_mode=padding_mode, **options
        )
        candidates.append(float(bound))
    if not candidates:
        raise _Unknown(f"a convolution with {padding_mode} padding of the size {tuple(size)}")
    return math.nan if any(math.isnan(bound) for bound in candidates) else min(candidates)


@_rule(aten.convolution.default)
def _convolution(walk: _Walk, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args
    if walk.depends(weight) or walk.depends(bias):
        raise _Unknown(f"operation {func} with a kernel that depends on the samples")
    dims = weight.ndim - 2
    # One number serves all dimensions.
    stride, padding, dilation, output_padding = (
        [*value] * (dims // len(value)) for value in (stride, padding, dilation, output_padding)
    )
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if transposed:
        options["output_padding"] = output_padding
    bound = _conv_bound(weight, x.shape[-dims:], walk.n_iterations, transposed=transposed, **options)
    return _times(walk.constant(x), bound)


@_rule(aten.native_batch_norm.default, aten._native_batch_norm_legit_no_training.default, aten.cudnn_batch_norm.default)
def _batch_norm(walk: _Walk, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    x, weight, _, _, variance = args[:5]
    legit = func is aten._native_batch_norm_legit_no_training.default
    if not legit and args[5] is not False:
        raise _Unknown("batch normalization by the statistics of the batch")
    eps = args[-1]
    factors = 1 / torch.sqrt(variance.detach() + eps)
    if weight is not None:
        factors = factors * weight.detach()
    # A sum, a root, a quotient and a product: four roundings, and as many for what they do to each other.
    return _times(walk.constant(x), _largest(factors) * (1 + 8 * torch.finfo(factors.dtype).eps))


def _windows_of_pool(args: Sequence[Any]) -> tuple[tuple[int, ...], int]:
    """Kernel sizes of a pooling in two dimensions, and the windows that one input lies in."""
    kernel = tuple([*args[1]] * (2 // len(args[1])))
    stride = tuple([*args[2]] * (2 // len(args[2]))) if len(args) > 2 and args[2] else kernel
    dilation = (1, 1)
    if len(args) > 4 and isinstance(args[4], (list, tuple)):
        dilation = tuple([*args[4]] * (2 // len(args[4])))
    return kernel, windows_per_input(kernel, stride, dilation)


@_rule(aten.max_pool2d_with_indices.default)
def _max_pool(walk: _Walk, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    return _times(walk.constant(args[0]), _root(_windows_of_pool(args)[1]))


@_rule(aten.avg_pool2d.default)
def _avg_pool(walk: _Walk, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    options: list[Any] = [*args[3:], *[[0], False, True, None][max(len(args) - 3, 0) :]]
    padding, ceil_mode, count_include_pad, divisor = options
    if divisor is not None or (any(padding) and (ceil_mode or not count_include_pad)):
        raise _Unknown("average pooling with a divisor of its own, or with padding in an unusual mode")
    kernel, windows = _windows_of_pool(args[:3])
    smallest = math.prod(kernel)
    if ceil_mode:
        # The last window may reach beyond the input, and is then the mean of fewer entries.
        strides = [*args[2]] * (2 // len(args[2])) if args[2] else kernel
        last = [n - (m - 1) * s for n, m, s in zip(args[0].shape[-2:], result.shape[-2:], strides, strict=True)]
        smallest = math.prod(min(k, rest) for k, rest in zip(kernel, last, strict=True))
    return _times(walk.constant(args[0]), _root(_up(windows / smallest)))


@_rule(aten._adaptive_avg_pool2d.default)
def _adaptive_avg_pool(walk: _Walk, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    x = args[0]
    if any(n % m for n, m in zip(x.shape[-2:], result.shape[-2:], strict=True)):
        raise _Unknown("adaptive average pooling to a size that does not divide the input's")
    return _times(walk.constant(x), _root(_up(result.numel() / max(x.numel(), 1))))


@_rule(aten.upsample_nearest1d.default, aten.upsample_nearest2d.default, aten.upsample_nearest3d.default)
def _upsample(walk: _Walk, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    copies = 1
    for n, m in zip(args[0].shape[2:], result.shape[2:], strict=True):
        # Where the sizes do not divide, rounding decides which of the inputs has one copy more.
        copies *= m // n if m % n == 0 else m // n + 2
    return _times(walk.constant(args[0]), _root(copies))


# Changes in place that have the rules of what they do.
_IN_PLACE = {
    aten.relu_.default: aten.relu.default,
    aten.leaky_relu_.default: aten.leaky_relu.default,
    aten.elu_.default: aten.elu.default,
    aten.tanh_.default: aten.tanh.default,
    aten.sigmoid_.default: aten.sigmoid.default,
    aten.hardtanh_.default: aten.hardtanh.default,
    aten.neg_.default: aten.neg.default,
    aten.add_.Tensor: aten.add.Tensor,
    aten.sub_.Tensor: aten.sub.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.div_.Tensor: aten.div.Tensor,
}


# ---- modules whose operations say less than is known of the whole ----


def _whole(module: nn.Module) -> bool:
    circular = getattr(module, "padding_mode", "zeros") == "circular"
    return isinstance(module, GroupSort) or (isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and circular)


def _of_module(walk: _Walk, module: nn.Module, x: Tensor) -> float:
    if isinstance(module, GroupSort):
        return walk.constant(x)
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    dims = len(module.kernel_size)
    bound = _conv_bound(
        module.weight,
        x.shape[-dims:],
        walk.n_iterations,
        "circular",
        stride=module.stride,
        padding=module._reversed_padding_repeated_twice[::-2],
        dilation=module.dilation,
        groups=module.groups,
        transposed=False,
    )
    return _times(walk.constant(x), bound)


def _attend(walk: _Walk, name: str, module: nn.Module) -> None:
    """Let the walk know when the forward of ``module`` begins and ends."""
    whole = _whole(module)
    description = f"{name!r} ({type(module).__name__})" if name else type(module).__name__

    def before(_: nn.Module, args: Any) -> None:
        walk.modules.append(description)
        if whole:
            walk.suspended = True

    def after(_: nn.Module, args: Any, output: Any) -> None:
        if whole:
            walk.suspended = False
            if walk.depends(args[0]):
                walk.note(_of_module(walk, module, args[0]), output)
        walk.modules.pop()

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


# ---- a copy with plain weights ----


def _settle(module: nn.Module) -> None:
    """Replace what is parametrized by its effective values.

    torch's remove_parametrizations takes the property from the class, which a copy shares with the module it is of.
    """
    names = list(module.parametrizations)  # type: ignore[arg-type]
    with torch.no_grad():
        values = {name: getattr(module, name).clone() for name in names}
    module.__class__ = type(module).__bases__[0]
    del module._modules["parametrizations"]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))


def _plain_copy(critic: nn.Module) -> nn.Module:
    """The critic as it acts in eval mode, with its effective weights as parameters, in float64 and without hooks."""
    # Some modules keep weights that were computed, which deepcopy refuses.
    held = [item for module in critic.modules() for item in vars(module).values() if isinstance(item, Tensor)]
    critic = copy.deepcopy(critic, {id(t): t.detach().clone() for t in held}).eval()
    for name, module in list(critic.named_modules()):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, _TorchHook):
                    torch.nn.utils.remove_spectral_norm(module, hook.name)
                elif isinstance(getattr(hook, "__self__", None), SpectralNormGroup):
                    del hooks[key]
                else:
                    kind = type(module).__name__
                    raise ValueError(f"no Lipschitz bound is known for the hook {hook!r} of module {name!r} ({kind})")
        if parametrize.is_parametrized(module):
            _settle(module)
    return critic.double().requires_grad_(False)


# ---- the two bounds ----


def _upper(critic: nn.Module, x: Tensor, labels: Tensor | None, n_iterations: int) -> float:
    if labels is None:
        x = x[:1]
    else:
        # What is added or multiplied for a label counts for that label only: one sample of each.
        _, inverse = torch.unique(labels, return_inverse=True)
        first = [int((inverse == k).nonzero()[0]) for k in range(int(inverse.max()) + 1)]
        x, labels = x[first], labels[first]
    critic = copy.deepcopy(critic)
    x = x.clone()
    walk = _Walk(x, n_iterations)
    for name, module in critic.named_modules():
        _attend(walk, name, module)
    with torch.no_grad(), walk:
        scores = critic(x) if labels is None else critic(x, labels)
    if not isinstance(scores, Tensor) or scores.shape != x.shape[:1]:
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"critic must return scores of shape ({x.shape[0]},), got {shape}")
    return walk.constant(scores)


def _slopes(critic: nn.Module, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients ``[B, ...]`` of the scores at the samples, and their norms ``[B]``."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        scores = critic(x) if labels is None else critic(x, labels)
        if not scores.requires_grad:
            return torch.zeros_like(x), x.new_zeros(x.shape[0])
        (gradient,) = torch.autograd.grad(scores.sum(), x, materialize_grads=True)
    return gradient, torch.linalg.vector_norm(gradient.flatten(1), dim=1)


def _lower(critic: nn.Module, data: Tensor, labels: Tensor | None, batch_size: int, steps: int) -> float:
    # A stream of its own: the same answer every time, and no draw from the caller's.
    generator = torch.Generator(data.device).manual_seed(0)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)

    spread = float((data - data.mean(0)).flatten(1).square().mean().sqrt()) or float(data.abs().max()) or 1.0
    best: list[tuple[Tensor, Tensor, Tensor | None]] = []
    for start in range(0, data.shape[0], batch_size):
        x = data[start : start + batch_size]
        y = None if labels is None else labels[start : start + batch_size]
        # Points between two samples of the batch too: there a critic that separates them is steep.
        share = torch.rand(x.shape[0], generator=generator, dtype=x.dtype, device=x.device)
        share = share.reshape(-1, *[1] * (x.ndim - 1))
        order = torch.randperm(x.shape[0], generator=generator, device=x.device)
        for points in (x, share * x + (1 - share) * x[order]):
            # On a kink autograd's answer need not be a slope of the critic; beside it, it is.
            points = points + 1e-9 * spread * noise(points)
            _, norms = _slopes(critic, points, y)
            kept = norms.topk(min(len(norms), 32)).indices
            best.append((norms[kept], points[kept], None if y is None else y[kept]))
    norms = torch.cat([part[0] for part in best])
    kept = norms.topk(min(len(norms), 32)).indices
    norms, x = norms[kept], torch.cat([part[1] for part in best])[kept]
    y = None if labels is None else torch.cat([part[2] for part in best if part[2] is not None])[kept]
    # The slope of a piecewise linear critic has no derivative to follow: points move by chance, along the gradient
    # and beside it, and go back from where it is less steep.
    for step in range(steps):
        gradient, _ = _slopes(critic, x, y)
        direction = gradient / norms.clamp_min(1e-300).reshape(-1, *[1] * (x.ndim - 1))
        length = spread * 2.0 ** (2 - step % 8)
        side = noise(x) / math.sqrt(x[0].numel())
        turn = torch.randint(0, 3, (x.shape[0],), generator=generator, device=x.device) - 1
        turn = turn.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        candidates = x + length * (turn * direction + side)
        _, found = _slopes(critic, candidates, y)
        better = found >= norms  # across plateaus too
        x = torch.where(better.reshape(-1, *[1] * (x.ndim - 1)), candidates, x)
        norms = torch.where(better, found, norms)
    return float(norms.max())


def bounds(
    critic: nn.Module,
    data: Tensor,
    labels: Tensor | None = None,
    *,
    batch_size: int = 256,
    steps: int = 16,
    n_iterations: int = 10,
) -> Bounds:
    """Enclose the Lipschitz constant of a critic, in the Euclidean norm of one sample.

    The critic is taken as it acts in eval mode: batch normalization by its running statistics, spectral normalization
    with the vectors it has, orthogonal layers with their factors. It is not changed.

    ``upper`` holds for every two inputs of the shape of a sample (and, of a critic with labels, for the labels given)
    and the critic in exact arithmetic with its weights as stored. It is the product over layers, the sum where
    branches are added, of certified norms: every rounding in it goes up. Known are Linear and convolution layers,
    activations, GroupSort, batch normalization, pooling, nearest upsampling, shapes, joins and sums.

    ``lower`` is the largest norm of a gradient, in float64, at the samples, between pairs of them, and at points that a
    random search reaches from the steepest of these. It is deterministic.

    Args:
        critic: maps samples ``[B, ...]`` (and labels ``[B]``) to scores ``[B]``, each of its own sample only.
        data: ``[N, ...]``, N at least 1, floating point, on the device of the critic.
        labels: ``[N]``, int64, of a critic that takes them.
        batch_size: samples in one forward.
        steps: of the search.
        n_iterations: Gram products for the frequency blocks of a convolution; they exceed its norm by the factor
            ``rank^(2^-(n_iterations + 1))``, and are most of the cost.

    Raises:
        TypeError: ``critic`` is no module, ``data`` no floating-point tensor.
        ValueError: an operation without a known bound (the message names its module), weights that are not finite,
            scores of another shape, empty or not finite data, or a number out of its range.

    Example:
        >>> bounds(critic, images).upper  # 1.0000001 for the critic of lipgan.models.build("lipschitz", (1, 16, 16))

    Source: Szegedy et al. 2013, "Intriguing properties of neural networks", Section 4.3, for the product; the norms
    are those of :func:`lipgan.linalg.spectral_norm_bound` and :func:`lipgan.linalg.conv_spectral_norm_bound`.
    """
    if not isinstance(critic, nn.Module):
        raise TypeError(f"critic must be a torch.nn.Module, got {type(critic).__name__}")
    if not isinstance(data, Tensor) or not data.is_floating_point():
        got = data.dtype if isinstance(data, Tensor) else type(data).__name__
        raise TypeError(f"data must be a floating-point tensor, got {got}")
    if data.ndim < 2 or data.numel() == 0:
        raise ValueError(f"data must be samples [N, ...] with N at least 1, got shape {tuple(data.shape)}")
    if not bool(data.isfinite().all()):
        raise ValueError("data must be finite, got entries that are NaN or infinite")
    if labels is not None and labels.shape != data.shape[:1]:
        raise ValueError(f"labels must have the shape ({data.shape[0]},), got {tuple(labels.shape)}")
    for name, value, least in (("batch_size", batch_size, 1), ("steps", steps, 0), ("n_iterations", n_iterations, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
    plain = _plain_copy(critic)
    data = data.detach().double()
    upper = _upper(plain, data, labels, n_iterations)
    lower = _lower(plain, data, labels, batch_size, steps)
    # The norm of a gradient is rounded, some 1e-15 of it, where the bound is exact.
    if lower > upper * (1 + 1e-9):
        raise RuntimeError(
            f"lower bound {lower:.17g} above upper bound {upper:.17g}: do samples change others' scores?"
        )
    return Bounds(upper, min(lower, upper))
