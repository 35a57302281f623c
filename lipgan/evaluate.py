"""``lipgan eval``: the metrics of a trained generator, against the data set that it was trained on."""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

import lipgan
from lipgan import data
from lipgan.data import Dataset
from lipgan.fid import check_folder, find_extractor, progress_bar, say
from lipgan.metrics import FeatureStats, frechet_distance, inception_score, kernel_distance, prdc
from lipgan.metrics.features import FeatureExtractor
from lipgan.metrics.sources import as_image_files
from lipgan.ops import nearest_neighbours
from lipgan.training import Trainer
from lipgan.training.checkpoint import write_atomically
from lipgan.training.pictures import evaluation_page
from lipgan.training.run import CHECKPOINT

__all__ = ["METRICS", "Metric", "main"]

_BATCH_SIZE = 256
_PLOTTED = 64

_SPLITS = 10
_SUBSETS, _SUBSET_SIZE = 100, 1000
_NEAREST_K = 5


@dataclass(frozen=True)
class _Samples:
    """What the metrics are computed from."""

    real: Tensor  # features [n, d]
    fake: Tensor
    probabilities: Tensor | None  # [n, classes], of the generated samples
    seed: int


@dataclass(frozen=True)
class Metric:
    """A metric of ``lipgan eval``.

    Attributes:
        title: what the plot calls it.
        minimum: generated samples that it needs.
        compute: takes what was measured to the numbers by name, and to how they are defined, in words.
    """

    title: str
    minimum: int
    compute: Callable[[_Samples], tuple[dict[str, float], str]]


def _fid(samples: _Samples) -> tuple[dict[str, float], str]:
    real, fake = (FeatureStats(x.shape[1], device=x.device).update(x) for x in (samples.real, samples.fake))
    distance = frechet_distance(real.mean, real.cov, fake.mean, fake.cov)
    return {"fid": float(distance)}, f"covariance over n - {real.ddof}"


def _is(samples: _Samples) -> tuple[dict[str, float], str]:
    assert samples.probabilities is not None
    mean, std = inception_score(samples.probabilities, _SPLITS)
    return {"is": mean, "std": std}, f"{_SPLITS} splits, in the order of the samples"


def _kid(samples: _Samples) -> tuple[dict[str, float], str]:
    size = min(_SUBSET_SIZE, len(samples.real), len(samples.fake))
    generator = torch.Generator().manual_seed(samples.seed)
    mean, std = kernel_distance(samples.real, samples.fake, _SUBSETS, size, generator=generator)
    return {"kid": mean, "std": std}, f"cubic kernel, {_SUBSETS} subsets of {size}"


def _prdc(samples: _Samples) -> tuple[dict[str, float], str]:
    return prdc(samples.real, samples.fake, _NEAREST_K, "lt"), f"nearest_k {_NEAREST_K}, open balls"


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "fid": Metric("Frechet distance", 2, _fid),
        "is": Metric("Inception Score", _SPLITS, _is),
        "kid": Metric("Kernel distance", 2, _kid),
        "prdc": Metric("Precision, recall, ...", _NEAREST_K + 1, _prdc),
    }
)


