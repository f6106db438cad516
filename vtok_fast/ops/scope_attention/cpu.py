"""``scope_attention`` on a CPU: dense calls of PyTorch's own flash attention over views, and no mask.

A scope becomes a list of rectangles of queries and keys. Neighboring segments that see the same range make
one rectangle; rectangles of one shape at equal distances make one batched call on strided views, so that
nothing is copied. Where a query has several rectangles, their results are merged by their log-sum-exp, or its
keys are gathered first if that moves fewer bytes. The backward pass needs no merge: given the final
log-sum-exp and output, the gradients of the rectangles add up (FlashAttention, arXiv 2205.14135, appendix B).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vtok_fast.dispatch.backends import Reason
from vtok_fast.ops.scope_attention.call import ScopeBackwardCall, ScopeCall, like
from vtok_fast.ops.scope_attention.scope import Scope

# When a small scope is attended to densely under a mask: what a call costs, and the speed of one that is not
# small.
SECONDS_PER_CALL = 3e-5
FLOPS_PER_SECOND = 3e10
LARGEST_MASK = 1 << 22

BLOCK = 256  # rows that PyTorch's kernel gives to a thread at a time, where there are thrice as many

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Rectangles(NamedTuple):
    """``count`` rectangles of ``rows`` queries and ``keys`` keys, each a step after the one before. With
    ``index`` (count * keys) the keys are gathered."""

    q_start: int
    rows: int
    q_step: int
    k_start: int
    keys: int
    k_step: int
    count: int  # type: ignore[assignment]  # tuples have methods of these names, which nobody calls here
    index: Tensor | None = None  # type: ignore[assignment]


class Plan(NamedTuple):
    """``layers[i]`` covers each query at most once; ``unseeing`` are the row intervals that no layer covers.
    The first rectangle of the first layer may be computed for ``all_rows``, because its result then serves as
    the output."""

    layers: list[list[Rectangles]]
    unseeing: list[tuple[int, int]]
    all_rows: bool
    calls: int


# ---- planning ----------------------------------------------------------------------------------------------


def plan(scope: Scope) -> Plan:
    """The calls for a scope, cached on it."""
    return scope.cached("cpu plan", lambda: _plan(scope))


def _plan(scope: Scope) -> Plan:
    q, r, ranges = (t.tolist() for t in scope.csr)
    layers: list[list[tuple[int, int, int, int]]] = []
    gathered: dict[tuple[int, int], list[tuple[int, list[tuple[int, int]]]]] = {}
    unseeing: list[tuple[int, int]] = []
    for s, (start, end) in enumerate(zip(q, q[1:])):
        seen = [(lo, hi) for lo, hi in ranges[r[s] : r[s + 1]] if lo < hi]
        keys = sum(hi - lo for lo, hi in seen)
        if start == end:
            continue
        if not seen:
            unseeing.append((start, end))
        # Rows moved: keys and values in and out, or a merge of two results
        elif 4 * keys < 3 * (end - start) * (len(seen) - 1):
            gathered.setdefault((end - start, keys), []).append((start, seen))
        else:
            for depth, (lo, hi) in enumerate(seen):
                if depth == len(layers):
                    layers.append([])
                last = layers[depth][-1] if layers[depth] else None
                if last and last[1:] == (start, lo, hi):
                    layers[depth][-1] = (last[0], end, lo, hi)
                else:
                    layers[depth].append((start, end, lo, hi))
    steps = [list(_batched(layer)) for layer in layers] or [[]]
    for (rows, keys), members in gathered.items():
        for first, step, count in _progressions([(start, i) for i, (start, _) in enumerate(members)], rows):
            picked = members[first[1] : first[1] + count]
            index = torch.cat([torch.arange(lo, hi) for _, seen in picked for lo, hi in seen])
            steps[0].append(Rectangles(first[0], rows, step[0], 0, keys, keys, count, index))
    steps[0].sort(key=lambda c: -c.rows * c.count)
    base = steps[0][0] if steps[0] else None
    all_rows = base is not None and base.count == 1 and base.index is None and base.rows >= 0.9 * scope.q_len
    return Plan(steps, unseeing, all_rows, sum(map(len, steps)))


def _batched(layer: list[tuple[int, int, int, int]]) -> Iterator[Rectangles]:
    shapes: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for start, end, lo, hi in layer:
        shapes.setdefault((end - start, hi - lo), []).append((start, lo))
    for (rows, keys), corners in shapes.items():
        for (q_start, k_start), (q_step, k_step), count in _progressions(corners, rows):
            yield Rectangles(q_start, rows, q_step, k_start, keys, k_step, count)


def _progressions(
    corners: list[tuple[int, int]], rows: int
) -> Iterator[tuple[tuple[int, int], tuple[int, int], int]]:
    """Cuts a list of corners into runs at equal distances that never go back: (first, step, count)."""
    i = 0
    while i < len(corners):
        first, count, step = corners[i], 1, (rows, 0)
        if i + 1 < len(corners) and corners[i + 1][1] >= first[1]:
            step = (corners[i + 1][0] - first[0], corners[i + 1][1] - first[1])
            while i + count < len(corners) and corners[i + count] == (
                first[0] + count * step[0],
                first[1] + count * step[1],
            ):
                count += 1
        yield first, step, count
        i += count


# ---- views -------------------------------------------------------------------------------------------------


def _windows(x: Tensor, start: int, length: int, step: int, count: int) -> Tensor:
    """``count`` windows of dimension 2, each ``step`` after the one before: (B, count, heads, length, ...), a
    view."""
    size, stride = x.shape, x.stride()
    return x.as_strided(
        (size[0], count, size[1], length, *size[3:]),
        (stride[0], step * stride[2], stride[1], *stride[2:]),
        x.storage_offset() + start * stride[2],
    )


def _views(
    c: Rectangles, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...]
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """The rectangles' parts of tensors along the queries and of tensors along the keys, (n, heads, length,
    ...) with n as large as views can be: all of them for one video, else those of one video or of one
    rectangle for all videos."""
    queries = tuple(_windows(x, c.q_start, c.rows, c.q_step, c.count) for x in queries)
    keys = tuple(_windows(x, c.k_start, c.keys, c.k_step, c.count) for x in keys)
    axis = 0 if queries[0].shape[0] <= c.count else 1
    for i in range(queries[0].shape[axis]):
        yield tuple(x.select(axis, i) for x in queries), tuple(x.select(axis, i) for x in keys)


def _shared(c: Rectangles, units: int, backward: bool = False) -> Rectangles:
    """One rectangle as one per thread, of fewer rows, where that ends sooner. ``units``: videos times heads.

    PyTorch's kernel hands out blocks of rows, and its gradient whole heads: seven blocks of one head keep the
    second of two threads waiting for the first, and one head leaves it nothing at all.
    """
    threads = torch.get_num_threads()
    rows, rest = divmod(c.rows, threads)
    if c.count > 1 or c.index is not None or rest or (rows < 3 * BLOCK and not backward):
        return c
    if backward:
        busiest, fair = -(-units // threads) * c.rows, units * rows
    else:
        busiest, fair = -(-units * -(-c.rows // BLOCK) // threads) * BLOCK, units * rows
    return c._replace(rows=rows, q_step=rows, k_step=0, count=threads) if busiest > 1.1 * fair else c


# ---- attention ---------------------------------------------------------------------------------------------


def why_not(call: ScopeCall | ScopeBackwardCall) -> Reason:
    """The reason why PyTorch's CPU kernels cannot run a checked call, or None."""
    return None if call.q.device.type == "cpu" else f"the tensors are on {call.q.device}"


