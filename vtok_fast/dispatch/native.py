"""The native module ``vtok_fast._C``: loading it, and handing tensors to it.

Importing ``vtok_fast`` works without it (no compiler at build time, another platform): every op then runs its
reference, and `why_missing` says what went wrong.
"""

from __future__ import annotations

import functools
import importlib
import operator
import os
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch.autograd import forward_ad

from vtok_fast.dispatch import backends
from vtok_fast.dispatch.backends import Reason
from vtok_fast.installation import gpus

_DTYPE_CODES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float64: 3,
    torch.int32: 4,
    torch.int64: 5,
    torch.uint8: 6,
}

_C: Any
try:
    _C = importlib.import_module("vtok_fast._C")
    _missing: str | None = None
except ImportError as error:
    _C = None
    _missing = f"the native module is not built ({error}); `pip install .` builds it"


def lib() -> Any:
    """The native module, or None; `why_missing` then gives the reason."""
    return _C


def why_missing() -> Reason:
    """Why there is no native module, or None where there is one."""
    return _missing


def why_no_cuda(tensor: torch.Tensor | None = None) -> Reason:
    """Why the CUDA kernels cannot run here at all, or on this tensor, or None where they can."""
    if tensor is not None and not tensor.is_cuda:
        return f"the tensors are on {tensor.device}"
    return _why_no_gpu(None if tensor is None else tensor.device.index)


def why_not_on_cpu(tensor: torch.Tensor, dtypes: Collection[torch.dtype]) -> Reason:
    """Why the CPU kernels of an op that knows these dtypes cannot take this tensor, or None where they
    can."""
    if tensor.device.type != "cpu":
        return f"the tensors are on {tensor.device}"
    return f"no {tensor.dtype} kernel" if tensor.dtype not in dtypes else why_missing()


@functools.cache
def _why_no_gpu(index: int | None) -> Reason:
    if _missing is not None:
        return _missing
    if not torch.cuda.is_available():
        return "there is no GPU" if _C.cuda_archs else gpus.NO_CUDA
    if torch.version.hip is not None:
        return gpus.NOT_NVIDIA
    if _C.cuda_archs and (problem := _C.cuda_problem()):
        return problem
    gpu = torch.cuda.get_device_capability(index)
    if gpus.code_for(gpu, _C.cuda_archs) is not None:
        return None
    reason = f"the native module is {gpus.fit(gpu, _C.cuda_archs)}"
    if cure := gpus.install(gpu, _C.cuda_archs, gpus.installed_version()):
        warnings.warn(f"vtok_fast: {reason}. To have them: {cure}", stacklevel=2)
    return reason  # remembered: the warning comes once per GPU


