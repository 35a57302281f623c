"""What nvcc emits, on the emulator: short functions with known results, and csrc/cuda/spectral_norm.cu."""

import ctypes
import re
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_sources import SPECTRAL_NORM
from matrix_memory import in_memory, out_of_memory
from ptx import compile as compilers
from ptx import kit
from ptx.memory import Finding
from ptx.selection import DTYPES, FULL, selected
from tolerance import assert_as_accurate
from torch import Tensor

from lipgan.reference import spectral_norm as reference

ARCHITECTURES = selected([90], [80])
EPS = 1e-12

pytestmark = pytest.mark.skipif(compilers.NVCC is None, reason="needs nvcc")

# Ten lines each, compiled as they are: what comes out is known without any of the emulator's code.
FUNCTIONS = r"""
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <cooperative_groups.h>

extern "C" __global__ void block_sums(const float* x, float* sums, int n) {
  __shared__ float part[32];
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  float v = i < n ? x[i] : 0.0f;
  for (int o = 16; o > 0; o /= 2) v += __shfl_down_sync(0xffffffffu, v, o);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0;
    for (int w = 0; w < blockDim.x / 32; ++w) total += part[w];
    sums[blockIdx.x] = total;
  }
}

extern "C" __global__ void transpose(const int* in, int* out, int n) {
  __shared__ int tile[32][33];
  int x = threadIdx.x % 32, y = threadIdx.x / 32;
  for (int r = y; r < 32; r += 8) tile[r][x] = in[r * n + x];
  __syncthreads();
  for (int r = y; r < 32; r += 8) out[r * n + x] = tile[x][r];
}

extern "C" __global__ void digits(const unsigned* x, int* out, int n) {
  int i = threadIdx.x;
  if (i >= n) return;
  unsigned v = x[i];
  int sum = 0;
  while (v) {
    sum += v % 10;
    v /= 10;
  }
  out[i] = sum;
}

extern "C" __global__ void collatz(const long long* x, int* steps) {
  long long v = x[threadIdx.x];
  int n = 0;
  while (v != 1) {
    v = v % 2 ? 3 * v + 1 : v / 2;
    ++n;
  }
  steps[threadIdx.x] = n;
}

extern "C" __global__ void halves(const float* x, __half* h, __nv_bfloat16* b, float* back) {
  int i = threadIdx.x;
  h[i] = __float2half_rn(x[i]);
  b[i] = __float2bfloat16_rn(x[i]);
  back[i] = __half2float(h[i]) + __bfloat162float(b[i]);
}

extern "C" __global__ void prefix_sums(const int* x, int* out) {
  __shared__ int buffer[2][128];
  int i = threadIdx.x, from = 0;
  buffer[0][i] = x[i];
  __syncthreads();
  for (int o = 1; o < 128; o *= 2) {
    buffer[1 - from][i] = buffer[from][i] + (i >= o ? buffer[from][i - o] : 0);
    from = 1 - from;
    __syncthreads();
  }
  out[i] = buffer[from][i];
}

extern "C" __global__ void everyone_sees(int* slots, int* seen) {
  auto grid = cooperative_groups::this_grid();
  if (threadIdx.x == 0) slots[blockIdx.x] = 1 + blockIdx.x;
  grid.sync();
  int sum = 0;
  for (int b = 0; b < gridDim.x; ++b) sum += slots[b];
  grid.sync();
  if (threadIdx.x == 0) slots[blockIdx.x] = -sum;
  seen[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

extern "C" __global__ void any_negative(const double* x, int* out) {
  int any = __syncthreads_or(x[blockIdx.x * blockDim.x + threadIdx.x] < 0);
  double root = sqrt(fabs(x[0]));
  out[blockIdx.x * blockDim.x + threadIdx.x] = any * 10 + (root * root == fabs(x[0]));
}
"""


@pytest.fixture(scope="module", params=ARCHITECTURES)
def functions(request: pytest.FixtureRequest) -> str:
    return compilers.nvcc_ptx(FUNCTIONS, request.param)


def test_block_sums(functions: str) -> None:
    device = kit.Device()
    x = device.array(np.arange(300, dtype=np.float32))
    sums = device.array(np.zeros(3, np.float32), written=False)
    device.launch(functions, [x, sums, np.int32(300)], grid=3, threads=128, name="block_sums")
    assert sums.tolist() == [sum(range(128)), sum(range(128, 256)), sum(range(256, 300))]


