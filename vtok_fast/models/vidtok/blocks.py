"""The layers of VidTok, one small class per kind, in plain PyTorch.

They compute what the layers of https://github.com/microsoft/VidTok (MIT) compute, under the same state-dict
keys, and at the same cost: LayerNorm over channels permutes to channels-last and back, 2D blocks fold time
into the batch, 1D blocks fold space into it, and every causal layer makes a padded copy of its input.

Video tensors are (B, C, T, H, W). `version` is "1.0" (the time axis is padded with zeros) or "1.1" (with
copies of the first frame); a non-causal layer pads both sides with zeros.

A layer that needs earlier frames takes `caches`, a `Caches` or None (the whole video at once, nothing is
kept).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_fast.models.common.layers import fold_frames, silu, unfold_frames

EPS = 1e-6  # of every norm in the released models


class Caches:
    """The frames that the causal layers of one encoder or decoder hand from a chunk to the next one.

    One object serves one chunk: `Caches(previous)` starts from what the chunk before left, and does not
    change it, so a chunk that failed can be run again. Nothing is stored on the layers themselves.

    `lookahead[layer]` is how many frames at the end of that layer's input the next chunk will bring again.
    """

    def __init__(self, previous: Caches | None = None, lookahead: dict[nn.Module, int] | None = None):
        self.first = previous is None
        self.frames: dict[nn.Module, Tensor] = {} if previous is None else dict(previous.frames)
        self.lookahead = lookahead or {}

    def keep(self, layer: nn.Module, x: Tensor, count: int) -> None:
        """Remember the last `count` frames of x (time is axis 2) that the next chunk will not bring again."""
        end = x.shape[2] - self.lookahead.get(layer, 0)
        self.frames[layer] = x[:, :, max(end - count, 0) : max(end, 0)].clone()  # a view would hold all of x


def run(layer: nn.Module, x: Tensor, caches: Caches | None) -> Tensor:
    """layer(x), with caches where there are any (a non-causal layer takes none, and is never streamed)."""
    return layer(x) if caches is None else layer(x, caches)


def interpolate(x: Tensor, scale: float | tuple[float, ...], mode: str) -> Tensor:
    """F.interpolate, in float32 for narrower types."""
    wide = x if x.dtype == torch.float64 else x.float()
    return F.interpolate(wide, scale_factor=scale, mode=mode).to(x.dtype)


def _triple(value: int | Sequence[int]) -> tuple[int, int, int]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * 3


class LayerNorm(nn.Module):
    """LayerNorm over the channel axis (axis 1) at each position of (N, C, ...)."""

    def __init__(self, channels: int, eps: float = EPS):
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


def make_norm(channels: int, norm_type: str) -> nn.Module:
    return LayerNorm(channels) if norm_type == "layernorm" else nn.GroupNorm(32, channels, eps=EPS)


class CausalConv1d(nn.Module):
    """Convolution over (N, C, T) that sees no later frame."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        version: str = "1.0",
    ):
        super().__init__()
        self.version = version
        self.time_pad = dilation * (kernel_size - 1) + 1 - stride
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, stride=stride, dilation=dilation)

    def forward(self, x: Tensor, caches: Caches | None = None) -> Tensor:
        return self.conv(pad_front(self, x, caches))


