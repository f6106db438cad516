"""One swap: a method of one module instance, replaced on that instance.

The module object, its class, its parameters, its buffers and its ``state_dict`` stay what they are; only
``instance.__dict__[attribute]`` is set, to a bound method. So ``isinstance`` checks hold, ``copy.deepcopy``
binds the copy's method to the copy, and taking the entry out again restores the module exactly.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import local
from types import MethodType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from vtok_fast.dispatch.backends import Reason
from vtok_fast.ops.causal_conv3d.e4m3 import Scales
from vtok_fast.parity import Parity
from vtok_fast.swap import autocast
from vtok_fast.swap.guard import Guard, first_tensor, parts_of, why_bypassed, why_patched, why_weights
from vtok_fast.swap.layout import OwnLayout, Place, from_channels_last, is_channels_last, laid_out

_ABSENT = object()
EVERYTHING = ("*",)  # the state of a swap that knows nothing of the module itself
CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")  # of a network of diffusers


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
        inner: whether only the module's own code calls the method.
        state: attributes of the module and its parts that the function reads at each call, or that change
            from call to call. Where another one changes, the class's own method takes the call.
        contiguous: whether the class's own method is known to give contiguous results where no argument or
            weight is channels-last; else its layout is found out for each set of sizes and strides.
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
    inner: bool = False
    state: tuple[str, ...] = ()
    contiguous: bool = False

    @property
    def exact_what(self) -> str:
        """One line for the report on ``exact``."""
        return self.what if self.exact is self.function else "the same operations, fewer copies"


@dataclass(frozen=True)
class Skip:
    """What an adapter answers for a module of its library that it leaves alone (its children are still looked
    at), and what a swap's function returns, before it has changed anything, for a call that it leaves to the
    class's own method."""

    why: str


def described(error: Exception) -> str:
    """An exception's class and the first line of its message."""
    message = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


@dataclass
class Calls:
    """How often the swap of one module ran, and how often the class's own method did in its place, and why at
    last. Copies of the module count too. ``warned`` is shared by the modules of a model."""

    path: str = ""
    warned: list[str] = field(default_factory=list)
    ran: int = 0
    bypassed: int = 0
    why: str = ""

    @property
    def unused(self) -> bool:
        """Whether every call so far went to the class's own method."""
        return self.bypassed > 0 and not self.ran

    def bypass(self, why: str) -> None:
        self.bypassed, self.why = self.bypassed + 1, why
        if not self.warned:
            self.warned.append(why)
            warnings.warn(
                f"{self.path or 'the model'} runs as it was before vtok_fast.accelerate: {why}. "
                f"report.bypassed names all such modules.",
                RuntimeWarning,
                stacklevel=3,
            )


class _Switch:
    """What may change of a patch: who gets the result, and whether the patch is over for its own module (what
    was wrapped around it meanwhile may still call it).

    ``hands_on``: whether an example showed that nothing looks at the strides of the result, if the input is
    not channels-last. ``fed_by``: those whose results this one gets, and must not take for the caller's.
    ``scales``: within which the swap runs under the contract *fast*.
    """

    def __init__(self, module: nn.Module, place: Place):
        self.over, self.place, self._module = False, place, ref(module)
        self.hands_on, self.fed_by = False, ()
        self.scales: Scales | None = None
        self._local = local()

    def is_fed(self) -> bool:
        """Whether the input is a result that was handed on in channels-last."""
        return any(getattr(maker._local, "handed", False) for maker in self.fed_by)

    def hand_on_nothing(self) -> None:
        self._local.handed = False

    def hand_on(self, x: Tensor | None) -> bool:
        """Whether this result stays channels-last, which those that get it must know."""
        own = x is None or self.is_fed() or not is_channels_last(x)
        self._local.handed = self.hands_on and own
        return self._local.handed

    def is_off_for(self, module: nn.Module) -> bool:
        return self._module() is module


class Patch:
    """A swap on one module; ``install`` and ``remove`` may be called at any time, in any order.

    Args:
        module, swap: what is replaced where.
        calls: counts what runs.
        place: who gets the result, and so its layout (`vtok_fast.swap.layout`).
    """

    def __init__(
        self, module: nn.Module, swap: Swap, calls: Calls | None = None, place: Place = Place.ANYWHERE
    ) -> None:
        self.module, self.swap = module, swap
        self.calls = Calls() if calls is None else calls
        self.switch = _Switch(module, place)
        guard = Guard(module, swap.covers, swap.attribute, swap.state)
        layout = OwnLayout(module, swap.attribute, known=swap.contiguous or place is Place.NETWORK)
        method = _method(swap, guard, layout, self.calls, self.switch)
        self.method = MethodType(method, module)
        self._previous: Any = _ABSENT
        self.installed = False

    def install(self) -> None:
        if not self.installed:
            self.switch.over = False
            self._previous = self.module.__dict__.get(self.swap.attribute, _ABSENT)
            self.module.__dict__[self.swap.attribute] = self.method
            self.installed = True

    def prime(self) -> None:
        """Looks at the module before the first call, when all swaps are in place."""
        self.method.__func__.__guard__.prime(self.module)

    def remove(self) -> None:
        """Takes the swap out. Something that was put over it in the meantime stays, and finds the class's own
        method under it."""
        if self.installed:
            self.switch.over = True
            if self.module.__dict__.get(self.swap.attribute) is self.method:
                if self._previous is _ABSENT:
                    del self.module.__dict__[self.swap.attribute]
                else:
                    self.module.__dict__[self.swap.attribute] = self._previous
        self._previous, self.installed = _ABSENT, False