def test_transposition_through_shared_memory(functions: str) -> None:
    device = kit.Device()
    x = device.array(np.arange(1024, dtype=np.int32).reshape(32, 32))
    out = device.array(np.zeros((32, 32), np.int32), written=False)
    device.launch(functions, [x, out, np.int32(32)], threads=256, name="transpose")
    assert (out == x.T).all()


def test_loops_of_different_lengths(functions: str) -> None:
    device = kit.Device()
    numbers = [0, 7, 10, 999, 4294967295, 1234567890, *range(90, 110)]
    out = device.array(np.zeros(len(numbers), np.int32), written=False)
    x = device.array(np.array(numbers, np.uint32))
    device.launch(functions, [x, out, np.int32(len(numbers))], threads=32, name="digits")
    assert out.tolist() == [sum(map(int, str(n))) for n in numbers]
    steps = device.array(np.zeros(32, np.int32), written=False)
    device.launch(functions, [device.array(np.arange(1, 33, dtype=np.int64)), steps], name="collatz")

    def collatz(v: int) -> int:
        return 0 if v == 1 else 1 + collatz(3 * v + 1 if v % 2 else v // 2)

    assert steps.tolist() == [collatz(v) for v in range(1, 33)]


def test_half_types(functions: str) -> None:
    device = kit.Device()
    values = torch.randn(32) * torch.logspace(-6, 4, 32)
    x = device.array(values.numpy())
    h, b = (device.array(np.zeros(32, np.uint16), written=False) for _ in range(2))
    back = device.array(np.zeros(32, np.float32), written=False)
    device.launch(functions, [x, h, b, back], name="halves")
    assert (h.view(np.float16) == values.half().numpy()).all()
    assert torch.equal(torch.from_numpy(b.copy()).view(torch.bfloat16), values.bfloat16())
    assert (back == (values.half().float() + values.bfloat16().float()).numpy()).all()


def test_prefix_sums(functions: str) -> None:
    device = kit.Device()
    values = np.random.default_rng(0).integers(-9, 9, 128).astype(np.int32)
    out = device.array(np.zeros(128, np.int32), written=False)
    device.launch(functions, [device.array(values), out], threads=128, name="prefix_sums")
    assert out.tolist() == np.cumsum(values).tolist()


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_grid_barriers(functions: str, blocks: int) -> None:
    device = kit.Device()
    slots = device.array(np.zeros(blocks, np.int32), written=False)
    seen = device.array(np.zeros(64 * blocks, np.int32), written=False)
    device.launch(functions, [slots, seen], grid=blocks, threads=64, name="everyone_sees", cooperative=True)
    total = blocks * (blocks + 1) // 2
    assert seen.tolist() == [total] * (64 * blocks)
    assert slots.tolist() == [-total] * blocks


def test_votes_of_a_block(functions: str) -> None:
    device = kit.Device()
    values = np.full(128, 4.0)
    values[100] = -1.0
    out = device.array(np.zeros(128, np.int32), written=False)
    device.launch(functions, [device.array(values), out], grid=2, threads=64, name="any_negative")
    assert out.tolist() == [1] * 64 + [11] * 64


@pytest.fixture(scope="module", params=ARCHITECTURES)
def library(request: pytest.FixtureRequest) -> compilers.CudaLibrary:
    return load(request.param)


def load(architecture: int, source: str = SPECTRAL_NORM, edit=lambda ptx: ptx) -> compilers.CudaLibrary:
    loaded = compilers.CudaLibrary(source, architecture, edit)
    for name in ("workspace_size", "table_size", "bwd_workspace_size"):
        getattr(loaded.library, name).restype = ctypes.c_int64
    return loaded


# h and w of a weight that lies as its matrix; behind them the inner and channels of one that does not.
Shape = tuple[int, ...]


def completed(shapes: list[Shape]) -> list[tuple[int, int, int, int]]:
    return [(*shape, *(shape[1:] * 2)[: 4 - len(shape)]) for shape in shapes]


def run(
    library: compilers.CudaLibrary, shapes: list[Shape], dtype: torch.dtype, n: int, *, blocks: int = 2,
    misaligned: bool = False, scale: float = 1.0, **options,
) -> None:  # fmt: skip
    """Launch on random matrices, the first of them times `scale`, and compare with the reference."""
    torch.manual_seed(1)
    session = compilers.Session("sm_90")
    inputs, lying, orders = [], [], completed(shapes)
    for h, w, *order in orders:
        unit = [torch.nn.functional.normalize(torch.randn(k, dtype=torch.float64), dim=0) for k in (h, w)]
        size = scale if not inputs else 1.0
        inputs.append([x.to(dtype) for x in (torch.randn(h, w, dtype=torch.float64) * size, *unit)])
        lying.append([in_memory(inputs[-1][0], *order), *inputs[-1][1:]])
    given = [[session.copy(x, misaligned) for x in layer] for layer in lying]

    def empty(shape, kind: torch.dtype) -> Tensor:
        tensor = session.allocate(torch.empty(shape, dtype=kind))
        session.register(tensor, written=False)
        return tensor

    outputs = [[empty(x.shape, dtype) for x in layer] for layer in lying]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sigma = empty([len(shapes)], wide)
    rows = np.array(
        [
            [*(t.data_ptr() for t in (*a, *b)), *a[0].shape, channels]
            for a, b, (*_, channels) in zip(given, outputs, orders, strict=True)
        ],
        np.int64,
    )
    table, count = ctypes.c_void_p(rows.ctypes.data), ctypes.c_int64(len(shapes))
    # Arrays of doubles or floats; rows of pointers, 64-bit and 32-bit numbers and flags.
    workspace = empty([library.library.workspace_size(table, count) // 4], torch.int32)
    device_table = empty([library.library.table_size(count)], torch.uint8)
    error = library.call(
        "spectral_norm_fwd", DTYPES.index(dtype), table, count, ctypes.c_void_p(sigma.data_ptr()), ctypes.c_int64(n),
        ctypes.c_double(EPS), ctypes.c_void_p(workspace.data_ptr()), ctypes.c_void_p(device_table.data_ptr()),
        memory=session.memory, multiprocessors=blocks, **options,
    )  # fmt: skip
    assert error == 0
    arguments = [[x for layer in inputs for x in layer[i : i + 1]] for i in range(3)]
    dims = [0] * len(shapes)
    truth = reference.spectral_norm_fwd(*([x.double() for x in xs] for xs in arguments), n, EPS, dims)
    peer = reference.spectral_norm_fwd(*([x.to(wide) for x in xs] for xs in arguments), n, EPS, dims)
    for i, (y, u, v) in enumerate(outputs):
        for result in (y, u, v, sigma):
            session.assert_written(result)
        # As in tests of the same source on the host: the terms of sigma cancel where nothing is iterated.
        cancels = 1.0 if n else float(inputs[i][0].double().norm() / truth[1][i].abs())
        floor = 1.0 + (cancels * 2.0**-8 if dtype.itemsize == 2 else 16.0 * max(n, 1) * cancels)
        for mine, theirs, exact in (
            (sigma[i], peer[1][i], truth[1][i]),
            (out_of_memory(y, orders[i][-1]), peer[0][i], truth[0][i]), (u, peer[2][i], truth[2][i]),
            (v, peer[3][i], truth[3][i]),
        ):  # fmt: skip
            assert_as_accurate(mine, theirs.to(mine.dtype), exact, roundings=floor)


# Channels last, rows of dimension 0; contiguous, rows of dimension 1; both: with and without whole packs.
ORDERS: list[Shape] = [
    (9, 45, 45, 5),
    (8, 48, 48, 16),
    (7, 36, 9, 36),
    (24, 32, 16, 32),
    (13, 70, 1, 70),
    (24, 40, 1, 40),
]

# Several blocks of rows, columns and chunks, next to one block, ragged; then single ones of these.
GROUPS = selected(
    [[(37, 1100), (1, 9), (64, 27)], ORDERS],
    [[(5, 16)], [(7, 13), (24, 64)], [(1, 1), (1, 257), (61, 1), (7, 13)], [(600, 128)], [(19, 1032), (3, 4104)],
     [(2, 5003), (131, 260)]],
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", GROUPS, ids=str)
def test_spectral_norm(library: compilers.CudaLibrary, shapes: list[Shape], dtype: torch.dtype) -> None:
    for n in (0, 2):
        run(library, shapes, dtype, n)


@pytest.mark.parametrize("dtype", selected([torch.float32, torch.bfloat16], DTYPES))
def test_spectral_norm_without_alignment(library: compilers.CudaLibrary, dtype: torch.dtype) -> None:
    run(library, [(9, 48), (8, 48, 16, 48), (16, 24, 1, 24)], dtype, 1, blocks=3, misaligned=True)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    selected([(torch.float32, 1e30)], [(torch.bfloat16, 1e36), (torch.float64, 1e300)]),
    ids=str,
)
@pytest.mark.parametrize("n", [0, 2])
def test_spectral_norm_near_the_end_of_the_range(
    library: compilers.CudaLibrary, n: int, dtype: torch.dtype, scale: float
) -> None:
    """One block does a layer again, times a power of two; the other layers stay as they are."""
    run(library, [(37, 20), (5, 16), (7, 13)], dtype, n, blocks=3, scale=scale)
    run(library, [(16, 20, 4, 5), (5, 16)], dtype, n, blocks=3, scale=scale)


def test_several_blocks_that_say_so_at_once(library: compilers.CudaLibrary) -> None:
    """The layer has several blocks of rows, of which each comes near the end of the range."""
    run(library, [(60, 1100)], torch.float32, 1, blocks=4, scale=1e30)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_stores_of_blocks_that_say_so_are_found(architecture: int) -> None:
    def plain(ptx: str) -> str:
        edited, count = re.subn(r"atom(?:\.global)?\.or\.b32\s+(%r\d+), (\[%rd\d+\]), 1;",
                                r"mov.b32 \1, 1; st.global.b32 \2, \1;", ptx)  # fmt: skip
        assert count
        return edited

    with pytest.raises(Finding, match=r"race: writes what .* at once"):
        run(load(architecture, edit=plain), [(60, 1100)], torch.float32, 1, blocks=4, scale=1e30)


# (shapes, iterations, blocks, scale of the first weight): launches that together reach every barrier, and where it is
# needed: several tiles a block, columns with no rows side by side, no iterations, several mended layers of a block; the
# same of weights that do not lie as their matrices.
LAUNCHES = selected(
    [
        ([(37, 1100), (1, 9), (64, 27)], 2, 2, 1.0),
        ([(9, 1104, 16, 1104), (9, 1030, 5, 1030), (70, 30, 1, 30), (72, 20, 1, 20), (9, 1031)], 1, 2, 1.0),
    ],
    [
        ([(300, 27, 9, 27), (40, 1104, 16, 1104), (9, 1030, 5, 1030), (300, 32, 16, 32)], 2, 2, 1.0),
        ([(300, 30, 1, 30), (301, 30, 1, 30), (40, 30, 1, 30), (9, 300, 1, 300)], 2, 2, 1.0),
        ([(40, 1104, 16, 1104), (9, 1030, 5, 1030), (300, 30, 1, 30), (301, 30, 1, 30)], 0, 2, 1.0),
        ([(200, 27), (300, 32), (9, 1031)], 1, 2, 1.0),
        ([(37, 40), (9, 1031)], 0, 2, 1.0),
        ([(60, 1100), (5, 16), (7, 13), (3, 5), (2, 4)], 2, 2, 1e30),
        ([(60, 1100), (5, 16), (7, 13), (3, 5), (2, 4)], 0, 2, 1e30),
    ],
)

# Line of source -> its barriers that may go. A sum's first one, where another barrier stands between the sum before and
# this one: six ends of a rows step, |t| of a columns step, and four sums of a layer that is mended. The second one of a sum
# that nobody takes, there without iterations. And of the grid barrier behind it the first one, as the last sum of a layer
# had one after all that other threads write, and the second one, as the next step reads none of it before its first.
REDUNDANT = {
    "__syncthreads();  // the readers of the previous sum are done": 11,
    "__syncthreads();": 1,
    "sm_30_intrinsics.hpp": 2,
}


def line_of(where: str) -> str:
    file, line = re.match(r"([\w.]+):(\d+)", where).groups()
    path = compilers.ROOT / "csrc" / "cuda" / file
    return path.read_text().splitlines()[int(line) - 1].strip() if path.exists() else file


def test_barriers_taken_out() -> None:
    """A launch without one of the kernel's barriers has a finding or a wrong result, or the barrier is redundant."""
    library = load(90)
    clean = library.ptx
    (name,) = (n for n in library.names.values() if "spectral_norm_fwd_kernelIf" in n)
    start = clean.index(f".entry {name}(")
    places = list(compilers.BARRIER.finditer(clean, start, clean.find(".entry", start + 1) % len(clean)))
    blocks_of_code = compilers.program_of(clean, name).blocks
    barriers = [b for b in blocks_of_code if b.end is not None and b.end.parts[0] in ("bar", "barrier")]
    assert len(places) == len(barriers)
    reached: list[set[int]] = []
    for shapes, n, blocks, scale in LAUNCHES:
        for barrier in barriers:
            barrier.executed = False
        run(library, shapes, torch.float32, n, blocks=blocks, scale=scale)
        reached.append({i for i, barrier in enumerate(barriers) if barrier.executed})
    chosen = range(len(barriers)) if FULL else sorted(set().union(*reached))[::10]
    missed: Counter[str] = Counter()
    for i in chosen:
        place, where = places[i], barriers[i].end.where
        launches = [launch for launch, there in zip(LAUNCHES, reached, strict=True) if i in there]
        assert launches, f"no launch reaches {where}"
        instead = f"mov.pred {place[1]}, {place[2]};" if place[1] else ""
        library.ptx = clean[: place.start()] + instead + clean[place.end() :]
        for shapes, n, blocks, scale in launches:
            try:
                run(library, shapes, torch.float32, n, blocks=blocks, scale=scale)
            except AssertionError:  # a finding is one as well
                break
        else:
            missed[line_of(where)] += 1
    if FULL:
        assert missed == REDUNDANT
    else:
        assert missed <= Counter(REDUNDANT), missed


def run_backward(
    library: compilers.CudaLibrary, shapes: list[Shape], dtype: torch.dtype, *, blocks: int = 2,
    misaligned: bool = False, counters: dict | None = None,
) -> list[Tensor]:  # fmt: skip
    """The grouped backward of random matrices, compared with its formula."""
    torch.manual_seed(2)
    session = compilers.Session("sm_90")
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    orders = completed(shapes)
    layers = [(random(h, w), random(h, w), random(h) / h**0.5, random(w) / w**0.5) for h, w, _, _ in orders]
    lying = [
        [*(in_memory(x, *order) for x in layer[:2]), *layer[2:]]
        for layer, (_, _, *order) in zip(layers, orders, strict=True)
    ]
    sigma, grad_sigma = torch.rand(len(shapes), dtype=wide) + 0.5, torch.randn(len(shapes), dtype=wide)
    given = [[session.copy(x, misaligned) for x in layer] for layer in lying]

    def empty(shape, kind: torch.dtype) -> Tensor:
        tensor = session.allocate(torch.empty(shape, dtype=kind))
        session.register(tensor, written=False)
        return tensor

    results = [empty(layer[0].shape, dtype) for layer in lying]
    rows = np.array(
        [
            [*(t.data_ptr() for t in (*a, b)), *b.shape, channels]
            for a, b, (*_, channels) in zip(given, results, orders, strict=True)
        ],
        np.int64,
    )
    table, count = ctypes.c_void_p(rows.ctypes.data), ctypes.c_int64(len(shapes))
    # Vectors of the dtype, and doubles.
    workspace = empty([library.library.bwd_workspace_size(table, count) // dtype.itemsize], dtype)
    scalars = [session.copy(x) for x in (sigma, grad_sigma)]
    error = library.call(
        "spectral_norm_bwd", DTYPES.index(dtype), table, count, *(ctypes.c_void_p(x.data_ptr()) for x in scalars),
        ctypes.c_void_p(workspace.data_ptr()), memory=session.memory, multiprocessors=blocks, counters=counters,
    )  # fmt: skip
    assert error == 0
    for result in results:
        session.assert_written(result)
    results = [out_of_memory(result, channels) for result, (*_, channels) in zip(results, orders, strict=True)]
    for i, (result, layer) in enumerate(zip(results, layers, strict=True)):
        (exact,), (peer,) = (
            reference.spectral_norm_bwd(
                [layer[0].to(kind)], grad_sigma[i : i + 1].to(kind), [layer[1].to(kind)], sigma[i : i + 1].to(kind),
                [layer[2].to(kind)], [layer[3].to(kind)], [0],
            )
            for kind in (torch.float64, wide)
        )  # fmt: skip
        terms = (layer[0].double() * layer[1].double()).abs().sum() * layer[2].abs().max() * layer[3].abs().max()
        size = float(exact.abs().max()) + 4 * float(terms) * torch.finfo(wide).eps / torch.finfo(dtype).eps
        assert_as_accurate(result, peer.to(dtype), exact, roundings=4.0, scale=size)
    return results


# Two chunks, in whole packs and not, one of them in the last turn of either block; rows narrower than a pack.
BACKWARD_GROUP = [(3, 1370), (13, 3), (1, 40), (17, 256)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_spectral_norm_backward(library: compilers.CudaLibrary, dtype: torch.dtype) -> None:
    results = run_backward(library, BACKWARD_GROUP, dtype)
    assert all(map(torch.equal, run_backward(library, BACKWARD_GROUP, dtype, blocks=5), results))
    run_backward(library, BACKWARD_GROUP[1:], dtype, misaligned=True)
    results = run_backward(library, ORDERS, dtype)
    assert all(map(torch.equal, run_backward(library, ORDERS, dtype, blocks=5), results))
    run_backward(library, ORDERS, dtype, misaligned=True)


def test_spectral_norm_backward_is_one_launch_of_wide_accesses(library: compilers.CudaLibrary) -> None:
    counters: dict = {}
    h, w = 32, 512
    run_backward(library, [(h, w)] * 3, torch.float32, blocks=3, counters=counters)
    (count,) = counters.values()
    # dY twice and Y by loads of 16 bytes; v likewise, and u, once for each of these of dW. The sums of chunks.
    assert count.load_widths[16] == 3 * (3 + 1) * h * w * 4
    assert count.written_bytes == 3 * (h * w * 4 + 4 * 8)


def test_weights_are_read_where_they_lie_by_as_many_sectors(library: compilers.CudaLibrary) -> None:
    """Of one weight, by each order of its memory, against one that lies as its matrix; 16 bytes a load where it can be."""
    h, w = 32, 576
    size = h * w * 4
    read = {}
    for order in [(w, w), (w, 64), (9, w), (16, w), (1, w)]:
        forward: dict = {}
        backward: dict = {}
        run(library, [(h, w, *order)], torch.float32, 1, counters=forward)
        run_backward(library, [(h, w, *order)], torch.float32, counters=backward)
        (once,) = (c for name, c in forward.items() if "fwd_kernel" in name)
        (back,) = backward.values()
        read[order] = once.load_sectors * 32 / size, back.load_sectors * 32 / size
        # W for the products, again for the sums of columns, and for the scaling; runs of 9 numbers are read one by one.
        assert once.load_widths[16] >= (1 if order[0] == 9 else 3) * size
        assert back.load_widths[16] >= 3 * size
        assert once.written_bytes <= 1.3 * size
    plain = read.pop((w, w))
    runs_of_9 = read.pop((9, w))
    assert all(once <= 1.05 * plain[0] and back <= 1.1 * plain[1] for once, back in read.values()), (plain, read)
    # Each run of 36 bytes touches two sectors or three, which the next row of the same thread needs as well.
    assert runs_of_9[0] <= 1.6 * plain[0]
    assert runs_of_9[1] <= 1.1 * plain[1]


def test_barriers_of_the_backward_taken_out() -> None:
    library = load(90)
    clean = library.ptx
    (name,) = (n for n in library.names.values() if "spectral_norm_bwd_kernelIf" in n)
    start = clean.index(f".entry {name}(")
    end = clean.find(".entry", start + 1) % len(clean)
    places = list(compilers.BARRIER.finditer(clean, start, end))
    assert places
    for place in places:
        library.ptx = clean[: place.start()] + clean[place.end() :]
        with pytest.raises(AssertionError):  # a finding is one as well
            run_backward(library, [*BACKWARD_GROUP, (9, 45, 45, 5)], torch.float32)
    # Neither may blocks go on before all have come.
    library.ptx, count = re.subn(r"atom\.add\.release\.gpu", "atom.add.relaxed.gpu", clean)
    assert count
    with pytest.raises(Finding, match="race: reads what"):
        run_backward(library, BACKWARD_GROUP, torch.float32)


def test_the_cache_knows_what_nvcc_includes(tmp_path: Path) -> None:
    """A change of any file of csrc/ that the kernels are made of compiles them again."""
    unit = tmp_path / "unit.cu"
    unit.write_text(SPECTRAL_NORM)
    csrc = compilers.ROOT / "csrc"
    made = subprocess.run(
        [compilers.NVCC, "-std=c++17", f"-I{csrc}", f"-I{csrc / 'include'}", "-M", str(unit)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    included = {Path(p).resolve() for p in made.stdout.replace("\\\n", " ").split()[1:]}
    own = {p for p in included if csrc in p.parents}
    assert {csrc / "cuda" / f"{name}.cuh" for name in ("spectral_norm", "spectral_norm_backward")} <= own
    assert own <= set(compilers.included_by_nvcc())
