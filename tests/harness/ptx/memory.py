"""Memory of a launch, with a shadow per granule: is it written, by whom last, read by whom, and when.

Time has two hands. The epoch of a block is the number of barriers that the whole block has passed; the epoch of a warp
the number of its bar.warp.sync. An access by thread a comes before one by thread b of the same block if the epoch of
the block has changed in between, or if they share a warp and its epoch has changed. Accesses of two blocks are ordered
only by a release and an acquire (grid barriers): `seen[b, a]` is the epoch of block a below which all that a did comes
before what b does.

A granule is the smallest element that a region is accessed by; threads that touch different granules do not meet.
"""

import ctypes
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

NONE, SEVERAL = -1, -2


class Finding(AssertionError):
    """A fault of a kernel, with what is known of its place."""

    def __init__(self, kind: str, message: str, place: str = "") -> None:
        super().__init__(f"{kind}: {message}{place}")
        self.kind = kind


class Lanes(NamedTuple):
    """Who accesses, element by element: flat arrays of one length."""

    thread: np.ndarray  # int32, global: block * padded threads + thread
    warp: np.ndarray
    block: np.ndarray
    epoch: np.ndarray  # of the block
    warp_epoch: np.ndarray


@dataclass
class Bad:
    """The first element of an access for which something is wrong."""

    kind: str
    element: int
    message: str


