"""How a checked call becomes a launch of the CUDA kernels, and how the native module is asked what it would
launch.

The kernels read and write channels-last memory; a tensor that comes otherwise is copied once, except an input
of few channels (a video at the first layer), which is read as it is.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from vtok_fast.dispatch import native
from vtok_fast.dispatch.backends import Reason

LAST = torch.channels_last_3d


@overload
def channels_last(tensor: Tensor, copied: bool = ...) -> Tensor: ...


@overload
def channels_last(tensor: Tensor | None, copied: bool = ...) -> Tensor | None: ...


def channels_last(tensor: Tensor | None, copied: bool = True) -> Tensor | None:
    """The tensor with channel stride 1; a view as it is. Where only a plan is asked for, nothing is
    ``copied``: what a copy would be is a tensor on the meta device."""
    if tensor is None or tensor.stride(1) == 1:
        return tensor
    return laid_out(tensor, copied)


def laid_out(tensor: Tensor, copied: bool) -> Tensor:
    """The tensor in ``channels_last_3d``, or what it would be."""
    if copied:
        return tensor.contiguous(memory_format=LAST)
    return (
        tensor
        if tensor.is_contiguous(memory_format=LAST)
        else torch.empty_like(tensor, device="meta", memory_format=LAST)
    )


def inputs(x: Tensor, cache: Tensor | None, groups: int, copied: bool = True) -> tuple[Tensor, Tensor | None]:
    """x and its cache as the kernels read them: alike in all strides but those of batch and time."""
    chunk = 16 // x.element_size()
    # Else the kernels gather element by element, from any strides
    if x.shape[1] // groups % chunk == 0 or cache is not None:
        x = channels_last(x, copied)
    if cache is not None and any(cache.shape[i] > 1 and cache.stride(i) != x.stride(i) for i in (1, 3, 4)):
        x, cache = laid_out(x, copied), laid_out(cache, copied)
    return x, cache


def allow_tf32(x: Tensor) -> bool:
    """Whether PyTorch's own convolution would round float32 to tf32."""
    if x.dtype != torch.float32:
        return False
    # From 2.9; asking allow_tf32 then fails where the newer setting was used
    conv = getattr(torch.backends.cudnn, "conv", None)
    return conv.fp32_precision == "tf32" if conv is not None else torch.backends.cudnn.allow_tf32


_memory = threading.local()
_scratch: dict[tuple[Any, ...], int] = {}  # bytes that a launch of these shapes needed last
UNKNOWN = 16  # bytes to begin with


def launch(function: Callable[..., None], like: Tensor, *args: Any) -> None:
    """Launches on the current stream of the tensor's device, with as much scratch memory as the last call of
    these shapes needed. The arguments begin with x and the weights."""
    key = (function.__name__, args[0][2], args[1][2], args[-1])
    room = _scratch.get(key, UNKNOWN)
    needed = launch_with(function, like, args, room)
    if needed != room:
        if len(_scratch) >= 4096:
            _scratch.clear()
        _scratch[key] = needed


def launch_with(function: Callable[..., None], like: Tensor, args: tuple[Any, ...], room: int) -> int:
    """Launches on the current stream of the tensor's device. Scratch memory comes from torch's allocator:
    ``room`` bytes, and where the launcher needs more, it says so and does nothing else. Returns the bytes
    that it needs."""
    device = like.device
    if not like.is_cuda:  # the emulator of the tests
        return _launch_on((0, 0), function, device, args, room)
    with torch.cuda.device(device):
        queue = device.index, torch.cuda.current_stream(device).cuda_stream
        return _launch_on(queue, function, device, args, room)


def _launch_on(
    queue: tuple[int, int],
    function: Callable[..., None],
    device: torch.device,
    args: tuple[Any, ...],
    room: int,
) -> int:
    number, need = _need()
    while True:
        number.value = 0
        if room:
            workspace = torch.empty(room, dtype=torch.uint8, device=device)
            scratch = (workspace.data_ptr(), 6, workspace.shape, (1,))
        else:
            scratch = NO_BYTES
        function(*args, scratch, need, queue)
        if number.value <= room:
            return number.value
        room = number.value


NO_BYTES = (4096, 6, torch.Size([0]), (1,))  # an address: with none, the call is a question


def _need() -> tuple[ctypes.c_int64, Any]:
    """This thread's number in which a launcher leaves the bytes that it needs, also as an argument."""
    try:
        return _memory.need
    except AttributeError:
        number = ctypes.c_int64()
        _memory.need = number, (ctypes.addressof(number), 5, torch.Size([1]), (1,))
        return _memory.need


# ---- questions, without a launch ---------------------------------------------------------------------------


def ask(
    launcher: Any, args: tuple, choice: tuple[int, ...], numbers: int, device: int | None = None
) -> list[int]:
    """What a launcher would do with these arguments on a device: so many numbers. No tensor is read.

    Raises:
        NotImplementedError: the kernel cannot run them; the message says why.
    """
    need = torch.zeros(numbers, dtype=torch.int64, device="cpu")
    launcher(*_without_addresses(args), choice, None, native.arg(need), (device or 0, 0))
    return need.tolist()


def why_refused(x: Tensor, launcher: str, args: tuple, choice: tuple[int, ...], numbers: int) -> Reason:
    """The reason why an sm90 launcher of the native module cannot run these arguments on the device of x, or
    None; remembered."""
    if (reason := why_not_machine(x)) is not None:
        return reason
    with torch.cuda.device(x.device):
        return _why_refused(x.device.index, launcher, _without_addresses(args), choice, numbers)


@functools.lru_cache(maxsize=4096)
def _why_refused(
    device: int | None, launcher: str, args: tuple, choice: tuple[int, ...], numbers: int
) -> Reason:
    try:
        ask(getattr(native.lib(), launcher), args, choice, numbers, device)
    except NotImplementedError as error:
        return str(error).removeprefix("sm90: ")
    return None


def _without_addresses(args: tuple) -> tuple:
    """Tensors with their alignment in place of their address, which is not read where only a plan is asked
    for; no lists."""
    return tuple(
        (4096 + a[0] % 16, *a[1:])
        if isinstance(a, tuple) and len(a) == 4 and isinstance(a[2], torch.Size)
        else tuple(a)
        if isinstance(a, list)
        else a
        for a in args
    )


def why_not_machine(x: Tensor) -> Reason:
    """The reason why the sm90 kernels cannot run on this tensor's device, or None."""
    if (reason := native.why_no_cuda(x)) is not None:
        return reason
    capability = torch.cuda.get_device_capability(x.device)
    if capability != (9, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, and these kernels need 9.0"
    return None if "90a" in native.lib().cuda_archs else "the native module was built without sm_90a kernels"
