"""What was measured on this machine: which backend, and which of its tiles, is fastest for a class of
calls."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vtok_fast.dispatch import backends, tuning
from vtok_fast.dispatch.backends import Reason
from vtok_fast.ops.causal_conv3d.call import ConvCall, Geometry

CHOICE_LENGTHS = {"sm80": 3, "sm90": 5}  # numbers in a choice of each backend's tile


def tuning_class(call: ConvCall) -> str:
    """The call's class in a tuning table."""
    return _tuning_class(call.x.shape, call.weight.shape, call.geometry, call.x.dtype)


@functools.lru_cache(maxsize=4096)
def _tuning_class(x: torch.Size, weight: torch.Size, geometry: Geometry, dtype: torch.dtype) -> str:
    positions = x[0] * math.prod(geometry.output_size(x[2:], weight[2:]))
    return tuning.conv_class(weight[2:], geometry.stride, x[1], weight[0], positions, dtype)


def entry_for(call: ConvCall) -> tuning.Entry | None:
    """What was measured to be fastest for this class of calls on this machine; None too for an entry that
    makes no sense."""
    entries = tuning.entries("causal_conv3d", call.x.device)
    g = call.geometry
    if not entries or g.groups > 1 or g.dilation != (1, 1, 1) or g.upsample != (1, 1, 1):
        return None
    entry = entries.get(tuning_class(call))
    return entry if entry is not None and _makes_sense(entry.get("backend"), entry.get("choice")) else None


def _makes_sense(backend: Any, choice: Any) -> bool:
    if isinstance(backend, str) and backend in CHOICE_LENGTHS:
        return (
            isinstance(choice, list)
            and len(choice) == CHOICE_LENGTHS[backend]
            and all(isinstance(n, int) for n in choice)
        )
    return backend == "reference" or backend == "cpu" and choice in backends.ALGORITHMS


def choice_of(call: ConvCall, backend: str) -> Any:
    """The table's choice for this call, where it names this backend; else None."""
    entry = entry_for(call)
    return None if entry is None or entry["backend"] != backend else entry["choice"]


def why_slower(backend: str, call: ConvCall) -> Reason:
    """The table's word against a backend, or None."""
    entry = entry_for(call)
    if entry is None or entry["backend"] == backend:
        return None
    return f"{entry['backend']} was measured to be faster on this machine"


def launch(forward: Callable[..., Tensor], call: ConvCall, backend: str, default: tuple[int, ...]) -> Tensor:
    """Launches with the table's choice; with the default where that is a tile which these kernels no longer
    have."""
    choice = choice_of(call, backend)
    if choice is not None:
        try:
            return forward(call, choice=tuple(choice))
        except (NotImplementedError, ValueError):
            pass
    return forward(call, choice=default)
