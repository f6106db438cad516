"""The Triton kernels of ``norm_act``: which calls they take, and what they are launched with."""

from __future__ import annotations

import torch
from torch import Tensor

from vtok_fast.dispatch import backends, tuning
from vtok_fast.dispatch.backends import Reason
from vtok_fast.ops.norm_act.call import Gradients, NormBackwardCall, NormCall, output_format

LARGEST = 2**31 - 8192  # positions of a clip, and those beyond its end that the last tile counts


def why_not(call: NormCall) -> Reason:
    for name, t in zip(call._fields, call[:6]):
        if t is not None and t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"no kernel for {name} in {t.dtype}"
    if (why := backends.why_not_triton_on(call.x)) is not None:
        return why
    if (positions := call.x.shape[2:].numel()) >= LARGEST:
        return f"{positions} positions in a clip, at most {LARGEST - 1}, which int32 counts"
    from vtok_fast.kernels import norm_act as kernels

    if "group" not in call.kind and call.x.shape[1] // call.groups > kernels.MAX_CHANNELS:
        return f"{call.x.shape[1] // call.groups} channels in a group, at most {kernels.MAX_CHANNELS}"
    return None


@tuning.guarded("norm_act")
def run(call: NormCall, tail_frames: int = 0) -> Tensor | tuple[Tensor, Tensor]:
    from vtok_fast.kernels import norm_act as kernels

    layout = output_format(call.x)
    y = torch.empty_like(call.x, memory_format=layout)
    tail = (
        torch.empty_like(y[:, :, max(y.shape[2] - tail_frames, 0) :], memory_format=layout)
        if tail_frames
        else None
    )
    kernels.norm_act(
        *call[:6],
        y,
        kind=call.kind,
        groups=call.groups,
        per_frame=call.per_frame,
        eps=call.eps,
        silu=call.activation == "silu",
        rounding=call.rounding,
        tail=tail,
    )
    return y if tail is None else (y, tail)


def why_not_backward(call: NormBackwardCall) -> Reason:
    """The reason why the kernels cannot compute these gradients, or None."""
    return why_not(call.forward)


@tuning.guarded("norm_act")
def run_backward(call: NormBackwardCall) -> Gradients:
    """The wanted gradients."""
    from vtok_fast.kernels import norm_act_backward as kernels

    forward = call.forward
    return kernels.norm_act_backward(
        call.grad,
        *forward[:6],
        kind=forward.kind,
        groups=forward.groups,
        per_frame=forward.per_frame,
        eps=forward.eps,
        activation=forward.activation,
        rounding=forward.rounding,
        layout=output_format(forward.x),
        wanted=call.wanted,
    )
