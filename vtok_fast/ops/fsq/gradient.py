"""The gradient of ``fsq``: which backend computes it, and the op that autograd calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtok_fast.dispatch import backends
from vtok_fast.ops.fsq import sm80
from vtok_fast.ops.fsq.call import FSQBackwardCall
from vtok_fast.reference import fsq as reference


def run_reference(call: FSQBackwardCall) -> Tensor:
    """The definition in PyTorch, which autograd can differentiate again."""
    return reference.fsq_quantize_backward(call.grad, call.z, call.levels, variant=call.variant, dim=call.dim)


backends.register(
    "fsq_backward",
    backends.Backend("sm80", sm80.why_not_backward, sm80.backward),
    backends.Backend("reference", lambda call: None, run_reference),
)

# ---- torch.library -----------------------------------------------------------------------------------------

torch.library.define(
    "vtok_fast::fsq_quantize_backward",
    "(Tensor grad, Tensor z, int[] levels, str variant, int dim, str? preferred) -> Tensor",
)


@torch.library.impl("vtok_fast::fsq_quantize_backward", ("cpu", "cuda"))
def _impl(grad, z, levels, variant, dim, preferred):
    call = FSQBackwardCall(grad, z, tuple(levels), variant, dim)
    with backends.backend(preferred):
        grad_z = backends.select("fsq_backward", call).run(call)
    return grad_z if grad_z.stride() == torch.empty_like(z).stride() else torch.empty_like(z).copy_(grad_z)


@torch.library.register_fake("vtok_fast::fsq_quantize_backward")
def _fake(grad, z, levels, variant, dim, preferred):
    return torch.empty_like(z)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    z, levels, ctx.variant, ctx.dim, explicit = inputs
    ctx.levels = tuple(levels)
    ctx.save_for_backward(z)
    backends.remember(ctx, explicit)


def _backward(ctx, grad_codes, grad_indices):
    (z,) = backends.saved_tensors(ctx)
    call = FSQBackwardCall(grad_codes, z, ctx.levels, ctx.variant, ctx.dim)
    if backends.is_differentiated(grad_codes, z) or backends.is_only_reference("fsq_backward", call):
        grad_z = run_reference(call)  # in the open, where autograd and compilers see it
    else:
        grad_z = torch.ops.vtok_fast.fsq_quantize_backward(*call, ctx.preferred_backend)
    return grad_z, None, None, None, None


torch.library.register_autograd("vtok_fast::fsq_quantize", _backward, setup_context=_setup_context)
