"""What ``scope_attention`` means, in plain PyTorch: softmax attention under a mask, its log-sum-exp, and its
gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def scope_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``softmax(q k^T scale) v`` over the keys that the mask leaves, and the log-sum-exp of the scores.

    Computed in float32 (float64 for a float64 ``q``) and rounded once. A query that sees nothing gives zeros,
    and minus infinity.

    Args:
        q: (B, heads, Sq, D).
        k, v: (B, heads / n, Sk, D); n neighboring heads of queries share one of keys.
        mask: (Sq, Sk) bool, True where the query sees the key.
        scale: multiplies the scores.

    Returns:
        (B, heads, Sq, D) in the dtype of ``q``, and (B, heads, Sq) in float32 or float64.
    """
    wide_q, wide_k, wide_v = _wide(q, k, v)
    out, lse = torch.zeros_like(wide_q), torch.full_like(wide_q[..., 0], -torch.inf)
    for rows, keys in _groups(mask):
        scores = wide_q[:, :, rows] @ wide_k[:, :, keys].transpose(-1, -2) * scale
        out = out.index_copy(2, rows, scores.softmax(-1) @ wide_v[:, :, keys])
        lse = lse.index_copy(2, rows, scores.logsumexp(-1))
    return out.to(q.dtype), lse


def scope_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for (q, k, v). With P = exp(scores - lse): dV = P^T dO, dS = P (dO V^T - sum(dO O)), dQ = dS
    K, dK = dS^T Q (FlashAttention, arXiv 2205.14135, appendix B.2)."""
    wide_q, wide_k, wide_v = _wide(q, k, v)
    dq, dk, dv = map(torch.zeros_like, (wide_q, wide_k, wide_v))
    for rows, keys in _groups(mask):
        query, key, value = wide_q[:, :, rows], wide_k[:, :, keys], wide_v[:, :, keys]
        grad_rows, out_rows = (t[:, :, rows].to(wide_q.dtype) for t in (grad, out))
        p = (query @ key.transpose(-1, -2) * scale - lse[:, :, rows, None]).exp()
        along = (grad_rows * out_rows).sum(-1, keepdim=True)
        ds = p * (grad_rows @ value.transpose(-1, -2) - along) * scale
        dq = dq.index_copy(2, rows, ds @ key)
        dk = dk.index_add(2, keys, ds.transpose(-1, -2) @ query)
        dv = dv.index_add(2, keys, p.transpose(-1, -2) @ grad_rows)
    shared = (k.shape[0], k.shape[1], -1, *k.shape[2:])
    dk, dv = (t.reshape(shared).sum(2) for t in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _groups(mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The queries that see the same keys, and those keys. A pair that the mask leaves out is never computed,
    so a NaN there reaches nothing; multiplied by zero it would."""
    patterns, which = mask.unique(dim=0, return_inverse=True)
    for i, pattern in enumerate(patterns):
        if pattern.any():
            yield (which == i).nonzero().flatten(), pattern.nonzero().flatten()


def _wide(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In the type of the arithmetic, with one head of keys per head of queries."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // max(k.shape[1], 1)
    return q.to(wide), k.to(wide).repeat_interleave(group, 1), v.to(wide).repeat_interleave(group, 1)
