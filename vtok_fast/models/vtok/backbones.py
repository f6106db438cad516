"""What VTok takes its features from: a ViT of this package, or CLIP's vision tower from ``transformers``.

A backbone is any module that maps frames (N, C, H, W) in [-1, 1] to patch features, (N, P, D) with P a square
number, or (N, D, h, w).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_fast.models.common.transformer import (
    Transformer,
    grid_centers,
    patchify,
    rotary_frequencies,
    rotary_table,
    split_head,
)

# Of its training images, in [0, 1]
CLIP_MEAN, CLIP_STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)


def feature_map(features: Tensor) -> Tensor:
    """What a backbone returned, as (N, D, h, w). Raises ValueError for another shape."""
    if not isinstance(features, Tensor) or features.dim() not in (3, 4):
        found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"backbone: expected features (N, P, D) or (N, D, h, w), got {found}")
    if features.dim() == 4:
        return features
    side = math.isqrt(features.shape[1])
    if side * side != features.shape[1]:
        raise ValueError(
            f"backbone: {features.shape[1]} patches do not form a square; return (N, D, h, w), "
            "and no class token"
        )
    return features.mT.unflatten(2, (side, side))


def plane_angles(places: Tensor, dim: int) -> Tensor:
    """The rotary angles (N, dim/2) of `dim` channels at places (N, 2), by (row, column)."""
    return rotary_table(places, [rotary_frequencies(n) for n in split_head(dim, 2)])


class ViT(nn.Module):
    """A ViT on single frames, for any size: (N, C, H, W) -> (N, dim, H/patch, W/patch).

    Its positions are rotary, and sines and cosines that are added to the patches: the mean of a frame's
    features could not tell otherwise where in it something moves.
    """

    def __init__(self, in_channels: int, patch: int, dim: int, depth: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.patch, self.head_dim = patch, dim // heads
        self.embed = nn.Linear(in_channels * patch * patch, dim)
        self.transformer = Transformer(dim, depth, heads, mlp_ratio)

    def forward(self, frames: Tensor) -> Tensor:
        rows, columns = (n // self.patch for n in frames.shape[2:])
        x = self.embed(patchify(frames.unsqueeze(2), (1, self.patch, self.patch)))
        places = grid_centers((rows, columns), rows, columns, x.device)
        angles = plane_angles(places, x.shape[2])
        x = x + torch.cat((angles.cos(), angles.sin()), dim=1).to(x.dtype)
        x = self.transformer(x, plane_angles(places, self.head_dim))
        return x.mT.unflatten(2, (rows, columns))


class CLIPBackbone(nn.Module):
    """``CLIPBackbone(CLIPVisionModel.from_pretrained("openai/clip-vit-large-patch14-336"))``.

    Frames are resized to the model's square (bicubic, antialiased) and normalized as CLIP's training images
    were. The features are the hidden states after ``layer`` without the class token; the layer before the
    last one is that of LLaVA, and inferred here.

    Args:
        clip: a ``transformers`` CLIPVisionModel, or any module with its ``config.image_size`` and call.
        layer: an index into the hidden states.
    """

    def __init__(self, clip: nn.Module, layer: int = -2):
        super().__init__()
        self.clip, self.layer = clip, layer
        self.register_buffer("mean", torch.tensor(CLIP_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD)[:, None, None], persistent=False)

    def forward(self, frames: Tensor) -> Tensor:
        size = self.clip.config.image_size
        pixels = frames if frames.dtype == torch.float64 else frames.float()
        if pixels.shape[2:] != (size, size):
            pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
        pixels = ((pixels + 1) / 2 - self.mean.to(pixels.dtype)) / self.std.to(pixels.dtype)
        output = self.clip(pixel_values=pixels.to(frames.dtype), output_hidden_states=True)
        return output.hidden_states[self.layer][:, 1:]
