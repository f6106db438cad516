"""What modules are at one look: their classes and the functions of these, the plain values among their
attributes, their hooks, the classes of their weights, their children.

`Watch` compares modules with an earlier look in one pass. It holds classes, functions and plain values, and
no module, weight or other object. A node of what it is given is a tuple

    (class or None, ((name, function of the class), ...), ((key, how, value), ...), (class of a weight, ...),
     ((name of a child, its node or None), ...), number of children)

where the third has all of the instance's attributes in their order and ``how`` is one of the constants below.
Of a node without a class only the children are looked at. csrc/bindings/watch.cpp does the same in a tenth of
the time.
"""

from __future__ import annotations

import enum
from types import BuiltinFunctionType, FunctionType, NoneType
from typing import Any

import torch
from torch import Tensor, nn

from vtok_fast.dispatch import native

ANY, IS, TYPE, EMPTY, LIST = range(5)  # anything, this object, of this class, no hooks, a list of these
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
CALLED = ("forward", "__call__", "_call_impl", "_conv_forward")  # what runs when a layer is called
BASE = frozenset(vars(nn.Module()))  # attributes that every module has
_ATOMS = frozenset((int, float, complex, bool, str, bytes, NoneType, torch.dtype, torch.device, type)) | {
    FunctionType,
    BuiltinFunctionType,
    torch.memory_format,
}
_SEQUENCES = (tuple, list, torch.Size)
_LIBRARIES = ("torch", "diffusers", "vtok_fast", "vector_quantize_pytorch")

Node = tuple[Any, ...]


class Tree:
    """Which modules inside a module are looked at: the names that lead to them."""

    def __init__(self, paths: list[tuple[str, ...]]):
        self.is_part = () in paths
        names = dict.fromkeys(path[0] for path in paths if path)
        self.children = {n: Tree([p[1:] for p in paths if p and p[0] == n]) for n in names}


# ---- one look ----------------------------------------------------------------------------------------------


def frozen(value: Any) -> Any:
    """A plain value, or the class of another."""
    if type(value) in _SEQUENCES:
        return tuple(map(frozen, value))
    return value if _is_plain(value) else type(value)


def settings(module: nn.Module, ignored: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The plain values among a module's own attributes, and the classes of the others."""
    return {
        name: frozen(value)
        for name, value in module.__dict__.items()
        if name not in BASE and name not in ignored and not is_swapped(value)
    }


def is_swapped(method: Any) -> bool:
    """Whether a bound method is one that a swap put there."""
    return hasattr(getattr(method, "__func__", None), "__guard__")


def function_of(kind: type, name: str) -> Any:
    """What a class or the first of its bases has under a name; None where none has it."""
    return next((base.__dict__[name] for base in kind.__mro__ if name in base.__dict__), None)


def functions(kind: type, names: tuple[str, ...] = CALLED) -> tuple[tuple[str, Any], ...]:
    found = ((name, function_of(kind, name)) for name in names)
    return tuple((name, function) for name, function in found if function is not None)


def patched(kind: type, names: tuple[str, ...] = CALLED) -> str | None:
    """The name of a function of a library's class that somebody else put there: it was compiled in a module
    of another package than the class. None where all are the library's, or the class is nobody's here."""
    for name in names:
        owner = next((base for base in kind.__mro__ if name in base.__dict__), None)
        package = "" if owner is None else owner.__module__.partition(".")[0]
        if owner is not None and package in _LIBRARIES:
            function = owner.__dict__[name]
            while function is not None:
                where = getattr(function, "__globals__", {}).get("__name__", package)
                if where.partition(".")[0] not in (package, "torch"):
                    return name
                function = getattr(function, "__wrapped__", None)
    return None


def look(module: nn.Module, tree: Tree, called: tuple[str, ...], ignored: frozenset[str]) -> Node:
    """The node of a module whose functions ``called`` are looked at, and no attributes ``ignored``."""
    children = []
    for name, below in tree.children.items():
        child = module._modules.get(name)
        child_node = None if child is None else look(child, below, CALLED, ignored - {*HOOKS})
        children.append((name, child_node))
    if not tree.is_part:
        return None, (), (), (), tuple(children), 0
    entries = tuple(_entry(key, value, ignored) for key, value in module.__dict__.items())
    weights = tuple(map(type, module._parameters.values()))
    kind = type(module)
    return kind, functions(kind, called), entries, weights, tuple(children), len(module._modules)


def _entry(key: str, value: Any, ignored: frozenset[str]) -> tuple[str, int, Any]:
    if key in HOOKS and key not in ignored:
        return key, EMPTY, None
    if key in BASE or key in ignored:
        return key, ANY, None
    if type(value) is list and all(type(v) in _ATOMS for v in value):
        return key, LIST, tuple(value)
    return (key, IS, value) if _is_plain(value) else (key, TYPE, type(value))


def _is_plain(value: Any) -> bool:
    if type(value) in (tuple, torch.Size):
        return all(map(_is_plain, value))
    return type(value) in _ATOMS or isinstance(value, enum.Enum)


# ---- comparing with it -------------------------------------------------------------------------------------


class PythonWatch:
    """The native module's ``Watch``, where there is none."""

    def __init__(self, node: Node, hooks: tuple[dict, ...], dtype_of: Any):
        self._node, self._hooks, self._dtype_of = node, hooks, dtype_of

    def same(self, module: nn.Module, dtype: torch.dtype | None) -> bool | None:
        """Whether a module is what it was at the look; None where it is, but with weights that are not all of
        this dtype."""
        dtypes: set[Any] = set()
        if any(self._hooks) or not self._is(module, self._node, dtypes):
            return False
        return True if dtypes <= {dtype} else None

    def _is(self, module: Any, node: Node, dtypes: set[Any]) -> bool:
        kind, called, entries, weights, children, count = node
        if kind is not None:
            attributes, parameters = module.__dict__, module.__dict__.get("_parameters")
            if (
                type(module) is not kind
                or any(function_of(kind, name) is not function for name, function in called)
                or len(attributes) != len(entries)
                or not all(map(_is_entry, attributes.items(), entries))
                or tuple(map(type, parameters.values())) != weights
                or children
                and len(module._modules) != count
            ):
                return False
            dtypes |= {self._dtype_of.__get__(p) for p in parameters.values() if p is not None}
        for name, below in children:
            part = module._modules.get(name, ...)
            if (
                part is ...
                or (part is None) != (below is None)
                or below
                and not self._is(part, below, dtypes)
            ):
                return False
        return True


def _is_entry(item: tuple[str, Any], entry: tuple[str, int, Any]) -> bool:
    (key, value), (expected, how, seen) = item, entry
    if key != expected:
        return False
    if how == LIST:
        return type(value) is list and len(value) == len(seen) and all(map(lambda a, b: a is b, value, seen))
    if how == EMPTY:
        return isinstance(value, dict) and not value
    return how == ANY or (value is seen if how == IS else type(value) is seen)


_Watch = getattr(native.lib(), "Watch", PythonWatch)


def watch(node: Node, hooks: tuple[dict, ...]) -> Any:
    """What compares modules with this node, and dictionaries of hooks with empty ones."""
    return _Watch(node, hooks, Tensor.dtype)
