"""`LazyRegularization`."""

from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from penalty_critics import CPU, REAL, assert_same, grads_of, image_critic
from torch import Tensor

from lipgan import gradient_penalty
from lipgan.penalties import LazyRegularization


def test_lazy_regularization() -> None:
    critic = image_critic()
    calls: list[dict[str, Any]] = []

    def regularizer(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs)
        return gradient_penalty(*args, **kwargs)

    lazy = LazyRegularization(regularizer, every=4)
    plain = gradient_penalty(critic, REAL, kind="r1", weight=5.0)
    results = [lazy(critic, REAL, kind="r1", weight=5.0) for _ in range(9)]
    assert calls == [{"kind": "r1", "weight": 5.0}] * 3
    for k, result in enumerate(results):
        if k % 4 == 0:
            torch.testing.assert_close(result, 4 * plain)
            assert result.requires_grad
        else:
            assert result.item() == 0
            assert not result.requires_grad
            assert result.shape == ()
    expected = grads_of(4 * plain, critic)
    assert_same(grads_of(results[0] + results[1], critic), expected, 1e-12)
    torch.testing.assert_close(
        torch.stack([r.detach().double() for r in results[:8]]).mean(), plain.detach(), msg="the mean is kept"
    )
    again = LazyRegularization(regularizer, every=4)
    again.load_state_dict(lazy.state_dict())
    assert [again(critic, REAL, kind="r1").item() > 0 for _ in range(4)] == [False, False, False, True]
    assert LazyRegularization(gradient_penalty, 1)(critic, REAL, kind="r1").item() > 0
    meta = torch.empty(2, device="meta")
    again.step = 1
    assert again(critic, real=meta).device == meta.device
    assert again(critic).device == CPU


def test_lazy_regularization_for_adam() -> None:
    lr, betas = LazyRegularization(gradient_penalty, every=16).adam(0.002, (0.0, 0.99))
    # The numbers of StyleGAN2: 0.002 * 16 / 17, 0, 0.99^(16 / 17).
    assert lr == pytest.approx(0.00188235, rel=1e-5)
    assert betas == (0.0, pytest.approx(0.990586, rel=1e-5))


def test_lazy_regularization_makes_up_for_a_failed_step() -> None:
    critic = image_critic()
    lazy = LazyRegularization(gradient_penalty, every=3)
    with pytest.raises(ValueError, match="kind"):
        lazy(critic, REAL, kind="r3")
    assert lazy(critic, REAL, kind="r1").item() > 0
    for every in (0, -1):
        with pytest.raises(ValueError, match=rf"every must be at least 1, got {every}"):
            LazyRegularization(gradient_penalty, every)
    for wrong in (1.5, True, "4", None):
        with pytest.raises(TypeError, match="every must be an int, got"):
            LazyRegularization(gradient_penalty, wrong)  # type: ignore[arg-type]
