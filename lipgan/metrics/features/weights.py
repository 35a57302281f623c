"""Files of weights: where they are kept, whether they are the right ones, and what is in them. Nothing is unpickled."""

import errno
import hashlib
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["cached", "check_digest", "digest_in_name", "download", "read", "sha256_of"]

# What torch.hub, torchvision and pytorch-fid write into the names of files: the first digits of their SHA-256.
_DIGEST = re.compile(r"-([0-9a-f]{8,64})\.[^.]+$")
_HEX = re.compile(r"[0-9a-f]{8,64}")


def cached(url: str) -> Path:
    """Where torch.hub, and :func:`download`, keep the file at ``url``."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


def download(url: str, path: Path, sha256: str | None) -> None:
    """Fetch the file at ``url``; ValueError if its SHA-256 does not begin with ``sha256``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Into a temporary file, which is moved to its place once its checksum is right.
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except RuntimeError as error:  # what it raises for a wrong checksum
        raise ValueError(f"what came from {url} is not the published file: {error}") from error


def digest_in_name(name: str) -> str | None:
    """What the SHA-256 of a file of that name begins with, as far as the name says so."""
    match = _DIGEST.search(name)
    return None if match is None else match[1]


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def check_digest(path: Path, sha256: str | None) -> None:
    """ValueError unless the SHA-256 of the file begins with the digits given, or else with those in its name."""
    if sha256 is not None and not _HEX.fullmatch(sha256):
        raise ValueError(f"sha256 must be 8 to 64 digits from 0 to 9 and a to f, got {sha256!r}")
    wanted = digest_in_name(path.name) if sha256 is None else sha256
    if wanted is None:
        return
    digest = sha256_of(path)
    if not digest.startswith(wanted):
        words = "be" if len(wanted) == len(digest) else "begin with"
        raise ValueError(f"{path} is damaged or another file: its SHA-256 must {words} {wanted}, got {digest}")


def read(path: str | os.PathLike[str], sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors in a file by their names.

    Args:
        path: a .safetensors file; any other is read by torch.load without running code from it. The weights may lie
            under "state_dict" or "model", as programs save them beside an optimizer.
        sha256: what the file's SHA-256 begins with, 8 digits or more. None: those at the end of its name, as in
            resnet18-f37072fd.pth, if there are any.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another checksum, or something else in the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such file of weights", str(path))
    check_digest(path, sha256)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a parser fed with arbitrary bytes raises anything
        raise ValueError(f"{path} holds no weights that can be read without running code from it") from error
    if isinstance(state, dict):
        state = next((state[key] for key in ("state_dict", "model") if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} must hold a dict of tensors, got {type(state).__name__}")
    return state
