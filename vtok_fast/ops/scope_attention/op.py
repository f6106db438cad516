"""``scope_attention``: attention in which each query sees a short list of key ranges, without a mask."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vtok_fast.dispatch import backends, native
from vtok_fast.ops.scope_attention import cpu, triton
from vtok_fast.ops.scope_attention.call import ScopeCall, like
from vtok_fast.ops.scope_attention.csr import CSR
from vtok_fast.ops.scope_attention.scope import Scope
from vtok_fast.reference import scope_attention as reference


def scope_attention(
    q: Tensor, k: Tensor, v: Tensor, scope: Scope, *, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """``softmax(q k^T scale) v`` over the keys that ``scope`` lets each query see.

    A query that sees nothing gives zeros, and gets and gives gradients of zero. Contract: *close* (see
    `vtok_fast.parity`). First-order gradients for ``q``, ``k`` and ``v``, in which no order of summation
    depends on chance.

    Args:
        q: (B, heads, Sq, D), float32, float64, bfloat16 or float16; any strides.
        k, v: (B, heads / n, Sk, D): n neighboring heads of queries share one of keys and values.
        scope: of Sq queries and Sk keys, on the host or on the device of ``q``. The values of a
            scope on a device are not waited for: invalid ones are clamped, and the next method of the scope
            that waits for the device raises.
        scale: multiplies the scores; default 1 / sqrt(D).
        backend: a name to insist on; else the best that can run.

    Returns:
        (B, heads, Sq, D) in the dtype and memory order of ``q``: where that is (B, Sq, heads, D), as
        projections give it, joining the heads costs nothing.

    Raises:
        TypeError: a dtype is not floating point, or they differ; or ``scope`` is not a `Scope`.
        ValueError: a shape or number is impossible; names the argument and its value.
        BackendError: ``backend`` cannot run this call.
    """
    _check(q, k, v, scope, scale)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if native.is_plain(q, k, v):
        return run(ScopeCall(q, k, v, scope, scale), backend)[0]
    if native.is_transformed():
        backends.insist_on_reference("scope_attention", backend)
        return reference.scope_attention(q, k, v, triton.safe_mask(scope, q.device), scale)[0]
    return torch.ops.vtok_fast.scope_attention(q, k, v, *scope.csr, scale, backend)[0]


def run(call: ScopeCall, backend: str | None) -> tuple[Tensor, Tensor]:
    """Runs a checked call on the chosen backend: (out, lse)."""
    if not call.q.numel() or not call.k.numel():  # empty inputs never reach a kernel
        out, lse = _fake(call.q)
        return out.zero_(), lse.fill_(-torch.inf)
    return backends.select("scope_attention", call, backend).run(call)


def _check(q: Tensor, k: Tensor, v: Tensor, scope: Scope, scale: float | None) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            raise ValueError(f"{name}: expected (B, heads, S, D), got shape {tuple(t.shape)}")
        if not t.dtype.is_floating_point or t.dtype != q.dtype:
            expected = "a floating point dtype" if name == "q" else f"the dtype of q, {q.dtype}"
            raise TypeError(f"{name}: expected {expected}, got {t.dtype}")
        if t.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {t.device}")
    batch, heads, _, dim = q.shape
    if dim == 0 or heads == 0:
        raise ValueError(f"q: expected at least one head of at least one value, got shape {tuple(q.shape)}")
    if k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(
            f"k: expected the batch and head size of q, {batch} and {dim}, got shape {tuple(k.shape)}"
        )
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"k: expected a number of heads that divides the {heads} of q, got {k.shape[1]}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    if not isinstance(scope, Scope):
        raise TypeError(f"scope: expected a vtok_fast.Scope, got {type(scope).__name__}")
    if scope.q_len != q.shape[2] or scope.k_len != k.shape[2]:
        raise ValueError(
            f"scope: expected {q.shape[2]} queries and {k.shape[2]} keys, as q and k have, got {scope!r}"
        )
    if scope.device.type != "cpu" and scope.device != q.device:
        raise ValueError(
            f"scope: expected to be on the host or on the device of q, {q.device}, got {scope.device}"
        )
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale!r}")


# ---- backends ----------------------------------------------------------------------------------------------


def run_reference(call: ScopeCall) -> tuple[Tensor, Tensor]:
    """The definition in PyTorch."""
    q, k, v, scope, scale = call
    out, lse = reference.scope_attention(q, k, v, triton.safe_mask(scope, q.device), scale)
    return like(q, out), lse


backends.register(
    "scope_attention",
    backends.Backend("triton", triton.why_not, triton.run),
    backends.Backend("cpu", cpu.why_not, cpu.run, needs_native=False),
    backends.Backend("reference", lambda call: None, run_reference),
)


# ---- torch.library -----------------------------------------------------------------------------------------
@torch.library.impl("vtok_fast::scope_attention", ("cpu", "cuda"))
def _impl(q, k, v, q_offsets, range_offsets, ranges, scale, backend):
    scope = Scope.of(CSR(q_offsets, range_offsets, ranges), q.shape[2], k.shape[2])
    return run(ScopeCall(q, k, v, scope, scale), backend)


@torch.library.register_fake("vtok_fast::scope_attention")
def _fake(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    return torch.empty_like(q), lse
