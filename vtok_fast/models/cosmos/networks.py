"""Encoder and decoder of the Cosmos tokenizer: the layers of `cosmos_blocks` in order, under the official
state-dict keys."""

from __future__ import annotations

from torch import Tensor, nn

from vtok_fast.models.common.layers import silu
from vtok_fast.models.cosmos.blocks import HybridDown, HybridUp, Norm, ResBlock, attention_pair, factorized
from vtok_fast.models.cosmos.config import CosmosConfig
from vtok_fast.models.cosmos.patcher import Patcher, UnPatcher


class _Network(nn.Module):
    """What encoder and decoder share."""

    def __init__(self, config: CosmosConfig):
        super().__init__()
        self.config = config
        self._official = config.layout == "0.1"
        self._norm = {"groups": config.num_groups}

    def make_block(self, in_channels: int, out_channels: int) -> ResBlock:
        return ResBlock(in_channels, out_channels, dropout=self.config.dropout, **self._norm)

    def make_level(self, in_channels: int, out_channels: int, blocks: int, level: int) -> nn.Module:
        """The blocks of one resolution, each followed by attention if that resolution has it."""
        config, stage = self.config, nn.Module()
        stage.block, stage.attn = nn.ModuleList(), nn.ModuleList()
        for i in range(blocks):
            stage.block.append(self.make_block(in_channels if i == 0 else out_channels, out_channels))
            if config.resolution // config.patch_size // 2**level in config.attn_resolutions:
                stage.attn.append(attention_pair(out_channels, **self._norm))
        return stage

    def make_middle(self, channels: int) -> nn.Module:
        middle = nn.Module()
        middle.block_1 = self.make_block(channels, channels)
        middle.attn_1 = attention_pair(channels, **self._norm)
        middle.block_2 = self.make_block(channels, channels)
        return middle

    def run_level(self, stage: nn.Module, x: Tensor) -> Tensor:
        for i, block in enumerate(stage.block):
            x = block(x)
            if len(stage.attn):
                x = stage.attn[i](x)
        return x

    def run_middle(self, x: Tensor) -> Tensor:
        return self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))

    def run_out(self, x: Tensor) -> Tensor:
        return self.conv_out(silu(self.norm_out(x)))


class Encoder(_Network):
    """(B, in_channels, 1 + k*temporal_compression, H, W) -> (B, z_channels * z_factor, 1 + k, h, w)."""

    def __init__(self, config: CosmosConfig):
        super().__init__(config)
        channels = [config.channels * m for m in (1, *config.channels_mult)]
        self.patcher3d = Patcher(config.patch_size, config.patch_method, constants=not self._official)
        self.conv_in = factorized(config.in_channels * config.patch_size**3, channels[0])
        self.down = nn.ModuleList()
        spatial, temporal = config.downs("spatial"), config.downs("temporal")
        for level in range(len(config.channels_mult)):
            stage = self.make_level(channels[level], channels[level + 1], config.num_res_blocks, level)
            if level < len(spatial):
                flags = {"spatial": spatial[level], "temporal": temporal[level]}
                stage.downsample = HybridDown(channels[level + 1], **flags, unused=self._official)
            self.down.append(stage)
        self.mid = self.make_middle(channels[-1])
        self.norm_out = Norm(channels[-1], **self._norm)
        self.conv_out = factorized(channels[-1], config.z_channels * config.z_factor)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(self.patcher3d(x))
        for stage in self.down:
            x = self.run_level(stage, x)
            if hasattr(stage, "downsample"):
                x = stage.downsample(x)
        return self.run_out(self.run_middle(x))


class Decoder(_Network):
    """(B, z_channels, 1 + k, h, w) -> (B, out_channels, 1 + k*temporal_compression, H, W)."""

    def __init__(self, config: CosmosConfig):
        super().__init__(config)
        mult = config.decoder_mult
        channels = [config.channels * m for m in (*mult, mult[-1])]
        # From level 1 up
        spatial, temporal = ([*reversed(config.ups(axis))] for axis in ("spatial", "temporal"))
        self.conv_in = factorized(config.z_channels, channels[-1])
        self.mid = self.make_middle(channels[-1])
        self.up = nn.ModuleList()
        for level in range(len(mult)):
            stage = self.make_level(channels[level + 1], channels[level], config.num_res_blocks + 1, level)
            if level > 0:
                flags = {"spatial": spatial[level - 1], "temporal": temporal[level - 1]}
                stage.upsample = HybridUp(channels[level], **flags, unused=self._official)
            self.up.append(stage)
        self.norm_out = Norm(channels[0], **self._norm)
        self.conv_out = factorized(channels[0], config.out_channels * config.patch_size**3)
        self.unpatcher3d = UnPatcher(config.patch_size, config.patch_method, constants=not self._official)

    def forward(self, z: Tensor) -> Tensor:
        x = self.run_middle(self.conv_in(z))
        for stage in reversed(self.up):
            x = self.run_level(stage, x)
            if hasattr(stage, "upsample"):
                x = stage.upsample(x)
        return self.unpatcher3d(self.run_out(x))
