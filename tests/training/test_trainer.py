"""lipgan.Trainer: what a step does, exact resume, and files that are whole or absent."""

import dataclasses
import errno
import hashlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from system_checks import assert_same
from torch import Tensor, nn

from lipgan import data, recipes
from lipgan._files import write_atomically
from lipgan.data import BatchOrder, Dataset
from lipgan.models import ConvCritic, ConvGenerator
from lipgan.training import CheckpointError, Trainer, TrainingDiverged, load_generator

SMALL = dataclasses.replace(recipes.get("sngan"), batch_size=8)


pytestmark = pytest.mark.usefixtures("single_thread")


class PointGenerator(nn.Module):
    """Maps noise to points in the plane, and draws from torch's global generator while it does."""

    latent_dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))

    def forward(self, z: Tensor) -> Tensor:
        points: Tensor = self.layers(z)
        return points


class PointCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.layers(x)
        return scores.squeeze(1)


def points() -> Dataset:
    return Dataset("points", torch.randn(50, 2, generator=torch.Generator().manual_seed(4)))


def point_networks() -> tuple[PointGenerator, PointCritic]:
    torch.manual_seed(11)
    return PointGenerator(), PointCritic()


def point_trainer(recipe: recipes.Recipe = SMALL, **options: Any) -> Trainer:
    return Trainer(*point_networks(), recipe, points(), **options)


