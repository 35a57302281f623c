"""The bridge from setuptools to CMake; everything else stands in pyproject.toml.

Environment:
  LIPGAN_NATIVE=auto|on|off  the CPU module ``lipgan._C``: auto skips it (with a warning) when it cannot be built,
                             on makes that an error, off leaves it out.
  LIPGAN_CUDA=auto|on|off    the CUDA module ``lipgan._cuda``: auto builds it where nvcc is found.
  LIPGAN_CUDA_ARCHITECTURES  what it is built for, as CMake names them, such as "90-real" or "80-real;90", or "native"
                             for the GPU of this machine; by default those that stand in CMakeLists.txt.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()


def choice(variable: str) -> str:
    value = os.environ.get(variable, "auto").lower()
    if value not in {"auto", "on", "off"}:
        raise SystemExit(f"{variable} must be auto, on or off, got {value!r}")
    return value


def architectures() -> str | None:
    value = os.environ.get("LIPGAN_CUDA_ARCHITECTURES", "").replace(",", ";").strip()
    if not value:
        return None
    if value != "native" and not all(re.fullmatch(r"\d+[a-z]?(-real|-virtual)?", name) for name in value.split(";")):
        raise SystemExit(
            f"LIPGAN_CUDA_ARCHITECTURES must be native, or names such as 90-real separated by semicolons, got {value!r}"
        )
    return value


def nvcc() -> str | None:
    default = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    return shutil.which("nvcc") or (str(default) if default.exists() else None)


class CMakeExtension(Extension):
    def __init__(self, name: str, target: str, required: bool) -> None:
        super().__init__(name, sources=[], optional=not required)
        self.target = target


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        assert isinstance(ext, CMakeExtension)
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = Path(self.build_temp).resolve() / ext.target
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DLIPGAN_TARGET={ext.target}",
            f"-DLIPGAN_OUTPUT_DIR={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        if ext.target == "_cuda":
            chosen = architectures()
            # Without a choice, none of an earlier build either.
            option = "-UCMAKE_CUDA_ARCHITECTURES" if chosen is None else f"-DCMAKE_CUDA_ARCHITECTURES={chosen}"
            configure += [f"-DCMAKE_CUDA_COMPILER={nvcc()}", option]
        for command in (configure, ["cmake", "--build", str(build)]):
            try:
                subprocess.run(command, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise CompileError(f"lipgan.{ext.target} was not built: {error}") from error


architectures()  # refuses what it does not know before anything is built
extensions = []
if choice("LIPGAN_NATIVE") != "off":
    extensions.append(CMakeExtension("lipgan._C", "_C", required=choice("LIPGAN_NATIVE") == "on"))
if choice("LIPGAN_CUDA") == "on" or (choice("LIPGAN_CUDA") == "auto" and nvcc()):
    extensions.append(CMakeExtension("lipgan._cuda", "_cuda", required=choice("LIPGAN_CUDA") == "on"))

setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})
