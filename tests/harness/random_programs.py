"""Random programs of tensor operations, as critics that no one would write: axes are taken for that of the batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Samples in a batch, and the width of many of the tensors.
BATCH = 4
_Operation = Callable[[Tensor, Tensor, "_Draws"], Tensor]


@dataclass(frozen=True)
class _Draws:
    """What an operation has been given to choose by."""

    numbers: tuple[int, int, int]
    shuffle: int

    def dim(self, a: Tensor, which: int = 0) -> int:
        return self.numbers[which] % a.ndim

    def index(self, a: Tensor, which: int = 1) -> int:
        return self.numbers[which] % a.shape[self.dim(a)]

    def permutation(self, n: int) -> list[int]:
        order = list(range(n))
        random.Random(self.shuffle).shuffle(order)
        return order

    def shape(self, n: int) -> tuple[int, ...]:
        """One of n numbers, in two or three dimensions."""
        pairs = [(p, n // p) for p in range(1, n + 1) if n % p == 0]
        shapes = [*pairs, *((p, q, r // q) for p, r in pairs for q in (2, 3, 4) if r % q == 0)]
        return shapes[self.shuffle % len(shapes)]


def _rotated(a: Tensor, dim: int) -> Tensor:
    return torch.cat([a.narrow(dim, 1, a.shape[dim] - 1), a.narrow(dim, 0, 1)], dim)


def _added_in_place(a: Tensor, dim: int, to: int, of: int) -> Tensor:
    a = a * 1
    a.select(dim, to).add_(a.select(dim, of).clone())
    return a


# Of a tensor, of another one, and of what has been drawn.
OPERATIONS: dict[str, _Operation] = {
    "sin": lambda a, b, d: a.sin(),
    "relu": lambda a, b, d: a.relu(),
    "leaky relu": lambda a, b, d: F.leaky_relu(a, 0.2),
    "add": lambda a, b, d: a + b,
    "mul": lambda a, b, d: a * b,
    "sub the transpose": lambda a, b, d: a - b.mT,
    "where": lambda a, b, d: torch.where(a > 0, a, b),
    "permute": lambda a, b, d: a.permute(d.permutation(a.ndim)),
    "transpose": lambda a, b, d: a.transpose(d.dim(a), d.dim(a, 1)),
    "reshape": lambda a, b, d: a.reshape(d.shape(a.numel())),
    "view": lambda a, b, d: a.contiguous().view(d.shape(a.numel())),
    "flatten": lambda a, b, d: a.flatten(),
    "flatten samples": lambda a, b, d: a.flatten(1),
    "unsqueeze": lambda a, b, d: a.unsqueeze(d.dim(a)),
    "squeeze": lambda a, b, d: a.squeeze(),
    "expand": lambda a, b, d: a.expand(2, *a.shape),
    "repeat": lambda a, b, d: a.repeat(2, *[1] * (a.ndim - 1)),
    "repeat_interleave": lambda a, b, d: a.repeat_interleave(2, d.dim(a)),
    "select": lambda a, b, d: a.select(d.dim(a), d.index(a)),
    "narrow": lambda a, b, d: a.narrow(d.dim(a), d.index(a), a.shape[d.dim(a)] - d.index(a)),
    "step": lambda a, b, d: a[::2],
    "index_select": lambda a, b, d: a.index_select(d.dim(a), torch.tensor([d.index(a), d.index(a, 2)])),
    "unbind": lambda a, b, d: a.unbind(d.dim(a))[d.index(a)],
    "split": lambda a, b, d: a.split(2, d.dim(a))[0],
    "chunk": lambda a, b, d: a.chunk(2, d.dim(a))[-1],
    "cat": lambda a, b, d: torch.cat([a, b], d.dim(a)),
    "stack": lambda a, b, d: torch.stack([a, b], d.dim(a)),
    "rotated": lambda a, b, d: _rotated(a, d.dim(a)),
    "roll": lambda a, b, d: a.roll(1, d.dim(a)),
    "flip": lambda a, b, d: a.flip(d.dim(a)),
    "sum": lambda a, b, d: a.sum(d.dim(a)),
    "center": lambda a, b, d: a - a.mean(d.dim(a), keepdim=True),
    "total": lambda a, b, d: a.sum() * b,
    "amax": lambda a, b, d: a.amax(d.dim(a)),
    "max": lambda a, b, d: a.max(d.dim(a)).values,
    "cumsum": lambda a, b, d: a.cumsum(d.dim(a)),
    "softmax": lambda a, b, d: a.softmax(d.dim(a)),
    "sort": lambda a, b, d: a.sort(d.dim(a)).values,
    "logsumexp": lambda a, b, d: a.logsumexp(d.dim(a)),
    "norm": lambda a, b, d: (a + 0.1).norm(dim=d.dim(a)),
    "product": lambda a, b, d: a @ b,
    "square": lambda a, b, d: a @ a.mT,
    "linear": lambda a, b, d: F.linear(a, b),
    "bmm": lambda a, b, d: torch.bmm(a, b),
    "einsum": lambda a, b, d: torch.einsum("ij,kj->ik", a, b),
    "outer": lambda a, b, d: torch.einsum("bi,bj->bij", a, b),
    "layer norm": lambda a, b, d: F.layer_norm(a, a.shape[-1:]),
    "layer norm of samples": lambda a, b, d: F.layer_norm(a, a.shape[1:]),
    "group norm": lambda a, b, d: F.group_norm(a, 1),
    "convolution": lambda a, b, d: F.conv1d(a, b),
    "pool": lambda a, b, d: F.avg_pool1d(a, 2),
    "pad": lambda a, b, d: F.pad(a, (1, 1)),
    "move": lambda a, b, d: F.pad(a, (0, 0, 1, -1)),
    "gather": lambda a, b, d: a.gather(d.dim(a), torch.zeros(a.shape, dtype=torch.long)),
    "unfold": lambda a, b, d: a.unfold(d.dim(a), 2, 1),
    "diagonal": lambda a, b, d: a.diagonal(dim1=d.dim(a), dim2=d.dim(a, 1)),
    "tril": lambda a, b, d: a.tril(),
    "attention": lambda a, b, d: F.scaled_dot_product_attention(a, a, a),
    "index_add": lambda a, b, d: (a * 1).index_add_(
        d.dim(a), torch.tensor([d.index(a)]), a.narrow(d.dim(a), d.index(a, 2), 1)
    ),
    "detached mean": lambda a, b, d: a.detach().mean(d.dim(a), keepdim=True) + a,
    "added in place": lambda a, b, d: _added_in_place(a, d.dim(a), d.index(a), d.index(a, 2)),
}


@dataclass(frozen=True)
class Program:
    """Operations in a row, each of results and parameters before it.

    Attributes:
        width: of a sample.
        steps: (operation, places of its two operands, what it chooses by).
        ending: how scores are made of the last result, and along which of its dimensions they lie.
        seed: of the parameters.
    """

    width: tuple[int, ...]
    steps: list[tuple[str, int, int, _Draws]]
    ending: tuple[int, int]
    seed: int

    def parameters(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        shapes = (4, 4), (self.width[-1], 6), (4,), (1, 4), (4, 1), (3, 4, 1)
        return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]

    def __call__(self, x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        found = [*parameters, x * (1 + 0.1 * parameters[2].mean())]
        for name, a, b, draws in self.steps:
            found.append(OPERATIONS[name](found[a], found[b], draws))
        how, dim = self.ending
        last = found[-1].movedim(dim, 0).flatten(1) if found[-1].ndim > 1 else found[-1][:, None]
        return (last.sum(1), last, last.tanh().mean(1, keepdim=True))[how]


class Critic(nn.Module):
    """A program, and parameters of its own."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.tensors = nn.ParameterList([nn.Parameter(tensor) for tensor in program.parameters()])

    def forward(self, x: Tensor) -> Tensor:
        return self.program(x, list(self.tensors))


