"""The adapter for diffusers' ``AutoencoderKLHunyuanVideo``.

Replicated edges on all sides without a padded copy; upsampling, in which the first frame stays single, folded
into the convolution; and attention that is causal over frames without the dense mask of (frames x pixels)
squared elements.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vtok_fast.dispatch.backends import Reason
from vtok_fast.ops.scope_attention import scope_attention
from vtok_fast.ops.scope_attention.scope import Scope
from vtok_fast.swap.adapters.layers import (
    Answer,
    Table,
    channels_last,
    group_norm,
    lookup,
    random,
    video,
    why_unlike,
)
from vtok_fast.swap.adapters.pad_conv import own_rule
from vtok_fast.swap.adapters.padding import MODES, Rule, exact, virtual
from vtok_fast.swap.patch import CHECKPOINTING, Skip, Swap

LIBRARY = "diffusers.models.autoencoders.autoencoder_kl_hunyuan_video"
NETWORKS = {"HunyuanVideoEncoder3D": "conv_out", "HunyuanVideoDecoder3D": "conv_out"}


def propose(module: nn.Module) -> Answer:
    return lookup(module, _SWAPS, LIBRARY)


# ---- layers ------------------------------------------------------------------------------------------------


def rule(layer: nn.Module) -> Rule | None:
    """How a ``HunyuanVideoCausalConv3d`` pads; None where its convolution pads once more, or in a mode that
    the op does not support."""
    if layer.pad_mode not in MODES or any(map(any, own_rule(layer.conv).pads)):
        return None
    left, right, top, bottom, front, back = layer.time_causal_padding
    return Rule(((front, back), (top, bottom), (left, right)), MODES[layer.pad_mode], MODES[layer.pad_mode])


def conv(layer: nn.Module, hidden_states: Tensor, **options) -> Tensor:
    return virtual(layer.conv, hidden_states, rule(layer), **options)


def conv_exact(layer: nn.Module, hidden_states: Tensor) -> Tensor:
    return exact(layer.conv, hidden_states, rule(layer))


def upsample(block: nn.Module, hidden_states: Tensor) -> Tensor:
    return conv(
        block.conv,
        hidden_states,
        upsample=tuple(map(int, block.upsample_factor)),
        upsample_first_frame_once=True,
    )


def attention(attn: nn.Module, x: Tensor) -> Tensor:
    """diffusers' ``Attention`` over all pixels of a video, each of which sees its own and earlier frames."""
    b, c, t, h, w = x.shape
    tokens = channels_last(group_norm(attn.group_norm, x, None)).reshape(b, t * h * w, c)
    q, k, v = (
        layer(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for layer in (attn.to_q, attn.to_k, attn.to_v)
    )
    y = scope_attention(q, k, v, Scope.block_causal(t, h * w)).transpose(1, 2).flatten(2)
    y = video(attn.to_out[1](attn.to_out[0](y)).reshape(b, t, h, w, -1))
    y = y + x if attn.residual_connection else y
    return y if attn.rescale_output_factor == 1 else y / attn.rescale_output_factor


# ---- blocks ------------------------------------------------------------------------------------------------


def resnet_block(block: nn.Module, hidden_states: Tensor) -> Tensor:
    h = conv(block.conv1, group_norm(block.norm1, hidden_states))
    h = block.dropout(group_norm(block.norm2, h))
    shortcut = hidden_states if block.conv_shortcut is None else conv(block.conv_shortcut, hidden_states)
    return conv(block.conv2, h, residual=shortcut)


def mid_block(block: nn.Module, hidden_states: Tensor) -> Tensor:
    run = runner(block)
    x = run(block.resnets[0], hidden_states)
    for attn, resnet in zip(block.attentions, block.resnets[1:]):
        x = run(resnet, x if attn is None else attention(attn, x))
    return x


def encoder(network: nn.Module, hidden_states: Tensor) -> Tensor:
    return _network(network, hidden_states, [*network.down_blocks, network.mid_block])


def decoder(network: nn.Module, hidden_states: Tensor) -> Tensor:
    return _network(network, hidden_states, [network.mid_block, *network.up_blocks])


def _network(network: nn.Module, x: Tensor, parts: list[nn.Module]) -> Tensor:
    run = runner(network)
    x = network.conv_in(x)
    for part in parts:
        x = run(part, x)
    return network.conv_out(group_norm(network.conv_norm_out, x))


def runner(module: nn.Module):
    """How a module runs its parts: diffusers' gradient checkpointing, or a plain call."""
    if torch.is_grad_enabled() and module.gradient_checkpointing:
        return module._gradient_checkpointing_func
    return lambda part, x: part(x)


# ---- what is proposed --------------------------------------------------------------------------------------


def _why_not_convs(*layers: nn.Module | None) -> Reason:
    """Why these are not all convolutions as their class makes them."""
    for layer in layers:
        if layer is not None:
            if type(layer).__name__ != "HunyuanVideoCausalConv3d":
                return f"a convolution is a {type(layer).__name__}, which this swap was not made for"
            if why := why_unlike(layer, conv="Conv3d"):
                return why
            if rule(layer) is None:
                return f"pad_mode {layer.pad_mode!r} with a convolution that pads {layer.conv.padding} itself"
    return None


def _why_not_upsample(block: nn.Module) -> Reason:
    if why := _why_not_convs(block.conv):
        return why
    if any(int(f) != f or f < 1 for f in block.upsample_factor):
        return f"upsample_factor {block.upsample_factor} is not made of whole numbers"
    return None


def _why_not_block(block: nn.Module) -> Reason:
    return why_unlike(block, norm1="GroupNorm", norm2="GroupNorm", nonlinearity="SiLU") or _why_not_convs(
        block.conv1, block.conv2, block.conv_shortcut
    )


def _propose_mid_block(block: nn.Module) -> Answer:
    covers = tuple(f"attentions.{i}" for i, attn in enumerate(block.attentions) if attn is not None)
    if not covers:
        return None
    for attn in filter(None, block.attentions):
        kind = type(attn.processor).__name__
        if type(attn).__name__ != "Attention" or kind != "AttnProcessor2_0":
            return Skip(
                f"attention is a {type(attn).__name__} with the processor {kind}, which this swap was not "
                f"made for"
            )
        others = (attn.spatial_norm, attn.norm_q, attn.norm_k)
        if any(norm is not None for norm in others) or type(attn.group_norm) is not nn.GroupNorm:
            return Skip("attention with other norms than this swap was made for")
    return [
        Swap(
            "frame-causal attention without a mask",
            mid_block,
            covers=covers,
            state=CHECKPOINTING,
            sample=lambda m: (_video(m, m.resnets[0].norm1.num_channels),),
        )
    ]


def _network_swap(function: Callable[..., Tensor]) -> Swap:
    return Swap(
        "norm + SiLU in one pass before conv_out",
        function,
        covers=("conv_norm_out", "conv_act"),
        state=CHECKPOINTING,
        why_not=lambda network: why_unlike(network, conv_norm_out="GroupNorm", conv_act="SiLU"),
    )


def _video(module: nn.Module, channels: int) -> Tensor:
    return random(module, 1, channels, 3, 10, 14)


_SWAPS: Table = {
    "HunyuanVideoCausalConv3d": Swap(
        "causal conv with virtual padding",
        conv,
        contiguous=True,
        sample=lambda m: (_video(m, m.conv.in_channels),),
        exact=conv_exact,
        exact_where=lambda layer: not any(layer.time_causal_padding),
        why_not=_why_not_convs,
    ),
    "HunyuanVideoUpsampleCausal3D": Swap(
        "upsampling folded into the conv",
        upsample,
        sample=lambda m: (_video(m, m.conv.conv.in_channels),),
        why_not=_why_not_upsample,
    ),
    "HunyuanVideoResnetBlockCausal3D": Swap(
        "norm + SiLU in one pass, causal convs, residual fused",
        resnet_block,
        sample=lambda m: (_video(m, m.norm1.num_channels),),
        why_not=_why_not_block,
    ),
    "HunyuanVideoMidBlock3D": _propose_mid_block,
    "HunyuanVideoEncoder3D": _network_swap(encoder),
    "HunyuanVideoDecoder3D": _network_swap(decoder),
}
