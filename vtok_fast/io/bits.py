"""Whole numbers as fixed numbers of bits, little-endian, the first number in the lowest bits: the layout of
`PackedTokens.to_bytes` and of token files, fast enough to read a corpus with."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]


def width_of(codes: int) -> int:
    """Bits of an index below `codes`. Raises ValueError outside 1 to 2^31."""
    if not 1 <= codes <= 2**31:
        raise ValueError(f"codes={codes}: expected 1 to 2**31")
    return max(1, (codes - 1).bit_length())


def packed_bytes(count: int, width: int) -> int:
    return (count * width + 7) // 8


@functools.cache
def _lanes(width: int) -> tuple[int, int, Any, Any, list[tuple[int, Any]]]:
    """(numbers, bytes) of a group that begins and ends on a byte, of at least 8 bytes so that words that
    start in different groups do not overlap; the words' dtype and mask; for each number of a group, where
    its word starts in bytes, and its lowest bit in that word."""
    numbers = 8 // math.gcd(width, 8)
    size = numbers * width // 8
    times = -(-8 // size)
    word = np.dtype("<u4") if width <= 25 else np.dtype("<u8")
    lanes = [(j * width // 8, word.type(j * width % 8)) for j in range(numbers * times)]
    return numbers * times, size * times, word, word.type((1 << width) - 1), lanes


def pack(values: Array, width: int) -> bytes:
    """The low `width` bits of each of (N,) integers, in `packed_bytes(N, width)` bytes.

    Raises ValueError for a value below 0 or of more bits.
    """
    if not len(values):
        return b""
    if values.min() < 0 or int(values.max()) >> width:
        raise ValueError(f"values: expected {width} bits, got {values.min()} to {values.max()}")
    numbers, size, word, _, lanes = _lanes(width)
    groups = -(-len(values) // numbers)
    filled = np.zeros((groups, numbers), word)
    filled.reshape(-1)[: len(values)] = values
    data = np.zeros(groups * size + 8, np.uint8)
    for j, (start, shift) in enumerate(lanes):
        words = np.ndarray((groups,), word, data, start, (size,))
        words |= filled[:, j] << shift
    return data[: packed_bytes(len(values), width)].tobytes()


def unpack(data: Any, count: int, width: int, start: int = 0) -> Array:
    """(count,) int32 of what `pack` made, which starts at that byte of `data`, a buffer.

    Raises ValueError if the data ends before it.
    """
    if len(data) < start + packed_bytes(count, width):
        raise ValueError(f"data: {count} numbers of {width} bits do not fit into {len(data) - start} bytes")
    numbers, size, word, mask, lanes = _lanes(width)
    groups = -(-count // numbers)
    if len(data) < start + groups * size + 8:  # words that reach beyond the data: from a longer copy
        longer = np.zeros(groups * size + 8, np.uint8)
        rest = np.frombuffer(data, np.uint8)[start : start + groups * size]
        longer[: len(rest)] = rest
        data, start = longer, 0
    result = np.empty((groups, numbers), np.int32)
    for j, (offset, shift) in enumerate(lanes if groups else ()):
        words = np.ndarray((groups,), word, data, start + offset, (size,))
        np.bitwise_and(words >> shift, mask, out=result[:, j], casting="unsafe")
    return result.reshape(-1)[:count]


# ---- the indices of a token file ---------------------------------------------------------------------------


def pack_indices(indices: Tensor) -> tuple[Tensor, int]:
    """Integers of any shape, 0 to 2^31 - 1, as bytes (N,) uint8, and the bits of each: at least one."""
    values = indices.reshape(-1).numpy()
    width = max(1, int(values.max(initial=0)).bit_length())
    return torch.from_numpy(np.frombuffer(bytearray(pack(values, width)), np.uint8)), width


def unpack_indices(data: Tensor, shape: Any, width: Any) -> Tensor:
    """What `pack_indices` made, as int32 of that shape. Raises ValueError for bytes, a shape or a number of
    bits that do not go together."""
    check_width(width)
    check_grid(shape)
    count = math.prod(shape)
    if data.dtype != torch.uint8 or data.dim() != 1 or len(data) != packed_bytes(count, width):
        raise ValueError(f"tokens: {tuple(data.shape)} {data.dtype} for {count} indices of {width} bits each")
    return torch.from_numpy(unpack(data.numpy(), count, width)).reshape(shape)


def check_width(width: Any) -> None:
    """Raises ValueError for what a file cannot mean by the bits of an index."""
    if not isinstance(width, int) or not 1 <= width <= 31:
        raise ValueError(f"bits: expected 1 to 31, got {width!r}")


def check_grid(grid: Any) -> None:
    """Raises ValueError for what a file cannot mean by the shape of its indices."""
    if not isinstance(grid, list) or not all(isinstance(n, int) and n >= 0 for n in grid):
        raise ValueError(f"grid: expected whole numbers, got {grid!r}")
