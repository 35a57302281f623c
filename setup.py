"""The bridge from setuptools to CMake; everything else stands in pyproject.toml.

Environment:
  LIPGAN_NATIVE=auto|on|off  the CPU module ``lipgan._C``: auto skips it (with a warning) when it cannot be built,
                             on makes that an error, off leaves it out.
  LIPGAN_CUDA=auto|on|off    the CUDA module ``lipgan._cuda``: auto builds it where nvcc is found.
"""

import os
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
            configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc()}")
        for command in (configure, ["cmake", "--build", str(build)]):
            try:
                subprocess.run(command, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise CompileError(f"lipgan.{ext.target} was not built: {error}") from error


extensions = []
if choice("LIPGAN_NATIVE") != "off":
    extensions.append(CMakeExtension("lipgan._C", "_C", required=choice("LIPGAN_NATIVE") == "on"))
if choice("LIPGAN_CUDA") == "on" or (choice("LIPGAN_CUDA") == "auto" and nvcc()):
    extensions.append(CMakeExtension("lipgan._cuda", "_cuda", required=choice("LIPGAN_CUDA") == "on"))

setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})
