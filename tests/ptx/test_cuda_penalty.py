"""What nvcc emits for csrc/cuda/gradient_penalty.cu, run on the emulator."""

import ctypes
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from cuda_sources import GRADIENT_PENALTY
from lipgan.kernels import config
from ptx import compile as compilers
from ptx.memory import Finding
from ptx.selection import DTYPES, DTYPES_ON_TARGETS, FULL, selected
from tolerance import assert_as_accurate
from torch import Tensor

from lipgan.ops.gradient_penalty import KINDS
from lipgan.reference import gradient_penalty as reference

pytestmark = pytest.mark.skipif(compilers.NVCC is None, reason="needs nvcc")

WEIGHT, TARGET = 10.0 / 3.0, 0.7
ROWS, LONG_ROWS, COLUMNS = range(3)  # lipgan::cuda::Lying

_libraries: dict[int, compilers.CudaLibrary] = {}


def load(target: str) -> compilers.CudaLibrary:
    architecture = int(target.removeprefix("sm_"))
    if architecture not in _libraries:
        _libraries[architecture] = compilers.CudaLibrary(GRADIENT_PENALTY, architecture)
        _libraries[architecture].library.workspace_size.restype = ctypes.c_int64
    return _libraries[architecture]


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def run(
    library: compilers.CudaLibrary, shape: tuple[int, int, int], dtype: torch.dtype, kind: str, *, blocks: int = 2,
    misaligned: bool = False, scale: float = 1.0, counters: dict | None = None, **options,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A launch on random gradients, whose norms lie on both sides of the target; compared with the reference."""
    torch.manual_seed(1)
    grads = torch.randn(shape, dtype=torch.float64)
    norms = grads.norm(dim=1, keepdim=True)
    grads = (grads / norms * TARGET * (0.5 + torch.rand_like(norms)) * scale).to(dtype)
    session, accumulate = compilers.Session("sm_90"), wide(dtype)

    def empty(size, kind: torch.dtype) -> Tensor:
        tensor = session.allocate(torch.empty(size, dtype=kind))
        session.register(tensor, written=False)
        return tensor

    given, number, sizes = session.copy(grads, misaligned), DTYPES.index(dtype), list(map(ctypes.c_int64, shape))
    results = empty([1], accumulate), empty([shape[0], shape[2]], accumulate), empty(shape, dtype)
    workspace = empty([library.library.workspace_size(number, *sizes) // 8], torch.float64)
    error = library.call(
        "gradient_penalty_fwd", number, KINDS.index(kind), pointer(given), *map(pointer, results), *sizes,
        ctypes.c_double(WEIGHT), ctypes.c_double(TARGET * scale), pointer(workspace), memory=session.memory,
        multiprocessors=blocks, counters=counters, **options,
    )  # fmt: skip
    assert error == 0
    truth, peer = (
        reference.gradient_penalty_fwd(grads.to(t), kind, WEIGHT, TARGET * scale, "pixel")
        for t in (torch.float64, accumulate)
    )
    for result in results:
        session.assert_written(result)
    penalty, norms, cotangent = results
    # As in the tests of the same source on the host.
    of_norm = 2.0 if accumulate == torch.float32 else shape[1] / 8 + 4
    excess = float(truth[1].max()) + TARGET * scale
    assert_as_accurate(norms, peer[1], truth[1], roundings=of_norm)
    if scale == 1.0:  # else the squares of the reference leave the range
        assert_as_accurate(penalty[0], peer[0], truth[0], roundings=4 * of_norm, scale=WEIGHT * excess**2)
    slope = 2 * WEIGHT / (1 if kind == "max" else norms.numel()) * excess
    size = slope * torch.finfo(accumulate).eps / torch.finfo(dtype).eps + float(truth[2].abs().max())
    assert_as_accurate(cotangent, peer[2].to(dtype), truth[2], roundings=2 * of_norm + 4, scale=size)
    return tuple(result.clone() for result in results)


# Rows that some threads of a warp share, whole packs and not, and that a block takes; columns of one thread and of
# several, in several tiles.
SHAPES = selected([(21, 40, 1), (2, 17, 140)], [(7, 3, 1), (5, 600, 1), (3, 1030, 1), (2, 3, 300), (1, 130, 33)])


@pytest.mark.parametrize(("dtype", "target"), DTYPES_ON_TARGETS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_penalty(shape: tuple[int, int, int], dtype: torch.dtype, target: str) -> None:
    for kind in KINDS if FULL else ("two-sided", "max"):
        run(load(target), shape, dtype, kind)


@pytest.mark.parametrize(
    ("dtype", "target"), selected([(torch.float32, "sm_90"), (torch.bfloat16, "sm_80")], DTYPES_ON_TARGETS), ids=str
)
def test_rows_that_blocks_share(dtype: torch.dtype, target: str) -> None:
    longest = config.longest_row(dtype.itemsize)
    for kind in KINDS if FULL else ("max",):
        run(load(target), (1, longest + 1, 1), dtype, kind)
    run(load(target), (1, longest + 8, 1), dtype, "one-sided", blocks=3)


@pytest.mark.parametrize("shape", [(5, 48, 1), (2, 5, 70)])
def test_without_alignment_and_near_the_ends_of_the_range(shape: tuple[int, int, int]) -> None:
    run(load("sm_90"), shape, torch.bfloat16, "two-sided", misaligned=True)
    for scale in (2.0**600, 2.0**-600):
        run(load("sm_90"), shape, torch.float64, "two-sided", scale=scale)


def test_the_same_bits_on_every_grid_and_in_every_order() -> None:
    for shape in [(21, 40, 1), (1, 16_385, 1)]:
        first = run(load("sm_90"), shape, torch.float32, "two-sided", blocks=1)
        for blocks, descending in [(2, True), (3, False)]:
            again = run(load("sm_90"), shape, torch.float32, "two-sided", blocks=blocks, descending=descending)
            assert all(map(torch.equal, again, first))


def test_bytes_of_a_launch() -> None:
    """Of rows that stay with a block the second reading, and of long ones that by another step, have 16 bytes each."""
    for shape, kind, workspace in (((4, 512, 1), "two-sided", 8 * 4), ((1, 16_388, 1), "two-sided", 16 * 5 + 8)):
        counters: dict = {}
        run(load("sm_90"), shape, torch.float32, kind, counters=counters)
        (count,) = counters.values()
        numbers = shape[0] * shape[1]
        assert count.load_widths[16] == 2 * numbers * 4
        assert count.written_bytes == numbers * 4 + shape[0] * 4 + 4 + workspace


# Launches of each way to lie, which together need all of its barriers.
LAUNCHES = {
    ROWS: [((21, 40, 1), "max", torch.float32), ((5, 600, 1), "two-sided", torch.float32)],
    LONG_ROWS: [((1, 16_385, 1), "two-sided", torch.float32), ((1, 16_385, 1), "max", torch.float32)],
    COLUMNS: [((2, 70, 140), "two-sided", torch.float32), ((2, 70, 140), "max", torch.float32)],
}
if FULL:  # which reach the barriers of the other width of accesses
    LAUNCHES[ROWS] += [((21, 41, 1), "max", torch.float32), ((5, 601, 1), "two-sided", torch.float32)]
    LAUNCHES[LONG_ROWS] += [((1, 16_388, 1), "two-sided", torch.float32)]


# Line of source -> its barriers that may go. The first one of a sum or a maximum, where another barrier stands between
# the one before and this one; the last one of a maximum that one thread alone takes.
_SUM, _MAXIMUM, _COLUMNS = (
    f"__syncthreads();  // the readers of the previous {what} are done" for what in ("sum", "maximum", "columns")
)
REDUNDANT: dict[int, dict[str, int]] = {
    ROWS: {_SUM: 1, _MAXIMUM: 3, "__syncthreads();": 2},
    LONG_ROWS: {_SUM: 2, _MAXIMUM: 1},
    COLUMNS: {_SUM: 2, _MAXIMUM: 2, _COLUMNS: 1, "__syncthreads();": 1},
}


def line_before(ptx: str, place: int) -> str:
    """The line of source that an instruction comes from."""
    file, line = re.findall(r"\.loc\s+(\d+) (\d+)", ptx[:place])[-1]
    (path,) = re.findall(rf'\.file\s+{file} "([^"]+)"', ptx)
    return Path(path).read_text().splitlines()[int(line) - 1].strip() if Path(path).exists() else Path(path).name


def failure(library: compilers.CudaLibrary, lying: int) -> AssertionError | None:
    """The first finding or wrong result of the launches."""
    for shape, kind, dtype in LAUNCHES[lying]:
        try:
            run(library, shape, dtype, kind)
        except AssertionError as error:  # a finding is one as well
            return error
    return None


@pytest.mark.parametrize("lying", LAUNCHES)
def test_barriers_of_the_grid_taken_out(lying: int) -> None:
    """Where one of them lets blocks go on before all have come, a launch has a finding; nor may one of a block go."""
    library = load("sm_90")
    clean = library.ptx
    (name,) = (n for n in library.names.values() if re.search(rf"fwd_kernelIf\w*LyingE{lying}E", n))
    start = clean.index(f".entry {name}(")
    end = clean.find(".entry", start + 1) % len(clean)
    arrivals = [start + match.start() for match in re.finditer(r"atom\.add\.release\.gpu", clean[start:end])]
    assert len(arrivals) == (2 if lying == LONG_ROWS else 1)
    missed: Counter[str] = Counter()
    try:
        for at in arrivals:
            library.ptx = clean[:at] + clean[at:].replace("release", "relaxed", 1)
            error = failure(library, lying)
            assert isinstance(error, Finding)
            assert "race: reads what" in str(error)
        for place in compilers.BARRIER.finditer(clean, start, end) if FULL else ():
            instead = f"mov.pred {place[1]}, {place[2]};" if place[1] else ""
            library.ptx = clean[: place.start()] + instead + clean[place.end() :]
            if failure(library, lying) is None:
                missed[line_before(clean, place.start())] += 1
    finally:
        library.ptx = clean
    assert missed == (REDUNDANT[lying] if FULL else {})


@pytest.mark.parametrize("shape", [(3, 64), (5, 61)])
def test_interpolate(shape: tuple[int, int]) -> None:
    for dtype, target in DTYPES_ON_TARGETS:
        session = compilers.Session(target)
        real, fake = (session.copy(torch.randn(shape).to(dtype)) for _ in range(2))
        mix = session.copy(torch.tensor([1.0, 0.0, *[0.3] * (shape[0] - 2)], dtype=wide(dtype)))
        x_hat = session.allocate(torch.empty(shape, dtype=dtype))
        session.register(x_hat, written=False)
        error = load(target).call(
            "gradient_penalty_interpolate", DTYPES.index(dtype), *map(pointer, (real, fake, mix, x_hat)),
            *map(ctypes.c_int64, shape), memory=session.memory, multiprocessors=2,
        )  # fmt: skip
        assert error == 0
        session.assert_written(x_hat)
        assert torch.equal(x_hat[0], real[0])
        assert torch.equal(x_hat[1], fake[1])
        m = mix[2:, None]
        exact = m.double() * real[2:].double() + (1 - m.double()) * fake[2:].double()
        peer = m * real[2:].to(m.dtype) + (1 - m) * fake[2:].to(m.dtype)
        assert_as_accurate(x_hat[2:], peer.to(dtype), exact, roundings=2.0)
