"""What a type checker sees of the package from outside: py.typed is there, and the names have the types they should.

A program of a user is checked by ``mypy --strict`` against the package as it is installed.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# assert_type fails for Any, and --strict refuses an ignore that nothing needs: each of them is an error that is wanted.
PROGRAM = """
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import lipgan
from lipgan.compat.prdc import compute_prdc
from lipgan.metrics import FeatureStats, FrechetDistance, kernel_distance
from lipgan.penalties import CriticLoss, LazyRegularization


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = lipgan.nn.SNLinear(8, 1, n_power_iterations=2)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.layer(x)
        return scores


def step(critic: Critic, real: Tensor, fake: Tensor) -> float:
    penalty = lipgan.gradient_penalty(critic, real, fake, kind="lp", weight=1.0)
    assert_type(penalty, Tensor)
    loss = lipgan.critic_loss(critic, real, fake, "wasserstein", kind="r1")
    assert_type(loss, CriticLoss)
    assert_type(loss.total, Tensor)
    lazy = LazyRegularization(lipgan.gradient_penalty, every=16)
    assert_type(lazy(critic, real, kind="r1"), Tensor)
    torch.autograd.backward(penalty + loss.total)
    return float(loss.penalty)


def convert(model: nn.Module) -> dict[str, float]:
    assert_type(lipgan.patch(model), nn.Module)
    assert_type(lipgan.spectral_norm(nn.Linear(2, 2)), nn.Module)
    group = lipgan.group_spectral_norm(model)
    assert_type(group, lipgan.SpectralNormGroup)
    return group.sigmas()


def measure(x: Tensor, y: Tensor) -> float:
    stats = FeatureStats(8).update(x)
    assert_type(stats.mean, Tensor)
    assert_type(stats.count, int | None)
    metric = FrechetDistance(reset_real_features=False)
    metric.update(x, real=True)
    assert_type(metric.compute(), Tensor)
    assert_type(kernel_distance(x, y), tuple[float, float])
    assert_type(compute_prdc(x.numpy(), y.numpy(), nearest_k=3), dict[str, float])
    assert_type(lipgan.interpolate(x, y), Tensor)
    return float(lipgan.metrics.frechet_distance_from_features(x, y))


def mistakes(critic: Critic, x: Tensor) -> None:
    lipgan.gradient_penalty(critic, x, weight="ten")  # type: ignore[arg-type]
    lipgan.spectral_norm("weight")  # type: ignore[arg-type]
    lipgan.patch(model=critic, every=2)  # type: ignore[call-arg]
    FeatureStats("8")  # type: ignore[arg-type]
    lipgan.nothing  # type: ignore[attr-defined]
"""


@pytest.mark.slow
def test_a_program_of_a_user_passes_mypy_strict(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    # As in site-packages: mypy follows no import hook of an editable install.
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "lipgan").symlink_to(ROOT / "lipgan")
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "program.py"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    environment.pop("MYPYPATH", None)
    found = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert (found.returncode, found.stdout) == (0, "Success: no issues found in 1 source file\n"), (
        found.stdout + found.stderr
    )
