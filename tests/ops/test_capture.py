"""Which ops a CUDA graph cannot hold: those that the host reads something from on their way.

They carry ``torch.Tag.cudagraph_unsafe``, by which torch.compile leaves them out of its graphs.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import lipgan.penalties.draws
import lipgan.penalties.traced_scores  # noqa: F401  (both define ops)
from lipgan.bench import overhead
from lipgan.ops import use_backend

# Op -> why.
UNSAFE = {
    "matrix_sqrt_fwd": "refuses matrices by their entries, and waits for the eigenvalues",
    "polar_fwd": "refuses matrices by their entries, and waits for the eigenvalues",
    "polar_factor_fwd": "takes steps until they have converged",
    "polar_factor_bwd": "takes steps until they have converged",
    "critic_penalty": "compares in Python, at each call, what a critic depends on",
    "critic_scores": "as critic_penalty",
    "critic_scores_backward": "as critic_penalty",
}

# What waits for the GPU: a number that Python reads, and the eigenvalues of a matrix, whose success is checked.
READS = {"aten::_local_scalar_dense", "aten::_linalg_eigh", "aten::nonzero"}

A = torch.tensor([[2.0, 0.5, 0.0], [0.5, 3.0, 0.1], [0.0, 0.1, 1.0]], device="cpu")
U, V, SIGMA = torch.ones(3, device="cpu"), torch.ones(3, device="cpu"), torch.ones(1, device="cpu")
UV = torch.ones(6, device="cpu")
RADII = torch.ones(3, dtype=torch.float64, device="cpu")
ROOTS = torch.tensor([1.0, 1.5, 2.0], device="cpu")
PERCEPTRON = (A, [A, A[:1]], [None, None], [0.2], [None], "two-sided", 1.0, 1.0, None, [], 0, 3, [], [])

# Op -> a call of it, by Triton where it has a form.
CALLS: dict[str, tuple[Any, ...]] = {
    "spectral_norm_fwd": ([A], [U], [V], 1, 1e-12, [0], "triton"),
    "spectral_norm_bwd": ([A], None, [A], SIGMA, UV, [0], "triton"),
    "gradient_penalty_interpolate": (A, A, U, "triton"),
    "gradient_penalty_fwd": (A, "max", 1.0, 1.0, "sample", "triton"),
    "mlp_gradient_penalty_fwd": (*PERCEPTRON, "triton"),
    "matrix_sqrt_fwd": (A, False, 0.0, "auto", True, "reference"),
    "matrix_sqrt_bwd": (A, A, ROOTS, A, "reference"),
    "polar_fwd": (A,),
    "polar_bwd": (A, A, A, ROOTS, A),
    "polar_factor_fwd": (A,),
    "polar_factor_bwd": (A, torch.eye(3, device="cpu"), A),
    "nearest_neighbours": (A, None, 1, "triton"),
    "ball_counts": (A, A, RADII, RADII, False, "triton"),
    "draw": (A, "normal_", [0.0, 1.0]),
    "bernoulli": (U,),
    "native_dropout": (A, 0.5, True),
}

# Whose arguments are those that torch.compile makes: tests/penalties/test_traced.py.
OF_CRITICS = {"critic_penalty", "critic_scores", "critic_scores_backward"}

OF_GPU = [op for op in CALLS if op not in UNSAFE]


def names() -> set[str]:
    """Of all ops of lipgan."""
    found = torch._C._dispatch_get_all_op_names()
    return {name.split("::")[1].split(".")[0] for name in found if name.startswith("lipgan::")}


def reads(run: Callable[[], object]) -> set[str]:
    """What waits for the GPU, within ops of lipgan as well."""
    with torch.profiler.profile() as profile, torch.no_grad():
        run()
    return {event.key for event in profile.key_averages()} & READS


def test_the_tags_are_those_that_are_listed() -> None:
    tagged = {op for op in names() if torch.Tag.cudagraph_unsafe in getattr(torch.ops.lipgan, op).default.tags}
    assert tagged == set(UNSAFE)
    assert names() == {*CALLS, *OF_CRITICS}, "a new op: call it here"


@pytest.mark.cpu
@pytest.mark.backend("triton")
@pytest.mark.parametrize("op", CALLS)
def test_an_op_without_the_tag_reads_nothing(op: str) -> None:
    function = getattr(torch.ops.lipgan, op).default
    # Without the argument that names a backend: that of a GPU.
    with overhead.without_launches(), use_backend("reference" if op.startswith("polar_factor") else None):
        function(*CALLS[op])  # A graph asks for a call before; tables of shapes are made by it.
        assert bool(reads(lambda: function(*CALLS[op]))) == (op in UNSAFE)


@pytest.mark.cpu
@pytest.mark.parametrize("op", OF_GPU)
def test_nor_does_its_reference(op: str) -> None:
    *arguments, last = CALLS[op]
    function = getattr(torch.ops.lipgan, op).default
    assert not reads(lambda: function(*arguments, "reference" if last == "triton" else last))


@pytest.mark.cpu
def test_a_read_is_seen() -> None:
    assert reads(lambda: float(A.sum()) > 0) == {"aten::_local_scalar_dense"}
