"""`TokenWindows`: the tokens of a long video in one file, window by window, written and read in the memory of
one.

The file is safetensors like that of `Tokens`, with a tensor for each window: what `Tokens.save` writes for
that window. All windows are of one model and frame size; only the last one may have fewer frames.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vtok_fast.io.files import NAMES, checksum, open_tensors, raw, write_atomically, write_header
from vtok_fast.io.tokens import FORMAT, Tokens
from vtok_fast.io.video.timing import Times

WINDOWS_FORMAT = "vtok-fast token windows 2"
READABLE = (WINDOWS_FORMAT, "vtok-fast token windows 1")  # the older one has no times


class TokenWindows(Sequence[Tokens]):
    """What `vtok-fast tokenize` wrote, read window by window; a file that `Tokens.save` wrote is a window for
    each of its batch.

        for tokens in TokenWindows("clip.tokens"):
            video = model.decode(tokens)                     # (1, C, T, H, W)

    Attributes:
        model, config: as of `Tokens`.
        info: of the file: "fps", "frames" and "times" of the video, "window" and "overlap" in frames,
            "weights" (a fingerprint of the model's); where they apply, "reading" (how the video was read),
            "left_out" and "concealed" (what was damaged).
        times: when each frame of the video is shown; None of a file that does not say it.

    Raises FileNotFoundError, or ValueError for a file that is damaged or holds something else.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._file, metadata = open_tensors(self.path)
        self._whole: Tokens | None = None
        if metadata.get("format") not in READABLE:
            self._whole = Tokens.load(self.path)
            self.model, self.config, self.info = self._whole.model, self._whole.config, self._whole.info
            return
        names, digest = sorted(self._file.keys()), hashlib.sha256(metadata.get("tokens", "").encode())
        for name in names:
            checksum(digest, self._file.get_tensor(name))
        if digest.hexdigest() != metadata.get("sha256"):
            raise ValueError(f"path: {self.path} is damaged, its checksum does not match")
        try:
            header = json.loads(metadata["tokens"])
            self._headers = [{**header, **window} for window in header["windows"]]
            if not self._headers or names != [_name(index) for index in range(len(self._headers))]:
                raise ValueError(f"{len(names)} tensors, {len(self._headers)} windows")
            first = self[0]
        except (KeyError, TypeError, ValueError, RecursionError) as error:  # sound, but not of our making
            raise ValueError(
                f"path: {self.path} does not describe tokens ({type(error).__name__}: {error})"
            ) from error
        self.model, self.config, self.info = first.model, first.config, first.info

    @property
    def times(self) -> Times | None:
        """Raises ValueError if the file does not describe them."""
        if "times" not in self.info:
            return None
        try:
            return Times.from_json(self.info["times"])
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ValueError(
                f"path: {self.path} does not describe times ({type(error).__name__}: {error})"
            ) from error

    def __len__(self) -> int:
        return len(self._headers) if self._whole is None else self._whole.batch

    def __getitem__(self, index: int) -> Tokens:  # type: ignore[override]
        """The tokens of one window, a batch of one. Raises IndexError, or ValueError if the file does not
        describe them."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index={index}: there are {len(self)} windows")
        index %= len(self)
        if self._whole is not None:
            return self._whole.clip(index)
        try:
            return Tokens.from_header(self._headers[index], self._file.get_tensor(_name(index)))
        except (KeyError, TypeError, ValueError) as error:  # sound, but not of our making
            raise ValueError(
                f"path: window {index} of {self.path} is not a valid window ({type(error).__name__}: {error})"
            ) from error


def write_windows(path: str | os.PathLike, parts: Sequence[str | os.PathLike], info: dict[str, Any]) -> None:
    """Write the files that `Tokens.save` wrote as one, each of them a window, in the memory of one of them.
    `path` is replaced only once it is complete.

    Raises what `Tokens.load` raises of a part; ValueError for parts of different models or frame sizes;
    OSError if it cannot be written.
    """
    tensors: dict[str, Any] = {}
    common: dict[str, Any] = {}
    windows, end = [], 0
    for index, part in enumerate(parts):
        header, data = _part(part)
        window = {key: header.pop(key) for key in ("kind", "video_shape", "grid", "bits") if key in header}
        header = {**header, "info": info, "size": window["video_shape"][1:]}
        if common and header != common:
            raise ValueError(f"parts: {part} comes from another model or frame size than the first one")
        common = header
        windows.append(window)
        start, end = end, end + data.numel() * data.element_size()
        tensors[_name(index)] = {
            "dtype": NAMES[data.dtype],
            "shape": list(data.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps({**common, "windows": windows}, sort_keys=True)
    digest = hashlib.sha256(text.encode())
    for part in parts:
        checksum(digest, _part(part)[1])
    metadata = {"format": WINDOWS_FORMAT, "tokens": text, "sha256": digest.hexdigest()}

    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:
            write_header(file, {"__metadata__": metadata, **tensors})
            for part in parts:
                file.write(raw(_part(part)[1]))

    write_atomically(path, write)


def _part(path: str | os.PathLike) -> tuple[dict[str, Any], Tensor]:
    """The header of a file of `Tokens`, and its tensor as it is stored."""
    file, metadata = open_tensors(Path(path))
    if metadata.get("format") != FORMAT:
        raise ValueError(f"path: {path} is not a tokens file of this version")
    data, digest = file.get_tensor("tokens"), hashlib.sha256(metadata["tokens"].encode())
    checksum(digest, data)
    if digest.hexdigest() != metadata["sha256"]:
        raise ValueError(f"path: {path} is damaged, its checksum does not match")
    return json.loads(metadata["tokens"]), data


def part_info(path: str | os.PathLike) -> dict[str, Any]:
    """The `info` of a file that `Tokens.save` wrote."""
    return json.loads(open_tensors(Path(path))[1]["tokens"])["info"]


def _name(index: int) -> str:
    return f"{index:09d}"  # as sorted