class CausalConv3d(nn.Module):
    """Convolution over (B, C, T, H, W) that sees no later frame; zeros around each frame.

    Version 1.0 takes the width padding from the kernel's height, so a kernel with kh != kw changes the width
    there.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        *,
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        version: str = "1.0",
    ):
        super().__init__()
        kernel, stride, dilation = _triple(kernel_size), _triple(stride), _triple(dilation)
        reach = (kernel[0], kernel[1], kernel[1] if version == "1.0" else kernel[2])
        time, height, width = (d * (k - 1) + 1 - s for k, s, d in zip(reach, stride, dilation, strict=True))
        self.version = version
        self.time_pad = time
        # In the order of F.pad
        self.spatial_padding = (
            width // 2,
            width - width // 2,
            height // 2,
            height - height // 2,
        )
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride=stride, dilation=dilation)

    def forward(self, x: Tensor, caches: Caches | None = None) -> Tensor:
        if self.version == "1.0" and caches is None:
            return self.conv(F.pad(x, (*self.spatial_padding, self.time_pad, 0)))
        return self.conv(F.pad(pad_front(self, x, caches), (*self.spatial_padding, 0, 0)))


def pad_front(layer: CausalConv1d | CausalConv3d, x: Tensor, caches: Caches | None) -> Tensor:
    """Put `layer.time_pad` frames in front of x: cached ones, or before the first frame zeros (1.0) or copies
    of it (1.1)."""
    if caches is not None and not caches.first:
        x = torch.cat((caches.frames[layer], x), dim=2)
    elif layer.version == "1.0":
        x = F.pad(x, (0, 0) * (x.dim() - 3) + (layer.time_pad, 0))
    else:
        x = torch.cat((x[:, :, :1].repeat_interleave(layer.time_pad, dim=2), x), dim=2)
    if caches is not None:
        caches.keep(layer, x, layer.time_pad)
    return x


class ResBlock2d(nn.Module):
    """norm, SiLU, 3x3 convolution, twice, and the residual, on (B*T, C, H, W)."""

    def __init__(
        self, in_channels: int, out_channels: int, *, norm_type: str = "layernorm", dropout: float = 0.0
    ):
        super().__init__()
        self.norm1 = make_norm(in_channels, norm_type)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = make_norm(out_channels, norm_type)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(self.dropout(silu(self.norm2(h))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class ResBlock1d(nn.Module):
    """norm, SiLU, convolution over time, twice, and the residual, on (B*H*W, C, T). Starts as the identity
    (conv2 is zero).

    With GroupNorm the causal block normalizes one frame of one pixel at a time, the non-causal one all frames
    of a pixel together.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        causal: bool = True,
        version: str = "1.0",
        norm_type: str = "layernorm",
        dropout: float = 0.0,
    ):
        super().__init__()
        self.causal, self.version = causal, version
        self.norm1 = make_norm(in_channels, norm_type)
        self.conv1 = self.make_conv(in_channels, out_channels, 3)
        self.norm2 = make_norm(out_channels, norm_type)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = self.make_conv(out_channels, out_channels, 3)
        if in_channels != out_channels:
            self.nin_shortcut = self.make_conv(in_channels, out_channels, 1)
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)

    def make_conv(self, in_channels: int, out_channels: int, kernel_size: int) -> nn.Module:
        if self.causal:
            return CausalConv1d(in_channels, out_channels, kernel_size, version=self.version)
        return nn.Conv1d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor, caches: Caches | None = None) -> Tensor:
        h = run(self.conv1, self.normalize(self.norm1, x), caches)
        h = run(self.conv2, self.dropout(self.normalize(self.norm2, h)), caches)
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h

    def normalize(self, norm: nn.Module, x: Tensor) -> Tensor:
        if not self.causal:
            return silu(norm(x))
        n, c, t = x.shape
        x = x.permute(0, 2, 1).reshape(n * t, c, 1)
        x = group_norm_of_position(norm, x) if isinstance(norm, nn.GroupNorm) else norm(x)
        return silu(x).reshape(n, t, c).permute(0, 2, 1)


