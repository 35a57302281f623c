"""What the Inception Score, FID, precision and recall see of samples, and what they do not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lipgan import data
from lipgan.metrics.features.digits import DigitFeatures
from lipgan.metrics.frechet import frechet_distance_from_features
from lipgan.metrics.inception_score import inception_score
from lipgan.metrics.kernel_distance import kernel_distance
from lipgan.metrics.prdc import prdc
from lipgan.studies import figures
from lipgan.studies.study import Analysis, Claim, Finding, Finished, Settings, Study, Table, Unit, judge, spread

__all__ = ["STUDY"]

_IS = "lecture 000, “IS limitations”"
_FID = "lecture 000, “FID limitations”"
_PRDC = "lecture 003, “precision, recall, and F1 score”, cases (a) to (d)"
_HIGH, _LOW = 0.7, 0.3

# What is done to real images, and how strongly.
_DISTORTIONS = {"noise": (0.0, 0.1, 0.2, 0.3, 0.4), "blur": (0, 1, 2, 4, 8), "dropped classes": (0, 2, 4, 6, 8)}
_CASES = {"a": (True, True), "b": (True, False), "c": (False, True), "d": (False, False)}

_CLAIMS = (
    Claim(
        "classes",
        "A generator of one image per class has a perfect Inception Score: it is blind to diversity within a class.",
        _IS,
        "ten images, one of each digit, repeated, score at least as high as real digits, while their recall is below "
        "0.1; in every seed",
    ),
    Claim(
        "distortion",
        "FID grows with noise, with blur, and with modes that are dropped.",
        "lecture 000, “Frechet Inception Distance”; Heusel et al. 2017",
        "it is larger at each level of each distortion than at the level before; in every seed",
    ),
    Claim(
        "dropping",
        "The Inception Score sees that classes are missing, but not that images within a class are; FID sees both.",
        _IS + ": “low H(y|x), high H(y)”",
        "with 8 of 10 classes dropped the score is below a half of that of real digits, and FID is higher than "
        "without; FID of one image per class is higher than that of other real digits, too; in every seed",
    ),
    Claim(
        "samples",
        "FID needs large samples: of finite samples of one distribution it is not 0, and smaller samples have larger "
        "values.",
        _FID,
        "between disjoint samples of real digits, the mean over repetitions falls at each larger sample size, and is "
        "positive; in every seed",
    ),
    Claim(
        "moments",
        "FID estimates only two moments: features with the mean and covariance of the real ones have nearly the same "
        "FID as real ones, whatever their distribution.",
        _FID,
        "Gaussian features with the moments of the real ones have an FID below twice that of other real digits, while "
        "less than half of them lie within the real ones' neighbourhoods (precision); in every seed",
    ),
    Claim(
        "cases",
        "Precision and recall tell four cases apart: (a) both high, (b) high precision with low recall, (c) low "
        "precision with high recall, (d) both low.",
        _PRDC,
        f"in the cases drawn, each is above {_HIGH} where it should be high and below {_LOW} where it should be low; "
        "in every seed",
    ),
)


def _units(settings: Settings, seeds: Sequence[int]) -> list[dict[str, Any]]:
    kinds = ("classes", *_DISTORTIONS, "samples", "moments", "cases")
    return [{"kind": kind, "seed": seed} for seed in seeds for kind in kinds]


class _Digits:
    """Real digits in random order, halved: what is compared, and what it is compared with."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        dataset = data.load("digits", 8)
        assert dataset.labels is not None
        order = torch.randperm(len(dataset.samples), generator=self.generator)
        images, labels = (dataset.samples[order] + 1) / 2, dataset.labels[order]
        half = len(images) // 2
        self.extract = DigitFeatures().eval()
        self.images, self.labels = images, labels
        self.reference = self.features(images[:half])
        self.others, self.other_labels = images[half : 2 * half], labels[half : 2 * half]

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        features: Tensor = self.extract(images)
        return features.double()

    @torch.no_grad()
    def score(self, images: Tensor) -> float:
        return inception_score(self.extract.probabilities(images), splits=1)[0]

    def fid(self, features: Tensor) -> float:
        return float(frechet_distance_from_features(self.reference, features))

    def measured(self, images: Tensor) -> dict[str, float]:
        features = self.features(images)
        near = prdc(self.reference, features)
        return {"is": self.score(images), "fid": self.fid(features)} | {k: near[k] for k in ("precision", "recall")}


