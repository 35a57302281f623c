"""Launch shapes as pure functions of sizes and element size.

Nothing here depends on the GPU at hand, so the same launch can be computed, compiled and checked anywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

Shape = tuple[int, int]

# Partial results of a reduction that one program combines per step.
PARTIALS_PER_STEP = 256

# Norms, or parts of them, that the program which sums them up takes per step.
SUMMANDS_PER_STEP = 1024

# Warps of the kernels that treat a matrix as one array.
FLAT_WARPS = 8


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def launch_options(num_warps: int, registers: int | None = None) -> dict[str, Any]:
    """Options of every launch. Fused multiply-adds stand in the kernels by name; the compiler adds none.

    Args:
        num_warps: of a program.
        registers: the most that a thread may have, where ptxas, left alone, would rather spill than use them.
    """
    options: dict[str, Any] = {"num_warps": num_warps, "enable_fp_fusion": False}
    # Triton's AMD backend does not know the option.
    if registers is not None and torch.version.hip is None:
        options["maxnreg"] = registers
    return options


@dataclass(frozen=True)
class Tile:
    """A tile of a matrix held in the registers of one program."""

    block_h: int
    block_w: int
    num_warps: int

    @property
    def blocks(self) -> dict[str, int]:
        """The tile as compile-time arguments of a kernel."""
        return {"BLOCK_H": self.block_h, "BLOCK_W": self.block_w}


def matrix_tile(shapes: Sequence[Shape], itemsize: int) -> Tile:
    """Tile of the kernels that walk over the rows of a group of matrices.

    A row segment of 1024 elements keeps all 8 warps side by side, so that a sum over the rows of a tile stays
    within a thread; narrower groups put the warps on top of each other. 8192 elements are 32 accumulators a
    thread. Groups below 4 million elements take half of that, to fill the GPU with programs first. So do half types:
    Triton 3.6 spills 508 bytes a thread of the large tile on sm_90, where two programs share a multiprocessor.
    """
    block_w = min(max(next_power_of_2(max((w for _, w in shapes), default=1)), 16), 1024)
    small = sum(h * w for h, w in shapes) < 1 << 22
    elements = 8192 if itemsize == 4 and not small else 4096
    tallest = next_power_of_2(max((h for h, _ in shapes), default=1))
    block_h = max(min(elements // block_w, tallest), 4)
    return Tile(block_h, block_w, num_warps=8 if block_h * block_w >= 4096 else 4)


def strided_tile(shapes: Sequence[Shape], itemsize: int) -> Shape:
    """Sides of the tile that the same launches take for matrices whose rows are not one piece of memory each.

    The memory of rows side by side is one piece, in each slab, so that a program takes as many as a sector of 32 bytes
    has numbers: 8 in float32. Of 4096 elements, the half of a large tile of other matrices, Triton 3.6 spills 180 bytes
    a thread on sm_90 in float32 and half types, and Triton 3.9 56 in float64.
    """
    tallest = next_power_of_2(max((h for h, _ in shapes), default=1))
    block_h = min(32 // itemsize, max(tallest, 4))
    widest = next_power_of_2(max((w for _, w in shapes), default=1))
    return block_h, min(max(widest, 16), 2048 // block_h)


def double_backward_tile(shapes: Sequence[Shape]) -> Tile:
    """Tile of the kernels that hold three matrices at once: 4096 elements, 16 a thread of each, in float64 as well."""
    return matrix_tile(shapes, itemsize=8)


def column_tile(shapes: Sequence[Shape]) -> Tile:
    """Tile of the kernel that sums partial rows: few columns a program, since its grid is one row of tiles.

    Every later program re-reads one value per column tile, which is why very wide matrices take wide tiles.
    """
    wide = max((w for _, w in shapes), default=1) > 1 << 14
    return Tile(block_h=16, block_w=512 if wide else 128, num_warps=8 if wide else 4)


def flat_block(itemsize: int) -> int:
    """Elements per step of the kernels that treat a matrix as one array: 16 KiB, four wide loads a thread."""
    return 16384 // itemsize


def elements_per_partial(numel: int, itemsize: int) -> int:
    """Elements that one program of a full reduction takes: at most 1024 partial results a matrix."""
    block = flat_block(itemsize)
    return block * max(ceil_div(numel, block * 1024), 1)


@dataclass(frozen=True)
class ProductTile:
    """A square tile of a matrix product, and the steps in which its operands are loaded."""

    block: int
    block_k: int
    num_warps: int

    @property
    def blocks(self) -> dict[str, int]:
        """The tile as compile-time arguments of a kernel."""
        return {"BLOCK": self.block, "BLOCK_K": self.block_k}

    @property
    def options(self) -> dict[str, Any]:
        # Two steps are in flight while a third one is computed.
        return {**launch_options(self.num_warps), "num_stages": 3}


def product_tile(m: int, n: int, batch: int, itemsize: int, symmetric: bool) -> ProductTile:
    """Tile of the matrix products with a result [batch, m, n]; if symmetric, of its lower triangle alone.

    A tile of side s reads 2 s numbers for s^2 multiplications, so large ones ask less of the caches. They need
    many programs, though: of [2048, 2048] the lower triangle is 136 tiles of 128, two rounds of the 132
    multiprocessors of an H100 of which the second is all but empty, but 528 tiles of 64, four full rounds.
    In float64 a tile of 128 does not fit the registers next to its mirror image.
    """
    side = ceil_div(m, 128)
    tiles = batch * (side * (side + 1) // 2 if symmetric else side * ceil_div(n, 128))
    largest = 64 if tiles < 256 or (symmetric and itemsize == 8) else 128
    block = min(max(next_power_of_2(max(m, n)), 16), largest)
    # 32 accumulators a thread, 64 in the largest tile.
    return ProductTile(block, block_k=16, num_warps=min(max(block * block // 1024, 1), 8))


def small_matrix_tile(n: int) -> Tile:
    """Tile of the kernels that keep a whole matrix [n, n] in the registers of a program, and its eigenvectors.

    A thread has 4 numbers of each in the smallest tile, and 16 in the largest: in float64 these are 64 registers, and a
    rotation takes as many again. With 8 numbers a thread, which then has 128 registers at most, more would be spilled.
    """
    block = max(next_power_of_2(n), 16)
    return Tile(block, block, num_warps=block // 8)


def flat_tile(h: int, w: int, itemsize: int) -> Tile:
    """Tile of the kernels that read and write each element of a matrix once: the elements of flat_block."""
    block_w = min(next_power_of_2(w), flat_block(itemsize))
    block_h = min(flat_block(itemsize) // block_w, next_power_of_2(h))
    return Tile(block_h, block_w, FLAT_WARPS)


def pointwise_tile(h: int, w: int, itemsize: int) -> Tile:
    """Tile of the kernels between two small matrix products: 8 numbers a thread, 4 in float64, for many programs."""
    elements = 4096 // itemsize
    block_w = min(next_power_of_2(w), 128)
    return Tile(min(elements // block_w, next_power_of_2(h)), block_w, num_warps=4)


def column_sums_tile(itemsize: int) -> Tile:
    """Tile of the kernel that sums the columns of matrices with hundreds of rows, a row of tiles a program."""
    return Tile(block_h=256 // itemsize, block_w=32, num_warps=4)


def longest_row(itemsize: int) -> int:
    """Elements of the longest row whose norm one program takes: it stays in registers, 64 KiB of them."""
    return 65536 // max(itemsize, 4)


def _warps(elements: int, itemsize: int) -> int:
    """Warps for a tile kept in registers: 16 of them a thread, and 32 in the largest tiles, for 512 threads at most."""
    return min(max(elements * max(itemsize, 4) // 2048, 1), 16)


def row_tile(h: int, w: int, itemsize: int) -> Tile:
    """Tile of whole rows that one program takes the norms of: several of them where they are short."""
    block_w = next_power_of_2(w)
    block_h = min(max(2048 // block_w, 1), next_power_of_2(h))
    return Tile(block_h, block_w, _warps(block_h * block_w, itemsize))


def norm_column_tile(h: int, w: int, itemsize: int) -> Tile:
    """Tile of columns that one program takes the norms of.

    Columns lie side by side over the threads, so a wide tile sums within a thread. It gets narrower, down to 64, to
    hold whole columns; longer ones are walked down.
    """
    elements = 16384 // max(itemsize, 4)
    block_w = min(max(elements // next_power_of_2(h), 64), next_power_of_2(w), 1024)
    block_h = min(elements // block_w, next_power_of_2(h))
    return Tile(block_h, block_w, _warps(block_h * block_w, itemsize))


def partials_tile(w: int) -> Shape:
    """Norms a step, and parts of each, that the last program of a launch sums up: 4 numbers a thread, or 8, of 256.

    It takes few registers, since all programs of the launch get as many as the last one. It depends on w only: lanes
    without work cost less than a compilation.
    """
    block_w = min(next_power_of_2(w), SUMMANDS_PER_STEP)
    return SUMMANDS_PER_STEP // block_w, block_w


# Neighbours that one pass over all pairs finds: a program keeps them in registers.
NEIGHBOUR_SLOTS = 16


@dataclass(frozen=True)
class DistanceTile:
    """Points of two sets whose distances one program holds at a time, and the features it takes a step."""

    block_m: int
    block_n: int
    chunk: int
    num_warps: int

    @property
    def blocks(self) -> dict[str, int]:
        """The tile as compile-time arguments of a kernel."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "CHUNK": self.chunk}

    @property
    def options(self) -> dict[str, Any]:
        # The ptxas of Triton 3.6 spills at 80 and 96 registers on sm_90 unless it is told that it may take more.
        return launch_options(self.num_warps, registers=128)


