"""The configuration of a run: TOML files, flags, and what both make of a recipe."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from system_checks import assert_same

from lipgan import models, recipes
from lipgan.__main__ import main
from lipgan._choices import RANGES
from lipgan.recipes import CHOICES, FIELDS
from lipgan.training import Trainer, config

pytestmark = pytest.mark.usefixtures("single_thread")

QUICK = ["--recipe", "gan", "--data", "ring", "--batch-size", "8", "--log-every", "2", "--device", "cpu"]


def train(out: Path, *arguments: str) -> int:
    return main(["train", "--out", str(out), *arguments])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[recipes.Recipe]:
    """The recipes of the runs that begin; none of them trains."""
    seen: list[recipes.Recipe] = []

    def begin(recipe: recipes.Recipe, *args: Any, **kwargs: Any) -> Any:
        seen.append(recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr("lipgan.commands.train.Trainer.from_recipe", begin)
    return seen


# --- every field


def other(name: str) -> Any:
    """A value of a field that the recipe "gan" does not have."""
    default = getattr(recipes.get("gan"), name)
    special = {"system": "unrolled", "options": {}, "architecture": "dcgan", "loss": "minimax", "betas": [0.25, 0.75]}
    if name in special:
        return special[name]
    if FIELDS[name] is int:
        return 2 * default
    if FIELDS[name] is float:
        return 0.25
    return next(choice for choice in CHOICES[name] if choice != default)


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "options"])
def test_every_field_has_a_flag_and_a_place_in_the_file(name: str, begun: list[recipes.Recipe], tmp_path: Path) -> None:
    value = other(name)
    assert value != getattr(recipes.get("gan"), name)
    flag = "--" + name.replace("_", "-")
    words = [str(word) for word in (value if isinstance(value, list) else [value])]
    train(tmp_path, "--recipe", "gan", "--data", "ring", flag, *words, *(["--lr-decay", "linear"] * (name == "steps")))
    text = config.dumps(
        {"recipe": "gan", "data": "ring", name: value, **({"lr_decay": "linear"} if name == "steps" else {})}
    )
    train(tmp_path, "--config", str(written(tmp_path / "c.toml", text)))
    assert len(begun) == 2
    for recipe in begun:
        reached = getattr(recipe, name)
        assert (list(reached) if isinstance(value, list) else reached) == value
        changed = {field for field in FIELDS if getattr(recipe, field) != getattr(recipes.get("gan", (2,)), field)}
        assert changed - {"lr_decay"} <= {name}


def test_options_are_added_to_those_of_the_recipe(begun: list[recipes.Recipe], tmp_path: Path) -> None:
    train(tmp_path, "--recipe", "gan", "--data", "ring", "--system", "unrolled", "--option", "unrolled_rate=0.25")
    text = 'recipe = "gan"\ndata = "ring"\nsystem = "unrolled"\n[options]\nunrolled_rate = 0.25\n'
    train(tmp_path, "--config", str(written(tmp_path / "c.toml", text)), "--option", "unrolled_steps=2")
    assert begun[0].options == {"unrolled_rate": 0.25}
    assert begun[1].options == {"unrolled_rate": 0.25, "unrolled_steps": 2.0}


def test_flags_override_the_file(begun: list[recipes.Recipe], tmp_path: Path) -> None:
    path = written(tmp_path / "c.toml", 'recipe = "gan"\ndata = "ring"\ncritic_lr = 0.5\nn_critic = 3\n')
    train(tmp_path, "--config", str(path), "--critic-lr", "0.125")
    assert (begun[0].name, begun[0].critic_lr, begun[0].n_critic) == ("gan", 0.125, 3)


def test_points_have_values_of_their_own_where_nothing_else_is_said(
    begun: list[recipes.Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flags and files win, also those that say what the source says; the run tells what it took."""
    path = written(tmp_path / "c.toml", 'recipe = "wgan-gp"\ncritic_lr = 1e-4\n')
    train(tmp_path, "--config", str(path), "--data", "ring", "--latent-dim", "64")
    wanted = {"latent_dim": 64, "critic_lr": 1e-4, "generator_lr": 1e-3, "ema_decay": 0.9, "penalty_weight": 0.1}
    assert {name: getattr(begun[0], name) for name in wanted} == wanted
    told = "for vectors, where neither flags nor --config say otherwise: generator_lr 0.001, ema_decay 0.9, penalty_"
    assert told in capsys.readouterr().out
    train(tmp_path, "--config", str(path), "--data", "digits", "--size", "8")
    assert begun[1] == dataclasses.replace(recipes.get("wgan-gp"), critic_lr=1e-4)
    assert "for vectors" not in capsys.readouterr().out