def frechet_distance_of_pixels(a: Tensor, b: Tensor) -> float:
    """Between the normal distributions with the two sample means and covariances, in float64."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    trace_of_root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace_of_root)


# --- exact resume


@pytest.mark.parametrize("split", [1, 5, 7, 10])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path: Path, split: int) -> None:
    """Splits before, at and after a logged step; with dropout, so that the global stream counts too."""
    recipe = dataclasses.replace(SMALL, n_critic=2)
    whole = point_trainer(recipe, seed=1, log_every=5).fit(12)
    point_trainer(recipe, seed=1, log_every=5).fit(split).save(tmp_path / "checkpoint.pt")
    torch.manual_seed(777)
    generator, critic = PointGenerator(), PointCritic()  # other weights: all of them must come from the file
    resumed = Trainer.load(tmp_path / "checkpoint.pt", generator=generator, critic=critic, data=points())
    assert resumed.step == split
    resumed.fit(12 - split)
    assert_same(resumed.state_dict(), whole.state_dict())
    assert_same(resumed.sample(5), whole.sample(5))


def test_a_resumed_run_of_images_has_the_same_bits(tmp_path: Path) -> None:
    digits = data.load("digits", 8)
    whole = Trainer.from_recipe(SMALL, digits, log_every=2).fit(6)
    Trainer.from_recipe(SMALL, digits, log_every=2).fit(3).save(tmp_path / "checkpoint.pt")
    resumed = Trainer.load(tmp_path / "checkpoint.pt").fit(3)
    assert_same(resumed.state_dict(), whole.state_dict())
    u = [key for key in whole.state_dict()["critic"] if key.endswith("_u")]
    assert len(u) == 3, "the singular vectors are part of the state"


def test_saving_within_a_callback_is_exact_too(tmp_path: Path) -> None:
    whole = point_trainer().fit(8)

    def save_at_three(trainer: Trainer) -> None:
        if trainer.step == 3:
            trainer.save(tmp_path / "checkpoint.pt")

    point_trainer().fit(8, callbacks=[save_at_three])
    generator, critic = point_networks()
    resumed = Trainer.load(tmp_path / "checkpoint.pt", generator=generator, critic=critic, data=points()).fit(5)
    assert_same(resumed.state_dict(), whole.state_dict())


def test_a_run_is_a_function_of_its_seed_and_leaves_the_users_stream_alone() -> None:
    digits = data.load("digits", 8)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = Trainer.from_recipe(SMALL, digits, seed=3).fit(2)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second = Trainer.from_recipe(SMALL, digits, seed=3)
    for _ in range(2):
        torch.randn(5)
        second.fit(1)
    assert_same(first.state_dict(), second.state_dict())
    other = Trainer.from_recipe(SMALL, digits, seed=4).fit(2)
    assert not torch.equal(first.sample(2), other.sample(2))


# --- what a step does


def test_training_approaches_the_digits() -> None:
    """150 steps bring the Frechet distance between pixels of samples and of data to less than half."""
    digits = data.load("digits", 8)
    trainer = Trainer.from_recipe("sngan", digits)
    untrained = frechet_distance_of_pixels(trainer.sample(1000), digits.samples)
    trainer.fit(150)
    trained = frechet_distance_of_pixels(trainer.sample(1000), digits.samples)
    assert trained < 0.5 * untrained, (untrained, trained)


def test_the_trained_critic_has_spectral_norms_of_one() -> None:
    trainer = Trainer.from_recipe(SMALL, data.load("digits", 8)).fit(30)
    assert trainer.group is not None
    trainer.critic.eval()

    def norms() -> list[float]:
        layers = [layer for layer in trainer.critic.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        return [float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) for layer in layers]

    assert len(norms()) == 3
    # An unconverged u^T W v is below the norm, so the normalized weight is above one, by what 60 iterations miss
    # on a wide matrix whose singular values lie close together.
    assert all(1 - 1e-5 < norm < 1.25 for norm in norms()), norms()
    trainer.group.step(300)
    assert norms() == pytest.approx([1, 1, 1], abs=0.01)
    assert trainer.history[-1]["sigma"] > 1.25, "the weights themselves are elsewhere"


def test_the_critic_is_left_alone_without_a_norm() -> None:
    trainer = point_trainer(dataclasses.replace(SMALL, critic_norm="none"), log_every=1).fit(1)
    assert trainer.group is None
    assert trainer.history[-1]["sigma"] is None
    assert not [key for key in trainer.critic.state_dict() if "parametrizations" in key]


def test_the_engines_of_the_penalty_train_the_same() -> None:
    """WGAN-GP on digits, 50 steps of 5 critic updates, in float64: the curves agree step by step."""
    recipe = dataclasses.replace(recipes.get("wgan-gp"), batch_size=16)

    def history(engine: str) -> list[dict[str, Any]]:
        torch.manual_seed(0)
        generator, critic = ConvGenerator(8, 1, width=8), ConvCritic(8, 1, width=16)
        dataset = data.load("digits", 8)
        trainer = Trainer(
            generator.double(), critic.double(), recipe, dataset, seed=3, log_every=1, penalty_engine=engine
        )
        trainer.fit(50)
        assert torch.is_tensor(trainer.sample(4))
        return trainer.history

    fused, autograd = history("fused"), history("autograd")
    assert len(fused) == 50
    for ours, theirs in zip(fused, autograd, strict=True):
        for key in ("critic_loss", "generator_loss", "penalty"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-8, abs=1e-8), (key, ours["step"])
    # The penalty is at work: it starts near its weight (slope 0, (0 - 1)^2) and the critic approaches slope 1.
    assert fused[0]["penalty"] > 5
    assert fused[-1]["penalty"] < fused[0]["penalty"] / 2


def test_a_penalty_that_breaks_is_named() -> None:
    recipe = dataclasses.replace(recipes.get("wgan-gp"), batch_size=8, penalty_weight=1e40)
    trainer = Trainer(PointGenerator(), PointCritic(), recipe, points(), log_every=1)
    with pytest.raises(TrainingDiverged, match="is not finite at step 1"):
        trainer.fit(3)


def test_a_recipe_without_a_penalty_logs_none() -> None:
    trainer = Trainer(PointGenerator(), PointCritic(), SMALL, points(), log_every=1).fit(1)
    assert trainer.history[-1]["penalty"] is None


def test_a_batch_has_the_samples_and_labels_of_its_indices() -> None:
    digits = data.load("digits")
    trainer = Trainer.from_recipe(dataclasses.replace(SMALL, critic_norm="none"), digits)
    batches: list[Any] = []
    loss = trainer.system.critic_loss
    trainer.system.critic_loss = lambda batch: (batches.append(batch), loss(batch))[1]  # type: ignore[method-assign]
    order = BatchOrder(len(digits), 1)  # the stream of the trainer's seed, 0
    trainer.fit(1)
    assert digits.labels is not None
    for batch in batches:
        indices = order.next(8)
        # A copy first: nobody has asked for the labels yet.
        halved = dataclasses.replace(batch, real=0.5 * batch.real)
        assert torch.equal(halved.real, 0.5 * digits.samples[indices])
        assert torch.equal(batch.real, digits.samples[indices])
        assert torch.equal(batch.labels, digits.labels[indices])
        assert torch.equal(halved.labels, batch.labels)
        assert (batch.before, batch.after, batch.whole, len(batch)) == (0, 0, None, 8)
        with pytest.raises(AttributeError, match="captions"):
            _ = batch.captions


def test_n_critic_counts_updates_per_step() -> None:
    trainer = point_trainer(dataclasses.replace(SMALL, n_critic=3)).fit(4)
    for optimizer, updates in ((trainer.critic_optimizer, 12), (trainer.generator_optimizer, 4)):
        assert {int(state["step"]) for state in optimizer.state.values()} == {updates}


def test_the_average_follows_its_recurrence() -> None:
    trainer = point_trainer(dataclasses.replace(SMALL, ema_decay=0.5))
    expected = {name: tensor.clone() for name, tensor in trainer.ema.state_dict().items()}

    def advance(trainer: Trainer) -> None:
        decay = min(0.5, (1 + trainer.step) / (10 + trainer.step))
        for name, value in trainer.generator.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
            else:
                expected[name] = value.clone()

    trainer.fit(15, callbacks=[advance])
    for name, value in trainer.ema.state_dict().items():
        assert torch.allclose(value, expected[name], atol=1e-6), name
    assert not trainer.ema.training
    assert not any(parameter.requires_grad for parameter in trainer.ema.parameters())


def test_the_critic_trains_again_after_a_generator_step() -> None:
    generator, critic = point_networks()
    frozen = critic.layers[0].bias
    frozen.requires_grad_(False)
    before = frozen.clone()
    trainer = Trainer(generator, critic, SMALL, points()).fit(3)
    assert torch.equal(frozen, before), "a parameter that the user froze stays frozen"
    assert [name for name, p in trainer.critic.named_parameters() if not p.requires_grad] == ["layers.0.bias"]


def test_history_has_means_over_the_interval() -> None:
    every, fifth = point_trainer(log_every=1).fit(10), point_trainer(log_every=5).fit(10)
    assert [row["step"] for row in fifth.history] == [5, 10]
    for i, row in enumerate(fifth.history):
        for key in ("critic_loss", "generator_loss"):
            mean = sum(single[key] for single in every.history[5 * i : 5 * i + 5]) / 5
            assert row[key] == pytest.approx(mean)


def test_stop_ends_after_the_step_under_way() -> None:
    trainer = point_trainer()
    trainer.fit(100, callbacks=[lambda t: t.stop() if t.step == 3 else None])
    assert trainer.step == 3
    assert trainer.fit(2).step == 5


def test_samples_depend_on_the_seed_alone() -> None:
    trainer = point_trainer()
    assert torch.equal(trainer.sample(300)[:7], trainer.sample(300)[:7])
    assert not torch.equal(trainer.sample(7), trainer.sample(7, seed=5))
    assert trainer.sample(300).shape == (300, 2)


@pytest.mark.parametrize("n", [0, -1])
def test_bad_counts_are_named(n: int) -> None:
    trainer = point_trainer()
    with pytest.raises(ValueError, match=f"n must be at least 1, got {n}"):
        trainer.sample(n)
    with pytest.raises(ValueError, match=f"steps must be at least 1, got {n}"):
        trainer.fit(n)
    with pytest.raises(ValueError, match=f"log_every must be at least 1, got {n}"):
        point_trainer(log_every=n)


def test_a_generator_without_latent_dim_is_refused() -> None:
    with pytest.raises(ValueError, match="latent_dim"):
        Trainer(nn.Linear(3, 2), PointCritic(), SMALL, points())


# --- divergence


def poison(at: int) -> Any:
    def callback(trainer: Trainer) -> None:
        if trainer.step == at:
            with torch.no_grad():
                next(trainer.generator.parameters()).fill_(float("nan"))

    return callback


def test_divergence_names_the_step() -> None:
    with pytest.raises(TrainingDiverged, match="loss is not finite at step 6") as caught:
        point_trainer(log_every=4).fit(20, callbacks=[poison(at=5)])
    assert caught.value.step == 6


def test_divergence_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    trainer = point_trainer(log_every=100).fit(3)
    trainer.save(path)
    good = path.read_bytes()
    trainer.fit(2, callbacks=[poison(at=4)])
    with pytest.raises(TrainingDiverged, match="at step 5"):
        trainer.save(path)
    assert path.read_bytes() == good


def test_weights_that_broke_in_the_last_update_are_not_saved(tmp_path: Path) -> None:
    trainer = point_trainer(log_every=100).fit(2, callbacks=[poison(at=2)])
    with pytest.raises(TrainingDiverged, match="of the generator is not finite at step 2"):
        trainer.save(tmp_path / "checkpoint.pt")
    assert list(tmp_path.iterdir()) == []


# --- files


@pytest.mark.parametrize("call", ["fsync", "replace", "fdopen"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(path, b"new")
    assert caught.value.filename == str(path)
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_write_is_visible_only_when_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the moment of the rename the new content is on disk, and the old name still has the old one."""
    path = tmp_path / "file"
    write_atomically(path, b"old")
    replace, seen = os.replace, []

    def spy(source: Any, target: Any) -> None:
        seen.append((Path(source).read_bytes(), Path(target).read_bytes(), Path(source).parent))
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    write_atomically(path, b"new")
    assert seen == [(b"new", b"old", tmp_path)]


