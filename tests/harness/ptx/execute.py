"""A launch of a kernel: blocks of threads, side by side in NumPy arrays.

Threads that stand at the same instruction run together; after a branch that divides them, those at the lowest address
go first, so that they meet again where control flow joins. A barrier holds the threads of a block until all of them
stand at it. Blocks of a plain launch run a few at a time; those of a cooperative one, and those that atomic operations
put in order, all together.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import instructions
from .arithmetic import S32, S64, U32, U64
from .memory import Finding, GlobalMemory, Lanes, Region
from .parse import Instruction, Kernel, Register, Unsupported, Vector

GAP = 64  # bytes between shared variables, so that one past the end is no part of the next
WORKSPACE = 0x10000  # of grid barriers, at an address of its own


@dataclass
class Block:
    """Instructions up to a label, a branch or a barrier."""

    runs: list[tuple[Any, Instruction]] = field(default_factory=list)
    end: Instruction | None = None  # what is done last: a branch, a barrier, ret, trap
    target: int = -1  # of a branch
    guard: Any = None
    value: Any = None  # of bar.red
    executed: bool = False  # by any launch
    write: Any = None


class Program:
    """A kernel whose instructions are compiled."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        c = instructions.Compiler(kernel)
        self.compiler = c
        self.static_bytes, self.variables = 0, []
        self.unfenced: set[int] = set()
        for name, align, size in kernel.shared:
            start = self.static_bytes + -self.static_bytes % max(align, 16)
            c.shared[name] = start
            self.variables.append((start, size))
            self.static_bytes = start + size + GAP
        self.static_bytes += -self.static_bytes % 1024
        if kernel.dynamic_shared is not None:
            c.shared[kernel.dynamic_shared] = self.static_bytes
        starts = {0, *kernel.labels.values()}
        for i, ins in enumerate(kernel.body):
            if ins.parts[0] in ("bra", "ret", "exit", "trap") or self._is_barrier(ins):
                starts.add(i + 1)
        order = sorted(starts)
        place = {start: number for number, start in enumerate(order)}
        self.blocks: list[Block] = []
        for start, stop in zip(order, [*order[1:], len(kernel.body)], strict=True):
            block = Block()
            for ins in kernel.body[start:stop]:
                name = ins.parts[0]
                if name in ("bra", "ret", "exit", "trap") or self._is_barrier(ins):
                    block.end = ins
                    if ins.predicate is not None:
                        block.guard = c.reader(ins.predicate, np.bool_)
                    if name == "bra":
                        block.target = place[kernel.labels[ins.operands[-1].name]]
                    elif ins.opcode.startswith("bar.red"):
                        if ins.opcode != "bar.red.or.pred":
                            raise Unsupported(f"Unsupported instruction: {ins.text}")
                        block.write = c.writer(ins.operands[0], np.bool_)
                        block.value = c.reader(ins.operands[-1], np.bool_)
                else:
                    block.runs.append((c.compile(ins), ins))
            self._check_fences([ins for _, ins in block.runs])
            self.blocks.append(block)
        # Whether blocks are put in order by what they add.
        self.is_ordered = any(ins.parts[0] == "atom" and {"release", "acq_rel"} & set(ins.parts) for ins in kernel.body)

    def _check_fences(self, body: list[Instruction]) -> None:
        """Remember the wgmma for which no wgmma.fence orders what was written to its registers.

        Such a fence stands in the same basic block, as the compilers put it; only wgmma itself may write the registers
        of its sum in between.
        """
        written: set[str] | None = None  # since the fence; None before any
        for ins in body:
            if ins.opcode.startswith("wgmma.fence"):
                written = set()
            elif ins.opcode.startswith("wgmma.mma_async"):
                vectors = [o for o in ins.operands[:2] if isinstance(o, Vector)]
                uses = {o.name for v in vectors for o in v.items}
                if written is None or uses & written:
                    self.unfenced.add(id(ins))
            elif written is not None and ins.operands:
                target = ins.operands[0]
                targets = target.items if isinstance(target, Vector) else (target,)
                written |= {o.name for o in targets if isinstance(o, Register)}

    @staticmethod
    def _is_barrier(ins: Instruction) -> bool:
        if ins.opcode in ("bar.sync", "barrier.sync", "bar.red.or.pred"):
            barrier = ins.operands[1 if ins.opcode.startswith("bar.red") else 0]
            if getattr(barrier, "value", None) is None or (ins.opcode != "bar.red.or.pred" and len(ins.operands) > 1):
                raise Unsupported(f"Unsupported instruction: {ins.text} (a barrier of a part of a block)")
            return True
        return False


@dataclass
class Counters:
    """What a launch did, counted in the requests of warps."""

    read_bytes: int = 0
    written_bytes: int = 0
    load_requests: int = 0
    load_sectors: int = 0  # of 32 bytes
    store_requests: int = 0
    store_sectors: int = 0
    load_widths: Counter = field(default_factory=Counter)  # bytes of a thread -> bytes loaded so
    shared_requests: int = 0
    shared_wavefronts: int = 0  # passes that the requests took
    shared_ideal: int = 0  # passes that their bytes take at least
    pipes: Counter = field(default_factory=Counter)  # instructions of warps


