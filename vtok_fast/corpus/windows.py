"""The indices of windows as they lie in a buffer: uint16, int32, or packed into bits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vtok_fast.io.bits import Array, check_grid, check_width, packed_bytes, unpack

Window = tuple[tuple[int, ...], str]  # (B, t, h, w), and how its own file stores it: "bits18" or "int32"


def plain_windows(headers: Sequence[dict[str, Any]], tensors: Iterable[Any]) -> tuple[Window, ...] | None:
    """Those that a clip's own file holds, from what it says of each window and (dtype, shape) of its tensor;
    None where a window is of dropped tokens or of latents.

    Raises ValueError for a description that does not go with the tensor.
    """
    found: list[Window] = []
    if not all(header["kind"] in ("bits", "indices") for header in headers):
        return None
    grid: Any
    width: Any
    for header, (dtype, shape) in zip(headers, tensors, strict=True):
        if header["kind"] == "indices":  # of files from before packing
            grid, stored, expected = shape, "int32", ("I32", shape)
        else:
            grid, width = header.get("grid"), header.get("bits")
            check_width(width)
            check_grid(grid)
            stored, expected = f"bits{width}", ("U8", [packed_bytes(math.prod(grid), width)])
        if len(grid) != 4 or grid[0] != 1:
            raise ValueError(f"grid: expected [1, t, h, w], got {grid!r}")
        if (dtype, shape) != expected:
            raise ValueError(f"tokens: {dtype} {shape}, expected {expected[0]} {expected[1]} of grid {grid}")
        found.append((tuple(grid), stored))
    return tuple(found)


def stored_bytes(count: int, stored: str) -> int:
    """Bytes of so many indices."""
    fixed = {"uint16": 2, "int32": 4}
    return count * fixed[stored] if stored in fixed else packed_bytes(count, int(stored[4:]))


def indices_in(data: Any, start: int, count: int, stored: str) -> Array:
    """(count,) int32 of the indices that begin at that byte of a buffer; stored: "uint16", "int32" or
    "bits18"."""
    if stored == "uint16":
        return np.frombuffer(data, "<u2", count, start).astype(np.int32)
    if stored == "int32":
        return np.frombuffer(data, "<i4", count, start).astype(np.int32)
    return unpack(data, count, int(stored[4:]), start)


def indices_of(data: Any, start: int, parts: Iterable[tuple[int, str]]) -> Array:
    """(N,) int32 of parts that follow one another from that byte of a buffer, each (count, stored)."""
    found = []
    for count, stored in parts:
        found.append(indices_in(data, start, count, stored))
        start += stored_bytes(count, stored)
    return found[0] if len(found) == 1 else np.concatenate(found)
