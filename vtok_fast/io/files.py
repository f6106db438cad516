"""Files: written whole or not at all, and read with a reason where they cannot be."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


def open_tensors(path: Path) -> tuple[Any, dict[str, str]]:
    """A safetensors file, mapped into memory, and its metadata. Raises FileNotFoundError, or ValueError for
    another file."""
    if not path.is_file():
        raise FileNotFoundError(f"path: no tokens file at {path}")
    try:
        file = safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"path: {path} is truncated or no safetensors file ({error})") from error
    return file, file.metadata() or {}


def checksum(digest: hashlib._Hash, data: Tensor) -> None:
    """Let a digest take in a tensor."""
    digest.update(f"{data.dtype}{tuple(data.shape)}".encode())
    digest.update(raw(data))


def raw(data: Tensor) -> memoryview | bytes:
    """The bytes of a contiguous tensor on the CPU."""
    return data.reshape(-1).view(torch.uint8).numpy().data if data.numel() else b""


# Of the types that tokens have, in safetensors
NAMES = {
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


def write_header(file: BinaryIO, header: dict[str, Any]) -> None:
    """As safetensors has it: the length as 8 bytes, then JSON, filled up so that the data is aligned. Unlike
    that library's own, it is the same every time."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def write_tensor(path: str | os.PathLike, name: str, data: Tensor, metadata: dict[str, str]) -> None:
    """A safetensors file of one contiguous tensor on the CPU."""
    size = data.numel() * data.element_size()
    entry = {"dtype": NAMES[data.dtype], "shape": list(data.shape), "data_offsets": [0, size]}
    with open(path, "wb") as file:
        write_header(file, {"__metadata__": metadata, name: entry})
        file.write(raw(data))


def write_atomically(path: str | os.PathLike, write: Callable[[str], None]) -> None:
    """Let `write(temporary)` write a file beside `path`, then rename it to `path`; on any error remove it.

    Raises OSError, naming path, if the file cannot be written.
    """
    path = Path(path).resolve()  # a link keeps pointing to what it points to
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, f"path: cannot write {path}: it is not a regular file")
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise OSError(error.errno, f"path: cannot write {path}: {error.strerror}") from error
    os.close(handle)
    try:
        try:
            write(temporary)
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp made it private
            os.replace(temporary, path)
        except (SafetensorError, OSError) as error:
            raise OSError(
                getattr(error, "errno", None) or errno.EIO, f"path: cannot write {path}: {error}"
            ) from error
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0o022)  # the only way to read it is to set it
    os.umask(mask)
    return mask


def digest_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