def distance_tile() -> DistanceTile:
    """Tile of the kernels that walk over the distances of all pairs of points.

    The compiler gives a thread whole columns, and so the features of all points of x: 4 points and 4 features, next to
    8 float64 sums, is what fits the registers of every target. A program then reads all of y for 4 points, mostly from
    the caches. The tile depends on nothing, because the order of a sum hangs on the chunk.
    """
    return DistanceTile(block_m=4, block_n=256, chunk=4, num_warps=4)


# Pairs of a row whose D the row's program computes; where more are undecided, the row is left to the exact kernel.
NEIGHBOUR_PAIRS = 64

# Neighbours that bounds are asked for: the rest of NEIGHBOUR_PAIRS is for points as near as those, up to the bound.
NEIGHBOURS_BY_BOUNDS = 32

# Bytes of the bounds that are held at a time, unless one row of tiles takes more.
BOUNDS_WORKSPACE = 1 << 26

# Bounds of a row that its program looks at in a step, and the candidates for the k-th smallest of them.
BOUNDS_PER_STEP = 1024

# Features of a point that are moved, scaled and rounded in a step.
FEATURES_PER_STEP = 512


def bounds_serve(m: int, n: int, d: int) -> bool:
    """Whether bounds on the distances pay.

    They take nine launches or more, where the exact kernel takes one: some 50 us, in which it does 64 million pairs and
    features at a tenth of an H100's peak. The slack of the bounds, about d 2^-24, has to stay small, and
    offsets within a tile of bounds are 32-bit.
    """
    return m * n * d >= 1 << 26 and d <= 1 << 20 and n <= 1 << 24


@dataclass(frozen=True)
class BoundsPlan:
    """How the bounds on all distances are computed: `rows` of x at a time, each with `width` bounds."""

    tile: ProductTile
    rows: int
    width: int


def bounds_plan(m: int, n: int) -> BoundsPlan:
    """Whole tiles of the product, as many rows of them as the workspace holds."""
    tile = product_tile(m, n, 1, itemsize=4, symmetric=False)
    width = ceil_div(n, tile.block) * tile.block
    tiles = max(BOUNDS_WORKSPACE // (4 * width * tile.block), 1)
    return BoundsPlan(tile, min(tiles, ceil_div(m, tile.block)) * tile.block, width)