def test_a_recipe_by_name_has_the_values_for_the_data_and_one_by_value_its_own() -> None:
    assert Trainer.from_recipe("gan", "ring").recipe == recipes.get("gan", (2,))
    assert Trainer.from_recipe(recipes.get("gan"), "ring").recipe == recipes.get("gan")
    networks = models.build("mlp", (2,))
    assert Trainer(*networks, "gan", "ring").recipe == recipes.get("gan", (2,))


def test_what_is_scheduled_spans_the_steps_of_the_run() -> None:
    for values in ({"recipe": "instance-noise"}, {"recipe": "gan", "lr_decay": "linear"}):
        assert config.recipe_of({**values, "steps": 7}).steps == 7
    # Nothing of this one depends on them: its checkpoint may be continued to any step.
    assert config.recipe_of({"recipe": "gan", "steps": 7}).steps == recipes.get("gan").steps


# --- the file that a run writes


@pytest.mark.parametrize(
    "changes",
    [
        ["--critic-lr", "3e-5", "--betas", "0.25", "0.9", "--seed", "5"],
        ["--recipe", "instance-noise", "--architecture", "mlp", "--lr-decay", "linear", "--accumulation", "2"],
        ["--system", "unrolled", "--option", "unrolled_steps=1", "--option", "unrolled_rate=0.01"],
        ["--data", "digits", "--size", "8", "--critic-norm", "spectral"],
    ],
)
def test_the_effective_configuration_makes_the_same_run(changes: list[str], tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    assert train(first, *QUICK, "--steps", "4", "--save-every", "3", *changes) == 0
    assert train(again, "--config", str(first / "config.toml")) == 0
    states = [torch.load(out / "checkpoint.pt", weights_only=True) for out in (first, again)]
    assert states[0]["step"] == 4
    assert_same(*states)
    for name in ("metrics.jsonl", "samples.png", "config.toml"):
        assert (first / name).read_bytes() == (again / name).read_bytes()


def test_a_run_resumes_with_its_own_configuration_and_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(out, *QUICK, "--steps", "2", "--option", "unrolled_steps=1", "--system", "unrolled") == 0
    assert train(out, "--resume", "--config", str(out / "config.toml"), "--steps", "3") == 0
    before = (out / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    text = (out / "config.toml").read_text().replace("critic_lr = 0.001", "critic_lr = 0.003")
    for arguments, message in (
        (["--config", str(written(tmp_path / "c.toml", text))], "with --critic-lr 0.001, so it cannot be resumed"),
        (["--critic-lr", "2e-4"], "with --critic-lr 0.001, so it cannot be resumed with --critic-lr 0.0002"),
        (["--recipe", "wgan"], "with --recipe gan, so it cannot be resumed with --recipe wgan"),
        (["--betas", "0.1", "0.9"], "with --betas [0.5, 0.999]"),
        (["--option", "unrolled_steps=2"], "unrolled_steps"),
        (["--data", "grid"], "with --data ring"),
        (["--log-every", "3"], "with --log-every 2"),
    ):
        assert train(out, "--resume", "--steps", "4", *arguments) == 2
        assert message in error_of(capsys)
        assert (out / "checkpoint.pt").read_bytes() == before


def test_a_decayed_run_ends_where_its_step_sizes_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train(out, *QUICK, "--steps", "2", "--lr-decay", "linear") == 0
    capsys.readouterr()
    assert train(out, "--resume", "--steps", "3") == 2
    assert "--steps 3 is past the 2 over which --lr-decay linear took the learning rates to 0" in error_of(capsys)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,8}", fullmatch=True),
        st.one_of(
            st.text(),
            st.integers(-(2**63), 2**63 - 1),
            st.floats(allow_nan=False, allow_infinity=False),
            st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=3),
        ),
    ),
    st.dictionaries(st.text(min_size=1), st.floats(allow_nan=False, allow_infinity=False)),
)
def test_what_is_written_is_what_is_read(values: dict[str, Any], options: dict[str, float]) -> None:
    expected = {**values, "table": options} if options else values
    assert config.tomllib.loads(config.dumps({**values, "table": options, "nothing": None})) == expected


def test_every_recipe_survives_the_file(tmp_path: Path) -> None:
    for name in recipes.names():
        row = recipes.get(name)
        values = {key: value for key, value in row.as_dict().items() if key in FIELDS}
        path = written(tmp_path / "c.toml", config.dumps({"recipe": name, **values}))
        recipe = config.recipe_of(config.read(path))
        assert dataclasses.asdict(recipe) == dataclasses.asdict(row), name


