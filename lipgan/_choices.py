"""Names that several layers and the command line know, as plain values: nothing here imports PyTorch.

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
METRICS = ("fid", "is", "kid", "prdc")
PROTOCOLS = ("clean", "lipgan", "pytorch-fid", "torch-fidelity", "torchmetrics")

#: The modules of `lipgan.bench`.
BENCHMARKS = ("spectral-norm", "gradient-penalty", "frechet", "prdc", "fid", "kid", "step")
