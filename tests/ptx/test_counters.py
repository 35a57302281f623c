"""Bytes, sectors and banks, counted from what the compilers emit."""

import itertools
from collections.abc import Callable

import grouped
import numpy as np
import pytest
import torch
from lipgan.kernels import config, gradient_penalty
from ptx import kit
from ptx.compile import Session
from ptx.execute import Counters
from ptx.selection import DTYPES, TARGETS, selected


def count(target: str, call: Callable[[Session], object]) -> dict[str, Counters]:
    counters: dict[str, Counters] = {}
    session = Session(target, counters=counters)
    with session.running():
        call(session)
    return counters


def of(counters: dict[str, Counters], name: str) -> Counters:
    (found,) = [c for k, c in counters.items() if name in k]
    return found


@pytest.mark.parametrize(("stride", "sectors", "passes"), [(1, 4, 1), (2, 8, 2), (8, 32, 8), (32, 32, 32), (33, 32, 1)])
def test_sectors_and_banks_of_strided_accesses(stride: int, sectors: int, passes: int) -> None:
    """32 threads, `stride` words of 4 bytes apart: 128 bytes are 4 sectors of 32; words 32 apart share a bank."""
    device, counters = kit.Device(), Counters()
    x = device.array(np.arange(32 * stride + 32, dtype=np.uint32))
    body = f"""
    ld.param.u64 %q1, [p0]; mov.u32 %r0, %tid.x; mul.lo.s32 %r1, %r0, {4 * stride}; mov.u32 %r2, smem;
    add.s32 %r3, %r1, %r2; mul.wide.u32 %q2, %r0, {4 * stride}; add.s64 %q2, %q1, %q2;
    ld.global.b32 %r4, [%q2]; st.shared.b32 [%r3], %r4;
    """
    device.launch(kit.entry(body, ["u64"], dynamic=True), [x], shared_bytes=32 * 4 * 33 + 4, counters=counters)
    assert (counters.read_bytes, counters.load_requests, counters.load_sectors) == (128, 1, sectors)
    assert (counters.shared_requests, counters.shared_wavefronts) == (1, passes)
    assert counters.pipes["memory"] == 3  # of one warp: ld.param, ld.global, st.shared


@pytest.mark.parametrize(
    ("dtype", "target"),
    selected([(torch.float32, "sm_90")], itertools.product(DTYPES, TARGETS)),
    ids=str,
)
def test_kernels_read_what_their_formulas_need(dtype: torch.dtype, target: str) -> None:
    """At most 1.05 times as many bytes, in loads of 16 bytes where rows start at multiples of 16."""
    size = dtype.itemsize
    h, w = 32, config.longest_row(size) // 4
    x = torch.randn(h, w).to(dtype)
    counters = count(
        target, lambda s: gradient_penalty.gradient_penalty_fwd(s.copy(x[..., None]), "two-sided", 10.0, 1.0)
    )
    rows = of(counters, "rows")
    assert rows.read_bytes <= 1.05 * h * w * size
    assert rows.load_widths[16] >= 0.95 * h * w * size
    assert rows.load_sectors * 32 <= 1.05 * h * w * size
    wide = 8 if dtype == torch.float64 else 4
    # The cotangent, a norm a row, a partial result a program.
    assert rows.written_bytes <= 1.05 * (h * w * size + 2 * h * wide)

    mix = torch.rand(h, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    counters = count(target, lambda s: gradient_penalty.gradient_penalty_interpolate(s.copy(x), s.copy(x), s.copy(mix)))
    mixed = of(counters, "interpolate")
    assert mixed.load_widths[16] >= 2 * h * w * size
    assert mixed.load_sectors * 32 <= 1.05 * (2 * h * w * size + h * wide) + 32 * mixed.load_requests
    assert mixed.written_bytes == h * w * size

    vectors = torch.randn(h, dtype=torch.float64).to(dtype), torch.randn(w, dtype=torch.float64).to(dtype)
    counters = count(
        target, lambda s: grouped.spectral_norm_fwd([s.copy(x)], *([s.copy(v)] for v in vectors), 1, 1e-12)
    )
    # W twice, the second time from the cache; v once a block of rows.
    iterate = of(counters, "iterate")
    assert iterate.load_widths[16] >= 2 * h * w * size
    scale = of(counters, "scale")
    assert h * w * size <= scale.load_widths[16] <= 1.05 * h * w * size
