"""How much memory the tensors take that a call makes, at their highest, whatever the device and its
allocator."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _LiveStorages(TorchDispatchMode):
    """Counts the bytes of every storage that an operator returns, from then until the storage is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def _watch(self, value: Any, count: bool) -> None:
        for tensor in tree_leaves(value):
            if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_nested:
                continue  # those have no storage of their own
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._known:
                continue
            size = storage.nbytes() if count else 0
            self.live += size

            def gone(_: Any, key: int = key, size: int = size) -> None:
                self._known.pop(key, None)
                self.live -= size

            self._known[key] = weakref.ref(storage, gone)
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        self._watch((args, kwargs), count=False)  # what was there before: inputs and weights
        result = func(*args, **kwargs)
        self._watch(result, count=True)
        return result


def peak_bytes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Runs ``function(*args, **kwargs)`` and returns the most bytes that tensors made by it took together at
    any time.

    Results count, arguments and parameters do not, nor what a native kernel keeps for itself.
    """
    with _LiveStorages() as storages:
        result = function(*args, **kwargs)
        del result
    return storages.peak
