"""``lipgan bench fid``: from features to the Frechet distance, sums of both sides included, as torchmetrics does it.

And the command ``lipgan fid`` on folders of images: how much of its time is not the extractor's.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lipgan.bench.frechet import _features, by_eigvals
from lipgan.bench.harness import Table, in_fresh_process, interleave
from lipgan.commands import fid, parser
from lipgan.metrics import FrechetDistance
from lipgan.metrics.features.inception import InceptionNetwork

# The length of the features that FID is named for.
DIM = 2048
SAMPLES = 5000  # of either side

# Rows that come at once: the batches of pytorch-fid, and all, as from a file.
BATCHES = [50, SAMPLES]

# Of folders of images: files in each, and pixels a side.
FOLDERS = [(100, 256), (30, 1024)]

OURS, EIGVALS = "lipgan", "torch eigvals"


# ---- the peer, as torchmetrics calls PyTorch ----


def _sums(batches: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Mean and covariance from the sums of features and of their products, in float64."""
    dim = batches[0].shape[1]
    total = torch.zeros(dim, dtype=torch.float64)
    products = torch.zeros(dim, dim, dtype=torch.float64)
    count = 0
    for batch in batches:
        rows = batch.double()
        total += rows.sum(0)
        products += rows.t().mm(rows)
        count += len(rows)
    mean = (total / count).unsqueeze(0)
    return mean.squeeze(0), (products - count * mean.t().mm(mean)) / (count - 1)


def _by_sums(real: tuple[Tensor, ...], fake: tuple[Tensor, ...]) -> float:
    return float(by_eigvals(*_sums(real), *_sums(fake)))


# ---- what is measured ----


def _by_lipgan(real: tuple[Tensor, ...], fake: tuple[Tensor, ...]) -> float:
    metric = FrechetDistance()
    for side, batches in ((True, real), (False, fake)):
        for batch in batches:
            metric.update(batch, real=side)
    return float(metric.compute())


def _times(batch: int, seed: int, seconds: float) -> dict[str, float]:
    real, fake = (torch.split(x.float(), batch) for x in _features(SAMPLES, DIM, seed))
    variants = {name: functools.partial(way, real, fake) for name, way in ((EIGVALS, _by_sums), (OURS, _by_lipgan))}

    def check(values: dict[str, float]) -> None:
        error = abs(values[OURS] / values[EIGVALS] - 1)
        if not error < 1e-9:
            raise AssertionError(f"lipgan and torch eigvals differ by {error:.1e}, relative")

    return interleave(variants, seconds=seconds, warmup=1, check=check)


def _write_images(folder: Path, suffix: str, files: int, side: int, seed: int) -> None:
    """Smooth pictures with some noise, so that files are as large as those of photographs."""
    random = np.random.default_rng(seed)
    folder.mkdir()
    for i in range(files):
        smooth = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((side, side))
        levels = np.asarray(smooth) + random.normal(0, 6, (side, side, 1))
        Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:04}{suffix}", quality=90)


def _write_weights(folder: Path, seed: int) -> Path:
    """Weights of Inception, random, in a file that is named for its checksum as the published one."""
    network = InceptionNetwork()
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, generator=generator)
    content = io.BytesIO()
    torch.save(network.state_dict(), content)
    path = folder / f"weights-{hashlib.sha256(content.getvalue()).hexdigest()[:8]}.pth"
    path.write_bytes(content.getvalue())
    return path


@contextlib.contextmanager
def _forward_seconds() -> Iterator[list[float]]:
    """The seconds of every call of the network, which is given images of 299 x 299 pixels."""
    forward, seconds = InceptionNetwork.forward, []

    def timed(self: InceptionNetwork, x: Tensor, dim: int = DIM) -> Tensor:
        start = time.perf_counter()
        features = forward(self, x, dim)
        seconds.append(time.perf_counter() - start)
        return features

    InceptionNetwork.forward = timed  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        InceptionNetwork.forward = forward  # type: ignore[method-assign]


def _command_times(files: int, side: int, seed: int) -> tuple[float, float]:
    """Seconds of ``lipgan fid``, without the start of Python and imports, and of the network within it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for k, suffix in enumerate((".png", ".jpg")):
            _write_images(folder / suffix[1:], suffix, files, side, seed + k)
        weights = _write_weights(folder, seed)
        args = parser.build().parse_args(["fid", str(folder / "png"), str(folder / "jpg"), "--features", str(weights)])
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), _forward_seconds() as forward:
            start = time.perf_counter()
            fid.main(args)
            total = time.perf_counter() - start
    if len(forward) != 2 * -(-files // 50):
        raise AssertionError(f"lipgan fid called Inception {len(forward)} times: {output.getvalue()}")
    return total, sum(forward)


def run(seed: int = 0, seconds: float = 1.0) -> list[Table]:
    """The tables of the benchmark; a call of the peer takes seconds, the command on folders half a minute.

    Args:
        seed: of the features.
        seconds: for each size of the batches.
    """
    table = Table(
        f"FID from {SAMPLES} float32 features of either side, d = {DIM}, sums included, CPU",
        ["rows at once", "eigvals ms", "lipgan ms", "ratio"],
        notes=[
            "eigvals: sums of features and of their products in float64, torch.linalg.eigvals of the product of the",
            "covariances, as torchmetrics; lipgan: lipgan.metrics.FrechetDistance. Ratio: peer over lipgan.",
        ],
    )
    for batch in BATCHES:
        times = in_fresh_process(_times, batch, seed, seconds)
        table.rows.append(
            {
                "rows at once": batch,
                "eigvals ms": 1e3 * times[EIGVALS],
                "lipgan ms": 1e3 * times[OURS],
                "ratio": times[EIGVALS] / times[OURS],
            }
        )
    command = Table(
        "lipgan fid on a folder of PNG and one of JPEG files, Inception, CPU",
        ["files", "pixels", "total ms", "network ms", "around it, %"],
        notes=[
            "files in either folder, of pixels x pixels. network: of random weights. Around it: files read and scaled,",
            "weights read, sums, distance; not the start of Python and imports.",
        ],
    )
    for files, side in FOLDERS:
        total, forward = in_fresh_process(_command_times, files, side, seed)
        command.rows.append(
            {
                "files": files,
                "pixels": side,
                "total ms": 1e3 * total,
                "network ms": 1e3 * forward,
                "around it, %": 100 * (1 - forward / total),
            }
        )
    return [table, command]


def plot(tables: list[Table], axes: Any) -> None:
    """Bars: milliseconds for each size of the batches."""
    rows = tables[0].rows
    for k, key in enumerate(("eigvals ms", "lipgan ms")):
        places = [i + 0.4 * k for i in range(len(rows))]
        axes.bar(places, [row[key] for row in rows], width=0.4, label=key.removesuffix(" ms"))
    axes.set_xticks([i + 0.2 for i in range(len(rows))], [str(row["rows at once"]) for row in rows])
    axes.set(xlabel="rows at once", ylabel="ms", title=tables[0].title)
    axes.legend()
