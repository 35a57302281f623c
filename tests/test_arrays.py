"""The reader of NumPy's files: what is refused by its header, and what damaged files raise."""

import io
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lipgan import _arrays, data
from lipgan._arrays import archive, mapped
from lipgan.metrics import FeatureStats


class Unpickled:
    """Raises where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return exec, ("raise SystemError('a file was unpickled')",)


def npy(array: object, *, pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(array), allow_pickle=pickle)
    return buffer.getvalue()


def header(text: str, *, version: int = 1) -> bytes:
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2 * version, "little") + text.encode()


def claim(shape: str) -> bytes:
    return header(f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}}}")


def npz(compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def packed_zeros(path: Path, before: bytes, size: int) -> None:
    """An .npz file whose sigma is ``before`` and ``size`` bytes of zeros, that takes a thousandth of them."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("mu.npy", npy(np.zeros(3)))
        with file.open("sigma.npy", "w", force_zip64=True) as member:
            member.write(before)
            for begin in range(0, size, 2**20):
                member.write(bytes(min(2**20, size - begin)))


STATISTICS = npz(mu=npy(np.zeros(3)), sigma=npy(np.eye(3)), count=npy(np.int64(9)), ddof=npy(np.int64(1)))
SAMPLES = npz(zipfile.ZIP_DEFLATED, x=npy(np.zeros((4, 5, 5), np.float32)), y=npy(np.arange(4)))


def encrypted(content: bytes) -> bytes:
    """``content`` with the bit of encrypted members, in the directory and in the members."""
    changed = bytearray(content)
    for signature, place in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        begin = content.find(signature)
        while begin >= 0:
            changed[begin + place] |= 1
            begin = content.find(signature, begin + 1)
    return bytes(changed)


def misdirected(content: bytes) -> bytes:
    """``content`` whose directory is said to begin where the file is over."""
    end = content.rindex(b"PK\x05\x06")
    size, _ = struct.unpack("<LL", content[end + 12 : end + 20])
    return content[: end + 12] + struct.pack("<LL", size + 10**6, 0) + content[end + 20 :]


