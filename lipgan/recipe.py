"""What a recipe is: its fields, and their ranges.

A recipe says what a paper fixes: the training scheme, the objective, how the critic is kept Lipschitz, the optimizer's
constants. It holds plain values only, so that it can be printed, compared, and stored in a checkpoint without pickling
code. `lipgan.recipes` is the table of them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, get_origin, get_type_hints

from lipgan._choices import BATCH_NORMS, CONDITIONINGS, MINIBATCHES, PENALTY_FORMS, RANGES, range_error

__all__ = ["CHOICES", "FIELDS", "Recipe"]

#: The values of the fields that have a few.
CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "conditioning": CONDITIONINGS,
        "minibatch": MINIBATCHES,
        "batch_norm": BATCH_NORMS,
        "generator_objective": ("loss", "feature-matching"),
        "critic_norm": ("none", "spectral", "gradient"),
        "generator_norm": ("none", "spectral"),
        "penalty": ("none", *PENALTY_FORMS),
        "optimizer": ("adam", "rmsprop", "sgd"),
        "lr_decay": ("none", "linear"),
        "precision": ("float32", "bfloat16", "float16"),
    }
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train and how; change a field with `dataclasses.replace`, which checks it again.

    Attributes:
        name: the key in the table.
        paper: the source.
        system: the training scheme, a name of `lipgan.systems.names`; "gan" is the ordinary one.
        options: constants of that scheme, by name; what it lacks has the scheme's defaults.
        architecture: a name of `lipgan.models.names`.
        latent_dim: length of one noise vector.
        conditioning: how both networks see labels: "none", "concat" (Mirza and Osindero 2014), "auxiliary" (a
            classifier beside the scores, Odena et al. 2016), "projection" (Miyato and Koyama 2018).
        minibatch: a layer of the critic that compares the samples of a batch: "none", "discrimination" (Salimans et al.
            2016), "stddev" (Karras et al. 2017).
        batch_norm: the generator's: "batch", or "virtual" (Salimans et al. 2016).
        loss: a name of `lipgan.losses.names`.
        label_smoothing: the label of real samples is 1 minus this, for losses that have labels.
        generator_objective: "loss", or "feature-matching" in its place (Salimans et al. 2016).
        historical_averaging: weight of the squared distance of the parameters to their own average over time, in
            both networks' losses (Salimans et al. 2016).
        instance_noise: standard deviation of the noise on all that the critic sees; falls to 0 linearly over ``steps``
            (Sonderby et al. 2016, Arjovsky and Bottou 2017).
        critic_norm, generator_norm: "spectral" normalizes every weight of the network, "gradient" (the critic only)
            its output by the gradient (Wu et al. 2021), "none" leaves it alone.
        weight_clip: every parameter of the critic is kept within plus or minus this after its update; 0 for none.
        penalty: a kind of `lipgan.gradient_penalty` that is added to the critic's loss, or "none".
        penalty_weight, penalty_target: its factor and the norm that it aims at.
        optimizer: "adam", "rmsprop" or "sgd".
        generator_lr, critic_lr: learning rates; two of them are the two-timescale rule (Heusel et al. 2017).
        betas: Adam's decay rates; RMSProp takes the second, SGD the first as momentum.
        lr_decay: "linear" takes the learning rates to 0 over ``steps``, "none" keeps them.
        n_critic: critic updates per generator update, that is per step.
        batch_size: samples per update.
        accumulation: parts of the batch that go through the networks one after the other.
        max_grad_norm: gradients of a network longer than this are shortened to it; 0 for no limit.
        precision: of the forward passes: "float32", or "bfloat16" or "float16" by `torch.autocast`.
        ema_decay: the generator that is sampled is ``ema_decay * average + (1 - ema_decay) * generator``.
        steps: a length after which samples are worth looking at.

    Raises:
        ValueError: a field out of its range, or fields that exclude each other. Whether the system, the architecture
            and the loss exist is for `lipgan.recipes.check` to say.
    """

    name: str
    paper: str
    system: str = "gan"
    options: dict[str, float] = field(default_factory=dict)
    architecture: str = "conv"
    latent_dim: int = 64
    conditioning: str = "none"
    minibatch: str = "none"
    batch_norm: str = "batch"
    loss: str = "non-saturating"
    label_smoothing: float = 0.0
    generator_objective: str = "loss"
    historical_averaging: float = 0.0
    instance_noise: float = 0.0
    critic_norm: str = "none"
    generator_norm: str = "none"
    weight_clip: float = 0.0
    penalty: str = "none"
    penalty_weight: float = 10.0
    penalty_target: float = 1.0
    optimizer: str = "adam"
    generator_lr: float = 2e-4
    critic_lr: float = 2e-4
    betas: tuple[float, float] = (0.0, 0.9)
    lr_decay: str = "none"
    n_critic: int = 1
    batch_size: int = 64
    accumulation: int = 1
    max_grad_norm: float = 0.0
    precision: str = "float32"
    ema_decay: float = 0.999
    steps: int = 2000

    def __post_init__(self) -> None:
        for option, value in self.options.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
                raise ValueError(f"options[{option!r}] must be a finite number, got {value!r}")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        for name in (
            "historical_averaging",
            "instance_noise",
            "weight_clip",
            "penalty_weight",
            "penalty_target",
            "max_grad_norm",
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and >= 0, got {value!r}")
        for name in ("latent_dim", "n_critic", "batch_size", "accumulation", "steps"):
            value = getattr(self, name)
            problem = range_error(value if isinstance(value, int) else 0, *RANGES[name])
            if problem is not None:
                raise ValueError(f"{name} {problem}, got {value!r}")
        for name in ("generator_lr", "critic_lr"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive and finite, got {value!r}")
        for name, value in (("betas", self.betas[0]), ("betas", self.betas[1]), ("ema_decay", self.ema_decay)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {value!r}")
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation must divide batch_size {self.batch_size}, got {self.accumulation}")
        if self.penalty != "none" and self.critic_norm == "gradient":
            raise ValueError(f"critic_norm 'gradient' excludes a penalty, got penalty {self.penalty!r}")

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, in values that JSON and TOML know; `lipgan.recipes.from_dict` reads them."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {**values, "options": dict(self.options), "betas": list(self.betas)}


#: The fields that a run may change, with their types.
FIELDS: Mapping[str, type] = MappingProxyType(
    {
        name: get_origin(annotation) or annotation
        for name, annotation in get_type_hints(Recipe).items()
        if name not in ("name", "paper")
    }
)
