"""What a model takes at once of a video: the frames of a window, filled up, and the size they are cut to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vtok_fast.io.video.geometry import fit


def window_of(model: nn.Module, window: int | None, overlap: int | None) -> tuple[int, int]:
    """Frames of a window, and how many of them it shares with the next one."""
    own, shared = model.window
    window = own if window is None else window
    factor = model.config.time_downsample_factor
    if window < 1 or (window - model.config.causal) % factor:
        raise ValueError(
            f"window={window}: must be {'1 + ' if model.config.causal else ''}a multiple of {factor} frames"
        )
    if overlap is None:
        overlap = shared if shared < window else 0
    if not 0 <= overlap < window:
        raise ValueError(f"overlap={overlap}: must be at least 0 and less than window={window}")
    return window, overlap


def filled(video: Tensor, model: nn.Module) -> Tensor:
    """A window (C, T, H, W) with copies of the last frame appended, up to a number of frames that comes back
    complete."""
    missing = whole(video.shape[1], model) - video.shape[1]
    return torch.cat((video, video[:, -1:].expand(-1, missing, -1, -1)), 1) if missing else video


def whole(frames: int, model: nn.Module) -> int:
    """The next number of frames that comes back complete."""
    return frames + (model.config.causal - frames) % model.config.time_downsample_factor


def frame_size(height: int, width: int, size: int | tuple[int, int] | None, factor: int) -> tuple[int, int]:
    """What is left of a frame that is scaled to `size` and cut to a multiple of the model's spatial
    factor."""
    if isinstance(size, int):
        height, width = fit(height, width, size)
    elif size is not None:
        height, width = size
        if height % factor or width % factor:
            raise ValueError(f"size={height}x{width}: height and width must be multiples of {factor}")
    cut = height // factor * factor, width // factor * factor
    if min(cut) == 0:
        raise ValueError(
            f"size: frames of {height}x{width} are smaller than one token of {factor}x{factor} pixels"
        )
    return cut


def center(video: Tensor, height: int, width: int) -> Tensor:
    """The middle of the frames of a video (C, T, H, W)."""
    top, left = (video.shape[2] - height) // 2, (video.shape[3] - width) // 2
    return video[:, :, top : top + height, left : left + width]
