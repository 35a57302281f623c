"""What nvcc makes of csrc/cuda/*.cu: it compiles, within the register budget, to 16-byte loads."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURES = [80, 90, 100]
DTYPES = {"float": "f", "double": "d", "float16": "6__half", "bfloat16": "13__nv_bfloat16"}  # and mangled

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


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The object file and the log of ptxas."""
    output = tmp_path_factory.mktemp("nvcc") / "spectral_norm.o"
    command = [
        NVCC, "-std=c++17", "-O3", "-Xptxas", "-v", "--threads", "2", "-I", str(ROOT / "csrc" / "include"),
        *(f"--generate-code=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES),
        "-c", str(ROOT / "csrc" / "cuda" / "spectral_norm.cu"), "-o", str(output),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return output, result.stdout + result.stderr


@pytest.mark.slow
def test_registers_and_spills(compiled: tuple[Path, str]) -> None:
    entries = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        compiled[1],
        flags=re.DOTALL,
    )
    for kernel in ("spectral_norm_fwd_kernel", "spectral_norm_bwd_kernel"):
        built = {(name, int(architecture)) for name, architecture, *_ in entries if kernel in name}
        assert len(built) == len(DTYPES) * len(ARCHITECTURES)
    for name, architecture, stores, loads, registers in entries:
        assert (int(stores), int(loads)) == (0, 0), f"{name} spills on sm_{architecture}"
        assert int(registers) <= REGISTER_BUDGET, f"{name} uses {registers} registers on sm_{architecture}"


@pytest.mark.slow
@pytest.mark.skipif(CUOBJDUMP is None, reason="needs cuobjdump")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sixteen_byte_accesses(compiled: tuple[Path, str], architecture: int) -> None:
    command = [CUOBJDUMP, "-sass", "-arch", f"sm_{architecture}", str(compiled[0])]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = re.split(r"\bFunction : ", sass)[1:]
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
