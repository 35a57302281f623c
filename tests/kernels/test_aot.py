"""The Triton kernels compile for GPUs that are not present, and the checks of the result can fail.

The compiler is out of reach of a process that runs Triton's interpreter, so all of it happens in subprocesses.
This file is one: run as a script, it builds the kernels below, most of which break a rule.
"""

import json
import os
import subprocess
import sys
from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from lipgan.kernels import aot, gradient_penalty, nearest_neighbours


@triton.jit
def _good_kernel(x):
    index = tl.arange(0, 512)
    tl.store(x + index, tl.load(x + index) + 1.0)


@triton.jit
def _narrow_kernel(x):
    # A stride of 3 elements leaves nothing for a wide load to take.
    index = tl.arange(0, 512) * 3
    tl.store(x + index, tl.load(x + index) + 1.0)


@triton.jit
def _dot_kernel(x, PRECISION: tl.constexpr):
    index = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    a = tl.load(x + index)
    tl.store(x + index, tl.dot(a, a, input_precision=PRECISION))


@triton.jit
def _large_dot_kernel(x):
    # Large enough for the tensor memory of Blackwell, whose instruction names TF32 in its own way.
    index = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    a = tl.load(x + index)
    tl.store(x + index, tl.dot(a, a, input_precision="tf32"))


@triton.jit
def _spilling_kernel(x, n):
    # Every value of the first loop is still needed in the second one.
    index = tl.arange(0, 16384)
    a = tl.load(x + index)
    for i in range(n):
        a += tl.load(x + i * 16384 + index) * a
    tl.store(x + index, a)


@triton.jit
def _broken_kernel(x):
    tl.store(x + tl.arange(0, 64), tl.load(x + tl.arange(0, 32)))


def _build_rule_breakers() -> dict[str, list[str]]:
    x = torch.empty(1 << 20)
    with aot.recorded() as launches:
        _good_kernel[(1,)](x)
        _narrow_kernel[(1,)](x)
        for precision in ("tf32", "tf32x3", "ieee"):
            _dot_kernel[(1,)](x, PRECISION=precision)
        _spilling_kernel[(1,)](x, 1000, num_warps=4, maxnreg=32)
        _broken_kernel[(1,)](x)
    found = {f"{launch.name} {launch.describe()}".strip(): aot.build(launch, "sm_90") for launch in launches}
    (dot,) = (launch for launch in launches if dict(launch.constants).get("PRECISION") == "ieee")
    with aot.recorded() as launches:
        _large_dot_kernel[(1,)](x, num_warps=4)
    (large,) = launches
    found["_dot_kernel on Blackwell"] = aot.build(large, "sm_100")
    with mock.patch.dict(aot.SHARED_LIMIT, sm_90=1024):
        found["_dot_kernel with 1 KiB"] = aot.build(dot, "sm_90")
    return {name: list(made.violations) for name, made in found.items()}


def _build_sizes_of_one() -> dict[str, list[str]]:
    """The launches of the smallest arguments: Triton makes compile-time constants of sizes of 1."""
    with aot.recorded() as launches:
        for shape in [(1, 1, 1), (3, 1, 1), (1, 5, 1), (1, 20000, 1), (1, 3, 2)]:
            for kind in ("two-sided", "max"):
                gradient_penalty.gradient_penalty_fwd(torch.empty(shape), kind, weight=1.0, target=1.0)
        for shape in [(1, 1), (3, 1), (1, 5)]:
            gradient_penalty.gradient_penalty_interpolate(torch.empty(shape), torch.empty(shape), torch.empty(shape[0]))
        x, radii = torch.empty(1, 1), torch.empty(1, dtype=torch.float64)
        nearest_neighbours.nearest_neighbours(x, x, 1)
        nearest_neighbours.ball_counts(x, x, radii, radii, closed=False)
    return {f"{launch.name} {launch.describe()}": list(aot.build(launch, "sm_90").violations) for launch in launches}


