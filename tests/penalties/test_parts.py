"""Samples of several tensors: the penalty is that of their concatenation, whatever the engine."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from devices import DEVICE
from torch import Tensor, nn

import lipgan
from lipgan.penalties import explain


class Graph(nn.Module):
    """A critic of nodes ``[B, n, c]`` and edges ``[B, n, n]``, and of labels."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.first = nn.Linear(3, 8, dtype=dtype)
        self.second = nn.Linear(8, 8, dtype=dtype)
        self.last = nn.Linear(8, 1, dtype=dtype)

    def forward(self, nodes: Tensor, edges: Tensor, labels: Tensor | None = None) -> Tensor:
        hidden = torch.tanh(edges.to(nodes.dtype) @ self.first(nodes))
        hidden = torch.nn.functional.silu(edges.to(nodes.dtype) @ self.second(hidden))
        score = self.last(hidden.mean(1)).squeeze(1)
        return score if labels is None else score * labels


def graphs(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    nodes = torch.randn(5, 4, 3, dtype=torch.float64, generator=generator)
    return nodes.to(dtype), torch.rand(5, 4, 4, dtype=torch.float64, generator=generator).to(dtype)


def textbook(critic: Callable[..., Tensor], parts: tuple[Tensor, ...], kind: str, args: tuple[Any, ...] = ()) -> Tensor:
    """The penalty at given points, of weight 10 and target 1."""
    points = tuple(part.detach().requires_grad_() for part in parts)
    gradients = torch.autograd.grad(critic(*points, *args).sum(), points, create_graph=True)
    squares = torch.stack([(g**2).flatten(1).sum(1) for g in gradients]).sum(0)
    return 5 * squares.mean() if kind in ("r1", "r2") else 10 * (squares.sqrt() - 1).square().mean()


def gradients_of(penalty: Tensor, critic: nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(penalty, list(critic.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, critic.parameters(), strict=True)]


def mixture(real: tuple[Tensor, ...], fake: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    """One number for each sample, the same for all of its tensors."""
    eps = torch.rand(real[0].shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return tuple(
        eps.view(-1, *[1] * (r.ndim - 1)) * r + (1 - eps.view(-1, *[1] * (r.ndim - 1))) * f
        for r, f in zip(real, fake, strict=True)
    )


@pytest.mark.parametrize("engine", ["auto", "fused", "autograd"])
@pytest.mark.parametrize("kind", ["r1", "r2", "r1+r2", "wgan-gp"])
def test_the_penalty_is_that_of_all_parts_together(kind: str, engine: str) -> None:
    torch.manual_seed(0)
    critic, real, fake = Graph(), graphs(1), graphs(2)
    labels = torch.tensor([1.0, -2, 3, 0.5, 1], dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    ours = lipgan.gradient_penalty(
        critic, real, fake, kind=kind, engine=engine, generator=generator, critic_args=(labels,)
    )
    if kind == "wgan-gp":
        expected = textbook(critic, mixture(real, fake, 3), kind, (labels,))
    else:
        taken = {"r1": [real], "r2": [fake], "r1+r2": [real, fake]}[kind]
        expected = torch.stack([textbook(critic, points, "r1", (labels,)) for points in taken]).sum()
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    for a, b in zip(gradients_of(ours, critic), gradients_of(expected, critic), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("engine", ["fused", "autograd"])
def test_a_dict_is_one_argument_and_a_list_is_several(engine: str) -> None:
    torch.manual_seed(0)
    critic, real = Graph(), graphs(1)
    expected = textbook(critic, real, "r1")
    named = {"nodes": real[0], "edges": real[1]}
    by_dict = lipgan.gradient_penalty(lambda batch: critic(**batch), named, kind="r1", engine=engine)
    by_list = lipgan.gradient_penalty(critic, list(real), kind="r1", engine=engine)
    torch.testing.assert_close(by_dict, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(by_list, expected, rtol=1e-12, atol=0)


def test_the_fused_engine_follows_and_explain_says_so() -> None:
    assert explain(Graph(), graphs(1)) is None


def test_the_noise_of_dragan_is_as_wide_as_each_part() -> None:
    seen: list[tuple[Tensor, ...]] = []

    def critic(*parts: Tensor) -> Tensor:
        seen.append(tuple(part.detach() for part in parts))
        return torch.stack([part.flatten(1).sum(1) for part in parts]).sum(0)

    small, large = torch.randn(64, 50, dtype=torch.float64), 1000 * torch.randn(64, 7, 7, dtype=torch.float64)
    lipgan.gradient_penalty(critic, (small, large), kind="dragan", engine="autograd")
    for part, noisy in zip((small, large), seen[0], strict=True):
        share = (noisy - part) / part.std(correction=0)
        assert 0 <= float(share.min()) < 0.05
        assert 0.45 < float(share.max()) <= 0.5


def test_parts_keep_their_dtypes_and_single_numbers_are_a_part() -> None:
    seen: list[list[tuple[torch.dtype, tuple[int, ...]]]] = []

    def critic(*parts: Tensor) -> Tensor:
        seen.append([(part.dtype, tuple(part.shape)) for part in parts])
        return parts[0].square().sum(1) + parts[1].double().square() * 2

    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float32)
    ours = lipgan.gradient_penalty(critic, (x, y), kind="r1", weight=2.0)
    assert seen[0] == [(torch.float64, (6, 3)), (torch.float32, (6,))]
    torch.testing.assert_close(ours, ((2 * x).square().sum(1) + (4 * y.double()).square()).mean(), rtol=1e-6, atol=0)


def test_one_tensor_in_a_tuple_is_that_tensor() -> None:
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    x = torch.randn(16, 3)
    alone = lipgan.gradient_penalty(critic, x, kind="r1")
    torch.testing.assert_close(lipgan.gradient_penalty(critic, (x,), kind="r1"), alone, rtol=1e-5, atol=0)


def test_a_critic_that_couples_samples_takes_two_batches() -> None:
    torch.manual_seed(0)

    class Coupled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3, dtype=torch.float64, momentum=0.0)
            self.last = nn.Linear(5, 1, dtype=torch.float64)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.tanh(self.last(torch.cat([self.norm(a), b.tanh()], 1)))

    critic = Coupled()
    real = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    fake = torch.randn(8, 3, dtype=torch.float64) * 3 + 1, torch.randn(8, 2, dtype=torch.float64)
    both = lipgan.gradient_penalty(critic, real, fake, kind="r1+r2")
    torch.testing.assert_close(both, textbook(critic, real, "r1") + textbook(critic, fake, "r1"), rtol=1e-10, atol=0)


A, B = torch.randn(4, 3), torch.randn(4, 2, 2)


@pytest.mark.parametrize(
    ("real", "fake", "error", "sentence"),
    [
        ((), None, ValueError, r"real must hold at least one tensor, got \(\)"),
        ({}, None, ValueError, r"real must hold at least one tensor, got \{\}"),
        ((A, B[:3]), None, ValueError, r"real\[1\] must hold as many samples as real\[0\], 4, got 3"),
        ((A, B.to("meta")), None, ValueError, rf"real\[1\] must be on the device of real\[0\], {DEVICE}, got meta"),
        ({"a": A, "b": B.long()}, None, TypeError, r"real\['b'\] must be float32.* got torch.int64"),
        ((A, (B, B)), None, TypeError, r"real\[1\] must be a tensor, got tuple"),
        ((A, B), A, ValueError, r"fake must consist of what real does: 0 of shape \[B, 3\], 1 of .*, got one tensor"),
        (A, (A, B), ValueError, r"fake must consist of what real does: one tensor, got 0 of shape \[B, 3\], 1 of"),
        ((A, B), (B, A), ValueError, r"fake must consist of .* got 0 of shape \[B, 2, 2\], 1 of shape \[B, 3\]"),
        ({"a": A}, {"b": A}, ValueError, r"fake must consist of what real does: 'a' of .* got 'b' of shape \[B, 3\]"),
        ((A, B), (A[:2], B[:2]), ValueError, r"fake must have the shape of real"),
    ],
)
def test_bad_parts_are_named(real: Any, fake: Any, error: type[Exception], sentence: str) -> None:
    critic = Graph()
    kind = "r1" if fake is None else "r1+r2"
    with pytest.raises(error, match=sentence):
        lipgan.gradient_penalty(critic, real, fake, kind=kind)


def test_the_norm_of_pixels_wants_one_tensor() -> None:
    with pytest.raises(
        ValueError, match="real must have a dimension of channels for norm 'pixel', got several tensors"
    ):
        lipgan.gradient_penalty(Graph(), graphs(1), kind="r1", norm="pixel")
