"""What nvcc makes of csrc/cuda/*.cu: it compiles, within the register budget, to 16-byte loads."""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURES = [80, 90, 100]
DTYPES = {"float": "f", "double": "d", "float16": "6__half", "bfloat16": "13__nv_bfloat16"}  # and mangled

ITEMSIZES = {"float": 4, "double": 8, "float16": 2, "bfloat16": 2}

# Two blocks of 256 threads on a multiprocessor of 65536 registers: 65536 / 512. A cooperative grid is as large as
# what is resident, so that a kernel above this would run with half the warps.
REGISTER_BUDGET = 128


def toolkit_program(name: str) -> str | None:
    default = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / name
    return shutil.which(name) or (str(default) if default.exists() else None)


def triton_program(name: str) -> str | None:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
    return str(bundled) if bundled.exists() else None


NVCC = toolkit_program("nvcc")
CUOBJDUMP = toolkit_program("cuobjdump") or triton_program("cuobjdump")

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


# Source -> its kernels, and of how many forms each is beside the dtypes.
SOURCES = {
    "spectral_norm": {"spectral_norm_fwd_kernel": 1, "spectral_norm_bwd_kernel": 1},
    "gradient_penalty": {"gradient_penalty_fwd_kernel": 3, "gradient_penalty_interpolate_kernel": 2},
}

_compiled: dict[str, tuple[Path, str]] = {}


@pytest.fixture
def compile_(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str]]:
    """Of a source the object file and the log of ptxas; made once."""

    def compiled(source: str) -> tuple[Path, str]:
        if source not in _compiled:
            output = tmp_path_factory.mktemp("nvcc") / f"{source}.o"
            command = [
                NVCC, "-std=c++17", "-O3", "-Xptxas", "-v", "--threads", "2", "-I", str(ROOT / "csrc" / "include"),
                *(f"--generate-code=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES),
                "-c", str(ROOT / "csrc" / "cuda" / f"{source}.cu"), "-o", str(output),
            ]  # fmt: skip
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            _compiled[source] = output, result.stdout + result.stderr
        return _compiled[source]

    return compiled


def sass_of(output: Path, architecture: int) -> list[str]:
    """The functions of an object file."""
    command = [CUOBJDUMP, "-sass", "-arch", f"sm_{architecture}", str(output)]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.split(r"\bFunction : ", sass)[1:]


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_registers_and_spills(compile_: Callable[[str], tuple[Path, str]], source: str) -> None:
    entries = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        compile_(source)[1],
        flags=re.DOTALL,
    )
    for kernel, forms in SOURCES[source].items():
        built = {(name, int(architecture)) for name, architecture, *_ in entries if kernel in name}
        assert len(built) == forms * len(DTYPES) * len(ARCHITECTURES)
    for name, architecture, stores, loads, registers in entries:
        assert (int(stores), int(loads)) == (0, 0), f"{name} spills on sm_{architecture}"
        assert int(registers) <= REGISTER_BUDGET, f"{name} uses {registers} registers on sm_{architecture}"


@pytest.mark.slow
@pytest.mark.skipif(CUOBJDUMP is None, reason="needs cuobjdump")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sixteen_byte_accesses(compile_: Callable[[str], tuple[Path, str]], architecture: int) -> None:
    functions = sass_of(compile_("spectral_norm")[0], architecture)
    for dtype, mangled in DTYPES.items():
        (text,) = [f for f in functions if f"spectral_norm_fwd_kernelI{mangled}EE" in f.split("\n", 1)[0]]
        # Two passes over the rows of a tile load 4 rows at a time, twice; the scaling loads and stores at least one.
        assert len(re.findall(r"\bLDG\.E\.128\b", text)) >= 17, dtype
        assert len(re.findall(r"\bSTG\.E\.128\b", text)) >= 1, dtype
        (text,) = [f for f in functions if f"spectral_norm_bwd_kernelI{mangled}EE" in f.split("\n", 1)[0]]
        # The sums ask for 4 packs of both arrays at once.
        assert len(re.findall(r"\bLDG\.E\.128\b", text)) >= 8 + 1, dtype
        assert len(re.findall(r"\bSTG\.E\.128\b", text)) >= 1, dtype
        assert not re.search(r"\b(?:LDL|STL)\b", text), f"{dtype}: the rows of the launch are copied to local memory"


@pytest.mark.slow
@pytest.mark.skipif(CUOBJDUMP is None, reason="needs cuobjdump")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sixteen_byte_accesses_of_the_penalty(compile_: Callable[[str], tuple[Path, str]], architecture: int) -> None:
    functions = sass_of(compile_("gradient_penalty")[0], architecture)
    for dtype, mangled in DTYPES.items():
        for lying in (0, 1):  # rows, long rows
            (text,) = [
                f for f in functions if re.search(rf"fwd_kernelI{mangled}\w*LyingE{lying}EE", f.split("\n", 1)[0])
            ]
            # Four at once for the squares and for the cotangent, one at a time for the rest; some stores are shared.
            assert len(re.findall(r"\bLDG\.E\.128\b", text)) >= 2 * (4 + 1), dtype
            assert len(re.findall(r"\bSTG\.E\.128\b", text)) >= 4, dtype
            assert not re.search(r"\b(?:LDL|STL)\b", text), f"{dtype}: something lies in local memory"
        for width in (1, 16 // ITEMSIZES[dtype]):
            name = f"interpolate_kernelI{mangled}Li{width}EE"
            (text,) = [f for f in functions if name in f.split("\n", 1)[0]]
            assert (len(re.findall(r"\bLDG\.E\.128\b", text)) >= 2 * 4) == (width > 1), dtype