# --- bad input


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("critic_rl = 1", "unknown field in"),
        ("critic_rl = 1", "'critic_rl'; did you mean critic_lr"),
        ("critic_lr = 'fast'", "must be of type float, got 'fast'"),
        ("batch_size = 1.5", "batch_size in"),
        ("batch_size = true", "must be of type int, got True"),
        ("betas = [0.5]", "must be a list of two numbers, got [0.5]"),
        ("betas = 0.5", "must be a list of two numbers, got 0.5"),
        ("options = 3", "options in"),
        ("recipe = 3", "recipe in"),
        ("recipe = 'sngam'", "unknown recipe 'sngam'; did you mean sngan"),
        ("steps = 0", "must be a whole number of at least 1, got 0"),
        ("log_every = 0", "must be a whole number of at least 1, got 0"),
        ("seed = -1", "must be a whole number of at least 0, got -1"),
        ("n_critic = 0", "n_critic in {path} must be a whole number of at least 1, got 0"),
        ("critic_lr = nan", "critic_lr must be positive and finite, got nan"),
        ("penalty = 'wgan'", "penalty must be one of"),
        ("accumulation = 3", "accumulation must divide batch_size 64, got 3"),
        ("[options]\nunrolled = 1", "unknown option of the system 'gan' 'unrolled'"),
        ("this is no TOML", "is not TOML"),
        (
            "batch_size = 1000000000000",
            "batch_size in {path} must be a whole number of at most 1048576, got 1000000000000",
        ),
        ("accumulation = 1048577", "accumulation in {path} must be a whole number of at most 1048576"),
        ("n_critic = 1048577", "n_critic in {path} must be a whole number of at most 1048576"),
        ("latent_dim = 1048577", "latent_dim in {path} must be a whole number of at most 1048576"),
        ("size = 16385", "size in {path} must be a whole number of at most 16384, got 16385"),
        (f"seed = {10**39}", f"seed in {{path}} must be a whole number of at most {2**63 - 1}, got {10**39}"),
        (f"critic_lr = {10**400}", "critic_lr in {path} must be of type float, got 1000"),
        (f"seed = {'1' * 5000}", "{path} is not TOML: Exceeds the limit"),
        (f"[options]\na = {'[' * 9000}", "{path} is nested too deeply"),
        ("a = 1\na = 2", "is not TOML"),
        ("\x00", "is not TOML"),
    ],
)
def test_a_file_that_cannot_be_used_is_explained(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "c.toml", text)
    assert train(tmp_path / "run", "--config", str(path)) == 2
    assert message.replace("{path}", str(path)) in error_of(capsys)
    assert not (tmp_path / "run").exists()


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("seed = 3\n", encoding="utf-8-sig")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    assert config.read(path) == {"seed": 3}


@pytest.mark.parametrize("name", ["latent_dim", "n_critic", "batch_size", "accumulation", "steps"])
def test_recipes_know_their_ranges(name: str) -> None:
    least, largest = RANGES[name]
    changed = (
        dataclasses.replace(recipes.get("gan"), batch_size=largest) if name == "accumulation" else recipes.get("gan")
    )
    assert getattr(dataclasses.replace(changed, **{name: largest}), name) == largest
    for value in (least - 1, largest + 1):
        with pytest.raises(ValueError, match=rf"{name} must be a whole number of at (least|most) \d+, got {value}$"):
            dataclasses.replace(changed, **{name: value})


def test_a_trainer_refuses_seeds_that_are_no_numbers_of_63_bits() -> None:
    for seed, bound in ((-1, "at least 0"), (2**63, f"at most {2**63 - 1}"), (10**39, f"at most {2**63 - 1}")):
        with pytest.raises(ValueError, match=f"seed must be {bound}, got {seed}"):
            Trainer.from_recipe("gan", "ring", seed=seed)
    assert Trainer.from_recipe("gan", "ring", seed=2**63 - 1).seed == 2**63 - 1


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", "--config", str(tmp_path / "nothing.toml")) == 2
    assert "nothing.toml: No such file" in error_of(capsys)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    assert train(tmp_path / "run", "--config", str(tmp_path / "binary.toml")) == 2
    assert "binary.toml is not TOML" in error_of(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--option", "unrolled_steps"], "--option: must be NAME=NUMBER, got 'unrolled_steps'"),
        (["--option", "unrolled_steps=many"], "must be NAME=NUMBER"),
        (["--betas", "0.5"], "expected 2 arguments"),
    ],
)
def test_flags_that_do_not_parse(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train(tmp_path / "run", *arguments)
    assert message in error_of(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--option", "unrolled_steps=1"], "unknown option of the system 'gan' 'unrolled_steps'"),
        (["--system", "unroled"], "unknown system 'unroled'; did you mean unrolled"),
        (["--architecture", "dcgam"], "did you mean dcgan"),
        (["--label-smoothing", "0.1", "--loss", "hinge"], "loss 'hinge' has no option 'label_smoothing'"),
        (["--precision", "float8"], "precision must be one of float32, bfloat16, float16, got 'float8'"),
        (["--conditioning", "concat", "--data", "swiss-roll"], "needs labels, which 'swiss-roll' lacks"),
    ],
)
def test_flags_that_do_not_go_together(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.suppress(SystemExit):
        assert train(tmp_path / "run", *QUICK, "--steps", "1", *arguments) == 2
    assert message in error_of(capsys)
    assert not (tmp_path / "run").exists()
