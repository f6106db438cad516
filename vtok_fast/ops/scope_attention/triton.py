"""``scope_attention`` on a GPU: what the Triton kernels need besides the tensors, made from a scope without
waiting for it."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok_fast.dispatch import backends, tuning
from vtok_fast.dispatch.backends import Reason
from vtok_fast.dispatch.lasting import is_recording, refuse_recording
from vtok_fast.ops.scope_attention import schedule
from vtok_fast.ops.scope_attention.call import ScopeBackwardCall, ScopeCall
from vtok_fast.ops.scope_attention.csr import CSR
from vtok_fast.ops.scope_attention.scope import Scope
from vtok_fast.ops.token_packing.packed_tokens import SCOPE, note_error

LAST = 2**31 - 1  # as the end of the keys: all of them
SHARES_BLOCKS = True  # among several programs, where one block is much longer than the others
SHORT = 32  # mean rows of a segment from which on it counts as short
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Plan(NamedTuple):
    """What the kernels need besides the tensors, on their device: ``work`` (n, 8), ``ranges`` and, where
    several programs share a block, ``merges`` (m, 4) and the number of their results; all int32, as
    `vtok_fast.kernels.scope_attention.attend` describes them."""

    work: Tensor
    ranges: Tensor
    merges: Tensor | None = None
    slots: int = 0


def work_list(scope: Scope, block: int, exact: bool) -> Tensor:
    """(n, 8) int32 on the scope's device: for each block of at most ``block`` rows, its first row, the one
    after its last, the same of its ranges, and that one program walks over all of their keys. The most work
    comes first, so that the last programs to end are short.

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
    whole = [torch.full((n,), fill, dtype=torch.int64, device=scope.device) for fill in (0, LAST, -1, 0)]
    return torch.stack((start, end, r[s], r[s + 1], *whole), 1)[order].int()


def shared_out(
    work: Tensor, scope: Scope, block_n: int, copies: int, places: int
) -> tuple[Tensor, Tensor | None, int]:
    """The work list of a scope on the host with long blocks cut into parts: (work, merges, slots)."""
    ranges = scope.safe()[0].ranges.tolist()
    items = work.tolist()
    steps = [sum(-(-(hi - lo) // block_n) for lo, hi in ranges[item[2] : item[3]]) for item in items]
    longest = schedule.longest_part(steps, copies, places)
    if longest is None:
        return work, None, 0
    found, merges, slots = [], [], 0
    for item, n in zip(items, steps):
        parts = schedule.parts_of(n, longest)
        if parts == 1:
            found.append((n, item))
            continue
        cuts = _cut(ranges, item[2], item[3], block_n, parts)
        merges.append((item[0], item[1], slots, len(cuts)))
        for i, (length, first, last, skip, stop) in enumerate(cuts):
            found.append((length, [item[0], item[1], first, last, skip, stop, slots + i, 0]))
        slots += len(cuts)
    found.sort(key=lambda pair: -pair[0])  # stable
    items = [item for _, item in found]
    return *(torch.tensor(rows, dtype=torch.int32, device="cpu") for rows in (items, merges)), slots


def _cut(ranges: list[list[int]], first: int, last: int, block_n: int, parts: int) -> list[tuple[int, ...]]:
    """(steps, first range, the one after the last, first key of the first, end of the last) of each part.
    Cuts lie between steps of ``block_n`` keys, so that no part has a ragged step more than the whole."""
    places = [
        (r, n, min(n + block_n, ranges[r][1])) for r in range(first, last) for n in range(*ranges[r], block_n)
    ]
    bounds = [len(places) * i // parts for i in range(parts + 1)]
    return [
        (b - a, places[a][0], places[b - 1][0] + 1, places[a][1], places[b - 1][2])
        for a, b in zip(bounds, bounds[1:])
    ]


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


def prepared(
    scope: Scope, block: int, device: torch.device, sharing: tuple[int, int, int] | None = None
) -> Plan:
    """The plan of a scope on the device of the tensors, cached on the scope.

    Args:
        sharing: (keys of a step, heads of all videos, programs that run at a time), where several programs
            may share a block of a scope that is or was on the host; values of others are not waited for.

    Raises RuntimeError where the plan of a scope on the host would have to be made while a CUDA graph is
    recorded.
    """

    known = scope.cache.get("origin", scope)  # of the host, if the scope came from there
    sharing = sharing if known.device.type == "cpu" and SHARES_BLOCKS else None

    def make() -> Plan:
        if scope.device.type == "cpu":
            refuse_recording(device, "the plan of a scope on the host")
        source = scope if is_recording(device) else known
        host = source.device.type == "cpu"
        work, merges, slots = work_list(source, block, exact=host), None, 0
        if sharing is not None and host:
            work, merges, slots = shared_out(work, source, *sharing)
        tensors = work, clamped(source).ranges, merges
        return Plan(*(None if t is None else t.to(device, non_blocking=True) for t in tensors), slots)

    return scope.cached(("work", block, device, sharing), make, device)


def places(device: torch.device, c: Any) -> int:
    """How many programs of this tile run at a time: registers allow eight warps on a multiprocessor."""
    return multiprocessors(device) * max(1, 8 // c.num_warps)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Those of a GPU; one where Triton's interpreter runs on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


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
    plan = prepared(scope, c.block_m, q.device, (c.block_n, q.shape[0] * q.shape[1], places(q.device, c)))
    kernels.attend(*map(kernels.aligned, (q, k, v)), target, lse, *plan, scale, c)
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
    kernels.queries_gradient(*shared, dq, *prepared(scope, c.block_m, q.device)[:2], scale, c)
    c = _config("keys", q, back, gpu)
    kernels.keys_gradient(*shared, dk, dv, *prepared(back, c.block_n, q.device)[:2], scale, c)
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
