"""Names and ranges that several layers and the command line know, as plain values: nothing here imports PyTorch.

The layer that gives a name its meaning builds its table from the names here, so that neither can have one more.
"""

from collections.abc import Mapping
from types import MappingProxyType

#: The kinds of `lipgan.gradient_penalty`, and the form of each as a function of gradients.
PENALTY_FORMS: Mapping[str, str] = MappingProxyType(
    {
        "wgan-gp": "two-sided",
        "lp": "one-sided",
        "dragan": "two-sided",
        "r1": "squared",
        "r2": "squared",
        "r1+r2": "squared",
        "max": "max",
    }
)

#: How a generator and a critic see labels, what the critic compares a batch with, the generator's batch norm.
CONDITIONINGS = ("none", "concat", "auxiliary", "projection")
MINIBATCHES = ("none", "discrimination", "stddev")
BATCH_NORMS = ("batch", "virtual")

#: The metrics of `lipgan eval`, and the packages whose definitions of them `lipgan.metrics.protocols` knows.
METRICS = ("fid", "is", "kid", "prdc", "cmmd")
PROTOCOLS = ("clean", "lipgan", "pytorch-fid", "torch-fidelity", "torchmetrics")

#: The names that `lipgan.metrics.features` knows, sorted, and what stands before the colon in those of other packages.
FEATURES = ("clip", "digits", "dinov2", "inception", "pixels", "random")
FEATURE_PREFIXES = ("torchvision", "timm", "hf", "module")

#: The names that `lipgan.recipes` and `lipgan.data` know, sorted.
RECIPES = (
    "aae",
    "acgan",
    "adaptive-divergence",
    "ali",
    "alpha-gan",
    "avb",
    "began",
    "cgan",
    "cramer",
    "cyclegan",
    "dcgan",
    "dragan",
    "ebgan",
    "f-gan-gan",
    "f-gan-hellinger",
    "f-gan-jensen-shannon",
    "f-gan-kl",
    "f-gan-pearson",
    "f-gan-reverse-kl",
    "feature-matching",
    "gan",
    "gan-cls",
    "gngan",
    "historical-averaging",
    "infogan",
    "instance-noise",
    "kl-wgan",
    "label-smoothing",
    "lapgan",
    "lipschitz",
    "lsgan",
    "mad-gan",
    "minibatch-discrimination",
    "minimax",
    "mode-regularized",
    "progressive",
    "projection",
    "r3gan",
    "rgan",
    "sagan",
    "seqgan",
    "sngan",
    "sngan-resnet",
    "ttur",
    "unrolled",
    "vae-gan",
    "veegan",
    "virtual-batch-norm",
    "wgan",
    "wgan-gp",
    "wgan-lp",
)
#: What stands before the colon in the names of other packages' data sets.
DATA_PREFIXES = ("torchvision:", "huggingface:")
DATA_SETS = ("chords", "digits", "grid", "patches", "ring", "segments", "sentences", "swiss-roll", "two-gaussians")

#: The modules of `lipgan.bench`.
BENCHMARKS = (
    "spectral-norm",
    "gradient-penalty",
    "compiled-penalty",
    "frechet",
    "prdc",
    "fid",
    "kid",
    "step",
    "overhead",
    "sweep",
    "peers",
)

#: The modules of `lipgan.studies`, in the order of the lectures, and what each shows.
STUDIES: Mapping[str, str] = MappingProxyType(
    {
        "divergences-on-parallel-lines": "KL and JS are blind to how far apart two lines are, Wasserstein is not",
        "two-gaussians": "a discriminator saturates where a critic has a gradient",
        "clipping-vs-penalty": "what clipping weights does to a critic, and a gradient penalty does not",
        "duality": "which critics bound the Wasserstein distance, and how tightly",
        "critic-tracks-quality": "what critics estimate along a training, and how good the samples are",
        "random-architectures": "networks drawn at random, trained as GAN and as WGAN-GP",
        "architectures-grid": "five methods on six architectures with one set of constants each",
        "f-gan": "six variational bounds, and the Gaussians that minimize the divergences",
        "mode-collapse": "modes of a ring that a GAN drops, and what finds them",
        "spectral-norm": "one power iteration a step against the SVD; spectra of constrained layers",
        "learning-rates": "which constraint is robust to learning rates and betas",
        "ttur": "two learning rates: a game that they decide, and digits",
        "score-limitations": "what the Inception Score, FID, precision and recall do and do not see",
        "biased-gradients": "Wasserstein gradients from samples are biased, those of Cramer are not",
        "losses-table": "all recipes on digits: quality, and time per step",
        "penalty-cost": "time and memory of a gradient penalty, by the way it is computed",
    }
)

#: The least and the largest of whole numbers that a run is given. One that is larger is a slip of the keys: a batch of
#: 10^12 would take all of the memory before anything fails.
RANGES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "size": (1, 2**14),
        "seed": (0, 2**63 - 1),
        "steps": (1, 10**12),
        "log_every": (1, 10**12),
        "save_every": (1, 10**12),
        "evaluate_every": (1, 10**12),
        "latent_dim": (1, 2**20),
        "n_critic": (1, 2**20),
        "batch_size": (1, 2**20),
        "accumulation": (1, 2**20),
    }
)


def range_error(value: int, least: int, largest: int) -> str | None:
    """What is wrong with a whole number that must lie between the two, in words; None if nothing is."""
    if value < least:
        return f"must be a whole number of at least {least}"
    return f"must be a whole number of at most {largest}" if value > largest else None
