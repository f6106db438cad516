"""Scopes for tests: any that hypothesis can think of, and their masks written out one range at a time."""

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
