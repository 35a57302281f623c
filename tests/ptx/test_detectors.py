"""Each kind of finding, on kernels of a few lines that have one fault, and on the same kernels without it."""

import numpy as np
import pytest
from ptx import kit
from ptx.memory import Finding

START = """
ld.param.u64 %q1, [p0]; ld.param.u64 %q2, [p1]; mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x;
mad.lo.s32 %r3, %r1, %r2, %r0; mul.wide.u32 %q3, %r3, 4; add.s64 %q4, %q1, %q3; add.s64 %q5, %q2, %q3;
mov.u32 %r4, smem; shl.b32 %r5, %r0, 2; add.s32 %r6, %r4, %r5; xor.b32 %r7, %r5, 128; add.s32 %r7, %r4, %r7;
xor.b32 %r8, %r5, 4; add.s32 %r8, %r4, %r8;
"""
# %q4, %q5: this thread's word of the input and of the output. %r6: its word of shared memory; %r7 and %r8: the word of
# a thread of the next warp, and of the same warp.


def run(body: str, *, grid: int = 1, threads: int = 64, size: int | None = None, ordered: bool = True, **options):
    device = kit.Device()
    size = grid * threads if size is None else size
    source = device.array(np.arange(size, dtype=np.uint32), name="source")
    out = device.array(np.zeros(size, np.uint32), written=False, name="out")
    device.launch(kit.entry(START + body, ["u64", "u64"], dynamic=True), [source, out], grid=grid, threads=threads,
                  **({"shared_bytes": 1024} | options))  # fmt: skip
    return out


READ = "ld.global.b32 %r10, [%q4]; "
WRITE = " st.global.b32 [%q5], %r11;"
EXCHANGE = READ + "st.shared.b32 [%r6], %r10; bar.sync 0; ld.shared.b32 %r11, [%r7];" + WRITE
IN_A_WARP = READ + "st.shared.b32 [%r6], %r10; bar.warp.sync -1; ld.shared.b32 %r11, [%r8];" + WRITE
AGAIN = (
    READ + "st.shared.b32 [%r6], %r10; bar.sync 0; ld.shared.b32 %r11, [%r7]; bar.sync 0; st.shared.b32 [%r6], %r11;"
    " bar.sync 0; ld.shared.b32 %r11, [%r7];" + WRITE
)
COPY = (
    "setp.lt.u32 %p1, %r0, 16; mul.wide.u32 %q6, %r0, 16; add.s64 %q6, %q1, %q6; shl.b32 %r12, %r0, 4;"
    "add.s32 %r12, %r4, %r12; @%p1 cp.async.cg.shared.global [%r12], [%q6], 16; cp.async.commit_group;"
    "cp.async.wait_group 0; bar.sync 0; ld.shared.b32 %r11, [%r7];" + WRITE
)
GUARDED = "setp.lt.u32 %p1, %r3, {n}; @!%p1 bra $end; " + READ + "mov.b32 %r11, %r10;" + WRITE + " $end:"
BRANCH = "setp.lt.u32 %p1, %r0, {n}; @!%p1 bra $end; bar.sync 0; $end: " + READ + "mov.b32 %r11, %r10;" + WRITE
SHUFFLE = READ + "setp.lt.u32 %p1, %r0, {n}; @%p1 shfl.sync.bfly.b32 %r11, %r10, 1, 31, -1; @%p1" + WRITE
# Half of a warp takes the other way, which lies behind the shuffle where all of it meets.
LATE = (
    READ
    + "setp.ge.u32 %p1, %r0, {n}; @%p1 bra $far; $meet: shfl.sync.bfly.b32 %r11, %r10, 1, 31, -1;"
    + WRITE
    + "bra.uni $end; $far: mov.u32 %r20, 0; {end} bra.uni $meet; $end:"
)
LOOP = "mov.u32 %r20, 0; $loop: add.u32 %r20, %r20, {step}; setp.ne.u32 %p1, %r20, 10; @%p1 bra $loop;" + READ + "mov.b32 %r11, %r10;" + WRITE  # fmt: skip
# Three blocks write; the last one to take a ticket, of which the first word of the input holds the number, reads.
TICKET = (
    "st.global.b32 [%q5], %r3; bar.sync 0; setp.eq.u32 %p1, %r0, 0; mov.u32 %r13, 0;"
    "@%p1 atom.global.gpu.{order}.add.u32 %r13, [%q1], 1; @%p1 st.shared.b32 [%r4], %r13; bar.sync 0;"
    "ld.shared.b32 %r13, [%r4]; setp.eq.u32 %p1, %r13, 2; mul.wide.u32 %q6, %r0, 4; add.s64 %q6, %q2, %q6;"
    "@%p1 ld.global.b32 %r10, [%q6 + 256]; @%p1 st.global.b32 [%q1], 0;"
)

