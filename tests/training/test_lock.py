"""The lock of a run's folder: one holder, and locks of processes that are gone."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lipgan.training import lock
from lipgan.training.lock import LOCK, FolderInUseError, locked


def no_system_locks(*args: Any) -> None:
    raise OSError(errno.EOPNOTSUPP, "no locks here")


def test_the_lock_says_who_holds_it_and_goes_with_its_holder(tmp_path: Path) -> None:
    with locked(tmp_path):
        owner = json.loads((tmp_path / LOCK).read_text())
        assert (owner["pid"], owner["host"]) == (os.getpid(), socket.gethostname())
        with pytest.raises(FolderInUseError, match=f"is in use by process {os.getpid()} on .* since 2"):
            locked(tmp_path).__enter__()
        assert json.loads((tmp_path / LOCK).read_text()) == owner
    assert not (tmp_path / LOCK).exists()
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"{}", b'{"pid": "x", "host": 3}', b"[" * 5000])
def test_any_file_of_that_name_that_nobody_holds_is_taken_over(content: bytes, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_bytes(content)
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_lock_that_is_held_but_says_nothing_is_a_lock(tmp_path: Path) -> None:
    with (tmp_path / LOCK).open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(FolderInUseError, match="in use by another process; if that process is gone, remove"):
            locked(tmp_path).__enter__()


def test_a_lock_that_its_holder_removes_while_it_is_opened_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, calls = fcntl.flock, []

    def removed_once(descriptor: int, operation: int) -> None:
        if not calls:
            (tmp_path / LOCK).unlink()
        calls.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_once)
    with locked(tmp_path):
        assert len(calls) == 2
        assert (tmp_path / LOCK).exists(), "the lock is of the file that others find"


@pytest.fixture
def dead() -> int:
    """The number of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("case", ["dead", "alive", "number given again", "another host"])
def test_where_the_file_system_has_no_locks_the_process_decides(
    case: str, dead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", no_system_locks)
    owner: dict[str, Any] = {"pid": os.getpid(), "host": socket.gethostname(), "began": lock._began(os.getpid())}
    if case == "dead":
        owner["pid"] = dead
    elif case == "number given again":
        owner["began"] += 1
    elif case == "another host":
        owner |= {"pid": dead, "host": "elsewhere"}
    (tmp_path / LOCK).write_text(json.dumps(owner))
    if case in ("alive", "another host"):
        with pytest.raises(FolderInUseError, match=f"process {owner['pid']} on {owner['host']}; if .* gone, remove"):
            locked(tmp_path).__enter__()
        assert json.loads((tmp_path / LOCK).read_text()) == owner
    else:
        with locked(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
