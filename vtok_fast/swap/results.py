"""Comparing what a module and its swapped copy give, tensors in whatever tuples, lists and mappings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from vtok_fast import parity


def close(fast: Any, eager: Any, ref64: Any) -> parity.Parity:
    """The worst over all tensors: the *close* contract on floating point ones, equality with the eager ones
    on integers."""
    measured = [
        parity.close(f, r, e) if f.is_floating_point() else parity.exact(f, e)
        for f, e, r in tensors(fast, eager, ref64)
    ]
    return max(measured, key=lambda p: (not p.ok, p.error / p.bound if p.bound else 0.0))


def equal(fast: Any, eager: Any, ref64: Any = None) -> parity.Parity:
    """The worst over all tensors of the *exact* contract between a swapped and an eager result."""
    return max((parity.exact(f, e) for f, e in tensors(fast, eager)), key=lambda p: p.error)


def tensors(*values: Any) -> Iterator[tuple[Tensor, ...]]:
    """The tensors that stand at the same place in several results of one kind; where one has none (a cache
    entry that nothing reads is not kept, say), there is nothing to compare."""
    if all(isinstance(v, Tensor) for v in values):
        yield values
    elif all(isinstance(v, Mapping) for v in values):
        for key in values[0]:
            yield from tensors(*(v[key] for v in values))
    elif all(isinstance(v, (tuple, list)) for v in values):
        for parts in zip(*values, strict=True):
            yield from tensors(*parts)
