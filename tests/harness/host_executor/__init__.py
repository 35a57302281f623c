"""Compiles CUDA C++ for the CPU (see cuda_host.h) and loads it."""

import ctypes
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
GXX = shutil.which("g++")
NO_GXX = "the host executor needs g++"


def build(source: str, directory: Path) -> ctypes.CDLL:
    """Compile ``source``, which may include files of ``csrc``, in ``directory`` and load the result."""
    assert GXX is not None
    unit, library = directory / "unit.cpp", directory / "unit.so"
    unit.write_text(source)
    command = [
        GXX, "-std=c++17", "-O1", "-fPIC", "-shared", "-fno-strict-aliasing", "-ffp-contract=off",
        # Dynamic shared memory has no initializer to call; two loaded modules share no variables.
        "-fno-extern-tls-init", "-fno-gnu-unique",
        "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-clobbered",
        f"-I{HERE}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}", str(unit), "-o", str(library),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loaded = ctypes.CDLL(str(library))
    loaded.host_executor_message.restype = ctypes.c_char_p
    return loaded


def configure(library: ctypes.CDLL, *, multiprocessors: int, seed: int) -> None:
    """Set the size of a cooperative grid, and the order: 0 forward, 1 backward, others shuffled."""
    library.host_executor_configure(multiprocessors, ctypes.c_uint(seed))
