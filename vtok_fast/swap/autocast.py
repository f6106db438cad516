"""Under autocast a module's result has the dtype that its own operations make of it: of a norm in float32, of
a sum with its input. A swap has its own. Where they differ, the class's own method takes the call; which
dtype it gives is seen on fake tensors, once for each combination of dtypes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from vtok_fast.dispatch.backends import Reason
from vtok_fast.swap.watch import HOOKS, is_swapped

is_on: Callable[[], bool] = torch._C._is_any_autocast_enabled


class Dtypes:
    """What the method of a class and the function in its place give under autocast."""

    def __init__(self, attribute: str, function: Callable[..., Any]):
        self._attribute, self._function = attribute, function
        self._known: dict[tuple, Reason] = {}

    def why_not(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Reason:
        """Why the class's own method has to take a call under autocast, or None."""
        tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        device = tensors[0].device.type if tensors else "cpu"
        if not torch.is_autocast_enabled(device):
            return None
        weights = tuple(p.dtype for p in module.parameters())
        key = (torch.get_autocast_dtype(device), module.training, tuple(t.dtype for t in tensors), weights)
        if key not in self._known:
            self._known[key] = self._compare(module, args, kwargs)
        return self._known[key]

    def _compare(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Reason:
        try:
            own = self._dtype(getattr(type(module), self._attribute), module, args, kwargs)
            ours = self._dtype(self._function, module, args, kwargs)
        except Exception as error:
            return f"under autocast its dtypes could not be found ({type(error).__name__})"
        return None if own == ours else f"under autocast it returns {own}, and the swap {ours}"

    @staticmethod
    def _dtype(function: Callable[..., Any], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        caching = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # or it would keep fake weights
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
                copies: dict[nn.Module, nn.Module] = {}
                bare = _stripped(module, copies)
                args, kwargs = tree_map(
                    lambda v: mode.from_tensor(v) if isinstance(v, Tensor) else _apart(v, copies),
                    (args, kwargs),
                )
                result = function(bare, *args, **kwargs)
        finally:
            torch.set_autocast_cache_enabled(caching)
        return next((v.dtype for v in tree_leaves(result) if isinstance(v, Tensor)), type(result).__name__)


def _stripped(module: nn.Module, copies: dict[nn.Module, nn.Module]) -> nn.Module:
    """A module of the same weights without swaps and hooks, whose attributes may be set."""
    if module not in copies:
        bare = copies[module] = copy.copy(module)
        for name in [name for name, value in bare.__dict__.items() if is_swapped(value)]:
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