def _rows_contiguous(*tensors: Tensor) -> list[Tensor]:
    """PyTorch's kernels take the last dimension to be contiguous, and do not check it."""
    return [t if t.stride(3) == 1 else t.contiguous() for t in tensors]


def run(call: ScopeCall) -> tuple[Tensor, Tensor]:
    """(out, lse) of a checked call."""
    q, k, v = _rows_contiguous(call.q, call.k, call.v)
    shared = _copies_per_head(q, k)
    if shared > 1:
        k, v = (t.repeat_interleave(shared, 1) for t in (k, v))
    out, lse = _forward(q, k, v, call.scope, call.scale)
    return like(call.q, out), lse


def run_backward(call: ScopeBackwardCall) -> tuple[Tensor, ...]:
    """(dq, dk, dv) of a checked call."""
    grad, q, k, v, out = _rows_contiguous(call.grad, call.q, call.k, call.v, call.out)
    shared = _copies_per_head(q, k)
    if shared > 1:
        k, v = (t.repeat_interleave(shared, 1) for t in (k, v))
        # The copies' gradients add up in this type.
        grad, q, k, v, out = (t.to(call.lse.dtype) for t in (grad, q, k, v, out))
    dq, dk, dv = _backward(grad, q, k, v, out, call.lse, call.scope, call.scale)
    if shared > 1:
        dk, dv = (t.unflatten(1, (-1, shared)).sum(2) for t in (dk, dv))
    return tuple(like(x, g.to(x.dtype)) for x, g in zip((call.q, call.k, call.v), (dq, dk, dv)))


def _copies_per_head(q: Tensor, k: Tensor) -> int:
    """How many copies of each head of keys PyTorch's kernels need: one where heads may share it."""
    return 1 if _shares_heads() else q.shape[1] // max(k.shape[1], 1)


def _dense_mask(q: Tensor, scope: Scope, steps: Plan) -> Tensor | None:
    """The mask to add where a scope is so small that one call under a mask beats the calls of its plan."""
    if steps.calls <= 1 or scope.q_len * scope.k_len > LARGEST_MASK:
        return None
    wasted = 4 * q.shape[0] * q.shape[1] * q.shape[3] * (scope.q_len * scope.k_len - scope.pairs())
    if wasted / FLOPS_PER_SECOND > SECONDS_PER_CALL * (steps.calls - 1):
        return None

    def make() -> Tensor:
        mask = scope.mask()
        mask |= ~mask.any(1, keepdim=True)  # a row without keys would be NaN; it is set to zero in the end
        return torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)

    return scope.cached(("cpu mask", q.dtype), make)


