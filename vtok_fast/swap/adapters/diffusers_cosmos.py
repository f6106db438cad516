"""The adapter for diffusers' ``AutoencoderKLCosmos``.

Half of what this model copies pads nothing at all: it goes, as do the pads themselves. Pools and identities
beside a convolution become part of its weights or of its epilogue, and frames or pixels that are repeated
before one are never written.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_fast.dispatch.backends import Reason
from vtok_fast.swap.adapters.layers import (
    Answer,
    Table,
    attention_per_frame,
    channels_last,
    group_norm,
    lookup,
    random,
    why_unlike,
)
from vtok_fast.swap.adapters.padding import MODES, Rule, exact, virtual
from vtok_fast.swap.patch import Skip, Swap

LIBRARY = "diffusers.models.autoencoders.autoencoder_kl_cosmos"
NETWORKS = {"CosmosEncoder3d": "conv_out", "CosmosDecoder3d": "conv_out"}


def propose(module: nn.Module) -> Answer:
    return lookup(module, _SWAPS, LIBRARY)


# ---- layers ------------------------------------------------------------------------------------------------


def rule(layer: nn.Module) -> Rule:
    left, right, top, bottom = layer.spatial_pad
    return Rule(((layer.temporal_pad, 0), (top, bottom), (left, right)), "replicate", MODES[layer.pad_mode])


def conv(layer: nn.Module, hidden_states: Tensor, **options) -> Tensor:
    return virtual(layer, hidden_states, rule(layer), **options)


def conv_exact(layer: nn.Module, hidden_states: Tensor) -> Tensor:
    return exact(layer, hidden_states, rule(layer))


def projection(pair: nn.Module, x: Tensor, **options) -> Tensor:
    """``CosmosConvProjection3d``: over space, then over time; ``options`` go to the second."""
    return conv(pair.conv_t, conv(pair.conv_s, x), **options)


def norm_silu(norm: nn.Module, x: Tensor, activation: str | None = "silu") -> Tensor:
    return group_norm(norm.norm, x, activation, per_frame=norm.num_groups == 1)


def norm_forward(norm: nn.Module, hidden_states: Tensor) -> Tensor:
    return norm_silu(norm, hidden_states, None)


# ---- blocks ------------------------------------------------------------------------------------------------


def resnet_block(block: nn.Module, hidden_states: Tensor) -> Tensor:
    h = projection(block.conv1, norm_silu(block.norm1, hidden_states))
    h = block.dropout(norm_silu(block.norm2, h))
    shortcut = (
        hidden_states
        if isinstance(block.conv_shortcut, nn.Identity)
        else conv(block.conv_shortcut, hidden_states)
    )
    return projection(block.conv2, h, residual=shortcut)


def attention(block: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Over the pixels of each frame, or with ``CosmosTemporalAttentionProcessor2_0`` over the frames of each
    pixel."""
    b, _, t, h, w = hidden_states.shape
    y = norm_silu(block.norm, hidden_states, None)
    q, k, v = (conv(layer, y) for layer in (block.to_q, block.to_k, block.to_v))
    heads = block.num_attention_heads
    if type(block.processor).__name__.startswith("CosmosTemporal"):
        q, k, v = (channels_last(x).flatten(2, 3).unflatten(-1, (heads, -1)) for x in (q, k, v))
        q, k, v = (x.permute(0, 2, 3, 1, 4).flatten(0, 1) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attention_mask)  # (B * H * W, heads, T, D)
        y = y.unflatten(0, (b, h, w)).permute(0, 3, 5, 4, 1, 2).flatten(1, 2)
    elif heads == 1 and attention_mask is None:
        y = attention_per_frame(q, k, v)
    else:
        q, k, v = (
            channels_last(x).flatten(2, 3).flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2)
            for x in (q, k, v)
        )
        y = F.scaled_dot_product_attention(q, k, v, attention_mask)  # (B * T, heads, H * W, D)
        y = y.transpose(1, 2).flatten(2).unflatten(1, (h, w)).unflatten(0, (b, t)).permute(0, 4, 1, 2, 3)
    if block.training and block.to_out[1].p:
        return block.to_out[1](conv(block.to_out[0], y)) + hidden_states
    return conv(block.to_out[0], y, residual=hidden_states)


def downsample(block: nn.Module, hidden_states: Tensor) -> Tensor:
    """conv(x) + pool(x), by a convolution with the pool in its weights; in 16 bits beside it, to round as
    often as before."""
    x = hidden_states
    if block.spatial_downsample:
        # Rows and columns of zeros at the end, which the pool counts as well
        how = Rule(((0, 0), (0, 1), (0, 1)))
        x = _with_pool(block.conv1, x, how, (1, 2, 2), (0, 0, 0))
    if block.temporal_downsample:
        # The first frame is repeated once by the block and once by its convolution; the pool sees the former
        # only.
        how = Rule(((2, 0), (0, 0), (0, 0)), "replicate")
        x = _with_pool(block.conv2, x, how, (2, 1, 1), (1, 0, 0))
    return conv(block.conv3, x) if block.spatial_downsample or block.temporal_downsample else x


