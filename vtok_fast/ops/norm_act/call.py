"""Checked calls of ``norm_act`` as data, as every backend sees them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class NormCall(NamedTuple):
    """One checked call, as backends see it."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    residual: Tensor | None
    kind: str
    groups: int
    per_frame: bool
    eps: float
    activation: str | None
    rounding: str


class NormBackwardCall(NamedTuple):
    """Which first-order gradients of a call are wanted, as backends see it."""

    grad: Tensor
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    residual: Tensor | None
    kind: str
    groups: int
    per_frame: bool
    eps: float
    activation: str | None
    rounding: str
    wanted: tuple[bool, ...]  # of x, weight, bias, scale, shift, residual

    @property
    def forward(self) -> NormCall:
        """The call whose gradients they are."""
        return NormCall(*self[1:-1])


Gradients = tuple[Tensor | None, ...]  # of x, weight, bias, scale, shift, residual; the last is the first


def output_format(x: Tensor) -> torch.memory_format:
    """The memory format of the result: that of ``x``, where it has one of the two; ``channels_last_3d`` where
    it has both."""
    if x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.contiguous_format
    return torch.channels_last_3d


# The op's signature: a call taken apart.
torch.library.define(
    "vtok_fast::norm_act",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? residual, str kind, "
    "int groups, bool per_frame, float eps, str? activation, str rounding, str? backend) -> Tensor",
)
