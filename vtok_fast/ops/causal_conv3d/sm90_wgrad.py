"""The sm90 kernel of ``causal_conv3d``'s gradient of weights and bias: which calls it takes, and how a call
becomes a launch."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from vtok_fast.dispatch import native
from vtok_fast.dispatch.backends import Reason
from vtok_fast.ops.causal_conv3d.call import ConvBackwardCall
from vtok_fast.ops.causal_conv3d.launch import ask, launch, why_refused

Choice = tuple[int, int, int]  # columns of the tile, K splits, blocks per cluster; 0: the plan's
ANY: Choice = (0, 0, 0)


class Plan(NamedTuple):
    """What the native module would launch. Tiles (of a cluster) sum over all positions, except those that
    are split. ``cycles`` are predicted, of a multiprocessor's clock."""

    scratch_bytes: int
    columns: int
    splits: int
    cluster: int
    whole_tiles: int
    split_tiles: int
    stages: int
    cycles: int


def _args(
    call: ConvBackwardCall, grad_weight: Tensor, grad_bias: Tensor | None, asked: bool = False
) -> tuple:
    """The launcher's arguments. Where the others take the weights, it gets their gradient: it does not read
    the weights, and needs only their shape."""
    arg = native.arg_anywhere if asked else native.arg_on(call.x.device)
    return (
        arg(call.x),
        arg(grad_weight),
        arg(call.cache),
        call.geometry.native(),
        arg(call.grad),
        arg(grad_bias),
    )


def plan(call: ConvBackwardCall, *, lib: Any = None, choice: Choice = ANY) -> Plan:
    """The plan of `wgrad`, which reads none of the tensors' data.

    Raises:
        NotImplementedError: the kernel cannot run it; the message says why.
    """
    launcher = (lib or native.lib()).causal_conv3d_sm90_wgrad
    return Plan(*ask(launcher, _args(call, call.weight, None, asked=True), choice, len(Plan._fields)))


def why_not(call: ConvBackwardCall) -> Reason:
    """The reason why the kernel cannot compute these gradients on the weights' device, or None. x, cache and
    grad are as `wgrad` takes them, or are tensors on the meta device that describe such ones."""
    args = _args(call, call.weight, None, asked=True)
    return why_refused(call.weight, "causal_conv3d_sm90_wgrad", args, ANY, len(Plan._fields))


def wgrad(
    call: ConvBackwardCall,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    *,
    lib: Any = None,
    choice: Choice = ANY,
) -> None:
    """Writes the gradients of the weights, and of the bias where it is given. All others have channel stride
    1.

    Raises:
        NotImplementedError: the kernel cannot run it; the message says why.
    """
    launch(
        (lib or native.lib()).causal_conv3d_sm90_wgrad, call.x, *_args(call, grad_weight, grad_bias), choice
    )
