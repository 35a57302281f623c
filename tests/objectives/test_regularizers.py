"""lipgan.regularizers: closed forms, gradients, and what happens at the edges."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lipgan.objectives import regularizers
from lipgan.objectives.regularizers import (
    HistoricalAverage,
    clip_weights,
    energy_distance,
    feature_matching,
    pulling_away,
)

HALF_TYPES = [torch.float16, torch.bfloat16]


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


# feature_matching


def test_feature_matching_by_hand() -> None:
    real = torch.tensor([[1.0, 2.0], [3.0, -2.0], [2.0, 3.0]], requires_grad=True)  # mean (2, 1)
    fake = torch.tensor([[0.0, 4.0], [2.0, 4.0]], requires_grad=True)  # mean (1, 4)
    value = feature_matching(real, fake)
    assert value.item() == pytest.approx(1 + 9)
    value.backward()
    assert real.grad is None
    # 2 (mean fake - mean real) / n
    assert fake.grad is not None
    torch.testing.assert_close(fake.grad, torch.tensor([[-1.0, 3.0], [-1.0, 3.0]]))
    assert feature_matching(real, real).item() == 0


def test_feature_matching_gradient() -> None:
    real = torch.randn(5, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda fake: feature_matching(real, fake), rows(4, 3))
    assert feature_matching(real[:1], real[:1] + 1).item() == pytest.approx(3)


# pulling_away


def test_pulling_away_by_hand() -> None:
    orthogonal = torch.eye(4)
    assert pulling_away(orthogonal).item() == 0
    # Lengths and signs do not count.
    assert pulling_away(torch.tensor([[1.0, 2.0], [-3.0, -6.0], [0.1, 0.2]])).item() == pytest.approx(1)
    # Angles of 60, 90 and 30 degrees: squared cosines 1/4, 0 and 3/4.
    angles = torch.tensor([0.0, 60.0, 90.0]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[1.0], [5.0], [0.2]])
    assert pulling_away(features).item() == pytest.approx(1 / 3, rel=1e-6)


def test_pulling_away_gradients() -> None:
    features = rows(4, 3)
    assert torch.autograd.gradcheck(pulling_away, features)
    assert torch.autograd.gradgradcheck(pulling_away, features)
    (gradient,) = torch.autograd.grad(pulling_away(features), features)
    # It does not change when a row gets longer.
    torch.testing.assert_close((gradient * features).sum(1), torch.zeros(4, dtype=torch.float64), atol=1e-14, rtol=0)


def test_pulling_away_of_rows_of_zeros() -> None:
    features = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    value = pulling_away(features)
    assert value.item() == pytest.approx(1 / 3)
    (gradient,) = torch.autograd.grad(value, features)
    assert gradient.isfinite().all()
    with pytest.raises(ValueError, match="features must have at least 2 rows, got 1"):
        pulling_away(torch.ones(1, 3))


# energy_distance


def test_energy_distance_by_hand() -> None:
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [5.0], [5.0]])
    # E|x - y| = (3 + 5 + 5 + 2 + 4 + 4) / 6; over pairs |x - x'| is 1, over all four 1/2; |y - y'| 4/3 and 8/9.
    assert energy_distance(x, y).item() == pytest.approx(23 / 3 - 1 - 4 / 3)
    assert energy_distance(x, y, estimator="biased").item() == pytest.approx(23 / 3 - 1 / 2 - 8 / 9)
    # Of two points in the plane: twice their distance.
    a, b = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    assert energy_distance(a, b, estimator="biased").item() == pytest.approx(10)


def test_biased_energy_distance_on_a_line_is_cramers() -> None:
    """Twice the integral of the squared difference of the two distribution functions."""
    x, y = torch.randn(7, 1, dtype=torch.float64), 0.5 + torch.randn(4, 1, dtype=torch.float64)
    ends = torch.cat([x, y]).flatten().sort().values
    differences = [(x <= end).double().mean() - (y <= end).double().mean() for end in ends[:-1]]
    cramer = sum(float(d) ** 2 * float(w) for d, w in zip(differences, ends.diff(), strict=True))
    assert energy_distance(x, y, estimator="biased").item() == pytest.approx(2 * cramer, rel=1e-12)


def test_the_mean_of_the_unbiased_energy_distance_is_that_of_the_distributions() -> None:
    """All samples of two from a fair coin against all of two from a biased one: E = 2 (1/2 - 1/4)^2 = 1/8."""
    total = 0.0
    for x0, x1, y0, y1 in torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4).tolist():
        weight = 0.25 * (0.25 if y0 else 0.75) * (0.25 if y1 else 0.75)
        total += weight * energy_distance(torch.tensor([[x0], [x1]]), torch.tensor([[y0], [y1]])).item()
    assert total == pytest.approx(1 / 8, rel=1e-6)


@pytest.mark.parametrize("estimator", regularizers.ESTIMATORS)
def test_energy_distance_gradients(estimator: str) -> None:
    def distance(x: Tensor, y: Tensor) -> Tensor:
        return energy_distance(x, y, estimator=estimator)

    x, y = rows(4, 3), rows(3, 3)
    assert torch.autograd.gradcheck(distance, (x, y))
    assert torch.autograd.gradgradcheck(distance, (x, y))


@pytest.mark.parametrize("estimator", regularizers.ESTIMATORS)
def test_coincident_points_have_finite_gradients_of_both_orders(estimator: str) -> None:
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]], requires_grad=True)
    y = torch.tensor([[1.0, 2.0], [5.0, 2.0]], requires_grad=True)
    value = energy_distance(x, y, estimator=estimator)
    to_x, to_y = torch.autograd.grad(value, (x, y), create_graph=True)
    # Two of x lie on y_0, which pulls neither: only y_1, at (4, 0), and x_2 enter.
    pairs_x = 6 if estimator == "unbiased" else 9
    unit = torch.tensor([1.0, 2.0]) / math.sqrt(5)
    expected = 2 / 6 * torch.tensor([-1.0, 0.0]) - 2 / pairs_x * unit
    torch.testing.assert_close(to_x[0].detach(), expected)
    for second in torch.autograd.grad(to_x.square().sum() + to_y.square().sum(), (x, y)):
        assert second.isfinite().all()
    assert energy_distance(y, y, estimator="biased").item() == 0


def test_a_generator_finds_the_data_by_the_energy_distance() -> None:
    """The mean of a sample is moved by gradient descent to that of the data."""
    real = torch.randn(50, 2) + torch.tensor([2.0, -1.0])
    noise = torch.randn(50, 2)
    shift = torch.zeros(2, requires_grad=True)
    for _ in range(30):
        (gradient,) = torch.autograd.grad(energy_distance(noise + shift, real), shift)
        with torch.no_grad():
            shift -= 0.5 * gradient
    torch.testing.assert_close(shift.detach(), real.mean(0) - noise.mean(0), atol=0.2, rtol=0)


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_half_types_are_summed_in_float32(dtype: torch.dtype) -> None:
    x, y = (3 + torch.randn(300, 8)).to(dtype), torch.randn(300, 8).to(dtype)
    for value, expected in (
        (feature_matching(x, y), feature_matching(x.float(), y.float())),
        (pulling_away(x), pulling_away(x.float())),
        (energy_distance(x, y), energy_distance(x.float(), y.float())),
    ):
        assert value.dtype == torch.float32
        assert value == expected
        assert value.isfinite()


def test_bad_features_are_named() -> None:
    good = torch.ones(3, 2)
    for call, name in ((feature_matching, "real_features"), (energy_distance, "x")):
        with pytest.raises(ValueError, match=rf"{name} must have shape \(B, d\), got \(3,\)"):
            call(torch.ones(3), good)
        with pytest.raises(TypeError, match=rf"{name} must have a real floating-point dtype, got torch\.int64"):
            call(good.long(), good)
        with pytest.raises(ValueError, match=rf"must have the width of {name}, 2, got 1"):
            call(good, good[:, :1])
        with pytest.raises(ValueError, match=rf"{name} must have at least"):
            call(good[:0], good)
    with pytest.raises(ValueError, match="x must have at least 2 rows, got 1"):
        energy_distance(good[:1], good)
    with pytest.raises(ValueError, match="y must have at least 2 rows, got 1"):
        energy_distance(good, good[:1])
    with pytest.raises(ValueError, match="estimator must be one of unbiased, biased, got 'V'"):
        energy_distance(good, good, estimator="V")


# HistoricalAverage


def test_historical_average_by_hand() -> None:
    module = nn.Linear(2, 1)
    average = HistoricalAverage(module)
    path = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -2.0]]), torch.tensor([[5.0, 3.0]])]
    for weight in path:
        with torch.no_grad():
            module.weight.copy_(weight)
            module.bias.fill_(0.5)
        average.update()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[4.0, 5.0]]))
        module.bias.fill_(1.0)
    # The means are (3, 1) and 0.5.
    value = average.penalty()
    assert value.item() == pytest.approx(1 + 16 + 0.25)
    value.backward()
    assert module.weight.grad is not None
    assert module.bias.grad is not None
    torch.testing.assert_close(module.weight.grad, torch.tensor([[2.0, 8.0]]))
    torch.testing.assert_close(module.bias.grad, torch.tensor([1.0]))


def test_historical_average_begins_at_nothing() -> None:
    module = nn.Linear(3, 2)
    average = HistoricalAverage(module)
    penalty = average.penalty()
    penalty.backward()
    assert penalty.item() == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in module.parameters())
    average.update()
    assert average.penalty().item() == 0
    nothing = HistoricalAverage(nn.ReLU())
    nothing.update()
    assert nothing.penalty().item() == 0


def test_historical_average_goes_on_from_its_state() -> None:
    module = nn.Linear(3, 2)
    one = HistoricalAverage(module)
    for _ in range(3):
        one.update()
        with torch.no_grad():
            module.weight.add_(1.0)
    state = one.state_dict()
    two = HistoricalAverage(module)
    two.load_state_dict(state)
    for average in (one, two):
        average.update()
    assert one.penalty().item() == two.penalty().item() > 0
    # Neither the state nor what was loaded from it follows a later update.
    torch.testing.assert_close(state["means"]["weight"], module.weight.detach() - 2, atol=1e-6, rtol=0)


def test_historical_average_keeps_the_means_of_half_types_in_float32() -> None:
    module = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    average = HistoricalAverage(module)
    with torch.no_grad():
        module.weight.fill_(1.0)
    for _ in range(400):
        average.update()
    with torch.no_grad():
        module.weight.fill_(2.0)
    for _ in range(400):
        average.update()
    # A mean in bfloat16 stays at 1.0 or thereabouts: a step of 1/400 is below its rounding.
    assert average.state_dict()["means"]["weight"].item() == pytest.approx(1.5, rel=1e-4)
    assert average.penalty().dtype == torch.float32
    assert average.penalty().item() == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": None}, "count must be a whole number of at least 0, got None"),
        ({"count": -1}, "count must be a whole number of at least 0, got -1"),
        ({"means": {}}, "means must have the names of the module's parameters; 'bias' is only on one side"),
        (
            {"means": {"weight": torch.ones(2, 2), "bias": torch.ones(2)}},
            r"the mean of weight must have shape \(2, 3\), got \(2, 2\)",
        ),
    ],
)
def test_a_state_of_another_module_is_refused_and_changes_nothing(change: dict[str, Any], message: str) -> None:
    average = HistoricalAverage(nn.Linear(3, 2))
    average.update()
    before = average.state_dict()
    with pytest.raises(ValueError, match=message):
        average.load_state_dict({"count": 7, "means": before["means"], **change})
    with pytest.raises(ValueError, match="state must have the key 'means', got count"):
        average.load_state_dict({"count": 7})
    after = average.state_dict()
    assert after["count"] == before["count"]
    assert all(torch.equal(after["means"][name], mean) for name, mean in before["means"].items())


# clip_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF_TYPES])
def test_clipping_puts_every_parameter_into_the_box(dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(8, 3)).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.02)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    buffers = [buffer.clone() for buffer in module.buffers()]
    identities = [id(parameter) for parameter in module.parameters()]
    clip_weights(module, 0.01)
    assert [id(parameter) for parameter in module.parameters()] == identities
    for old, new in zip(before, module.parameters(), strict=True):
        assert torch.equal(new, old.clamp(-0.01, 0.01))
        assert (new.abs() <= torch.tensor(0.01, dtype=dtype)).all()
        assert (old.abs() > 0.01).any()
    assert all(torch.equal(old, new) for old, new in zip(buffers, module.buffers(), strict=True))


def test_clipping_leaves_gradients_and_modules_without_parameters_alone() -> None:
    module = nn.Linear(2, 1)
    module(torch.ones(1, 2)).sum().backward()
    gradient = module.weight.grad
    assert gradient is not None
    clip_weights(module, 1e-3)
    assert torch.equal(gradient, torch.ones(1, 2))
    assert module.weight.requires_grad
    clip_weights(nn.ReLU(), 0.01)


@pytest.mark.parametrize(
    ("bound", "error"), [(0, ValueError), (-0.1, ValueError), (math.inf, ValueError), ("1", TypeError)]
)
def test_a_bound_out_of_range_is_named(bound: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"bound must be .*, got {bound!r}"):
        clip_weights(nn.Linear(1, 1), bound)