def group_norm_of_position(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """norm(x) for x (N, C, 1). Statistics of a few values only: LayerNorm over each group subtracts the mean
    first, where GroupNorm multiplies by 1/std first and loses three digits."""
    groups = x.reshape(x.shape[0], norm.num_groups, -1)
    y = F.layer_norm(groups, groups.shape[2:], eps=norm.eps).reshape(x.shape)
    return y * norm.weight[:, None] + norm.bias[:, None]


class ResBlock3d(nn.Module):
    """norm, SiLU, 3x3x3 convolution, twice, and the residual, on (B, C, T, H, W).

    With GroupNorm the causal block takes its statistics per frame, the non-causal one over T, H, W.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        causal: bool = True,
        version: str = "1.0",
        norm_type: str = "layernorm",
        dropout: float = 0.0,
    ):
        super().__init__()
        self.causal, self.version = causal, version
        self.norm1 = make_norm(in_channels, norm_type)
        self.conv1 = make_conv3d(in_channels, out_channels, causal=causal, version=version)
        self.norm2 = make_norm(out_channels, norm_type)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = make_conv3d(out_channels, out_channels, causal=causal, version=version)
        if in_channels != out_channels:
            self.nin_shortcut = make_conv3d(in_channels, out_channels, 1, causal=causal, version=version)

    def forward(self, x: Tensor, caches: Caches | None = None) -> Tensor:
        h = run(self.conv1, norm_silu(self.norm1, x, per_frame=self.causal), caches)
        h = run(self.conv2, self.dropout(norm_silu(self.norm2, h, per_frame=self.causal)), caches)
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


def norm_silu(norm: nn.Module, x: Tensor, *, per_frame: bool) -> Tensor:
    if not per_frame:
        return silu(norm(x))
    return unfold_frames(silu(norm(fold_frames(x))), x.shape[0])


def make_conv3d(
    in_channels: int, out_channels: int, kernel_size: int = 3, *, causal: bool, version: str
) -> nn.Module:
    """A convolution that keeps T, H and W."""
    if causal:
        return CausalConv3d(in_channels, out_channels, kernel_size, version=version)
    return nn.Conv3d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)


class FrameAttention(nn.Module):
    """One head of self-attention among the H*W positions of each frame, and the residual."""

    def __init__(
        self, channels: int, *, causal: bool = True, version: str = "1.0", norm_type: str = "layernorm"
    ):
        super().__init__()
        self.causal = causal
        self.norm = make_norm(channels, norm_type)
        for name in ("q", "k", "v", "proj_out"):
            self.add_module(name, make_conv3d(channels, channels, 1, causal=causal, version=version))

    def forward(
        self, x: Tensor, caches: Caches | None = None
    ) -> Tensor:  # 1x1x1 convolutions need no earlier frame
        b, c, t, h, w = x.shape
        y = unfold_frames(self.norm(fold_frames(x)), b) if self.causal else self.norm(x)
        q, k, v = (
            conv(y).permute(0, 2, 3, 4, 1).reshape(b, t, h * w, c) for conv in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(y.reshape(b, t, h, w, c).permute(0, 4, 1, 2, 3))


class SpatialDown(nn.Module):
    """Halve H and W of (B*T, C, H, W): 3x3 convolution of stride 2, one zero row below and one zero column at
    the right."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class SpatialUp(nn.Module):
    """Double H and W of (B*T, C, H, W): nearest neighbor, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(interpolate(x, 2.0, "nearest"))


class TimeDown(nn.Module):
    """Halve T: sigmoid(mix_factor) * average of 3 frames + (1 - sigmoid(mix_factor)) * 3x3x3 convolution,
    both of stride 2.

    The average and the convolution see one frame more: in front (causal: zeros in 1.0, the first frame again
    in 1.1), or behind (non-causal: zeros).
    """

    def __init__(self, channels: int, *, causal: bool = True, version: str = "1.0", mix_factor: float = 2.0):
        super().__init__()
        self.causal, self.version = causal, version
        self.avg_pool = nn.AvgPool3d((3, 1, 1), stride=(2, 1, 1))
        if causal:
            self.conv = CausalConv3d(channels, channels, 3, stride=(2, 1, 1), version=version)
        else:
            self.conv = nn.Conv3d(channels, channels, 3, stride=(2, 1, 1), padding=(0, 1, 1))
        self.mix_factor = nn.Parameter(torch.tensor([mix_factor]))

    def forward(self, x: Tensor, caches: Caches | None = None) -> Tensor:
        alpha = torch.sigmoid(self.mix_factor)
        if not self.causal:
            padded = x = F.pad(x, (0, 0, 0, 0, 0, 1))
        elif caches is not None and not caches.first:
            padded = torch.cat((caches.frames[self], x), dim=2)
        else:
            padded = F.pad(x, (0, 0, 0, 0, 1, 0), mode="constant" if self.version == "1.0" else "replicate")
        if caches is not None:
            caches.keep(self, padded, 1)
        if padded.device.type == "cpu" and padded.dtype in (torch.float16, torch.bfloat16):
            padded = padded.float()  # PyTorch has no narrower average pool there
        return alpha * self.avg_pool(padded).to(x.dtype) + (1 - alpha) * run(self.conv, x, caches)


class TimeUp(nn.Module):
    """Double T: u = interpolated x; sigmoid(mix_factor) * u + (1 - sigmoid(mix_factor)) * 3x3x3 convolution
    of u.

    `mode` is "nearest" or "trilinear" (version 1.1: each new frame is 3/4 of one old frame and 1/4 of its
    neighbor). Trilinear looks one frame ahead, and keeps the first `first_frames` frames of the video (what
    the first latent frame has become here) apart from the rest. For a later chunk it puts frames [-2n:-n] of
    its previous input in front, n = first_frames: that is the frame before this chunk when the previous chunk
    carried n frames of look-ahead, and an older one when it carried none.
    """

    def __init__(
        self,
        channels: int,
        *,
        causal: bool = True,
        version: str = "1.0",
        mode: str = "nearest",
        first_frames: int = 1,
        mix_factor: float = 2.0,
    ):
        super().__init__()
        self.causal, self.version, self.mode, self.first_frames = causal, version, mode, first_frames
        self.conv = make_conv3d(channels, channels, causal=causal, version=version)
        self.mix_factor = nn.Parameter(torch.tensor([mix_factor]))

    def forward(self, x: Tensor, caches: Caches | None = None) -> Tensor:
        alpha = torch.sigmoid(self.mix_factor)
        x = self.upsample(x, caches)
        return alpha * x + (1 - alpha) * run(self.conv, x, caches)

    def upsample(self, x: Tensor, caches: Caches | None) -> Tensor:
        n, scale = self.first_frames, (2.0, 1.0, 1.0)
        if self.mode == "nearest":
            return interpolate(x, scale, self.mode)
        if caches is None or caches.first:
            if caches is not None:
                caches.frames[self] = x[:, :, -n:].clone()
            parts = [part for part in (x[:, :, :n], x[:, :, n:]) if part.shape[2]]
            return torch.cat([interpolate(part, scale, self.mode) for part in parts], dim=2)
        x = torch.cat((caches.frames[self], x), dim=2)
        caches.frames[self] = x[:, :, -2 * n : -n].clone()
        return interpolate(x, scale, self.mode)[:, :, 2 * n :]
