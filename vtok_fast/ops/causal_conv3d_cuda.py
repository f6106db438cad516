"""The CUDA kernels of ``causal_conv3d``: which calls they take, and how a call becomes a launch.

Nothing here needs a GPU but the launch itself: the native module is a parameter, so that the tests run the same code on an
emulator. The kernels read and write channels-last memory; a tensor that comes otherwise is copied once, but for an input of few
channels (a video at the first layer), which is read as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, overload

import torch
from torch import Tensor

from vtok_fast import native

Triple = tuple[int, int, int]
LAST = torch.channels_last_3d
MODES = ("zeros", "replicate", "reflect")
LARGEST_TIME, LARGEST_TABLE = 32, 256  # temporal taps; bytes of a position's tables in shared memory, on the smallest of GPUs


def why_not(x: Tensor, weight: Tensor, groups: int, depth_to_space: Triple = (1, 1, 1)) -> str | None:
    """The reason why the kernels cannot run a checked call, or None."""
    if (reason := native.why_no_cuda(x)) is not None:
        return reason
    return why_not_shape(x, weight, groups, depth_to_space)


def why_not_shape(x: Tensor, weight: Tensor, groups: int, depth_to_space: Triple = (1, 1, 1)) -> str | None:
    """The same, of what does not depend on the machine."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no {x.dtype} kernel"
    kt, kh, kw = weight.shape[2:]
    if kt > LARGEST_TIME or 8 * kt + 4 * kh * kw > LARGEST_TABLE:
        return f"a kernel of {kt}x{kh}x{kw} taps is too large"
    if depth_to_space != (1, 1, 1) and groups > 1:
        return "no depth_to_space with groups"
    return None if x.shape[0] else "the batch is empty"


def why_slower(call: Any) -> str | None:
    """The reason to leave to PyTorch a call that the kernels can run: a class of shapes measured to be slower. None so far."""
    return None


@overload
def channels_last(tensor: Tensor) -> Tensor: ...


@overload
def channels_last(tensor: Tensor | None) -> Tensor | None: ...


def channels_last(tensor: Tensor | None) -> Tensor | None:
    """The tensor with channel stride 1; a view as it is."""
    if tensor is None or tensor.stride(1) == 1:
        return tensor
    return tensor.contiguous(memory_format=LAST)


def _input(x: Tensor, cache: Tensor | None, groups: int) -> tuple[Tensor, Tensor | None]:
    """x and its cache as the kernels read them: alike in all strides but those of batch and time."""
    chunk = 16 // x.element_size()
    if x.shape[1] // groups % chunk == 0 or cache is not None:  # else the kernels gather element by element, from any strides
        x = channels_last(x)
    if cache is not None and any(cache.shape[i] > 1 and cache.stride(i) != x.stride(i) for i in (1, 3, 4)):
        x, cache = x.contiguous(memory_format=LAST), cache.contiguous(memory_format=LAST)
    return x, cache


def _allow_tf32(x: Tensor) -> bool:
    """Whether PyTorch's own convolution would round float32 to tf32."""
    if x.dtype != torch.float32:
        return False
    conv = getattr(torch.backends.cudnn, "conv", None)  # from 2.9; asking allow_tf32 then fails where the newer setting was used
    return conv.fp32_precision == "tf32" if conv is not None else torch.backends.cudnn.allow_tf32


def _launch(function: Callable[..., None], like: Tensor, *args: Any) -> None:
    """Asks for the scratch memory, takes it from torch's allocator and launches on the current stream of the tensor's device."""
    need = torch.zeros(1, dtype=torch.int64)
    with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
        stream = torch.cuda.current_stream().cuda_stream if like.is_cuda else 0
        function(*args, None, native.arg(need), stream)
        workspace = torch.empty(max(int(need[0]), 16), dtype=torch.uint8, device=like.device)
        function(*args, native.arg(workspace), native.arg(need), stream)


def forward(call: Any, geometry: tuple, out: Tensor, *, lib: Any = None, choice: Triple = (0, 0, 0)) -> Tensor:
    """Runs a checked call into ``out``: the final shape, channels_last_3d.

    ``choice`` insists on tile rows, tile columns and K splits, where not 0. ``geometry`` is stride, dilation, groups, pad, time
    mode and spatial mode (as numbers), upsample, upsample_first_frame_once.
    """
    x, cache = _input(call.x, call.cache, call.groups)
    bias = None if call.bias is None else call.bias.contiguous()
    arg = native.arg
    residual = channels_last(call.residual)
    _launch((lib or native.lib()).causal_conv3d_cuda, x, arg(x), arg(call.weight), arg(cache), *geometry, _allow_tf32(x), arg(bias),
            arg(residual), arg(out), call.alpha, call.activation == "silu", call.depth_to_space, choice)
    return out


def backward(grad: Tensor, x: Tensor, weight: Tensor, cache: Tensor | None, geometry: tuple, mask: list[bool], *, lib: Any = None,
             choice: Triple = (0, 0, 0), hopper: bool = True) -> list[Tensor | None]:
    """Gradients of x, weight, bias and cache, where ``mask`` asks for them; those of x and the cache are channels_last_3d.

    The Hopper kernels compute those that they can, where ``hopper`` allows it.
    """
    from vtok_fast.ops import causal_conv3d_sm90 as sm90
    from vtok_fast.ops import causal_conv3d_wgrad_sm90 as wgrad_sm90

    arg = native.arg
    x, cache = _input(x, cache, geometry[2])
    grad = grad.contiguous(memory_format=LAST)
    grad_x = torch.empty_like(x, memory_format=LAST) if mask[0] else None
    grad_cache = torch.empty_like(cache, memory_format=LAST) if cache is not None and mask[3] else None
    grad_weight = torch.empty_like(weight) if mask[1] or mask[2] else None
    grad_bias = weight.new_empty(weight.shape[0]) if mask[2] else None
    by_hopper = False
    if grad_weight is not None and hopper and wgrad_sm90.why_not(grad, x, weight, cache, geometry) is None:
        wgrad_sm90.launch(grad, x, grad_weight, grad_bias, cache, geometry, lib=lib)
        by_hopper = True
    of_input = grad_x, grad_cache
    if hopper and any(t is not None for t in of_input) and sm90.why_not_dgrad(grad, x, weight, cache, geometry) is None:
        sm90.dgrad(grad, x, weight, cache, geometry, *of_input, lib=lib)
        of_input = None, None
    rest = *of_input, *((None, None) if by_hopper else (grad_weight, grad_bias))
    if any(t is not None for t in rest):
        _launch((lib or native.lib()).causal_conv3d_cuda_backward, x, arg(x), arg(weight), arg(cache), *geometry, _allow_tf32(x),
                arg(grad), *map(arg, rest), choice)
    return [grad_x, grad_weight if mask[1] else None, grad_bias, grad_cache]
