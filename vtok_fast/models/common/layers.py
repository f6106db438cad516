"""Small layers and reshapes that several tokenizers use."""

from __future__ import annotations

import torch
from torch import Tensor


def fold_frames(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B*T, C, H, W)"""
    b, c, t, h, w = x.shape
    return x.permute(0, 2, 1, 3, 4).reshape(b * t, c, h, w)


def unfold_frames(x: Tensor, batch: int) -> Tensor:
    """(B*T, C, H, W) -> (B, C, T, H, W)"""
    return x.reshape(batch, -1, *x.shape[1:]).permute(0, 2, 1, 3, 4)


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)  # two passes, as the model ships
