"""`TokenDataset`: the clips of a corpus by number, at the speed of memory."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vtok_fast.corpus.manifest import Contents, Row, read_manifest
from vtok_fast.corpus.shard import Shard, TokensFile, storage_of
from vtok_fast.corpus.windows import Window, indices_in, indices_of
from vtok_fast.io.tokens import Tokens

OPEN = 256  # files that a process keeps mapped; each takes a file descriptor
Grid = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class TokenClip:
    """The tokens of one clip.

    Attributes:
        name: of the clip, as in the manifest.
        indices: (N,) int32, those of all windows one after another, each in the order (t, h, w).
        grids: (t, h, w) of each window.
    """

    name: str
    indices: Tensor
    grids: tuple[Grid, ...]

    @property
    def windows(self) -> tuple[Tensor, ...]:
        """(t, h, w) int32 of each window, as views."""
        parts = self.indices.split([math.prod(grid) for grid in self.grids])
        return tuple(part.view(grid) for part, grid in zip(parts, self.grids))


class TokenDataset(Dataset[TokenClip]):
    """The clips of a corpus that `vtok-fast corpus` made, map-style, in the order of their names.

        corpus = TokenDataset("tokens")
        corpus[0].indices                                    # (N,) int32

    It may be given to worker processes, forked or spawned: files are mapped by the process that reads them.
    Read it through `TokenLoader` for batches in a random order that can be resumed.

    Args:
        folder: of the corpus. What is added to it later is not seen.
        verify: read all data once, and compare it with the manifest.

    Attributes:
        names: of the clips.
        settings: how the tokens were made: "model", "weights", "codes" (entries of the codebook), and so on.
        lengths: (clips,) int64, tokens of each.

    Raises FileNotFoundError where there is no corpus. ValueError if it holds no clips; a model without a
    codebook made it, or one that drops tokens (read those by `tokens`); a file is damaged, was cut off, or
    was made by another model than the corpus.
    """

    def __init__(self, folder: str | os.PathLike[str], *, verify: bool = False):
        self.folder = Path(folder)
        contents = read_manifest(self.folder)
        self.settings, self.names = contents.settings, contents.done
        if not self.names:
            raise ValueError(f"folder: the corpus {folder} holds no clips yet")
        if self.settings.get("codes") is None:
            raise ValueError(f"folder: {folder} holds latents of {self.settings.get('model')}, not indices")
        self._index(contents, verify)
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()
        self._owner = os.getpid()

    def _index(self, contents: Contents, verify: bool) -> None:
        """Where every clip lies."""
        self._files: list[Path] = []
        self._grids: list[tuple[Grid, ...]] = []
        count = len(self.names)
        self._file, self._start = np.empty(count, np.int32), np.empty(count, np.int64)
        self._grid, self.lengths = np.empty(count, np.int32), np.empty(count, np.int64)
        self._stored: list[
            str | tuple[str, ...]
        ] = []  # of each shard, or of each window of a clip's own file
        forms: dict[tuple[str, ...], tuple[str, ...]] = {}
        places = {name: number for number, name in enumerate(self.names)}
        grids: dict[tuple[Grid, ...], int] = {}
        shards: dict[str, list[str]] = {}
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode())
        for name in self.names:
            row = contents.clips[name]
            digest.update(f"{name}\0{row['sha256']}\0".encode())
            if "shard" in row:
                shards.setdefault(row["shard"], []).append(name)
        self.fingerprint = digest.hexdigest()

        def place(name: str, start: int, windows: tuple[Window, ...] | None, path: Path) -> None:
            if windows is None:
                raise ValueError(f"folder: {name} in {path} has dropped tokens; read it by `tokens`")
            shape = tuple((t, h, w) for (_, t, h, w), _ in windows)
            at = places[name]
            self._file[at], self._start[at] = len(self._files) - 1, start
            self._grid[at] = grids.setdefault(shape, len(grids))
            self.lengths[at] = sum(map(math.prod, shape))

        for shard, names in shards.items():
            self._open_shard(contents.shards[shard], names, contents, place, verify)
        for name in self.names:
            if "shard" not in contents.clips[name]:
                path = contents.file_of(self.folder, name)
                clip = TokensFile.open(path)
                self._check_row(contents.clips[name], clip.file.size, path)
                self._check_made_by(clip.header["model"], clip.header["info"].get("weights"), path)
                if verify:
                    clip.read()
                self._files.append(path)
                stored = tuple(form for _, form in clip.windows or ())
                self._stored.append(forms.setdefault(stored, stored))
                place(name, clip.span[0], clip.windows, path)
        self._grids = list(grids)

    def _open_shard(self, row: Row, names: list[str], contents: Contents, place: Any, verify: bool) -> None:
        path = self.folder / row["shard"]
        shard = Shard(path)
        self._check_row(row, shard.file.size, path)
        self._check_made_by(shard.header["model"], shard.header["weights"], path)
        stored = storage_of(self.settings["codes"])
        if shard.header["storage"] != stored:
            raise ValueError(
                f"folder: {path} holds indices as {shard.header['storage']}, this corpus {stored}: codebooks "
                "of two sizes cannot share a corpus"
            )
        if verify:
            shard.check()
        self._files.append(path)
        self._stored.append(stored)
        tensors = list(shard.file.tensors.values())
        for name in names:
            number = contents.clips[name]["number"]
            if shard.clips[number]["name"] != name:
                raise ValueError(f"folder: clip {number} of {path} is not {name}, as the manifest says")
            place(name, tensors[number][2], shard.windows(number), path)

    def _check_row(self, row: Row, size: int, path: Path) -> None:
        if size != row["bytes"]:
            raise ValueError(f"folder: {path} has {size} bytes, the manifest says {row['bytes']}")

    def _check_made_by(self, model: str, weights: str | None, path: Path) -> None:
        for key, found in (("model", model), ("weights", weights)):
            if found != self.settings.get(key):
                raise ValueError(
                    f"folder: {path} was made with {key} {found}, this corpus with {self.settings.get(key)}"
                )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> TokenClip:
        """Raises IndexError; OSError or ValueError if the file was removed or cut off meanwhile."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index={index}: there are {len(self)} clips")
        file, start = int(self._file[index]), int(self._start[index])
        stored, grids = self._stored[file], self._grids[self._grid[index]]
        if isinstance(stored, str):
            data = indices_in(self._map(file), start, int(self.lengths[index]), stored)
        else:
            data = indices_of(self._map(file), start, zip(map(math.prod, grids), stored))
        return TokenClip(self.names[index], torch.from_numpy(data), grids)

    def __iter__(self) -> Iterator[TokenClip]:
        return (self[index] for index in range(len(self)))

    def tokens(self, index: int) -> list[Tokens]:
        """Each window of a clip as `Tokens`, for `decode`: slower than `dataset[index]`, and complete. `info`
        holds "times", "fps" and what else the clip's own file says."""
        return tokens_of(self._contents, self.folder, self.names[index])

    @cached_property
    def _contents(self) -> Contents:
        return read_manifest(self.folder)

    def _map(self, file: int) -> mmap.mmap:
        if self._owner != os.getpid():  # a forked worker opens its own
            self._maps, self._owner = OrderedDict(), os.getpid()
        if file in self._maps:
            self._maps.move_to_end(file)
            return self._maps[file]
        with self._files[file].open("rb") as opened:
            found = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        self._maps[file] = found
        if len(self._maps) > OPEN:
            self._maps.popitem(last=False)  # unmapped once no array reads it any more
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": OrderedDict(), "_owner": -1}


def tokens_of(contents: Contents, folder: Path, name: str) -> list[Tokens]:
    """The windows of a clip of a corpus, of any model, each a batch of one."""
    from vtok_fast.io.token_windows import TokenWindows

    row = contents.clips[name]
    path = contents.file_of(folder, name)
    if "shard" not in row:
        windows = TokenWindows(path)
        return [windows[number] for number in range(len(windows))]
    shard, number = Shard(path), row["number"]
    header = {**shard.header, **shard.clips[number]["header"]}
    found = []
    for window, array, (dtype, _) in zip(
        header["windows"], shard.window_data(number), shard.clips[number]["shapes"]
    ):
        data = torch.from_numpy(array.copy())
        found.append(
            Tokens.from_header({**header, **window}, data.view(torch.bfloat16) if dtype == "BF16" else data)
        )
    return found
