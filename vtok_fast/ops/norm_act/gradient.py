"""First-order gradients of ``norm_act``: which backend computes them, and the op that autograd calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtok_fast.dispatch import backends
from vtok_fast.ops.norm_act import triton
from vtok_fast.ops.norm_act.call import Gradients, NormBackwardCall, NormCall, output_format
from vtok_fast.reference import norm_act as reference


def run_reference(call: NormBackwardCall) -> Gradients:
    """The definition in PyTorch, which autograd can differentiate again."""
    forward = call.forward
    return reference.norm_act_backward(
        call.grad,
        *forward[:6],
        kind=forward.kind,
        groups=forward.groups,
        per_frame=forward.per_frame,
        eps=forward.eps,
        activation=forward.activation,
        rounding=forward.rounding,
    )


backends.register(
    "norm_act_backward",
    backends.Backend("triton", triton.why_not_backward, triton.run_backward),
    backends.Backend("reference", lambda call: None, run_reference),
)

# ---- torch.library -----------------------------------------------------------------------------------------

torch.library.define(
    "vtok_fast::norm_act_backward",
    "(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? residual, "
    "str kind, int groups, bool per_frame, float eps, str? activation, str rounding, bool[] wanted, "
    "str? preferred) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("vtok_fast::norm_act_backward", ("cpu", "cuda"))
def _impl(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *fields, wanted, preferred = args
    call = NormBackwardCall._make((grad, *fields, tuple(wanted)))
    with backends.backend(preferred):
        found = backends.select("norm_act_backward", call).run(call)
    # An op returns tensors: an empty one stands for a gradient that is not wanted.
    return tuple(
        promised
        if promised.numel() == 0 or gradient is None
        else gradient
        if gradient.stride() == promised.stride()
        else promised.copy_(gradient)
        for gradient, promised in zip(found, _fake(grad, *args))
    )


@torch.library.register_fake("vtok_fast::norm_act_backward")
def _fake(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    wanted, layout = args[-2], output_format(args[0])
    if wanted[0] or wanted[5]:
        grad_x = torch.empty_like(args[0], memory_format=layout)
    else:
        grad_x = grad.new_empty(0)
    return grad_x, *(
        torch.empty_like(t, memory_format=torch.contiguous_format) if needed else grad.new_empty(0)
        for t, needed in zip(args[1:5], wanted[1:5])
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    call = NormCall(*inputs[:-1])
    ctx.save_for_backward(*call[:6])
    ctx.options = call[6:]
    backends.remember(ctx, inputs[-1])


def _backward(ctx: Any, grad: Tensor) -> Any:
    saved = backends.saved_tensors(ctx)
    wanted = tuple(needed and t is not None for needed, t in zip(ctx.needs_input_grad, saved))
    call = NormBackwardCall._make((grad, *saved, *ctx.options, wanted))
    if backends.is_differentiated(grad, *saved) or backends.is_only_reference("norm_act_backward", call):
        found = run_reference(call)  # in the open, where autograd and compilers see it
    else:
        found = torch.ops.vtok_fast.norm_act_backward(*call, ctx.preferred_backend)
        found = *found, found[0]  # x and the residual are added, so their gradients are one
    return *[g if needed else None for g, needed in zip(found, wanted)], *[None] * 7


torch.library.register_autograd("vtok_fast::norm_act", _backward, setup_context=_setup_context)