_PIPES = {
    "ld": "memory", "st": "memory", "atom": "memory", "red": "memory", "cp": "memory", "ldmatrix": "memory",
    "stmatrix": "memory",
    "shfl": "shuffle", "redux": "shuffle", "mma": "tensor", "wgmma": "tensor", "bra": "control", "ret": "control",
    "bar": "control", "barrier": "control", "trap": "control", "exit": "control", "fence": "control",
    "rcp": "special", "sqrt": "special", "div": "special", "cvt": "convert",
}  # fmt: skip


def pipe_of(ins: Instruction) -> str:
    """The unit that an instruction mostly keeps busy; div, sqrt and rcp are sequences of instructions on a device."""
    name = ins.parts[0]
    if name in _PIPES:
        return _PIPES[name]
    return {"f32": "fp32", "f64": "fp64"}.get(ins.parts[-1], "integer")


class Launch:
    """Settings and state that all blocks of a launch share."""

    def __init__(
        self, program: Program, memory: GlobalMemory, parameters: bytes, grid: tuple[int, int, int], threads: int,
        shared_bytes: int, cooperative: bool, shared_limit: int, budget: int, approximation: int, descending: bool,
        counters: Counters | None,
    ) -> None:  # fmt: skip
        self.program, self.memory, self.descending = program, memory, descending
        self.is_ordered = cooperative or program.is_ordered
        self.parameters = np.frombuffer(bytes(parameters).ljust(program.compiler.parameter_bytes, b"\0"), np.uint8)
        if len(parameters) != program.compiler.parameter_bytes:
            raise ValueError(f"{len(parameters)} bytes of parameters for {program.compiler.parameter_bytes}")
        self.grid, self.threads, self.shared_bytes = grid, threads, shared_bytes
        self.blocks = grid[0] * grid[1] * grid[2]
        self.padded = threads + -threads % 32
        self.approximation, self.budget, self.counters = approximation, budget, counters
        static = sum(size for _, size in program.variables)
        if static + shared_bytes > shared_limit:
            raise Finding(
                "shared memory",
                f"{program.kernel.name} uses {static + shared_bytes} bytes, the limit is {shared_limit}",
            )
        if program.kernel.threads not in (None, threads):
            raise Finding(
                "launch", f"{program.kernel.name} is made for {program.kernel.threads} threads, got {threads}"
            )


class NotYetError(Exception):
    """Some threads that a warp-wide instruction names have yet to reach it."""

    def __init__(self, warps: np.ndarray) -> None:
        super().__init__()
        self.warps = warps  # bool [threads]: all threads of the warps that wait


_launches = 0