def test_a_written_file_has_ordinary_permissions(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "checkpoint.pt"
    Trainer.from_recipe(SMALL, data.load("digits", 8)).save(path)
    return path


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_checkpoint_is_refused(saved: Path, tmp_path: Path, share: float) -> None:
    content = saved.read_bytes()
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match="not a lipgan checkpoint, or is truncated or damaged"):
        Trainer.load(path)


def test_a_flipped_bit_is_noticed(saved: Path, tmp_path: Path) -> None:
    content = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        load_generator(path)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path, writer: str) -> None:
    bomb, path = Bomb(tmp_path / "exploded"), tmp_path / "checkpoint.pt"
    if writer == "torch":
        torch.save({"format": "lipgan checkpoint", "version": 1, "recipe": bomb}, path)
    else:
        path.write_bytes(pickle.dumps(bomb))
    with pytest.raises(CheckpointError):
        Trainer.load(path)
    assert not bomb.path.exists()
    if writer == "pickle":
        pickle.loads(path.read_bytes())
        assert bomb.path.exists(), "the bomb of this test is a dud"


def test_another_programs_file_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    for name in ("other.pt", "tensor.pt"):
        with pytest.raises(CheckpointError, match="is not a lipgan checkpoint"):
            Trainer.load(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99"),
        ({"shape": [1, 12, 12]}, "does not fit: .*size mismatch"),
        ({"data": "digit"}, "did you mean digits"),
        ({"recipe": {"name": "x", "paper": "y", "betas": (0.0, 0.9), "momentum": 1}}, "'momentum'"),
        (
            {"recipe": {"name": "x", "paper": "y", "betas": (0.0, 0.9), "loss": "unheard"}},
            "unknown loss",
        ),
        ({"noise": None}, "does not fit"),
    ],
)
def test_a_checkpoint_of_something_else_is_explained(
    saved: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    state = torch.load(saved, weights_only=True)
    torch.save({**state, **change}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=message):
        Trainer.load(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("data", 3, "data must be a name, got 3"),
        ("step", "two", "step must be a whole number, got 'two'"),
        ("step", -1, "step must be a whole number, got -1"),
        ("step", True, "step must be a whole number, got True"),
        ("seed", None, "seed must be a whole number, got None"),
        ("log_every", 2.5, "log_every must be a whole number, got 2.5"),
        ("shape", "12", "shape must be a list of whole numbers, got '12'"),
        ("shape", ["1"], "shape must be a list of whole numbers"),
        ("classes", "3", "classes must be a whole number"),
        ("digest", 3, "digest must be a string"),
        ("recipe", ["gan"], "recipe must be a table with a name"),
        ("recipe", {"name": 3}, "recipe must be a table with a name"),
        ("history", ["a", "b"], "history must be a list of rows, each with a step and numbers, got ['a', 'b']"),
        ("history", [{"step": "one"}], "history must be a list of rows"),
        ("history", [{"step": 1, "sigma": "big"}], "history must be a list of rows"),
        ("history", 5, "history must be a list of rows"),
        ("unlogged", [3], "unlogged must be a list of tables of numbers, got [3]"),
        ("unlogged", [{"critic_loss": torch.zeros(2)}], "unlogged must be a list of tables of numbers"),
    ],
)
def test_an_entry_of_another_kind_is_named(saved: Path, tmp_path: Path, name: str, value: Any, message: str) -> None:
    state = torch.load(saved, weights_only=True) | {name: value}
    torch.save(state, tmp_path / "other.pt")
    for load in (Trainer.load, load_generator):
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path / "other.pt")
        assert f"checkpoint {tmp_path / 'other.pt'} is damaged: {message}" in str(caught.value)


