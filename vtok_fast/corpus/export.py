"""A corpus in the formats of others: Parquet, as `datasets` reads it, or the tar files of WebDataset.

Both are written beside the place where they shall be, and moved there once they are complete: what is there
is whole. What the writers must be told to give small and repeatable files is checked in what they wrote.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vtok_fast.corpus.dataset import TokenClip, TokenDataset
from vtok_fast.corpus.durable import sync
from vtok_fast.corpus.shard import MOST_CODES

FORMATS = ("parquet", "webdataset")
GROUP = 256  # clips of a row group of Parquet
Report = Callable[[int, int], None]


def export(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    to: str,
    *,
    clips_per_file: int = 10_000,
    progress: Report = lambda done, total: None,
) -> list[Path]:
    """Write the clips of a corpus to a new folder. Returns its files.

    Args:
        folder: of the corpus.
        output: the folder to make. It must not exist, or be empty: what others add to such a folder, a reader
            takes for data.
        to: "parquet": columns clip (string), grids (list of t, h, w of each window, flat int32) and indices
            (list of uint16, or of int32 of a codebook of more than 65,536). "webdataset": for each clip
            KEY.indices.npy and KEY.json with its name and grids; KEY is its number: a name may hold dots.
        clips_per_file: at most.

    Raises ValueError for another format, an output that holds something, or what `TokenDataset` refuses;
    ImportError without pyarrow or webdataset; OSError if it cannot be written; RuntimeError if the library
    did not write what it was told to. Then nothing is left of it.
    """
    if to not in FORMATS:
        raise ValueError(f"to={to!r}: {' or '.join(FORMATS)}")
    if clips_per_file < 1:
        raise ValueError(f"clips_per_file={clips_per_file}: must be at least 1")
    write, suffix = (_parquet, "parquet") if to == "parquet" else (_webdataset, "tar")
    _needed(to)
    output = Path(output).absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output: {output} is there, and not an empty folder")
    dataset = TokenDataset(folder)
    output.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.", suffix=".tmp"))
    try:
        starts = range(0, len(dataset), clips_per_file)
        names = [f"tokens-{number:05d}-of-{len(starts):05d}.{suffix}" for number in range(len(starts))]
        for name, start in zip(names, starts):
            numbers = range(start, min(start + clips_per_file, len(dataset)))
            write(making / name, dataset, numbers)
            sync(making / name)
            progress(numbers.stop, len(dataset))
        sync(making)
        making.chmod(0o755)
        os.replace(making, output)  # an empty folder may be replaced
        sync(output.parent)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    return [output / name for name in names]


def _needed(to: str) -> None:
    try:
        if to == "parquet":
            import pyarrow.parquet  # noqa: F401
        else:
            import webdataset  # noqa: F401
    except ImportError as error:
        name = "pyarrow" if to == "parquet" else to
        raise ImportError(f'to={to!r} needs {name} ({error}): pip install "vtok-fast[{to}]"') from error


def _indices(dataset: TokenDataset, clip: TokenClip) -> np.ndarray[Any, Any]:
    indices = clip.indices.numpy()
    return indices.astype(np.uint16) if dataset.settings["codes"] <= MOST_CODES else indices


def _parquet(path: Path, dataset: TokenDataset, numbers: range) -> None:
    """Without a dictionary, which costs three bytes for two, and with the bytes of the indices split into
    planes: a column of lists has to be named by its leaf, and any other name is ignored."""
    import pyarrow as pa
    from pyarrow import parquet

    kind = pa.uint16() if dataset.settings["codes"] <= MOST_CODES else pa.int32()
    schema = pa.schema(
        [("clip", pa.string()), ("grids", pa.list_(pa.int32())), ("indices", pa.list_(kind))],
        metadata={"vtok_fast": json.dumps(dataset.settings, sort_keys=True)},
    )
    leaf = "indices.list.element"
    with parquet.ParquetWriter(
        path,
        schema,
        use_dictionary=False,
        use_byte_stream_split=[leaf],
        compression="zstd",
        compression_level=6,
    ) as writer:
        for start in range(numbers.start, numbers.stop, GROUP):  # a row group for each call, so many clips
            clips = [dataset[number] for number in range(start, min(start + GROUP, numbers.stop))]
            columns = [
                pa.array([clip.name for clip in clips], pa.string()),
                pa.array([[n for grid in clip.grids for n in grid] for clip in clips], schema.field(1).type),
                _lists(pa, [_indices(dataset, clip) for clip in clips], kind),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
    check_parquet(path, leaf)


def _lists(pa: Any, arrays: list[np.ndarray[Any, Any]], kind: Any) -> Any:
    """A column of lists, without a Python object for each number."""
    ends = np.cumsum([0, *map(len, arrays)])
    if ends[-1] >= 2**31:
        raise ValueError(f"clips: {ends[-1]} tokens in {len(arrays)} clips are too many for a row group")
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(np.concatenate(arrays), kind))


def check_parquet(path: Path, leaf: str) -> None:
    """Raises RuntimeError unless the column of that leaf is split into planes, without a dictionary, and
    compressed: a setting that names no column is ignored without a word."""
    from pyarrow import parquet

    metadata = parquet.ParquetFile(path).metadata
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        columns = {
            row_group.column(n).path_in_schema: row_group.column(n) for n in range(row_group.num_columns)
        }
        column = columns.get(leaf)
        if column is None:
            raise RuntimeError(f"parquet: {path} has the columns {', '.join(columns)}, and not {leaf}")
        found = set(column.encodings)
        if "BYTE_STREAM_SPLIT" not in found or found & {"PLAIN_DICTIONARY", "RLE_DICTIONARY"}:
            raise RuntimeError(f"parquet: {leaf} of {path} is encoded as {', '.join(sorted(found))}")
        if column.compression != "ZSTD":
            raise RuntimeError(f"parquet: {leaf} of {path} is compressed as {column.compression}")


def _webdataset(path: Path, dataset: TokenDataset, numbers: range) -> None:
    """With mtime=0, so that equal clips give equal files; and keys without dots, which WebDataset would take
    for the end of a key."""
    import webdataset

    with path.open("wb") as file:
        writer = webdataset.TarWriter(file, mtime=0)
        try:
            for number in numbers:
                clip = dataset[number]
                described = {"clip": clip.name, "grids": clip.grids, **_made_by(dataset)}
                writer.write(
                    {
                        "__key__": f"{number:09d}",
                        "indices.npy": _indices(dataset, clip),
                        "json": json.dumps(described, sort_keys=True).encode(),
                    }
                )
        finally:
            writer.close()
    names = list(tar_names(path))
    expected = [f"{number:09d}.{name}" for number in numbers for name in ("indices.npy", "json")]
    if sorted(names) != sorted(expected):
        raise RuntimeError(f"webdataset: {path} holds {len(names)} members of {len(expected)}")


def _made_by(dataset: TokenDataset) -> dict[str, Any]:
    return {key: dataset.settings.get(key) for key in ("model", "weights", "codes")}


def tar_names(path: Path) -> Iterator[str]:
    """Of its members. Raises RuntimeError for one that was written with a time of its own."""
    import tarfile

    with tarfile.open(path) as archive:
        for member in archive:
            if member.mtime != 0:
                raise RuntimeError(f"webdataset: {member.name} of {path} has the time {member.mtime}")
            yield member.name
