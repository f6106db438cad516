"""Whether a swapped method may run at this call: the parts whose own ``forward`` it goes past must still be
what it was made for.

Adapters, hooks, casts and offloading are attached to a model at any time, also after ``accelerate``. A swap
that does not call its children would ignore them. So before each call the parts are compared with what they
were at the last look: their classes, children, instance attributes and hooks, and the types and dtypes of
their weights. That takes a few dictionary look-ups. Only where something differs are they read one by one,
and where one of them does more than its class does, the call goes to the class's own method.
"""

from __future__ import annotations

import itertools
from operator import itemgetter
from types import NoneType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as torch_module
from torch.nn.modules.conv import _ConvNd

from vtok_fast.dispatch.backends import Reason

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(getattr(torch_module, f"_global{name}") for name in _HOOKS)
_SETTINGS = itemgetter("stride", "padding", "dilation", "groups", "padding_mode")
_PLAIN = {Tensor, nn.Parameter, nn.Buffer, FakeTensor, FunctionalTensor}
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_dtype = Tensor.dtype.__get__

Path = tuple[str, ...]


def parts_of(module: nn.Module, covers: tuple[str, ...] | None) -> list[tuple[Path, nn.Module]]:
    """The modules inside ``module`` (of these children, or of all) and how to get to each."""
    parts = []
    for name, part in module.named_modules():
        path = tuple(name.split("."))
        wanted = covers is None or any(path[: len(c)] == c for c in (tuple(c.split(".")) for c in covers))
        if part is not module and wanted:
            parts.append((path, part))
    return parts


def part_at(module: nn.Module, path: Path) -> Any:
    """The module at a path, None where there is none any more."""
    part: Any = module
    for name in path:
        part = None if part is None else part._modules.get(name)
    return part


# ---- reasons -----------------------------------------------------------------------------------------------


def why_bypassed(name: str, part: nn.Module) -> Reason:
    """Why a part has to be called, and cannot be gone past."""
    if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
        return f"{name} has hooks, which a fused block would not call"
    if is_replaced(part, "forward"):
        return f"{name}.forward was replaced{by_whom(part)}"
    if "_conv_forward" in part.__dict__:
        return f"{name}._conv_forward was replaced"
    if "parametrizations" in part._modules:
        return f"{name} is parametrized"
    return None


def is_replaced(module: nn.Module, attribute: str) -> bool:
    """Whether an instance has a method of its own in the place of its class's. Unpickling leaves the class's
    own there, where a swap was."""
    own = module.__dict__.get(attribute)
    return own is not None and getattr(own, "__func__", own) is not getattr(type(module), attribute, None)


def by_whom(module: nn.Module) -> str:
    """Whose hook replaced a module's forward, and what to do; empty where that is not known."""
    for attribute, library in (("_hf_hook", "accelerate"), ("_diffusers_hook", "diffusers")):
        if attribute in module.__dict__:
            return (
                f" by a hook of {library} (offloading, casting or dispatch): call vtok_fast.accelerate first"
            )
    return " by somebody else"


def why_weights(module: nn.Module, name: str = "", *, sharded: bool = False) -> Reason:
    """Why no kernel takes a module's own weights, or None; None too for ``sharded`` ones, if that is said."""
    where = f"{name}'s" if name else "its"
    for key, weight in module._parameters.items():
        if weight is None:
            continue
        kind = type(weight)
        if kind.__name__ == "DTensor":
            if sharded:
                continue
            return f"{where} weights are sharded (DTensor): accelerate first, or with check=False"
        if kind not in _PLAIN:
            return f"{where} {key} is a {kind.__name__}, which no kernel takes"
        if weight.is_meta:
            return f"{where} weights are on the meta device"
        if weight.dtype not in _DTYPES:
            return f"{where} weights are {str(weight.dtype).removeprefix('torch.')}, which no kernel takes"
    if isinstance(module, _ConvNd) and "weight" not in module._parameters and not _parametrized(module):
        return f"{where} weight is made before each call (weight_norm, spectral_norm or pruning)"
    return None


def _parametrized(module: nn.Module) -> bool:
    return "parametrizations" in module._modules


# ---- the check before each call ----------------------------------------------------------------------------


