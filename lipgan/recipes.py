"""Every named system, as one row of one table."""

from collections.abc import Mapping
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any

from lipgan import models, systems
from lipgan._registry import lookup
from lipgan.objectives import losses
from lipgan.recipe import CHOICES, FIELDS, Recipe

__all__ = ["CHOICES", "FIELDS", "RECIPES", "Recipe", "check", "for_shape", "from_dict", "get", "is_scheduled", "names"]


def from_dict(values: Mapping[str, Any]) -> Recipe:
    """The recipe of `Recipe.as_dict`; fields that are absent have their defaults.

    Raises:
        ValueError: an unknown field or name (the message names the nearest ones), or a field out of its range.
    """
    known = {entry.name: entry for entry in fields(Recipe)}
    for name in values:
        lookup(known, name, "field of a recipe")
    values = dict(values)
    if "betas" in values:
        values["betas"] = tuple(values["betas"])
    return check(Recipe(**values))


def check(recipe: Recipe) -> Recipe:
    """``recipe`` itself, if the system, its options, the architecture and the loss that it names exist.

    Raises:
        ValueError: an unknown name; the message names the nearest ones.
    """
    lookup(models.ARCHITECTURES, recipe.architecture, "architecture")
    losses.get(recipe.loss, **({"label_smoothing": recipe.label_smoothing} if recipe.label_smoothing else {}))
    known = systems.get(recipe.system).OPTIONS
    for option in recipe.options:
        lookup(known, option, f"option of the system {recipe.system!r}")
    return recipe


def is_scheduled(recipe: Recipe) -> bool:
    """Whether training depends on ``recipe.steps``: something changes over that many."""
    return recipe.lr_decay != "none" or recipe.instance_noise > 0 or systems.get(recipe.system).SCHEDULED


def _table(*rows: Recipe) -> Mapping[str, Recipe]:
    return MappingProxyType({row.name: row for row in rows})


# Learning rates and decay rates of DCGAN (Radford et al. 2015), which most systems without a Lipschitz constraint took.
_DCGAN: Mapping[str, Any] = {"generator_lr": 2e-4, "critic_lr": 2e-4, "betas": (0.5, 0.999)}
_SALIMANS = "Salimans et al. 2016, Improved Techniques for Training GANs, 1606.03498"
_NOWOZIN = "Nowozin et al. 2016, f-GAN, 1606.00709"

