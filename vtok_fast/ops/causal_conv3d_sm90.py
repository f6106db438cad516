"""The Hopper kernel of ``causal_conv3d``: which calls it takes, which tile, and how a call becomes a launch.

A plan is a tile of the output (rows x columns of the product), K splits, blocks per cluster and stages. For the layer classes of
``causal_conv3d_sm90.json`` it is written there; for other shapes the native module's model of the cost chooses.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtok_fast import native
from vtok_fast.ops import causal_conv3d_cuda as cuda

TABLE = Path(__file__).with_name("causal_conv3d_sm90.json")
Choice = tuple[int, int, int, int, int]  # rows and columns of the tile, K splits, cluster, stages of weights; 0: the plan's
ANY: Choice = (0, 0, 0, 0, 0)


class Plan(NamedTuple):
    """What the native module would launch. ``cycles`` are predicted, of a multiprocessor's clock."""

    scratch_bytes: int
    tile_m: int
    tile_n: int
    splits: int
    cluster: int
    weight_stages: int
    patch_stages: int
    frames: int
    rows: int
    columns: int
    cycles: int

    @property
    def choice(self) -> Choice:
        return self.tile_m, self.tile_n, self.splits, self.cluster, self.weight_stages


def layer_class(kernel: tuple[int, ...], stride: tuple[int, ...], channels: int, outputs: int, positions: int) -> str:
    """The key of the table: kernel, stride, channels, and output positions down to a power of two."""
    return f"{'x'.join(map(str, kernel))} /{''.join(map(str, stride))} {channels}->{outputs} 2^{int(math.log2(max(positions, 1)))}"


@functools.cache
def table() -> dict[str, dict[str, Any]]:
    """Per layer class a ``choice``, and what it was chosen by: ``predicted_us``, and ``measured_us`` where a GPU has run it."""
    return json.loads(TABLE.read_text())["classes"]


def chosen(call: Any, out: Tensor) -> Choice:
    """What the table says of a call's class."""
    entry = table().get(layer_class(tuple(call.weight.shape[2:]), call.stride, call.x.shape[1], call.weight.shape[0],
                                    out.numel() // max(out.shape[1], 1)))
    return ANY if entry is None else tuple(entry["choice"])


# ---- forward -------------------------------------------------------------------------------------------------------------


def _forward_args(call: Any, geometry: tuple, out: Tensor) -> tuple[tuple, list[Tensor | None]]:
    """The launcher's arguments, and the tensors that they point into."""
    x, cache = cuda._input(call.x, call.cache, call.groups)
    bias = None if call.bias is None else call.bias.contiguous()
    residual = cuda.channels_last(call.residual)
    arg = native.arg
    args = (arg(x), arg(call.weight), arg(cache), *geometry, False, arg(bias), arg(residual), arg(out), call.alpha,
            call.activation == "silu", call.depth_to_space)
    return args, [x, cache, bias, residual]


def plan(call: Any, geometry: tuple, out: Tensor, *, lib: Any = None, choice: Choice | None = None) -> Plan:
    """The plan for a checked call. Tensors are not read: ``out`` may be on the meta device.

    Raises:
        NotImplementedError: the kernel cannot run it; the message says why.
    """
    args, _ = _forward_args(call, geometry, out)
    return _plan((lib or native.lib()).causal_conv3d_sm90, args, chosen(call, out) if choice is None else choice)


def _plan(launcher: Any, args: tuple, choice: Choice) -> Plan:
    need = torch.zeros(len(Plan._fields), dtype=torch.int64)
    launcher(*_without_addresses(args), choice, None, native.arg(need), 0)
    return Plan(*need.tolist())


@functools.lru_cache(maxsize=4096)
def _why_no_plan(device: int | None, args: tuple) -> str | None:
    try:
        _plan(native.lib().causal_conv3d_sm90, args, ANY)
    except NotImplementedError as error:
        return str(error).removeprefix("sm90: ")
    return None


def _without_addresses(args: tuple) -> tuple:
    """Tensors with their alignment in place of their address, which is not read where only a plan is asked for; no lists."""
    return tuple((4096 + a[0] % 16, *a[1:]) if isinstance(a, tuple) and len(a) == 4 and isinstance(a[2], torch.Size) else
                 tuple(a) if isinstance(a, list) else a for a in args)


def why_not_machine(x: Tensor) -> str | None:
    """The reason why the kernel cannot run on this tensor's device, or None."""
    if (reason := native.why_no_cuda(x)) is not None:
        return reason
    capability = torch.cuda.get_device_capability(x.device)
    if capability != (9, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, and these kernels need 9.0"
    return None if "90a" in native.lib().cuda_archs else "the native module was built without sm_90a kernels"


def why_not(call: Any, geometry: tuple, out: Tensor) -> str | None:
    """The reason why the kernel cannot run a checked call, or None. ``out``: what it would write, on any device."""
    if (reason := why_not_machine(call.x)) is not None:
        return reason
    with torch.cuda.device(call.x.device):
        return _why_no_plan(call.x.device.index, _without_addresses(_forward_args(call, geometry, out)[0]))


def forward(call: Any, geometry: tuple, out: Tensor, *, lib: Any = None, choice: Choice | None = None) -> Tensor:
    """Runs a checked call into ``out``: the final shape, channels_last_3d. ``geometry``: see :func:`causal_conv3d_cuda.forward`."""
    args, _alive = _forward_args(call, geometry, out)
    cuda._launch((lib or native.lib()).causal_conv3d_sm90, call.x, *args, chosen(call, out) if choice is None else choice)
    return out


# ---- the input's gradient ------------------------------------------------------------------------------------------------


def _dgrad_args(grad: Tensor, x: Tensor, weight: Tensor, cache: Tensor | None, geometry: tuple, grad_x: Tensor | None,
                grad_cache: Tensor | None) -> tuple:
    arg = native.arg
    return arg(x), arg(weight), arg(cache), *geometry, False, arg(grad), arg(grad_x), arg(grad_cache)


def why_not_dgrad(grad: Tensor, x: Tensor, weight: Tensor, cache: Tensor | None, geometry: tuple) -> str | None:
    """The reason why the kernel cannot compute the input's gradient, or None. All tensors are channels-last already."""
    if (reason := why_not_machine(x)) is not None:
        return reason
    args = _dgrad_args(grad, x, weight, cache, geometry, x, cache)
    with torch.cuda.device(x.device):
        return _why_no_dgrad(x.device.index, _without_addresses(args))


@functools.lru_cache(maxsize=4096)
def _why_no_dgrad(device: int | None, args: tuple) -> str | None:
    try:
        _plan(native.lib().causal_conv3d_sm90_dgrad, args, ANY)
    except NotImplementedError as error:
        return str(error).removeprefix("sm90: ")
    return None


def dgrad(grad: Tensor, x: Tensor, weight: Tensor, cache: Tensor | None, geometry: tuple, grad_x: Tensor | None,
          grad_cache: Tensor | None, *, lib: Any = None, choice: Choice = ANY) -> None:
    """Writes the gradients of x and of the cache, where they are given: the shapes of both, channels_last_3d."""
    args = _dgrad_args(grad, x, weight, cache, geometry, grad_x, grad_cache)
    cuda._launch((lib or native.lib()).causal_conv3d_sm90_dgrad, x, *args, choice)
