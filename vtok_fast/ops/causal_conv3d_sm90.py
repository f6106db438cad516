"""The Hopper kernel of ``causal_conv3d``: which calls it takes, which tile, and how a call becomes a launch.

A plan is a tile of the output (rows x columns of the product), K splits, blocks per cluster and stages. The native module's model
of the cost chooses it, unless the caller does: what ``vtok-fast tune`` measured is in the machine's tuning table.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtok_fast import native
from vtok_fast.ops import causal_conv3d_cuda as cuda

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


# ---- plans, without a launch: of this kernel and of the weight gradient's ------------------------------------------------


def ask(launcher: Any, args: tuple, choice: tuple[int, ...], numbers: int) -> list[int]:
    """What a launcher would do with these arguments: so many numbers. No tensor is read.

    Raises:
        NotImplementedError: the kernel cannot run them; the message says why.
    """
    need = torch.zeros(numbers, dtype=torch.int64)
    launcher(*_without_addresses(args), choice, None, native.arg(need), 0)
    return need.tolist()


def why_refused(x: Tensor, launcher: str, args: tuple, choice: tuple[int, ...], numbers: int) -> str | None:
    """The reason why a Hopper launcher of the native module cannot run these arguments on the device of x, or None; remembered."""
    if (reason := why_not_machine(x)) is not None:
        return reason
    with torch.cuda.device(x.device):
        return _why_refused(x.device.index, launcher, _without_addresses(args), choice, numbers)


@functools.lru_cache(maxsize=4096)
def _why_refused(device: int | None, launcher: str, args: tuple, choice: tuple[int, ...], numbers: int) -> str | None:
    try:
        ask(getattr(native.lib(), launcher), args, choice, numbers)
    except NotImplementedError as error:
        return str(error).removeprefix("sm90: ")
    return None


def _without_addresses(args: tuple) -> tuple:
    """Tensors with their alignment in place of their address, which is not read where only a plan is asked for; no lists."""
    return tuple((4096 + a[0] % 16, *a[1:]) if isinstance(a, tuple) and len(a) == 4 and isinstance(a[2], torch.Size) else
                 tuple(a) if isinstance(a, list) else a for a in args)


def why_not_machine(x: Tensor) -> str | None:
    """The reason why the Hopper kernels cannot run on this tensor's device, or None."""
    if (reason := native.why_no_cuda(x)) is not None:
        return reason
    capability = torch.cuda.get_device_capability(x.device)
    if capability != (9, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, and these kernels need 9.0"
    return None if "90a" in native.lib().cuda_archs else "the native module was built without sm_90a kernels"


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


def plan(call: Any, geometry: tuple, out: Tensor, *, lib: Any = None, choice: Choice = ANY) -> Plan:
    """The plan for a checked call. Tensors are not read: ``out`` may be on the meta device.

    Raises:
        NotImplementedError: the kernel cannot run it; the message says why.
    """
    args, _ = _forward_args(call, geometry, out)
    return Plan(*ask((lib or native.lib()).causal_conv3d_sm90, args, choice, len(Plan._fields)))


def why_not(call: Any, geometry: tuple, out: Tensor) -> str | None:
    """The reason why the kernel cannot run a checked call, or None. ``out``: what it would write, on any device."""
    return why_refused(call.x, "causal_conv3d_sm90", _forward_args(call, geometry, out)[0], ANY, len(Plan._fields))


def forward(call: Any, geometry: tuple, out: Tensor, *, lib: Any = None, choice: Choice = ANY) -> Tensor:
    """Runs a checked call into ``out``: the final shape, channels_last_3d. ``geometry``: see :func:`causal_conv3d_cuda.forward`."""
    args, _alive = _forward_args(call, geometry, out)
    cuda._launch((lib or native.lib()).causal_conv3d_sm90, call.x, *args, choice)
    return out


# ---- the input's gradient ------------------------------------------------------------------------------------------------


def _dgrad_args(grad: Tensor, x: Tensor, weight: Tensor, cache: Tensor | None, geometry: tuple, grad_x: Tensor | None,
                grad_cache: Tensor | None) -> tuple:
    arg = native.arg
    return arg(x), arg(weight), arg(cache), *geometry, False, arg(grad), arg(grad_x), arg(grad_cache)


def why_not_dgrad(grad: Tensor, x: Tensor, weight: Tensor, cache: Tensor | None, geometry: tuple) -> str | None:
    """The reason why the kernel cannot compute the input's gradient, or None. All tensors are channels-last already."""
    args = _dgrad_args(grad, x, weight, cache, geometry, x, cache)
    return why_refused(x, "causal_conv3d_sm90_dgrad", args, ANY, len(Plan._fields))


def dgrad(grad: Tensor, x: Tensor, weight: Tensor, cache: Tensor | None, geometry: tuple, grad_x: Tensor | None,
          grad_cache: Tensor | None, *, lib: Any = None, choice: Choice = ANY) -> None:
    """Writes the gradients of x and of the cache, where they are given: the shapes of both, channels_last_3d."""
    args = _dgrad_args(grad, x, weight, cache, geometry, grad_x, grad_cache)
    cuda._launch((lib or native.lib()).causal_conv3d_sm90_dgrad, x, *args, choice)
