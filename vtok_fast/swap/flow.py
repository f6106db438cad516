"""Where the results of swapped layers go during one run of a model.

A layer whose results only reach functions that compute the same for any strides may leave them channels-last,
which saves turning them. Whatever else is done with one (a view, a look at the strides, a norm that is less
exact on channels-last, a function that is not listed) makes its layer hand on PyTorch's own layout.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from vtok_fast.swap.layout import Place
from vtok_fast.swap.patch import Patch

# By name, as functions, methods or operators. Those that make a tensor pass the mark on.
_BLIND = frozenset(
    re.findall(
        r"\w+",
        "abs add clamp div elu exp float gelu half hardswish leaky_relu lerp mish mul neg pow relu "
        "rsqrt sigmoid silu softplus sqrt square sub tanh to type_as where double bfloat16 dropout "
        "alpha_dropout dropout3d add_ div_ mul_ sub_ relu_ silu_ clamp_ conv1d conv2d conv3d pad "
        "interpolate cat concat stack __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ "
        "__rmul__ __imul__ __truediv__ __rtruediv__ __itruediv__ __neg__ __pow__ __getitem__ chunk "
        "split narrow select unbind movedim permute transpose unsqueeze squeeze expand unflatten "
        "detach mean sum dim size numel __len__ is_floating_point is_complex requires_grad_ __get__ "
        "ndimension __bool__ item",
    )
)


class Flow(TorchFunctionMode):
    """Within the block, follows what was ``made``."""

    def __init__(self) -> None:
        super().__init__()
        self._makers: set[Any] = set()
        self._readers: set[Any] = set()
        self._fed: dict[Any, set[Any]] = {}
        self._marks: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor -> (its number, makers)
        self._unused: dict[int, set[Any]] = {}  # by number
        self._numbers = itertools.count(1)

    def made(self, result: Any, maker: Any) -> None:
        """Marks what a maker gave."""
        self._makers.add(maker)
        self._mark(result, {maker})

    def takes(self, values: Any, maker: Any) -> None:
        """Notes what a maker is called with."""
        self._fed.setdefault(maker, set()).update(self._marks_of(values))
        self.used(values)

    def fed_by(self, makers: set[Any]) -> list[Any]:
        """The makers that are called with results of these, or with what was computed from them."""
        return [maker for maker, sources in self._fed.items() if sources & makers]

    def unread(self, result: Any) -> set[Any]:
        """The makers whose results, and what was computed from them, only met functions that are blind to
        strides, when ``result`` is what the model gives. What nobody was seen to use was used by code that is
        not seen."""
        self._readers |= self._marks_of(result)
        return self._makers - self._readers.union(*self._unused.values())

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        marks = self._marks_of((args, kwargs))
        result = function(*args, **kwargs)
        if not marks:
            return result
        name = getattr(function, "__name__", "")
        if name not in _BLIND or name == "interpolate" and "nearest" not in kwargs.get("mode", "nearest"):
            self._readers |= marks
        elif any(isinstance(value, Tensor) for value in tree_leaves(result)):
            self.used((args, kwargs))
            self._mark(result, marks)
        return result

    def used(self, values: Any) -> None:
        """Notes a use that is blind to strides."""
        marked = [v for v in tree_leaves(values) if isinstance(v, Tensor) and v in self._marks]
        for value in marked:
            self._unused.pop(self._marks[value][0], None)

    def _mark(self, values: Any, marks: set[Any]) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
                number, before = self._marks.get(value, (next(self._numbers), set()))
                self._marks[value] = number, before | marks
                self._unused[number] = before | marks

    def _marks_of(self, values: Any) -> set[Any]:
        held = (self._marks.get(v, (0, ()))[1] for v in tree_leaves(values) if isinstance(v, Tensor))
        return set().union(*held)


@contextmanager
def followed(patches: Iterable[Patch]) -> Iterator[Flow]:
    """Follows the results of these patches' modules within the block."""
    places = (Place.ANYWHERE, Place.NETWORK)
    patches = [p for p in patches if p.switch.place in places and p.swap.attribute == "forward"]

    def traced(patch: Patch, flow: Flow) -> Callable[..., Any]:
        def forward(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
            flow.takes((args, kwargs), patch)
            with torch._C.DisableTorchFunction():
                result = patch.method(*args, **kwargs)
            flow.made(result, patch)
            return result

        forward.__guard__ = None  # as of a swap, which no other one minds
        return MethodType(forward, patch.module)

    flow = Flow()
    try:
        for patch in patches:
            patch.module.__dict__["forward"] = traced(patch, flow)
        with flow:
            yield flow
    finally:
        for patch in patches:
            patch.module.__dict__["forward"] = patch.method
