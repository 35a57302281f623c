"""``lipgan eval``: the metrics of a trained generator, against what its samples are to look like."""

import argparse
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

import lipgan
from lipgan import _choices, data, recipes, systems
from lipgan._files import write_atomically
from lipgan.commands.console import find_device, list_images, progress_bar, say
from lipgan.commands.names import check_outputs, checkpoint_file
from lipgan.commands.sources import as_image_files, find_extractor
from lipgan.data import Dataset
from lipgan.data.images import default_workers, image_batches
from lipgan.metrics import FeatureStats, cmmd, frechet_distance, inception_score, kernel_distance, prdc, protocols
from lipgan.metrics.features import FeatureExtractor
from lipgan.metrics.protocols import Protocol
from lipgan.ops import nearest_neighbours
from lipgan.training import checkpoint, load_generator
from lipgan.training.checkpoint import CheckpointError
from lipgan.training.pictures import evaluation_page
from lipgan.training.sampling import draw

__all__ = ["METRICS", "Metric", "main"]

_BATCH_SIZE = 256
_PLOTTED = 64


@dataclass(frozen=True)
class _Samples:
    """What the metrics are computed from."""

    real: Tensor  # features [n, d]
    fake: Tensor
    probabilities: Tensor | None  # [n, classes], of the generated samples
    seed: int


@dataclass(frozen=True)
class Metric:
    """A metric of ``lipgan eval``, as a protocol defines it.

    Attributes:
        title: what the plot calls it.
        minimum: generated samples that it needs.
        compute: takes what was measured to the numbers by name.
    """

    title: str
    minimum: Callable[[Protocol], int]
    compute: Callable[[_Samples, Protocol], dict[str, float]]


def _fid(samples: _Samples, protocol: Protocol) -> dict[str, float]:
    real, fake = (
        FeatureStats(x.shape[1], ddof=protocol.ddof, device=x.device).update(x) for x in (samples.real, samples.fake)
    )
    return {"fid": float(frechet_distance(real.mean, real.cov, fake.mean, fake.cov))}


def _is(samples: _Samples, protocol: Protocol) -> dict[str, float]:
    assert samples.probabilities is not None
    generator = torch.Generator().manual_seed(samples.seed)
    mean, std = inception_score(samples.probabilities, generator=generator, protocol=protocol.name)
    return {"is": mean, "std": std}


def _kid(samples: _Samples, protocol: Protocol) -> dict[str, float]:
    generator = torch.Generator().manual_seed(samples.seed)
    mean, std = kernel_distance(samples.real, samples.fake, generator=generator, protocol=protocol.name)
    return {"kid": mean, "std": std}


def _prdc(samples: _Samples, protocol: Protocol) -> dict[str, float]:
    return prdc(samples.real, samples.fake, protocol=protocol.name)


def _cmmd(samples: _Samples, protocol: Protocol) -> dict[str, float]:
    assert protocol.sigma is not None
    return {"cmmd": cmmd(samples.real, samples.fake, sigma=protocol.sigma, scale=protocol.scale)}


_METRICS: Mapping[str, Metric] = {
    "fid": Metric("Frechet distance", lambda protocol: 2, _fid),
    "is": Metric("Inception Score", lambda protocol: protocol.splits or 1, _is),
    "kid": Metric("Kernel distance", lambda protocol: 2 if protocol.capped else protocol.subset_size, _kid),
    "prdc": Metric("Precision, recall, ...", lambda protocol: protocol.neighbours()[0] + 1, _prdc),
    "cmmd": Metric("CMMD", lambda protocol: 1, _cmmd),
}
METRICS: Mapping[str, Metric] = MappingProxyType({name: _METRICS[name] for name in _choices.METRICS})


def main(args: argparse.Namespace) -> int:
    """Run the command: a line for each metric on stdout, and what was compared on stderr; the exit status.

    Raises:
        ValueError, OSError: bad input; nothing was written then.
    """
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        if os.environ.get("RANK", "0") != "0":
            return 2
        raise ValueError(
            f"lipgan eval is for one process, since KID and PRDC want all samples at once, got WORLD_SIZE {processes}: "
            "start it without torchrun"
        )
    device = find_device(args.device)
    path = checkpoint_file(args)
    check_outputs([path, args.weights], json=args.json, plot=args.plot)
    if args.plot is not None and args.plot.suffix.lower() != ".png":
        raise ValueError(f"--plot {args.plot} must end in .png")
    protocol = protocols.get(args.protocol)
    generator = load_generator(path, device=device)
    trained = _Trained.read(path)
    if len(trained.shape) == 2:
        raise ValueError(
            f"lipgan eval compares images and vectors, and the generator of {path} makes sequences {trained.shape}: "
            "lipgan train --evaluate-every judges those of chords by their grammar"
        )
    dataset = _dataset(trained, args.data, default_workers() if args.workers is None else args.workers)
    extractor: FeatureExtractor
    if dataset.is_image:
        features = args.features or ("digits" if dataset.name == "digits" else None)
        extractor = find_extractor(
            features, args.download, protocol.preprocessing, weights=args.weights, sha256=args.sha256
        )
    else:
        if args.features is not None or args.plot is not None:
            raise ValueError(f"--features and --plot are for images, and the generator makes vectors {trained.shape}")
        extractor = _Coordinates()
    names = _metrics(args.metrics, extractor, protocol, args.number)

    seed = args.seed or 0
    generated = draw(generator, args.number, seed)
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
        definition = protocol.definition(name, min(len(real), len(fake)))
        metrics[name] = {"values": METRICS[name].compute(samples, protocol), "definition": definition}

    facts = {
        "name": protocol.name,
        "checkpoint": str(path),
        "recipe": trained.recipe,
        "step": trained.step,
        "generated": args.number,
        "seed": seed,
        "data": dataset.name,
        "real": len(dataset),
        "shape": list(dataset.shape),
        "features": extractor.name,
    }
    by = f"features {extractor.name}, protocol {protocol.name}"
    kind = f"{dataset.shape[2]} x {dataset.shape[1]} pixels of 8 bits in RGB, " if dataset.is_image else ""
    compared = (
        f"{args.number} samples of {path} ({trained.recipe}, step {trained.step}, seed {seed}) against "
        f"{len(dataset)} of {dataset.name}, {kind}{by}"
    )
    if args.plot is not None:
        shown = min(_PLOTTED, args.number)
        _, nearest = nearest_neighbours(fake[:shown], real)
        rows = [(METRICS[name].title, _in_words(row["values"]), row["definition"]) for name, row in metrics.items()]
        neighbours = dataset.samples[nearest[:, 0].cpu()]
        page = evaluation_page(generated[:shown], neighbours, rows, compared)
        write_atomically(args.plot, page)
    if args.json is not None:
        result = {"metrics": metrics, "protocol": facts, "lipgan": lipgan.__version__}
        write_atomically(args.json, (json.dumps(result, indent=2) + "\n").encode())
    say(compared)
    for name, row in metrics.items():
        print(f"{name + ':':<6}{_in_words(row['values'])}  ({row['definition']}, {by})")
    return 0


