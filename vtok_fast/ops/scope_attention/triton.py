"""``scope_attention`` on a GPU: what the Triton kernels need besides the tensors, made from a scope without
waiting for it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok_fast.dispatch import backends, tuning
from vtok_fast.dispatch.backends import Reason
from vtok_fast.dispatch.lasting import refuse_recording
from vtok_fast.ops.scope_attention.call import ScopeBackwardCall, ScopeCall
from vtok_fast.ops.scope_attention.csr import CSR
from vtok_fast.ops.scope_attention.scope import Scope
from vtok_fast.ops.token_packing.packed_tokens import SCOPE, note_error

SHORT = 32  # mean rows of a segment from which on it counts as short
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def work_list(scope: Scope, block: int, exact: bool) -> Tensor:
    """(n, 4) int32 on the scope's device: for each block of at most ``block`` rows, its first row, the one
    after its last, and the same of its ranges. The most work comes first, so that the last programs to end
    are short.

    Unless it is to be ``exact``, n is an upper bound and surplus entries are empty blocks, so that nothing
    synchronizes.
    """
    q, r, ranges = (t.long() for t in scope.safe()[0])
    ends = ((q.diff() + block - 1) // block).cumsum(0)
    n = int(ends[-1]) if exact else (scope.q_len + scope.segments * (block - 1)) // block
    i = torch.arange(n, device=scope.device)
    s = torch.searchsorted(ends, i, right=True).clamp_(max=scope.segments - 1)
    start = q[s] + (i - F.pad(ends, (1, 0))[s]) * block
    end = torch.minimum(start + block, q[s + 1])
    start = torch.minimum(start, end)
    keys = F.pad((ranges[:, 1] - ranges[:, 0]).cumsum(0), (1, 0))
    order = ((keys[r[s + 1]] - keys[r[s]]) * (end > start)).argsort(descending=True, stable=True)
    return torch.stack((start, end, r[s], r[s + 1]), 1)[order].int()


def clamped(scope: Scope) -> CSR:
    """The scope's tensors, safe to use; that they had to be clamped is an error that the device reports
    late."""
    safe, changed = scope.safe()
    if changed is not None:
        note_error(changed, SCOPE)
    return safe


def safe_mask(scope: Scope, device: torch.device) -> Tensor:
    """The scope's mask, of values that are safe to use, on the device of the tensors."""
    return Scope._make(*clamped(scope), scope.q_len, scope.k_len).mask().to(device)


def prepared(scope: Scope, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The work list and the ranges of a scope on the device of the tensors, cached on the scope.

    Raises RuntimeError where the plan of a scope on the host would have to be made while a CUDA graph is
    recorded."""

    def make() -> tuple[Tensor, Tensor]:
        if scope.device.type == "cpu":
            refuse_recording(device, "the plan of a scope on the host")
        work = work_list(scope, block, exact=scope.device.type == "cpu")
        return work.to(device, non_blocking=True), clamped(scope).ranges.to(device, non_blocking=True)

    return scope.cached(("work", block, device), make, device)


def is_short(scope: Scope) -> bool:
    return scope.q_len <= SHORT * scope.segments


def why_not(call: ScopeCall | ScopeBackwardCall) -> Reason:
    """The reason why the kernels cannot run a checked call, or None."""
    if call.q.dtype not in DTYPES:
        return f"no kernel for {call.q.dtype}"
    if reason := backends.why_not_triton_on(call.q):
        return reason
    from vtok_fast.kernels import scope_attention as kernels

    return kernels.why_not_head(call.q.shape[3])


@tuning.guarded("scope_attention")
def run(call: ScopeCall, gpu: int | str | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) of a checked call."""
    from vtok_fast.kernels import scope_attention as kernels

    q, k, v, scope, scale = call
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    target = kernels.aligned(out)
    c = _config("forward", q, scope, gpu)
    kernels.attend(
        *map(kernels.aligned, (q, k, v)), target, lse, *prepared(scope, c.block_m, q.device), scale, c
    )
    return out if target is out else out.copy_(target), lse


@tuning.guarded("scope_attention")
def run_backward(call: ScopeBackwardCall, gpu: int | str | None = None) -> tuple[Tensor, ...]:
    """(dq, dk, dv) of a checked call."""
    from vtok_fast.kernels import scope_attention as kernels

    q, k, v, scope, scale = call.q, call.k, call.v, call.scope, call.scale
    back = scope.transposed()
    results = [torch.empty_like(t) for t in (q, k, v)]
    dq, dk, dv = map(kernels.aligned, results)
    grad, out = map(kernels.aligned, (call.grad, call.out))
    shared = (*map(kernels.aligned, (q, k, v)), grad, call.lse, kernels.delta(out, grad))
    c = _config("queries", q, scope, gpu)
    kernels.queries_gradient(*shared, dq, *prepared(scope, c.block_m, q.device), scale, c)
    c = _config("keys", q, back, gpu)
    kernels.keys_gradient(*shared, dk, dv, *prepared(back, c.block_n, q.device), scale, c)
    return tuple(r if t is r else r.copy_(t) for r, t in zip(results, (dq, dk, dv)))


def _config(kernel: str, q: Tensor, scope: Scope, gpu: int | str | None) -> Any:
    """The tile of a kernel: that of the tuning table, where there is one for this class of calls."""
    from vtok_fast.kernels import scope_attention as kernels

    gpu = backends.gpu_of(q.device) if gpu is None else gpu
    built_in = kernels.config(kernel, q.shape[3], q.element_size(), gpu, is_short(scope))
    rows, segment = q.shape[0] * q.shape[1] * scope.q_len, scope.q_len // max(scope.segments, 1)
    return tuning.chosen(
        "scope_attention",
        q.device,
        built_in,
        partial(kernels.variants, kernel),
        kernel,
        q.dtype,
        f"head {q.shape[3]}",
        tuning.power_of_two(rows),
        f"segments {tuning.power_of_two(segment)}",
    )
