"""A scope as three tensors, and what must hold of their values: the checks on the host, and the nearest valid
values on a device, which nothing waits for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class CSR(NamedTuple):
    """The three tensors of a scope: int32, contiguous, on one device."""

    q_offsets: Tensor
    range_offsets: Tensor
    ranges: Tensor


def check_tensors(csr: CSR) -> None:
    """Types, shapes and devices; not the values."""
    q_offsets, range_offsets, ranges = csr
    for name, t in csr._asdict().items():
        if t.dtype != torch.int32:
            raise TypeError(f"{name}: expected int32, got {t.dtype}")
        if t.device != q_offsets.device:
            raise ValueError(f"{name}: expected the device of q_offsets, {q_offsets.device}, got {t.device}")
    if q_offsets.dim() != 1 or len(q_offsets) < 2:
        raise ValueError(
            f"q_offsets: expected shape (segments + 1,) with a segment at least, got {tuple(q_offsets.shape)}"
        )
    if range_offsets.shape != q_offsets.shape:
        raise ValueError(
            f"range_offsets: expected the shape of q_offsets, {tuple(q_offsets.shape)}, "
            f"got {tuple(range_offsets.shape)}"
        )
    if ranges.dim() != 2 or ranges.shape[1] != 2:
        raise ValueError(f"ranges: expected shape (ranges, 2), got {tuple(ranges.shape)}")


def check_lengths(**lengths: int) -> None:
    for name, n in lengths.items():
        if isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)) or n < 0:
            raise ValueError(f"{name}: expected a number that is not negative, got {n!r}")


def cumulative(name: str, values: Tensor | Sequence[int]) -> Tensor:
    cu = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.int32, device="cpu")
    if cu.dim() != 1 or len(cu) < 1:
        raise ValueError(f"{name}: expected shape (clips + 1,), got {tuple(cu.shape)}")
    if cu.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {cu.dtype}")
    return cu.int()


def check_cumulative(name: str, values: Tensor, last: int, at_most: bool = True) -> None:
    v = values.tolist()
    if v[0] != 0:
        raise ValueError(f"{name}: expected to begin with 0, got {v[0]}")
    for i, (a, b) in enumerate(zip(v, v[1:]), 1):
        if b < a:
            raise ValueError(f"{name}: expected values that never descend, got {b} after {a} at index {i}")
    if v[-1] > last or not at_most and v[-1] < last:
        raise ValueError(f"{name}: expected to end with {'at most ' if at_most else ''}{last}, got {v[-1]}")


def check_values(q_offsets: Tensor, range_offsets: Tensor, ranges: Tensor, q_len: int, k_len: int) -> None:
    check_cumulative("q_offsets", q_offsets, q_len, at_most=False)
    check_cumulative("range_offsets", range_offsets, len(ranges), at_most=False)
    r, offsets = ranges.tolist(), range_offsets.tolist()
    for s, (first, last) in enumerate(zip(offsets, offsets[1:])):
        for i in range(first, last):
            lo, hi = r[i]
            if not 0 <= lo <= hi <= k_len:
                raise ValueError(f"ranges: expected keys from 0 to {k_len}, got ({lo}, {hi}) at index {i}")
            if i > first and lo < r[i - 1][1]:
                raise ValueError(
                    f"ranges: segment {s} sees {tuple(r[i - 1])} and ({lo}, {hi}); expected ascending "
                    f"ranges that do "
                    "not overlap"
                )


def clamp(csr: CSR, q_len: int, k_len: int) -> tuple[CSR, Tensor]:
    """The nearest scope that is valid, and whether it is another one. No value is waited for."""
    q, r = (
        clamp_offsets(t, last) for t, last in ((csr.q_offsets, q_len), (csr.range_offsets, len(csr.ranges)))
    )
    ranges = csr.ranges.long().clamp(0, k_len)
    if len(ranges):
        owner = torch.searchsorted(r[1:], torch.arange(len(ranges), device=r.device), right=True)
        # A range begins where those before it in its segment have ended: the running maximum begins anew with
        # each segment because every one lies higher than the one before.
        lift = owner * (k_len + 1)
        ends = (ranges.amax(1) + lift).cummax(0).values - lift
        before = torch.where(owner[1:] == owner[:-1], ends[:-1], 0)
        ranges = torch.stack((torch.maximum(ranges[:, 0], F.pad(before, (1, 0))), ends), 1)
    safe = CSR(q.int(), r.int(), ranges.int())
    changed = torch.stack([(a != b).any() for a, b in zip(csr, safe)]).any()
    return safe, changed


def clamp_offsets(offsets: Tensor, last: int) -> Tensor:
    inner = offsets[1:-1].long().clamp(0, last).cummax(0).values if len(offsets) > 2 else offsets[:0].long()
    return F.pad(F.pad(inner, (1, 0)), (0, 1), value=last)
