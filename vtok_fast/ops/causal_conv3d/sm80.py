"""The CUDA kernels of ``causal_conv3d`` for every GPU since sm_80: which calls they take, and how a call
becomes a launch.

Nothing here needs a GPU except the launch itself: the native module is a parameter, so that the tests run the
same code on an emulator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtok_fast.dispatch import native
from vtok_fast.dispatch.backends import Reason
from vtok_fast.ops.causal_conv3d import tuned
from vtok_fast.ops.causal_conv3d.call import ConvBackwardCall, ConvCall, Gradients, Triple
from vtok_fast.ops.causal_conv3d.launch import allow_tf32, channels_last, inputs, launch

ANY: Triple = (0, 0, 0)  # rows and columns of the tile, K splits; 0: the plan's
# Temporal taps; bytes of a position's tables in shared memory, on the smallest of GPUs
LARGEST_TIME, LARGEST_TABLE = (
    32,
    256,
)


def why_not(call: ConvCall | ConvBackwardCall) -> Reason:
    """The reason why the kernels cannot run a checked call or its gradients, or None."""
    return native.why_no_cuda(call.x) or why_not_shape(call)


def why_not_shape(call: ConvCall | ConvBackwardCall) -> Reason:
    """The same, of what does not depend on the machine."""
    if call.x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no {call.x.dtype} kernel"
    kt, kh, kw = call.weight.shape[2:]
    if kt > LARGEST_TIME or 8 * kt + 4 * kh * kw > LARGEST_TABLE:
        return f"a kernel of {kt}x{kh}x{kw} taps is too large"
    if call.geometry.groups > 1 and isinstance(call, ConvCall) and call.depth_to_space != (1, 1, 1):
        return "no depth_to_space with groups"
    return None if call.x.shape[0] else "the batch is empty"


def why_slower(call: ConvCall) -> Reason:
    """The reason to prefer another backend, as measured on this machine, or None."""
    return tuned.why_slower("sm80", call)


def run(call: ConvCall) -> Tensor:
    """Runs a checked call, with the tile of the tuning table where it has one."""
    return tuned.launch(forward, call, "sm80", ANY)


def forward(call: ConvCall, out: Tensor | None = None, *, lib: Any = None, choice: Triple = ANY) -> Tensor:
    """Runs a checked call into ``out``: the final shape, channels_last_3d; a fresh one where it is None.
    ``choice`` insists where it is not 0."""
    out = call.empty_output() if out is None else out
    x, cache = inputs(call.x, call.cache, call.geometry.groups)
    bias = None if call.bias is None else call.bias.contiguous()
    arg = native.arg_on(call.x.device)
    residual = channels_last(call.residual)
    launch(
        (lib or native.lib()).causal_conv3d_sm80,
        x,
        arg(x),
        arg(call.weight),
        arg(cache),
        call.geometry.native(),
        allow_tf32(x),
        arg(bias),
        arg(residual),
        arg(out),
        call.alpha,
        call.activation == "silu",
        call.depth_to_space,
        choice,
    )
    return out


def backward(call: ConvBackwardCall, into: Gradients, *, lib: Any = None, choice: Triple = ANY) -> None:
    """Writes the gradients into the tensors that are given, in the order x, weight, bias, cache; all others
    of ``call`` have channel stride 1. A gradient of the bias needs one of the weights."""
    grad_x, grad_weight, grad_bias, grad_cache = into
    arg = native.arg_on(call.x.device)
    launch(
        (lib or native.lib()).causal_conv3d_sm80_backward,
        call.x,
        arg(call.x),
        arg(call.weight),
        arg(call.cache),
        call.geometry.native(),
        allow_tf32(call.x),
        arg(call.grad),
        arg(grad_x),
        arg(grad_cache),
        arg(grad_weight),
        arg(grad_bias),
        choice,
    )
