"""``lipgan doctor``: which backend serves each op here, and why the others do not."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from lipgan.commands.console import find_device
from lipgan.ops._backend import BACKENDS, FORMS, PASSES, PREFERRED, cuda, explain, native, resolve, serving

__all__ = ["advice", "main", "report"]


def main(args: argparse.Namespace) -> None:
    """Print the report; ``args.device`` adds the rows of that device."""
    if args.device is not None:
        find_device(args.device)
    print(report(args.device))


def report(device: str | None = None) -> str:
    """What is installed; for each op and device the backend of each pass; what a person can do about the rest.

    Args:
        device: a device to report on beside the CPU, and CUDA where there is one.
    """
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
    if device is not None and torch.device(device).type not in devices:
        devices.append(torch.device(device).type)
    lines = [
        f"lipgan     {_version('lipgan')}",
        f"python     {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch      {torch.__version__}, {torch.get_num_threads()} threads",
        f"triton     {_version('triton')}",
        f"lipgan._C  {_native()}",
        f"_cuda      {_cuda()}",
        f"memory     {_memory()}",
        f"LIPGAN_BACKEND  {os.environ.get('LIPGAN_BACKEND') or 'not set: the best available'}",
    ]
    for op, forms in FORMS.items():
        for kind in devices:
            lines.append(f"\n{op} on {kind}: {_serving(op, kind)}")
            lines += [
                f"  {backend:<10} {_state(op, backend, kind)}" for backend in BACKENDS if backend in forms["forward"]
            ]
            missing = [backend for backend in BACKENDS if backend not in forms["forward"]]
            if missing:
                lines.append(f"  {', '.join(missing)}: no form of this op")
            if kind == "cuda" and op in PREFERRED and explain(op, "cuda", kind) is None:
                lines.append(f"  without a choice cuda serves {PREFERRED[op]}")
    return "\n".join([*lines, "", *advice()])


def advice() -> list[str]:
    """One line for each thing that keeps a faster backend from serving and that a person can change."""
    lines = []
    if native() is None:
        lines.append(
            f"compiler missing: {explain('spectral_norm', 'native', 'cpu')}; with a C++ compiler installed, "
            "reinstall lipgan, and ops on the CPU are several times as fast"
        )
    if not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            lines.append(
                "GPU not visible: this torch is built for CPUs only; install its CUDA or ROCm build to use one"
            )
        else:
            lines.append(
                "GPU not visible: torch finds none; look at nvidia-smi (or rocm-smi) for the driver, and at "
                "CUDA_VISIBLE_DEVICES"
            )
    elif importlib.util.find_spec("triton") is None:
        forms = ", ".join(op for op in FORMS if explain(op, "cuda", "cuda") is None)
        by_cuda = f"CUDA C++ in {forms}, else by " if forms else ""
        lines.append(f"Triton missing: GPU tensors are served by {by_cuda}the reference; pip install triton")
    return lines or ["nothing to mend: the fastest backend serves every op on every device here"]


def _serving(op: str, device: str) -> str:
    """The backend of each pass of an op."""
    try:
        chosen = resolve(op, None, device)
    except RuntimeError as error:
        return f"none. {error}"
    derivatives = [f"{name} {serving(op, name, chosen, device)}" for name in PASSES[1:] if name in FORMS[op]]
    return f"{chosen} ({', '.join(derivatives) or 'not differentiable'})"


def _state(op: str, backend: str, device: str) -> str:
    return explain(op, backend, device) or "available"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed" if importlib.util.find_spec(package) is None else "from source"


def _memory() -> str:
    """What this process keeps of outputs that are gone."""
    module = native()
    if module is None:
        return "nothing is kept for outputs without lipgan._C"
    kept = module.cached_bytes() / 2**20
    return f"{kept:.0f} MiB kept for outputs, of at most 1024; lipgan.ops.empty_cache() frees it"


def _native() -> str:
    module = native()
    if module is None:
        return str(explain("spectral_norm", "native", "cpu"))
    pool = "PyTorch's own threads (OpenMP)" if module.thread_pool() == "openmp" else "threads of its own"
    return f"instruction set {module.isa()} of {', '.join(module.supported_isas())}; {pool}"


def _cuda() -> str:
    module = cuda()
    if module is None:
        return str(explain("spectral_norm", "cuda", "cuda"))
    return "built" if torch.cuda.is_available() else "built; no GPU or driver is visible"
