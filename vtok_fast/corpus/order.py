"""A random order of any number of clips that needs no memory: where the clip at a position comes from is
computed, so an epoch can be entered anywhere, by any number of readers."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
ROUNDS = 6  # pairs of half rounds


class Order:
    """A permutation of `count` items that (seed, epoch) decides, the same on every machine and with every
    version of NumPy.

    An alternating Feistel network over the next power of two, walked until it falls among the items (Black
    and Rogaway, "Ciphers with arbitrary finite domains", 2002). The round function is the finalizer of
    SplitMix64.
    """

    def __init__(self, count: int, seed: int, epoch: int):
        if count < 1:
            raise ValueError(f"count={count}: expected at least 1")
        self.count = count
        bits = max(2, (count - 1).bit_length())
        self._low = np.uint64(bits // 2)
        self._masks = np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)
        digest = hashlib.shake_256(f"vtok-fast order {seed} {epoch} {count}".encode()).digest(16 * ROUNDS)
        self._keys = np.frombuffer(digest, "<u8").reshape(ROUNDS, 2).astype(np.uint64)

    def __call__(self, positions: Array) -> Array:
        """(N,) int64: the items at these positions, each 0 to count - 1. Raises IndexError for others."""
        positions = np.asarray(positions)
        if positions.size and not 0 <= positions.min() <= positions.max() < self.count:
            raise IndexError(f"positions: expected 0 to {self.count - 1}")
        items = self._step(positions.astype(np.uint64))
        while (outside := np.flatnonzero(items >= self.count)).size:
            items[outside] = self._step(items[outside])
        return items.astype(np.int64)

    def _step(self, x: Array) -> Array:
        low, high = x & self._masks[0], x >> self._low
        for first, second in self._keys:
            low = low ^ (_mixed(high + first) & self._masks[0])
            high = high ^ (_mixed(low + second) & self._masks[1])
        return high << self._low | low


def _mixed(x: Array) -> Array:
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
