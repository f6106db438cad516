"""The layers of ProMAG in plain PyTorch: MAGVIT-v2's causal convolutions, group norm without mean, growth,
and tiles.

Video tensors are (B, C, T, H, W). A causal convolution has kt - 1 frames of zeros in front, whatever its
stride: 17 frames become 9, 5, 3.

*Tiles.* A layer whose `tile` is a number makes its output in squares of that many positions, each from the
piece of its input that it needs (its halo included). The result is that of the whole layer, the statistics of
norms are those of the whole video, and what a layer needs beside its input and output (normalized, activated
and padded copies) exists for one square at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_fast.models.promag.config import ProMAGConfig, Triple


class GroupNorm(nn.Module):
    """(x - m) / sqrt(mean (x - m)^2 + eps) over each group of channels, with m = 0 for "group_rms", else the
    group's mean.

    Statistics are those of (T, H, W), or of each frame.
    """

    def __init__(self, config: ProMAGConfig, channels: int, *, affine: bool = True):
        super().__init__()
        self.kind, self.groups, self.per_frame, self.eps = (
            config.norm,
            config.groups,
            config.per_frame,
            config.eps,
        )
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def statistics(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """(m or None, 1/deviation) of each channel, (B, C, T or 1, 1, 1), in float32 at least."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        grouped, over = x.unflatten(1, (self.groups, -1)), (2, 4, 5) if self.per_frame else (2, 3, 4, 5)
        mean = None
        if self.kind == "group":
            variance, mean = torch.var_mean(grouped.to(wide), over, correction=0, keepdim=True)
        else:
            count = grouped[:1, :1].numel() // (x.shape[2] if self.per_frame else 1)
            variance = torch.linalg.vector_norm(grouped, dim=over, keepdim=True, dtype=wide).square() / count
        return (None if mean is None else self._per_channel(mean, x)), self._per_channel(
            (variance + self.eps).rsqrt(), x
        )

    def _per_channel(self, value: Tensor, x: Tensor) -> Tensor:
        return value.expand(-1, -1, x.shape[1] // self.groups, -1, -1, -1).flatten(1, 2)

    def normalize(
        self, x: Tensor, statistics: tuple[Tensor | None, Tensor], scale: Tensor | None = None
    ) -> Tensor:
        """(x normalized * weight + bias) * scale of x, a piece of the video that has these statistics; wide,
        not rounded."""
        mean, rstd = statistics
        y = (x.to(rstd.dtype) if mean is None else x.to(rstd.dtype) - mean) * rstd
        if self.weight is not None:
            y = y * self.weight.to(y.dtype).view(-1, 1, 1, 1) + self.bias.to(y.dtype).view(-1, 1, 1, 1)
        return y if scale is None else y * scale.to(y.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.normalize(x, self.statistics(x)).to(x.dtype)


class CausalConv3d(nn.Module):
    """A convolution that sees no later frame: zeros around each frame, and kt - 1 frames of zeros before the
    first one.

    With `expand` (time, height, width), its output channels (C, time, height, width) become positions: depth
    to space. Then the first time - 1 frames are dropped, so that 1 + n frames become 1 + time * n.
    """

    tile: int | None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Triple = (3, 3, 3),
        stride: Triple = (1, 1, 1),
        expand: Triple = (1, 1, 1),
    ):
        super().__init__()
        self.expand = expand
        self.conv = nn.Conv3d(
            in_channels, out_channels * expand[0] * expand[1] * expand[2], kernel, stride=stride
        )

    def forward(
        self,
        x: Tensor,
        before: Callable[[Tensor, tuple[slice, slice]], Tensor] = lambda x, area: x,
        residual: Tensor | None = None,
    ) -> Tensor:
        """The convolution of before(x), plus residual. `before` works position by position, on x and the area
        that it covers."""
        if self.tile is None:
            return self.piece(x, (slice(None), slice(None)), before, residual)
        kernel, stride = self.conv.kernel_size[1], self.conv.stride[1]
        size = [(n + 2 * (kernel // 2) - kernel) // stride + 1 for n in x.shape[3:]]
        y = None
        for top in range(0, size[0], self.tile):
            for left in range(0, size[1], self.tile):
                area = tuple(slice(a, min(a + self.tile, n)) for a, n in zip((top, left), size))
                part = self.piece(x, area, before, residual)
                if y is None:
                    y = part.new_empty(*part.shape[:3], *(n * e for n, e in zip(size, self.expand[1:])))
                y[(..., *scaled(area, self.expand[1:]))] = part
        return y

    def piece(
        self,
        x: Tensor,
        area: tuple[slice, slice],
        before: Callable[[Tensor, tuple[slice, slice]], Tensor],
        residual: Tensor | None,
    ) -> Tensor:
        """The output in `area`, rows and columns counted before depth to space."""
        kernel, stride = self.conv.kernel_size, self.conv.stride
        halo, pads = [], []
        for rows, n, k, s in zip(area, x.shape[3:], kernel[1:], stride[1:]):
            lo, hi = (
                (-(k // 2), n + k // 2)
                if rows.stop is None
                else (rows.start * s - k // 2, (rows.stop - 1) * s - k // 2 + k)
            )
            halo.append(slice(max(lo, 0), min(hi, n)))
            pads.append((max(-lo, 0), max(hi - n, 0)))
        part = before(x[..., halo[0], halo[1]], (halo[0], halo[1]))
        y = self.conv(F.pad(part, (*pads[1], *pads[0], kernel[0] - 1, 0)))
        if self.expand != (1, 1, 1):
            y = depth_to_space(y, self.expand)
        return y if residual is None else y + residual[(..., *scaled(area, self.expand[1:]))]


def scaled(area: tuple[slice, slice], factors: tuple[int, int]) -> tuple[slice, slice]:
    return tuple(a if a.stop is None else slice(a.start * f, a.stop * f) for a, f in zip(area, factors))


def depth_to_space(x: Tensor, expand: Triple) -> Tensor:
    """(B, C * time * height * width, T, H, W) -> (B, C, T * time - (time - 1), H * height, W * width)"""
    b, _, t, h, w = x.shape
    x = x.unflatten(1, (-1, *expand)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(b, -1, t * expand[0], h * expand[1], w * expand[2])[:, :, expand[0] - 1 :]


class NormConv(nn.Module):
    """norm, SiLU, 3x3x3 convolution."""

    def __init__(self, config: ProMAGConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.norm = GroupNorm(config, in_channels)
        self.conv = CausalConv3d(in_channels, out_channels)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        statistics = self.norm.statistics(x)
        return self.conv(
            x, lambda part, area: F.silu(self.norm.normalize(part, statistics)).to(part.dtype), residual
        )


class ResBlock(nn.Module):
    """x + (norm, SiLU, convolution) twice; a 1x1x1 convolution of x where the channels differ."""

    def __init__(self, config: ProMAGConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.first = NormConv(config, in_channels, out_channels)
        self.second = NormConv(config, out_channels, out_channels)
        self.shortcut = (
            CausalConv3d(in_channels, out_channels, (1, 1, 1)) if in_channels != out_channels else None
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x), x if self.shortcut is None else self.shortcut(x))


class NormSiLU(nn.Module):
    """norm, SiLU: the end of an encoder."""

    def __init__(self, config: ProMAGConfig, channels: int):
        super().__init__()
        self.norm = GroupNorm(config, channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(x))


class AdaNorm(nn.Module):
    """norm(f) * (1 + affine(k)): the features f of all frames, scaled by those of the key frames, every
    second one.

    The first key frame scales the first frame, each later one two of them. Nothing is shifted. Starts as
    norm(f).
    """

    def __init__(self, config: ProMAGConfig, channels: int):
        super().__init__()
        self.per_position = config.key_embedding == "position"
        self.norm = GroupNorm(config, channels, affine=False)
        self.affine = nn.Conv3d(channels, channels, 1)
        nn.init.zeros_(self.affine.weight), nn.init.zeros_(self.affine.bias)

    def scale(self, k: Tensor, frames: int) -> Tensor:
        """(B, C, frames, H or 1, W or 1) of key frames (B, C, 1 + (frames - 1)/2, H, W)."""
        s = 1 + self.affine(k if self.per_position else k.mean((3, 4), keepdim=True))
        return s[:, :, (torch.arange(frames, device=k.device) + 1) // 2]

    def forward(self, f: Tensor, k: Tensor) -> Tensor:
        return self.norm.normalize(f, self.norm.statistics(f), self.scale(k, f.shape[2])).to(f.dtype)


class Encoder(nn.Module):
    """The base's encoder: (B, in_channels, T, H, W), T = 1 + k * factor, to features (B, C, 1 + k, h, w)."""

    def __init__(self, config: ProMAGConfig):
        super().__init__()
        channels = [config.ch * m for m in (1, *config.ch_mult)]
        self.conv_in = CausalConv3d(config.in_channels, channels[0])
        self.levels, self.downs = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(channels[1:]):
            self.levels.append(res_blocks(config, config.num_res_blocks, channels[level], width))
            if level < len(config.strides):
                self.downs.append(CausalConv3d(width, width, stride=config.strides[level]))
        self.mid = res_blocks(config, config.mid_blocks, width, width)
        self.out = NormSiLU(config, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.levels[0](self.conv_in(x))
        for down, level in zip(self.downs, self.levels[1:]):
            x = level(down(x))
        return self.out(self.mid(x))


class Decoder(nn.Module):
    """The base's decoder: features (B, C, 1 + k, h, w) to a video (B, in_channels, 1 + k * factor, H, W)."""

    def __init__(self, config: ProMAGConfig):
        super().__init__()
        channels = [config.ch * m for m in (*config.ch_mult, config.ch_mult[-1])]
        self.conv_in = CausalConv3d(channels[-1], channels[-1])
        self.mid = res_blocks(config, config.mid_blocks, channels[-1], channels[-1])
        self.ups, self.levels = nn.ModuleList(), nn.ModuleList()  # from the lowest resolution to the full one
        for level in reversed(range(len(config.ch_mult))):
            self.levels.append(
                res_blocks(config, config.num_res_blocks, channels[level + 1], channels[level])
            )
            if level:
                self.ups.append(
                    CausalConv3d(channels[level], channels[level], expand=config.strides[level - 1])
                )
        self.out = NormConv(config, channels[0], config.in_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.levels[0](self.mid(self.conv_in(x)))
        for up, level in zip(self.ups, self.levels[1:]):
            x = level(up(x))
        return self.out(x)

    def full_resolution(self) -> list[nn.Module]:
        """Its last stage."""
        return [self.levels[-1], self.out]


class EncoderGrowth(nn.Module):
    """Features of half as many frames, from those of all frames f and those of every second frame k: k +
    r(AdaNorm(f, k)).

    r is residual blocks, then a convolution of stride 2 in time, which starts at zero: at first the result is
    k.
    """

    def __init__(self, config: ProMAGConfig):
        super().__init__()
        channels = config.ch * config.ch_mult[-1]
        self.modulate = AdaNorm(config, channels)
        self.blocks = res_blocks(config, config.growth_blocks, channels, channels)
        self.down = CausalConv3d(channels, channels, stride=(2, 1, 1))
        nn.init.zeros_(self.down.conv.weight), nn.init.zeros_(self.down.conv.bias)

    def forward(self, f: Tensor, k: Tensor) -> Tensor:
        return k + self.down(self.blocks(self.modulate(f, k)))


class DecoderGrowth(nn.Module):
    """Features of twice as many frames: residual blocks that start as the identity, an upsampling that starts
    as a copy."""

    def __init__(self, config: ProMAGConfig):
        super().__init__()
        channels = config.ch * config.ch_mult[-1]
        self.blocks = res_blocks(config, config.growth_blocks, channels, channels)
        for block in self.blocks:
            nn.init.zeros_(block.second.conv.conv.weight), nn.init.zeros_(block.second.conv.conv.bias)
        self.up = CausalConv3d(channels, channels, expand=(2, 1, 1))
        with torch.no_grad():
            self.up.conv.weight.zero_()
            self.up.conv.weight[:, :, -1, 1, 1] = torch.eye(channels).repeat_interleave(2, dim=0)
            self.up.conv.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.blocks(x))


def res_blocks(config: ProMAGConfig, count: int, in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        *(ResBlock(config, out_channels if i else in_channels, out_channels) for i in range(count))
    )