def _is_finite(*results: Tensor) -> bool:
    """Whether results under a mask stand. A mask multiplies what a query does not see by zero, which is NaN
    where keys or values are not finite; the plan's calls never touch them."""
    wide = torch.float64 if results[0].dtype == torch.float64 else torch.float32
    return all(math.isfinite(t.sum(dtype=wide)) for t in results)


def _forward(q: Tensor, k: Tensor, v: Tensor, scope: Scope, scale: float) -> tuple[Tensor, Tensor]:
    steps = plan(scope)
    if (mask := _dense_mask(q, scope, steps)) is not None:
        out, lse = _flash(q, k, v, attn_mask=mask, scale=scale)
        if _is_finite(out):
            return _without_unseeing(out, lse, steps)
    if steps.all_rows:
        base = steps.layers[0][0]
        out, lse = _flash(q, *(t[:, :, base.k_start : base.k_start + base.keys] for t in (k, v)), scale=scale)
    else:
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    for depth, layer in enumerate(steps.layers):
        for c in layer[depth == 0 and steps.all_rows :]:
            c = _shared(c, q.shape[0] * q.shape[1])
            for (q_, out_, lse_), (k_, v_) in _views(c, (q, out, lse), _gathered(c, k, v)):
                o, l = _flash(q_, k_, v_, scale=scale)
                if depth == 0:
                    out_.copy_(o)
                    lse_.copy_(l)
                else:
                    _merge(out_, lse_, o, l)
    return _without_unseeing(out, lse, steps)


def _without_unseeing(out: Tensor, lse: Tensor, steps: Plan) -> tuple[Tensor, Tensor]:
    """The results, with zeros and minus infinity for the queries that see nothing."""
    for start, end in steps.unseeing:
        out[:, :, start:end] = 0
        lse[:, :, start:end] = -torch.inf
    return out, lse.contiguous()


def _merge(out: Tensor, lse: Tensor, o: Tensor, l: Tensor) -> None:
    """Adds the attention ``o`` to other keys of the same queries to ``out``."""
    weight = torch.sigmoid(l - lse).unsqueeze(-1)
    if out.dtype == o.dtype == weight.dtype:
        out.lerp_(o, weight)
    else:
        out.copy_(torch.lerp(out.to(weight.dtype), o.to(weight.dtype), weight))
    torch.logaddexp(lse, l, out=lse)


def _gathered(c: Rectangles, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors if c.index is None else tuple(t.index_select(2, c.index) for t in tensors)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scope: Scope, scale: float
) -> tuple[Tensor, ...]:
    steps = plan(scope)
    if (mask := _dense_mask(q, scope, steps)) is not None:
        empty = lse == -torch.inf
        heeded, bounded = grad.masked_fill(empty.unsqueeze(-1), 0), lse.masked_fill(empty, 0)
        found = _flash_backward(heeded, q, k, v, out, bounded, 0.0, False, attn_mask=mask, scale=scale)
        if _is_finite(*found):
            return found
    wide = lse.dtype  # partial gradients add up in it
    dq, dk, dv = (torch.zeros_like(t, dtype=wide) for t in (q, k, v))
    for c in (c for layer in steps.layers for c in layer):
        c = _shared(c, q.shape[0] * q.shape[1], backward=True)
        k_, v_ = _gathered(c, k, v)
        dk_, dv_ = (dk, dv) if c.index is None else (torch.zeros_like(t, dtype=wide) for t in (k_, v_))
        for (grad_i, q_i, out_i, lse_i, dq_i), (k_i, v_i, dk_i, dv_i) in _views(
            c, (grad, q, out, lse, dq), (k_, v_, dk_, dv_)
        ):
            a, b, g = _flash_backward(grad_i, q_i, k_i, v_i, out_i, lse_i, 0.0, False, scale=scale)
            dq_i.add_(a)
            if c.count == 1 or c.k_step >= c.keys or q.shape[0] > c.count:
                dk_i.add_(b)
                dv_i.add_(g)
            else:  # the windows overlap
                for j in range(c.count):
                    dk_i[j].add_(b[j])
                    dv_i[j].add_(g[j])
        if c.index is not None:
            dk.index_add_(2, c.index, dk_)
            dv.index_add_(2, c.index, dv_)
    return tuple(t.to(q.dtype) for t in (dq, dk, dv))


def _shares_heads() -> bool:
    """Whether this PyTorch's kernels take fewer heads of keys than of queries. Not a thing to try out: the
    backward kernel of torch 2.6 writes beyond its gradients."""
    major, minor = (int(number) for number in torch.__version__.split(".")[:2])
    return (major, minor) >= (2, 13)  # the oldest that the tests have seen do it
