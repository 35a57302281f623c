"""`lipgan.gradient_penalty` answers bad input in one sentence."""

import math
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from devices import DEVICE
from penalty_critics import ENGINES, FLAT, mlp, outcome, refuses
from torch import Tensor

from lipgan import gradient_penalty
from lipgan.penalties import explain

BAD = [
    refuses("shapes", mlp, FLAT, FLAT[:, :4], match=r"fake must have the shape of real, \(4, 5\), got \(4, 4\)"),
    refuses("batches", mlp, FLAT, FLAT[:3], match=r"fake must have the shape of real, \(4, 5\), got \(3, 5\)"),
    refuses("devices", mlp, FLAT, FLAT.to("meta"), match=rf"fake must be on the device of real, {DEVICE}, got meta"),
    refuses("no fake", mlp, FLAT, match=r"fake must be given for kind 'wgan-gp', got None"),
    refuses("no fake for r1+r2", mlp, FLAT, kind="r1+r2", match=r"fake must be given for kind 'r1\+r2'"),
    refuses("no real", mlp, None, FLAT, error=TypeError, match="real must be a tensor, got NoneType"),
    refuses("array", mlp, FLAT.numpy(force=True), FLAT, error=TypeError, match="real must be a tensor, got ndarray"),
    refuses("list", mlp, FLAT, [1.0], error=TypeError, match=r"fake\[0\] must be a tensor, got float"),
    refuses("integers", mlp, FLAT.long(), FLAT.long(), error=TypeError, match="real must be float32.* got torch.int64"),
    refuses("integer fake", mlp, FLAT, FLAT.int(), error=TypeError, match="fake must be float32.* got torch.int32"),
    refuses("complex", mlp, FLAT + 0j, FLAT + 0j, error=TypeError, match="real must be float32.* got torch.complex128"),
    refuses("booleans", mlp, FLAT > 0, kind="r1", error=TypeError, match="real must be float32.* got torch.bool"),
    refuses(
        "sparse", mlp, FLAT.to_sparse(), kind="r1", error=TypeError, match="real must be a dense.* torch.sparse_coo"
    ),
    refuses("batch of 0", mlp, FLAT[:0], FLAT[:0], match=r"real must hold at least one sample, .* got shape \(0, 5\)"),
    refuses("empty samples", mlp, FLAT[:, :0], FLAT[:, :0], match=r"real must hold .* got shape \(4, 0\)"),
    refuses("no batch", mlp, FLAT[0, 0], FLAT[0, 0], match=r"real must hold at least one sample, .* got shape \(\)"),
    refuses("no channels", lambda x: x, FLAT[:, 0], kind="r1", norm="pixel", match=r"channels .* got shape \(4,\)"),
    refuses("negative target", mlp, FLAT, FLAT, target=-0.5, match="target must be finite and not negative, got -0.5"),
    refuses(
        "infinite target", mlp, FLAT, FLAT, target=math.inf, match="target must be finite and not negative, got inf"
    ),
    refuses("NaN target", mlp, FLAT, FLAT, target=math.nan, match="target must be finite and not negative, got nan"),
    refuses(
        "target of no kind", mlp, FLAT, FLAT, target=None, error=TypeError, match="target must be a number, got None"
    ),
    refuses("infinite weight", mlp, FLAT, FLAT, weight=-math.inf, match="weight must be finite, got -inf"),
    refuses(
        "weight of no kind", mlp, FLAT, FLAT, weight="much", error=TypeError, match="weight must be a .* got 'much'"
    ),
    refuses(
        "many weights", mlp, FLAT, FLAT, weight=torch.ones(2), error=TypeError, match="weight must be a number, got"
    ),
    refuses("generator", mlp, FLAT, FLAT, generator=3, error=TypeError, match="generator must be a .* got int"),
    refuses("kind", mlp, FLAT, FLAT, kind="wgan", match=r"kind must be one of wgan-gp, lp, .*, got 'wgan'"),
    refuses("kind of no kind", mlp, FLAT, FLAT, kind=["r1"], match=r"kind must be one of .*, got \['r1'\]"),
    refuses("engine", mlp, FLAT, FLAT, engine="fast", match="engine must be one of auto, fused, autograd, got 'fast'"),
    refuses("norm", mlp, FLAT, FLAT, norm="l1", match="norm must be one of sample, pixel, got 'l1'"),
    refuses("critic", 7, FLAT, FLAT, error=TypeError, match="critic must be a module or a function, got 7"),
    refuses("no critic", None, FLAT, FLAT, error=TypeError, match="critic must be a module or a function, got None"),
    refuses("labels", mlp, FLAT, FLAT, critic_args=FLAT, error=TypeError, match=r"critic_args must .* got Tensor"),
    refuses("one argument", mlp, FLAT, FLAT, critic_args=3, error=TypeError, match=r"critic_args must be .* got int"),
]


