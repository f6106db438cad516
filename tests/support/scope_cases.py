"""Scopes for tests: any that hypothesis can think of, their masks written out one range at a time, and what
rounding can do to attention under them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from vtok_fast.ops.scope_attention.scope import Scope


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


@st.composite
def scopes(draw, longest=40):
    """Any scope: empty segments, empty and touching ranges, queries that see nothing."""
    q_len, k_len = draw(st.integers(0, longest)), draw(st.integers(0, longest))
    cuts = [0, *sorted(draw(st.lists(st.integers(0, q_len), max_size=6))), q_len]
    offsets, ranges = [0], []
    for _ in cuts[1:]:
        ends = sorted(draw(st.lists(st.integers(0, k_len), max_size=6)))
        ranges += [(lo, hi) for lo, hi in zip(ends[::2], ends[1::2])]
        offsets.append(len(ranges))
    return Scope(ints(*cuts), ints(*offsets), ints(*sum(ranges, ())).reshape(-1, 2), q_len, k_len)


def by_hand(scope):
    """The mask, one range at a time."""
    mask = torch.zeros(scope.q_len, scope.k_len, dtype=torch.bool)
    q, r, ranges = (t.tolist() for t in scope.csr)
    for s in range(scope.segments):
        for lo, hi in ranges[r[s] : r[s + 1]]:
            mask[q[s] : q[s + 1], lo:hi] = True
    return mask


def rounding(q, k, v, grad, mask, scale, dtype):
    """How far rounding alone can take each element of (out, dq, dk, dv) from its exact value, to first
    order, in an attention that sums in float32 and rounds to ``dtype`` both factors of every second product,
    ``out`` before the gradients read it, and each result.

    What is exactly zero need not come out as zero. A query that sees one key has P = 1 and out = v, so that
    its dS = P (dO v - dO out) is the difference of two equal sums, each rounded by itself: as large as the
    rounding of |dO| |v|, however small the gradient.

    Args:
        q, grad: (B, heads, Sq, D) in float64.
        k, v: (B, heads / n, Sk, D) in float64.
        mask: (Sq, Sk) bool, True where the query sees the key.
        scale: multiplies the scores.
        dtype: of the tensors; float32, or narrower.
    """
    group, (q_len, k_len), dim = q.shape[1] // k.shape[1], mask.shape, q.shape[-1]
    shared = (*k.shape[:2], group, *k.shape[2:])
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    unit, narrow = 2.0**-24, torch.finfo(dtype).eps / 2
    least = (
        torch.finfo(dtype).smallest_normal * narrow
    )  # what rounding does to a number below the normal ones
    seen = mask.any(1)[:, None]
    scores = (q @ k.mT * scale).masked_fill(~mask & seen, -torch.inf)
    p = scores.softmax(-1) * mask

    # Of the scores: a sum of D products, the scales, and the exponent's argument. It moves p by its size, in
    # the numerator and in the denominator, which is a sum over the keys.
    sizes = (q.abs() @ k.abs().mT * scale * mask).amax(-1, keepdim=True)
    of_p = 2 * (dim + 4) * unit * sizes + (k_len + 8) * unit
    per_key = p.mT @ grad.abs()
    out = (of_p + 2 * narrow + (k_len + 2) * unit) * (p @ v.abs()) + least * (mask.double() @ v.abs() + 1)
    dv = p.mT @ (of_p * grad.abs()) + (2 * narrow + (q_len + 2) * unit) * per_key
    dv = dv + least * (mask.double().mT @ grad.abs() + 1)

    # Of dS: its two sums over D, the second one of a rounded out; p; and itself.
    delta = (grad * (p @ v)).sum(-1, keepdim=True)
    ds = p * (grad @ v.mT - delta) * scale
    two_sums = grad.abs() @ v.abs().mT + (grad.abs() * (p @ v.abs())).sum(-1, keepdim=True)
    of_sums = (dim + 2) * unit * two_sums + (grad.abs() * out).sum(-1, keepdim=True)
    of_ds = p * scale * of_sums + (of_p + narrow) * ds.abs()
    of_ds = of_ds + least * mask
    dq = of_ds @ k.abs() + (narrow + (k_len + 2) * unit) * (ds.abs() @ k.abs()) + least
    dk = of_ds.mT @ q.abs() + (narrow + (q_len + 2) * unit) * (ds.abs().mT @ q.abs()) + least
    return out, dq, *(x.reshape(shared).sum(2) for x in (dk, dv))