class Guard:
    """What a swap of one module asks before each call. Copies of the module share it: what was seen of each
    module is kept by module."""

    def __init__(self, module: nn.Module, covers: tuple[str, ...] | None):
        self._parts = tuple((path, type(part), _settings(part)) for path, part in parts_of(module, covers))
        self._watches: WeakKeyDictionary[nn.Module, _Watch] = WeakKeyDictionary()

    def why_not(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Reason:
        """Why the class's own method has to take this call, or None."""
        x = args[0] if args else None
        if type(x) is not Tensor:
            x = first_tensor(args, kwargs)
        if torch.compiler.is_dynamo_compiling():
            return self._review(module, x)
        if x is not None and not x.numel():
            return "its input is empty"
        watch = self._watches.get(module)
        if watch is None or not watch.same(x):
            if why := self._review(module, x):
                self._watches.pop(module, None)  # which would keep what was replaced
                return why
            self._watches[module] = _Watch(module, [part_at(module, path) for path, _, _ in self._parts])
        return None

    def _review(self, module: nn.Module, x: Tensor | None) -> Reason:
        """Reads the parts one by one."""
        weights: list[tuple[str, nn.Module]] = [("", module)]
        for path, kind, settings in self._parts:
            part, name = part_at(module, path), ".".join(path)
            if type(part) is not kind:
                return f"{name} is a {type(part).__name__}, and was a {kind.__name__}"
            if why := why_bypassed(name, part):
                return why
            if settings is not None and _settings(part) != settings:
                return f"the settings of {name} were changed"
            weights.append((name, part))
        if self._parts and any(_GLOBAL_HOOKS):
            return "a hook on all modules is registered, which a fused block would not call"
        if x is None:
            return None
        if x.device.type not in ("cpu", "cuda"):
            return f"the input is on {x.device}"
        autocast = torch.is_autocast_enabled(x.device.type)
        for name, part in weights:
            if why := why_weights(part, name):
                return why
            for key, weight in part._parameters.items():
                if weight is not None and weight.dtype != x.dtype and not autocast and x.is_floating_point():
                    return f"{name or 'its'} {key} is {weight.dtype}, the input {x.dtype}"
        return None


class _Watch:
    """What one module's parts were when they were last read. It keeps no weight alive."""

    __slots__ = ("_parts", "_kinds", "_hooks", "_dicts", "_sizes", "_children", "_convs", "_settings") + (
        "_parameters",
        "_types",
    )

    def __init__(self, module: nn.Module, parts: list[nn.Module]):
        self._parts = tuple(parts)
        self._kinds = tuple(map(type, parts))
        self._hooks = tuple(getattr(part, name) for part in parts for name in _HOOKS)
        self._hooks += _GLOBAL_HOOKS if parts else ()
        self._dicts = tuple(part.__dict__ for part in parts)
        self._sizes = tuple(map(len, self._dicts))
        parents = [module, *(part for part in parts if part._modules)]
        self._children = tuple((parent._modules, tuple(parent._modules.values())) for parent in parents)
        self._convs = tuple(part.__dict__ for part in parts if isinstance(part, _ConvNd))
        self._settings = tuple(map(_SETTINGS, self._convs))
        self._parameters = tuple(m._parameters.values() for m in (module, *parts) if m._parameters)
        self._types = tuple(map(type, itertools.chain(*self._parameters)))

    def same(self, x: Tensor | None) -> bool:
        """Whether the parts are the same objects with the same classes, attributes, settings and weights and
        without hooks, and the weights of the input's dtype."""
        if (
            any(self._hooks)
            or tuple(map(type, self._parts)) != self._kinds
            or tuple(map(len, self._dicts)) != self._sizes
            or tuple(map(_SETTINGS, self._convs)) != self._settings
        ):
            return False
        for children, seen in self._children:
            if tuple(children.values()) != seen:
                return False
        if not self._types:
            return True
        weights = [*itertools.chain(*self._parameters)]
        if x is None or tuple(map(type, weights)) != self._types or not (x.is_cpu or x.is_cuda):
            return False
        if NoneType in self._types:
            weights = [weight for weight in weights if weight is not None]
        dtypes = set(map(_dtype, weights))
        return dtypes <= {x.dtype} or torch.is_autocast_enabled(x.device.type) and dtypes <= _DTYPES


def _settings(part: nn.Module) -> tuple | None:
    if not isinstance(part, _ConvNd):
        return None
    return part.stride, part.padding, part.dilation, part.groups, part.padding_mode  # those of _SETTINGS


def first_tensor(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    return None