def test_a_checkpoint_that_lacks_an_entry_is_explained(saved: Path, tmp_path: Path) -> None:
    state = torch.load(saved, weights_only=True)
    del state["order"]
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="lacks the entry 'order'"):
        Trainer.load(tmp_path / "checkpoint.pt")


def test_own_networks_and_data_have_to_be_handed_in(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    point_trainer().save(path)
    generator, critic = point_networks()
    with pytest.raises(CheckpointError, match="unknown data set 'points'"):
        Trainer.load(path, generator=generator, critic=critic)
    with pytest.raises(CheckpointError, match="both generator and critic"):
        Trainer.load(path, generator=generator, data=points())
    with pytest.raises(CheckpointError, match="shape"):
        Trainer.load(path, generator=generator, critic=critic, data=data.load("digits", 8))


def test_a_run_is_not_resumed_on_other_values(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    labels = np.arange(40) % 2
    file, path = tmp_path / "rows.npz", tmp_path / "checkpoint.pt"
    recipe = dataclasses.replace(recipes.get("gan"), batch_size=8)
    np.savez(file, x=rows, y=labels)
    Trainer.from_recipe(recipe, data.load(str(file))).save(path)
    assert Trainer.load(path).step == 0
    state = torch.load(path, weights_only=True)
    wanted = hashlib.sha256(b"torch.float32 [40, 2] " + rows.tobytes() + b"torch.int64 [40] " + labels.tobytes())
    assert state["digest"] == wanted.hexdigest()
    changed = rows.copy()
    changed[17, 1] = np.nextafter(changed[17, 1], np.float32(9))
    for x, y in ((changed, labels), (rows, 1 - labels), (rows[::-1], labels)):
        np.savez(file, x=x, y=y)
        with pytest.raises(CheckpointError, match="has other samples or labels than those"):
            Trainer.load(path)
    with pytest.raises(CheckpointError, match="other samples or labels"):
        Trainer.load(path, data=Dataset("mine", torch.from_numpy(changed), torch.from_numpy(labels)))
    Trainer.load(path, data=Dataset("mine", torch.from_numpy(rows), torch.from_numpy(labels)))
    # Earlier versions wrote none.
    del state["digest"]
    torch.save(state, path)
    assert Trainer.load(path).step == 0


def test_the_digest_of_half_types_and_of_strided_samples() -> None:
    x = torch.arange(6000.0).view(3000, 2)
    assert Dataset("a", x).digest == Dataset("b", x.T.contiguous().T).digest
    assert Dataset("a", x.bfloat16()).digest != Dataset("a", x.half()).digest
    later = x.clone()
    later[-1, -1] += 1
    assert Dataset("a", later).digest != Dataset("a", x).digest


def test_a_missing_checkpoint_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Trainer.load(tmp_path / "nothing.pt")


def test_load_generator_is_the_average(saved: Path) -> None:
    generator, trainer = load_generator(saved), Trainer.load(saved)
    z = torch.randn(4, trainer.generator.latent_dim)
    assert torch.equal(generator(z), trainer.ema(z))
    assert not generator.training