def _run(*command: str, cache: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if cache is not None:
        environment["TRITON_CACHE_DIR"] = cache
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


def _cases() -> list[tuple[str, list[str]]]:
    return [(launch.name, launch.describe().split()) for launch in aot.launches_of(aot.CASES)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What this file makes where it is run, in a process that compiles."""
    done = _run(__file__, cache=str(tmp_path_factory.mktemp("triton")))
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    return found


def test_every_kernel_is_among_the_cases(made: list[Any]) -> None:
    rows = [(name, set(options)) for name, options in made[3]]
    for name in ("iterate", "reduce", "sigma", "scale"):
        assert any(kernel == f"spectral_norm_{name}_kernel" for kernel, _ in rows)
    for name in ("grad_dot", "grad_weight", "double_dot", "double_grads"):
        assert any(kernel == f"_spectral_norm_{name}_kernel" for kernel, _ in rows)
    for name in ("interpolate", "rows", "columns", "parts", "scale"):
        assert any(kernel == f"_gradient_penalty_{name}_kernel" for kernel, _ in rows)
    for flag in ("OTHERS=True", "OTHERS=False"):
        assert any(kernel == "_nearest_neighbours_kernel" and flag in options for kernel, options in rows)
        assert any(kernel == "_nearest_by_bounds_kernel" and flag in options for kernel, options in rows)
    for flag in ("CLOSED=True", "CLOSED=False"):
        assert any(kernel == "_ball_counts_kernel" and flag in options for kernel, options in rows)
        assert any(kernel == "_counts_by_bounds_kernel" and flag in options for kernel, options in rows)
    for block in (64, 128):
        assert any(kernel == "_neighbour_bounds_kernel" and f"BLOCK={block}" in options for kernel, options in rows)
    assert any(kernel == "_neighbour_shift_kernel" for kernel, _ in rows)
    for dtype in ("fp32", "fp64", "fp16", "bf16"):
        assert any(f"DTYPE={dtype}" in options for _, options in rows)
    for flag in ("INVERSE=True", "INVERSE=False"):
        assert any(kernel == "_matrix_sqrt_root_kernel" and flag in options for kernel, options in rows)
    for name in ("gram", "product"):
        for precision in ("ieee", "tf32x3"):
            assert any(
                kernel == f"_matrix_sqrt_{name}_kernel" and f"PRECISION={precision}" in options
                for kernel, options in rows
            )


def test_the_command_compiles_an_op_within_the_limits() -> None:
    """One op; the whole table is a step of .ci/run, for a GPU of AMD as well."""
    done = _run("-m", "lipgan.kernels.aot", "--op", "matrix_sqrt", "--targets", "sm_90", "--jobs", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("_")]
    for name in ("gram", "product"):
        for precision in ("ieee", "tf32x3"):
            found = {
                row[1] for row in rows if row[0] == f"_matrix_sqrt_{name}_kernel" and f"PRECISION={precision}" in row
            }
            assert found == {"sm_90"}


def _build_largest() -> dict[str, list[int]]:
    """Wide loads of the largest tile and the longest row of float32."""
    cases = aot.launches_of(["spectral_norm", "gradient_penalty"])
    wanted = {
        "iterate": (
            "spectral_norm_iterate_kernel",
            {"FIRST=True", "ORDERED=False", "DTYPE=fp32", "BLOCK_H=8", "BLOCK_W=1024"},
        ),
        "rows": ("_gradient_penalty_rows_kernel", {"BLOCK_W=16384"}),
    }
    return {
        key: [
            aot.build(launch, "sm_90").wide_loads
            for launch in cases
            if launch.name == name and options <= set(launch.describe().split())
        ]
        for key, (name, options) in wanted.items()
    }


def test_the_checks_can_fail_and_sizes_of_one_compile(made: list[Any]) -> None:
    found, small, largest = made[:3]
    assert found["_good_kernel"] == []
    assert found["_narrow_kernel"] == ["no 128-bit load"]
    assert "a matrix product in tf32" in found["_dot_kernel PRECISION=tf32"]
    assert found["_dot_kernel PRECISION=ieee"] == []
    assert found["_dot_kernel PRECISION=tf32x3"] == []
    assert found["_dot_kernel on Blackwell"] == ["a matrix product in tf32"]
    assert any("spilled" in text for text in found["_spilling_kernel num_warps=4 maxnreg=32"])
    assert any("shared memory exceed 1024" in text for text in found["_dot_kernel with 1 KiB"])
    assert any("does not compile" in text for text in found["_broken_kernel"])
    # So small, nothing can be loaded in 128 bits.
    assert len(small) >= 8
    assert {text for violations in small.values() for text in violations} <= {"no 128-bit load"}
    # The largest float32 tile, 8 x 1024 over 256 threads, is 8 loads of 16 bytes a thread, loaded twice;
    # with fewer wide loads, some of W would come in 4 bytes at a time.
    (iterate,) = largest["iterate"]
    assert iterate >= 16
    # The longest row, 64 KiB of float32 over 512 threads, is 8 loads of 16 bytes a thread; it is loaded once.
    assert max(largest["rows"]) == 8


def test_a_violation_sets_the_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    good = aot.Build("kernel", "", "sm_90", 32, 0, 0, 4, ())
    bad = aot.Build("kernel", "", "sm_90", 255, 8, 0, 4, ("8 spilled",))
    monkeypatch.setattr(aot.knobs.runtime, "interpret", False)
    for builds, status in (([good], 0), ([good, bad], 1)):
        monkeypatch.setattr(aot, "build_all", lambda *_, builds=builds: iter(builds))
        assert aot.main([]) == status
    assert "VIOLATION: 8 spilled" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        aot.main(["--targets", "sm_1"])


def test_wide_loads_are_counted() -> None:
    ptx = """
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    ld.global.L1::evict_last.v2.b64 { %rd2, %rd3 }, [ %rd1 + 0 ];
    ld.global.v8.b32 { %r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8 }, [ %rd1 + 0 ];
    ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ];
    ld.global.b32 { %r1 }, [ %rd1 + 0 ];
    ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    st.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };
    """
    assert aot.wide_loads(ptx) == 3
    ptx = """
    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
    cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x8, %r2;
    """
    assert aot.wide_loads(ptx) == 1
    names = ("global_load_dwordx4", "buffer_load_dwordx4", "global_load_dwordx2", "global_load_dword")
    assert aot.wide_loads("\n".join(f"{name} v[0:3], v4" for name in names)) == 2


def test_reduced_precision_is_found() -> None:
    assert aot.reduced_precision("tt.dot %a, %b, %c, inputPrecision = tf32 : tensor", "") == ["tf32"]
    assert aot.reduced_precision("", "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1}") == ["tf32"]
    assert aot.reduced_precision("", "wgmma.mma_async.sync.aligned.m64n32k8.f32.tf32.tf32 {%r1}") == ["tf32"]
    assert aot.reduced_precision("", "tcgen05.mma.cta_group::1.kind::tf32 [ %r1 + 0 ], %rd1, %rd2") == ["tf32"]
    assert aot.reduced_precision("", "v_mfma_f32_16x16x8_xf32 a[0:3], v[0:1], v[2:3]") == ["xf32"]
    assert (
        aot.reduced_precision("tt.dot %a, %b, %c : tensor", "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32") == []
    )


# One matrix product, as each stage and target of the compiler writes it.
TTIR = "%c = tt.dot %a, %b, %acc{} : tensor<64x32xf32> * tensor<32x64xf32> -> tensor<64x64xf32>"
WGMMA = "%c = ttng.warp_group_dot %a, %b, %acc {inputPrecision = 0 : i32, isAsync = true} : tensor<64x32xf32>"
WAIT = "%c = ttng.warp_group_dot_wait %c, %b {pendings = 0 : i32} : tensor<64x64xf32>"
TCGEN05 = "%t = ttng.tc_gen5_mma %a, %b, %acc[], %true, %true {is_async} : !ttg.memdesc<64x32xf32>"


def test_the_precision_of_every_product_is_read() -> None:
    assert aot.products(TTIR.format("")) == ["ieee"]
    assert aot.products(TTIR.format(", inputPrecision = tf32x3")) == ["tf32x3"]
    assert aot.products("\n".join([WGMMA, WAIT, WGMMA])) == ["tf32", "tf32"]
    assert aot.products(TCGEN05) == ["tf32"]
    assert aot.products(TCGEN05.replace("f32", "f16")) == ["ieee"]
    assert aot.products("%c = arith.addf %a, %b : tensor<64x64xf32>") == []


def test_three_products_in_tf32_make_one() -> None:
    asked = TTIR.format(", inputPrecision = tf32x3")
    one = TTIR.format(", inputPrecision = tf32")
    for made in (one, WGMMA, TCGEN05):
        assert aot.precision_violations("tf32x3", asked, "\n".join([made] * 3), "") == []
        for bad in (made, "\n".join([made] * 2), "\n".join([made, made, TTIR.format("")]), ""):
            assert aot.precision_violations("tf32x3", asked, bad, "") != []
    assert aot.precision_violations("tf32x3", "", "", "") != []
    assert aot.precision_violations("tf32x3", one, "\n".join([one] * 3), "") != []


def test_ieee_means_no_other_product() -> None:
    plain, reduced = TTIR.format(""), TTIR.format(", inputPrecision = tf32")
    assert aot.precision_violations("ieee", plain, plain, "fma.rn.f32") == []
    assert aot.precision_violations("ieee", plain, "", "fma.rn.f32") != []
    for ttgir, assembly in ((reduced, ""), (WGMMA, ""), (TCGEN05, ""), (plain, "mma.sync.m16n8k8.f32.tf32.tf32.f32")):
        assert aot.precision_violations("ieee", plain, ttgir, assembly) != []
    assert aot.precision_violations(None, "", "", "") == []


if __name__ == "__main__":
    print(json.dumps([_build_rule_breakers(), _build_sizes_of_one(), _build_largest(), _cases()]))