CLEAN = {
    "exchange": (EXCHANGE, {}), "in a warp": (IN_A_WARP, {}), "again": (AGAIN, {}), "copy": (COPY, {}),
    "guarded": (GUARDED.format(n=60), {"size": 60}), "branch": (BRANCH.format(n=64), {}),
    "shuffle": (SHUFFLE.format(n=32), {}), "late": (LATE.format(n=41, end=""), {}), "loop": (LOOP.format(step=1), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CLEAN)
def test_no_false_alarm(name: str) -> None:
    body, options = CLEAN[name]
    out = run(body, **options)
    expected = {
        "exchange": np.arange(64) ^ 32, "in a warp": np.arange(64) ^ 1, "again": np.arange(64),
        "copy": np.arange(64) ^ 32, "late": np.arange(64) ^ 1,
        "guarded": np.arange(60), "branch": np.arange(64), "loop": np.arange(64),
        "shuffle": np.where(np.arange(64) < 32, np.arange(64) ^ 1, 0xFFFFFFFF),
    }[name]  # fmt: skip
    assert out.tolist() == expected.tolist()


FAULTS = {
    "no barrier between writer and reader": (EXCHANGE.replace("bar.sync 0;", ""), {}, "uninitialized|race"),
    "no barrier, memory written before": (
        READ + "st.shared.b32 [%r6], %r10; bar.sync 0; st.shared.b32 [%r6], %r10; ld.shared.b32 %r11, [%r7];" + WRITE,
        {}, "race: reads what thread 32 of block 0 writes",
    ),
    "no barrier between reader and writer": (
        AGAIN.replace("bar.sync 0; st.shared", "st.shared"), {}, "race: writes what"),
    "no barrier within a warp": (IN_A_WARP.replace("bar.warp.sync -1;", ""), {}, "race: reads what thread 1"),
    "a barrier of the warp between warps": (EXCHANGE.replace("bar.sync 0;", "bar.warp.sync -1;"), {}, "uninit|race"),
    "two threads write one word": (READ + "st.shared.b32 [%r4], %r10;", {}, "race: two threads write different values"),
    "a copy not waited for": (COPY.replace("cp.async.wait_group 0;", ""), {}, "race: reads what an asynchronous copy"),
    "a copy waited for by its own thread only": (COPY.replace("bar.sync 0;", ""), {}, "race: reads what thread"),
    "a copy not committed": (COPY.replace("cp.async.commit_group;", ""), {}, "race"),
    "a copy that the kernel leaves behind": (
        COPY.split("cp.async.wait_group")[0], {}, "race: the kernel ends with an asynchronous copy",
    ),
    "one past the end, read": (
        GUARDED.format(n=61), {"size": 60}, "out of bounds: 4 bytes .* 240 bytes from the start"),
    "one past the end, written": (
        GUARDED.format(n=60) + " mov.u32 %r11, 1; setp.eq.u32 %p2, %r0, 0; @%p2 st.global.b32 [%q2 + 240], %r11;",
        {"size": 60}, "out of bounds",
    ),
    "one before the start": (READ.replace("[%q4]", "[%q4 + -4]"), {}, "out of bounds"),
    "null": ("mov.u64 %q6, 0; ld.global.b32 %r10, [%q6];", {}, "out of bounds"),
    "shared memory past its size": (EXCHANGE, {"shared_bytes": 252}, "out of bounds: 4 bytes at shared address"),
    "more shared memory than there is": (
        EXCHANGE, {"shared_bytes": 1024, "shared_limit": 1000}, "shared memory: kernel"),
    "a vector at an odd address": ("ld.global.v2.b32 {%r10, %r11}, [%q4];", {}, "misaligned: an access of 8 bytes"),
    "a vector of shared memory at an odd address": (
        "st.shared.v4.b32 [%r6], {%r0, %r0, %r0, %r0};", {}, "misaligned: an access of 16 bytes",
    ),
    "shared memory nobody wrote": ("ld.shared.b32 %r11, [%r6];" + WRITE, {}, "uninitialized"),
    "global memory nobody wrote": ("ld.global.b32 %r11, [%q5];", {}, "uninitialized"),
    "a barrier that some threads pass by": (BRANCH.format(n=40), {}, "divergence"),
    "a barrier that a warp passes by": (BRANCH.format(n=32), {}, "divergence"),
    "a barrier after some threads have left": (
        "setp.lt.u32 %p1, %r0, 40; @!%p1 ret; bar.sync 0;", {}, "divergence: a barrier after some threads",
    ),
    "two barriers in two branches": (
        "setp.lt.u32 %p1, %r0, 32; @%p1 bra $one; bar.sync 0; bra.uni $end; $one: bar.sync 0; $end:", {}, "divergence",
    ),
    "a shuffle from a lane that is not there": (SHUFFLE.format(n=31), {}, "inactive lane"),
    "a shuffle that a part of a warp never reaches": (LATE.format(n=41, end="ret;"), {}, "inactive lane"),
    "a shuffle that waits for a part of a warp at a barrier": (
        LATE.format(n=41, end="bar.sync 0;"), {}, "inactive lane"),
    "a reduction that names a lane that is not there": (
        "setp.lt.u32 %p1, %r0, 20; @%p1 redux.sync.add.s32 %r11, %r0, -1;", {}, "inactive lane",
    ),
    "a matrix load by a part of a warp": (
        "setp.lt.u32 %p1, %r0, 20; @%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r10}, [%r4];", {}, "divergence",
    ),
    "an endless loop": (LOOP.format(step=3), {"budget": 2000}, "endless"),
    "blocks that write one word": (
        "setp.eq.u32 %p1, %r0, 0; @%p1 st.global.b32 [%q2], %r1;", {"grid": 2}, "race: writes what|two threads write",
    ),
    "blocks that write one word, one after the other": (
        "setp.eq.u32 %p1, %r0, 0; @%p1 st.global.b32 [%q2], %r2;", {"grid": 2, "lanes": 64},
        "race: writes what thread 0",
    ),
    "blocks that write one word at once, one value": (
        "setp.eq.u32 %p1, %r0, 0; @%p1 st.global.b32 [%q2], %r2;", {"grid": 2}, "race: writes what .* at once",
    ),
    "an atomic operation on a word that another block just stores": (
        "setp.eq.u32 %p1, %r1, 0; @%p1 st.global.b32 [%q1], %r2; @!%p1 atom.global.or.b32 %r10, [%q1], 1;",
        {"grid": 2}, "race: writes what thread",
    ),
    "a block that reads a word that an atomic operation of another one changes": (
        "setp.eq.u32 %p1, %r3, 0; @%p1 atom.or.b32 %r10, [%q1], 1; setp.eq.u32 %p1, %r3, 64;"
        " @%p1 ld.volatile.global.b32 %r10, [%q1];", {"grid": 2}, "race: reads what thread 0 of block 0",
    ),
    "an atomic operation on memory nobody wrote": (
        "atom.or.b32 %r10, [%q2], 1;", {}, "uninitialized: changes memory"),
    "a block that reads what another one writes": (
        "setp.eq.u32 %p1, %r0, 0; setp.eq.u32 %p2, %r1, 0; and.pred %p3, %p1, %p2; @%p3 st.global.b32 [%q1], %r1;"
        "setp.eq.u32 %p2, %r1, 1; and.pred %p3, %p1, %p2; @%p3 ld.global.b32 %r10, [%q1];",
        {"grid": 2}, "race: reads what thread 0 of block 0 writes",
    ),
    "a block that writes what others have read": (
        "ld.global.b32 %r10, [%q1]; setp.eq.u32 %p1, %r3, 70; @%p1 st.global.b32 [%q1], %r1;", {"grid": 2},
        "race: writes what several threads read",
    ),
    "a ticket that orders nothing": (TICKET.format(order="relaxed"), {"grid": 3}, "race: reads what thread 0 of block"),
    "a ticket that only releases": (TICKET.format(order="release"), {"grid": 3}, "race: reads what thread 0 of block"),
    "a ticket before the barrier": (
        TICKET.format(order="acq_rel").replace("bar.sync 0;", "", 1), {"grid": 3}, "race: reads what thread 0 of block"),
    "a trap": ("setp.eq.u32 %p1, %r0, 3; @%p1 trap;", {}, "trap"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str) -> None:
    body, options, message = FAULTS[name]
    with pytest.raises(Finding, match=message):
        run(body, **options)


def test_same_values_from_several_threads_are_no_race() -> None:
    run("mov.u32 %r10, 5; st.shared.b32 [%r4], %r10;")


@pytest.mark.parametrize("descending", [False, True])
def test_the_last_to_take_a_ticket_may_read_what_all_wrote(descending: bool) -> None:
    out = run(TICKET.format(order="acq_rel"), grid=3, descending=descending)
    assert out.tolist() == list(range(192))


@pytest.mark.parametrize("lanes", [128, 64])
def test_atomic_operations_of_several_blocks_are_no_race(lanes: int) -> None:
    """Side by side, and one block after the other; what a thread gets is what was there before its own."""
    before = "mov.u32 %r10, 1; shl.b32 %r10, %r10, %r3; and.b32 %r12, %r3, 32; setp.eq.u32 %p1, %r12, 0;"
    out = run(before + "mov.u32 %r11, 0; @%p1 atom.global.or.b32 %r11, [%q1 + 256], %r10;" + WRITE,
              grid=2, lanes=lanes)  # fmt: skip
    low = [(64 | ((1 << t) - 1)) & 0xFFFFFFFF for t in range(32)]
    full = 0xFFFFFFFF
    assert out.tolist() == [*low, *[0] * 32, *[full] * 32, *[0] * 32]
