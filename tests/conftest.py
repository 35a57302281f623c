"""Set-up shared by all tests."""

import os

# The interpreter has to be chosen before the first `import triton`; ahead-of-time compilation runs in a subprocess.
# On a GPU the kernels themselves run.
if os.environ.get("LIPGAN_TEST_DEVICE", "").startswith("cuda"):
    os.environ.pop("TRITON_INTERPRET", None)
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lipgan.ops import _backend

try:
    import devices
except ValueError as error:  # LIPGAN_TEST_DEVICE
    raise pytest.UsageError(str(error)) from None
DEVICE = devices.DEVICE

# LIPGAN_TEST_POISON=1 runs every test with poisoned outputs.
POISON_ALL = os.environ.get("LIPGAN_TEST_POISON", "0") == "1"


TESTS = Path(__file__).parent
# Triton's interpreter, its compiler, an emulator of a GPU, and training. `make test` leaves them to `make test-all`.
SLOW_FOLDERS = {"kernels", "ptx", "systems", "training"}
# Whose trainers train on the device of the tests.
TRAINER_FOLDERS = {"systems", "training"}
# Their files import Triton, or kernels that do.
TRITON_FOLDERS = {"kernels", "ptx"}

if DEVICE.type != "cpu":
    devices.follow(DEVICE)
if DEVICE.type == "cuda":
    # Tests judge float32 as float32; cuDNN takes TF32 for convolutions unless it is told not to.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
if DEVICE.type == "emulated":
    devices.serve_as_cpu(DEVICE)

HAS_TRITON = importlib.util.find_spec("triton") is not None
collect_ignore_glob = [] if DEVICE.type == "emulated" else ["emulated/*"]
if HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1" and importlib.metadata.version("triton").startswith("3.6."):
    import interpreter

    interpreter.take_scalars_as_integers()
if not HAS_TRITON:
    collect_ignore_glob += [f"{folder}/*" for folder in sorted(TRITON_FOLDERS)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not HAS_TRITON:
        terminalreporter.write_line(
            f"Triton is not installed: left out tests/{', tests/'.join(sorted(TRITON_FOLDERS))}"
        )


def pytest_report_header() -> str:
    return f"device of the tests: {DEVICE}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {backend: _backend.explain("spectral_norm", backend, DEVICE.type) for backend in ("native", "triton")}
    missing["cuda module"] = None if importlib.util.find_spec("lipgan._cuda") else "lipgan._cuda is not built"
    left_out = {
        "cpu": None if DEVICE.type == "cpu" else f"about memory of the CPU, not of {DEVICE}",
        "hardware": "needs a device with memory of its own" if DEVICE.type == "emulated" else None,
        "interpreter": None if _backend.interpreted() else "needs Triton's interpreter, which a GPU does without",
    }
    for item in items:
        for name, reason in left_out.items():
            if reason is not None and item.get_closest_marker(name) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
        if item.path.relative_to(TESTS).parts[0] in SLOW_FOLDERS:
            item.add_marker(pytest.mark.slow)
        wanted = {mark.args[0] for mark in item.iter_markers("backend")}
        # Tests of several backends name them as parameters.
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        wanted.update(value for value in parameters if isinstance(value, str) and value in missing)
        for backend in wanted:
            if missing[backend] is not None:
                item.add_marker(pytest.mark.skip(reason=missing[backend]))


@pytest.fixture(autouse=POISON_ALL)
def poisoned_outputs() -> Iterator[None]:
    """Fill every ``torch.empty``, and every output of the C++ kernels, with NaN: an element not written shows."""
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all(), "torch no longer poisons uninitialized memory"
    if _backend.native() is not None:
        _backend.serving_native()  # also for a test that calls lipgan._C itself
    yield
    torch.use_deterministic_algorithms(before, warn_only=warned)
    if _backend.native() is not None:
        _backend.serving_native()


@pytest.fixture
def device() -> torch.device:
    """The device that the tests run on: ``LIPGAN_TEST_DEVICE``."""
    return DEVICE


@pytest.fixture(autouse=True)
def _trainers_follow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers that name no device train on the device of the tests; data sets stay on the CPU."""
    if DEVICE.type != "cpu" and request.path.relative_to(TESTS).parts[0] in TRAINER_FOLDERS:
        from lipgan.training import Trainer

        for make in (Trainer.__init__, Trainer.from_recipe.__func__, Trainer.load.__func__):  # type: ignore[attr-defined]
            monkeypatch.setitem(make.__kwdefaults__, "device", DEVICE)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def single_thread() -> Iterator[None]:
    """Networks this small lose more by handing work to a second thread, on shared cores, than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
