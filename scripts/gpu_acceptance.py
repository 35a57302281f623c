"""Everything that only a GPU can tell about this package, in one run of at most nine minutes without a network.

    python scripts/gpu_acceptance.py --out build/gpu

needs a checkout, an NVIDIA GPU, Python with torch and Triton, and for the rest what it finds: without nvcc, cmake,
pytest or compute-sanitizer, a stage says "not here" and why, and the others run. The package is built for the
architecture of this GPU only, into the folder, and the environment stays as it is.

Stages are processes with a time limit each; the last ones, which take no times, run side by side. At its limit a stage
is interrupted, so that it can tell what it has found so far, then killed with all that it started. After each of them
the folder holds ``results.json``, whole at any time, and ``report.md``, tables for docs/measurements.md. The exit
status is 1 when a stage failed, 2 without a GPU.

``--device cpu`` runs the substitutes on a machine without a GPU: the same checks where the CPU has a form of them, with
the kernels that run there (Triton's in its interpreter).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CHECKS = Path(__file__).with_name("gpu_checks.py")

PASSED, FAILED, NOT_HERE = "passed", "failed", "not here"
# How a check ends its output.
MARK = "RESULT "


@dataclass
class Result:
    """What a stage left: why it failed or is not here, the tables it made, the end of what it printed."""

    stage: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    tables: list[dict[str, Any]] = field(default_factory=list)
    output: str = ""


@dataclass(frozen=True)
class Stage:
    """A process of its own.

    Attributes:
        name: of the stage.
        seconds: its limit.
        command: its arguments, for a device; None where the device has no form of it.
        missing: why it cannot run here, or None.
        environment: set for the process.
        beside: whether it runs beside the stages next to it that do so, too: it takes no times.
    """

    name: str
    seconds: float
    command: Callable[[str, Path], list[str] | None]
    missing: Callable[[str], str | None] = lambda device: None
    environment: Callable[[str], dict[str, str]] = lambda device: {}
    beside: bool = False


# ---- what is here ----


def search_path() -> str:
    """Where programs are looked for: pip puts CMake and Ninja beside Python, which need not be on PATH."""
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), str(cuda)])


def program(name: str) -> str | None:
    return shutil.which(name, path=search_path())


def without_modules(*names: str) -> str | None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return f"the environment has no {', '.join(missing)}" if missing else None


def build_missing(device: str) -> str | None:
    if device == "cpu":
        return "the package is taken as it is installed"
    return without_modules("pip", "setuptools")


def sanitizer_missing(device: str) -> str | None:
    if device == "cpu":
        return "it watches a GPU; tests/ptx does so in an emulator"
    return None if program("compute-sanitizer") else "compute-sanitizer is not installed"


def graphs_missing(device: str) -> str | None:
    return "a CPU has no graphs; tests/emulated counts what a step would wait for" if device == "cpu" else None


def gpu_missing() -> str | None:
    """Why there is no GPU to run on, as torch tells it."""
    code = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.device_count())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if told.returncode != 0:
        return f"{sys.executable} has no torch: {(told.stderr.strip().splitlines() or ['no reason given'])[-1]}"
    version, cuda, count = told.stdout.split()[-3:]
    if count != "0":
        return None
    return f"torch {version} (CUDA {cuda}) finds no GPU; --device cpu runs the substitutes"


# ---- the stages ----


def check(name: str) -> Callable[[str, Path], list[str] | None]:
    return lambda device, out: [sys.executable, str(CHECKS), name, "--device", device]


def build(device: str, out: Path) -> list[str]:
    # What a compiler says stands in the log.
    return [sys.executable, "-m", "pip", "install", "--verbose", "--no-build-isolation", "--no-deps", "--no-index",
            "--disable-pip-version-check", "--target", str(out / "site"), "--upgrade", str(ROOT)]  # fmt: skip


def build_environment(device: str) -> dict[str, str]:
    """Both modules where their compilers are, for this GPU only; Triton's kernels need neither.

    "auto": one that cannot be built takes nothing from the other stages. The stage "modules" says that it is missing.
    """
    wanted = wanted_modules(device)
    choices = {"LIPGAN_NATIVE": "auto" if "native" in wanted else "off", "LIPGAN_CUDA": "off"}
    if "cuda" not in wanted:
        return choices
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        major, minor = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0].split(".")
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return {**choices, "LIPGAN_CUDA": "auto"}
    return {**choices, "LIPGAN_CUDA": "auto", "LIPGAN_CUDA_ARCHITECTURES": f"{major}{minor}-real"}


def wanted_modules(device: str) -> list[str]:
    """The backends whose modules can be built here."""
    if device == "cpu" or program("cmake") is None or program("ninja") is None or without_modules("pybind11"):
        return []
    return ["native"] if program("nvcc") is None else ["native", "cuda"]


def modules(device: str, out: Path) -> list[str]:
    return [sys.executable, str(CHECKS), "modules", "--device", device, "--wanted", ",".join(wanted_modules(device))]


def pytest_of(device: str, out: Path) -> list[str]:
    chosen = ("ops", "linalg", "nn", "penalties", "metrics") if device == "cuda" else ("ops/test_backend.py",)
    paths = [str(ROOT / "tests" / name) for name in chosen]
    workers = min(8, os.cpu_count() or 1)
    spread = [] if workers == 1 or without_modules("xdist") else ["-n", str(workers), "--dist", "worksteal"]
    return [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "--tb=short",
            "-rfE", "--maxfail=300", *spread, "-m", "not slow", *paths]  # fmt: skip


def sanitized(tool: str) -> Callable[[str, Path], list[str] | None]:
    return lambda device, out: [str(program("compute-sanitizer")), "--tool", tool, "--error-exitcode", "7",
                                sys.executable, str(CHECKS), "small", "--device", device]  # fmt: skip


def interpreted(device: str) -> dict[str, str]:
    return {"TRITON_INTERPRET": "1"} if device == "cpu" else {}


def uncached(device: str) -> dict[str, str]:
    """Every tensor is an allocation of its own, so that a step beyond it shows."""
    return {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


GRAPHS = ("spectral-norm-forward", "spectral-norm-backward", "penalty", "perceptron", "critic-step")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")

# What takes times has the machine to itself. What Triton compiles for a stage is in the cache for the next.
STAGES = [
    Stage("build", 150, build, build_missing, build_environment),
    Stage("modules", 30, modules),
    Stage("doctor", 30, lambda device, out: [sys.executable, "-m", "lipgan", "doctor", "--device", device]),
    Stage("ceilings", 30, check("ceilings")),
    Stage("parity", 120, check("parity"), environment=interpreted),
    *(Stage(f"graph of {name}", 30, check(f"graph-{name}"), graphs_missing) for name in GRAPHS),
    Stage("graphed step", 40, check("graphed-step")),
    Stage("streams", 30, check("streams"), graphs_missing),
    Stage("two devices", 30, check("two-devices")),
    Stage("compile", 90, check("compile")),
    Stage("bench", 60, check("bench")),
    Stage("training", 60, check("training")),
    *(Stage(tool, 180, sanitized(tool), sanitizer_missing, uncached, beside=True) for tool in TOOLS),
    Stage("tests", 180, pytest_of, lambda device: without_modules("pytest", "hypothesis", "mpmath"), beside=True),
]  # fmt: skip


# ---- running them ----


# Seconds in which an interrupted stage may tell what it has found.
GRACE = 6


def waves(stages: Iterable[Stage]) -> list[list[Stage]]:
    """The stages that run at a time."""
    found: list[list[Stage]] = []
    for stage in stages:
        if stage.beside and found and found[-1][-1].beside:
            found[-1].append(stage)
        else:
            found.append([stage])
    return found


def run(stage: Stage, device: str, out: Path, seconds: float) -> Result:
    """The stage as a process, stopped with all that it started when the time is over. Never raises."""
    reason = stage.missing(device)
    command = stage.command(device, out) if reason is None else None
    if command is None:
        return Result(stage.name, NOT_HERE, reason or f"{device} has no form of it")
    if seconds < min(stage.seconds, 5):
        return Result(stage.name, NOT_HERE, "no time was left")
    limit, begin = min(stage.seconds, seconds), time.monotonic()
    environment = {**os.environ, "LIPGAN_TEST_DEVICE": device, "PYTHONDONTWRITEBYTECODE": "1", "PATH": search_path()}
    environment |= {"TRITON_CACHE_DIR": str(out / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(out / "inductor")}
    for variable in ("TRITON_INTERPRET", "LIPGAN_BACKEND", "CUDA_LAUNCH_BLOCKING"):
        environment.pop(variable, None)
    site = out / "site"
    if site.exists():
        environment["PYTHONPATH"] = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment.update(stage.environment(device))
    log = out / "logs" / f"{stage.name.replace(' ', '-')}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with log.open("w") as written:
            process = subprocess.Popen(
                command, cwd=out, env=environment, stdout=written, stderr=subprocess.STDOUT, start_new_session=True
            )
            code: int | None = None
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
            finally:
                if code is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        text = log.read_text(errors="replace")
    except OSError as error:
        return Result(stage.name, FAILED, f"it did not start: {error}", time.monotonic() - begin)
    return judged(stage.name, code, text, limit, time.monotonic() - begin)


def judged(name: str, code: int | None, text: str, limit: float, seconds: float) -> Result:
    """What the exit status (None: stopped at the limit) and the output of a stage say."""
    tables: list[dict[str, Any]] = []
    status, reason = (PASSED, "") if code == 0 else (FAILED, "")
    for line in text.splitlines():
        if line.startswith(MARK):
            told = json.loads(line.removeprefix(MARK))
            tables += told.get("tables", [])
            if told.get("status") and code == 0:
                status, reason = told["status"], told.get("reason", "")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(MARK)]
    if code is None:
        reason = f"it took more than its {limit:.0f} s"
    elif code != 0:
        reason = reason or (lines[-1][:300] if lines else f"exit status {code}")
    told_of = 20 if status == PASSED else 150
    return Result(name, status, reason, round(seconds, 1), tables, "\n".join(lines[-told_of:]))


def facts(device: str) -> dict[str, Any]:
    """What figures depend on beside the code; a program that is not there is left out."""
    found: dict[str, Any] = {"device": device, "python": platform.python_version(), "system": platform.platform()}
    for key, command in {
        "commit": ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
        "gpu": ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader"],
        "nvcc": [program("nvcc") or "nvcc", "--version"],
        "packages": [sys.executable, "-c", "import torch, numpy, importlib.metadata as m; print('torch', "
                     "torch.__version__, 'numpy', numpy.__version__, 'triton', m.version('triton'))"],
    }.items():  # fmt: skip
        try:
            told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            continue
        found[key] = told.splitlines()[-1] if told else ""
    return found


def write(path: Path, text: str) -> None:
    """The file as a whole, or the one that was there."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def markdown(machine: dict[str, Any], results: list[Result]) -> str:
    """The report: what ran on what, the stages, then their tables."""
    lines = [", ".join(f"{key} {value}" for key, value in machine.items()), ""]
    lines += ["| stage | result | seconds | |", "|---|---|---|---|"]
    for result in results:
        reason = result.reason.replace("|", "/")
        lines.append(f"| {result.stage} | {result.status} | {result.seconds:.1f} | {reason} |")
    for result in results:
        for table in result.tables:
            columns = table["columns"]
            lines += ["", table["title"], "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
            lines += [f"| {' | '.join(str(row.get(column, '')) for column in columns)} |" for row in table["rows"]]
    return "\n".join([*lines, ""])


def record(out: Path, machine: dict[str, Any], results: list[Result]) -> None:
    document = {"machine": machine, "stages": [asdict(result) for result in results]}
    write(out / "results.json", json.dumps(document, indent=2) + "\n")
    write(out / "report.md", markdown(machine, results))


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, type=Path, help="folder of results.json, report.md, logs and the build")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: %(default)s)")
    parser.add_argument("--stages", help=f"comma-separated; of: {', '.join(stage.name for stage in STAGES)}")
    parser.add_argument("--seconds", type=float, default=540, help="of the whole run (default: %(default)s)")
    options = parser.parse_args(given)
    names = [stage.name for stage in STAGES]
    options.chosen = names if options.stages is None else options.stages.split(",")
    for name in options.chosen:
        if name not in names:
            parser.error(f"--stages must be of {', '.join(names)}, got {name!r}")
    if not options.seconds > 0:
        parser.error(f"--seconds must be positive, got {options.seconds}")
    return options


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    reason = gpu_missing() if options.device == "cuda" else None
    if reason is not None:
        print(f"gpu_acceptance.py: {reason}", file=sys.stderr)
        return 2
    out, begin = options.out.resolve(), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    machine, results = facts(options.device), []
    for wave in waves(stage for stage in STAGES if stage.name in options.chosen):
        left = options.seconds - (time.monotonic() - begin) - GRACE
        with ThreadPoolExecutor(len(wave)) as pool:
            for future in as_completed([pool.submit(run, stage, options.device, out, left) for stage in wave]):
                result = future.result()
                results.append(result)
                record(out, machine, results)
                print(f"{result.stage:30} {result.status:9} {result.seconds:6.1f} s  {result.reason}", flush=True)
    print(f"{out / 'report.md'}")
    return 1 if any(result.status == FAILED for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