@dataclass(frozen=True)
class _Trained:
    """What a checkpoint says of its generator."""

    path: Path
    recipe: str
    system: str
    step: int
    data: str
    shape: tuple[int, ...]

    @classmethod
    def read(cls, path: Path) -> "_Trained":
        state = checkpoint.read(path)
        try:
            recipe = recipes.from_dict(state["recipe"])
            return cls(path, recipe.name, recipe.system, state["step"], state["data"], tuple(state["shape"]))
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"checkpoint {path} does not say how its generator was trained: {error}") from error


def _dataset(trained: _Trained, name: str | None, workers: int) -> Dataset:
    """What samples are compared with: the images of the folder or data set ``name``, in the size of the generator's.

    None: what they are to look like, which is what the generator was trained on, or its system makes of that.
    """
    shape = trained.shape
    if name is not None and Path(name).is_dir():
        if len(shape) != 3 or shape[1] != shape[2]:
            raise ValueError(f"--data {name} is brought to square images, but the generator makes {shape}")
        paths = list_images(name)
        batches = image_batches(paths, _BATCH_SIZE, shape[1], workers=workers)
        images = torch.cat(list(progress_bar(batches, -(-len(paths) // _BATCH_SIZE))))
        return Dataset(name, images.contiguous().float() / 127.5 - 1)
    size = shape[-1] if len(shape) == 3 else None
    if name is None:
        name = trained.data
        try:
            dataset = systems.get(trained.system).target_of(data.load(name, size))
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{trained.path} was trained on {name!r}, which cannot be loaded ({error}): name a data set "
                f"({', '.join(data.names())}) or a folder of images by --data"
            ) from error
    else:
        dataset = data.load(name, size)
    # Grey images and colours are compared as RGB.
    if dataset.shape[-2:] != shape[-2:] or len(dataset.shape) != len(shape):
        raise ValueError(f"the data set {name} has samples of shape {dataset.shape}, the generator makes {shape}")
    return dataset


class _Coordinates:
    """Samples that are vectors are compared as they are."""

    name = "coordinates"
    dim: int | None = None

    def __call__(self, images: Tensor) -> Tensor:
        return images


def _metrics(names: list[str] | None, extractor: FeatureExtractor, protocol: Protocol, number: int) -> list[str]:
    """The metrics asked for, each once; None: all that the features and the protocol allow.

    The CMMD is of embeddings of CLIP: of other features only if it is asked for.
    """
    scores = hasattr(extractor, "probabilities")
    fitting = {"is": scores, "cmmd": extractor.name == "clip"}
    if names:
        chosen = list(dict.fromkeys(names))
        for name in chosen:
            protocol.require(name)
    else:
        chosen = [name for name in METRICS if protocol.definition(name) is not None and fitting.get(name, True)]
    if "is" in chosen and not scores:
        raise ValueError(f"the metric is needs class probabilities, which the features {extractor.name} do not give")
    for name in chosen:
        minimum = METRICS[name].minimum(protocol)
        if number < minimum:
            raise ValueError(f"the metric {name} needs at least {minimum} samples, got -n {number}")
    return chosen


@torch.no_grad()
def _extracted(extract: Callable[[Tensor], Tensor], samples: Tensor, device: torch.device) -> Tensor:
    """``extract`` of ``samples``; of images ``[n, c, h, w]`` in [-1, 1], as it sees them in image files."""
    batches = torch.split(as_image_files(samples) if samples.ndim == 4 else samples, _BATCH_SIZE)
    return torch.cat([extract(batch.to(device)) for batch in progress_bar(iter(batches), len(batches))])


def _in_words(values: dict[str, float]) -> str:
    """The numbers in one line: one with its deviation, or each with its name."""
    if len(values) > 2:
        return ", ".join(f"{name} {value:.4f}" for name, value in values.items())
    number, *std = values.values()
    return f"{number:.6g}" + "".join(f" +- {value:.2g}" for value in std)
