"""Shards: the tokens of thousands of clips in one safetensors file.

Tensor number i, named `f"{i:09d}"`, is clip number i. Where all windows of a clip hold indices, it holds them
one window after another: as uint16 where the codebook has at most 65,536 entries, otherwise packed into bits.
Other clips (dropped tokens, latents) are the bytes of their windows as `Tokens.save` stores them. The
metadata says whose tokens they are, and of every clip what its own file says, so that `tokens_file` writes
that file again, byte for byte.

Equal clips in equal order give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vtok_fast.corpus.durable import write_durably
from vtok_fast.corpus.windows import Window, indices_in, indices_of, plain_windows
from vtok_fast.io.bits import Array, pack, packed_bytes, width_of
from vtok_fast.io.files import digest_of
from vtok_fast.io.token_windows import WINDOWS_FORMAT

FORMAT = "vtok-fast token shard 1"
COMMON = ("model", "config", "dtype")  # what the files of one shard agree in
NUMPY = {"U8": "u1", "U16": "<u2", "I32": "<i4", "F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}
MOST_CODES = 1 << 16  # that uint16 holds


def storage_of(codes: int | None) -> str:
    """How a shard stores indices of a codebook of that size: "uint16" or "bits18"; "bytes" without one."""
    if codes is None:
        return "bytes"
    return "uint16" if codes <= MOST_CODES else f"bits{width_of(codes)}"


class SafeTensors:
    """A safetensors file as a header and where its data lies; nothing of the data is read.

    Attributes:
        metadata: its texts.
        tensors: dtype, shape, start and end of each, in bytes of the file, in the order of their names.

    Raises FileNotFoundError, or ValueError for a file that was cut off or is something else.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = 8 + int.from_bytes(file.read(8), "little")
            if start > size:
                raise ValueError(f"path: {path} is cut off, or no safetensors file ({size} bytes)")
            text = file.read(start - 8)
        try:
            header = json.loads(text)
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self.tensors = {
                name: (one["dtype"], one["shape"], *(start + at for at in one["data_offsets"]))
                for name, one in sorted(header.items())
            }
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"path: {path} is not a safetensors file ({error})") from error
        end = max((one[3] for one in self.tensors.values()), default=start)
        if end != size:
            raise ValueError(f"path: {path} has {size} bytes of {end}: it is cut off")
        self.size = size


@dataclass(frozen=True)
class TokensFile:
    """A file that `vtok-fast tokenize` wrote (`TokenWindows`), as it lies on the disk."""

    file: SafeTensors

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> TokensFile:
        """Raises FileNotFoundError, or ValueError for another file. The checksum is not looked at."""
        found = cls(SafeTensors(path))
        if found.file.metadata.get("format") != WINDOWS_FORMAT or "tokens" not in found.file.metadata:
            raise ValueError(f"path: {path} is not a file of token windows")
        return found

    @cached_property
    def header(self) -> dict[str, Any]:
        return json.loads(self.file.metadata["tokens"])

    @cached_property
    def windows(self) -> tuple[Window, ...] | None:
        """Shape and storage of each window, if all hold indices and none is dropped. Raises ValueError for a
        file that does not describe them."""
        try:
            return plain_windows(self.header["windows"], self.shapes)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"path: {self.file.path} does not describe tokens ({error})") from error

    @property
    def shapes(self) -> list[tuple[str, list[int]]]:
        """dtype and shape of each window's tensor."""
        return [(one[0], one[1]) for one in self.file.tensors.values()]

    @property
    def span(self) -> tuple[int, int]:
        """Where the data of all windows lies in the file, in bytes."""
        places = list(self.file.tensors.values())
        return places[0][2], places[-1][3]

    def read(self) -> bytes:
        """The data of all windows. Raises ValueError if its checksum is another one."""
        start, end = self.span
        with self.file.path.open("rb") as file:
            file.seek(start)
            data = file.read(end - start)
        digest = hashlib.sha256(self.file.metadata["tokens"].encode())
        for (dtype, shape), (_, _, first, last) in zip(self.shapes, self.file.tensors.values()):
            digest.update(f"{TORCH[dtype]}{tuple(shape)}".encode())
            digest.update(data[first - start : last - start])
        if digest.hexdigest() != self.file.metadata.get("sha256"):
            raise ValueError(f"path: {self.file.path} is damaged, its checksum does not match")
        return data


