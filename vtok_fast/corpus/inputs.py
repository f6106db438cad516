"""The inputs of a corpus: folders, globs, manifests and files, on this machine or at any address that fsspec
knows; each video with a name that depends on nothing but itself."""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vtok_fast.corpus.manifest import NAME as MANIFEST
from vtok_fast.corpus.manifest import read_manifest

CONTAINERS = "3gp asf avi flv gif m2ts m4v mkv mov mp4 mpeg mpg mts mxf ogv ts vob webm wmv y4m"
VIDEOS = {f".{name}" for name in CONTAINERS.split(" ")}
LISTS = (".csv", ".jsonl", ".parquet")
PATHS = ("path", "video", "address", "url", "file")  # the column of a manifest that holds the address
NAMES = ("name", "clip", "id")
VERSIONS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "CRC", "sha256")
LONGEST = 200  # bytes of a part of a name: file systems hold 255, and suffixes follow


@dataclass(frozen=True)
class Clip:
    """One input.

    Attributes:
        name: of its results.
        address: a path or an address of fsspec.
        member: of a corpus of tokens, which of its clips; else None.
    """

    name: str
    address: str
    member: str | None = None


def is_remote(address: str) -> bool:
    return "://" in address or "::" in address


def file_system(address: str) -> tuple[Any, str]:
    """The file system of an address and the path in it, without cached listings: what another program writes
    is seen. Raises ValueError or ImportError for one that fsspec does not know."""
    import fsspec

    return fsspec.core.url_to_fs(address, use_listings_cache=False)


def identity(address: str) -> str:
    """Size and version of a file, which change when it does. Raises FileNotFoundError."""
    if not is_remote(address):
        stat = os.stat(address)
        return f"{stat.st_size} {stat.st_mtime_ns}"
    fs, path = file_system(address)
    info = fs.info(path)
    return " ".join([str(info.get("size"))] + [str(info[key]) for key in VERSIONS if info.get(key)])


def find_clips(inputs: Iterable[str], *, column: str | None = None, tokens: bool = False) -> list[Clip]:
    """The clips of all inputs, sorted by name.

    Args:
        inputs: folders (the videos in them, by suffix), patterns with * or ?, manifests (.csv, .jsonl,
            .parquet), files.
        column: of manifests, which holds the addresses. None: the first of path, video, address, url, file.
            A column name, clip or id, if there is one, holds the names.
        tokens: the inputs are files of tokens or corpora of them.

    Raises FileNotFoundError for an input that matches nothing; ValueError for two inputs of one name, or a
    manifest that does not say where its videos are.
    """
    found: dict[str, Clip] = {}
    for one in inputs:
        clips = list(_expand(one, column, tokens))
        if not clips:
            raise FileNotFoundError(f"input: {one} holds no {'tokens' if tokens else 'videos'}")
        for clip in clips:
            other = found.setdefault(clip.name, clip)
            if other != clip:
                raise ValueError(
                    f"input: {other.address} and {clip.address} would both be named {clip.name}; list them "
                    "in a manifest with a column of names"
                )
    return [found[name] for name in sorted(found)]


def _expand(one: str, column: str | None, tokens: bool) -> Iterator[Clip]:
    suffixes = {".tokens"} if tokens else VIDEOS
    if tokens and not is_remote(one) and (Path(one) / MANIFEST).is_file():
        contents = read_manifest(one)
        yield from (Clip(name, one, name) for name in contents.done)
    elif one.endswith(LISTS):
        yield from _listed(one, column)
    elif is_remote(one):
        yield from _remote(one, suffixes)
    elif os.path.isdir(one):
        root = Path(one)
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for file in files:
                path = Path(folder, file)
                if not file.startswith(".") and path.suffix.lower() in suffixes:
                    yield _clip(path, Path(os.path.abspath(root)).name / path.relative_to(root))
    elif os.path.exists(one):
        yield _clip(one, Path(one).name)
    elif glob.has_magic(one):
        fixed = Path(one[: min(one.index(c) for c in "*?[" if c in one)] + "x").parent
        for match in glob.iglob(one, recursive=True):
            if os.path.isfile(match):
                yield _clip(match, Path(os.path.abspath(fixed)).name / Path(match).relative_to(fixed))
    else:
        raise FileNotFoundError(f"input: there is no {one}")


