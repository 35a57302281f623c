"""``lipgan doctor``: which backend serves each op here, and why the others do not."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from lipgan.commands.console import find_device
from lipgan.ops import BACKENDS, explain, resolve
from lipgan.ops._backend import cuda, native

OPS = ("spectral_norm", "gradient_penalty", "mlp_gradient_penalty", "matrix_sqrt", "nearest_neighbours")


def main(args: argparse.Namespace) -> None:
    """Print the report; ``args.device`` adds the column of that device."""
    if args.device is not None:
        find_device(args.device)
    print(report(args.device))


def report(device: str | None = None) -> str:
    """What is installed, and for each op and device the backend that serves it.

    Args:
        device: a device to report on beside the CPU, and CUDA where there is one.
    """
    lines = [
        f"lipgan     {_version('lipgan')}",
        f"python     {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch      {torch.__version__}, {torch.get_num_threads()} threads",
        f"triton     {_version('triton')}",
        f"lipgan._C  {_native()}",
        f"_cuda      {_cuda()}",
        f"LIPGAN_BACKEND  {os.environ.get('LIPGAN_BACKEND') or 'not set: the best available'}",
    ]
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
    if device is not None and torch.device(device).type not in devices:
        devices.append(torch.device(device).type)
    for op in OPS:
        for kind in devices:
            try:
                lines.append(f"\n{op} on {kind}: {resolve(None, kind)}")
            except RuntimeError as error:
                lines.append(f"\n{op} on {kind}: none. {error}")
            for backend in BACKENDS:
                lines.append(f"  {backend:<10} {explain(backend, kind) or 'available'}")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed" if importlib.util.find_spec(package) is None else "from source"


def _native() -> str:
    module = native()
    if module is None:
        return str(explain("native", "cpu"))
    pool = "PyTorch's own threads (OpenMP)" if module.thread_pool() == "openmp" else "threads of its own"
    return f"instruction set {module.isa()} of {', '.join(module.supported_isas())}; {pool}"


def _cuda() -> str:
    module = cuda()
    if module is None:
        return str(explain("cuda", "cuda"))
    return "built" if torch.cuda.is_available() else "built; no GPU or driver is visible"
