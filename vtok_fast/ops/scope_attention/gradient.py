"""Gradients of ``scope_attention``: which backend computes them, and the op that autograd calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtok_fast.dispatch import backends
from vtok_fast.ops.scope_attention import cpu, triton
from vtok_fast.ops.scope_attention.call import ScopeBackwardCall, like
from vtok_fast.ops.scope_attention.csr import CSR
from vtok_fast.ops.scope_attention.scope import Scope
from vtok_fast.reference import scope_attention as reference


def run(call: ScopeBackwardCall) -> tuple[Tensor, ...]:
    """(dq, dk, dv), by the backend that this thread prefers."""
    if not call.q.numel() or not call.k.numel():  # empty inputs never reach a kernel
        return tuple(torch.zeros_like(t) for t in (call.q, call.k, call.v))
    return backends.select("scope_attention_backward", call).run(call)


def run_reference(call: ScopeBackwardCall) -> tuple[Tensor, ...]:
    """The definition in PyTorch."""
    grad, q, k, v, out, lse, scope, scale = call
    mask = triton.safe_mask(scope, q.device)
    found = reference.scope_attention_backward(grad, q, k, v, out, lse, mask, scale)
    return tuple(map(like, (q, k, v), found))


backends.register(
    "scope_attention_backward",
    backends.Backend("triton", triton.why_not, triton.run_backward),
    backends.Backend("cpu", cpu.why_not, cpu.run_backward, needs_native=False),
    backends.Backend("reference", lambda call: None, run_reference),
)

# ---- torch.library -----------------------------------------------------------------------------------------


@torch.library.impl("vtok_fast::scope_attention_backward", ("cpu", "cuda"))
def _impl(grad, q, k, v, out, lse, q_offsets, range_offsets, ranges, scale, preferred):
    scope = Scope.of(CSR(q_offsets, range_offsets, ranges), q.shape[2], k.shape[2])
    with backends.backend(preferred):
        return run(ScopeBackwardCall(grad, q, k, v, out, lse, scope, scale))


@torch.library.register_fake("vtok_fast::scope_attention_backward")
def _fake(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, *csr, ctx.scale, explicit = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, *csr)
    backends.remember(ctx, explicit)


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *csr = backends.saved_tensors(ctx)
    if backends.is_differentiated(grad, q, k, v):
        # The kernels' formula takes the log-sum-exp for a constant, so it is computed again from q and k.
        scope = Scope.of(CSR(*csr), q.shape[2], k.shape[2])
        mask = triton.safe_mask(scope, q.device)
        out, lse = reference.scope_attention(q, k, v, mask, ctx.scale)
        found = reference.scope_attention_backward(grad, q, k, v, out, lse, mask, ctx.scale)
    else:
        found = torch.ops.vtok_fast.scope_attention_backward(
            grad, q, k, v, out, lse, *csr, ctx.scale, ctx.preferred_backend
        )
    return *[g if needed else None for g, needed in zip(found, ctx.needs_input_grad)], *[None] * 5


torch.library.register_autograd("vtok_fast::scope_attention", _backward, setup_context=_setup_context)