def _run(settings: Settings, unit: Unit) -> dict[str, Any]:
    kind = unit["kind"]
    if kind == "cases":
        return _cases(settings, unit["seed"])
    digits = _Digits(unit["seed"])
    if kind in _DISTORTIONS:
        return {"levels": [digits.measured(_distort(digits, kind, level)) for level in _DISTORTIONS[kind]]}
    return _KINDS[kind](settings, digits)


def _distort(digits: _Digits, kind: str, level: float) -> Tensor:
    images = digits.others
    if kind == "noise":
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        return (images + level * noise).clamp(0, 1)
    if kind == "blur":
        kernel = torch.tensor([0.25, 0.5, 0.25])
        weight = (kernel[:, None] * kernel)[None, None]
        for _ in range(int(level)):
            images = torch.nn.functional.conv2d(images, weight, padding=1)
        return images.clamp(0, 1)
    # As many images as before: the classes that are left, more often.
    left = images[digits.other_labels >= level]
    return left[torch.arange(len(images)) % len(left)]


def _classes(settings: Settings, digits: _Digits) -> dict[str, Any]:
    """Real digits, and of each class the image that the classifier is most sure of, repeated."""
    with torch.no_grad():
        probabilities = digits.extract.probabilities(digits.others)
    best = probabilities.argmax(0)
    repeated = digits.others[best].repeat(len(digits.others) // 10 + 1, 1, 1, 1)[: len(digits.others)]
    return {"real": digits.measured(digits.others), "one": digits.measured(repeated)}


def _samples(settings: Settings, digits: _Digits) -> dict[str, Any]:
    features = digits.features(digits.images)
    means = []
    for n in settings["sizes"]:
        values = []
        for _ in range(settings["repetitions"]):
            order = torch.randperm(len(features), generator=digits.generator)
            pair = features[order[:n]], features[order[n : 2 * n]]
            values.append(float(frechet_distance_from_features(*pair)))
        means.append(float(np.mean(values)))
    return {"fid": means}


def _moments(settings: Settings, digits: _Digits) -> dict[str, Any]:
    reference = digits.reference
    values, vectors = torch.linalg.eigh(torch.cov(reference.T))
    root = vectors * values.clamp(min=0).sqrt()
    n = len(digits.others)
    gaussian = reference.mean(0) + torch.randn(n, len(root), generator=digits.generator, dtype=torch.float64) @ root.T
    found = {}
    for name, features in (("real", digits.features(digits.others)), ("gaussian", gaussian)):
        distance, _ = kernel_distance(reference, features, subsets=1, subset_size=n, generator=digits.generator)
        found[name] = {
            "fid": digits.fid(features),
            "kid": distance,
            "precision": prdc(reference, features)["precision"],
        }
    return found


def _cases(settings: Settings, seed: int) -> dict[str, Any]:
    """The four cases in the plane: real points are uniform on a disc of radius 1."""
    generator = torch.Generator().manual_seed(seed)
    n = settings["points"]

    def disc(radius: float, x: float = 0.0) -> Tensor:
        angle, share = torch.rand(2, n, generator=generator, dtype=torch.float64)
        angle = 2 * math.pi * angle
        return torch.stack([x + radius * share.sqrt() * angle.cos(), radius * share.sqrt() * angle.sin()], 1)

    real = disc(1.0)
    fakes = {"a": disc(1.0), "b": disc(0.3), "c": disc(3.0), "d": disc(1.0, 1.8)}
    return {
        name: {key: prdc(real, fake)[key] for key in ("precision", "recall")}
        | {"points": fake[: settings["drawn"]].float().tolist(), "real": real[: settings["drawn"]].float().tolist()}
        for name, fake in fakes.items()
    }


_KINDS: Mapping[str, Callable[[Settings, _Digits], dict[str, Any]]] = {
    "classes": _classes,
    "samples": _samples,
    "moments": _moments,
}


def _of(rows: Sequence[Finished], kind: str) -> list[Mapping[str, Any]]:
    return [row.result for row in rows if row.unit["kind"] == kind]


def _rises(values: Sequence[float]) -> bool:
    return all(a < b for a, b in pairwise(values))


def _fids(result: Mapping[str, Any]) -> list[float]:
    return [level["fid"] for level in result["levels"]]


def _right(result: Mapping[str, Any], case: str) -> bool:
    return all(
        result[case][key] > _HIGH if high else result[case][key] < _LOW
        for key, high in zip(("precision", "recall"), _CASES[case], strict=True)
    )


def _analyse(settings: Settings, rows: Sequence[Finished]) -> Analysis:
    classes, samples, moments, cases = (_of(rows, kind) for kind in ("classes", "samples", "moments", "cases"))
    dropped = [result["levels"] for result in _of(rows, "dropped classes")]
    distorted = {kind: [_fids(result) for result in _of(rows, kind)] for kind in _DISTORTIONS}

    def over(values: Sequence[Mapping[str, Any]], *keys: str) -> str:
        found = []
        for value in values:
            for key in keys:
                value = value[key]
            found.append(value)
        return spread(found)  # type: ignore[arg-type]

    findings = (
        Finding(
            "classes",
            judge([r["one"]["is"] >= r["real"]["is"] and r["one"]["recall"] < 0.1 for r in classes]),
            f"score {over(classes, 'one', 'is')} of one image per class, {over(classes, 'real', 'is')} of real digits; "
            f"recall {over(classes, 'one', 'recall')} and {over(classes, 'real', 'recall')}",
        ),
        Finding(
            "distortion",
            judge([all(map(_rises, values)) for values in zip(*distorted.values(), strict=True)]),
            "; ".join(
                f"{kind}: " + ", ".join(spread(list(level)) for level in zip(*values, strict=True))
                for kind, values in distorted.items()
            ),
        ),
        Finding(
            "dropping",
            judge(
                [
                    levels[-1]["is"] < 0.5 * levels[0]["is"]
                    and levels[-1]["fid"] > levels[0]["fid"]
                    and result["one"]["fid"] > result["real"]["fid"]
                    for levels, result in zip(dropped, classes, strict=True)
                ]
            ),
            f"score {spread([levels[0]['is'] for levels in dropped])} with all classes, "
            f"{spread([levels[-1]['is'] for levels in dropped])} with 2; FID of one image per class "
            f"{over(classes, 'one', 'fid')}, of other real digits {over(classes, 'real', 'fid')}",
        ),
        Finding(
            "samples",
            judge([_rises(r["fid"][::-1]) and r["fid"][-1] > 0 for r in samples]),
            "; ".join(
                f"{n} samples: {spread([r['fid'][i] for r in samples])}" for i, n in enumerate(settings["sizes"])
            ),
        ),
        Finding(
            "moments",
            judge([r["gaussian"]["fid"] < 2 * r["real"]["fid"] and r["gaussian"]["precision"] < 0.5 for r in moments]),
            f"FID {over(moments, 'gaussian', 'fid')} of Gaussian features, {over(moments, 'real', 'fid')} of real "
            f"ones; precision {over(moments, 'gaussian', 'precision')} and {over(moments, 'real', 'precision')}; "
            f"kernel distance {over(moments, 'gaussian', 'kid')} and {over(moments, 'real', 'kid')}",
        ),
        Finding(
            "cases",
            judge([all(_right(r, case) for case in _CASES) for r in cases]),
            "; ".join(
                f"({case}) precision {over(cases, case, 'precision')}, recall {over(cases, case, 'recall')}"
                for case in _CASES
            ),
        ),
    )
    keys = ("is", "fid", "precision", "recall")
    lines: list[tuple[str, ...]] = [
        (name, *(over(classes, key, measure) for measure in keys))
        for key, name in (("real", "other real digits"), ("one", "one image per class"))
    ]
    for kind, levels in _DISTORTIONS.items():
        for i, level in enumerate(levels[1:], 1):
            found = [result["levels"][i] for result in _of(rows, kind)]
            lines.append((f"{kind}: {level}", *(over(found, measure) for measure in keys)))
    table = Table(("images", "Inception Score", "FID", "precision", "recall"), tuple(lines))
    return Analysis(findings, table)


def _draw(settings: Settings, rows: Sequence[Finished]) -> Figure:
    figure, axes = figures.panels(2, 4, 4.6, height_ratios=(3, 2.4))
    for axis in axes[:4]:
        axis.remove()
    grid = axes[0].get_gridspec()
    assert grid is not None
    left, right = figure.add_subplot(grid[0, :2]), figure.add_subplot(grid[0, 2:])
    for index, kind in enumerate(_DISTORTIONS):
        table = np.asarray([_fids(result) for result in _of(rows, kind)]).T
        figures.error_bars(left, range(len(table)), table, index, kind)
    left.set_xlabel("level of the distortion (0: none)")
    left.set_ylabel("FID of digits")
    left.set_yscale("log")
    left.set_title("FID grows with each distortion")
    left.set_xticks(range(5))
    left.legend(loc="lower right")
    bias = np.asarray([result["fid"] for result in _of(rows, "samples")]).T
    figures.error_bars(right, settings["sizes"], bias, 0, "real against real")
    right.set_xscale("log")
    right.set_xticks(settings["sizes"], [str(n) for n in settings["sizes"]])
    right.minorticks_off()
    right.set_ylim(0, None)
    right.set_xlabel("samples on each side")
    right.set_ylabel("FID of real digits")
    right.set_title("with few samples, FID is too large")
    result = _of(rows, "cases")[0]
    for axis, (case, (precise, recalled)) in zip(axes[4:], _CASES.items(), strict=True):
        for key, colour, name in (("real", "0.65", "real"), ("points", figures.COLOURS[0], "generated")):
            points = np.asarray(result[case][key])
            axis.scatter(points[:, 0], points[:, 1], s=3, color=colour, linewidths=0, label=name)
        axis.set_aspect("equal")
        axis.set_xlim(-3.1, 3.1)
        axis.set_ylim(-3.1, 3.1)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_title(f"({case}) {'high' if precise else 'low'} P, {'high' if recalled else 'low'} R", fontsize=8)
        axis.set_xlabel(f"P {result[case]['precision']:.2f}, R {result[case]['recall']:.2f}")
    handles, labels = axes[4].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, markerscale=3)
    return figure


STUDY = Study(
    name="score-limitations",
    title="What the Inception Score, FID, precision and recall do not see",
    claims=_CLAIMS,
    method="Real digits are halved at random; one half is the reference, the other is distorted. Scores take the "
    "features and class probabilities of lipgan's classifier of digits in place of Inception's. The four cases of "
    "precision (P) and recall (R) are discs: the same, a small one within, a large one around, one beside.",
    full={"sizes": [100, 200, 400, 800], "repetitions": 50, "points": 5000, "drawn": 300},
    quick={"repetitions": 10, "points": 1000, "drawn": 200},
    seeds=(10, 2),
    units=_units,
    run=_run,
    analyse=_analyse,
    draw=_draw,
    caption="Above, left: FID of real digits that are distorted. Above, right: FID between two samples of real digits, "
    "by their size. Below: the four cases of precision (P) and recall (R), first seed.",
)