#: By name.
RECIPES = _table(
    # --- the training scheme and its objectives
    Recipe(
        name="gan",
        paper="Goodfellow et al. 2014, Generative Adversarial Networks, 1406.2661",
        architecture="mlp",
        **_DCGAN,
    ),
    Recipe(
        name="minimax",
        paper="Goodfellow et al. 2014, 1406.2661, equation 1",
        architecture="mlp",
        loss="minimax",
        **_DCGAN,
    ),
    Recipe(
        name="lsgan",
        paper="Mao et al. 2017, Least Squares Generative Adversarial Networks, 1611.04076",
        architecture="dcgan",
        loss="least-squares",
        **_DCGAN,
    ),
    Recipe(
        name="rgan",
        paper="Jolicoeur-Martineau 2018, The Relativistic Discriminator, 1807.00734",
        architecture="dcgan",
        loss="relativistic",
        **_DCGAN,
    ),
    *(
        # Of images the paper has the networks of DCGAN, and replaces the objective.
        Recipe(name=f"f-gan-{divergence}", paper=_NOWOZIN, architecture="dcgan", loss=f"f-{divergence}", **_DCGAN)
        for divergence in ("kl", "reverse-kl", "pearson", "hellinger", "jensen-shannon", "gan")
    ),
    Recipe(
        name="kl-wgan",
        paper="Song and Ermon 2020, Bridging the Gap Between f-GANs and Wasserstein GANs, 1910.09779",
        loss="kl-wgan",
        critic_norm="spectral",
    ),
    # --- how the critic is kept Lipschitz
    Recipe(
        name="wgan",
        paper="Arjovsky et al. 2017, Wasserstein GAN, 1701.07875, Algorithm 1",
        loss="wasserstein",
        weight_clip=0.01,
        optimizer="rmsprop",
        generator_lr=5e-5,
        critic_lr=5e-5,
        betas=(0.0, 0.99),
        n_critic=5,
    ),
    Recipe(
        name="wgan-gp",
        paper="Gulrajani et al. 2017, Improved Training of Wasserstein GANs, 1704.00028, Algorithm 1",
        loss="wasserstein",
        penalty="wgan-gp",
        generator_lr=1e-4,
        critic_lr=1e-4,
        n_critic=5,
    ),
    Recipe(
        name="wgan-lp",
        paper="Petzka et al. 2018, On the Regularization of Wasserstein GANs, 1709.08894",
        loss="wasserstein",
        penalty="lp",
        generator_lr=1e-4,
        critic_lr=1e-4,
        n_critic=5,
    ),
    Recipe(
        name="dragan",
        paper="Kodali et al. 2017, On Convergence and Stability of GANs, 1705.07215",
        penalty="dragan",
        **_DCGAN,
    ),
    Recipe(
        name="sngan",
        paper="Miyato et al. 2018, Spectral Normalization for Generative Adversarial Networks, 1802.05957, Algorithm 1",
        loss="hinge",
        critic_norm="spectral",
    ),
    Recipe(
        name="gngan",
        paper="Wu et al. 2021, Gradient Normalization for Generative Adversarial Networks, 2109.02235",
        loss="hinge",
        critic_norm="gradient",
    ),
    Recipe(
        name="lipschitz",
        paper="Anil et al. 2019, Sorting Out Lipschitz Function Approximation, 1811.05381",
        architecture="lipschitz",
        loss="wasserstein",
        n_critic=5,
    ),
    # --- architectures
    Recipe(
        name="dcgan",
        paper="Radford et al. 2015, Unsupervised Representation Learning with DCGAN, 1511.06434",
        architecture="dcgan",
        batch_size=128,
        **_DCGAN,
    ),
    Recipe(
        name="sngan-resnet",
        paper="Miyato et al. 2018, 1802.05957, appendix B",
        architecture="sngan",
        loss="hinge",
        critic_norm="spectral",
        n_critic=5,
    ),
    Recipe(
        name="sagan",
        paper="Zhang et al. 2018, Self-Attention Generative Adversarial Networks, 1805.08318",
        architecture="sagan",
        loss="hinge",
        critic_norm="spectral",
        generator_norm="spectral",
        generator_lr=1e-4,
        critic_lr=4e-4,
    ),
    Recipe(
        name="r3gan",
        paper="Huang et al. 2024, The GAN is dead; long live the GAN!, 2501.05441",
        architecture="modern",
        loss="relativistic",
        penalty="r1+r2",
        penalty_weight=1.0,
        betas=(0.0, 0.99),
    ),
    # --- labels
    Recipe(
        name="cgan",
        paper="Mirza and Osindero 2014, Conditional Generative Adversarial Nets, 1411.1784",
        conditioning="concat",
        **_DCGAN,
    ),
    Recipe(
        name="acgan",
        paper="Odena et al. 2016, Conditional Image Synthesis with Auxiliary Classifier GANs, 1610.09585",
        architecture="dcgan",
        conditioning="auxiliary",
        **_DCGAN,
    ),
    Recipe(
        name="projection",
        paper="Miyato and Koyama 2018, cGANs with Projection Discriminator, 1802.05637",
        architecture="sngan",
        loss="hinge",
        conditioning="projection",
        critic_norm="spectral",
        n_critic=5,
    ),
    # --- techniques
    Recipe(
        name="ttur",
        paper="Heusel et al. 2017, GANs Trained by a Two Time-Scale Update Rule, 1706.08500",
        architecture="dcgan",
        generator_lr=5e-4,
        critic_lr=1e-4,
        betas=(0.5, 0.999),
    ),
    Recipe(name="label-smoothing", paper=_SALIMANS, architecture="dcgan", label_smoothing=0.1, **_DCGAN),
    Recipe(
        name="feature-matching",
        paper=_SALIMANS,
        architecture="dcgan",
        generator_objective="feature-matching",
        **_DCGAN,
    ),
    Recipe(name="historical-averaging", paper=_SALIMANS, architecture="mlp", historical_averaging=1.0, **_DCGAN),
    Recipe(
        name="minibatch-discrimination", paper=_SALIMANS, architecture="dcgan", minibatch="discrimination", **_DCGAN
    ),
    Recipe(name="virtual-batch-norm", paper=_SALIMANS, architecture="dcgan", batch_norm="virtual", **_DCGAN),
    Recipe(
        name="instance-noise",
        paper="Arjovsky and Bottou 2017, Towards Principled Methods for Training GANs, 1701.04862",
        instance_noise=0.5,
        **_DCGAN,
    ),
    # --- training schemes with rules of their own
    Recipe(
        name="began",
        paper="Berthelot et al. 2017, BEGAN: Boundary Equilibrium Generative Adversarial Networks, 1703.10717",
        system="began",
        options={"gamma": 0.7},
        architecture="autoencoder",
        latent_dim=16,
        generator_lr=1e-4,
        critic_lr=1e-4,
        betas=(0.5, 0.999),
        batch_size=16,
        steps=3000,
    ),
    Recipe(
        name="unrolled",
        paper="Metz et al. 2017, Unrolled Generative Adversarial Networks, 1611.02163",
        system="unrolled",
        loss="minimax",
        generator_lr=1e-3,
        critic_lr=1e-4,
        betas=(0.5, 0.999),
    ),
    Recipe(
        name="mad-gan",
        paper="Ghosh et al. 2018, Multi-Agent Diverse Generative Adversarial Networks, 1704.02906",
        system="mad-gan",
        **_DCGAN,
    ),
    Recipe(
        name="progressive",
        paper="Karras et al. 2018, Progressive Growing of GANs, 1710.10196",
        system="progressive",
        loss="wasserstein",
        penalty="wgan-gp",
        generator_lr=1e-3,
        critic_lr=1e-3,
        betas=(0.0, 0.99),
        batch_size=16,
    ),
    Recipe(
        name="lapgan",
        paper="Denton et al. 2015, Deep Generative Image Models Using a Laplacian Pyramid, 1506.05751",
        system="lapgan",
        **_DCGAN,
    ),
    Recipe(
        name="mode-regularized",
        paper="Che et al. 2017, Mode Regularized Generative Adversarial Networks, 1612.02136",
        system="mode-regularized",
        **_DCGAN,
    ),
    Recipe(
        name="vae-gan",
        paper="Larsen et al. 2016, Autoencoding beyond Pixels Using a Learned Similarity Metric, 1512.09300",
        system="vae-gan",
        **_DCGAN,
    ),
    Recipe(
        name="cramer",
        paper="Bellemare et al. 2017, The Cramer Distance as a Solution to Biased Wasserstein Gradients, 1705.10743",
        system="cramer",
        penalty="wgan-gp",
        generator_lr=1e-4,
        critic_lr=1e-4,
        betas=(0.5, 0.9),
        n_critic=5,
    ),
    Recipe(
        name="ebgan",
        paper="Zhao et al. 2017, Energy-based Generative Adversarial Network, 1609.03126",
        system="ebgan",
        architecture="autoencoder",
        loss="energy",
        generator_lr=1e-3,
        critic_lr=1e-3,
        betas=(0.5, 0.999),
    ),
    Recipe(
        name="infogan",
        paper="Chen et al. 2016, InfoGAN: Interpretable Representation Learning, 1606.03657",
        system="infogan",
        generator_lr=1e-3,
        critic_lr=2e-4,
        betas=(0.5, 0.999),
    ),
    Recipe(
        name="adaptive-divergence",
        paper="Borisyak et al. 2020, Adaptive Divergence for Rapid Adversarial Optimization, PeerJ CS 6:e274",
        system="adaptive-divergence",
        **_DCGAN,
    ),
    Recipe(
        name="aae",
        paper="Makhzani et al. 2015, Adversarial Autoencoders, 1511.05644",
        system="aae",
        latent_dim=8,
        **_DCGAN,
    ),
    Recipe(
        name="ali",
        paper="Dumoulin et al. 2017, Adversarially Learned Inference, 1606.00704; BiGAN, 1605.09782",
        system="ali",
        latent_dim=16,
        **_DCGAN,
    ),
    Recipe(
        name="veegan",
        paper="Srivastava et al. 2017, VEEGAN: Reducing Mode Collapse in GANs, 1705.07761",
        system="ali",
        options={"reconstruction": 1.0},
        latent_dim=16,
        **_DCGAN,
    ),
    Recipe(
        name="avb",
        paper="Mescheder et al. 2017, Adversarial Variational Bayes, 1701.04722",
        system="avb",
        latent_dim=8,
        generator_lr=1e-3,
        critic_lr=1e-3,
        betas=(0.5, 0.999),
    ),
    Recipe(
        name="alpha-gan",
        paper="Rosca et al. 2017, Variational Approaches for Auto-Encoding Generative Adversarial Networks, 1706.04987",
        system="alpha-gan",
        latent_dim=16,
        **_DCGAN,
    ),
    Recipe(
        name="gan-cls",
        paper="Reed et al. 2016, Generative Adversarial Text to Image Synthesis, 1605.05396",
        system="gan-cls",
        architecture="dcgan",
        generator_lr=5e-4,
        critic_lr=1e-3,
        betas=(0.5, 0.999),
    ),
    Recipe(
        name="seqgan",
        paper="Yu et al. 2017, SeqGAN, 1609.05473; for polyphonic music Lee et al. 2017, 1710.11418",
        system="seqgan",
        generator_lr=5e-3,
        critic_lr=3e-3,
        # The gradients of the rewards are much smaller than those of the likelihood, whose squares Adam must forget.
        betas=(0.9, 0.99),
        lr_decay="linear",
        ema_decay=0.9,
        steps=600,
    ),
    Recipe(
        name="cyclegan",
        paper="Zhu et al. 2017, Unpaired Image-to-Image Translation (CycleGAN), 1703.10593",
        system="cyclegan",
        loss="least-squares",
        batch_size=16,
        **_DCGAN,
    ),
)


