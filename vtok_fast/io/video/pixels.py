"""Bytes and floats."""

from __future__ import annotations

import torch
from torch import Tensor


def to_float(video: Tensor) -> Tensor:
    """uint8 values to float32 in [-1, 1]."""
    return video.float().div_(127.5).sub_(1.0)


def to_uint8(video: Tensor) -> Tensor:
    """Values in [-1, 1] (others are clamped; NaN becomes black) to the nearest uint8."""
    return video.float().nan_to_num(-1.0).add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