def launch(
    program: Program, memory: GlobalMemory, parameters: bytes, grid: tuple[int, int, int], threads: int, *,
    shared_bytes: int = 0, cooperative: bool = False, shared_limit: int = 48 << 10, budget: int = 400_000,
    approximation: int = 0, descending: bool = False, lanes: int = 4096, counters: Counters | None = None,
) -> None:  # fmt: skip
    """Run a launch, or raise the first Finding.

    Args:
        program: the kernel.
        memory: the regions that it may touch.
        parameters: its arguments, laid out as .param declares them.
        grid: blocks along x, y, z.
        threads: of a block, along x.
        shared_bytes: of dynamic shared memory.
        cooperative: whether blocks may wait for each other.
        shared_limit: bytes of shared memory that a block may use.
        budget: instructions of any group of threads, summed over the launch, before it counts as endless.
        approximation: -1, 0 or 1: approximate functions are as much too small as the ISA allows, exact, or too large.
        descending: threads that stand at an atomic operation do it from the last one to the first.
        lanes: threads that are run side by side.
        counters: what is done is added to these.
    """
    global _launches
    _launches += 1
    state = Launch(program, memory, parameters, grid, threads, shared_bytes, cooperative, shared_limit, budget,
                   approximation, descending, counters)  # fmt: skip
    state.number = _launches
    side_by_side = state.blocks if state.is_ordered else max(lanes // state.padded, 1)
    with np.errstate(all="ignore"):
        for first in range(0, state.blocks, side_by_side):
            Execution(state, first, min(side_by_side, state.blocks - first)).run()


class Execution:
    """Some blocks of a launch."""

    def __init__(self, state: Launch, first: int, blocks: int) -> None:
        self.state, self.program = state, state.program
        self.blocks, self.block_threads = blocks, state.padded
        self.threads = blocks * state.padded
        self.approximation = state.approximation
        thread = np.arange(self.threads, dtype=S32)
        self.tid = thread % state.padded
        self.lane = thread % 32
        self.first_of_warp = thread - self.lane
        self.local_block = thread // state.padded
        self.block = self.local_block + S32(first)
        self.global_thread = thread + S32(first * state.padded)
        self.warp = self.global_thread // 32
        self.epoch = np.zeros(self.threads, S32)
        self.warp_epoch = np.zeros(self.threads, S32)
        self.live = self.tid < state.threads
        self.everyone = None if self.live.all() else self.live
        self.exited = ~self.live
        self.seen = np.zeros((blocks, blocks), S32) if state.is_ordered else None
        self.acquired = np.zeros((blocks, blocks), S32) if state.is_ordered else None
        self.released: dict[tuple[int, int], np.ndarray] = {}
        self.registers: list[Any] = [None] * len(self.program.compiler.types)
        self.at: Instruction | None = None
        self.specials: dict[str, np.ndarray] = {}
        self.cache: dict[int, Region] = {}
        self.spun = False
        self.others_run = False  # whether other threads may still reach an instruction
        self.stride = self.program.static_bytes + state.shared_bytes
        self.stride += -self.stride % 1024 + 1024
        if state.shared_bytes or self.program.variables:
            self.shared = Region(
                "shared memory", 0, np.full(blocks * self.stride, 0xFF, np.uint8),
                min(self.program.compiler.widths), False,
            )  # fmt: skip
            self.shared.valid = np.zeros((blocks, self.stride), bool)
            for start, size in self.program.variables:
                self.shared.valid[:, start : start + size] = True
            self.shared.valid[:, self.program.static_bytes : self.program.static_bytes + state.shared_bytes] = True
            self.shared.valid = self.shared.valid.reshape(-1)
            self.shared.begin(state.number, 1)
            self.being_read: list[list[np.ndarray]] = []
        else:
            self.shared = None
        # Asynchronous copies: (lanes, group of each, granules, bytes [n, width], offsets), and the group of each lane.
        self.copies: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        self.copy_group = np.zeros(self.threads, S32)
        # Asynchronous products: results by register, of the open group and of those committed; and what they read.
        self.open_product: dict[int, np.ndarray] = {}
        self.products: list[dict[int, np.ndarray]] = []

    # Registers and masks

    def get(self, i: int) -> np.ndarray:
        value = self.registers[i]
        if value is None:
            # An undefined value: the compiler may use one where its result does not matter.
            kind = self.program.compiler.types[i]
            value = np.full(1, True if kind is np.bool_ else 0x7FF7, kind)
        return value

    def put(self, i: int, value: np.ndarray, m: np.ndarray | None) -> None:
        if m is None:
            self.registers[i] = value
        else:
            old = self.registers[i]
            self.registers[i] = np.where(m, value, value.dtype.type(0) if old is None else old)

    def wide(self, value: np.ndarray) -> np.ndarray:
        return value if value.shape[0] == self.threads else np.broadcast_to(value, self.threads)

    def narrowed(self, m: np.ndarray | None, p: np.ndarray) -> np.ndarray | None:
        if p.shape[0] == 1:
            return m if p[0] else np.zeros(self.threads, bool)
        if m is None:
            return None if p.all() else p
        return m & p

    def spread(self, lanes: np.ndarray | None, values: np.ndarray) -> np.ndarray:
        """Values of some lanes as a register."""
        if lanes is None:
            return np.ascontiguousarray(values)
        out = np.zeros(self.threads, values.dtype)
        out[lanes] = values
        return out

    def special(self, name: str) -> np.ndarray:
        if name not in self.specials:
            x, y, _ = self.state.grid
            block = self.block.astype(U32)
            workspace = WORKSPACE
            self.specials[name] = {
                "%tid.x": lambda: self.tid.astype(U32), "%tid.y": lambda: np.zeros(1, U32),
                "%tid.z": lambda: np.zeros(1, U32), "%ntid.x": lambda: np.array([self.state.threads], U32),
                "%ntid.y": lambda: np.ones(1, U32), "%ntid.z": lambda: np.ones(1, U32),
                "%ctaid.x": lambda: block % U32(x), "%ctaid.y": lambda: block // U32(x) % U32(y),
                "%ctaid.z": lambda: block // U32(x * y), "%laneid": lambda: self.lane.astype(U32),
                "%nctaid.x": lambda: np.array([x], U32), "%nctaid.y": lambda: np.array([y], U32),
                "%nctaid.z": lambda: np.array([self.state.grid[2]], U32),
                # The address of the workspace of grid barriers, in two halves.
                "%envreg1": lambda: np.array([workspace >> 32], U32),
                "%envreg2": lambda: np.array([workspace & 0xFFFFFFFF], U32),
            }[name]()  # fmt: skip
        return self.specials[name]

    def parameter(self, address: np.ndarray, width: int) -> np.ndarray:
        at = address.astype(S64)
        if (at < 0).any() or (at + width > len(self.state.parameters)).any() or (at % width).any():
            self.fail("out of bounds", "reads outside of the parameters, or misaligned", 0)
        return self.state.parameters[at[:, None] + np.arange(width)]

    def fail(self, kind: str, message: str, lane: int) -> None:
        place = (
            f"\n  kernel {self.program.kernel.name}\n  instruction {self.at.text if self.at else '?'}"
            f"\n  source {self.at.where if self.at else '?'}"
            f"\n  block {int(self.block[lane])}, thread {int(self.tid[lane])}"
        )
        raise Finding(kind, message, place)

    # Memory

    def who(self, lanes: np.ndarray | None, per: int) -> Lanes:
        fields = (self.global_thread, self.warp, self.block, self.epoch, self.warp_epoch)
        if lanes is not None:
            fields = tuple(f[lanes] for f in fields)
        if per > 1:
            fields = tuple(np.repeat(f, per) for f in fields)
        return Lanes(*fields)

    def _access(self, space: str, address: np.ndarray, m: np.ndarray | None, width: int):
        """Checks bounds and alignment; yields (region, lanes or None for all, offsets) for each region touched."""
        lanes = None if m is None else np.flatnonzero(m)
        a = self.wide(address)
        if lanes is not None:
            a = a[lanes]
        if len(a) == 0:
            return
        odd = (a & a.dtype.type(width - 1)) != 0
        if odd.any():
            at = int(np.argmax(odd))
            self.fail(
                "misaligned", f"an access of {width} bytes at {space} address {int(a[at]):#x}",
                at if lanes is None else int(lanes[at]),
            )  # fmt: skip
        if space == "shared":
            if self.shared is None:
                self.fail("out of bounds", "shared memory, of which none is declared", 0)
            block = self.local_block if lanes is None else self.local_block[lanes]
            inside = a.astype(S64) + width <= self.stride
            offset = block.astype(S64) * self.stride + np.where(inside, a, 0)
            inside &= self.shared.valid[offset] & self.shared.valid[offset + (width - 1)]
            if not inside.all():
                at = int(np.argmin(inside))
                self.fail(
                    "out of bounds", f"{width} bytes at shared address {int(a[at])}, which belongs to no variable",
                    at if lanes is None else int(lanes[at]),
                )  # fmt: skip
            yield self.shared, lanes, offset
            return
        key = id(self.at)
        region = self.cache.get(key)
        low, high = int(a.min()), int(a.max()) + width
        if region is None or low < region.start or high > region.base + region.size:
            place, inside = self.state.memory.find(a, width)
            if not inside.all():
                at = int(np.argmin(inside))
                self._out_of_bounds(int(a[at]), width, at if lanes is None else int(lanes[at]))
            numbers = np.unique(place)
            if len(numbers) > 1:
                for number in numbers:
                    which = np.flatnonzero(place == number)
                    part = self.state.memory.regions[number]
                    part.begin(self.state.number, self.state.blocks if self.state.is_ordered else 1)
                    here = which if lanes is None else lanes[which]
                    yield part, here, (a[which] - U64(part.base)).astype(S64)
                return
            region = self.cache[key] = self.state.memory.regions[numbers[0]]
            region.begin(self.state.number, self.state.blocks if self.state.is_ordered else 1)
        yield region, lanes, (a - U64(region.base)).astype(S64)

    def _out_of_bounds(self, address: int, width: int, lane: int) -> None:
        near = min(
            self.state.memory.regions,
            key=lambda r: min(abs(address - r.start), abs(address - r.base - r.size)), default=None,
        )  # fmt: skip
        hint = ""
        if near is not None:
            hint = f", {address - near.start} bytes from the start of {near.name}, which has {near.end - near.start}"
        self.fail("out of bounds", f"{width} bytes at global address {address:#x}{hint}", lane)

    def _report(self, bad, lanes: np.ndarray | None, per: int, region: Region) -> None:
        at = bad.element // per
        self.fail(bad.kind, f"{bad.message} ({region.name})", at if lanes is None else int(lanes[at]))

    def load(self, space: str, address: np.ndarray, m: np.ndarray | None, width: int, acquire: bool = False,
             how: str = "") -> tuple[np.ndarray | None, np.ndarray]:  # fmt: skip
        """(lanes or None, bytes as rows of words [lanes, ...])."""
        out = None
        everyone = None if m is None else np.flatnonzero(m)
        if acquire and self.seen is not None:
            self._acquire(address, m)
        for region, lanes, offset in self._access(space, address, m, width):
            if not acquire:
                index, per = region.granules(offset, width)
                bad = region.read(index, self.who(lanes, per), self.seen, self.state.padded)
                if bad:
                    self._report(bad, lanes, per, region)
            rows = region.view(width)[offset // width]
            if lanes is everyone or (lanes is not None and everyone is not None and len(lanes) == len(everyone)):
                out = rows
            else:
                if out is None:
                    out = np.zeros((self.threads, rows.shape[1]), rows.dtype)
                out[lanes] = rows
        if out is None:
            out = np.zeros((0, max(width // 8, 1)), f"u{min(width, 8)}")
        elif everyone is not None and len(out) != len(everyone):
            out = out[everyone]
        if self.state.counters is not None:
            self._count(space, address, m, width, False, how)
        return everyone, out

    def store(self, space: str, address: np.ndarray, m: np.ndarray | None, width: int, values: list[np.ndarray],
              how: str = "") -> None:  # fmt: skip
        columns = [self.wide(v) for v in values]
        rows = np.stack(columns, axis=1) if len(columns) > 1 else np.ascontiguousarray(columns[0])[:, None]
        rows = np.ascontiguousarray(rows).view(f"u{min(width, 8)}").reshape(self.threads, -1)
        for region, lanes, offset in self._access(space, address, m, width):
            mine = rows if lanes is None else rows[lanes]
            index, per = region.granules(offset, width)
            if region is self.shared and self.being_read:
                self._check_products(index, lanes, per)
            bad = region.write(index, self.who(lanes, per), self.seen, self.state.padded)
            if bad:
                self._report(bad, lanes, per, region)
            view = region.view(width)
            at = offset // width
            view[at] = mine
            differs = (view[at] != mine).any(axis=1)
            if differs.any():
                where = int(np.argmax(differs))
                lane = where if lanes is None else int(lanes[where])
                self.fail("race", f"two threads write different values to one place ({region.name})", lane)
        if self.state.counters is not None:
            self._count(space, address, m, width, True, how)

    def atomic(self, address: np.ndarray, m: np.ndarray | None, value: np.ndarray, function: Any, *,
               release: bool = False, acquire: bool = False) -> np.ndarray:  # fmt: skip
        """word = function(word, value), one thread after the other; what was there before."""
        out = np.zeros(self.threads, U32)
        value = self.wide(value)
        for region, lanes, offset in self._access("global", address, m, 4):
            chosen = np.arange(self.threads) if lanes is None else lanes
            if self.state.descending:
                chosen, offset = chosen[::-1], offset[::-1]
            index, per = region.granules(offset, 4)
            if not region.written[index].all():
                at = int(np.argmin(region.written[index])) // per
                self.fail("uninitialized", f"changes memory that nobody wrote ({region.name})", int(chosen[at]))
            bad = region.write(index, self.who(chosen, per), self.seen, self.state.padded, atomic=True)
            if bad:
                self._report(bad, chosen, per, region)
            view = region.view(4)
            for lane, place in zip(chosen, offset // 4, strict=True):
                out[lane] = view[place, 0]
                view[place, 0] = function(view[place, 0], value[lane])
                b, word = self.local_block[lane], (region.base, int(place))
                if acquire and word in self.released:
                    np.maximum(self.acquired[b], self.released[word], out=self.acquired[b])
                if release:
                    clock = self.released.setdefault(word, np.zeros(self.blocks, S32))
                    np.maximum(clock, self.seen[b], out=clock)
                    clock[b] = max(clock[b], self.epoch[lane])
        return out

    def _acquire(self, address: np.ndarray, m: np.ndarray | None) -> None:
        self.spun = True
        for region, lanes, offset in self._access("global", address, m, 4):
            for lane, place in zip(np.arange(self.threads) if lanes is None else lanes, offset // 4, strict=True):
                clock = self.released.get((region.base, int(place)))
                if clock is not None:
                    b = self.local_block[lane]
                    np.maximum(self.acquired[b], clock, out=self.acquired[b])

    # Asynchronous copies

    def copy_async(self, target: np.ndarray, source: np.ndarray, m: np.ndarray | None, width: int,
                   copied: np.ndarray) -> None:  # fmt: skip
        copied = self.wide(copied)
        if not np.isin(copied, (0, width)).all():
            raise Unsupported(f"a copy of a part of its bytes: {self.at.text}")
        reading = self.narrowed(m, copied == width)
        rows = np.zeros((self.threads, max(width // 8, 1)), f"u{min(width, 8)}")
        if reading is None or reading.any():
            lanes, found = self.load("global", source, reading, width)
            if lanes is None:
                rows = found
            else:
                rows[lanes] = found
        for region, lanes, offset in self._access("shared", target, m, width):
            index, per = region.granules(offset, width)
            who = self.who(lanes, per)
            self._check_products(index, lanes, per)
            bad = region.write(index, who, None, self.state.padded)
            if bad:
                self._report(bad, lanes, per, region)
            region.pending[index] = True
            region.any_pending = True
            chosen = np.arange(self.threads) if lanes is None else lanes
            self.copies.append((chosen, self.copy_group[chosen].copy(), index, rows[chosen], offset))
        if self.state.counters is not None:
            self._count("shared", target, m, width, True, "async")

    def commit_copies(self, m: np.ndarray | None) -> None:
        self.copy_group += 1 if m is None else m.astype(S32)

    def wait_copies(self, m: np.ndarray | None, count: int) -> None:
        waiting = np.ones(self.threads, bool) if m is None else m
        kept = []
        for lanes, group, index, rows, offset in self.copies:
            done = waiting[lanes] & (group < self.copy_group[lanes] - count)
            if done.any():
                width = rows.shape[1] * rows.dtype.itemsize
                per = len(index) // len(lanes)
                self.shared.view(width)[offset[done] // width] = rows[done]
                chosen = index.reshape(-1, per)[done].reshape(-1)
                self.shared.pending[chosen] = False
                # The copy is a write of its thread, and it ends now.
                who = self.who(lanes[done], per)
                self.shared.w_epoch[chosen], self.shared.w_warp_epoch[chosen] = who.epoch, who.warp_epoch
            if not done.all():
                per = len(index) // len(lanes)
                left = ~done
                kept.append(
                    (lanes[left], group[left], index.reshape(-1, per)[left].reshape(-1), rows[left], offset[left])
                )
        self.copies = kept
        self.shared.any_pending = bool(kept)

    # Tensor cores of warpgroups

    def accumulator(self, register: int) -> np.ndarray:
        for results in (self.open_product, *reversed(self.products)):
            if register in results:
                return results[register]
        return self.get(register)

    def load_described(self, descriptor: np.ndarray, rows: int, m: np.ndarray | None) -> np.ndarray:
        """A matrix [warpgroups, rows, 8] of 32-bit words in shared memory, K-major, as its descriptor says."""
        d = descriptor.reshape(-1, 128)
        if (d != d[:, :1]).any():
            raise Unsupported("a matrix descriptor that differs within a warpgroup")
        d = d[:, 0]
        start, leading, stride = ((d >> U64(s) & U64(0x3FFF)) << U64(4) for s in (0, 16, 32))
        swizzle = int(d[0] >> U64(62))
        if (d >> U64(62) != swizzle).any() or (d >> U64(49) & U64(7)).any():
            raise Unsupported("a matrix descriptor with a base offset")
        r, k = np.arange(rows)[:, None], np.arange(8)[None, :]
        pitch = {0: 16, 1: 128, 2: 64, 3: 32}[swizzle]
        inner = (r % 8) * pitch + (k * 4 if swizzle else k % 4 * 4)
        a = start[:, None, None].astype(S64) + stride[:, None, None].astype(S64) * (r // 8) + inner
        if swizzle == 0:
            a = a + leading[:, None, None].astype(S64) * (k // 4)
        else:
            a = a ^ ((a >> 7) & {1: 7, 2: 3, 3: 1}[swizzle]) << 4
        # As reads of the first thread of the warpgroup.
        group = np.arange(len(d))
        block = self.local_block[group * 128].astype(S64)
        inside = (a >= 0) & (a + 4 <= self.stride)
        offset = block[:, None, None] * self.stride + np.where(inside, a, 0)
        inside &= self.shared.valid[offset] & (a % 4 == 0)
        if not inside.all():
            self.fail(
                "out of bounds", "a matrix descriptor leaves shared memory", int(np.argwhere(~inside)[0][0]) * 128
            )
        flat = offset.reshape(-1)
        index, _ = self.shared.granules(flat, 4)
        per = len(index) // len(d)
        who = self.who(group * 128, per)
        if self.shared.stale_for_async[index].any():
            at = int(np.argmax(self.shared.stale_for_async[index]))
            self.fail("race", "wgmma reads what was written with no fence.proxy.async since", at // per * 128)
        bad = self.shared.read(index, who, None, self.state.padded)
        if bad:
            self.fail(bad.kind, f"{bad.message} (shared memory)", bad.element // per * 128)
        self.reading.append(index)
        return self.shared.view(4)[flat // 4][:, 0].reshape(len(d), rows, 8)

    reading: list[np.ndarray]

    def start_product(self, results: dict[int, np.ndarray], m: np.ndarray | None) -> None:
        if m is not None:
            raise Unsupported("wgmma by a part of the threads")
        if id(self.at) in self.program.unfenced:
            self.fail("race", "wgmma without a wgmma.fence after its registers were written", 0)
        self.open_product.update(results)
        for register in results:
            self.registers[register] = np.full(1, 0x7FBADBAD, U32)  # a NaN: not to be read before it is waited for

    def commit_products(self, m: np.ndarray | None) -> None:
        self.products.append(self.open_product)
        self.being_read.append(self.reading)
        self.open_product, self.reading = {}, []

    def wait_products(self, m: np.ndarray | None, count: int) -> None:
        while len(self.products) > count:
            results = self.products.pop(0)
            self.being_read.pop(0)
            later = set(self.open_product).union(*self.products)
            for register, value in results.items():
                if register not in later:
                    self.registers[register] = value

    def _check_products(self, index: np.ndarray, lanes: np.ndarray | None, per: int) -> None:
        """That nothing writes what a product still reads."""
        for read in (self.reading, *self.being_read):
            for other in read:
                hit = np.isin(index, other)
                if hit.any():
                    at = int(np.argmax(hit)) // per
                    lane = at if lanes is None else int(lanes[at])
                    self.fail("race", "writes what a wgmma that was not waited for reads", lane)

    def proxy_fence(self, m: np.ndarray | None) -> None:
        if self.shared is None:
            return
        blocks = np.unique(self.local_block if m is None else self.local_block[m])
        stale = self.shared.stale_for_async.reshape(self.blocks, -1)
        stale[blocks] = False

    # Warps and blocks

    def check_whole_warps(self, m: np.ndarray | None) -> None:
        if m is None:
            return
        warps = m.reshape(-1, 32)
        partial = warps.any(axis=1) & ~warps.all(axis=1)
        if partial.any():
            warp = int(np.argmax(partial))
            self.fail("divergence", "a warp-wide instruction without all threads of the warp", warp * 32)

    def check_members(self, m: np.ndarray | None, members: np.ndarray, source: np.ndarray | None = None) -> None:
        """That each thread is among the members it names, that the members are here, and its source among them."""
        member = self.wide(members)
        if m is None and members.shape[0] == 1 and members[0] == 0xFFFFFFFF:
            return
        active = np.ones(self.threads, bool) if m is None else m
        present = (active.reshape(-1, 32).astype(U64) << np.arange(32, dtype=U64)).sum(axis=1, dtype=U64).astype(U32)
        present = np.repeat(present, 32)
        mine = ((member >> self.lane.astype(U32)) & U32(1)).astype(bool)
        bad = active & (~mine | ((member & ~present) != 0))
        if source is not None:
            bad |= active & ~active[source]
            bad |= active & ~((member >> (source % 32).astype(U32)) & U32(1)).astype(bool)
        if bad.any():
            # Threads that have not left may still come: the instruction waits for them.
            late = active & ((member & ~present & self.staying()) != 0)
            if self.others_run and late.any():
                raise NotYetError(np.repeat(late.reshape(-1, 32).any(axis=1), 32))
            self.fail("inactive lane", "a warp-wide instruction names or reads a thread that takes no part",
                      int(np.argmax(bad)))  # fmt: skip

    def staying(self) -> np.ndarray:
        """The threads of each thread's warp that have not left, as bits."""
        bits = (~self.exited.reshape(-1, 32)).astype(U64) << np.arange(32, dtype=U64)
        return np.repeat(bits.sum(axis=1, dtype=U64).astype(U32), 32)

    def warp_barrier(self, m: np.ndarray | None, members: np.ndarray) -> None:
        self.check_members(m, members)
        self.warp_epoch = self.warp_epoch + (1 if m is None else m.astype(S32))

    def _barrier_passed(self, m: np.ndarray | None) -> None:
        self.epoch = self.epoch + (1 if m is None else m.astype(S32))
        if self.seen is not None:
            blocks = np.unique(self.local_block if m is None else self.local_block[m])
            self.seen[blocks] = np.maximum(self.seen[blocks], self.acquired[blocks])

    # Control flow

    def run(self) -> None:
        self.reading, self.being_read = [], getattr(self, "being_read", [])
        groups: dict[int, np.ndarray | None] = {0: self.everyone}
        parked: dict[int, np.ndarray] = {}
        waiting: dict[int, np.ndarray] = {}
        held: dict[tuple[int, int], np.ndarray] = {}  # at a warp-wide instruction, for the rest of their warps
        program = self.program.blocks
        counters = self.state.counters

        def join(place: int, m: np.ndarray | None, into: dict) -> None:
            if place in into and m is not None:
                m = into[place] | m
            into[place] = m if m is None else self._everyone_or(m)

        while groups or parked:
            if not groups:
                groups, parked = parked, {}
            place = min(groups)
            m = groups.pop(place)
            block = program[place]
            block.executed = True
            self.state.budget -= len(block.runs) + 1
            if self.state.budget < 0:
                self.fail("endless", "the budget of instructions is spent", 0 if m is None else int(np.argmax(m)))
            if counters is not None:
                warps = self.threads // 32 if m is None else int(m.reshape(-1, 32).any(axis=1).sum())
                for _, ins in block.runs:
                    counters.pipes[pipe_of(ins)] += warps
            self.others_run = bool(groups or parked)
            for k, (run, ins) in enumerate(block.runs):
                self.at = ins
                if (place, k) in held:
                    m = self._everyone_or(m | held.pop((place, k)))
                try:
                    run(self, m)
                except NotYetError as early:
                    held[place, k] = early.warps if m is None else m & early.warps
                    m = ~early.warps if m is None else m & ~early.warps
                    if not m.any():
                        break
                    run(self, m)
            if m is not None and not m.any():
                continue
            end = block.end
            if end is None:
                if place + 1 < len(program):
                    join(place + 1, m, groups)
                else:
                    self._exit(m)
                continue
            self.at = end
            if counters is not None:
                counters.pipes[pipe_of(end)] += warps
            name = end.parts[0]
            if name == "bra":
                taken = m if block.guard is None else self.narrowed(m, block.guard(self))
                into = parked if self.spun else groups
                self.spun = False
                if block.guard is None:
                    join(block.target, m, into)
                    continue
                if taken is None or taken.any():
                    join(block.target, taken, into if block.target <= place else groups)
                if taken is not None:
                    rest = ~taken if m is None else m & ~taken
                    if rest.any():
                        join(place + 1, rest, groups)
            elif name in ("ret", "exit"):
                taken = m if block.guard is None else self.narrowed(m, block.guard(self))
                self._exit(taken)
                if taken is not None and block.guard is not None:
                    rest = ~taken if m is None else m & ~taken
                    if rest.any():
                        join(place + 1, rest, groups)
            elif name == "trap":
                taken = m if block.guard is None else self.narrowed(m, block.guard(self))
                if taken is None or taken.any():
                    self.fail("trap", "a trap is reached", 0 if taken is None else int(np.argmax(taken)))
                join(place + 1, m, groups)
            else:
                if block.guard is not None:
                    guard = self.narrowed(m, block.guard(self))
                    if guard is not None and (m is None or (guard != m).any()):
                        self.fail("divergence", "a barrier that only some threads take", 0)
                arrived = waiting.pop(place, None)
                arrived = np.ones(self.threads, bool) if m is None else m | (arrived if arrived is not None else False)
                here = arrived.reshape(self.blocks, -1)
                full = (here | self.exited.reshape(self.blocks, -1)).all(axis=1)
                lost = (here.any(axis=1) & full) & (
                    self.exited.reshape(self.blocks, -1)[:, : self.state.threads].any(axis=1)
                )
                if lost.any():
                    self.fail("divergence", "a barrier after some threads have left", int(np.argmax(arrived)))
                released = arrived & np.repeat(full, self.state.padded)
                rest = arrived & ~released
                if rest.any():
                    waiting[place] = rest
                if released.any():
                    passed = None if not self.exited.any() and released.all() else released
                    if block.write is not None:
                        value = self.wide(block.value(self)) & released
                        anyone = value.reshape(self.blocks, -1).any(axis=1)
                        block.write(self, np.repeat(anyone, self.state.padded), passed)
                    self._barrier_passed(passed)
                    join(place + 1, passed, groups)
        for (place, k), m in held.items():
            run, self.at = program[place].runs[k]
            run(self, m)  # fails: nobody else comes
        if waiting:
            place, m = min(waiting.items())
            self.at = program[place].end
            self.fail("divergence", "a barrier that not all threads of the block reach", int(np.argmax(m)))
        if self.copies:
            lane = int(self.copies[0][0][0])
            self.fail("race", "the kernel ends with an asynchronous copy not waited for", lane)

    def _everyone_or(self, m: np.ndarray) -> np.ndarray | None:
        """None for the mask of all threads."""
        return None if not self.exited.any() and m.all() else m

    def _exit(self, m: np.ndarray | None) -> None:
        self.exited = np.ones(self.threads, bool) if m is None else self.exited | m

    # Counters

    def _count(
        self, space: str, address: np.ndarray, m: np.ndarray | None, width: int, is_store: bool, how: str
    ) -> None:
        counters = self.state.counters
        lanes = np.arange(self.threads) if m is None else np.flatnonzero(m)
        if not len(lanes):
            return
        a = self.wide(address)[lanes].astype(S64)
        warp = self.warp[lanes].astype(S64)
        requests = len(np.unique(warp))
        if space == "global":
            sectors = len(np.unique((warp << 48) ^ (a >> 5)))
            if is_store:
                counters.written_bytes += len(lanes) * width
                counters.store_requests += requests
                counters.store_sectors += sectors
            else:
                counters.read_bytes += len(lanes) * width
                counters.load_requests += requests
                counters.load_sectors += sectors
                counters.load_widths[width] += len(lanes) * width
            return
        # Banks of 4 bytes; requests of 8 (16) bytes a thread are served by half (quarter) warps. Many threads may
        # read one word.
        part = warp * 4 + (self.lane[lanes] * max(width // 4, 1) // 32 if how != "matrix" else 0)
        words = (a >> 2)[:, None] + np.arange(max(width // 4, 1))
        keys = np.unique((np.repeat(part, words.shape[1]) << 32) | words.reshape(-1))
        group, bank = keys >> 32, keys & 31
        pairs, conflicts = np.unique(group * 32 + bank, return_counts=True)
        worst = np.zeros(int(group.max() - group.min()) + 1, np.int64)
        np.maximum.at(worst, pairs // 32 - group.min(), conflicts)
        counters.shared_requests += requests
        counters.shared_wavefronts += int(worst.sum())
        counters.shared_ideal += int((worst > 0).sum())


__all__ = ["Counters", "Program", "Register", "launch"]
