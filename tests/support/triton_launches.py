"""What Triton would compile for a call, without a GPU and without compiling: launchers run on meta tensors
and their kernels write down the key under which Triton looks for a compiled kernel."""

from __future__ import annotations

import inspect
from collections import defaultdict

import torch
import triton


class Recorder:
    """In the place of a kernel: ``kernel[grid](...)`` adds its key to ``keys``."""

    def __init__(self, kernel: triton.JITFunction, keys: set):
        self.kernel, self.keys = kernel, keys
        self.signature = inspect.Signature([inspect.Parameter(p.name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
                                            for p in kernel.params])  # fmt: skip

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **options):
        named = {name: options.pop(name) for name in list(options) if name in self.kernel.arg_names}
        values = self.signature.bind(*args, **named).arguments
        key = tuple(_of(p, values[p.name]) for p in self.kernel.params)
        self.keys.add((key, tuple(sorted(options.items()))))


def _of(param, value) -> object:
    """What of an argument a compiled kernel depends on (triton/runtime/jit.py: specialization)."""
    if param.is_constexpr or value is None:
        return value
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        wide = "i32" if -(2**31) <= value < 2**31 else "i64"
        if param.do_not_specialize:
            return wide
        return "1" if value == 1 else (wide, value % 16 == 0)
    return type(value)


def recorded(monkeypatch, *modules) -> dict[str, set]:
    """Every kernel of the modules is replaced by a `Recorder`; returns the keys of each by its name."""
    keys: dict[str, set] = defaultdict(set)
    for module in modules:
        for name, kernel in list(vars(module).items()):
            if isinstance(kernel, triton.JITFunction) and name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder(kernel, keys[name]))
        if hasattr(module, "KERNELS"):
            for name, kernel in module.KERNELS.items():
                monkeypatch.setitem(module.KERNELS, name, Recorder(kernel, keys[kernel.__name__]))
    return keys
