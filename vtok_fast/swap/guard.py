"""Whether a swapped method may run at this call: the parts whose own ``forward`` it goes past must still be
what it was made for.

Adapters, hooks, casts and offloading are attached to a model at any time, also after ``accelerate``. A swap
that does not call its children would ignore them, and one that takes a setting for what the constructor made
of it would ignore another. So before each call the module and its parts are compared with what they were at
the last look: their classes and what these run, children, instance attributes and hooks, and the classes and
dtypes of their weights (`vtok_fast.swap.watch`). Only where something differs are they read one by one, and
where one of them does more than its class did when the swap was made, the class's own method takes the call.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as torch_module
from torch.nn.modules.conv import _ConvNd

from vtok_fast.dispatch.backends import Reason
from vtok_fast.swap.watch import (
    BASE,
    CALLED,
    HOOKS,
    Tree,
    function_of,
    functions,
    look,
    patched,
    settings,
)
from vtok_fast.swap.watch import watch as watched

_GLOBAL_HOOKS = tuple(getattr(torch_module, f"_global{name}") for name in HOOKS)
_PLAIN = {Tensor, nn.Parameter, nn.Buffer, FakeTensor, FunctionalTensor}
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_ABSENT = object()

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
    for key in part.__dict__:
        if key not in BASE and key != "forward" and isinstance(function_of(type(part), key), FunctionType):
            return f"{name}.{key} was replaced"
    if "parametrizations" in part._modules:
        return f"{name} is parametrized"
    return None


def why_patched(name: str, part: nn.Module, called: tuple[str, ...] = CALLED) -> Reason:
    """Why the class of a part, or of a module itself, is not what its library made."""
    function = patched(type(part), called)
    return function and f"{type(part).__name__}.{function}{' of ' + name if name else ''} was replaced"


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
    """What a swap of one module asks before each call. Copies of the module share it.

    Args:
        module, covers: what is swapped, and its children that are gone past (None: all).
        attribute: the method that is swapped.
        state: attributes that the swap's function reads at each call, or that change from call to call; "*"
            for all of the module's own.
    """

    def __init__(
        self,
        module: nn.Module,
        covers: tuple[str, ...] | None,
        attribute: str = "forward",
        state: tuple[str, ...] = (),
    ):
        self._called = (attribute, "_conv_forward")
        self._ignored = frozenset((attribute, *HOOKS, *state))
        parts = parts_of(module, covers)
        self._parts = tuple(self._seen(path, part, CALLED) for path, part in parts)
        if "*" not in state:
            self._parts = (self._seen((), module, self._called), *self._parts)
        self._plain = tuple((path, _plain(known)) for path, _, _, known in self._parts)
        self._tree = Tree([path for path, *_ in self._parts])
        self._hooks = _GLOBAL_HOOKS if parts else ()
        self._watch: Any = None

    def _seen(self, path: Path, part: nn.Module, called: tuple[str, ...]) -> tuple:
        kind = type(part)
        return path, kind, functions(kind, called), settings(part, self._ignored)

    def why_not(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Reason:
        """Why the class's own method has to take this call, or None."""
        x = args[0] if args else None
        if type(x) is not Tensor:
            x = first_tensor(args, kwargs)
        if torch.compiler.is_dynamo_compiling():
            return self._why_not_compiled(module, x)
        watch = self._watch
        if x is None:
            if watch is not None and watch.same(module, None) is not False:
                return None
        else:
            if not x.numel():
                return "its input is empty"
            if watch is not None and (x.is_cpu or x.is_cuda) and watch.same(module, x.dtype):
                return None
        if why := self._review(module, *_kind_of(x)):
            return why
        self._watch = watched(look(module, self._tree, self._called, self._ignored), self._hooks)
        return None

    def prime(self, module: nn.Module) -> None:
        """Looks before the first call, as for an input like the weights. What a look keeps would otherwise
        lie between the large buffers of that call, and the heap could not use their room again."""
        if self._review(module, *_kind_of(next(module.parameters(), None))) is None:
            self._watch = watched(look(module, self._tree, self._called, self._ignored), self._hooks)

    def _review(self, module: nn.Module, dtype: torch.dtype | None, device: str | None) -> Reason:
        """Reads the parts one by one. ``dtype``, ``device``: of the input, None where there is none."""
        weights: list[tuple[str, nn.Module]] = []
        for path, kind, called, known in self._parts:
            part, name = part_at(module, path), ".".join(path)
            if type(part) is not kind and (path or not _only_wraps(type(part), kind)):
                now, before = _told_apart(type(part), kind)
                return f"{name or 'it'} is a {now}, and was a {before}"
            if path and (why := why_bypassed(name, part)):
                return why
            if why := self._why_changed(part, name, called, known):
                return why
            weights.append((name, part))
        if any(self._hooks):
            return "a hook on all modules is registered, which a fused block would not call"
        return None if dtype is None or device is None else _why_dtypes(weights, dtype, device)

    def _why_not_compiled(self, module: nn.Module, x: Tensor | None) -> Reason:
        """For a graph, the parts are read while it is made and not traced, which would take most of the time
        that making it takes. The graph is made again where a setting or a class of a part changes."""
        for path, plain in self._plain:
            part = part_at(module, path)
            for key, value in plain:
                if getattr(part, key, None) != value:
                    return f"the settings of {'.'.join(path) or 'the module'} were changed ({key})"
        return _reviewed(self, module, *_kind_of(x))

    def _why_changed(
        self, part: nn.Module, name: str, called: tuple[tuple[str, Any], ...], known: dict[str, Any]
    ) -> Reason:
        """What of a part's class or of its own settings is not as it was when the swap was made."""
        for attribute, function in called:
            if function_of(type(part), attribute) is not function:
                return f"{type(part).__name__}.{attribute} was replaced"
        now = settings(part, self._ignored)
        for key in known.keys() | now.keys():
            # A new attribute matters where it hides one of the class
            before, value = known.get(key, _ABSENT), now.get(key, _ABSENT)
            if before != value and (key in known or hasattr(type(part), key)):
                what = f"{key} is a {value.__name__} now" if isinstance(value, type) else key
                return f"the settings of {name or 'the module'} were changed ({what})"
        return None