TORCH = {
    "U8": "torch.uint8",
    "I32": "torch.int32",
    "F16": "torch.float16",
    "BF16": "torch.bfloat16",
    "F32": "torch.float32",
    "F64": "torch.float64",
}


def write_shard(path: Path, clips: Sequence[tuple[str, Path]], codes: int | None) -> str:
    """Write a shard of (name, file of token windows), in the memory of one clip. Returns its SHA-256.

    Args:
        codes: entries of the model's codebook; None of a model without one.

    Raises ValueError for no clips, a damaged one, one of another model, or an index that `codes` excludes;
    OSError if it cannot be written; then nothing is left of it.
    """
    if not clips:
        raise ValueError("clips: a shard holds at least one")
    storage, end = storage_of(codes), 0
    headers: list[dict[str, Any]] = []
    tensors: dict[str, Any] = {}
    common: dict[str, Any] = {}
    for number, (name, file) in enumerate(clips):
        clip = TokensFile.open(file)
        header = {key: value for key, value in clip.header.items() if key not in COMMON}
        described = {key: clip.header[key] for key in COMMON} | {"weights": header["info"].get("weights")}
        if common and described != common:
            raise ValueError(f"clips: {file} comes from another model or other weights than {clips[0][1]}")
        common = described
        kind, length = _stored(clip, storage)
        headers.append({"name": name, "stored": kind, "shapes": clip.shapes, "header": header})
        size = length * (2 if kind == "uint16" else 1)
        tensors[f"{number:09d}"] = {
            "dtype": "U16" if kind == "uint16" else "U8",
            "shape": [length],
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps({**common, "codes": codes, "storage": storage, "clips": headers}, sort_keys=True)
    metadata = {"format": FORMAT, "sha256": "0" * 64, "shard": text}
    head = json.dumps({"__metadata__": metadata, **tensors}).encode()
    head += b" " * (-len(head) % 8)
    whole = ""

    def write(temporary: str) -> None:
        nonlocal whole
        digest = hashlib.sha256(text.encode())
        with open(temporary, "wb") as out:
            out.write(len(head).to_bytes(8, "little") + head)
            for (_, file), described in zip(clips, headers):
                data = _data(TokensFile.open(file), described["stored"], codes)
                digest.update(data)
                out.write(data)
            out.seek(8 + head.index(b"0" * 64))
            out.write(digest.hexdigest().encode())
        whole = digest_of(temporary)

    write_durably(path, write)
    return whole


def _stored(clip: TokensFile, storage: str) -> tuple[str, int]:
    """How a clip is stored, and as how many numbers."""
    start, end = clip.span
    if storage == "bytes" or clip.windows is None:
        return "bytes", -(-(end - start) // 8) * 8  # so that uint16 of the clips that follow stay aligned
    count = sum(math.prod(grid) for grid, _ in clip.windows)
    return storage, count if storage == "uint16" else packed_bytes(count, int(storage[4:]))


def _data(clip: TokensFile, stored: str, codes: int | None) -> bytes:
    data = clip.read()
    if stored == "bytes":
        return data + bytes(-len(data) % 8)
    indices = indices_of(data, 0, [(math.prod(grid), form) for grid, form in clip.windows or ()])
    if len(indices) and not 0 <= indices.min() <= indices.max() < (codes or 0):
        raise ValueError(
            f"clips: indices of {clip.file.path} lie in [{indices.min()}, {indices.max()}], the codebook has "
            f"{codes} entries"
        )
    return indices.astype("<u2").tobytes() if stored == "uint16" else pack(indices, int(stored[4:]))


class Shard:
    """A shard, opened for its description; nothing of its data is read.

    Attributes:
        header: model, config, dtype, weights, codes, storage.
        clips: of each clip "name", "stored", "shapes" and "header".

    Raises FileNotFoundError, or ValueError for a file that was cut off or is something else.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.file = SafeTensors(path)
        if self.file.metadata.get("format") != FORMAT:
            raise ValueError(f"path: {path} is not a shard of tokens of this version")
        try:
            self.header = json.loads(self.file.metadata["shard"])
            self.clips: list[dict[str, Any]] = self.header.pop("clips")
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"path: {path} does not describe a shard ({error})") from error
        if len(self.clips) != len(self.file.tensors):
            raise ValueError(f"path: {path} describes {len(self.clips)} clips of {len(self.file.tensors)}")

    def check(self) -> None:
        """Raises ValueError if the data is not what was written."""
        digest = hashlib.sha256(self.file.metadata["shard"].encode())
        with self.file.path.open("rb") as file:
            file.seek(min((one[2] for one in self.file.tensors.values()), default=self.file.size))
            while piece := file.read(1 << 22):
                digest.update(piece)
        if digest.hexdigest() != self.file.metadata.get("sha256"):
            raise ValueError(f"path: {self.file.path} is damaged, its checksum does not match")

    def count(self, number: int) -> int:
        """Tokens of a clip whose windows all hold indices; 0 of another one."""
        return sum(math.prod(grid) for grid, _ in self.windows(number) or ())

    def windows(self, number: int) -> tuple[Window, ...] | None:
        """Shape of each window of a clip, and how the clip's own file stores it; None of a clip with other
        windows. Raises ValueError for a shard that does not describe them."""
        clip = self.clips[number]
        try:
            if clip["stored"] == "bytes":
                return None
            return plain_windows(clip["header"]["windows"], clip["shapes"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"path: clip {number} of {self.file.path} does not describe tokens ({error})"
            ) from error

    def window_data(self, number: int) -> list[Array]:
        """The tensor of each window of a clip, as its own file stores it (bfloat16 as uint16)."""
        clip, (_, _, start, end) = self.clips[number], self.file.tensors[f"{number:09d}"]
        with self.file.path.open("rb") as file:
            file.seek(start)
            data = file.read(end - start)
        arrays: list[Array] = []
        at = 0
        if (windows := self.windows(number)) is not None:
            indices = indices_in(data, 0, self.count(number), clip["stored"])
            for grid, form in windows:
                part, at = indices[at : at + math.prod(grid)], at + math.prod(grid)
                if form == "int32":
                    arrays.append(part.reshape(grid))
                else:
                    arrays.append(np.frombuffer(pack(part, int(form[4:])), np.uint8))
            return arrays
        for dtype, shape in clip["shapes"]:
            count, kind = math.prod(shape), np.dtype(NUMPY[dtype])
            arrays.append(np.frombuffer(data, kind, count, at).reshape(shape))
            at += count * kind.itemsize
        return arrays

    def tokens_file(self, number: int, path: Path) -> None:
        """Write the clip's own file, as `vtok-fast tokenize` wrote it. Raises OSError if it cannot be
        written."""
        clip = self.clips[number]
        text = json.dumps({**{key: self.header[key] for key in COMMON}, **clip["header"]}, sort_keys=True)
        digest, tensors, end = hashlib.sha256(text.encode()), {}, 0
        arrays = self.window_data(number)
        for index, ((dtype, shape), array) in enumerate(zip(clip["shapes"], arrays)):
            digest.update(f"{TORCH[dtype]}{tuple(shape)}".encode())
            digest.update(array.tobytes())
            start, end = end, end + array.nbytes
            tensors[f"{index:09d}"] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        metadata = {"format": WINDOWS_FORMAT, "tokens": text, "sha256": digest.hexdigest()}
        head = json.dumps({"__metadata__": metadata, **tensors}).encode()
        head += b" " * (-len(head) % 8)

        def write(temporary: str) -> None:
            with open(temporary, "wb") as out:
                out.write(len(head).to_bytes(8, "little") + head)
                for array in arrays:
                    out.write(array.tobytes())

        write_durably(path, write)
