"""What a video must be for a tokenizer to take it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class VideoConfig(Protocol):
    """What the checks read of a tokenizer's configuration."""

    @property
    def in_channels(self) -> int: ...

    @property
    def spatial_factor(self) -> int: ...

    @property
    def causal(self) -> bool: ...

    @property
    def time_downsample_factor(self) -> int: ...


def check_video(video: Tensor, config: VideoConfig, parameter: Tensor) -> None:
    """Raise TypeError or ValueError, naming the argument and its value, unless a model with such parameters
    can encode `video`."""
    if not isinstance(video, Tensor):
        raise TypeError(f"video must be a tensor, not {type(video).__name__}")
    # Weights that are sharded, offloaded, quantized or kept in 8 bits become others for each layer's call.
    as_kept = (
        type(parameter) not in (Tensor, torch.nn.Parameter) or parameter.is_meta or parameter.itemsize < 2
    )
    if video.dtype != parameter.dtype and not (
        video.is_floating_point() and (as_kept or torch.is_autocast_enabled(video.device.type))
    ):
        raise TypeError(
            f"video is {video.dtype}, the model {parameter.dtype}; convert one (values of a video are in "
            f"[-1, 1])"
        )
    if video.device != parameter.device and not as_kept:
        raise ValueError(f"video is on {video.device}, the model on {parameter.device}")
    shape = tuple(video.shape)
    if len(shape) != 5:
        raise ValueError(f"video must be (B, C, T, H, W), not of shape {shape}")
    b, c, t, h, w = shape
    if b == 0 or t == 0:
        raise ValueError(f"video of shape {shape} is empty")
    if c != config.in_channels:
        raise ValueError(f"video has {c} channels (axis 1 of {shape}), the model takes {config.in_channels}")
    factor = config.spatial_factor
    if h == 0 or w == 0 or h % factor or w % factor:
        near = tuple(max(factor, round(size / factor) * factor) for size in (h, w))
        raise ValueError(
            f"video is {h}x{w}, height and width must be multiples of {factor}: {near[0]}x{near[1]} would do"
        )
    if not config.causal and t < config.time_downsample_factor:
        raise ValueError(
            f"video has {t} frames, a non-causal model needs at least {config.time_downsample_factor}"
        )


def check_finite(name: str, x: Tensor) -> None:
    """Raise ValueError if x holds NaN or infinity. A compiled graph cannot ask for values, and leaves it
    out."""
    if torch.compiler.is_compiling():
        return
    if not torch.isfinite(x).all():
        raise ValueError(f"{name} has {int((~torch.isfinite(x)).sum())} values that are NaN or infinite")