def _told_apart(kind: type, other: type) -> tuple[str, str]:
    """The names of two classes, with their modules where the names are equal: peft calls its own Conv2d."""
    if kind.__name__ != other.__name__:
        return kind.__name__, other.__name__
    return f"{kind.__module__}.{kind.__qualname__}", f"{other.__module__}.{other.__qualname__}"


def _plain(known: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The settings that are one number, name or switch."""
    return tuple((k, v) for k, v in known.items() if isinstance(v, (int, float, str)) or v is None)


def _only_wraps(kind: type, before: type) -> bool:
    """Whether a class is another with more of torch.distributed's behavior around it, as FSDP2 makes them."""
    added = [base for base in kind.__mro__ if base not in before.__mro__]
    return before in kind.__mro__ and all(b.__module__.startswith("torch.distributed.") for b in added)


def _reviewed(guard: Guard, module: nn.Module, dtype: torch.dtype | None, device: str | None) -> Reason:
    return guard._review(module, dtype, device)


# What torch.compiler.assume_constant_result says of a function; it would import dynamo with this package.
_reviewed._dynamo_marked_constant = True


def _kind_of(x: Tensor | None) -> tuple[torch.dtype | None, str | None]:
    return (None, None) if x is None else (x.dtype, x.device.type)


def _why_dtypes(weights: list[tuple[str, nn.Module]], dtype: torch.dtype, device: str) -> Reason:
    if device not in ("cpu", "cuda"):
        return f"the input is on {device}"
    autocast = torch.is_autocast_enabled(device)
    for name, part in weights:
        if why := why_weights(part, name):
            return why
        for key, weight in part._parameters.items():
            if weight is not None and weight.dtype != dtype and not autocast and dtype.is_floating_point:
                return f"{name or 'its'} {key} is {weight.dtype}, the input {dtype}"
    return None


def first_tensor(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    return None