def _with_pool(
    layer: nn.Module, x: Tensor, how: Rule, size: tuple[int, int, int], first: tuple[int, int, int]
) -> Tensor:
    """A convolution plus an average over ``size`` taps of its window, from the tap ``first`` on."""
    t, h, w = (slice(f, f + n) for f, n in zip(first, size))
    average = torch.zeros_like(layer.weight)
    average[:, :, t, h, w] = torch.eye(*layer.weight.shape[:2], dtype=x.dtype, device=x.device)[
        ..., None, None, None
    ] / (size[0] * size[1] * size[2])
    return virtual(_With(layer, layer.weight + average), x, how)


class _With:
    """A convolution layer's settings with another weight."""

    def __init__(self, layer: nn.Module, weight: Tensor):
        self.weight, self.bias, self.groups = weight, layer.bias, layer.groups
        self.stride, self.dilation = layer.stride, layer.dilation


def upsample(block: nn.Module, hidden_states: Tensor) -> Tensor:
    x = hidden_states
    if block.temporal_upsample:  # x + conv(x) of twice the frames, the first one single
        x = conv(block.conv1, x, residual=x, upsample=(2, 1, 1), upsample_first_frame_once=True)
    if block.spatial_upsample:
        x = conv(block.conv2, x, residual=x, upsample=(1, 2, 2))
    return conv(block.conv3, x) if block.spatial_upsample or block.temporal_upsample else x


# ---- what is proposed --------------------------------------------------------------------------------------


def _why_not_convs(*layers: nn.Module) -> Reason:
    for layer in layers:
        if type(layer).__name__ != "CosmosCausalConv3d":
            return f"a convolution is a {type(layer).__name__}, which this swap was not made for"
        if layer.pad_mode not in MODES or any(layer.padding) or layer.padding_mode != "zeros":
            return f"pad_mode {layer.pad_mode!r} with a convolution that pads {layer.padding} itself"
    return None


def _why_not_pairs(*pairs: nn.Module) -> Reason:
    for pair in pairs:
        if type(pair).__name__ != "CosmosConvProjection3d":
            return f"a pair of convolutions is a {type(pair).__name__}"
        if why := _why_not_convs(pair.conv_s, pair.conv_t):
            return why
    return None


def _why_not_block(block: nn.Module) -> Reason:
    why = why_unlike(
        block,
        norm1="CosmosCausalGroupNorm",
        norm2="CosmosCausalGroupNorm",
        conv_shortcut=("Identity", "CosmosCausalConv3d"),
    ) or _why_not_pairs(block.conv1, block.conv2)
    if not why and not isinstance(block.conv_shortcut, nn.Identity):
        why = _why_not_convs(block.conv_shortcut)
    return why


def _why_not_attention(block: nn.Module) -> Reason:
    kind = type(block.processor).__name__
    if kind not in ("CosmosSpatialAttentionProcessor2_0", "CosmosTemporalAttentionProcessor2_0"):
        return f"the processor is a {kind}, which this swap was not made for"
    return why_unlike(block, norm="CosmosCausalGroupNorm") or _why_not_convs(
        block.to_q, block.to_k, block.to_v, block.to_out[0]
    )


def _propose_resample(what: str, function: Callable[..., Tensor]) -> Callable[[nn.Module], Answer]:
    def propose_resample(block: nn.Module) -> Answer:
        layers = [
            layer for layer in (block.conv1, block.conv2, block.conv3) if not isinstance(layer, nn.Identity)
        ]
        if not layers:
            return None
        if why := _why_not_convs(*layers):
            return Skip(why)
        if function is downsample and layers[0].weight.dtype in (torch.float16, torch.bfloat16):
            return Skip("a pool folded into 16-bit weights would be rounded twice")
        return [Swap(what, function, sample=lambda m: (_video(m, layers[0].in_channels),))]

    return propose_resample


def _video(module: nn.Module, channels: int) -> Tensor:
    return random(module, 1, channels, 3, 10, 14)


_SWAPS: Table = {
    "CosmosCausalConv3d": Swap(
        "causal conv with virtual padding",
        conv,
        contiguous=True,
        sample=lambda m: (_video(m, m.in_channels),),
        exact=conv_exact,
        exact_where=lambda layer: not layer.temporal_pad or not any(layer.spatial_pad),
        why_not=_why_not_convs,
    ),
    "CosmosCausalGroupNorm": Swap(
        "norm in one pass, per frame without a permuted copy",
        norm_forward,
        sample=lambda m: (_video(m, m.norm.num_channels),),
        why_not=lambda norm: why_unlike(norm, norm="GroupNorm"),
    ),
    "CosmosResnetBlock3d": Swap(
        "norm + SiLU in one pass, causal convs, residual fused",
        resnet_block,
        sample=lambda m: (_video(m, m.norm1.norm.num_channels),),
        why_not=_why_not_block,
    ),
    "CosmosCausalAttention": Swap(
        "norm, projections and residual fused",
        attention,
        sample=lambda m: (_video(m, m.norm.norm.num_channels),),
        why_not=_why_not_attention,
    ),
    "CosmosDownsample3d": _propose_resample(
        "pools folded into strided convs with virtual padding", downsample
    ),
    "CosmosUpsample3d": _propose_resample("upsampling folded into the convs, residuals fused", upsample),
}
