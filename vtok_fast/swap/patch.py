"""One swap: a method of one module instance, replaced on that instance.

The module object, its class, its parameters, its buffers and its ``state_dict`` stay what they are; only
``instance.__dict__[attribute]`` is set, to a bound method. So ``isinstance`` checks hold, ``copy.deepcopy``
binds the copy's method to the copy, and taking the entry out again restores the module exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from vtok_fast.dispatch.backends import Reason
from vtok_fast.parity import Parity

_ABSENT = object()


@dataclass(frozen=True)
class Swap:
    """What an adapter proposes for one module.

    Attributes:
        what: one line for the report.
        function: ``function(module, *args, **kwargs)``, which takes the place of the method.
        attribute: the method's name.
        covers: names of the children that are then part of this swap (None: all); the others are looked at on
            their own.
        sample: makes small random arguments for the check, ``sample(module) -> tuple``; None for a swap that
            only moves data.
        probe: the part of the module to copy for the check, where the method does not need all of it.
        judge: compares (fast, eager, float64) results where the *close* contract on tensors is not the right
            measure.
        reference: ``reference(module, *args)``, the float64 result where a double copy of the module does not
            give it.
        exact: what takes the place of the method under the contract *exact*: the same arithmetic on fewer
            copies. None where there is nothing of that kind.
        exact_where: for which modules of the class there is.
        why_not: why this swap was not made for a module of its class, or None where it was.
    """

    what: str
    function: Callable[..., Any]
    attribute: str = "forward"
    covers: tuple[str, ...] | None = None
    sample: Callable[[nn.Module], tuple] | None = None
    probe: Callable[[nn.Module], nn.Module] = lambda module: module
    judge: Callable[[Any, Any, Any], Parity] | None = None
    reference: Callable[..., Any] | None = None
    exact: Callable[..., Any] | None = None
    exact_where: Callable[[nn.Module], bool] = lambda module: True
    why_not: Callable[[nn.Module], Reason] = lambda module: None


@dataclass(frozen=True)
class Skip:
    """What an adapter answers for a module of its library that it leaves alone. Its children are still looked
    at."""

    why: str


def described(error: Exception) -> str:
    """An exception's class and the first line of its message."""
    message = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


class Patch:
    """A swap on one module; ``install`` and ``remove`` may be called at any time, in any order."""

    def __init__(self, module: nn.Module, swap: Swap):
        self.module, self.swap = module, swap
        self.method = MethodType(_renamed(swap.function, swap.attribute), module)
        self._previous: Any = _ABSENT
        self.installed = False

    def install(self) -> None:
        if not self.installed:
            self._previous = self.module.__dict__.get(self.swap.attribute, _ABSENT)
            self.module.__dict__[self.swap.attribute] = self.method
            self.installed = True

    def remove(self) -> None:
        """Takes the swap out. Something that was put over it in the meantime stays."""
        if self.installed and self.module.__dict__.get(self.swap.attribute) is self.method:
            if self._previous is _ABSENT:
                del self.module.__dict__[self.swap.attribute]
            else:
                self.module.__dict__[self.swap.attribute] = self._previous
        self._previous, self.installed = _ABSENT, False


def _renamed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The same function under the method's name. Pickle stores a bound method by that name, so a pickled
    model loads as it was before it was accelerated."""
    copy = FunctionType(
        function.__code__, function.__globals__, name, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__, copy.__doc__, copy.__module__ = (
        function.__kwdefaults__,
        function.__doc__,
        function.__module__,
    )
    return copy


def runs(module: nn.Module, function: Callable[..., Any], attribute: str = "forward") -> bool:
    """Whether a module's method is, at present, this swap function."""
    method = module.__dict__.get(attribute)
    return method is not None and getattr(method, "__code__", None) is function.__code__


def why_hooked(module: nn.Module, parts: tuple[str, ...] | None = None) -> Reason:
    """Why a module's children (or only these, with theirs) cannot be bypassed: a hook or a replaced forward
    on one of them would not run any more."""
    for name, child in module.named_modules():
        if (
            child is module
            or parts is not None
            and not any(name == part or name.startswith(f"{part}.") for part in parts)
        ):
            continue
        if (
            child._forward_hooks
            or child._forward_pre_hooks
            or child._backward_hooks
            or child._backward_pre_hooks
        ):
            return f"{name} has hooks, which a fused block would not call"
        if "forward" in child.__dict__:
            return f"{name}.forward was replaced by somebody else"
        if "parametrizations" in child._modules:
            return f"{name} is parametrised"
    return None
