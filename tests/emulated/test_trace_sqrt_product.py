"""The trace of the Frechet distance on a device: products of matrices where they are certified, and few waits."""

import pytest
import torch
from emulated_device import DEVICE, crossings
from torch import Tensor

from lipgan.linalg.covariance_factor import factorize
from lipgan.linalg.trace_sqrt_product import TraceInfo, trace_sqrt_product_info
from lipgan.metrics import frechet_distance

pytestmark = pytest.mark.usefixtures("single_thread")


def covariance(d: int, seed: int, rank: int | None = None) -> Tensor:
    """Symmetric to the last bit, with a spectrum that falls by a factor of 100."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * d, d, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, d, dtype=torch.float64)
    if rank is not None:
        x = x[:rank]
    s = x.mT @ x / len(x)
    return 0.5 * (s + s.mT)


def on_device(*covariances: Tensor, bounded: bool = True) -> tuple[float, TraceInfo, list[str]]:
    s1, s2 = (s.to(DEVICE) for s in covariances)
    with crossings() as records:
        trace, info = trace_sqrt_product_info(s1, s2, bounded=bounded)
    return float(trace), info, [record for record in records if "host" in record]


def test_products_serve_where_they_are_certified() -> None:
    s1, s2 = covariance(48, 0), covariance(48, 1)
    expected, on_cpu = trace_sqrt_product_info(s1, s2, method="svd")
    trace, info, _ = on_device(s1, s2)
    assert on_cpu.iterations == 0
    assert info.route == "polar"
    assert info.iterations > 0
    assert info.error_bound <= 1e-9 * trace
    assert abs(trace - float(expected)) <= info.error_bound + on_cpu.error_bound
    assert trace_sqrt_product_info(s1, s2)[1].route == "cholesky", "a CPU takes eigenvalues"


def test_a_distance_takes_products() -> None:
    mu, s1, s2 = torch.zeros(24, dtype=torch.float64), covariance(24, 0), covariance(24, 1)
    moved = [x.to(DEVICE) for x in (mu, s1, mu + 1, s2)]
    distance, info = frechet_distance(*moved, return_info=True)
    assert info.route == "polar"
    assert float(distance) == pytest.approx(float(frechet_distance(mu, s1, mu + 1, s2)), rel=1e-11)


@pytest.mark.parametrize("ranks", [(20, None), (None, 20), (20, 20)])
def test_eigenvalues_serve_where_a_side_is_singular(ranks: tuple[int | None, int | None]) -> None:
    s1, s2 = covariance(32, 0, ranks[0]), covariance(32, 1, ranks[1])
    trace, info, _ = on_device(s1, s2)
    assert info.route in ("cholesky", "svd")
    expected, on_cpu = trace_sqrt_product_info(s1, s2)
    assert abs(trace - float(expected)) <= info.error_bound + on_cpu.error_bound


def test_eigenvalues_serve_where_the_bound_is_too_large() -> None:
    """The two sides hardly meet, so that the trace is small beside the noise of its products."""
    d = 16
    first = torch.ones(d, dtype=torch.float64)
    first[: d // 2] = 1e-13
    s1, s2 = torch.diag(first), torch.diag(first.flip(0))
    trace, info, _ = on_device(s1, s2)
    assert info.route != "polar"
    assert trace == pytest.approx(float((first * first.flip(0)).sqrt().sum()), rel=1e-9)


def test_derivatives_take_eigenvalues() -> None:
    s1, s2 = covariance(16, 0), covariance(16, 1)
    grads = []
    for move in (lambda s: s, lambda s: s.to(DEVICE)):
        leaf = move(s1).requires_grad_()
        trace, info = trace_sqrt_product_info(leaf, move(s2))
        assert info.route == "cholesky"
        grads.append(torch.autograd.grad(trace, leaf)[0].cpu())
    assert torch.allclose(*grads, rtol=1e-12, atol=1e-14)


def test_factors_that_are_given_are_used() -> None:
    s1, s2 = covariance(32, 0, 20), covariance(32, 1)
    factors = [factorize(s.to(DEVICE)) for s in (s1, s2)]
    trace, info = trace_sqrt_product_info(factors[0], factors[1])
    assert info.route == "polar"
    expected, on_cpu = trace_sqrt_product_info(s1, s2, method="svd")
    assert abs(float(trace) - float(expected)) <= info.error_bound + on_cpu.error_bound


@pytest.mark.parametrize("d", [8, 60, 300])  # 300 rows are two tiles of the comparison on a CPU
def test_the_host_waits_a_known_number_of_times(d: int) -> None:
    _, info, waits = on_device(covariance(d, 0), covariance(d, 1), bounded=False)
    assert info.route == "polar"
    before = [
        *["number to host []", f"comparison to host [{d}, {d}]"] * 2,  # finite and symmetric, of either side
        *["to host [4]"] * 2,  # of a factor
        "to host [2]",  # scale and norm of the product
    ]
    after = ["number to host []"] * 2  # the traces, for the bound
    looks = waits[len(before) : len(waits) - len(after)]
    assert waits == before + looks + after
    # After a step is looked at what it has reached; steps that cannot have reached anything are not looked at.
    assert set(looks) == {"to host [3]"}
    assert len(looks) <= 6 < info.iterations
