"""The block-causal transformer of InfoTok, under the state-dict keys of the released model.

Tokens are (B, t*h*w, C), frame by frame. A token sees its own latent frame and those before. Rotary positions
are of rows and columns: the first half of a head's pairs turns with the row, the second with the column, at
every second frequency each. Time has a learned embedding, which is added once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_fast.models.common.transformer import apply_rotary, rotary_frequencies, rotary_table


def rotary_angles(
    rows: int, columns: int, dim: int, theta: float, device: torch.device | None = None
) -> Tensor:
    """The angles (rows*columns, dim/2) of the positions of one frame, float64."""
    frequencies = rotary_frequencies(dim, theta)
    positions = torch.cartesian_prod(
        torch.arange(rows, device=device), torch.arange(columns, device=device)
    ).reshape(-1, 2)
    return rotary_table(positions, (frequencies[0::2], frequencies[1::2]))


def block_causal_mask(frames: int, tokens_per_frame: int, device: torch.device | None = None) -> Tensor:
    """(S, S) bool, S = frames * tokens_per_frame: true where a query sees a key."""
    frame = torch.arange(frames, device=device).repeat_interleave(tokens_per_frame)
    return frame[:, None] >= frame[None, :]


class Attention(nn.Module):
    """Multi-head attention with rotary positions between two passes of the same input projection.

    The released model projects its input to q, k and v, turns q and k, and hands them to an
    `nn.MultiheadAttention` that projects all three again with the same weights. Without `twice` there is the
    first projection alone.
    """

    def __init__(self, dim: int, heads: int, *, twice: bool = True):
        super().__init__()
        self.twice = twice
        self.mha = nn.MultiheadAttention(dim, heads, batch_first=True)  # holds the parameters

    def forward(self, x: Tensor, angles: Tensor, frames: int) -> Tensor:
        """x (B, frames*n, C), angles (n, D/2) -> like x."""
        weights, biases = self.mha.in_proj_weight.chunk(3), self.mha.in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for w, b in zip(weights, biases))
        q, k = self.turn(q, angles, frames), self.turn(k, angles, frames)
        if self.twice:
            q, k, v = (F.linear(y, w, b) for y, w, b in zip((q, k, v), weights, biases))
        q, k, v = (y.unflatten(-1, (self.mha.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        return self.mha.out_proj(self.attend(q, k, v, frames).transpose(1, 2).flatten(2))

    def turn(self, x: Tensor, angles: Tensor, frames: int) -> Tensor:
        """Rotary positions, the same in every frame."""
        # (B, frames, heads, n, D)
        heads = x.unflatten(-1, (self.mha.num_heads, -1)).unflatten(1, (frames, -1)).transpose(2, 3)
        return apply_rotary(heads, angles).transpose(2, 3).flatten(3).flatten(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, frames: int) -> Tensor:
        """Block-causal attention of (B, heads, S, D) by a dense mask: S^2 bytes, 1.2 GB for 81 frames of
        240x432."""
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=block_causal_mask(frames, q.shape[2] // frames, q.device)
        )


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), without biases (arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), with RMSNorm."""

    def __init__(self, dim: int, heads: int, hidden: int, *, eps: float, twice: bool = True):
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim, eps=eps), nn.RMSNorm(dim, eps=eps)
        self.attention = Attention(dim, heads, twice=twice)
        self.mlp = SwiGLU(dim, hidden)

    def forward(self, x: Tensor, angles: Tensor, frames: int) -> Tensor:
        x = x + self.attention(self.attention_norm(x), angles, frames)
        return x + self.mlp(self.ffn_norm(x))
