"""The Hopper kernel of ``causal_conv3d``'s gradient of weights and bias: which calls it takes, and how a call becomes a launch."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtok_fast import native
from vtok_fast.ops import causal_conv3d_cuda as cuda

Choice = tuple[int, int, int]  # columns of the tile, K splits, blocks per cluster; 0: the plan's


class Plan(NamedTuple):
    """What the native module would launch. Tiles (of a cluster) sum over all positions, but for those that are split. ``cycles``
    are predicted, of a multiprocessor's clock."""

    scratch_bytes: int
    columns: int
    splits: int
    cluster: int
    whole_tiles: int
    split_tiles: int
    stages: int
    cycles: int


def plan(grad: Tensor, x: Tensor, weight: Tensor, cache: Tensor | None, geometry: tuple, *, lib: Any = None,
         choice: Choice = (0, 0, 0)) -> Plan:
    """The plan of :func:`launch`, which reads none of the tensors' data.

    Raises:
        NotImplementedError: the kernel cannot run it; the message says why.
    """
    return _plan(lib or native.lib(), *map(native.arg, (x, weight, cache, grad)), geometry, choice)


def _plan(lib: Any, x: Any, weight: Any, cache: Any, grad: Any, geometry: tuple, choice: Choice) -> Plan:
    need = torch.zeros(len(Plan._fields), dtype=torch.int64)
    lib.causal_conv3d_wgrad_sm90(x, weight, cache, *geometry, False, grad, weight, None, choice, None, native.arg(need), 0)
    return Plan(*need.tolist())


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
    try:
        _plan(native.lib(), *tensors, geometry, (0, 0, 0))
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
