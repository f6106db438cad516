"""``Scope``: which keys each query sees, as a short list of ranges per segment of queries. No mask exists,
unless one is asked for.

The form is compressed sparse rows: segment s holds the queries ``q_offsets[s]`` to ``q_offsets[s + 1]``, and
all of them see the key ranges ``ranges[range_offsets[s]:range_offsets[s + 1]]``. TivTok's Scope-Induced
Factorization (arXiv 2606.17590), block-causal and per-frame attention, and packed clips of different lengths
are a few numbers each.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from vtok_fast.dispatch.lasting import is_recording, keep, lasting, refuse_recording
from vtok_fast.ops.scope_attention import builders, dense, transpose
from vtok_fast.ops.scope_attention.csr import (
    CSR,
    check_lengths,
    check_tensors,
    check_values,
    clamp,
)

# A compiled graph carries the tensors of a scope but not the object, on which plans are cached. This finds it
# again.
_by_tensor: WeakIdKeyDictionary = WeakIdKeyDictionary()


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
        check_lengths(q_len=q_len, k_len=k_len)
        check_tensors(CSR(q_offsets, range_offsets, ranges))
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
        made = cls._make(*builders.dense(q_len, q_len if k_len is None else k_len))
        return made._called(lambda: ["all queries"])

    @classmethod
    def block_causal(cls, frames: int, tokens_per_frame: int) -> Scope:
        """Every token sees its own frame and those before (InfoTok's ViT, HunyuanVideo's mid-block)."""
        made = cls._make(*builders.block_causal(frames, tokens_per_frame))
        return made._called(lambda: [f"frame {i + 1}" for i in range(frames)])

    @classmethod
    def per_frame(cls, frames: int, tokens_per_frame: int) -> Scope:
        """Every token sees its own frame (the mid-blocks of VidTok and Cosmos; decoders that run per
        slice)."""
        made = cls._make(*builders.per_frame(frames, tokens_per_frame))
        return made._called(lambda: [f"frame {i + 1}" for i in range(frames)])

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
        made = cls._make(*builders.time_invariant(tiv, tv, patches, slices, patches_see))
        return made._called(lambda: builders.time_invariant_names(tiv, tv, patches, slices, patches_see))

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
        cu_q, cu_k, q_len, k_len, checked = builders.packed_lengths(
            cu_seqlens, cu_seqlens_k, q_len, k_len, validate
        )
        scope = cls._make(*builders.packed(cu_q, cu_k, q_len, k_len), checked)
        back = cls._make(*builders.packed(cu_k, cu_q, k_len, q_len), checked)
        scope.cache["back"], back.cache["back"] = back, weakref.ref(scope)
        clips = len(cu_q) - 1
        return scope._called(lambda: [*(f"clip {i + 1}" for i in range(clips)), "after the last clip"])

    @classmethod
    def from_segments(
        cls, segments: Iterable[tuple[int, int, Sequence[tuple[int, int]]]], q_len: int, k_len: int
    ) -> Scope:
        """From ``[(q_start, q_end, [(k_start, k_end), ...]), ...]`` in any order; queries in no segment see
        nothing.

        Raises ValueError for segments or ranges that overlap, are reversed, or leave the queries or keys.
        """
        return cls._make(*builders.from_segments(segments, q_len, k_len))

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
        parts = builders.cat([builders.Parts(*s.csr, s.q_len, s.k_len) for s in scopes])
        whole = cls._make(*parts, all(s.validated for s in scopes))
        names = [s.cache["names"] for s in scopes if "names" in s.cache]
        if len(names) < len(scopes):
            return whole
        return whole._called(lambda: [f"{i}: {name}" for i, made in enumerate(names, 1) for name in made()])

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
            check_values(*CSR(*(t.cpu() for t in self.csr)), self.q_len, self.k_len)
            object.__setattr__(self, "validated", True)
        return self

    def safe(self) -> tuple[CSR, Tensor | None]:
        """The tensors with every value clamped to where memory is, and whether one had to be: a boolean
        tensor that stays on the device, None where the values have been checked. Never waits for the
        device."""
        return (
            (self.csr, None)
            if self.validated
            else self.cached("safe", lambda: clamp(self.csr, self.q_len, self.k_len))
        )

    def cached(self, key: Any, make: Any, device: torch.device | None = None) -> Any:
        """``make()``, kept for the next time, on any stream; not while a CUDA graph is recorded. A graph that
        was recorded with the scope reads what is kept, so the scope must live as long as the graph."""
        return keep(self.cache, key, self.device if device is None else device, make)

    def pairs(self) -> int:
        """How many pairs of a query and a key there are. Waits for the device."""
        return self.cached("pairs", lambda: dense.count(CSR(*(t.cpu() for t in self.validate().csr))))

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
        return dense.mask(self.validate().csr, self.q_len, self.k_len)

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
        on_host = self.device.type == "cpu"
        turn, csr = (transpose.on_host, self.csr) if on_host else (transpose.on_device, self.safe()[0])
        return Scope._make(*turn(csr, self.k_len), self.k_len, self.q_len)

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

    @property
    def names(self) -> tuple[str, ...]:
        """What the queries of each segment are, as far as the builder knows."""
        known = self.cache["names"]() if "names" in self.cache else []
        if len(known) != self.segments:
            known = [f"segment {i + 1}" for i in range(self.segments)]
        return tuple(known)

    def _called(self, names: Callable[[], list[str]]) -> Scope:
        self.cache["names"] = names
        return self

    def plot(self, where: str | os.PathLike | Any = None) -> Any:
        """Draws what sees what with matplotlib, queries downwards and keys to the right, the segments by
        their names.

        Args:
            where: a file to write (.png, .svg or .pdf), or the axes to draw in. None: axes of their own.

        Returns the axes.
        """
        from vtok_fast.ops.scope_attention.picture import draw

        return draw(self.validate().csr, self.q_len, self.k_len, self.density(), self.names, where)

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
