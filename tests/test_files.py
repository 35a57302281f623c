"""Files are replaced whole; what is no file is written to and stays what it is."""

import os
import re
import socket
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lipgan import _files
from lipgan._files import check_destination, remove_leftovers, write_atomically


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    target, middle, link = tmp_path / "below" / "target", tmp_path / "below" / "middle", tmp_path / "link"
    middle.symlink_to("target")
    link.symlink_to(Path("below") / "middle")
    for content in (b"first, through a link to nothing", b"second"):
        check_destination(link)
        write_atomically(link, content)
        assert link.is_symlink()
        assert middle.is_symlink()
        assert target.read_bytes() == content
        assert not target.is_symlink()
    assert sorted(path.name for path in target.parent.iterdir()) == ["middle", "target"]


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    content = os.urandom(200_000)  # more than a pipe holds at once
    for path in (pipe, link):
        check_destination(path)
        with ThreadPoolExecutor(1) as pool:
            received = pool.submit(pipe.read_bytes)
            write_atomically(path, content)
            assert received.result(20) == content
        assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_device_is_written_to() -> None:
    """A terminal of one's own: unlike nodes of /dev, nothing is lost if it were replaced, and nobody has to be root."""
    reader, writer = os.openpty()
    try:
        terminal = Path(os.ttyname(writer))
        check_destination(terminal)
        write_atomically(terminal, b"gone")
        assert os.read(reader, 100) == b"gone"
        assert stat.S_ISCHR(terminal.lstat().st_mode)
        assert os.fstat(writer).st_rdev == terminal.lstat().st_rdev
    finally:
        os.close(reader)
        os.close(writer)


CHILD = """
import sys
from lipgan._files import check_destination, write_atomically
for path in sys.argv[1:]:
    check_destination(path)
    print("before", flush=True)
    write_atomically(path, b"content\\n")
print("after")
"""


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files have no names here")
@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_what_is_open_is_written_to(kind: str, tmp_path: Path) -> None:
    output = tmp_path / "output"
    command = [sys.executable, "-c", CHILD, "/dev/stdout", "/proc/self/fd/1"]
    with output.open("wb") as file:
        stdout = subprocess.PIPE if kind == "pipe" else file
        process = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=50)
    assert process.returncode == 0, process.stderr
    printed = process.stdout if kind == "pipe" else output.read_text()
    assert printed == "before\ncontent\nbefore\ncontent\nafter\n"
    assert list(tmp_path.iterdir()) == [output]


def test_what_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"kept")
    (tmp_path / "link").symlink_to(tmp_path / "no" / "file")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for name, reason in (
            ("folder", "it is a folder"),
            ("file/below", "Not a directory"),
            ("no/file", f"{tmp_path / 'no'} is not a folder"),
            ("link", f"{tmp_path / 'no'} is not a folder"),
            ("circle", "Too many levels of symbolic links"),
            ("socket", "it is a socket"),
        ):
            path = tmp_path / name
            with pytest.raises(ValueError, match=f"^{re.escape(str(path))} cannot be written: {re.escape(reason)}"):
                check_destination(path)
            with pytest.raises(OSError, match=r".") as caught:
                write_atomically(path, b"")
            assert caught.value.filename == str(path)
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_a_folder_in_which_nothing_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(_files.tempfile, "mkstemp", refuse)
    message = f"{tmp_path / 'x.json'} cannot be written: Read-only file system in {tmp_path}"
    with pytest.raises(ValueError, match=re.escape(message)):
        check_destination(tmp_path / "x.json")


def test_a_check_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"kept")
    for name in ("old", "new"):
        check_destination(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_bytes() == b"kept"


def test_leftovers(tmp_path: Path) -> None:
    gone = [".a.pt.abcd_123", ".b.json.00000000"]
    kept = [".a.pt.abcd", "a.pt", ".a.pt.ABCDEFGH", ".aXpt.abcdefgh", ".c.pt.abcdefgh", ".a.pt.abcdefgh.txt"]
    for name in gone + kept:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".a.pt.folder12").mkdir()
    remove_leftovers(tmp_path, ("a.pt", "b.json"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, ".a.pt.folder12"])
