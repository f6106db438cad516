"""A scope spelled out pair by pair: how many there are, and the mask. Of tensors whose values are valid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok_fast.ops.scope_attention.csr import CSR


def count(csr: CSR) -> int:
    """How many pairs of a query and a key there are. Of tensors on the host."""
    q_offsets, range_offsets, ranges = (t.long() for t in csr)
    before = F.pad((ranges[:, 1] - ranges[:, 0]).cumsum(0), (1, 0))
    return int((q_offsets.diff() * before[range_offsets].diff()).sum())


def mask(csr: CSR, q_len: int, k_len: int) -> Tensor:
    """(q_len, k_len) bool: True where the query sees the key."""
    q_offsets, range_offsets, ranges = (t.long() for t in csr)
    device = ranges.device
    owner = torch.searchsorted(range_offsets[1:], torch.arange(len(ranges), device=device), right=True)
    edges = torch.zeros(len(q_offsets) - 1, k_len + 1, dtype=torch.int32, device=device)
    one = torch.ones_like(owner, dtype=torch.int32)
    edges.index_put_((owner, ranges[:, 0]), one, accumulate=True).index_put_(
        (owner, ranges[:, 1]), -one, accumulate=True
    )
    rows = torch.searchsorted(q_offsets[1:], torch.arange(q_len, device=device), right=True)
    return (edges.cumsum(1)[:, :-1] > 0)[rows]