# Fields for vectors, in every recipe and in some, unless a run says otherwise; found on the ring of eight modes.
_FOR_VECTORS: Mapping[str, Any] = {"latent_dim": 8, "generator_lr": 1e-3, "critic_lr": 1e-3, "ema_decay": 0.9}
_FOR_VECTORS_IN: Mapping[str, Mapping[str, Any]] = {
    # A slope of 1 at most cannot tell modes that are 0.02 wide from what lies between them.
    "wgan-gp": {"penalty_weight": 0.1},
    "dragan": {"penalty_weight": 0.1},
    "cramer": {"penalty_weight": 0.1},
    # Likewise.
    "wgan": {"weight_clip": 0.1},
    # A generator that is not steep cannot leave the space between two modes empty.
    "sagan": {"generator_norm": "none"},
    # An autoencoder whose code is not shorter than a point restores every point, and tells nothing apart.
    "began": {"latent_dim": 1},
    # It has no noise, and refuses another length of it.
    "cyclegan": {"latent_dim": 64},
    # Their papers are about mixtures in the plane.
    "unrolled": {"critic_lr": 1e-4},
    **{name: {"generator_lr": 2e-4, "critic_lr": 2e-4, "ema_decay": 0.999} for name in ("ali", "veegan")},
}


def names() -> list[str]:
    """The names that `get` knows, sorted."""
    return sorted(RECIPES)


def get(name: str, shape: tuple[int, ...] | None = None) -> Recipe:
    """The recipe called ``name``.

    Args:
        name: a name of `names`.
        shape: of a sample of the data: the recipe then has the values of `for_shape`. None: those of its source.

    Raises:
        ValueError: unknown name; the message names the nearest ones.
    """
    recipe = lookup(RECIPES, name, "recipe")
    return recipe if shape is None else replace(recipe, **for_shape(name, shape))


def for_shape(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """The fields of the recipe called ``name`` that have other values for samples of ``shape`` than their source says.

    Those of vectors ``(d,)`` do: sources are about images, for which the noise is longer and steps are smaller than
    points of the plane need. `lipgan.models.serving` says which networks serve them.

    Raises:
        ValueError: unknown name; the message names the nearest ones.
    """
    recipe = lookup(RECIPES, name, "recipe")
    values = {**_FOR_VECTORS, **_FOR_VECTORS_IN.get(name, {})} if len(shape) == 1 else {}
    return {field: value for field, value in values.items() if value != getattr(recipe, field)}