DAMAGED = {
    "token": (npz(mu=header("{'descr': '''"), sigma=npy(np.eye(3))), "header of an array is damaged"),
    "brackets": (npz(mu=header("(" * 9000), sigma=npy(np.eye(3))), "header of an array is damaged"),
    "long header": (npz(mu=header(" " * 20_000, version=2), sigma=npy(np.eye(3))), "longer than 10000 bytes"),
    "format": (npz(mu=b"\x93NUMPY\x07\x00", sigma=npy(np.eye(3))), "arrays of format 7.0 are not read"),
    "negative": (npz(mu=claim("(-3,)"), sigma=npy(np.eye(3))), r"shape \(-3,\)"),
    "claims": (npz(mu=claim("(99999999999,)"), sigma=npy(np.eye(3))), "the array mu is cut off"),
    "objects": (npz(mu=npy([Unpickled()] * 3, pickle=True), sigma=npy(np.eye(3))), "Python objects"),
    "lzma": (npz(zipfile.ZIP_LZMA, mu=npy(np.zeros(3)), sigma=npy(np.eye(3))), "a way that NumPy does not write"),
    "encrypted": (encrypted(STATISTICS), "is encrypted"),
    "directory": (misdirected(STATISTICS), "is no file of feature statistics"),
    "no archive": (b"hello", "not an .npz archive"),
    "cut off": (STATISTICS[:-9], "is no file of feature statistics"),
    "nothing": (npz(), "it has no array 'mu', only none"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_one_sentence_with_the_name_of_the_file(name: str, tmp_path: Path) -> None:
    content, message = DAMAGED[name]
    path = tmp_path / "stats.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        FeatureStats.load(path)
    assert str(caught.value).startswith(f"{path} is no file of feature statistics: ")


def traced(function: Callable[[], object]) -> int:
    """The most bytes that NumPy and Python held at once within the call."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refused(path: Path, message: str) -> Callable[[], None]:
    def load() -> None:
        with pytest.raises(ValueError, match=message):
            FeatureStats.load(path)

    return load


def test_statistics_of_other_shapes_are_not_read(tmp_path: Path) -> None:
    side = 2000  # 32 MB
    packed_zeros(tmp_path / "a.npz", claim(f"({side}, {side})"), 8 * side**2)
    assert (tmp_path / "a.npz").stat().st_size < 10**5
    assert traced(refused(tmp_path / "a.npz", r"sigma must have shape \(3, 3\), got \(2000, 2000\)")) < 2 * 10**6


def test_a_header_of_megabytes_is_not_read(tmp_path: Path) -> None:
    size = 2**25
    packed_zeros(tmp_path / "a.npz", b"\x93NUMPY\x02\x00" + size.to_bytes(4, "little"), size)
    assert traced(refused(tmp_path / "a.npz", "longer than 10000 bytes")) < 2 * 10**6


def test_what_does_not_fit_into_memory_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_arrays, "available_memory", lambda: 8 * 3 * 500**2 - 1)
    np.savez_compressed(tmp_path / "a.npz", mu=np.zeros(500), sigma=np.zeros((500, 500)))
    message = "features of length 500 take .* GiB of memory"
    assert traced(refused(tmp_path / "a.npz", message)) < 10**6
    # Huge images of which small samples are wanted.
    np.savez_compressed(tmp_path / "b.npz", x=np.zeros((1, 3000, 3000), np.uint8))
    with pytest.raises(ValueError, match=r"b.npz cannot be used: the array x of shape \[1, 3000, 3000\] alone"):
        data.load(str(tmp_path / "b.npz"), 8)
    np.save(tmp_path / "c.npy", np.zeros((2000, 1000), np.float32))
    with pytest.raises(ValueError, match=r"c.npy cannot be used: it holds 2000 samples of shape \[1000\]"):
        data.load(str(tmp_path / "c.npy"))
    monkeypatch.setattr(_arrays, "available_memory", lambda: None)
    assert FeatureStats.load(tmp_path / "a.npz").dim == 500
    assert data.load(str(tmp_path / "b.npz"), 8).shape == (1, 8, 8)


def test_available_memory_is_a_plausible_number() -> None:
    there = _arrays.available_memory()
    assert there is None or 2**20 < there < 2**50


def test_large_images_are_read_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 6, 6), np.uint8)
    np.save(tmp_path / "a.npy", images)
    whole = data.load(str(tmp_path / "a.npy")).samples
    monkeypatch.setattr("lipgan.data.files._NUMBERS", 80)
    assert data.load(str(tmp_path / "a.npy")).samples.equal(whole)


# --- bytes that are changed by chance

READERS: dict[str, tuple[str, bytes, Callable[[Path], object]]] = {
    "statistics": (".npz", STATISTICS, FeatureStats.load),
    "samples": (".npz", SAMPLES, lambda path: data.load(str(path))),
    "vectors": (".npy", npy(np.zeros((3, 2))), lambda path: data.load(str(path))),
    "objects": (".npy", npy([Unpickled()] * 3, pickle=True), lambda path: data.load(str(path))),
}


@st.composite
def mutated(draw: st.DrawFn, content: bytes) -> bytes:
    """``content`` with bytes changed, left out and put in, and cut off."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(changed)))
        kind = draw(st.sampled_from(("change", "change", "cut", "insert", "remove")))
        if kind == "change":
            changed[place : place + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "insert":
            changed[place:place] = draw(st.binary(max_size=40))
        elif kind == "remove":
            del changed[place : place + draw(st.integers(1, 40))]
        else:
            del changed[place:]
    return bytes(changed)


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choice=st.data())
def test_changed_bytes_raise_one_sentence(name: str, tmp_path: Path, choice: st.DataObject) -> None:
    suffix, content, read = READERS[name]
    path = tmp_path / f"fuzz{suffix}"
    path.write_bytes(choice.draw(mutated(content)))
    try:
        read(path)
    except (ValueError, OSError) as error:
        message = str(error)
    else:
        message = str(path)
    assert str(path) in message


def test_an_error_of_the_system_keeps_its_kind(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.npz"), archive(tmp_path / "a.npz", "is wrong"):
        pass
    with pytest.raises(FileNotFoundError, match=r"a\.npy"), mapped(tmp_path / "a.npy", "is wrong"):
        pass


def test_no_memory_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(STATISTICS)
    for error in (MemoryError(), RuntimeError("not enough memory: you tried to allocate 9 bytes")):
        with pytest.raises(type(error)), archive(tmp_path / "a.npz", "is wrong"):
            raise error
