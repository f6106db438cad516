"""``scope_attention`` on a GPU: what the Triton kernels need besides the tensors, made from a scope without
waiting for it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
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

SHARES_BLOCKS = True  # among several programs, where one block is much longer than the others
SHORT = 32  # mean rows of a segment from which on it counts as short
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Plan(NamedTuple):
    """What the kernels need besides the tensors, on their device: ``work`` (n, 5), ``ranges`` and, where
    several programs share a block, ``merges`` (m, 4) and the number of their results; all int32, as
    `vtok_fast.kernels.scope_attention.attend` describes them."""

    work: Tensor
    ranges: Tensor
    merges: Tensor | None = None
    slots: int = 0


def work_list(scope: Scope, block: int, exact: bool) -> Tensor:
    """(n, 5) int32 on the scope's device: for each block of at most ``block`` rows, its first row, the one
    after its last, the same of its ranges, and that one program walks over all of them. The most work comes
    first, so that the last programs to end are short.

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
    return torch.stack((start, end, r[s], r[s + 1], torch.full_like(start, -1)), 1)[order].int()


def shared_out(work: Tensor, scope: Scope, step: int, rest: int, copies: int, places: int) -> Plan:
    """The plan of a scope on the host whose long blocks are cut into parts, each with ranges of its own.
    ``work`` is that of whole blocks; the others are as in `Sharing`."""
    ranges = scope.safe()[0].ranges.tolist()
    items = work.tolist()
    each = [schedule.steps_over(hi - lo, step, rest) for lo, hi in ranges]
    steps = tuple(sum(each[item[2] : item[3]]) for item in items)
    longest = schedule.longest_part(steps, copies, places)
    if longest is None:
        return Plan(work, scope.safe()[0].ranges)
    found, merges, slots = [], [], 0
    for item, n in zip(items, steps):
        parts = schedule.parts_of(n, longest)
        if parts == 1:
            found.append((n, item))
            continue
        cuts = _cut(ranges[item[2] : item[3]], step, parts)
        merges.append((item[0], item[1], slots, len(cuts)))
        for slot, (length, part) in enumerate(cuts, slots):
            found.append((length, [*item[:2], len(ranges), len(ranges) + len(part), slot]))
            ranges += part
        slots += len(cuts)
    found.sort(key=lambda pair: -pair[0])  # stable
    items = [item for _, item in found]
    as_tensor = functools.partial(torch.tensor, dtype=torch.int32, device="cpu")
    return Plan(as_tensor(items), as_tensor(ranges), as_tensor(merges), slots)


def _cut(ranges: list[list[int]], step: int, parts: int) -> list[tuple[int, list[list[int]]]]:
    """(steps, ranges) of each part. Cuts lie between steps of so many keys, so that no part has a ragged step
    more than the whole."""
    steps = [(i, n, min(n + step, hi)) for i, (lo, hi) in enumerate(ranges) for n in range(lo, hi, step)]
    bounds = [len(steps) * i // parts for i in range(parts + 1)]
    return [
        (b - a, [[run[0][1], run[-1][2]] for _, run in _runs(steps[a:b])]) for a, b in zip(bounds, bounds[1:])
    ]


def _runs(steps: list[tuple[int, int, int]]) -> Iterator[tuple[int, list[tuple[int, int, int]]]]:
    """The steps of each range."""
    return ((i, list(run)) for i, run in itertools.groupby(steps, key=lambda one: one[0]))


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


class Sharing(NamedTuple):
    """What decides whether several programs share a block: how many rows they walk over in a step, and in one
    over what whole steps leave of a range; how many programs each block has in any case; and how many
    programs run at a time."""

    step: int
    rest: int
    copies: int
    places: int


def sharing_of(x: Tensor, step: int, rest: int, c: Any) -> Sharing:
    """For results of the shape of ``x``, (B, heads, rows, D), made with a tile of the kernels."""
    b, h, _, dim = x.shape
    return Sharing(step, rest, b * h * max(dim // c.block_d, 1), places(x.device, c))


def prepared(scope: Scope, block: int, device: torch.device, sharing: Sharing | None = None) -> Plan:
    """The plan of a scope on the device of the tensors, cached on the scope.

    Args:
        sharing: where several programs may share a block of a scope that is or was on the host; values of
            others are not waited for.

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
        plan = Plan(work_list(source, block, exact=host), clamped(source).ranges)
        if sharing is not None and host:
            plan = shared_out(plan.work, source, *sharing)
        move = functools.partial(Tensor.to, device=device, non_blocking=True)
        merges = None if plan.merges is None else move(plan.merges)
        return Plan(move(plan.work), move(plan.ranges), merges, plan.slots)

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
    plan = prepared(scope, c.block_m, q.device, sharing_of(q, c.block_n, kernels.rest(c), c))
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
    plan = prepared(scope, c.block_m, q.device, sharing_of(q, c.block_n, c.block_n, c))
    kernels.queries_gradient(*shared, dq, *plan, scale, c)
    c = _config("keys", q, back, gpu)
    plan = prepared(back, c.block_n, q.device, sharing_of(k, c.block_m, c.block_m, c))
    kernels.keys_gradient(*shared, dk, dv, *plan, scale, c)
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