def main(args: argparse.Namespace, device: torch.device) -> None:
    """Run the command: a line for each metric on stdout, and what was compared on stderr.

    Raises:
        ValueError, OSError: bad input; nothing was written then.
    """
    for output in (args.json, args.plot):
        check_folder(output)
    if args.plot is not None and args.plot.suffix.lower() != ".png":
        raise ValueError(f"--plot {args.plot} must end in .png")
    path: Path = args.checkpoint / CHECKPOINT if args.checkpoint.is_dir() else args.checkpoint
    trainer = Trainer.load(path, device=device)
    dataset = _dataset(trainer, args.data)
    extractor = find_extractor(args.features or ("digits" if dataset.name == "digits" else None), args.download)
    names = _metrics(args.metrics, extractor, args.number)

    seed = args.seed or 0
    generated = trainer.sample(args.number, seed=seed)
    if not bool(generated.isfinite().all()):
        raise ValueError(f"the generator of {path} makes samples that are not finite")
    if isinstance(extractor, nn.Module):
        extractor.to(device)
    real = _extracted(extractor, dataset.samples, device)
    fake = _extracted(extractor, generated, device)
    probabilities = _extracted(extractor.probabilities, generated, device) if "is" in names else None  # type: ignore[attr-defined]
    samples = _Samples(real, fake, probabilities, seed)
    metrics: dict[str, dict[str, Any]] = {}
    for name in names:
        values, definition = METRICS[name].compute(samples)
        metrics[name] = {"values": values, "definition": definition}

    height, width = dataset.shape[1:]
    protocol = {
        "checkpoint": str(path),
        "recipe": trainer.recipe.name,
        "step": trainer.step,
        "generated": args.number,
        "seed": seed,
        "data": dataset.name,
        "real": len(dataset),
        "pixels": [width, height],
        "features": extractor.name,
    }
    compared = (
        f"{args.number} samples of {path} ({trainer.recipe.name}, step {trainer.step}, seed {seed}) against "
        f"{len(dataset)} of {dataset.name}, {width} x {height} pixels of 8 bits in RGB, features {extractor.name}"
    )
    if args.plot is not None:
        shown = min(_PLOTTED, args.number)
        _, nearest = nearest_neighbours(fake[:shown], real)
        rows = [(METRICS[name].title, _in_words(row["values"]), row["definition"]) for name, row in metrics.items()]
        neighbours = dataset.samples[nearest[:, 0].cpu()]
        page = evaluation_page(generated[:shown], neighbours, rows, compared)
        write_atomically(args.plot, page)
    if args.json is not None:
        result = {"metrics": metrics, "protocol": protocol, "lipgan": lipgan.__version__}
        write_atomically(args.json, (json.dumps(result, indent=2) + "\n").encode())
    say(compared)
    for name, row in metrics.items():
        print(f"{name + ':':<6}{_in_words(row['values'])}  ({row['definition']}, features {extractor.name})")


def _dataset(trainer: Trainer, name: str | None) -> Dataset:
    """The data set called ``name``, in the size of the trainer's; None: the trainer's own."""
    shape = trainer.data.shape
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"lipgan eval takes generators of images [1 or 3, h, w], got samples of shape {shape}")
    if name is None or name == trainer.data.name:
        return trainer.data
    dataset = data.load(name, shape[-1])
    if dataset.shape[1:] != shape[1:]:
        raise ValueError(f"--data {name} has samples of shape {dataset.shape}, the generator makes {shape}")
    return dataset


def _metrics(names: list[str] | None, extractor: FeatureExtractor, number: int) -> list[str]:
    """The metrics asked for, each once; None: all that the features allow."""
    scores = hasattr(extractor, "probabilities")
    chosen = list(dict.fromkeys(names)) if names else [name for name in METRICS if name != "is" or scores]
    if "is" in chosen and not scores:
        raise ValueError(f"the metric is needs class probabilities, which the features {extractor.name} do not give")
    for name in chosen:
        if number < METRICS[name].minimum:
            raise ValueError(f"the metric {name} needs at least {METRICS[name].minimum} samples, got -n {number}")
    return chosen


@torch.no_grad()
def _extracted(extract: Callable[[Tensor], Tensor], samples: Tensor, device: torch.device) -> Tensor:
    """``extract`` of ``samples [n, c, h, w]`` in [-1, 1], as it sees them in image files."""
    batches = torch.split(as_image_files(samples), _BATCH_SIZE)
    return torch.cat([extract(batch.to(device)) for batch in progress_bar(iter(batches), len(batches))])


def _in_words(values: dict[str, float]) -> str:
    """The numbers in one line: one with its deviation, or each with its name."""
    if len(values) > 2:
        return ", ".join(f"{name} {value:.4f}" for name, value in values.items())
    number, *std = values.values()
    return f"{number:.6g}" + "".join(f" +- {value:.2g}" for value in std)
