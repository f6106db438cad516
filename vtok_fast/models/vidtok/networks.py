"""The encoder and the decoder of VidTok: the layers of blocks.py in order, under the released models'
state-dict keys."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vtok_fast.models.common.layers import fold_frames, unfold_frames
from vtok_fast.models.vidtok.blocks import (
    Caches,
    FrameAttention,
    ResBlock1d,
    ResBlock2d,
    ResBlock3d,
    SpatialDown,
    SpatialUp,
    TimeDown,
    TimeUp,
    make_conv3d,
    make_norm,
    norm_silu,
    run,
)
from vtok_fast.models.vidtok.config import VidTokConfig


class _Network(nn.Module):
    """What encoder and decoder share."""

    def __init__(self, config: VidTokConfig):
        super().__init__()
        self.config = config
        self.causal, self.version, self.factor = config.causal, config.version, config.time_downsample_factor
        self._kind = {"causal": config.causal, "version": config.version}
        self._norm = {"norm_type": config.norm_type, "dropout": config.dropout}

    def make_level(self, in_channels: int, out_channels: int, blocks: int) -> tuple[nn.Module, nn.Module]:
        """The 2D blocks and the 1D blocks of one resolution."""
        spatial, temporal = nn.Module(), nn.Module()
        spatial.block, temporal.block = nn.ModuleList(), nn.ModuleList()
        for i in range(blocks):
            spatial.block.append(
                ResBlock2d(in_channels if i == 0 else out_channels, out_channels, **self._norm)
            )
            temporal.block.append(ResBlock1d(out_channels, out_channels, **self._kind, **self._norm))
        return spatial, temporal

    def make_middle(self, channels: int) -> nn.Module:
        middle = nn.Module()
        middle.block_1 = ResBlock3d(channels, channels, **self._kind, **self._norm)
        middle.attn_1 = FrameAttention(channels, **self._kind, norm_type=self.config.norm_type)
        middle.block_2 = ResBlock3d(channels, channels, **self._kind, **self._norm)
        return middle

    def run_level(self, spatial: nn.Module, temporal: nn.Module, x: Tensor, caches: Caches | None) -> Tensor:
        for i, block in enumerate(spatial.block):
            x = over_time(temporal.block[i], per_frame(block, x), caches)
        return x

    def run_middle(self, x: Tensor, caches: Caches | None) -> Tensor:
        x = run(self.mid.block_1, x, caches)
        x = run(self.mid.attn_1, x, caches)
        return run(self.mid.block_2, x, caches)

    def run_out(self, x: Tensor, caches: Caches | None) -> Tensor:
        return run(self.conv_out, norm_silu(self.norm_out, x, per_frame=self.causal), caches)


def per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """A 2D layer on each frame of (B, C, T, H, W)."""
    return unfold_frames(layer(fold_frames(x)), x.shape[0])


def over_time(layer: nn.Module, x: Tensor, caches: Caches | None) -> Tensor:
    """A 1D layer on each pixel of (B, C, T, H, W)."""
    b, c, t, h, w = x.shape
    x = run(layer, x.permute(0, 3, 4, 1, 2).reshape(b * h * w, c, t), caches)
    return x.reshape(b, h, w, c, t).permute(0, 3, 4, 1, 2)


class Encoder(_Network):
    """(B, in_channels, T, H, W) -> latent before the regularizer, (B, z_channels or twice that, t, h, w)."""

    def __init__(self, config: VidTokConfig):
        super().__init__(config)
        channels = [config.ch * m for m in (1, *config.ch_mult)]
        self.conv_in = make_conv3d(config.in_channels, config.ch, **self._kind)
        self.down, self.down_temporal = nn.ModuleList(), nn.ModuleList()
        for level in range(len(config.ch_mult)):
            width = channels[level + 1]
            spatial, temporal = self.make_level(channels[level], width, config.num_res_blocks)
            if level in config.spatial_ds:
                spatial.downsample = SpatialDown(width)
                if level in config.tempo_ds:
                    temporal.downsample = TimeDown(width, **self._kind)
            self.down.append(spatial)
            self.down_temporal.append(temporal)
        self.mid = self.make_middle(width)
        self.norm_out = make_norm(width, config.norm_type)
        self.conv_out = make_conv3d(width, config.z_channels * (2 if config.double_z else 1), **self._kind)

    def forward(self, x: Tensor, caches: Caches | None = None) -> Tensor:
        x = run(self.conv_in, self.fill_front(x, caches), caches)
        for level, spatial in enumerate(self.down):
            temporal = self.down_temporal[level]
            x = self.run_level(spatial, temporal, x, caches)
            if hasattr(spatial, "downsample"):
                x = per_frame(spatial.downsample, x)
                if hasattr(temporal, "downsample"):
                    x = run(temporal.downsample, x, caches)
        return self.run_out(self.run_middle(x, caches), caches)

    def fill_front(self, x: Tensor, caches: Caches | None) -> Tensor:
        """Make T a multiple of the temporal factor by frames in front.

        Version 1.0 adds factor - 1 frames unless T is a multiple already: right for T = 1 + k factor; for any
        other T the rest is dropped by the strided layers. Version 1.1 adds what is missing, in every chunk.
        """
        missing = -x.shape[2] % self.factor if self.causal else 0
        if missing and self.version == "1.0":
            missing = self.factor - 1
        return F.pad(x, (0, 0, 0, 0, missing, 0), mode=self.config.init_pad_mode) if missing else x


class Decoder(_Network):
    """(B, z_channels, t, h, w) -> (B, out_ch, T, H, W), with T = factor * t; causal version 1.0 drops the
    first factor - 1 frames."""

    def __init__(self, config: VidTokConfig):
        super().__init__(config)
        channels = [config.ch * m for m in (*config.ch_mult, config.ch_mult[-1])]
        self.conv_in = make_conv3d(config.z_channels, channels[-1], **self._kind)
        self.mid = self.make_middle(channels[-1])
        self.up, self.up_temporal = nn.ModuleList(), nn.ModuleList()
        first_frames = 1  # what the first latent frame has become at this level
        for level in reversed(range(len(config.ch_mult))):
            spatial, temporal = self.make_level(
                channels[level + 1], channels[level], config.num_res_blocks + 1
            )
            if level in config.spatial_us:
                spatial.upsample = SpatialUp(channels[level])
            if level in config.tempo_us:
                temporal.upsample = TimeUp(
                    channels[level], **self._kind, mode=config.interpolation_mode, first_frames=first_frames
                )
                first_frames *= 2
            self.up.insert(0, spatial)
            self.up_temporal.insert(0, temporal)
        self.norm_out = make_norm(channels[0], config.norm_type)
        self.conv_out = make_conv3d(channels[0], config.out_ch, **self._kind)

    def forward(self, z: Tensor, caches: Caches | None = None) -> Tensor:
        x = self.run_middle(run(self.conv_in, z, caches), caches)
        for level in reversed(range(len(self.up))):
            spatial, temporal = self.up[level], self.up_temporal[level]
            x = self.run_level(spatial, temporal, x, caches)
            if hasattr(spatial, "upsample"):
                x = per_frame(spatial.upsample, x)
                if hasattr(temporal, "upsample"):
                    x = run(temporal.upsample, x, caches)
        x = self.run_out(x, caches)
        drop = self.causal and self.version == "1.0" and (caches is None or caches.first)
        return x[:, :, self.factor - 1 :] if drop else x

    def lookahead(self) -> dict[nn.Module, int]:
        """Per causal convolution, the frames that one latent frame of look-ahead has become at its input."""
        result: dict[nn.Module, int] = {}
        frames = 1

        def mark(module: nn.Module) -> None:
            result.update((layer, frames) for layer in module.modules() if hasattr(layer, "time_pad"))

        mark(self.conv_in)
        mark(self.mid)
        for level in reversed(range(len(self.up))):
            spatial, temporal = self.up[level], self.up_temporal[level]
            mark(temporal.block)
            if hasattr(spatial, "upsample") and hasattr(temporal, "upsample"):
                frames *= 2
                mark(temporal.upsample)
        mark(self.conv_out)
        return result
