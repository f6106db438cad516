"""What ``scope_attention`` means, in plain PyTorch: softmax attention under a mask, its log-sum-exp, and its
gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def scope_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``softmax(q k^T scale) v`` over the keys that the mask leaves, and the log-sum-exp of the scores.

    Computed in float32 (float64 for a float64 ``q``) and rounded once. A query that sees nothing gives zeros,
    and minus infinity.

    Args:
        q: (B, heads, Sq, D).
        k, v: (B, heads / n, Sk, D); n neighbouring heads of queries share one of keys.
        mask: (Sq, Sk) bool, True where the query sees the key.
        scale: multiplies the scores.

    Returns:
        (B, heads, Sq, D) in the dtype of ``q``, and (B, heads, Sq) in float32 or float64.
    """
    q64, k64, v64 = _wide(q, k, v)
    scores = (q64 @ k64.transpose(-1, -2) * scale).masked_fill(~mask, torch.finfo(q64.dtype).min)
    seen = mask.any(-1)
    # A row without keys is uniform after the softmax, and zero after the mask, with gradients of zero.
    out = (scores.softmax(-1) * mask) @ v64
    return out.to(q.dtype), torch.where(seen, scores.logsumexp(-1), -torch.inf)


def scope_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for (q, k, v). With P = exp(scores - lse): dV = P^T dO, dS = P (dO V^T - sum(dO O)), dQ = dS
    K, dK = dS^T Q (FlashAttention, arXiv 2205.14135, appendix B.2)."""
    q64, k64, v64 = _wide(q, k, v)
    grad, out = grad.to(q64.dtype), out.to(q64.dtype)
    scores = q64 @ k64.transpose(-1, -2) * scale
    p = torch.where(mask, (scores - lse[..., None]).masked_fill(~mask, 0).exp(), 0)
    ds = p * (grad @ v64.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True)) * scale
    shared = (k.shape[0], k.shape[1], -1, *k.shape[2:])
    dk, dv = ((t.transpose(-1, -2) @ x).reshape(shared).sum(2) for t, x in ((ds, q64), (p, grad)))
    return (ds @ k64).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _wide(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In the type of the arithmetic, with one head of keys per head of queries."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // max(k.shape[1], 1)
    return q.to(wide), k.to(wide).repeat_interleave(group, 1), v.to(wide).repeat_interleave(group, 1)
