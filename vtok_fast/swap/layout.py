"""The memory layout of a swapped module's result.

The kernels write channels-last. Between swapped modules of one known network that saves every copy; whoever
else reads a result, by ``view`` or by its strides, finds the layout that the class's own method gives it.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from vtok_fast.swap.simulate import simulated

_BLOCKWISE = 16  # channels from which turning a matrix is the faster way
_REMEMBERED = 64  # sets of sizes and strides, for each module


class Place(enum.Enum):
    """Who gets a swapped module's result."""

    ANYWHERE = enum.auto()  # anybody; the input comes from anybody too
    NETWORK = enum.auto()  # anybody, of a network whose parts are inside
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


def contiguous(x: Tensor) -> Tensor:
    """``x.contiguous()``, with a contiguous tensor's strides on axes of one element, too. On a CPU PyTorch
    turns a matrix in blocks, and a tensor of more axes element by element, which takes up to 25 times as
    long: so a channels-last one is turned video by video."""
    if x.is_contiguous():
        return x if 1 not in x.shape or x.stride() == _row_major(x.shape) else x.flatten().view(x.shape)
    if x.is_cuda or x.dim() < 4 or x.shape[1] < _BLOCKWISE or x.stride(1) != 1 or not is_channels_last(x):
        return x.contiguous()
    videos = [video.flatten(1).contiguous() for video in x]
    return (videos[0] if len(videos) == 1 else torch.stack(videos)).view(x.shape)


def from_channels_last(value: Any) -> Any:
    """A tensor as foreign code expects it, contiguous where a swapped module left it channels-last; anything
    else as it is."""
    return contiguous(value) if isinstance(value, Tensor) and is_channels_last(value) else value


Strides = tuple[int, ...]


class OwnLayout:
    """The layout that the class's own method gives its result, or the first of a tuple.

    For arguments and weights of which none is channels-last it is contiguous where the class is ``known`` for
    that. Else the method is run on fake tensors (`vtok_fast.swap.simulate`), once for each set of sizes and
    strides: PyTorch chooses by sizes, weights and threads whether a convolution keeps channels-last.
    """

    def __init__(self, module: nn.Module, attribute: str, known: bool):
        self._attribute, self._known = attribute, known
        self._strides: dict[Any, Strides | None] = {}
        weights = ((name, p) for name, p in module.named_parameters() if not is_lazy(p))
        kernels = (name for name, p in weights if p.dim() in (4, 5) and p.shape[2:].numel() > 1)
        *self._path, self._kernel = next(kernels, "").split(".")

    def of(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any], *, inner: bool = False
    ) -> Strides | bool:
        """The strides of what a call will give; or whether that is channels-last, where only this is known.

        Args:
            module, args, kwargs: the call, which may change its arguments.
            inner: whether the arguments are results of swapped modules, which would be contiguous without
                swaps.
        """
        last = self._weights_are_last(module)
        if inner or not any(map(is_channels_last, _tensors((*args, *kwargs.values())))):
            if self._known and not last:
                return False
        else:
            last = True
        return last if _is_traced() else self._find(module, args, kwargs, inner) or last

    def _weights_are_last(self, module: nn.Module) -> bool:
        """Whether a module was moved to channels-last: its first kernel of more than one tap shows that."""
        part: Any = module
        for name in self._path:
            part = part._modules.get(name)
            if part is None:
                return False
        kernel = part._parameters.get(self._kernel)
        return kernel is not None and is_channels_last(kernel)

    def _find(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], inner: bool) -> Strides | None:
        """The strides, or None where the method cannot be run on fake tensors."""
        try:
            signature = _signature((args, kwargs), inner)
        except TypeError:  # an argument that may hold or do anything
            return None
        autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        state = torch.get_num_threads(), torch.backends.mkldnn.enabled, module.training, autocast
        key = signature, inner, self._weights_are_last(module), state
        if key not in self._strides:
            if len(self._strides) >= _REMEMBERED:
                self._strides.clear()
            own = getattr(type(module), self._attribute)
            try:
                result = simulated(own, module, args, kwargs, contiguous=inner)
                first = result[0] if isinstance(result, tuple) else result
                self._strides[key] = tuple(first.stride()) if isinstance(first, Tensor) else None
            except Exception:
                self._strides[key] = None
        return self._strides[key]


def laid_out(result: Any, layout: Strides | bool) -> Any:
    """A result, or a tuple that begins with it, in a layout as `OwnLayout.of` gives it."""
    first = result[0] if isinstance(result, tuple) and result else result
    if not isinstance(first, Tensor) or first.dim() < 3 or layout is True and first.dim() > 3:
        return result
    if isinstance(layout, tuple) and len(layout) == first.dim():
        laid = with_strides(first, layout)
    elif first.is_contiguous() or first.dim() == 3 or is_channels_last(first):
        laid = contiguous(first)
    else:  # a part of a larger one, as the class's own method gives it
        laid = first
    if laid is first:
        return result
    if not isinstance(result, tuple):
        return laid
    rest = (laid, *result[1:])
    return type(result)(*rest) if hasattr(result, "_fields") else rest


def with_strides(y: Tensor, strides: Strides) -> Tensor:
    """A tensor with these strides, except those of axes of one element: itself, or a copy; a contiguous one
    where strides overlap."""
    if all(a == b or n == 1 for a, b, n in zip(y.stride(), strides, y.shape)):
        return y
    reach, wanted = 0, sorted((s, n) for s, n in zip(strides, y.shape) if n > 1)
    for stride, size in wanted:
        if stride <= reach:
            return contiguous(y)
        reach += stride * (size - 1)
    if strides == _row_major(y.shape):
        return contiguous(y)
    return torch.empty_strided(y.shape, strides, dtype=y.dtype, device=y.device).copy_(y)


def _row_major(shape: Sequence[int]) -> Strides:
    """The strides of a contiguous tensor."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides))


def _tensors(values: Any) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _tensors(value)
        elif isinstance(value, dict):
            found += _tensors(value.values())
    return found


def _signature(value: Any, inner: bool) -> Any:
    """What a method's strides can depend on. TypeError for a value of a class that is not plain."""
    if isinstance(value, Tensor):
        return value.shape, None if inner else value.stride(), value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return tuple(_signature(v, inner) for v in value)
    if isinstance(value, dict):
        return tuple((key, _signature(v, inner)) for key, v in value.items())
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return value
    raise TypeError(type(value).__name__)


def _is_traced() -> bool:
    """Whether what runs now has no strides of its own, or is watched by a dispatch mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )
