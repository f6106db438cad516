"""Which queries see each key, from which keys each query sees. Of tensors whose values are valid."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vtok_fast.ops.scope_attention.csr import CSR


def on_host(csr: CSR, k_len: int) -> CSR:
    """Cuts the keys wherever a range begins or ends; each piece is seen by whole segments, neighbors among
    them joined."""
    q, r, ranges = (t.long() for t in csr)
    segments = len(q) - 1
    segment = torch.repeat_interleave(torch.arange(segments), r.diff())
    kept = (ranges[:, 0] < ranges[:, 1]) & (q.diff()[segment] > 0)
    segment, ranges = segment[kept], ranges[kept]
    cuts = torch.cat((torch.tensor([0, k_len]), ranges.flatten())).unique()
    if len(cuts) < 2:
        cuts = torch.tensor([0, k_len])
    first, last = torch.searchsorted(cuts, ranges).unbind(1)
    count = last - first
    owner = torch.repeat_interleave(segment, count)
    piece = torch.arange(len(owner)) + torch.repeat_interleave(first - count.cumsum(0) + count, count)
    order = (piece * segments + owner).argsort()
    piece, owner = piece[order], owner[order]
    starts, ends = q[owner], q[owner + 1]
    apart = (piece[1:] != piece[:-1]) | (ends[:-1] != starts[1:])
    border = torch.ones(min(len(piece), 1), dtype=torch.bool)
    is_first, is_last = torch.cat((border, apart)), torch.cat((apart, border))
    offsets = torch.searchsorted(piece[is_first], torch.arange(len(cuts)))
    return CSR(cuts.int(), offsets.int(), torch.stack((starts[is_first], ends[is_last]), 1).int())


def on_device(csr: CSR, k_len: int) -> CSR:
    """The same without waiting for a value: sizes are upper bounds, and what is too much is empty pieces at
    the end."""
    q, r, ranges = (t.long() for t in csr)
    segments, device = len(q) - 1, q.device
    if 2 * len(ranges) * segments > 1 << 24:
        raise ValueError(
            f"scope: {len(ranges)} ranges in {segments} segments on {device} are too many to transpose "
            f"there; build "
            "the scope on the host, with Scope.packed or with Scope.cat of such"
        )
    cuts = F.pad(F.pad(ranges.flatten().sort().values, (1, 0)), (0, 1), value=k_len)
    owner = torch.searchsorted(r[1:], torch.arange(len(ranges), device=device), right=True)
    first, last = torch.searchsorted(cuts, ranges).unbind(1)
    edges = torch.zeros(len(cuts), segments, dtype=torch.int32, device=device)
    one = torch.ones_like(owner, dtype=torch.int32)
    edges.index_put_((first, owner), one, accumulate=True).index_put_((last, owner), -one, accumulate=True)
    sees = (edges.cumsum(0)[:-1] > 0) & (cuts[1:] > cuts[:-1])[:, None]
    begins = sees & ~F.pad(sees, (1, 0))[:, :-1]
    stops = sees & ~F.pad(sees, (0, 1))[:, 1:]
    # The i-th run that begins is the i-th that stops. One more place takes everything that is not a run.
    bound = sees.shape[0] * ((segments + 1) // 2)
    found = torch.zeros(bound + 1, 2, dtype=torch.int64, device=device)
    for column, (where, values) in enumerate(((begins, q[:-1]), (stops, q[1:]))):
        place = torch.where(where.flatten(), where.flatten().cumsum(0) - 1, bound)
        found[:, column].scatter_(0, place, values.expand_as(sees).flatten())
    offsets = F.pad(begins.sum(1).cumsum(0), (1, 0))
    return CSR(cuts.int(), offsets.int(), found[:-1].int())
