"""Checked calls of ``pack_tokens`` and ``unpack_tokens`` as data, and what every backend makes of them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from vtok_fast.dispatch.lasting import lasting
from vtok_fast.ops.fsq import fsq_quantize


class PackCall(NamedTuple):
    """Which tokens go into a row each."""

    tokens: Tensor
    keep: Tensor
    capacity: int | None
    levels: tuple[int, ...] | None
    variant: str


class UnpackCall(NamedTuple):
    """Where the rows go back to."""

    values: Tensor
    mask: Tensor
    fill: float


Packed = tuple[Tensor, Tensor, Tensor]  # values, indices, cu_seqlens

# The signatures of the ops.
torch.library.define(
    "vtok_fast::pack_tokens",
    "(Tensor tokens, Tensor keep, SymInt? capacity, int[]? levels, str variant, str? backend) -> "
    "(Tensor, Tensor, Tensor)",
)
torch.library.define(
    "vtok_fast::unpack_tokens", "(Tensor values, Tensor mask, float fill, str? backend) -> Tensor"
)


def quantized(values: Tensor, indices: Tensor, call: PackCall) -> Tensor:
    """FSQ of the packed rows, if asked for; 0 in rows that are not tokens."""
    if call.levels is None:
        return values
    values = fsq_quantize(values, call.levels, variant=call.variant).indices
    return values if call.capacity is None else values.masked_fill_(indices < 0, 0)


@functools.lru_cache(maxsize=64)
def element(value: float, dtype: torch.dtype) -> Tensor:
    """One element on the CPU. Do not write to it."""
    with lasting():
        return torch.tensor([value], dtype=torch.float64).to(dtype)


def dense_output(values: Tensor, mask: Tensor) -> Tensor:
    """An empty result of unpacking: the channels second in shape and innermost in memory."""
    dense = values.new_empty(*mask.shape, *values.shape[1:])
    return dense if values.dim() == 1 else dense.movedim(-1, 1)
