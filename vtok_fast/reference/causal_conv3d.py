"""What ``causal_conv3d`` means: upsample, pad, convolve, activate, blend, rearrange, each as its own step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def source_index(size: int, front: int, back: int, mode: str) -> Tensor:
    """Where each element of a padded axis of ``size`` elements is read; -1 stands for a zero."""
    i = torch.arange(-front, size + back, device="cpu")
    if mode == "replicate":
        return i.clamp(0, size - 1)
    if mode == "reflect":
        i = i.abs()
        return torch.where(i >= size, 2 * (size - 1) - i, i)
    return torch.where((i < 0) | (i >= size), -1, i)


def pad_axis(x: Tensor, axis: int, front: int, back: int, mode: str) -> Tensor:
    """Pads one axis with zeros, the edge element or a reflection that does not repeat the edge."""
    if front == back == 0:
        return x
    if mode == "zeros":
        shape = list(x.shape)
        shape[axis] = front
        parts = [x.new_zeros(shape)] if front else []
        shape[axis] = back
        return torch.cat([*parts, x, *([x.new_zeros(shape)] if back else [])], axis)
    return x.index_select(axis, source_index(x.shape[axis], front, back, mode).to(x.device))


def upsample_nearest(x: Tensor, factors: tuple[int, int, int], first_frame_once: bool = False) -> Tensor:
    """Repeats frames, rows and columns. ``first_frame_once`` keeps the first frame single: T becomes 1 +
    (T-1)*factor."""
    for axis, factor in zip((2, 3, 4), factors):
        if factor > 1:
            x = x.repeat_interleave(factor, axis)
    return x[:, :, factors[0] - 1 :] if first_frame_once else x


def padded_input(
    x: Tensor,
    *,
    time_pad: tuple[int, int],
    spatial_pad: tuple[tuple[int, int], tuple[int, int]],
    time_mode: str = "zeros",
    spatial_mode: str = "zeros",
    cache: Tensor | None = None,
    upsample: tuple[int, int, int] = (1, 1, 1),
    upsample_first_frame_once: bool = False,
) -> Tensor:
    """The input that a valid (unpadded) convolution then sees."""
    front, back = time_pad
    x = upsample_nearest(x, upsample, upsample_first_frame_once and cache is None)
    if cache is not None:
        cache = upsample_nearest(cache, upsample)
        used = min(front, cache.shape[2])
        x = torch.cat([cache[:, :, cache.shape[2] - used :], x], 2)
        front -= used
    x = pad_axis(x, 2, front, back, time_mode)
    for axis, (before, behind) in zip((3, 4), spatial_pad):
        x = pad_axis(x, axis, before, behind, spatial_mode)
    return x


def depth_to_space_3d(x: Tensor, factors: tuple[int, int, int]) -> Tensor:
    """Channels (C rt rh rw), the first slowest, become positions: (B, C*rt*rh*rw, T, H, W) to (B, C, T*rt,
    H*rh, W*rw)."""
    if factors == (1, 1, 1):
        return x
    b, c, t, h, w = x.shape
    rt, rh, rw = factors
    x = x.reshape(b, c // (rt * rh * rw), rt, rh, rw, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(b, c // (rt * rh * rw), t * rt, h * rh, w * rw)


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, int, int] = (1, 1, 1),
    dilation: tuple[int, int, int] = (1, 1, 1),
    groups: int = 1,
    time_pad: tuple[int, int],
    spatial_pad: tuple[tuple[int, int], tuple[int, int]],
    time_mode: str = "zeros",
    spatial_mode: str = "zeros",
    cache: Tensor | None = None,
    residual: Tensor | None = None,
    alpha: float | Tensor | None = None,
    activation: str | None = None,
    upsample: tuple[int, int, int] = (1, 1, 1),
    upsample_first_frame_once: bool = False,
    depth_to_space: tuple[int, int, int] = (1, 1, 1),
) -> Tensor:
    """The definition that every backend is compared with. Arguments as `vtok_fast.causal_conv3d`, all
    explicit."""
    (top, bottom), (left, right) = spatial_pad
    inside = (0, 0)
    if spatial_mode == "zeros" and top == bottom and left == right:
        # The convolution pads these itself, without a copy
        inside, spatial_pad = (
            (top, left),
            ((0, 0), (0, 0)),
        )
    padded = padded_input(
        x,
        time_pad=time_pad,
        spatial_pad=spatial_pad,
        time_mode=time_mode,
        spatial_mode=spatial_mode,
        cache=cache,
        upsample=upsample,
        upsample_first_frame_once=upsample_first_frame_once,
    )
    y = F.conv3d(padded, weight, bias, stride, (0, *inside), dilation, groups)
    if activation == "silu":
        y = F.silu(y)
    y = depth_to_space_3d(y, depth_to_space)
    if residual is not None:
        if residual.shape != y.shape:
            residual = upsample_nearest(residual, upsample, upsample_first_frame_once and cache is None)
        y = y + residual if alpha is None else alpha * residual + (1 - alpha) * y
    return y