class Region:
    """Bytes from `base` on, and their shadow.

    Args:
        base: address of the first byte.
        data: uint8 [size]; for global memory it is the memory of the host itself.
        granule: bytes; a power of two.
        written: whether the contents count as written.
        rows: blocks of a cooperative grid, whose reads are kept apart; otherwise 1.
    """

    def __init__(self, name: str, base: int, data: np.ndarray, granule: int, written: bool) -> None:
        self.name, self.base, self.data, self.size = name, base, data, data.size
        self.start, self.end = base, base + data.size  # what may be accessed
        self.shift = granule.bit_length() - 1
        self.count = -(-self.size // granule)
        self.written = np.full(self.count, written)
        self.valid: np.ndarray | None = None  # bool [count]: granules that belong to a variable
        self.views: dict[int, np.ndarray] = {}
        self.launch = -1

    def view(self, width: int) -> np.ndarray:
        """The bytes as rows of `width` bytes (a part of a row at the end is left out)."""
        if width not in self.views:
            rows = self.size // width
            self.views[width] = self.data[: rows * width].view(f"u{min(width, 8)}").reshape(rows, -1)
        return self.views[width]

    def begin(self, launch: int, rows: int) -> None:
        """Forget accesses of earlier launches."""
        if self.launch == launch:
            return
        self.launch, self.rows = launch, rows
        n = self.count
        self.w_thread = np.full(n, NONE, np.int32)
        self.w_warp, self.w_block, self.w_epoch, self.w_warp_epoch = (np.zeros(n, np.int32) for _ in range(4))
        self.w_atomic = np.zeros(n, bool)
        self.r_thread = np.full((rows, n), NONE, np.int32)
        self.r_warp, self.r_block, self.r_epoch, self.r_warp_epoch = (np.zeros((rows, n), np.int32) for _ in range(4))
        self.pending = np.zeros(n, bool)  # an asynchronous copy is on its way
        self.any_pending = False
        self.stale_for_async = np.zeros(n, bool)  # written by the generic proxy since the last proxy fence

    def granules(self, offset: np.ndarray, width: int) -> tuple[np.ndarray, int]:
        """Indices [elements * per element] of the granules of accesses of `width` bytes at offsets."""
        per = max(width >> self.shift, 1)
        first = offset >> self.shift
        if per == 1:
            return first, 1
        return (first[:, None] + np.arange(per)).reshape(-1), per

    def _ordered_before(self, who: Lanes, thread, warp, block, epoch, warp_epoch, seen) -> np.ndarray:
        same_block = block == who.block
        ordered = (thread == who.thread) | (same_block & (epoch < who.epoch))
        ordered |= (warp == who.warp) & (warp_epoch < who.warp_epoch)
        if seen is not None:
            ordered |= ~same_block & (epoch < seen[who.block, block])
        return ordered

    def _who(self, thread: int, threads: int) -> str:
        return f"thread {thread % threads} of block {thread // threads}"

    def read(self, index: np.ndarray, who: Lanes, seen: np.ndarray | None, threads: int) -> Bad | None:
        """Record reads of granules; what is wrong with the first bad one."""
        written = self.written[index]
        if not written.all():
            return Bad("uninitialized", int(np.argmin(written)), "reads memory that nobody wrote")
        if self.any_pending and self.pending[index].any():
            at = int(np.argmax(self.pending[index]))
            return Bad("race", at, "reads what an asynchronous copy has not been waited for")
        w = self.w_thread[index]
        if (w != NONE).any():
            conflict = (w != NONE) & ~self._ordered_before(
                who, w, self.w_warp[index], self.w_block[index], self.w_epoch[index], self.w_warp_epoch[index], seen
            )
            if conflict.any():
                at = int(np.argmax(conflict))
                return Bad("race", at, f"reads what {self._who(w[at], threads)} writes, with no barrier between")
        row = who.block if self.rows > 1 else 0
        r = self.r_thread[row, index]
        fresh = r == NONE
        warp, thread, block = who.warp, who.thread, who.block
        if not fresh.all():
            r_warp, r_block = self.r_warp[row, index], self.r_block[row, index]
            earlier = (r_block == block) & (self.r_epoch[row, index] < who.epoch)
            earlier |= (r_warp == warp) & (self.r_warp_epoch[row, index] < who.warp_epoch)
            fresh |= earlier
            thread = np.where(fresh | (r == thread), thread, SEVERAL)
            warp = np.where(fresh | (r_warp == warp), warp, SEVERAL)
            block = np.where(fresh | (r_block == block), block, SEVERAL)
        self._put_readers(row, index, thread, warp, block, who)
        return None

    def _put_readers(self, row, index, thread, warp, block, who: Lanes) -> None:
        self.r_thread[row, index], self.r_warp[row, index], self.r_block[row, index] = thread, warp, block
        self.r_epoch[row, index], self.r_warp_epoch[row, index] = who.epoch, who.warp_epoch
        # Several lanes of this very access may read one granule; the last one is kept, the others have to be joined.
        for field, mine in ((self.r_thread, thread), (self.r_warp, warp), (self.r_block, block)):
            lost = field[row, index] != mine
            if lost.any():
                field[row[lost] if isinstance(row, np.ndarray) else row, index[lost]] = SEVERAL

    def write(
        self, index: np.ndarray, who: Lanes, seen: np.ndarray | None, threads: int, atomic: bool = False
    ) -> Bad | None:
        """Record writes of granules; what is wrong with the first bad one. Two atomic ones need no order."""
        if self.any_pending and self.pending[index].any():
            at = int(np.argmax(self.pending[index]))
            return Bad("race", at, "writes where an asynchronous copy has not been waited for")
        w = self.w_thread[index]
        if (w != NONE).any():
            conflict = (w != NONE) & ~self._ordered_before(
                who, w, self.w_warp[index], self.w_block[index], self.w_epoch[index], self.w_warp_epoch[index], seen
            )
            if atomic:
                conflict &= ~self.w_atomic[index]
            if conflict.any():
                at = int(np.argmax(conflict))
                return Bad("race", at, f"writes what {self._who(w[at], threads)} writes, with no barrier between")
        for row in range(self.rows):
            r = self.r_thread[row, index]
            known = r != NONE
            if not known.any():
                continue
            conflict = known & ~self._ordered_before(
                who, r, self.r_warp[row, index], self.r_block[row, index], self.r_epoch[row, index],
                self.r_warp_epoch[row, index], seen,
            )  # fmt: skip
            if conflict.any():
                at = int(np.argmax(conflict))
                reader = "several threads read" if r[at] < 0 else f"{self._who(r[at], threads)} reads"
                return Bad("race", at, f"writes what {reader}, with no barrier between")
        self.w_thread[index], self.w_warp[index], self.w_block[index] = who.thread, who.warp, who.block
        self.w_epoch[index], self.w_warp_epoch[index] = who.epoch, who.warp_epoch
        self.w_atomic[index] = atomic
        self.written[index] = True
        self.r_thread[:, index] = NONE  # all of them come before this write
        self.stale_for_async[index] = True
        if not atomic:
            # The threads of a block may all store one value, as a compiler makes them; blocks know nothing of each other.
            other = self.w_block[index] != who.block
            if other.any():
                at = int(np.argmax(other))
                return Bad("race", at, f"writes what {self._who(self.w_thread[index[at]], threads)} writes at once")
        return None


class GlobalMemory:
    """Regions of the host's memory that kernels may touch, found by address."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self._keep: list[object] = []

    def add(self, name: str, array: np.ndarray, granule: int, written: bool, keep: object = None) -> Region:
        """Register an array of bytes (uint8, contiguous) at its own address."""
        return self.add_at(name, array.ctypes.data, array.size, granule, written, (array, keep))

    def add_at(self, name: str, address: int, size: int, granule: int, written: bool, keep: object = None) -> Region:
        """Register bytes of the host's memory. Rows of 16 bytes start at multiples of 16, as accesses do."""
        lead = address % 16
        data = np.ctypeslib.as_array((ctypes.c_uint8 * (size + lead)).from_address(address - lead))
        region = Region(name, address - lead, data, granule, written)
        region.start, region.end = address, address + size
        self._keep.append((data, keep))
        if size:
            self.regions.append(region)
            self._index()
        return region

    def add_private(self, name: str, address: int, size: int) -> Region:
        """Zeros at an address that is none of the host's."""
        region = Region(name, address, np.zeros(size, np.uint8), 4, True)
        self.regions.append(region)
        self._index()
        return region

    def _index(self) -> None:
        self.regions.sort(key=lambda r: r.start)
        self.bases = np.array([r.start for r in self.regions], np.uint64)
        self.ends = np.array([r.end for r in self.regions], np.uint64)

    def find(self, address: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """(index of the region of each address, whether the access lies within it)."""
        if not self.regions:
            return np.zeros(address.shape, np.int64), np.zeros(address.shape, bool)
        place = np.searchsorted(self.bases, address, side="right") - 1
        clipped = np.maximum(place, 0)
        inside = (place >= 0) & (address + np.uint64(width) <= self.ends[clipped])
        return clipped, inside
