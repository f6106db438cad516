"""Checked calls of ``fsq`` as data, as every backend sees them, and the tables that kernels read."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from vtok_fast.dispatch.lasting import lasting
from vtok_fast.reference import fsq as reference


class FSQCall(NamedTuple):
    """One checked call, as backends see it."""

    z: Tensor
    levels: tuple[int, ...]
    variant: str
    dim: int


class FSQDecodeCall(NamedTuple):
    """A checked call of `fsq_decode`."""

    indices: Tensor
    levels: tuple[int, ...]
    dtype: torch.dtype
    dim: int


class FSQBackwardCall(NamedTuple):
    """The gradient of the codes, and the call that they came from."""

    grad: Tensor
    z: Tensor
    levels: tuple[int, ...]
    variant: str
    dim: int


@functools.lru_cache(maxsize=256)
def threshold_table(levels: tuple[int, ...], variant: str) -> Tensor:
    """float32 (channels, most levels - 1) on the CPU, contiguous: each channel's thresholds, followed by NaN,
    which nothing reaches. Do not write to it."""
    with lasting():
        table = torch.full((len(levels), max(levels) - 1), math.nan, dtype=torch.float32)
        for row, level in zip(table, levels):
            row[: level - 1] = reference.thresholds(level, variant)
    return table


def empty_outputs(z: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Tensors for the codes and the indices of ``z``."""
    positions = list(z.shape)
    del positions[dim]
    return torch.empty_like(z), z.new_empty(positions, dtype=torch.int32)


# The op's signature: a call taken apart.
torch.library.define(
    "vtok_fast::fsq_quantize",
    "(Tensor z, int[] levels, str variant, int dim, str? backend) -> (Tensor, Tensor)",
)
