"""Whole numbers at as many bits each as the largest needs, first one in the lowest bits: how files hold the
indices of tokens."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 16  # numbers at a time, a multiple of 8: each block then begins with a byte


def pack(indices: Tensor) -> tuple[Tensor, int]:
    """Integers of any shape, 0 to 2^31 - 1, as bytes (N,) uint8, and the bits of each: at least one."""
    values = indices.reshape(-1).numpy()
    width = max(1, int(values.max(initial=0)).bit_length())
    places = np.arange(width, dtype=values.dtype)
    parts = [
        np.packbits(((values[i : i + BLOCK, None] >> places) & 1).astype(np.uint8), bitorder="little")
        for i in range(0, len(values), BLOCK)
    ]
    return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, np.uint8)), width


def unpack(data: Tensor, shape: Any, width: Any) -> Tensor:
    """What `pack` made, as int32 of that shape. Raises ValueError for bytes, a shape or a number of bits that
    do not go together."""
    if not isinstance(width, int) or not 1 <= width <= 31:
        raise ValueError(f"bits: expected 1 to 31, got {width!r}")
    if not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"grid: expected whole numbers, got {shape!r}")
    count = math.prod(shape)
    if data.dtype != torch.uint8 or data.dim() != 1 or len(data) != -(-count * width // 8):
        raise ValueError(f"tokens: {tuple(data.shape)} {data.dtype} for {count} indices of {width} bits each")
    source, found = data.numpy(), np.empty(count, np.int32)
    weights = 1 << np.arange(width, dtype=np.int32)
    for i in range(0, count, BLOCK):
        n = min(BLOCK, count - i)
        first = i * width // 8
        bits = np.unpackbits(
            source[first : first + -(-n * width // 8)], count=n * width, bitorder="little"
        ).reshape(n, width)
        found[i : i + n] = bits.astype(np.int32) @ weights
    return torch.from_numpy(found).reshape(shape)
