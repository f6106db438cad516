"""What was measured to be fastest on this machine: a small table per machine. ``vtok-fast tune`` writes it, the dispatcher asks it.

A table is JSON: ``version``; ``machine``; ``run``, the state that it was measured in; and per op and class of calls a backend, its
``choice``, and the measured microseconds. The user's own, in the cache folder, goes before the one that ships with the package.
``VTOK_FAST_TUNING=0`` in the environment turns all of them off.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vtok_fast.processor import cpu_name

VERSION = 1
SHIPPED = Path(__file__).with_name("tables")
Entry = dict[str, Any]
_enabled = os.environ.get("VTOK_FAST_TUNING", "1") != "0"


def folder() -> Path:
    """Where the user's tables are: VTOK_FAST_CACHE, else vtok_fast in XDG_CACHE_HOME or ~/.cache."""
    cache = os.environ.get("VTOK_FAST_CACHE")
    return Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vtok_fast"


def machine(device: torch.device) -> str:
    """The name of a table: of the GPU; of the processor, with how many threads torch uses."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{cpu_name()} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def conv_class(kernel: Sequence[int], stride: Sequence[int], channels: int, outputs: int, positions: int,
               dtype: torch.dtype) -> str:
    """The class of a convolution: kernel, stride, channels, output positions down to a power of two, and dtype."""
    size = int(math.log2(max(positions, 1)))
    taps, steps = "x".join(map(str, kernel)), "".join(map(str, stride))
    return f"{taps} /{steps} {channels}->{outputs} 2^{size} {str(dtype).removeprefix('torch.')}"


def entries(op: str, device: torch.device) -> dict[str, Entry]:
    """The op's entries by class for this device and number of threads. Empty, and quickly so, where there is no table."""
    if not _enabled or not _any_table():
        return {}
    return _entries(op, device.type, device.index, torch.get_num_threads() if device.type == "cpu" else 0)


@functools.cache
def _any_table() -> bool:
    return any(place.is_dir() and any(place.glob("*.json")) for place in (SHIPPED, folder()))


@functools.cache
def _entries(op: str, kind: str, index: int | None, threads: int) -> dict[str, Entry]:
    name = f"{machine(torch.device(kind, index) if index is not None else torch.device(kind))}.json"
    found: dict[str, Entry] = {}
    for path in (SHIPPED / name, folder() / name):
        try:
            found |= load(path)["ops"].get(op, {})
        except (OSError, ValueError):
            continue  # none, or one of another version: untuned is right, too
    return found


def load(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a table. Raises OSError where there is none, ValueError where it is not one of this version."""
    try:
        table = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(table, dict) or table.get("version") != VERSION or not isinstance(table.get("ops"), dict):
        raise ValueError(f"{path}: expected a tuning table of version {VERSION}")
    return table


def save(path: str | os.PathLike, name: str, run: dict[str, Any], ops: dict[str, dict[str, Entry]]) -> None:
    """Writes a table; classes of an existing one that were not measured again stay. The file is replaced whole."""
    path = Path(path)
    try:
        kept = load(path)["ops"]
    except (OSError, ValueError):
        kept = {}
    merged = {op: {k: v for k, v in (kept.get(op, {}) | ops.get(op, {})).items() if v is not None}
              for op in kept.keys() | ops.keys()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        json.dump({"version": VERSION, "machine": name, "run": run, "ops": merged}, file, indent=1)
        file.write("\n")
    os.replace(file.name, path)
    forget()


def forget() -> None:
    """Reads the tables anew at the next call."""
    _entries.cache_clear()
    _any_table.cache_clear()
