"""The Hopper kernel of ``causal_conv3d``'s gradient of weights and bias: which calls it takes, and how a call becomes a launch."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from vtok_fast import native
from vtok_fast.ops import causal_conv3d_cuda as cuda

Choice = tuple[int, int, int]  # columns of the tile, K splits, blocks per cluster; 0: the plan's


def why_not(grad: Tensor, x: Tensor, weight: Tensor, cache: Tensor | None, geometry: tuple) -> str | None:
    """The reason why the kernel cannot compute these gradients, or None. x, cache and grad are as :func:`launch` takes them."""
    if (reason := native.why_no_cuda(x)) is not None:
        return reason
    if torch.cuda.get_device_capability(x.device) != (9, 0):
        return "the GPU is no Hopper"
    if "90a" not in native.lib().cuda_archs:
        return "the native module was built without sm_90a kernels"
    with torch.cuda.device(x.device):
        return _why_no_plan(x.device.index, tuple(map(_without_address, (x, weight, cache, grad))), _hashable(geometry))


def _without_address(tensor: Tensor | None) -> tuple | None:
    """What native.arg makes of a tensor, with its address' alignment alone: a plan reads no data."""
    taken = native.arg(tensor)
    return None if taken is None else (4096 + taken[0] % 16, *taken[1:])


def _hashable(geometry: tuple) -> tuple:
    return tuple(tuple(value) if isinstance(value, list) else value for value in geometry)


@functools.lru_cache(maxsize=4096)
def _why_no_plan(device: int | None, tensors: tuple, geometry: tuple) -> str | None:
    x, weight, cache, grad = tensors
    need = torch.zeros(1, dtype=torch.int64)
    try:
        native.lib().causal_conv3d_wgrad_sm90(x, weight, cache, *geometry, False, grad, weight, None, (0, 0, 0), None,
                                              native.arg(need), 0)
    except NotImplementedError as error:
        return str(error).removeprefix("sm90: ")
    return None


def launch(grad: Tensor, x: Tensor, grad_weight: Tensor, grad_bias: Tensor | None, cache: Tensor | None, geometry: tuple, *,
           lib: Any = None, choice: Choice = (0, 0, 0)) -> None:
    """Writes the gradients of the weights, and of the bias where it is given. All others have channel stride 1.

    Raises:
        NotImplementedError: the kernel cannot run it; the message says why.
    """
    arg = native.arg
    cuda._launch((lib or native.lib()).causal_conv3d_wgrad_sm90, x, arg(x), arg(grad_weight), arg(cache), *geometry, False,
                 arg(grad), arg(grad_weight), arg(grad_bias), choice)
