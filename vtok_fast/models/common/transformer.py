"""What the transformers among the models share: rotary positions over several axes, and the pre-norm ViT
block.

Rotary positions (arXiv 2104.09864) turn consecutive pairs of a head's channels by an angle, position times
frequency. With several axes each axis turns its own pairs, as in video transformers at large.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v (B, heads, N, D) -> (B, heads, N, D)


def rotary_frequencies(dim: int, theta: float = 10000.0) -> Tensor:
    """theta^(-2i/dim) for i = 0 .. dim/2 - 1, float64."""
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def split_head(dim: int, axes: int) -> list[int]:
    """dim as `axes` even numbers, as equal as they can be, the last ones larger: 64 over (t, h, w) is 20, 22,
    22."""
    if dim % 2 or dim < 2 * axes:
        raise ValueError(
            f"dim={dim}: a head over {axes} axes needs an even number of channels, at least {2 * axes}"
        )
    pairs = dim // 2
    return [2 * ((pairs + axis) // axes) for axis in range(axes)]


def rotary_table(positions: Tensor, frequencies: Sequence[Tensor]) -> Tensor:
    """The angles (..., sum of the frequencies' lengths), float64, of positions (..., axes); each axis has its
    own frequencies."""
    positions = positions.to(torch.float64)
    return torch.cat(
        [positions[..., axis, None] * f.to(positions.device) for axis, f in enumerate(frequencies)], dim=-1
    )


def apply_rotary(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the consecutive pairs of x (..., D) by angles that broadcast to (..., D/2); in float32 (float64
    for float64)."""
    wide = x if x.dtype == torch.float64 else x.float()
    cos, sin = angles.cos().to(wide.dtype), angles.sin().to(wide.dtype)
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention of tokens (B, N, C), turned by angles (N, D/2) or (B, N, D/2); `attend` is
    what happens between the projections."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads={heads} does not divide dim={dim}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, angles: Tensor | None = None, attend: Attend = F.scaled_dot_product_attention
    ) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, N, heads, D)
        if angles is not None:
            q, k = apply_rotary(q, angles.unsqueeze(-2)), apply_rotary(k, angles.unsqueeze(-2))
        return self.proj(
            attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).flatten(2)
        )


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)) with GELU: the block of ViT (arXiv 2010.11929)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attention = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(
        self, x: Tensor, angles: Tensor | None = None, attend: Attend = F.scaled_dot_product_attention
    ) -> Tensor:
        x = x + self.attention(self.norm1(x), angles, attend)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """`depth` blocks and a final norm, on tokens (B, N, C)."""

    def __init__(self, dim: int, depth: int, heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(
        self, x: Tensor, angles: Tensor | None = None, attend: Attend = F.scaled_dot_product_attention
    ) -> Tensor:
        for block in self.blocks:
            x = block(x, angles, attend)
        return self.norm(x)


def patchify(video: Tensor, patch: Sequence[int]) -> Tensor:
    """(B, C, T, H, W) -> (B, T/pt * H/ph * W/pw, C pt ph pw): each patch as one row, patches in the order t,
    h, w."""
    b, c, t, h, w = video.shape
    pt, ph, pw = patch
    x = video.reshape(b, c, t // pt, pt, h // ph, ph, w // pw, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return x.reshape(b, -1, c * pt * ph * pw)


def unpatchify(patches: Tensor, patch: Sequence[int], size: Sequence[int]) -> Tensor:
    """The inverse of `patchify` for a video of size (T, H, W)."""
    (pt, ph, pw), (t, h, w) = patch, size
    x = patches.reshape(patches.shape[0], t // pt, h // ph, w // pw, -1, pt, ph, pw).permute(
        0, 4, 1, 5, 2, 6, 3, 7
    )
    return x.reshape(patches.shape[0], -1, t, h, w)


def cells(count: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """The centers (count, 2) of `count` equal cells, as square as can be, of rows x columns patches; in
    patches."""
    high = max(n for n in range(1, math.isqrt(count) + 1) if count % n == 0)
    return grid_centers((high, count // high), rows, columns, device)


def grid_centers(shape: tuple[int, int], rows: int, columns: int, device: torch.device) -> Tensor:
    """The centers (n, 2) of the cells of a grid over rows x columns patches, in patches: float64."""
    axes = [
        (torch.arange(n, dtype=torch.float64, device=device) + 0.5) * size / n - 0.5
        for n, size in zip(shape, (rows, columns))
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)


def look_nearby(transformer: Transformer, split: Sequence[int], axes: Sequence[int], strength: float) -> None:
    """Let attention start out as falling off with distance along these axes, whatever the tokens hold.

    Queries and keys get the same bias on the channels that turn by those axes (`split`: how many each axis
    has). Two tokens at one place then agree most, because the rotary positions turn the bias of others away.
    Without it, learned queries that know nothing of places attend evenly, a decoder gets the mean of the
    clip, and a small model stays there for a thousand steps.
    """
    ends = list(accumulate(split))
    for block in transformer.blocks:
        bias = block.attention.qkv.bias.data.unflatten(0, (3, block.attention.heads, -1))
        for axis in axes:
            bias[:2, :, ends[axis] - split[axis] : ends[axis]] = strength


def init_vit(module: nn.Module) -> None:
    """Uniform weights by the sizes of the layer (Xavier), as masked autoencoders start, and no bias.

    ViT's own deviation of 0.02 suits 768 channels; with some 100 it leaves the signal of every layer too
    small to learn from.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
