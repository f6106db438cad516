"""The memory layout of a swapped module's result.

The kernels write channels-last. Between swapped modules of one known network that saves every copy; whoever
else reads a result, by ``view`` or by its strides, finds the layout that PyTorch's own code gives it:
channels-last where the input or the weights are, else contiguous.
"""

from __future__ import annotations

import enum
import itertools
from typing import Any

import torch
from torch import Tensor, nn

_BLOCKWISE = 16  # channels from which turning a matrix is the faster way


class Place(enum.Enum):
    """Who gets a swapped module's result."""

    ANYWHERE = enum.auto()  # anybody; the input comes from anybody too
    INSIDE = enum.auto()  # known code of a network, which looks at no strides
    EDGE = enum.auto()  # anybody; the input is a result from inside
    UNCHANGED = enum.auto()  # whoever got the class's own, at its strides


def is_channels_last(x: Tensor) -> bool:
    """Whether a 4D or 5D tensor's strides are those of channels-last, dense or not, and of no other layout:
    PyTorch's rule for the layout of a convolution's result."""
    if x.dim() not in (4, 5) or x.stride(1) == 0:
        return False
    least = 0
    for axis in (1, *range(x.dim() - 1, 1, -1), 0):
        size, stride = x.shape[axis], x.stride(axis)
        if size == 0 or stride < least or axis == 0 and least == x.stride(1):
            return False
        least = stride * size
    return True


def as_pytorch(result: Any, given: Tensor | None, module: nn.Module) -> Any:
    """A result, or a tuple that begins with it, in PyTorch's layout for the input ``given``."""
    if isinstance(result, tuple):
        first = as_pytorch(result[0], given, module) if result else None
        if not result or first is result[0]:
            return result
        rest = result[1:]
        return type(result)(first, *rest) if hasattr(result, "_fields") else (first, *rest)
    if not isinstance(result, Tensor) or result.dim() not in (3, 4, 5) or result.is_contiguous():
        return result
    if result.dim() > 3 and (given is not None and is_channels_last(given) or _weights_are(module)):
        return result
    return contiguous(result) if result.dim() == 3 or is_channels_last(result) else result


def contiguous(x: Tensor) -> Tensor:
    """``x.contiguous()`` of a channels-last tensor. On a CPU PyTorch turns a matrix in blocks, and a tensor
    of more axes element by element, which takes up to 25 times as long."""
    if x.is_cuda or x.shape[1] < _BLOCKWISE or x.stride(1) != 1:
        return x.contiguous()
    videos = [video.flatten(1).contiguous() for video in x]
    return (videos[0] if len(videos) == 1 else torch.stack(videos)).view(x.shape)


def from_channels_last(value: Any) -> Any:
    """A tensor as foreign code expects it, contiguous where a swapped module left it channels-last; anything
    else as it is."""
    return contiguous(value) if isinstance(value, Tensor) and is_channels_last(value) else value


def _weights_are(module: nn.Module) -> bool:
    """Whether a module was moved to channels-last: its first kernel of more than one tap shows that."""
    kernels = (p for p in module.parameters() if p.dim() in (4, 5) and p.shape[2:].numel() > 1)
    return any(map(is_channels_last, itertools.islice(kernels, 1)))
