"""One checked call of ``causal_conv3d`` as data, as every backend sees it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtok_fast.dispatch import backends

Triple = tuple[int, int, int]
MODES = ("zeros", "replicate", "reflect")  # in the order of the native module's PadMode


class Geometry(NamedTuple):
    """Where a convolution reads: everything about a call that is neither a tensor nor what follows the
    sum."""

    stride: Triple = (1, 1, 1)
    dilation: Triple = (1, 1, 1)
    groups: int = 1
    pad: tuple[int, int, int, int, int, int] = (0, 0, 0, 0, 0, 0)  # front, back, top, bottom, left, right
    time_mode: str = "zeros"
    spatial_mode: str = "zeros"
    upsample: Triple = (1, 1, 1)
    upsample_first_frame_once: bool = False

    def output_size(self, x: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """(To, Ho, Wo) before depth-to-space, for ``x`` = (T, H, W); the cache does not matter, it stands in
        for padding."""
        size = [n * u for n, u in zip(x, self.upsample)]
        if self.upsample_first_frame_once:
            size[0] -= self.upsample[0] - 1
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, kernel)]
        before, after = self.pad[::2], self.pad[1::2]
        return [
            (n + p + q - span) // s + 1 for n, p, q, span, s in zip(size, before, after, spans, self.stride)
        ]

    def native(self) -> tuple[Any, ...]:
        """The same fields as the native module takes them: the modes as numbers."""
        return _native(self)


class ConvCall(NamedTuple):
    """One checked call, as backends see it."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    cache: Tensor | None = None
    residual: Tensor | None = None
    geometry: Geometry = Geometry()
    alpha: float | None = None
    activation: str | None = None
    depth_to_space: Triple = (1, 1, 1)

    def flat(self) -> tuple[Any, ...]:
        """The arguments of ``torch.ops.vtok_fast.causal_conv3d`` without the two that choose a backend."""
        return *self[:5], *self.geometry, *self[6:]

    @classmethod
    def of_flat(cls, *args: Any) -> ConvCall:
        """The call that `flat` took apart; torch's dispatcher turns its tuples into lists."""
        fields: Any = [tuple(a) if isinstance(a, list) else a for a in args]
        tensors, geometry, rest = fields[:5], Geometry(*fields[5:13]), fields[13:]
        return cls._make((*tensors, geometry, *rest))

    def empty_output(self, depth_to_space: Triple | None = None, device: Any = None) -> Tensor:
        """A tensor of the output's shape in ``channels_last_3d``, on the device of ``x`` or another."""
        ratios = self.depth_to_space if depth_to_space is None else depth_to_space
        plain = type(self.x) is torch.Tensor  # else sizes may be symbols, which nothing remembers
        shape_of = _output_shape if plain else _output_shape.__wrapped__
        return torch.empty(
            shape_of(self.geometry, self.x.shape, self.weight.shape, ratios),
            dtype=self.x.dtype,
            device=device or self.x.device,
            memory_format=torch.channels_last_3d,
        )


@functools.lru_cache(maxsize=4096)
def _native(geometry: Geometry) -> tuple[Any, ...]:
    modes: Any = {
        "time_mode": MODES.index(geometry.time_mode),
        "spatial_mode": MODES.index(geometry.spatial_mode),
    }
    return geometry._replace(**modes)


@functools.lru_cache(maxsize=4096)
def _output_shape(geometry: Geometry, x: torch.Size, weight: torch.Size, ratios: Triple) -> tuple[int, ...]:
    size = geometry.output_size(x[2:], weight[2:])
    return x[0], weight[0] // math.prod(ratios), *(s * r for s, r in zip(size, ratios))


# The op's signature: a call taken apart.
torch.library.define(
    "vtok_fast::causal_conv3d",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? cache, Tensor? residual, int[] stride, int[] dilation, "
    "int groups, int[] pad, str time_mode, str spatial_mode, int[] upsample, "
    "bool upsample_first_frame_once, float? alpha, str? activation, int[] depth_to_space, "
    "str? backend, str? preferred) -> Tensor",
)


class ConvBackwardCall(NamedTuple):
    """Which first-order gradients of the linear part of a call are wanted, as backends see it."""

    grad: Tensor  # of the sum itself: before depth-to-space, activation and residual
    x: Tensor
    weight: Tensor
    cache: Tensor | None
    geometry: Geometry
    wanted: tuple[bool, bool, bool, bool]  # of x, weight, bias, cache


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # of x, weight, bias, cache


def run(call: ConvCall, backend: str | None) -> Tensor:
    """Runs a checked call on the chosen backend."""
    return backends.select("causal_conv3d", call, backend).run(call)
