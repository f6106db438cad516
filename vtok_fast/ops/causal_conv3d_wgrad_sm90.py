"""The Hopper kernel of ``causal_conv3d``'s gradient of weights and bias: which calls it takes, and how a call becomes a launch."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from vtok_fast import native
from vtok_fast.ops import causal_conv3d_cuda as cuda
from vtok_fast.ops import causal_conv3d_sm90 as sm90

Choice = tuple[int, int, int]  # columns of the tile, K splits, blocks per cluster; 0: the plan's
ANY: Choice = (0, 0, 0)


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


def _args(grad: Tensor, x: Tensor, grad_weight: Tensor, grad_bias: Tensor | None, cache: Tensor | None, geometry: tuple) -> tuple:
    arg = native.arg
    return (arg(x), arg(grad_weight), arg(cache), *geometry, False, arg(grad), arg(grad_weight), arg(grad_bias))


def plan(grad: Tensor, x: Tensor, weight: Tensor, cache: Tensor | None, geometry: tuple, *, lib: Any = None,
         choice: Choice = ANY) -> Plan:
    """The plan of :func:`launch`, which reads none of the tensors' data.

    Raises:
        NotImplementedError: the kernel cannot run it; the message says why.
    """
    launcher = (lib or native.lib()).causal_conv3d_wgrad_sm90
    return Plan(*sm90.ask(launcher, _args(grad, x, weight, None, cache, geometry), choice, len(Plan._fields)))


def why_not(grad: Tensor, x: Tensor, weight: Tensor, cache: Tensor | None, geometry: tuple) -> str | None:
    """The reason why the kernel cannot compute these gradients, or None. x, cache and grad are as :func:`launch` takes them."""
    args = _args(grad, x, weight, None, cache, geometry)
    return sm90.why_refused(x, "causal_conv3d_wgrad_sm90", args, ANY, len(Plan._fields))


def launch(grad: Tensor, x: Tensor, grad_weight: Tensor, grad_bias: Tensor | None, cache: Tensor | None, geometry: tuple, *,
           lib: Any = None, choice: Choice = ANY) -> None:
    """Writes the gradients of the weights, and of the bias where it is given. All others have channel stride 1.

    Raises:
        NotImplementedError: the kernel cannot run it; the message says why.
    """
    args = _args(grad, x, grad_weight, grad_bias, cache, geometry)
    cuda._launch((lib or native.lib()).causal_conv3d_wgrad_sm90, x, *args, choice)