def _remote(one: str, suffixes: set[str]) -> Iterator[Clip]:
    fs, path = file_system(one)
    head, *rest = one.split("::")
    protocol = head.partition("://")[0] if "://" in head else head
    address = lambda file: "::".join([f"{protocol}://{file}", *rest])
    fixed = path
    if glob.has_magic(path):
        fixed = path[: min(path.index(c) for c in "*?[" if c in path)].rpartition("/")[0]
        files = [file for file in fs.glob(path) if fs.isfile(file)]
    elif fs.isdir(path) or path == "":
        found = [(file, PurePosixPath(file.removeprefix(path).lstrip("/"))) for file in fs.find(path)]
        shown = [(file, one) for file, one in found if not any(part.startswith(".") for part in one.parts)]
        files = [file for file, one in shown if one.suffix.lower() in suffixes]
    else:
        yield _clip(one, PurePosixPath(path).name)
        return
    for file in sorted(files):
        inner = file.removeprefix(fixed).lstrip("/")
        yield _clip(address(file), f"{PurePosixPath(fixed).name}/{inner}" if fixed else inner)


def _listed(one: str, column: str | None) -> Iterator[Clip]:
    for number, row in enumerate(_rows(one), 1):
        if isinstance(row, str):
            row = {PATHS[0]: row}
        key = column or next((name for name in PATHS if name in row), None)
        if key is None or not isinstance(row.get(key), str) or not row[key]:
            known = f"{column!r}" if column else f"one of {', '.join(PATHS)}"
            raise ValueError(f"input: entry {number} of {one} has no address; expected a column {known}")
        address = row[key]
        name = next((str(row[name]) for name in NAMES if row.get(name) not in (None, "")), None)
        if name is None:
            name = address.split("::")[0].partition("://")[2] or address
        if not is_remote(address) and not os.path.isabs(address):
            above = one.rpartition("/")[0]
            address = f"{above}/{address}" if above else address
        yield _clip(address, name)


def _rows(one: str) -> Iterator[Any]:
    """The entries of a manifest: dicts, or strings of JSON lines that are strings."""
    data: Any
    if is_remote(one):
        fs, path = file_system(one)
        data = fs.cat_file(path)
    else:
        data = Path(one).read_bytes()
    if one.endswith(".parquet"):
        try:
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise ImportError(f'{one} needs pyarrow ({error}): pip install "vtok-fast[parquet]"') from error
        yield from parquet.read_table(io.BytesIO(data)).to_pylist()
        return
    text = data.decode("utf-8-sig")
    if one.endswith(".csv"):
        yield from csv.DictReader(io.StringIO(text, newline=""))
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"input: line {number} of {one} is not JSON ({error})") from error
            if not isinstance(row, (dict, str)):
                raise ValueError(f"input: line {number} of {one} is neither an object nor an address")
            yield row


def _clip(address: Any, name: Any) -> Clip:
    address = str(address)
    return Clip(safe_name(str(name)), address if is_remote(address) else os.path.abspath(address))


def safe_name(name: str) -> str:
    """A name as a path below a folder: no parts that lead out of it, are hidden, or are too long for a file
    system."""
    parts = []
    for part in name.replace("\\", "/").split("/"):
        if part in ("", ".", ".."):
            continue
        part = "".join(f"%{ord(c):02X}" if ord(c) < 32 or c == "\x7f" else c for c in part)
        part = f"%2E{part[1:]}" if part.startswith(".") else part
        if len(part.encode()) > LONGEST:
            short = part.encode()[: LONGEST - 17].decode(errors="ignore")
            part = f"{short}-{hashlib.sha256(part.encode()).hexdigest()[:16]}"
        parts.append(part)
    if not parts:
        raise ValueError(f"input: {name!r} cannot name a clip")
    return "/".join(parts)
