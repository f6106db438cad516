"""What a method makes of its arguments, without computing it: dtypes, sizes and strides, on fake tensors."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from vtok_fast.swap.watch import HOOKS, is_swapped

_LAST = torch.channels_last_3d
_PADDING = (torch.ops.aten.replication_pad3d.default, torch.ops.aten.reflection_pad3d.default)


@functools.lru_cache
def _keeping() -> frozenset[Any]:
    """The paddings that keep channels-last on a CPU, which fake tensors do not know."""
    x = torch.zeros(1, 2, 2, 2, 2, device="cpu", dtype=torch.float32).contiguous(memory_format=_LAST)
    return frozenset(pad for pad in _PADDING if suggest_memory_format(pad(x, [1] * 6)) == _LAST)


class _Simulation(FakeTensorMode):
    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._keeping = _keeping()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        keeps = func in self._keeping and args[0].is_cpu and args[0].shape[1] > 1
        if not keeps or suggest_memory_format(args[0]) != _LAST:
            return result
        with self:
            return result.contiguous(memory_format=_LAST)


def simulated(
    function: Callable[..., Any],
    module: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    contiguous: bool = False,
) -> Any:
    """``function(module, *args, **kwargs)`` on fake tensors, for a copy of the module without swaps and
    hooks. Nothing of the module or its arguments changes.

    Args:
        function, module, args, kwargs: what is called with what.
        contiguous: whether tensors are to be contiguous, whatever their strides are.

    Raises what the function raises.
    """
    caching = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # or it would keep fake weights
    try:
        with _Simulation() as mode, torch.no_grad():
            copies: dict[nn.Module, nn.Module] = {}
            bare = _stripped(module, copies)

            def fake(value: Any) -> Any:
                if not isinstance(value, Tensor):
                    return _apart(value, copies)
                return mode.from_tensor(value).contiguous() if contiguous else mode.from_tensor(value)

            args, kwargs = tree_map(fake, (args, kwargs))
            return function(bare, *args, **kwargs)
    finally:
        torch.set_autocast_cache_enabled(caching)


def _stripped(module: nn.Module, copies: dict[nn.Module, nn.Module]) -> nn.Module:
    """A module of the same weights without swaps and hooks, whose attributes may be set."""
    if module not in copies:
        bare = copies[module] = copy.copy(module)
        # A forward of the instance may do anything, such as moving weights between devices.
        for name in [n for n, value in bare.__dict__.items() if n == "forward" or is_swapped(value)]:
            del bare.__dict__[name]
        for name in HOOKS:
            bare.__dict__[name] = type(bare.__dict__[name])()
        bare.__dict__["_modules"] = {
            name: None if child is None else _stripped(child, copies)
            for name, child in module._modules.items()
        }
    return copies[module]


def _apart(value: Any, copies: dict[nn.Module, nn.Module]) -> Any:
    """An argument that is a part of the module, or keeps something by layer such as the frames of a stream:
    these copies take the place of the layers. Any other as it is."""
    if isinstance(value, nn.Module):
        return copies.get(value, value)
    by_layer = {
        name: {copies.get(key, key): kept for key, kept in entry.items()}
        for name, entry in getattr(value, "__dict__", {}).items()
        if type(entry) is dict and all(isinstance(key, nn.Module) for key in entry)
    }
    if not by_layer:
        return value
    clone = copy.copy(value)
    vars(clone).update(by_layer)
    return clone
