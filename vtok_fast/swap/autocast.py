"""Under autocast a module's result has the dtype that its own operations make of it: of a norm in float32, of
a sum with its input. A swap has its own. Where they differ, the class's own method takes the call; which
dtype it gives is seen on fake tensors, once for each combination of dtypes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vtok_fast.dispatch.backends import Reason
from vtok_fast.swap.simulate import simulated

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
        result = simulated(function, module, args, kwargs)
        return next((v.dtype for v in tree_leaves(result) if isinstance(v, Tensor)), type(result).__name__)
