"""What the tests with several processes share: a server that forks them, and has imported what takes seconds."""

import importlib.util
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from lipgan import _signals
from lipgan.__main__ import main

# Imported once for each process that runs tests, and not by each that they start. _dynamo is what
# DistributedDataParallel imports.
_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["torch.distributed", "torch._dynamo", "lipgan.commands.train", "lipgan.penalties"])


def run(function: Callable[..., None], *arguments: Any, processes: int = 2) -> None:
    """``function(rank, *arguments)`` in several processes of one thread; what one of them raises is raised here.

    A function of a test module: the processes find it by its file, since other packages have modules named tests, too.
    """
    file = sys.modules[function.__module__].__file__
    call = (file, function.__name__, *arguments)
    torch.multiprocessing.start_processes(_alone, call, processes, start_method="forkserver")


def _alone(rank: int, file: str, name: str, *arguments: Any) -> None:
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    getattr(module, name)(rank, *arguments)


def leave() -> None:
    """End a process of a gloo group whose results are written; it does not return.

    An ordinary end sometimes aborts ("terminate called without an active exception"): threads of the group are
    destroyed while they run.
    """
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)


class Command:
    """``lipgan ARGUMENTS`` in a process of its own, with the methods of a ``subprocess.Popen``.

    It has as many threads as this process: bits depend on how many threads share a sum.
    """

    def __init__(self, arguments: Sequence[str], **environment: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        files = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        self._files = files
        call = (list(arguments), environment, torch.get_num_threads(), *map(str, files))
        self._process = _FORKED.Process(target=_command, args=call)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has written, when it has ended."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"lipgan has not ended after {timeout} s: {self._files[1].read_text()}")
        out, err = (file.read_text() for file in self._files)
        return out, err


def _command(arguments: list[str], environment: dict[str, str], threads: int, out: str, err: str) -> None:
    os.environ.update(environment)
    # What the tests inherit from nohup, or from the background of a script, is not for the command.
    for number in _signals.STOPPING:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, stream)
        os.close(file)
    torch.set_num_threads(threads)
    sys.exit(main(arguments))