def draw(seed: int) -> tuple[Program, Tensor] | None:
    """A program, and samples for it; None where the numbers drawn lead to none."""
    rng = random.Random(seed)
    width = rng.choice([(4,), (6,), (4, 4), (3, 4), (4, 2), (4, 4, 4), (1,)])
    x = torch.randn(BATCH, *width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    program = Program(width, [], (0, 0), seed)
    found = [*program.parameters(), x.clone().requires_grad_()]
    for place in range(rng.randrange(2, 10)):
        for _ in range(12):  # operations that do not fit are drawn again
            a = len(found) - 1 - rng.choice([0, 0, 0, 1, 2])
            b = rng.randrange(len(found))
            draws = _Draws((rng.randrange(12), rng.randrange(12), rng.randrange(12)), rng.randrange(1000))
            # First the samples go to another dimension than the first, as often as not.
            name = "permute" if place == 0 and rng.random() < 0.5 else rng.choice(list(OPERATIONS))
            try:
                result = OPERATIONS[name](found[a], found[b], draws)
            except (RuntimeError, IndexError, ValueError, ZeroDivisionError):
                continue
            if 0 < result.numel() <= 2000:
                break
        else:
            return None
        program.steps.append((name, a, b, draws))
        found.append(result)
    dims = [dim for dim in range(found[-1].ndim) if found[-1].shape[dim] == BATCH]
    if not dims or not found[-1].requires_grad or not bool(found[-1].isfinite().all()):
        return None
    return Program(width, program.steps, (rng.randrange(3), rng.choice(dims)), seed), x


def all_of(seeds: Sequence[int]) -> list[tuple[Program, Tensor]]:
    """Those that are programs."""
    return [found for seed in seeds if (found := draw(seed)) is not None]


def dependence(program: Program, x: Tensor) -> Tensor:
    """Whether each score depends on each sample, ``[B, *scores]``: the samples are replaced, one at a time."""
    parameters = program.parameters()
    others = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(program.seed + 1))
    expected, found = program(x, parameters), []
    for k in range(len(x)):
        changed = x.clone()
        changed[k] = others[k]
        found.append((program(changed, parameters) - expected).abs() > 1e-9)
    return torch.stack(found)
