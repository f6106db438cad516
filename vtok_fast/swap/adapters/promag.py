"""The adapter for ``vtok_fast.models.ProMAG``: whole blocks, so that a video stays channels-last from the
first layer to the last.

What each block gains: group norm without mean, its scale by the key frames and SiLU in one call; convolutions
without padded copies, the residual added in their epilogue; depth to space in the convolution's store. An
accelerated layer needs no tiles: where a plain one has normalized, activated and padded copies, it has a
    normalized one.
"""

from __future__ import annotations

from torch import Tensor, nn

from vtok_fast.models.promag import blocks
from vtok_fast.ops.causal_conv3d import causal_conv3d
from vtok_fast.ops.norm_act import norm_act
from vtok_fast.swap.adapters.layers import Answer, lookup, random
from vtok_fast.swap.patch import Swap

NETWORKS = {
    blocks.Encoder: "out",
    blocks.Decoder: "out",
    blocks.EncoderGrowth: "down",
    blocks.DecoderGrowth: "up",
}


def propose(module: nn.Module) -> Answer:
    return lookup(module, _SWAPS)


def norm(layer: blocks.GroupNorm, x: Tensor, **options) -> Tensor:
    return norm_act(
        x,
        layer.weight,
        layer.bias,
        kind=layer.kind,
        groups=layer.groups,
        per_frame=layer.per_frame,
        eps=layer.eps,
        **options,
    )


def conv(layer: blocks.CausalConv3d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    kernel = layer.conv.kernel_size
    y = causal_conv3d(
        x,
        layer.conv.weight,
        layer.conv.bias,
        stride=layer.conv.stride,
        time_pad=(kernel[0] - 1, 0),
        spatial_pad=[(k // 2, k // 2) for k in kernel[1:]],
        residual=residual,
        depth_to_space=layer.expand,
    )
    return y[:, :, layer.expand[0] - 1 :]


def norm_conv(block: blocks.NormConv, x: Tensor, residual: Tensor | None = None) -> Tensor:
    return conv(block.conv, norm(block.norm, x, activation="silu"), residual)


def res_block(block: blocks.ResBlock, x: Tensor) -> Tensor:
    shortcut = x if block.shortcut is None else conv(block.shortcut, x)
    return norm_conv(block.second, norm_conv(block.first, x), shortcut)


def norm_silu(block: blocks.NormSiLU, x: Tensor) -> Tensor:
    return norm(block.norm, x, activation="silu")


def ada_norm(block: blocks.AdaNorm, f: Tensor, k: Tensor) -> Tensor:
    return norm(block.norm, f, scale=block.scale(k, f.shape[2]))


def causal_conv(layer: blocks.CausalConv3d, x: Tensor, before=None, residual: Tensor | None = None) -> Tensor:
    return conv(layer, x if before is None else before(x, (slice(None), slice(None))), residual)


def _input(module: nn.Module, channels: int, frames: int = 4) -> Tensor:
    return random(module, 1, channels, frames, 10, 14)


_SWAPS: dict[type, Swap] = {
    blocks.ResBlock: Swap(
        "norm + SiLU in one call, 3x3x3 convs with virtual padding, residual fused",
        res_block,
        sample=lambda m: (_input(m, m.first.conv.conv.in_channels),),
    ),
    blocks.NormConv: Swap(
        "norm + SiLU in one call, conv with virtual padding",
        norm_conv,
        sample=lambda m: (_input(m, m.conv.conv.in_channels),),
    ),
    blocks.NormSiLU: Swap(
        "norm + SiLU in one call", norm_silu, sample=lambda m: (_input(m, len(m.norm.weight)),)
    ),
    blocks.AdaNorm: Swap(
        "norm and scale in one call",
        ada_norm,
        sample=lambda m: (_input(m, m.affine.in_channels, 5), _input(m, m.affine.in_channels, 3)),
    ),
    blocks.CausalConv3d: Swap(
        "conv with virtual padding, depth to space in its store",
        causal_conv,
        sample=lambda m: (_input(m, m.conv.in_channels),),
    ),
}
