"""Comparing what a module and its swapped copy give, tensors in whatever tuples, mappings and objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtok_fast import parity

_ATOMS = (str, bytes, bool, int, float, complex, type(None), type, nn.Module)


class Incomparable(Exception):
    """Two results that have no tensors at the same places; the message says what they have."""


def close(fast: Any, eager: Any, ref64: Any, *, inside: float = 0.0) -> parity.Parity:
    """The worst over all tensors: the *close* contract on floating point ones (``inside`` as there), equality
    with the eager ones on integers.

    Raises Incomparable.
    """
    measured = [
        parity.close(f, r, e, inside=inside) if f.is_floating_point() else parity.exact(f, e)
        for f, e, r in (map(_real, values) for values in _tensors(fast, eager, ref64))
    ]
    return max(measured, key=lambda p: (not p.ok, p.error / p.bound if p.bound else 0.0))


def fast(y: Any, ref64: Any) -> parity.Parity:
    """The worst over all floating point tensors of the *fast* contract.

    Raises Incomparable.
    """
    measured = [parity.fast(f, r) for f, r in _floating(y, ref64)]
    return max(measured, key=lambda p: (not p.ok, p.error))


def psnr(y: Any, ref64: Any) -> float:
    """`parity.psnr` of the largest floating point tensor: of a model that decodes, the video.

    Raises Incomparable.
    """
    return parity.psnr(*max(_floating(y, ref64), key=lambda pair: pair[0].numel()))


def _floating(y: Any, ref64: Any) -> list[tuple[Tensor, ...]]:
    pairs = [(_real(f), _real(r)) for f, r in _tensors(y, ref64) if f.is_floating_point() or f.is_complex()]
    if not pairs:
        raise Incomparable("the result holds no floating point tensor")
    return pairs


def equal(fast: Any, eager: Any, ref64: Any = None) -> parity.Parity:
    """The worst over all tensors of the *exact* contract between a swapped and an eager result.

    Raises Incomparable.
    """
    return max((parity.exact(f, e) for f, e in _tensors(fast, eager)), key=lambda p: p.error)


def _real(value: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones."""
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def _tensors(*values: Any) -> list[tuple[Tensor, ...]]:
    if found := list(tensors(*values)):
        return found
    kind = type(values[0]).__name__
    raise Incomparable(f"the result, a {kind}, holds no tensor that could be compared")


def tensors(*values: Any, _seen: frozenset[int] = frozenset()) -> Iterator[tuple[Tensor, ...]]:
    """The tensors that stand at the same place in several results of one kind: in tuples, lists, mappings,
    dataclasses and other objects. Where one has none (a cache entry that nothing reads is not kept, say),
    there is nothing to compare.

    Raises Incomparable for results of different lengths or keys, and for sparse and nested tensors.
    """
    first = values[0]
    if id(first) in _seen:
        return
    seen = _seen | {id(first)}
    if all(isinstance(v, Tensor) for v in values):
        if len({v.shape for v in values}) > 1:
            raise Incomparable(f"tensors of shapes {[tuple(v.shape) for v in values]}")
        if layout := next((v.layout for v in values if v.layout is not torch.strided or v.is_nested), None):
            raise Incomparable(f"the result holds a tensor of layout {layout}, whose values are not compared")
        yield values
    elif any(isinstance(v, (Tensor, *_ATOMS)) for v in values):
        return
    elif all(isinstance(v, Mapping) for v in values):
        if any(v.keys() != first.keys() for v in values):
            raise Incomparable(f"mappings with the keys {[sorted(map(str, v)) for v in values]}")
        for key in first:
            yield from tensors(*(v[key] for v in values), _seen=seen)
    elif all(isinstance(v, (tuple, list)) for v in values):
        if len({len(v) for v in values}) > 1:
            raise Incomparable(f"sequences of lengths {[len(v) for v in values]}")
        for parts in zip(*values):
            yield from tensors(*parts, _seen=seen)
    elif all(type(v) is type(first) for v in values):
        held = [_attributes(v) for v in values]
        for name in held[0]:
            if all(name in attributes for attributes in held):
                yield from tensors(*(attributes[name] for attributes in held), _seen=seen)


def _attributes(value: Any) -> dict[str, Any]:
    """What an object holds, in its ``__dict__`` or its slots."""
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    return {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(
        value, "__dict__", {}
    )