def _method(swap: Swap, guard: Guard, layout: OwnLayout, calls: Calls, switch: _Switch) -> Callable[..., Any]:
    """What takes the place of a method, for a module and its deep copies: the swap's function, or the class's
    own method where that has to take the call.

    Pickle stores a bound method by its name, which is the method's own, so a pickled model loads as it was
    before it was accelerated.
    """
    function, attribute = swap.function, swap.attribute
    only_moves = swap.covers == () and swap.sample is None
    dtypes = autocast.Dtypes(attribute, function)

    def method(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if switch.over and switch.is_off_for(module):
            return getattr(type(module), attribute)(module, *args, **kwargs)
        why = guard.why_not(module, args, kwargs)
        if why is None and swap.what and autocast.is_on() and not torch.compiler.is_dynamo_compiling():
            why = dtypes.why_not(module, args, kwargs)
        if why is None:
            inner, hands_on = switch.place in (Place.INSIDE, Place.EDGE), False
            if (switch.hands_on or switch.fed_by) and not torch.compiler.is_dynamo_compiling():
                hands_on = switch.hand_on(first_tensor(args, kwargs))
                inner = inner or switch.is_fed()
            stays = (hands_on or switch.place is Place.INSIDE) and not module._forward_hooks
            stays = stays or only_moves and switch.place is Place.ANYWHERE or switch.place is Place.UNCHANGED
            own = stays or layout.of(module, args, kwargs, inner=inner)
            if switch.scales is None or torch.compiler.is_compiling():
                result = function(module, *args, **kwargs)
            else:
                with switch.scales:
                    result = function(module, *args, **kwargs)
            if type(result) is not Skip:
                if not torch.compiler.is_dynamo_compiling():
                    calls.ran += 1
                return result if stays else laid_out(result, own)
            why = result.why
        if not torch.compiler.is_dynamo_compiling():
            calls.bypass(why)
        if switch.hands_on:
            switch.hand_on_nothing()
        if switch.place in (Place.INSIDE, Place.EDGE) or switch.is_fed():
            args = tuple(map(from_channels_last, args))
            kwargs = {name: from_channels_last(value) for name, value in kwargs.items()}
        if switch.place is not Place.NETWORK:
            return getattr(type(module), attribute)(module, *args, **kwargs)
        own = layout.of(module, args, kwargs)
        return laid_out(getattr(type(module), attribute)(module, *args, **kwargs), own)

    method.__name__, method.__doc__, method.__module__ = attribute, function.__doc__, function.__module__
    method.__wrapped__ = function
    method.__guard__, method.__dtypes__ = guard, dtypes
    return method


def runs(
    module: nn.Module,
    function: Callable[..., Any],
    x: Tensor,
    attribute: str = "forward",
    *,
    like: tuple | None = None,
) -> bool:
    """Whether a module called with ``x`` would run this swap function, and no hook would see ``x``.

    ``like``: arguments of the same dtypes that the class's own method takes, where it does not take ``x``.
    """
    method = getattr(module.__dict__.get(attribute), "__func__", None)
    return (
        getattr(method, "__wrapped__", None) is function
        and not (module._forward_hooks or module._forward_pre_hooks)
        and method.__guard__.why_not(module, (x,), {}) is None
        and (
            torch.compiler.is_dynamo_compiling()
            or not autocast.is_on()
            or method.__dtypes__.why_not(module, (x,) if like is None else like, {}) is None
        )
    )


def why_hooked(
    module: nn.Module,
    parts: tuple[str, ...] | None = None,
    attribute: str = "forward",
    *,
    sharded: bool = False,
) -> Reason:
    """Why a module's children (or only these, with theirs) cannot be bypassed: a hook or a replaced forward
    on one of them would not run any more, the class of one or of the module does something that its library
    does not know of, or no kernel takes their weights. ``sharded`` ones may be whole when they are used."""
    inside = [(".".join(path), part) for path, part in parts_of(module, parts)]
    own = why_patched("", module, (attribute, "_conv_forward"))
    classes = (own, *(why_patched(name, part) for name, part in inside))
    hooks = (why_bypassed(name, part) for name, part in inside)
    weights = (why_weights(part, name, sharded=sharded) for name, part in [("", module), *inside])
    return next((why for whys in (classes, hooks, weights) for why in whys if why), None)