BAD += [
    outcome("None", lambda x: None, r"critic must return one tensor of scores, got NoneType$"),
    outcome("a number", lambda x: 3, r"critic must return one tensor of scores, got int$"),
    outcome("a list", lambda x: [mlp(x), x], "got list of 2: say which one counts by output"),
    outcome("a dict", lambda x: {"s": mlp(x)}, "got dict with keys 's': say which one counts by output"),
    outcome(
        "a mean", lambda x: mlp(x).mean(), r"not their mean over 4 samples, got shape \(\): give the scores by output"
    ),
    outcome("no scores", lambda x: mlp(x)[:0], r"critic must return scores, got a tensor of shape \(0,\)"),
    outcome(
        "complex numbers", lambda x: x.sum(1).detach() + 0j, "critic must return real numbers, got torch.complex128"
    ),
    outcome("detached scores", lambda x: mlp(x).detach(), "critic must return scores that depend on the samples"),
    outcome("detached samples", lambda x: mlp(x.detach()), "critic must return scores that depend on the samples"),
    outcome("constants", lambda x: torch.ones(4), "critic must return scores that depend on the samples"),
    outcome("too few", lambda x: [mlp(x)], "output 3 does not select from the critic's list of 1", output=3),
    outcome("no such key", lambda x: {"s": mlp(x)}, "output 't' does not select from .* keys 's'", output="t"),
    outcome("a wrong output", lambda x: {"s": [mlp(x)]}, "one tensor of scores, got list of 1", output="s"),
]


@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
@pytest.mark.parametrize(("args", "kwargs", "error", "match"), BAD)
def test_bad_input(args: Any, kwargs: dict[str, Any], error: type[Exception], match: str, engine: str) -> None:
    with pytest.raises(error, match=match) as caught:
        gradient_penalty(*args, **{"engine": engine, **kwargs})
    assert type(caught.value) is error
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_scores_of_parameters_alone_do_not_depend_on_the_samples(engine: str) -> None:
    w = torch.ones(4, requires_grad=True)
    with pytest.raises(ValueError, match="depend on the samples"):
        gradient_penalty(lambda x: w * 2, FLAT, kind="r1", engine=engine)
    with torch.no_grad(), pytest.raises(ValueError, match="depend on the samples"):
        gradient_penalty(lambda x: w * 2, FLAT, kind="r1", engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_nan_in_the_samples(engine: str, dtype: torch.dtype) -> None:
    """Found before the critic runs: the slopes of a piecewise-linear critic are finite at NaN."""
    calls = []
    bad = FLAT.to(dtype, copy=True)
    bad[2, 3] = bad[1, 0] = math.nan

    def critic(x: Tensor) -> Tensor:
        calls.append(x)
        return torch.relu(x).sum(1)

    good = FLAT.to(dtype)
    with pytest.raises(ValueError, match="real must not contain NaN, got 2 of them"):
        gradient_penalty(critic, bad, good, engine=engine)
    for kind in ("wgan-gp", "r2", "r1+r2"):
        with pytest.raises(ValueError, match="fake must not contain NaN, got 2 of them"):
            gradient_penalty(critic, good, bad, kind=kind, engine=engine)
    with pytest.raises(ValueError, match="real must not contain NaN"):
        gradient_penalty(critic, bad, kind="dragan", engine=engine)
    assert not calls
    gradient_penalty(critic, good, bad, kind="r1", engine=engine)  # where it is not looked at
    large = torch.full((4, 5), torch.finfo(dtype).max, dtype=dtype)
    assert math.isfinite(gradient_penalty(critic, large, kind="r1", engine=engine).item())


def test_explain_checks_its_arguments() -> None:
    for args, message in (
        ((mlp, FLAT.long()), "real"),
        ((None, FLAT), "critic"),
        ((mlp, [1]), r"real\[0\] must be a tensor, got int"),
    ):
        with pytest.raises(TypeError, match=message):
            explain(*args)
    with pytest.raises(TypeError, match="critic_args"):
        explain(mlp, FLAT, critic_args=FLAT)
