"""What the builders of `Scope` put into its tensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok_fast.ops.scope_attention.csr import check_cumulative, check_lengths, cumulative

PATCHES_SEE = ("slice", "patches", "all")


class Parts(NamedTuple):
    """A scope's three tensors, or their numbers, and its lengths."""

    q_offsets: Any
    range_offsets: Any
    ranges: Any
    q_len: int
    k_len: int


def dense(q_len: int, k_len: int) -> Parts:
    """Every query sees every key."""
    check_lengths(q_len=q_len, k_len=k_len)
    return Parts([0, q_len], [0, 1], [0, k_len], q_len, k_len)


def block_causal(frames: int, tokens_per_frame: int) -> Parts:
    """Every token sees its own frame and those before."""
    check_lengths(frames=frames, tokens_per_frame=tokens_per_frame)
    n, length = tokens_per_frame, frames * tokens_per_frame
    if not length:
        return dense(0, 0)
    return Parts(
        range(0, length + n, n),
        range(frames + 1),
        [[0, end] for end in range(n, length + n, n)],
        length,
        length,
    )


def per_frame(frames: int, tokens_per_frame: int) -> Parts:
    """Every token sees its own frame."""
    check_lengths(frames=frames, tokens_per_frame=tokens_per_frame)
    n, length = tokens_per_frame, frames * tokens_per_frame
    if not length:
        return dense(0, 0)
    ranges = [[start, start + n] for start in range(0, length, n)]
    return Parts(range(0, length + n, n), range(frames + 1), ranges, length, length)


def time_invariant(tiv: int, tv: int, patches: int, slices: int, patches_see: str) -> Parts:
    """TivTok's encoder."""
    check_lengths(tiv=tiv, tv=tv, patches=patches, slices=slices)
    if patches_see not in PATCHES_SEE:
        raise ValueError(f"patches_see: expected one of {', '.join(PATCHES_SEE)}, got {patches_see!r}")
    length = tiv + slices * (tv + patches)
    segments = [(0, tiv, [(0, length)])]
    for start in range(tiv, length, max(tv + patches, 1)):
        end, middle = start + tv + patches, start + tv
        own = [(0, tiv), (start, end)]
        segments += (
            [(start, end, own)]
            if patches_see == "slice"
            else [
                (start, middle, own),
                (middle, end, [(middle, end)] if patches_see == "patches" else [(0, length)]),
            ]
        )
    return from_segments(segments, length, length)


def time_invariant_names(tiv: int, tv: int, patches: int, slices: int, patches_see: str) -> list[str]:
    """What the queries of each of its segments are."""
    named = [("invariant tokens", tiv)]
    for i in range(1, slices + 1):
        together = [(f"slice {i}", tv + patches)]
        named += together if patches_see == "slice" else [(f"tokens {i}", tv), (f"patches {i}", patches)]
    return [name for name, count in named if count]


def from_segments(
    segments: Iterable[tuple[int, int, Sequence[tuple[int, int]]]], q_len: int, k_len: int
) -> Parts:
    """As `Scope.from_segments`."""
    check_lengths(q_len=q_len, k_len=k_len)
    q_offsets, range_offsets = [0], [0]
    ranges: list[tuple[int, int]] = []
    for start, end, seen in sorted(segments, key=lambda segment: segment[:2]):
        if not 0 <= start <= end <= q_len:
            raise ValueError(f"segments: expected queries from 0 to {q_len}, got ({start}, {end})")
        if start == end:
            continue
        if start < q_offsets[-1]:
            raise ValueError(
                f"segments: ({start}, {end}) overlaps the segment before it, which ends at {q_offsets[-1]}"
            )
        if start > q_offsets[-1]:
            q_offsets.append(start)
            range_offsets.append(len(ranges))
        last = (0, 0)
        for lo, hi in sorted(map(tuple, seen)):
            if not 0 <= lo <= hi <= k_len:
                raise ValueError(
                    f"segments: ({start}, {end}) sees ({lo}, {hi}); expected keys from 0 to {k_len}"
                )
            if lo < last[1] and lo < hi:
                raise ValueError(f"segments: ({start}, {end}) sees {last} and ({lo}, {hi}), which overlap")
            if lo < hi:
                ranges.append(last := (lo, hi))
        q_offsets.append(end)
        range_offsets.append(len(ranges))
    if q_offsets[-1] < q_len or len(q_offsets) == 1:
        q_offsets.append(q_len)
        range_offsets.append(len(ranges))
    return Parts(q_offsets, range_offsets, ranges, q_len, k_len)


def packed_lengths(
    cu_seqlens: Tensor | Sequence[int],
    cu_seqlens_k: Tensor | Sequence[int] | None,
    q_len: int | None,
    k_len: int | None,
    validate: bool,
) -> tuple[Tensor, Tensor, int, int, bool]:
    """The arguments of `Scope.packed`: both cumulative lengths, rows of queries and of keys, and whether the
    values were checked."""
    cu_q = cumulative("cu_seqlens", cu_seqlens)
    cu_k = cu_q if cu_seqlens_k is None else cumulative("cu_seqlens_k", cu_seqlens_k)
    if cu_k.shape != cu_q.shape or cu_k.device != cu_q.device:
        raise ValueError(
            f"cu_seqlens_k: expected the shape and device of cu_seqlens, {tuple(cu_q.shape)} on "
            f"{cu_q.device}, got {tuple(cu_k.shape)} on {cu_k.device}"
        )
    k_len = q_len if k_len is None and cu_seqlens_k is None else k_len
    host = cu_q.device.type == "cpu"
    lengths = []
    for name, cu, length in (("cu_seqlens", cu_q, q_len), ("cu_seqlens_k", cu_k, k_len)):
        if length is None:
            if not host:
                raise ValueError(
                    f"{'q_len' if name == 'cu_seqlens' else 'k_len'}: must be given for {name} on "
                    f"{cu.device}: to read its last value is to wait for the device"
                )
            length = int(cu[-1])
        if host or validate:
            check_cumulative(name, cu, length)
        lengths.append(length)
    check_lengths(q_len=lengths[0], k_len=lengths[1])
    return cu_q, cu_k, lengths[0], lengths[1], host or validate


def packed(cu_q: Tensor, cu_k: Tensor, q_len: int, k_len: int) -> Parts:
    """Clips of different lengths one after the other, each of which sees itself."""
    ranges, clips = torch.stack((cu_k[:-1], cu_k[1:]), 1), len(cu_q) - 1
    q_offsets = F.pad(cu_q, (0, 1), value=q_len)  # the rows after the last clip
    range_offsets = torch.arange(clips + 2, dtype=torch.int32, device=cu_q.device).clamp_(max=clips)
    return Parts(q_offsets, range_offsets, ranges, q_len, k_len)


def cat(scopes: Sequence[Parts]) -> Parts:
    """One scope after the other, all as tensors on one device."""
    q_start, k_start, r_start = (
        [0, *itertools.accumulate(lengths)]
        for lengths in (
            [s.q_len for s in scopes],
            [s.k_len for s in scopes],
            [len(s.ranges) for s in scopes],
        )
    )
    q_offsets = torch.cat([s.q_offsets[i > 0 :] + q for i, (s, q) in enumerate(zip(scopes, q_start))])
    range_offsets = torch.cat([s.range_offsets[i > 0 :] + r for i, (s, r) in enumerate(zip(scopes, r_start))])
    ranges = torch.cat([s.ranges + k for s, k in zip(scopes, k_start)])
    return Parts(q_offsets, range_offsets, ranges, q_start[-1], k_start[-1])
