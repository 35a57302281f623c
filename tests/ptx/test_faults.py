"""Faults planted in the kernels themselves are found: in the PTX that Triton emits, and in copies of the sources.

A fault is found by a Finding, or by a result that is not the clean kernel's. With LIPGAN_PTX_FULL=1 every single
instruction of synchronization is taken out that a launch executes, and the few that may go, since another one does the
same, are counted; otherwise some of some launches, and of the other faults one a kernel.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import grouped
import pytest
import torch
from lipgan.kernels import config, gradient_penalty, matrix_sqrt, nearest_neighbours
from ptx.compile import Session, compiler
from ptx.memory import Finding
from ptx.selection import FULL, selected
from torch import Tensor

SOME = 3  # instructions of a launch, where not all are taken out

Driver = Callable[[Session], Any]


def penalty(shape: tuple[int, int, int], kind: str) -> Driver:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return lambda s: gradient_penalty.gradient_penalty_fwd(s.copy(x), kind, 10.0, 1.0)


def penalty_again(shape: tuple[int, int, int], kind: str) -> Driver:
    """Two calls, the second of which takes the ticket that the first has left."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return lambda s: [gradient_penalty.gradient_penalty_fwd(s.copy(x), kind, 10.0, 1.0) for _ in range(2)]


def interpolate(h: int, w: int) -> Driver:
    g = torch.Generator().manual_seed(0)
    xs = torch.randn(h, w, generator=g), torch.randn(h, w, generator=g), torch.rand(h, generator=g)
    return lambda s: gradient_penalty.gradient_penalty_interpolate(*map(s.copy, xs))


def spectral(h: int, w: int, n: int, backward: bool = False) -> Driver:
    g = torch.Generator().manual_seed(0)
    layer = torch.randn(h, w, generator=g), torch.randn(h, generator=g), torch.randn(w, generator=g)

    def run(s: Session) -> Any:
        weight, u, v = map(s.copy, layer)
        if backward:
            sigma = s.copy(torch.ones(1))
            return grouped.spectral_norm_bwd([s.copy(layer[0] + 1)], None, [weight], sigma, [u], [v])
        return grouped.spectral_norm_fwd([weight], [u], [v], n, 1e-12)

    return run


def second_order(h: int, w: int) -> Driver:
    torch.manual_seed(0)
    inputs = grouped.double_inputs([(h, w)], [0], torch.float32)
    return lambda s: grouped.spectral_norm_double_bwd(
        *(s.copy(x) if isinstance(x, Tensor) else [s.copy(y) for y in x] for x in inputs)
    )