@contextmanager
def cuda_queue(tensor: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Makes the tensor's device the current one, and gives a launcher its index and the handle of its current
    stream."""
    if not tensor.is_cuda:  # the emulator of the tests
        yield 0, 0
        return
    with torch.cuda.device(tensor.device):
        yield tensor.device.index, torch.cuda.current_stream().cuda_stream


_CPU = torch.device("cpu")
_WITH_MEMORY = frozenset((torch.Tensor, torch.nn.Parameter))


_keys = torch._C._dispatch_keys
# Tensors whose values are not simply at their address.
_LAZY = functools.reduce(
    operator.or_,
    (
        torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr()
        for name in ("Negative", "Conjugate", "ZeroTensor", "Functionalize")
    ),
)


def _owns_memory(tensor: torch.Tensor) -> bool:
    """Whether the values of a tensor of another class are at its address: no class interprets them."""
    return type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


_Arg = tuple[int, int, torch.Size, tuple[int, ...]]


@overload
def arg(tensor: torch.Tensor, on: torch.device = ...) -> _Arg: ...


@overload
def arg(tensor: torch.Tensor | None, on: torch.device = ...) -> _Arg | None: ...


def arg(tensor: torch.Tensor | None, on: torch.device = _CPU) -> _Arg | None:
    """A tensor as the native module takes it: data pointer, dtype code, sizes and strides in elements.

    Raises ValueError for a tensor that is not ``on`` the device whose memory the kernel reads, or has no
    memory (fake and functional tensors, wrappers): the native module sees a pointer, and cannot tell.
    """
    if tensor is None:
        return None
    if tensor.device != on:
        raise ValueError(f"a kernel that reads memory on {on} was given a tensor on {tensor.device}")
    address = tensor.data_ptr() if type(tensor) in _WITH_MEMORY or _owns_memory(tensor) else 0
    if (
        _keys(tensor).raw_repr() & _LAZY
        or not address
        and (tensor.numel() or type(tensor) not in _WITH_MEMORY)
    ):
        raise ValueError(f"a kernel was given a {type(tensor).__name__}, which has no memory of its own")
    return address, _DTYPE_CODES[tensor.dtype], tensor.shape, tensor.stride()


def arg_anywhere(tensor: torch.Tensor | None) -> Any:
    """`arg` for a question about a plan, which reads no memory. On the meta device it is at 0."""
    if tensor is None or not tensor.is_meta:
        return None if tensor is None else arg(tensor, tensor.device)
    return 0, _DTYPE_CODES[tensor.dtype], tensor.shape, tensor.stride()


def arg_on(device: torch.device) -> Callable[[torch.Tensor | None], Any]:
    """`arg` for a kernel that reads memory on ``device``."""
    return functools.partial(arg, on=device)


_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def threads() -> int:
    """How many threads a CPU kernel may use: torch's own setting; one in a forked child, where OpenMP would
    wait for threads that only the parent has."""
    return 1 if _forked else torch.get_num_threads()


def is_plain(*tensors: torch.Tensor | None) -> bool:
    """Whether an op may call the native module directly, without torch's dispatcher: eager mode, ordinary
    tensors, nothing that asks for a gradient and nothing that traces, wraps or batches (compile, fake
    tensors, vmap, subclasses)."""
    if torch.jit.is_tracing():
        raise RuntimeError("torch.jit.trace cannot record vtok_fast's ops; use torch.compile or torch.export")
    if torch.compiler.is_compiling():
        backends.preferred()  # read for the guard: a graph holds its gradient's backend
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack():
        return False
    grad = torch.is_grad_enabled()
    for t in tensors:
        if t is None:
            continue
        if type(t) is not torch.Tensor and type(t) is not torch.nn.Parameter:
            return False
        if grad and t.requires_grad or t.layout is not torch.strided or _keys(t).raw_repr() & _LAZY:
            return False  # the dispatcher knows what to do, or says why it cannot
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None:
            raise NotImplementedError("vtok_fast's ops have no forward-mode derivative")
    return True


def is_transformed() -> bool:
    """Whether ``torch.func`` differentiates here (``grad``, ``jvp`` and what is made of them). It cannot look
    into the ops, so the definition in PyTorch runs instead."""
    if torch.compiler.is_compiling():
        return False
    levels = torch._C._functorch.get_interpreter_stack()
    differentiating = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)
    return any(level.key() in differentiating for level in levels or ())


def _share_openmp_threads() -> None:
    """Points the native module at the GNU OpenMP runtime that torch has loaded, so that both use one set of
    threads."""
    try:
        with open("/proc/self/maps") as maps:
            loaded = {line.split()[-1] for line in maps if "libgomp" in line}
    except OSError:
        return  # not Linux: the module uses its own threads
    # torch's own copy first: a second runtime may have been loaded by another library.
    for path in sorted(loaded, key=lambda p: os.sep + "torch" not in p):
        if _C.use_openmp_runtime(path):
            return


if _C is not None:
    _share_openmp_threads()
    if isa := os.environ.get("VTOK_FAST_CPU_ISA"):
        try:
            _C.set_isa(isa)
        except ValueError as error:
            raise ValueError(
                f"VTOK_FAST_CPU_ISA={isa!r}: {error}; here: auto, {', '.join(_C.supported_isas())}"
            ) from None
