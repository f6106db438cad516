"""``Scope``: which keys each query sees, as a short list of ranges per segment of queries. No mask exists,
unless one is asked for.

The form is compressed sparse rows: segment s holds the queries ``q_offsets[s]`` to ``q_offsets[s + 1]``, and
all of them see the key ranges ``ranges[range_offsets[s]:range_offsets[s + 1]]``. TivTok's Scope-Induced
Factorization (arXiv 2606.17590), block-causal and per-frame attention, and packed clips of different lengths
are a few numbers each.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from vtok_fast.dispatch.lasting import is_recording, keep, lasting, refuse_recording

PATCHES_SEE = ("slice", "patches", "all")

# A compiled graph carries the tensors of a scope but not the object, on which plans are cached. This finds it
# again.
_by_tensor: WeakIdKeyDictionary = WeakIdKeyDictionary()


class CSR(NamedTuple):
    """The three tensors of a scope: int32, contiguous, on one device."""

    q_offsets: Tensor
    range_offsets: Tensor
    ranges: Tensor


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Scope:
    """An immutable description of what each query sees. Made by one of the builders, or from the three
    tensors.

    A query without ranges sees nothing: its attention is zero, and so are its gradients. Plans of how to
    attend are cached on the object, so make it once per shape and use it in every layer; and make it outside
    of functions that ``torch.compile`` compiles.

    Args:
        q_offsets: (segments + 1) int32, from 0 to ``q_len``, never descending.
        range_offsets: (segments + 1) int32, from 0 to the number of ranges, never descending.
        ranges: (ranges, 2) int32, the first key and the one after the last; ascending and disjoint within a
            segment.
        q_len: number of queries.
        k_len: number of keys.
        validate: check values that live on a device; this waits for the device. Values on the host are always
            checked. Unchecked values never lead outside of memory: ranges are clamped, and `validate`
            and every other method that waits for the device then raises.

    Raises:
        TypeError: a tensor is not int32.
        ValueError: a shape or value is impossible; names it.
    """

    q_offsets: Tensor
    range_offsets: Tensor
    ranges: Tensor
    q_len: int
    k_len: int
    validated: bool = False
    # Of the instance, but no field: two scopes are equal whatever is cached on them
    cache: ClassVar[dict[Any, Any]]

    def __init__(
        self,
        q_offsets: Tensor,
        range_offsets: Tensor,
        ranges: Tensor,
        q_len: int,
        k_len: int,
        *,
        validate: bool = False,
    ) -> None:
        _check_lengths(q_len=q_len, k_len=k_len)
        for name, t in (("q_offsets", q_offsets), ("range_offsets", range_offsets), ("ranges", ranges)):
            if t.dtype != torch.int32:
                raise TypeError(f"{name}: expected int32, got {t.dtype}")
            if t.device != q_offsets.device:
                raise ValueError(
                    f"{name}: expected the device of q_offsets, {q_offsets.device}, got {t.device}"
                )
        if q_offsets.dim() != 1 or len(q_offsets) < 2:
            raise ValueError(
                f"q_offsets: expected shape (segments + 1,) with a segment at least, got "
                f"{tuple(q_offsets.shape)}"
            )
        if range_offsets.shape != q_offsets.shape:
            raise ValueError(
                f"range_offsets: expected the shape of q_offsets, {tuple(q_offsets.shape)}, "
                f"got {tuple(range_offsets.shape)}"
            )
        if ranges.dim() != 2 or ranges.shape[1] != 2:
            raise ValueError(f"ranges: expected shape (ranges, 2), got {tuple(ranges.shape)}")
        self._set(q_offsets.contiguous(), range_offsets.contiguous(), ranges.contiguous(), q_len, k_len)
        if validate or q_offsets.device.type == "cpu":
            self.validate()

    def _set(
        self,
        q_offsets: Tensor,
        range_offsets: Tensor,
        ranges: Tensor,
        q_len: int,
        k_len: int,
        validated: bool = False,
    ) -> None:
        csr = CSR(*map(_lasting_tensor, (q_offsets, range_offsets, ranges)))
        values = {**csr._asdict(), "q_len": q_len, "k_len": k_len, "validated": validated, "cache": {}}
        for name, value in values.items():
            object.__setattr__(self, name, value)
        _by_tensor[csr.q_offsets] = weakref.ref(self)

    @classmethod
    def _make(
        cls, q_offsets: Any, range_offsets: Any, ranges: Any, q_len: int, k_len: int, validated: bool = True
    ) -> Scope:
        """A scope whose values are right by construction."""
        scope = object.__new__(cls)
        tensors = (
            x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.int32, device="cpu")
            for x in (q_offsets, range_offsets, ranges)
        )
        q_offsets, range_offsets, ranges = tensors
        scope._set(q_offsets, range_offsets, ranges.reshape(-1, 2), q_len, k_len, validated)
        return scope

    @classmethod
    def of(cls, csr: CSR, q_len: int, k_len: int) -> Scope:
        """The scope whose tensors these are, with whatever is cached on it; else a new one."""
        known = _by_tensor.get(csr.q_offsets)
        scope = known() if known is not None else None
        if (
            scope is not None
            and (scope.q_len, scope.k_len) == (q_len, k_len)
            and scope.ranges.data_ptr() == csr.ranges.data_ptr()
        ):
            return scope
        return cls(*csr, q_len, k_len)

    # ---- builders ------------------------------------------------------------------------------------------

    @classmethod
    def dense(cls, q_len: int, k_len: int | None = None) -> Scope:
        """Every query sees every key; ``k_len`` is ``q_len`` unless given."""
        k_len = q_len if k_len is None else k_len
        _check_lengths(q_len=q_len, k_len=k_len)
        return cls._make([0, q_len], [0, 1], [0, k_len], q_len, k_len)

    @classmethod
    def block_causal(cls, frames: int, tokens_per_frame: int) -> Scope:
        """Every token sees its own frame and those before (InfoTok's ViT, HunyuanVideo's mid-block)."""
        _check_lengths(frames=frames, tokens_per_frame=tokens_per_frame)
        n, length = tokens_per_frame, frames * tokens_per_frame
        if not length:
            return cls.dense(0)
        return cls._make(
            range(0, length + n, n),
            range(frames + 1),
            [[0, end] for end in range(n, length + n, n)],
            length,
            length,
        )

    @classmethod
    def per_frame(cls, frames: int, tokens_per_frame: int) -> Scope:
        """Every token sees its own frame (the mid-blocks of VidTok and Cosmos; decoders that run per
        slice)."""
        _check_lengths(frames=frames, tokens_per_frame=tokens_per_frame)
        n, length = tokens_per_frame, frames * tokens_per_frame
        if not length:
            return cls.dense(0)
        ranges = [[start, start + n] for start in range(0, length, n)]
        return cls._make(range(0, length + n, n), range(frames + 1), ranges, length, length)

    @classmethod
    def time_invariant(
        cls, *, tiv: int, tv: int, patches: int, slices: int, patches_see: str = "slice"
    ) -> Scope:
        """TivTok's encoder: the time-invariant tokens see the clip, a time-variant token its slice and the
        invariant tokens.

        Tokens are ordered [TIV | TV 1, patches 1 | TV 2, patches 2 | ...] (arXiv 2606.17590, equations 3 and
        4).

        Args:
            tiv: time-invariant tokens of the clip.
            tv, patches: time-variant tokens and patches of each slice.
            slices: temporal slices of the clip.
            patches_see: what patch queries see, on which the paper is silent: ``slice`` (what the
                time-variant tokens of their slice see), ``patches`` (the patches of their slice) or ``all``
                (the clip).
        """
        _check_lengths(tiv=tiv, tv=tv, patches=patches, slices=slices)
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
        return cls.from_segments(segments, length, length)

    @classmethod
    def packed(
        cls,
        cu_seqlens: Tensor | Sequence[int],
        cu_seqlens_k: Tensor | Sequence[int] | None = None,
        *,
        q_len: int | None = None,
        k_len: int | None = None,
        validate: bool = False,
    ) -> Scope:
        """Clips of different lengths one after the other, each of which sees itself.

        Args:
            cu_seqlens: (clips + 1) cumulative lengths of the clips' queries, from 0. On a device nothing
                waits for them.
            cu_seqlens_k: those of the keys, where they differ.
            q_len, k_len: rows of the query and key tensors; default: the last cumulative length, which only
                the host can know: they must be given for ``cu_seqlens`` on a device. Rows after the last clip
                see nothing, and nobody sees them.
            validate: as for the class.
        """
        cu_q = _cumulative("cu_seqlens", cu_seqlens)
        cu_k = cu_q if cu_seqlens_k is None else _cumulative("cu_seqlens_k", cu_seqlens_k)
        if cu_k.shape != cu_q.shape or cu_k.device != cu_q.device:
            raise ValueError(
                f"cu_seqlens_k: expected the shape and device of cu_seqlens, {tuple(cu_q.shape)} on "
                f"{cu_q.device}, "
                f"got {tuple(cu_k.shape)} on {cu_k.device}"
            )
        k_len = q_len if k_len is None and cu_seqlens_k is None else k_len
        host = cu_q.device.type == "cpu"
        lengths = []
        for name, cu, length in (("cu_seqlens", cu_q, q_len), ("cu_seqlens_k", cu_k, k_len)):
            if length is None:
                if not host:
                    raise ValueError(
                        f"{'q_len' if name == 'cu_seqlens' else 'k_len'}: must be given for {name} on "
                        f"{cu.device}: "
                        "to read its last value is to wait for the device"
                    )
                length = int(cu[-1])
            if host or validate:
                _check_cumulative(name, cu, length)
            lengths.append(length)
        _check_lengths(q_len=lengths[0], k_len=lengths[1])

        def make(cu_q: Tensor, cu_k: Tensor, q_len: int, k_len: int) -> Scope:
            ranges, clips = torch.stack((cu_k[:-1], cu_k[1:]), 1), len(cu_q) - 1
            q_offsets = F.pad(cu_q, (0, 1), value=q_len)  # the rows after the last clip
            return cls._make(
                q_offsets,
                torch.arange(clips + 2, dtype=torch.int32, device=cu_q.device).clamp_(max=clips),
                ranges,
                q_len,
                k_len,
                host or validate,
            )

        scope, back = make(cu_q, cu_k, *lengths), make(cu_k, cu_q, *reversed(lengths))
        scope.cache["back"], back.cache["back"] = back, weakref.ref(scope)
        return scope

    @classmethod
    def from_segments(
        cls, segments: Iterable[tuple[int, int, Sequence[tuple[int, int]]]], q_len: int, k_len: int
    ) -> Scope:
        """From ``[(q_start, q_end, [(k_start, k_end), ...]), ...]`` in any order; queries in no segment see
        nothing.

        Raises ValueError for segments or ranges that overlap, are reversed, or leave the queries or keys.
        """
        _check_lengths(q_len=q_len, k_len=k_len)
        q_offsets, range_offsets = [0], [0]
        ranges: list[tuple[int, int]] = []
        for start, end, seen in sorted(segments, key=lambda segment: segment[:2]):
            if not 0 <= start <= end <= q_len:
                raise ValueError(f"segments: expected queries from 0 to {q_len}, got ({start}, {end})")
            if start == end:
                continue
            if start < q_offsets[-1]:
                raise ValueError(
                    f"segments: ({start}, {end}) overlaps the segment before it, which ends at "
                    f"{q_offsets[-1]}"
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
                    raise ValueError(
                        f"segments: ({start}, {end}) sees {last} and ({lo}, {hi}), which overlap"
                    )
                if lo < hi:
                    ranges.append(last := (lo, hi))
            q_offsets.append(end)
            range_offsets.append(len(ranges))
        if q_offsets[-1] < q_len or len(q_offsets) == 1:
            q_offsets.append(q_len)
            range_offsets.append(len(ranges))
        return cls._make(q_offsets, range_offsets, ranges, q_len, k_len)

    @classmethod
    def cat(cls, scopes: Sequence[Scope]) -> Scope:
        """One scope after the other: packed clips, each with a scope of its own. They live on one device."""
        if not scopes:
            raise ValueError("scopes: expected at least one")
        if len({scope.device for scope in scopes}) > 1:
            raise ValueError(
                f"scopes: expected one device, got "
                f"{', '.join(sorted({str(scope.device) for scope in scopes}))}"
            )
        whole = cls._cat(scopes)
        if whole.device.type != "cpu" and all(
            s.cache.keys() & {"back", "transposed", "origin"} for s in scopes
        ):
            # What the builders know need not be found out on the device.
            back = cls._cat([s.transposed() for s in scopes])
            whole.cache["back"], back.cache["back"] = back, weakref.ref(whole)
        return whole

    @classmethod
    def _cat(cls, scopes: Sequence[Scope]) -> Scope:
        q_start, k_start, r_start = (
            [0, *itertools.accumulate(lengths)]
            for lengths in (
                [s.q_len for s in scopes],
                [s.k_len for s in scopes],
                [len(s.ranges) for s in scopes],
            )
        )
        q_offsets = torch.cat([s.q_offsets[i > 0 :] + q for i, (s, q) in enumerate(zip(scopes, q_start))])
        range_offsets = torch.cat(
            [s.range_offsets[i > 0 :] + r for i, (s, r) in enumerate(zip(scopes, r_start))]
        )
        ranges = torch.cat([s.ranges + k for s, k in zip(scopes, k_start)])
        return cls._make(
            q_offsets, range_offsets, ranges, q_start[-1], k_start[-1], all(s.validated for s in scopes)
        )

    # ---- what it says --------------------------------------------------------------------------------------

    @property
    def csr(self) -> CSR:
        """The three tensors."""
        return CSR(self.q_offsets, self.range_offsets, self.ranges)

    @property
    def device(self) -> torch.device:
        return self.q_offsets.device

    @property
    def segments(self) -> int:
        return len(self.q_offsets) - 1

    def validate(self) -> Scope:
        """Checks the values, waiting for the device if they live on one, and returns the scope. Raises
        ValueError."""
        if not self.validated:
            _check_values(*CSR(*(t.cpu() for t in self.csr)), self.q_len, self.k_len)
            object.__setattr__(self, "validated", True)
        return self

    def safe(self) -> tuple[CSR, Tensor | None]:
        """The tensors with every value clamped to where memory is, and whether one had to be: a boolean
        tensor that stays on the device, None where the values have been checked. Never waits for the
        device."""
        return (
            (self.csr, None)
            if self.validated
            else self.cached("safe", lambda: _clamp(self.csr, self.q_len, self.k_len))
        )

    def cached(self, key: Any, make: Any, device: torch.device | None = None) -> Any:
        """``make()``, kept for the next time, on any stream; not while a CUDA graph is recorded. A graph that
        was recorded with the scope reads what is kept, so the scope must live as long as the graph."""
        return keep(self.cache, key, self.device if device is None else device, make)

    def pairs(self) -> int:
        """How many pairs of a query and a key there are. Waits for the device."""
        return self.cached("pairs", lambda: _pairs(*(t.cpu().long() for t in self.validate().csr)))

    def density(self) -> float:
        """The share of all pairs of a query and a key. Waits for the device."""
        return self.pairs() / max(self.q_len * self.k_len, 1)

    def flops(self, head_dim: int, *, heads: int = 1, backward: bool = False) -> int:
        """Floating point operations of the two matrix products of the forward pass (five of the backward
        pass), two per multiplication and addition. Waits for the device."""
        return self.pairs() * head_dim * heads * (10 if backward else 4)

    def mask(self) -> Tensor:
        """(q_len, k_len) bool: True where the query sees the key. For tests and small scopes. Waits for the
        device."""
        q_offsets, range_offsets, ranges = (t.long() for t in self.validate().csr)
        owner = torch.searchsorted(
            range_offsets[1:], torch.arange(len(ranges), device=self.device), right=True
        )
        edges = torch.zeros(self.segments, self.k_len + 1, dtype=torch.int32, device=self.device)
        one = torch.ones_like(owner, dtype=torch.int32)
        edges.index_put_((owner, ranges[:, 0]), one, accumulate=True).index_put_(
            (owner, ranges[:, 1]), -one, accumulate=True
        )
        rows = torch.searchsorted(q_offsets[1:], torch.arange(self.q_len, device=self.device), right=True)
        return (edges.cumsum(1)[:, :-1] > 0)[rows]

    def transposed(self) -> Scope:
        """Which queries see each key: segments of keys, with ranges of queries. Cached; never waits for a
        device."""
        known = self.cache.get("back")
        known = known() if isinstance(known, weakref.ref) else known
        if known is None:
            known = self.cached("transposed", self._transpose)
            known.cache["back"] = weakref.ref(self)
        return known

    def _transpose(self) -> Scope:
        if "origin" in self.cache and not is_recording(self.device):
            return self.cache["origin"].transposed().to(self.device)
        return _transpose_host(self) if self.device.type == "cpu" else _transpose_device(self)

    def to(self, device: torch.device | str) -> Scope:
        """The scope on another device; this one where it is there already."""
        device = torch.empty(0, device=device).device
        if device == self.device:
            return self
        if self.device.type == "cpu":
            refuse_recording(device, "a scope of the host")
        csr = CSR(*(t.to(device, non_blocking=True) for t in self.csr))
        moved = Scope._make(*csr, self.q_len, self.k_len, self.validated)
        if self.device.type == "cpu":
            moved.cache["origin"] = self  # where a transposition is cheap, and exact
        return moved

    def plot(self, ax: Any = None) -> Any:
        """Draws what sees what with matplotlib, queries downwards and keys to the right, and returns the
        axes."""
        import matplotlib.pyplot as plt
        from matplotlib.collections import PatchCollection
        from matplotlib.patches import Rectangle

        q, r, ranges = (t.tolist() for t in self.validate().csr)
        boxes = [
            Rectangle((lo, q[s]), hi - lo, q[s + 1] - q[s])
            for s in range(self.segments)
            for lo, hi in ranges[r[s] : r[s + 1]]
        ]
        ax = plt.subplots()[1] if ax is None else ax
        ax.add_collection(PatchCollection(boxes, facecolor="tab:blue", edgecolor="white", linewidth=0.5))
        ax.set(
            xlim=(0, max(self.k_len, 1)),
            ylim=(max(self.q_len, 1), 0),
            xlabel="keys",
            ylabel="queries",
            aspect="equal",
            title=f"{100 * self.density():.3g} % of the pairs",
        )
        return ax

    def __reduce__(self) -> tuple:
        return Scope._make, (*self.csr, self.q_len, self.k_len, self.validated)

    def __repr__(self) -> str:
        where = "" if self.device.type == "cpu" else f", device='{self.device}'"
        queries = f"{self.q_len} queries in {self.segments} segments"
        return f"Scope({queries}, {self.k_len} keys in {len(self.ranges)} ranges{where})"


def _lasting_tensor(t: Tensor) -> Tensor:
    """The tensor, or a copy where a compiled graph would not pass it on as the same object (a view), or where
    autograd could not save it (made under ``inference_mode``)."""
    if not t._is_view() and not t.is_inference():
        return t
    with lasting() if torch.is_inference_mode_enabled() else nullcontext():
        return t.clone()


# ---- checks ------------------------------------------------------------------------------------------------


def _check_lengths(**lengths: int) -> None:
    for name, n in lengths.items():
        if isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)) or n < 0:
            raise ValueError(f"{name}: expected a number that is not negative, got {n!r}")


def _cumulative(name: str, values: Tensor | Sequence[int]) -> Tensor:
    cu = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.int32, device="cpu")
    if cu.dim() != 1 or len(cu) < 1:
        raise ValueError(f"{name}: expected shape (clips + 1,), got {tuple(cu.shape)}")
    if cu.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {cu.dtype}")
    return cu.int()


def _check_cumulative(name: str, values: Tensor, last: int, at_most: bool = True) -> None:
    v = values.tolist()
    if v[0] != 0:
        raise ValueError(f"{name}: expected to begin with 0, got {v[0]}")
    for i, (a, b) in enumerate(zip(v, v[1:]), 1):
        if b < a:
            raise ValueError(f"{name}: expected values that never descend, got {b} after {a} at index {i}")
    if v[-1] > last or not at_most and v[-1] < last:
        raise ValueError(f"{name}: expected to end with {'at most ' if at_most else ''}{last}, got {v[-1]}")


def _check_values(q_offsets: Tensor, range_offsets: Tensor, ranges: Tensor, q_len: int, k_len: int) -> None:
    _check_cumulative("q_offsets", q_offsets, q_len, at_most=False)
    _check_cumulative("range_offsets", range_offsets, len(ranges), at_most=False)
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


def _clamp(csr: CSR, q_len: int, k_len: int) -> tuple[CSR, Tensor]:
    """The nearest scope that is valid, and whether it is another one. No value is waited for."""
    q, r = (
        _clamp_offsets(t, last) for t, last in ((csr.q_offsets, q_len), (csr.range_offsets, len(csr.ranges)))
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


def _clamp_offsets(offsets: Tensor, last: int) -> Tensor:
    inner = offsets[1:-1].long().clamp(0, last).cummax(0).values if len(offsets) > 2 else offsets[:0].long()
    return F.pad(F.pad(inner, (1, 0)), (0, 1), value=last)


# ---- the other way round -----------------------------------------------------------------------------------


def _pairs(q_offsets: Tensor, range_offsets: Tensor, ranges: Tensor) -> int:
    before = F.pad((ranges[:, 1] - ranges[:, 0]).cumsum(0), (1, 0))
    return int((q_offsets.diff() * before[range_offsets].diff()).sum())


def _transpose_host(scope: Scope) -> Scope:
    """Cuts the keys wherever a range begins or ends; each piece is seen by whole segments, neighbors among
    them joined."""
    q, r, ranges = (t.long() for t in scope.csr)
    segment = torch.repeat_interleave(torch.arange(scope.segments), r.diff())
    kept = (ranges[:, 0] < ranges[:, 1]) & (q.diff()[segment] > 0)
    segment, ranges = segment[kept], ranges[kept]
    cuts = torch.cat((torch.tensor([0, scope.k_len]), ranges.flatten())).unique()
    if len(cuts) < 2:
        cuts = torch.tensor([0, scope.k_len])
    first, last = torch.searchsorted(cuts, ranges).unbind(1)
    count = last - first
    owner = torch.repeat_interleave(segment, count)
    piece = torch.arange(len(owner)) + torch.repeat_interleave(first - count.cumsum(0) + count, count)
    order = (piece * scope.segments + owner).argsort()
    piece, owner = piece[order], owner[order]
    starts, ends = q[owner], q[owner + 1]
    apart = (piece[1:] != piece[:-1]) | (ends[:-1] != starts[1:])
    border = torch.ones(min(len(piece), 1), dtype=torch.bool)
    is_first, is_last = torch.cat((border, apart)), torch.cat((apart, border))
    offsets = torch.searchsorted(piece[is_first], torch.arange(len(cuts)))
    return Scope._make(
        cuts.int(),
        offsets.int(),
        torch.stack((starts[is_first], ends[is_last]), 1).int(),
        scope.k_len,
        scope.q_len,
    )


def _transpose_device(scope: Scope) -> Scope:
    """The same without waiting for a value: sizes are upper bounds, and what is too much is empty pieces at
    the end."""
    q, r, ranges = (t.long() for t in scope.safe()[0])
    segments, device = scope.segments, scope.device
    if 2 * len(ranges) * segments > 1 << 24:
        raise ValueError(
            f"scope: {len(ranges)} ranges in {segments} segments on {device} are too many to transpose "
            f"there; build "
            "the scope on the host, with Scope.packed or with Scope.cat of such"
        )
    cuts = F.pad(F.pad(ranges.flatten().sort().values, (1, 0)), (0, 1), value=scope.k_len)
    owner = torch.searchsorted(r[1:], torch.arange(len(ranges), device=device), right=True)
    first, last = torch.searchsorted(cuts, ranges).unbind(1)
    edges = torch.zeros(len(cuts), segments, dtype=torch.int32, device=device)
    one = torch.ones_like(owner, dtype=torch.int32)
    edges.index_put_((first, owner), one, accumulate=True).index_put_((last, owner), -one, accumulate=True)
    sees = (edges.cumsum(0)[:-1] > 0) & (cuts[1:] > cuts[:-1])[:, None]
    begins = sees & ~F.pad(sees, (1, 0))[:, :-1]
    stops = sees & ~F.pad(sees, (0, 1))[:, 1:]
    # The i-th run that begins is the i-th that stops. One more place takes everything that is not a run.
    bound = sees.shape[0] * ((segments + 1) // 2)
    found = torch.zeros(bound + 1, 2, dtype=torch.int64, device=device)
    for column, (where, values) in enumerate(((begins, q[:-1]), (stops, q[1:]))):
        place = torch.where(where.flatten(), where.flatten().cumsum(0) - 1, bound)
        found[:, column].scatter_(0, place, values.expand_as(sees).flatten())
    offsets = F.pad(begins.sum(1).cumsum(0), (1, 0))
    return Scope._make(cuts.int(), offsets.int(), found[:-1].int(), scope.k_len, scope.q_len)
