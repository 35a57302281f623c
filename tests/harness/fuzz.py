"""Random calls of the ops: the C++ kernels against the reference, whatever the shape, layout, scale and thread count.

    python tests/harness/fuzz.py --seconds 600

replays the corpus (tests/harness/fuzz_corpus.jsonl, a case a line), then draws new cases until the time is over. A case
that fails is made small and printed as a line for the corpus. Under a sanitizer the same calls show what values do not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from lipgan.ops import _backend, gradient_penalty, interpolate, matrix_sqrt, spectral_norm_group, use_backend
from lipgan.ops.mlp_gradient_penalty import penalize
from lipgan.ops.nearest_neighbours import ball_counts, nearest_neighbours
from lipgan.ops.polar_factor import polar_factor
from lipgan.reference.mlp_gradient_penalty import CURVES

Case = dict[str, Any]

CORPUS = Path(__file__).with_name("fuzz_corpus.jsonl")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Beyond the first, what the entries of a weight or a gradient may be multiplied with.
EXPONENTS = {"float32": (-30, 38), "float64": (-300, 307), "float16": (-3, 4), "bfloat16": (-30, 38)}
LAYOUTS = ("plain", "transposed", "strided", "negated", "misaligned")


def lay(tensor: Tensor, layout: str) -> Tensor:
    """The same values, lying differently in memory."""
    if layout == "transposed":
        return tensor.permute(*reversed(range(tensor.ndim))).contiguous().permute(*reversed(range(tensor.ndim)))
    if layout == "strided":
        return tensor.repeat_interleave(2, dim=-1)[..., ::2] if tensor.ndim else tensor
    if layout == "negated":
        return torch._neg_view(-tensor)
    if layout == "misaligned" and tensor.numel():
        raw = torch.zeros(tensor.nbytes + 1, dtype=torch.uint8).numpy()
        return (
            torch.frombuffer(raw, dtype=tensor.dtype, offset=1, count=tensor.numel()).view(tensor.shape).copy_(tensor)
        )
    return tensor


def close(
    name: str, native: Tensor, reference: Tensor, tolerance: float, scale: float | None = None, floor: float = 0.0
) -> None:
    """Equal infinities and NaN, and |difference| <= tolerance times the largest number, or times ``scale``.

    Below the normal numbers, rounding is no fraction of a number: up to 4 of the smallest numbers are added, and
    ``floor``, what they have grown to.
    """
    assert native.shape == reference.shape, f"{name}: {tuple(native.shape)} and {tuple(reference.shape)}"
    assert native.dtype == reference.dtype, f"{name}: {native.dtype} and {reference.dtype}"
    a, b = native.detach().double(), reference.detach().double()
    assert torch.equal(a.isnan(), b.isnan()), f"{name}: NaN at other places"
    assert torch.equal(a.isinf(), b.isinf()), f"{name}: infinite at other places"
    finite = b.isfinite()
    a, b = a[finite], b[finite]
    if a.numel():
        range_ = torch.finfo(native.dtype)
        smallest = range_.smallest_normal * range_.eps
        bound = tolerance * (float(b.abs().max()) if scale is None else scale) + 4 * smallest + floor
        error = float((a / 2 - b / 2).abs().max()) * 2
        assert error <= bound, f"{name}: {error:g} apart, {bound:g} allowed"


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- the ops ----


def check_spectral_norm(case: Case, generator: torch.Generator) -> None:
    dtype, iterations, eps = DTYPES[case["dtype"]], case["iterations"], 1e-12
    weights, us, vs, dims, condition = [], [], [], [], 1.0
    for shape, dim in zip(case["shapes"], case["dims"], strict=True):
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        values = values / values.abs().max().clamp_min(1e-3)  # in [-1, 1], so that 3e38 is a number
        weight = (values * case["scale"]).to(dtype)
        h = shape[dim]
        u, v = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (h, weight.numel() // h))
        u, v = (u / u.norm()).to(dtype), (v / v.norm()).to(dtype)
        weights.append(lay(weight, case["layout"]))
        us.append(lay(u, case["layout"] if case["layout"] != "transposed" else "plain"))
        vs.append(v)
        dims.append(dim)
        # How much a rounding may grow: |W| |v| / |W v|, in every step.
        matrix = weight.double().movedim(dim, 0).flatten(1) / max(float(weight.double().abs().max()), 1e-300)
        size, a, b = float(matrix.norm()), u.double(), v.double()
        for _ in range(iterations):
            t = matrix @ b
            condition = max(condition, size / max(float(t.norm()), 1e-300))
            a = t / t.norm()
            b = matrix.T @ a
            condition = max(condition, size / max(float(b.norm()), 1e-300))
            b = b / b.norm()
        condition = max(condition, size / max(abs(float(a @ matrix @ b)), 1e-300))
    grads = [torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(dtype) for weight in weights]
    grad_sigma = torch.randn(len(weights), generator=generator, dtype=torch.float64).to(wide(dtype))
    results = {}
    for backend in ("native", "reference"):
        inputs = [weight.detach().requires_grad_() for weight in weights]
        ys, sigma, new_us, new_vs = spectral_norm_group(inputs, us, vs, iterations, eps, dims, backend=backend)
        by_weight = torch.autograd.grad([*ys, sigma], inputs, [*grads, grad_sigma])
        results[backend] = (ys, sigma, new_us, new_vs, by_weight)
    if not condition < 1e3:
        return  # the two may differ by any amount: only the calls themselves are tried
    longest = max(max(w.shape[d], w.numel() // w.shape[d]) for w, d in zip(weights, dims, strict=True))
    tolerance = 8 * (longest / 4 + 8) * condition * unit_roundoff(wide(dtype)) + 2 * unit_roundoff(dtype)
    small = case["scale"] < 1e-11  # eps decides, and the result is no unit vector
    # t and s, below the normal numbers, are divided by eps.
    range_ = torch.finfo(wide(dtype))
    floor = longest * range_.smallest_normal * range_.eps / eps if small else 0.0
    lost = [
        floor / float(s.abs()) if float(s.abs()) >= range_.tiny else 0.0
        for s in results["reference"][1].detach().double()
    ]
    for name, ours, theirs in zip(("y", "sigma", "u", "v"), results["native"], results["reference"], strict=False):
        for k, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            allowed = tolerance * (condition if small else 1)
            if name == "y":
                close(name, one, other, allowed + lost[k])
            else:
                close(name, one, other, allowed, floor=floor)
    for k, (one, other) in enumerate(zip(results["native"][4], results["reference"][4], strict=True)):
        # (G - <G, Y> u v^T) / sigma + grad_sigma u v^T, whose terms may be larger than what is left of them; without
        # the division where sigma counts as 0.
        y, sigma, u, v = (results["reference"][i][k].detach().double() for i in range(4))
        inverse = 1 / float(sigma.abs()) if float(sigma.abs()) >= torch.finfo(wide(dtype)).tiny else 1.0
        outer = float(u.abs().max() * v.abs().max())
        along = float((grads[k].double() * y).abs().sum()) * inverse + float(grad_sigma[k].abs())
        terms = float(grads[k].double().abs().max()) * inverse + along * outer
        if not max(terms, along, inverse) < torch.finfo(dtype).max / 4:
            continue  # a term or a factor has no number in one order of the operations, and one in another
        close(f"grad {k}", one, other, tolerance * condition + lost[k], max(terms, float(other.double().abs().max())))


def check_interpolate(case: Case, generator: torch.Generator) -> None:
    dtype = DTYPES[case["dtype"]]
    real, fake = (torch.randn(case["shape"], generator=generator, dtype=torch.float64) for _ in range(2))
    mix = torch.rand(case["shape"][0], generator=generator, dtype=torch.float64).to(wide(dtype))
    mix[torch.rand(len(mix), generator=generator) < 0.3] = 1.0
    real, fake = (lay((x * case["scale"] / 8).to(dtype), case["layout"]) for x in (real, fake))
    results = [interpolate(real, fake, mix, backend=backend) for backend in ("native", "reference")]
    close("x_hat", *results, tolerance=4 * unit_roundoff(dtype))


def check_penalty(case: Case, generator: torch.Generator) -> None:
    dtype, norm = DTYPES[case["dtype"]], case["norm"]
    grads = torch.randn(case["shape"], generator=generator, dtype=torch.float64)
    grads[torch.rand(case["shape"][:1], generator=generator) < 0.2] = 0.0
    # The penalty squares a norm: in the dtype that it is returned in, it has no number beyond this.
    limit = {"float32": 1e17, "bfloat16": 1e17, "float64": 1e150}.get(case["dtype"], 1e4)
    grads = lay((grads * min(case["scale"], limit)).to(dtype), case["layout"])
    keywords = {"weight": case["weight"], "target": case["target"], "norm": norm}
    results = []
    for backend in ("native", "reference"):
        x = grads.detach().requires_grad_()
        penalty, norms = gradient_penalty(x, case["kind"], backend=backend, **keywords)
        results.append((norms, penalty, torch.autograd.grad(penalty, x)[0]))
    (norms, penalty, by_grads), (their_norms, their_penalty, their_grads) = results
    eps = unit_roundoff(wide(dtype))
    close("norms", norms, their_norms, 8 * eps)
    # (n - t)^2 where n is near t: the error is one of n and t, not of the difference.
    largest = max(float(their_norms.detach().double().abs().max()), case["target"])
    close("penalty", penalty, their_penalty, 64 * eps, abs(case["weight"]) * largest**2)
    if case["kind"] != "max":  # which norms share a maximum is a question of the last place
        close(
            "grad",
            by_grads,
            their_grads,
            64 * eps + 2 * unit_roundoff(dtype),
            abs(case["weight"]) * 2 * largest + 1e-300,
        )


def check_perceptron(case: Case, generator: torch.Generator) -> None:
    dtype, widths, batch = DTYPES[case["dtype"]], [*case["widths"], 1], case["batch"]

    def draw(*shape: int) -> Tensor:
        return lay(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype), case["layout"])

    x = draw(batch, widths[0])
    weights = [draw(after, before) for before, after in itertools.pairwise(widths)]
    biases = [draw(width) if case["biased"] else None for width in widths[1:]]
    slopes, scales = [case["slope"]] * (len(weights) - 1), [None] * (len(weights) - 1)
    # Cases of the corpus that are older than curves have none.
    curve = case.get("curve", "")
    smooth = {"curves": [curve] * len(slopes), "constants": [1.0, 0.9, 1.1] * len(slopes)} if curve else {}
    options = [{**smooth, "backend": backend} for backend in ("native", "reference")]
    results = [
        penalize(x, weights, biases, slopes, scales, case["kind"], case["weight"], case["target"], **option)
        for option in options
    ]
    # A sample at the kink of an activation may fall on either side: then all differs.
    (penalty, norms, *by), (their_penalty, their_norms, *their_by) = results
    grads, their_grads = by[0] + by[1], their_by[0] + their_by[1]
    tolerance = 1e4 * unit_roundoff(dtype) * len(widths)
    size = float(their_norms.max())
    if not float((norms - their_norms).abs().max()) <= tolerance * max(size, 1e-30):
        exact = penalize(
            x.double(), [w.double() for w in weights], [None if b is None else b.double() for b in biases],
            slopes, scales, case["kind"], case["weight"], case["target"], **options[1],
        )[1]  # fmt: skip
        off = [float((one.double() - exact).abs().max()) for one in (norms, their_norms)]
        assert min(off) > tolerance * size or dtype == torch.float32, f"norms: {off} from the truth"
        return
    largest = max(size, case["target"], 1.0)
    close("penalty", penalty, their_penalty, tolerance, abs(case["weight"]) * largest**2)
    if case["kind"] != "max":
        for one, other in zip(grads, their_grads, strict=True):
            close("grad", one, other, tolerance, abs(case["weight"]) * largest**2 + float(other.abs().max()))


def check_root(case: Case, generator: torch.Generator) -> None:
    dtype, n = DTYPES[case["dtype"]], case["n"]
    x = torch.randn(case["count"], n, n, generator=generator, dtype=torch.float64)
    a = x @ x.mT / max(n, 1) * min(case["scale"], 1e30 if dtype == torch.float32 else 1e300)
    a = lay(a.to(dtype), case["layout"])
    results = [matrix_sqrt.root(a, backend=backend) for backend in ("native", "reference")]
    # The root of an eigenvalue that is rounding: sqrt(n eps) of the largest.
    close("root", *results, tolerance=4 * math.sqrt(max(n, 1) * unit_roundoff(dtype)))


def check_polar(case: Case, generator: torch.Generator) -> None:
    dtype, entries = DTYPES[case["dtype"]], case["entries"]
    shape, k = (case["count"], case["m"], case["n"]), min(case["m"], case["n"])
    a = torch.randn(shape, generator=generator, dtype=torch.float64)
    left, _, right = torch.linalg.svd(a, full_matrices=False)
    a = (left * torch.logspace(-case["decades"], 0, k, dtype=torch.float64)) @ right
    range_ = torch.finfo(dtype)
    a = a * (range_.smallest_normal / 16 if entries == "subnormal" else case["scale"])
    if entries == "zeros":
        a[..., : case["n"] // 2] = 0.0
    elif entries in {"nan", "inf"}:
        a.flatten()[-1:] = float(entries)
    a = lay(a.to(dtype), case["layout"])
    grad = lay(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype), case["layout"])
    results: list[Any] = []  # (u, gradient), or None
    for backend in ("native", "reference"):
        x = a.detach().requires_grad_()
        with use_backend(backend):
            try:
                u = polar_factor(x)
            except ValueError:
                results.append(None)
            else:
                results.append((u.detach(), torch.autograd.grad(u, x, grad)[0]))
    refused = not bool(a.isfinite().all())
    assert [result is None for result in results] == [refused] * 2, f"{entries} is refused by one, or wrongly"
    if refused or not a.numel():
        return
    singular = torch.linalg.svdvals(a.double() / a.double().abs().amax((-2, -1), keepdim=True).clamp_min(5e-324))
    condition = float((singular[..., 0] / singular[..., -1].clamp_min(1e-300)).max())
    for u, _ in results:
        wide_u = u.double() if case["m"] >= case["n"] else u.double().mT
        off = float((wide_u.mT @ wide_u - torch.eye(k, dtype=torch.float64)).abs().max())
        assert off <= 8 * math.sqrt(k) * range_.eps + 40 * range_.eps, f"u: {off:g} from orthogonal"
    # As in tests/ops/test_polar_factor.py, for both.
    tolerance = 8 * k * condition * range_.eps
    if not tolerance < 0.1:
        return
    (u, by_a), (their_u, their_by_a) = results
    close("u", u, their_u, tolerance, 1.0)
    length = float(grad.double().norm()) * condition / float(a.double().abs().max())
    if length < range_.max / 1e6 and 1 / length < range_.max / 1e6:
        close("grad", by_a, their_by_a, 2 * tolerance * condition, length)


def check_neighbours(case: Case, generator: torch.Generator) -> None:
    dtype = DTYPES[case["dtype"]]
    # A power of two: the distances are exact in every order of summation, and many are equal.
    scale = 2.0 ** round(math.log2(min(case["scale"], 1e30 if dtype != torch.float64 else 1e100)))

    def draw(n: int) -> Tensor:
        points = torch.randint(-3, 4, (n, case["d"]), generator=generator).double()
        return lay((points * scale).to(dtype), case["layout"])

    x, y = draw(case["m"]), draw(case["n"])
    results = [nearest_neighbours(x, y, case["k"], backend=backend) for backend in ("native", "reference")]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other), "neighbours"
    radii = [(torch.rand(n, generator=generator, dtype=torch.float64) * 20) * scale**2 for n in (case["m"], case["n"])]
    counts = [ball_counts(x, y, *radii, closed=case["closed"], backend=backend) for backend in ("native", "reference")]
    for one, other in zip(*counts, strict=True):
        assert torch.equal(one, other), "counts"


CHECKS: dict[str, Callable[[Case, torch.Generator], None]] = {
    "spectral_norm": check_spectral_norm,
    "interpolate": check_interpolate,
    "gradient_penalty": check_penalty,
    "mlp_gradient_penalty": check_perceptron,
    "matrix_sqrt": check_root,
    "nearest_neighbours": check_neighbours,
    "polar_factor": check_polar,
}


def check(case: Case) -> None:
    """Raises AssertionError where the native backend and the reference disagree."""
    before = torch.get_num_threads()
    torch.set_num_threads(case["threads"])
    if (module := _backend.native()) is not None:
        module.insist_on_threads(True)  # on a busy machine the case would become one of a single thread
    try:
        CHECKS[case["op"]](case, torch.Generator().manual_seed(case["seed"]))
    finally:
        torch.set_num_threads(before)
        if module is not None:
            module.insist_on_threads(False)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    op = draw(st.sampled_from(list(CHECKS)))
    narrow = op in {"mlp_gradient_penalty", "matrix_sqrt", "nearest_neighbours", "polar_factor"}
    dtype = draw(st.sampled_from([name for name in DTYPES if not narrow or name in {"float32", "float64"}]))
    low, high = EXPONENTS[dtype]
    case: Case = {
        "op": op,
        "dtype": dtype,
        "layout": draw(st.sampled_from(LAYOUTS)),
        "scale": 10.0 ** draw(st.just(0) | st.integers(low, high)),
        "threads": draw(st.integers(1, 4)),
        "seed": draw(st.integers(0, 1000)),
    }
    size = st.integers(1, 9) | st.sampled_from([15, 16, 17, 31, 33, 64, 130])
    if op == "spectral_norm":
        shapes = draw(st.lists(st.lists(size, min_size=2, max_size=4), min_size=1, max_size=3))
        case["shapes"] = [shape if math.prod(shape) < 100_000 else shape[:2] for shape in shapes]
        case["dims"] = [draw(st.integers(0, len(shape) - 1)) for shape in case["shapes"]]
        case["iterations"] = draw(st.integers(0, 3))
    elif op in {"interpolate", "gradient_penalty"}:
        shape = draw(st.lists(size, min_size=1 if op == "interpolate" else 2, max_size=4))
        case["shape"] = shape if math.prod(shape) < 100_000 else shape[:2]
    if op in {"gradient_penalty", "mlp_gradient_penalty"}:
        case["kind"] = draw(st.sampled_from(["two-sided", "one-sided", "squared", "max"]))
        case["weight"], case["target"] = draw(st.sampled_from([1.0, 10.0, 0.5])), draw(st.sampled_from([0.0, 1.0, 3.0]))
    if op == "gradient_penalty":
        case["norm"] = draw(st.sampled_from(["sample", "pixel"]))
    if op == "mlp_gradient_penalty":
        case["widths"] = draw(st.lists(size, min_size=1, max_size=4))
        case["batch"], case["biased"] = draw(size), draw(st.booleans())
        case["slope"] = draw(st.sampled_from([0.0, 0.2, 1.0]))
        case["curve"] = draw(st.sampled_from(["", *CURVES]))
    if op == "matrix_sqrt":
        case["n"], case["count"] = draw(st.integers(1, 20) | st.just(64)), draw(st.integers(1, 20))
    if op == "nearest_neighbours":
        case["m"], case["n"], case["d"] = draw(size), draw(size), draw(size)
        case["k"], case["closed"] = draw(st.integers(1, case["n"])), draw(st.booleans())
    if op == "polar_factor":
        case["count"], case["m"], case["n"] = draw(st.integers(0, 3)), draw(size), draw(size)
        case["decades"] = draw(st.integers(0, 4))  # from the smallest singular value to the largest
        case["entries"] = draw(st.sampled_from(["normal"] * 4 + ["zeros", "subnormal", "nan", "inf"]))
    return case


def corpus() -> list[Case]:
    return [json.loads(line) for line in CORPUS.read_text().splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="time for new cases, after the corpus")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first round; printed")
    args = parser.parse_args()
    for case in corpus():
        check(case)
    print(f"{len(corpus())} cases of the corpus hold; new ones from seed {args.seed} on", flush=True)
    tried, first, end = 0, args.seed, time.monotonic() + args.seconds
    failed: list[tuple[Case, AssertionError]] = []

    def run(case: Case) -> None:
        nonlocal tried
        tried += 1
        if time.monotonic() > end + args.seconds:  # time to make a failure small is bounded too
            return
        try:
            check(case)
        except AssertionError as error:
            failed.append((case, error))
            raise

    while time.monotonic() < end:
        # No health checks and no deadline: under a sanitizer everything is slow.
        options = settings(
            max_examples=50, deadline=None, database=None, suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        )  # fmt: skip
        try:
            seed(args.seed)(options(given(cases())(run)))()
        except AssertionError:
            case, error = min(failed, key=lambda one: len(json.dumps(one[0])))
            print(f"after {tried} cases: {error}\nfor {CORPUS.name}:\n{json.dumps(case)}")
            return 1
        args.seed += 1
    print(f"{tried} new cases hold, seeds {first} to {args.seed - 1}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
