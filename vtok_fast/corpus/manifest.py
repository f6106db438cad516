"""`manifest.jsonl`: what a corpus holds, line by line, and the only thing that says so.

The first line is {"corpus": 1, "settings": ...}. A line with "clip" says how one input ended: "done",
"failed" or "skipped"; "crashed" is an attempt that took its process along. A line with "shard" says which
clips, done before, now lie in that shard. A later line about a clip replaces an earlier one. A line counts
once it is complete: what a killed run left of its last line is cut off by the next run.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtok_fast.corpus.durable import sync, write_durably

NAME = "manifest.jsonl"
VERSION = 1
STATES = ("done", "failed", "skipped", "crashed")
SUFFIX = ".tokens"
WORK = ".work"  # the folder of what is not committed to a shard or under its name
Row = dict[str, Any]
# What is kept in memory of a line about a clip: there may be millions
KEPT: tuple[str, ...] = ("clip", "status", "input", "member", "identity", "sha256", "bytes", "suffix")
KEPT += ("group", "attempt", "reason")


@dataclass
class Contents:
    """What a manifest says in the end.

    Attributes:
        settings: how the tokens were made.
        clips: the last line about each input, by name; of a clip in a shard with "shard" and "number".
        shards: the line about each shard, by file name.
        size: bytes of the complete lines.
    """

    settings: Row
    clips: dict[str, Row] = field(default_factory=dict)
    shards: dict[str, Row] = field(default_factory=dict)
    size: int = 0

    def take(self, row: Row) -> None:
        """Raises KeyError, TypeError or ValueError for a line that makes no sense."""
        if "shard" in row:
            self.shards[row["shard"]] = row
            for number, name in enumerate(row["clips"]):
                self.clips[name] = {**self.clips[name], "shard": row["shard"], "number": number}
        elif row["status"] in STATES:
            self.clips[row["clip"]] = {key: row[key] for key in KEPT if key in row}
        else:
            raise ValueError(f"status {row['status']!r}")

    @property
    def done(self) -> list[str]:
        """Names of the clips whose tokens are there, sorted."""
        return sorted(name for name, row in self.clips.items() if row["status"] == "done")

    def file_of(self, folder: Path, name: str) -> Path:
        """Where the tokens of a clip that is done lie: its shard, or its own file."""
        row = self.clips[name]
        if "shard" in row:
            return folder / row["shard"]
        return (folder / WORK / "staged" if "group" in row else folder) / f"{name}{row.get('suffix', SUFFIX)}"


def read_manifest(folder: str | os.PathLike[str]) -> Contents:
    """Raises FileNotFoundError where there is no manifest, ValueError for one that is damaged."""
    path = Path(folder) / NAME
    if not path.is_file():
        raise FileNotFoundError(f"folder: {folder} holds no corpus ({NAME})")
    contents: Contents | None = None
    size = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            size += len(line)
            try:
                row = json.loads(line)
                if contents is None:
                    if row["corpus"] != VERSION:
                        raise ValueError(f"version {row['corpus']}, this is version {VERSION}")
                    contents = Contents(row["settings"])
                else:
                    contents.take(row)
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                raise ValueError(
                    f"folder: line {number} of {path} is damaged ({type(error).__name__}: {error})"
                ) from error
    if contents is None:
        raise ValueError(f"folder: {path} is empty")
    contents.size = size
    return contents


class Manifest:
    """The manifest of a corpus that is being written, by one program at a time.

    Attributes:
        contents: what it says now.
    """

    def __init__(self, folder: Path, contents: Contents, handle: int):
        self.folder, self.contents, self._handle = folder, contents, handle

    def append(self, rows: Sequence[Row]) -> None:
        """On the disk when this returns. Raises OSError if it cannot be written."""
        data = memoryview(b"".join(json.dumps(row, sort_keys=True).encode() + b"\n" for row in rows))
        end = self.contents.size + len(data)
        try:
            while data:
                data = data[os.write(self._handle, data) :]
            os.fsync(self._handle)
        except OSError:  # as a full disk: half a line would spoil the next one
            os.ftruncate(self._handle, self.contents.size)
            raise
        self.contents.size = end
        for row in rows:
            self.contents.take(row)


@contextlib.contextmanager
def writing(folder: Path, settings: Mapping[str, Any]) -> Iterator[Manifest]:
    """The manifest of a folder, made if it is not there, locked while the context lasts.

    Raises ValueError if the folder holds a corpus of other settings, or other files; OSError if another run
    writes it, or it cannot be written.
    """
    settings = json.loads(json.dumps(settings))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    with _locked(folder):
        if not path.exists():
            others = [one.name for one in folder.iterdir() if not one.name.startswith(f".{NAME}.")]
            if others:
                raise ValueError(f"output: {folder} holds {others[0]} and no {NAME}; choose another folder")
            first = json.dumps({"corpus": VERSION, "settings": settings}, sort_keys=True) + "\n"

            def write(temporary: str) -> None:
                Path(temporary).write_text(first)

            write_durably(path, write)
        contents = read_manifest(folder)
        differing = [
            f"{key}={contents.settings.get(key)!r}, not {settings.get(key)!r}"
            for key in sorted({*settings, *contents.settings})
            if settings.get(key) != contents.settings.get(key)
        ]
        if differing:
            raise ValueError(f"output: the corpus in {folder} was made with {'; '.join(differing)}")
        handle = os.open(path, os.O_WRONLY | os.O_APPEND)
        try:
            os.ftruncate(handle, contents.size)
            os.fsync(handle)
            sync(folder)
            yield Manifest(folder, contents, handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # a system without such locks
        yield
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(errno.EBUSY, f"output: another run is writing the corpus in {folder}") from None
        yield
    finally:
        os.close(handle)
