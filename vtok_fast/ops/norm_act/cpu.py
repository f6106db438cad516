"""The CPU kernels of ``norm_act``."""

from __future__ import annotations

import torch
from torch import Tensor

from vtok_fast.dispatch import native
from vtok_fast.dispatch.backends import Reason
from vtok_fast.ops.norm_act.call import NormCall, output_format

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(call: NormCall) -> Reason:
    if (reason := native.why_not_on_cpu(call.x, DTYPES)) is not None:
        return reason
    if call.rounding != "once":
        return (
            f"rounding={call.rounding!r} promises the bits of a chain of PyTorch's own reductions, and only "
            "sum in their order"
        )
    return None


def _modulation(t: Tensor | None, x: Tensor, channels_last: bool) -> Tensor | None:
    """A scale or shift in x's dtype, expanded to its shape, in strides that the kernel reads: see
    NormProblem."""
    if t is None:
        return None
    t = t.to(x.dtype).reshape((1,) * (5 - t.dim()) + t.shape)
    if channels_last:
        if x.shape[1] > 1 and (t.shape[1] == 1 or t.stride(1) != 1):
            t = t.expand(-1, x.shape[1], -1, -1, -1).contiguous(memory_format=torch.channels_last_3d)
    elif t.shape[3] * t.shape[4] > 1:
        t = t.expand(-1, -1, -1, *x.shape[3:]).contiguous()
    return t.expand(x.shape)


def run(call: NormCall) -> Tensor:
    x, residual = call.x, call.residual
    layout = output_format(x)
    channels_last = layout == torch.channels_last_3d
    if channels_last and x.stride(1) != 1:
        x = x.contiguous(memory_format=layout)
    if residual is not None and not (channels_last and residual.stride(1) == 1):
        residual = residual.contiguous(memory_format=layout)
    y = torch.empty_like(x, memory_format=layout)
    # Held in names until the kernel returns: it sees pointers only.
    scale, shift = _modulation(call.scale, x, channels_last), _modulation(call.shift, x, channels_last)
    arg = native.arg
    native.lib().norm_act(
        arg(x),
        arg(call.weight),
        arg(call.bias),
        arg(scale),
        arg(shift),
        arg(residual),
        arg(y),
        channels_last,
        call.kind in ("layer", "group"),
        call.kind in ("group", "group_rms"),
        call.per_frame,
        call.groups,
        call.eps,
        call.activation == "silu",
        native.threads(),
    )
    return y
