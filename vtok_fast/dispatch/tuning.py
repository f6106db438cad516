"""What was measured to be fastest on this machine: a small table per machine. ``vtok-fast tune`` writes it,
the dispatcher asks it.

A table is JSON: ``version``; ``machine``; ``run``, the state that it was measured in; and per op and class of
calls the ``choice`` (with a ``backend`` where there are several to choose from) and the measured
microseconds. The user's own, in the cache folder, goes before the one that ships with the package.
``VTOK_FAST_TUNING=0`` in the environment turns all of them off.

No table can break a call: what is not an entry of this version, or not among the choices that there are,
counts as untuned, and a tile that a kernel cannot be launched with puts the op's table aside
(`guarded`).
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from vtok_fast.installation.processor import cpu_name

VERSION = 1
SHIPPED = Path(__file__).with_name("tables")
Entry = dict[str, Any]
Tile = TypeVar("Tile", bound="tuple[Any, ...]")
Watch = Callable[[str, str, Any, Callable[[Any], Sequence[Any]]], Any]
_enabled = os.environ.get("VTOK_FAST_TUNING", "1") != "0"
_watch: Watch | None = None  # of vtok-fast tune: it then chooses, and no table does
_put_aside: set[str] = set()  # ops whose table names a tile that could not be launched


def folder() -> Path:
    """Where the user's tables are: VTOK_FAST_CACHE, else vtok_fast in XDG_CACHE_HOME or ~/.cache."""
    cache = os.environ.get("VTOK_FAST_CACHE")
    return (
        Path(cache)
        if cache
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vtok_fast"
    )


def machine(device: torch.device) -> str:
    """The name of a table: of the GPU; of the processor, with how many threads torch uses."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{cpu_name()} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def conv_class(
    kernel: Sequence[int],
    stride: Sequence[int],
    channels: int,
    outputs: int,
    positions: int,
    dtype: torch.dtype,
) -> str:
    """The class of a convolution: kernel, stride, channels, output positions down to a power of two, and
    dtype."""
    taps, steps = "x".join(map(str, kernel)), "".join(map(str, stride))
    return (
        f"{taps} /{steps} {channels}->{outputs} {power_of_two(positions)} {str(dtype).removeprefix('torch.')}"
    )


def power_of_two(n: int) -> str:
    """A size down to a power of two, as classes have it."""
    return f"2^{int(math.log2(max(n, 1)))}"


# ---- what the table says -----------------------------------------------------------------------------------


def entries(op: str, device: torch.device) -> dict[str, Entry]:
    """The op's entries by class for this device and number of threads. Empty, and quickly so, where there is
    no table."""
    if not _enabled or not _any_table() or op in _put_aside:
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
            known = load(path)["ops"].get(op)
        except (OSError, ValueError):
            continue  # none, or one of another version: untuned is right, too
        if isinstance(known, dict):
            found |= {key: entry for key, entry in known.items() if isinstance(entry, dict)}
    return found


def chosen(
    op: str, device: torch.device, default: Tile, options: Callable[[Tile], Sequence[Tile]], *facts: object
) -> Tile:
    """The tile that a Triton kernel is launched with: that of the table, if it has one for this class of
    launches that is among ``options(default)``; else the default. ``facts`` name the class."""
    known = entries(op, device) if _watch is None else {}
    if _watch is None and not known:
        return default
    key = " ".join(str(fact).removeprefix("torch.") for fact in facts)
    if _watch is not None:
        return _watch(op, key, default, options)
    wanted = known.get(key, {}).get("choice")
    return (
        default
        if wanted is None
        else next((tile for tile in options(default) if list(tile) == wanted), default)
    )


def guarded(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator for an op's way to run Triton kernels, ``run(call, ...)``, of which a table may choose the
    tiles.

    What fits is measured by ``vtok-fast tune``, but with one Triton and one driver. Where Triton cannot
    compile or launch a kernel and a table is in use, the table is put aside for this process, with a warning,
    and the call runs as untuned.
    """

    def decorate(run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run)
        def guarded_run(call: Any, *args: Any) -> Any:
            try:
                return run(call, *args)
            except Exception as error:
                if _watch is not None or not entries(op, call[0].device) or not _of_triton(error):
                    raise
                _put_aside.add(op)
                warnings.warn(
                    f"{op}: the tuning table is put aside, a tile of it cannot be launched ({error}); "
                    f"vtok-fast tune "
                    "measures again",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return run(call, *args)

        return guarded_run

    return decorate


def _of_triton(error: Exception) -> bool:
    from triton.errors import TritonError

    return isinstance(error, TritonError)


# ---- files -------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a table. Raises OSError where there is none, ValueError where it is not one of this version."""
    try:
        table = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if (
        not isinstance(table, dict)
        or table.get("version") != VERSION
        or not isinstance(table.get("ops"), dict)
    ):
        raise ValueError(f"{path}: expected a tuning table of version {VERSION}")
    return table


def save(path: str | os.PathLike, name: str, run: dict[str, Any], ops: dict[str, dict[str, Entry]]) -> None:
    """Writes a table; classes of an existing one that were not measured again stay. The file is replaced
    whole."""
    path = Path(path)
    try:
        kept = load(path)["ops"]
    except (OSError, ValueError):
        kept = {}
    merged = {
        op: {k: v for k, v in (kept.get(op, {}) | ops.get(op, {})).items() if v is not None}
        for op in kept.keys() | ops.keys()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        json.dump({"version": VERSION, "machine": name, "run": run, "ops": merged}, file, indent=1)
        file.write("\n")
    os.replace(file.name, path)
    forget()


def forget() -> None:
    """Reads the tables anew at the next call."""
    _put_aside.clear()
    _entries.cache_clear()
    _any_table.cache_clear()