def product(m: int, n: int, precision: str = "ieee", dtype: torch.dtype = torch.float32) -> Driver:
    x = torch.randn(m, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    return lambda s: matrix_sqrt.polynomial(
        s.copy(x), s.copy((x.mT @ x) / 100), 1.5, -0.5, 0.25, precision=precision
    )  # fmt: skip


def gram(m: int, n: int, precision: str = "ieee", dtype: torch.dtype = torch.float32) -> Driver:
    x = torch.randn(m, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    return lambda s: matrix_sqrt.symmetric_product(s.copy(x), precision=precision)


def neighbours(m: int, n: int) -> Driver:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(m, 6, generator=g), torch.randn(n, 6, generator=g)
    return lambda s: nearest_neighbours.nearest_neighbours(s.copy(x), s.copy(y), 3)


def balls(m: int, n: int) -> Driver:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(m, 6, generator=g), torch.randn(n, 6, generator=g)
    rx, ry = torch.rand(m, generator=g).double() * 9, torch.rand(n, generator=g).double() * 9
    return lambda s: nearest_neighbours.ball_counts(*map(s.copy, (x, y, rx, ry)), True)


def by_bounds(driver: Driver) -> Driver:
    """The same, with bounds before the exact kernel."""

    def run(s: Session) -> Any:
        with mock.patch.object(config, "bounds_serve", return_value=True):
            return driver(s)

    return run


def flat(results: Any) -> Iterator[Tensor]:
    if isinstance(results, Tensor):
        yield results
    else:
        for result in results:
            yield from flat(result)


def outcome(session: Session, driver: Driver, clean: list[Tensor]) -> str:
    """How a fault is found, or "" where it is not."""
    try:
        with session.running():
            results = list(flat(driver(session)))
        for result in results:
            session.assert_written(result)
    except Finding as finding:
        return finding.kind
    except AssertionError:
        return "not written"
    same = all(torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
               for a, b in zip(results, clean, strict=True))  # fmt: skip
    return "" if same else "results"


SYNCHRONIZATION = re.compile(
    r"bar\.sync\s+0;|cp\.async\.wait_group\s+\d;|wgmma\.wait_group\.sync\.aligned \d;|bar\.warp\.sync[^;]*;"
    r"|fence\.proxy\.async[.:\w]*;|wgmma\.fence[^;]*;|cp\.async\.commit_group;"
)

# Launch -> instructions that may go: the first commit of a pipeline joins the next one, which is waited for as well;
# with nothing written to shared memory since a proxy fence, another one has nothing to do; the sums of consecutive
# wgmma are ordered, so that a wait between them only keeps registers alive; and of the two barriers before a ticket is
# taken, one is the kernel's and one is Triton's.
REDUNDANT = {
    "rows": {"bar.sync": 2}, "columns": {"bar.sync": 2}, "iterate": {},
    "gram": {"cp.async.commit_group": 1},
    "gram64": {"cp.async.commit_group": 1},
    "gram tf32x3": {"cp.async.commit_group": 1, "fence.proxy.async.shared::cta": 2, "wgmma.wait_group.sync.aligned": 1},
    "neighbours": {}, "balls": {},
}  # fmt: skip
SYNCHRONIZED = {
    "rows": penalty((31, 61, 1), "max"), "columns": penalty((2, 70, 66), "two-sided"), "iterate": spectral(9, 1030, 2),
    "gram": gram(70, 61), "gram64": gram(70, 61, dtype=torch.float64), "gram tf32x3": gram(70, 61, "tf32x3"),
    "neighbours": neighbours(9, 300), "balls": balls(9, 300),
}  # fmt: skip


@pytest.mark.parametrize("name", selected(["columns", "iterate", "gram tf32x3", "neighbours"], SYNCHRONIZED))
def test_synchronization_taken_out(name: str) -> None:
    driver, seen, executed = SYNCHRONIZED[name], {}, set()
    session = Session("sm_90", edit=lambda kernel, ptx: seen.setdefault(kernel, ptx), on_line=executed.add)
    with session.running():
        clean = list(flat(driver(session)))
    places = []
    for kernel, ptx in seen.items():
        for match in SYNCHRONIZATION.finditer(ptx):
            text = " ".join(match[0].rstrip(";").split())
            if (kernel, text, ptx[: match.start()].count(match[0])) in executed:
                places.append((ptx, match.start(), match.end(), text.split(" ")[0]))
    assert places
    kinds: dict[str, int] = {}
    missed: dict[str, int] = {}
    for ptx, start, end, opcode in places if FULL else places[:: -(-len(places) // SOME)]:

        def without(kernel: str, text: str, start: int = start, end: int = end, of: str = ptx) -> str:
            return text[:start] + text[end:] if text == of else text

        kind = outcome(Session("sm_90", edit=without, options={"budget": 100_000}), driver, clean)
        counts, key = (kinds, kind) if kind else (missed, opcode)
        counts[key] = counts.get(key, 0) + 1
    if FULL:
        assert missed == REDUNDANT[name], f"found {kinds}"
    else:
        assert all(count <= REDUNDANT[name].get(opcode, 0) for opcode, count in missed.items()), (
            f"{missed}, found {kinds}"
        )


# (kernel, text, replacement, launch): the mask, the bound, or what is stored.
SOURCE: dict[str, tuple[str, str, str, Driver]] = {
    "rows of a tile of W, unmasked": (
        "interpolate", "(row + i < h)[:, None] & (col + j < w)[None, :]",
        "(row + i < h + 9999)[:, None] & (col + j < w)[None, :]", interpolate(5, 61)),
    "rows of a tile, one too many": (
        "interpolate", "(row + i < h)[:, None] & (col + j < w)[None, :]",
        "(row + i <= h)[:, None] & (col + j < w)[None, :]", interpolate(5, 61)),
    "columns of a tile, unmasked": (
        "interpolate", "(row + i < h)[:, None] & (col + j < w)[None, :]",
        "(row + i < h)[:, None] & (col + j < w + 9999)[None, :]", interpolate(5, 61)),
    "columns of a tile, one too many": (
        "interpolate", "(row + i < h)[:, None] & (col + j < w)[None, :]",
        "(row + i < h)[:, None] & (col + j <= w)[None, :]", interpolate(5, 61)),
    "factors of the mix, one too many": (
        "interpolate", "mix = tl.load(mix_ptr + rows, mask=rows < h,", "mix = tl.load(mix_ptr + rows, mask=rows <= h,",
        interpolate(5, 61)),
    "rows of norms, unmasked": (
        "rows", "scale, target = tl.full([], scale, ACC), tl.full([], target, ACC)\n    row =",
        "h += 1\n    scale, target = tl.full([], scale, ACC), tl.full([], target, ACC)\n    row =",
        penalty((31, 61, 1), "max")),
    "norms of columns, unmasked": (
        "columns", "tl.store(norms + sample * w + cols, n, mask=cols < w)", "tl.store(norms + sample * w + cols, n)",
        penalty((2, 70, 66), "two-sided")),
    "norms of columns, one too many": (
        "columns", "tl.store(norms + sample * w + cols, n, mask=cols < w)",
        "tl.store(norms + sample * w + cols, n, mask=cols <= w)", penalty((2, 70, 66), "two-sided")),
    "partial results, one too many": (
        "columns", "inside = rows < count", "inside = rows <= count", penalty((2, 70, 66), "two-sided")),
    "the sum starts at one": (
        "columns", "-1.0 if KIND == \"max\" else 0.0, ACC)", "-1.0 if KIND == \"max\" else 1.0, ACC)",
        penalty((2, 70, 66), "two-sided")),
    "a ticket that orders nothing": (
        "columns", 'sem="acq_rel"', 'sem="relaxed"', penalty((2, 70, 66), "two-sided")),
    "the sum by the last program but one": (
        "columns", "== tl.num_programs(0) - 1", "== tl.num_programs(0) - 2", penalty((2, 70, 66), "two-sided")),
    "the sum by the program with the last number": (
        "rows", "    is_last = tl.atomic_add(ticket, 1, sem=\"acq_rel\", scope=\"gpu\") == tl.num_programs(0) - 1",
        "    tl.atomic_add(ticket, 1, sem=\"acq_rel\", scope=\"gpu\")\n"
        "    is_last = tl.program_id(0) == tl.num_programs(0) - 1",
        penalty((70, 61, 1), "max")),
    "a ticket that is not put back": (
        "columns", "tl.store(ticket, 0)", "pass", penalty_again((2, 70, 66), "two-sided")),
    "the second part of a result, left out": (
        "parts", "tl.store(part + tl.num_programs(0), q)", "tl.store(part, q)", penalty((2, 16385, 1), "two-sided")),
    "norms of long rows, left out": (
        "parts", "tl.store(norms + rows, n, mask=inside)", "pass", penalty((2, 16385, 1), "two-sided")),
    "the slope of the maximum, left out": (
        "rows", "tl.store(top, m)\n            tl.store(top + 1,", "tl.store(top, m)\n            tl.store(top,",
        penalty((31, 61, 1), "max")),
    "v, one too many": (
        "iterate", "x = tl.load(v + entries, mask=cols < w,",
        "x = tl.load(v + entries, mask=cols <= w,", spectral(9, 1031, 1)),
    "the partial sums, unmasked": (
        "iterate", "tl.store(partial + cols, sums, mask=cols < padded_w)", "tl.store(partial + cols, sums)", spectral(9, 1030, 1)),
    "the padding of the partial sums, left out": (
        "iterate", "tl.store(partial + cols, sums, mask=cols < padded_w)",
        "tl.store(partial + cols, sums, mask=cols < w)", spectral(9, 1030, 1)),
    "the maximum of a block, left out": ("iterate", "    tl.store(max_ptr, m)\n", "", spectral(9, 1030, 1)),
    "blocks of partial sums, one too many": (
        "reduce", "mask = (rows < blocks)[:, None]", "mask = (rows <= blocks)[:, None]", spectral(9, 1030, 1)),
    "s, unmasked": (
        "reduce", "tl.store(s + cols, total, mask=cols < padded_w)", "tl.store(s + cols, total)", spectral(9, 1030, 1)),
    "dY and Y, one too many": (
        "grad_dot", "mask = start + index < end", "mask = start + index <= end", spectral(9, 61, 0, backward=True)),
    "partial products, one too many": (
        "grad_weight", "acc += tl.load(ptr + index, mask=index < count, other=0.0)\n",
        "acc += tl.load(ptr + index, mask=index <= count, other=0.0)\n", spectral(9, 61, 0, backward=True)),
    "u, one too many": (
        "grad_weight", "u_scaled = tl.load(u + rows, mask=rows < h,", "u_scaled = tl.load(u + rows, mask=rows <= h,",
        spectral(9, 61, 0, backward=True)),
    "v of the second order, one too many": (
        "double_dot", "mask=rows < h, other=0.0).to(ACC)\n    v_tile = tl.load(v + entries, mask=cols < w,",
        "mask=rows < h, other=0.0).to(ACC)\n    v_tile = tl.load(v + entries, mask=cols <= w,", second_order(9, 61)),
    "sums of the second order, of one tile alone": (
        "double_grads", "along = load_sum(partials, tiles, STEP)", "along = load_sum(partials, 1, STEP)",
        second_order(9, 1030)),
    "what goes to sigma, by no program": (
        "double_grads", "if tile == 0:", "if tile < 0:", second_order(9, 61)),
    "depth of a product, unmasked": (
        "gram", "a_tile = tl.load(a + a_offsets, mask=inside_rows & inside[None, :]",
        "a_tile = tl.load(a + a_offsets, mask=inside_rows", gram(70, 61)),
    "columns of a product, unmasked": (
        "product", "b_tile = tl.load(b + b_offsets, mask=inside_cols & inside[:, None]",
        "b_tile = tl.load(b + b_offsets, mask=inside[:, None]", product(40, 61)),
    "a result of a product, unmasked": (
        "product", "tl.store(corner + (index[:, None] * n + index[None, :]), value, mask=inside)",
        "tl.store(corner + (index[:, None] * n + index[None, :]), value)", product(40, 61)),
    "the mirror image, left out": (
        "gram", "tl.store(image + image_offsets, value, mask=inside & (rows > cols))", "pass", gram(40, 61)),
    "neighbours, unmasked": (
        "neighbours", "tl.store(squared + out + first + place, nearest, mask=inside)",
        "tl.store(squared + out + first + place, nearest)", neighbours(9, 300)),
    "places of neighbours, one too many": (
        "neighbours", "for place in range(0, wanted):", "for place in range(0, wanted + 1):", neighbours(9, 300)),
    "radii, one too many": (
        "ball", "y_radii = tl.load(y_squared_radii + cols, mask=cols < n,",
        "y_radii = tl.load(y_squared_radii + cols, mask=cols <= n,",
        balls(9, 300)),
    "counts, unmasked": (
        "ball", "tl.store(x_counts + rows, of_x.to(tl.int64), mask=inside)", "tl.store(x_counts + rows, of_x.to(tl.int64))",
        balls(9, 300)),
    "a moved point, unmasked": (
        "neighbour_shift", "tl.store(shifted + first + feature + features, moved.to(tl.float32), mask=inside)",
        "tl.store(shifted + first + feature + features, moved.to(tl.float32))", by_bounds(neighbours(9, 70))),
    "lengths beside a product, one too many": (
        "neighbour_bounds", "norms = tl.load(y_norms + cols, mask=cols < n, other=0.0)\n    low = (norms",
        "norms = tl.load(y_norms + cols, mask=cols <= n, other=0.0)\n    low = (norms", by_bounds(neighbours(9, 70))),
    "lengths beside bounds, one too many": (
        "nearest_by_bounds", 'norms = tl.load(y_norms + cols, mask=cols < n, other=float("inf"))',
        'norms = tl.load(y_norms + cols, mask=cols <= n, other=float("inf"))', by_bounds(neighbours(9, 70))),
    "counts by bounds, of points that are not there": (
        "counts_by_bounds", "decided = ((open_x | open_y) == 0) & (cols < n)", "decided = (open_x | open_y) == 0",
        by_bounds(balls(9, 70))),
}  # fmt: skip


FIRST_OF_KERNELS = {kernel: name for name, (kernel, *_) in reversed(SOURCE.items())}


@pytest.mark.parametrize("name", selected(FIRST_OF_KERNELS.values(), SOURCE))
def test_masks_bounds_and_stores_taken_out(name: str) -> None:
    kernel, old, new, driver = SOURCE[name]
    session = Session("sm_90")
    with session.running():
        clean = list(flat(driver(session)))
    assert any(kernel in launched for launched in session.launched), session.launched
    # The last program of a launch is another one then.
    orders = (False, True)
    found = []
    for descending in orders:
        options = {"budget": 100_000, "descending": descending}
        found.append(
            outcome(Session("sm_90", compile=compiler.edited(kernel, old, new), options=options), driver, clean)
        )
    assert any(found), "the fault was not found"
