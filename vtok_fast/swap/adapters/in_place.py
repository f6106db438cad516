"""What the contract *exact* may do to a chain of PyTorch's own operations: the same operations in the same
order, with fewer buffers. SiLU's product takes the place of the sigmoid, a residual is added where the
convolution wrote, what is padded is copied once, and what is not padded is not copied.

The bits stay because each operation gets the same numbers at the same strides as before, on which the order
of a convolution's sums may depend; a product and a sum of two numbers have no order. Gradients need what is
overwritten here, so where they are recorded the class's own method runs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtok_fast.swap.layout import is_channels_last


def without_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function where nothing records, compiles, or drops values; else the class's own forward."""

    @functools.wraps(function)
    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() or module.training or torch.compiler.is_compiling():
            return type(module).forward(module, *args, **kwargs)
        return function(module, *args, **kwargs)

    return forward


def silu_(x: Tensor) -> Tensor:
    """``x * torch.sigmoid(x)``, in the buffer of the sigmoid."""
    return torch.sigmoid(x).mul_(x)


def plus(first: Tensor, second: Tensor, *, into: Tensor) -> Tensor:
    """``first + second``, in ``into``, that of the two which nobody else reads, where the sum has its dtype
    and strides."""
    other = second if into is first else first
    if into.shape == other.shape and into.dtype == other.dtype:
        in_order = into.is_contiguous() and all(a >= b for a, b in itertools.pairwise(other.stride()))
        if in_order or into.stride() == other.stride():
            return into.add_(other)
    return first + second


def padded(
    x: Tensor,
    pad: Callable[[Tensor], Tensor],
    front: int,
    around: tuple[int, int, int, int] = (0, 0, 0, 0),
    *,
    replicate: bool,
) -> Tensor:
    """``pad(x)``, written once; ``x`` itself where nothing is padded and the layout is the same.

    Args:
        x: (N, C, T, ...).
        pad: what the model does: only tried on a corner of ``x``, for the layout of its result.
        front: frames in front, zeros or (``replicate``) copies of the first one.
        around: zeros at the left, the right, the top and the bottom, of a video.
    """
    corner = pad(x[tuple(slice(2) for _ in x.shape)])
    layout = torch.channels_last_3d if is_channels_last(corner) else torch.contiguous_format
    if not front and not any(around):
        return x.contiguous(memory_format=layout)
    left, right, top, bottom = around
    space = [] if x.dim() == 3 else [x.shape[3] + top + bottom, x.shape[4] + left + right]
    shape = (*x.shape[:2], x.shape[2] + front, *space)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    inside = y[:, :, front:]
    if any(around):
        bottom_row, right_column = top + x.shape[3], left + x.shape[4]
        for edge in (y[..., :top, :], y[..., bottom_row:, :], y[..., :left], y[..., right_column:]):
            edge.zero_()
        inside = inside[..., top:bottom_row, left:right_column]
    inside.copy_(x)
    if front and replicate:
        y[:, :, :front] = y[:, :, front : front + 1]
    elif front:
        y[:, :, :front].zero_()
    return y
