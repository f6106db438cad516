"""The adapter for diffusers' ``AutoencoderKLLTXVideo`` (0.9 to 0.9.7), and the functions that LTX-2 shares.

Replicated frames and zeros around a convolution without a padded copy; norm, modulation and SiLU in one pass;
channels become positions in one copy, and back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtok_fast.dispatch.backends import Reason
from vtok_fast.ops.norm_act import norm_act
from vtok_fast.swap.adapters.layers import Answer, Table, channels_last, lookup, random, video, why_unlike
from vtok_fast.swap.adapters.padding import MODES, Rule, exact, virtual
from vtok_fast.swap.patch import Swap

LIBRARY = "diffusers.models.autoencoders.autoencoder_kl_ltx"
NETWORKS = {"LTXVideoEncoder3d": "conv_out", "LTXVideoDecoder3d": "conv_out"}


def propose(module: nn.Module) -> Answer:
    return lookup(module, _SWAPS, LIBRARY)


# ---- layers ------------------------------------------------------------------------------------------------


def conv(layer: nn.Module, hidden_states: Tensor, causal: bool | None = None, **options: Any) -> Tensor:
    """A causal convolution, or a plain ``Conv3d``; ``causal`` is the layer's own setting where it has one."""
    return virtual(inner(layer), hidden_states, rule(layer, causal), **options)


def conv_exact(layer: nn.Module, hidden_states: Tensor, causal: bool | None = None) -> Tensor:
    return exact(inner(layer), hidden_states, rule(layer, causal))


def inner(layer: nn.Module) -> nn.Module:
    """The ``Conv3d`` of a convolution."""
    return layer if type(layer) is nn.Conv3d else layer.conv


def rule(layer: nn.Module, causal: bool | None = None) -> Rule:
    """How a convolution pads."""
    own = inner(layer)
    front = back = 0
    if own is not layer:
        causal = layer.is_causal if causal is None else causal
        span = layer.kernel_size[0] - 1
        front, back = (span, 0) if causal else (span // 2, span // 2)
    _, height, width = own.padding
    pads = ((front, back), (height, height), (width, width))
    return Rule(pads, "replicate", MODES[own.padding_mode])


def norm(
    layer: nn.Module,
    x: Tensor,
    activation: str | None = "silu",
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """An RMS norm over the channels of each position, modulation and SiLU."""
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    scale = None if scale is None else 1 + scale
    return norm_act(
        x, weight, bias, kind="rms", eps=layer.eps, scale=scale, shift=shift, activation=activation
    )


def modulation(temb: Tensor, table: Tensor) -> tuple[Tensor, ...]:
    """Shifts and scales from a time embedding (B, n C, 1, 1, 1) and a table (n, C)."""
    return (temb.unflatten(1, (table.shape[0], -1)) + table[None, ..., None, None, None]).unbind(1)


def noise(like: Tensor, scale: Tensor, generator: torch.Generator | None) -> Tensor:
    """One plane of noise for all channels and frames, drawn as the block draws it."""
    plane = torch.randn(like.shape[-2:], generator=generator, device=like.device, dtype=like.dtype)[None]
    return (plane * scale)[None, :, None]


# ---- blocks ------------------------------------------------------------------------------------------------


def resnet_block(
    block: nn.Module,
    inputs: Tensor,
    temb: Tensor | None = None,
    generator: torch.Generator | None = None,
    causal: bool | None = None,
) -> Tensor:
    first: dict[str, Any] = {}
    second: dict[str, Any] = {}
    if block.scale_shift_table is not None:
        shift1, scale1, shift2, scale2 = modulation(temb, block.scale_shift_table)
        first, second = {"scale": scale1, "shift": shift1}, {"scale": scale2, "shift": shift2}
    h = conv(block.conv1, norm(block.norm1, inputs, **first), causal)
    if block.per_channel_scale1 is not None:
        h = h + noise(h, block.per_channel_scale1, generator)
    h = block.dropout(norm(block.norm2, h, **second))
    shortcut = inputs
    if (layer := block.norm3) is not None:
        shortcut = norm_act(shortcut, layer.weight, layer.bias, kind="layer", eps=layer.eps)
    if block.conv_shortcut is not None:
        shortcut = conv(block.conv_shortcut, shortcut, causal)
    y = conv(block.conv2, h, causal, residual=shortcut)
    if block.per_channel_scale2 is not None:
        y = y + noise(y, block.per_channel_scale2, generator)
    return y


def downsample(block: nn.Module, hidden_states: Tensor, causal: bool | None = None) -> Tensor:
    """Positions become channels; groups of the input's are averaged for the residual."""
    x = hidden_states
    if block.stride[0] > 1:
        x = torch.cat([x[:, :, : block.stride[0] - 1], x], 2)
    residual = positions_to_channels(x, block.stride).unflatten(-1, (-1, block.group_size)).mean(-1)
    return video(positions_to_channels(conv(block.conv, x, causal), block.stride) + residual)


def upsample(block: nn.Module, hidden_states: Tensor, causal: bool | None = None) -> Tensor:
    """Channels become positions; the frames before the first are cut off.

    They do so after the convolution: Winograd, which is the faster, does not write them there. The residual,
    whose channels become positions too, is added before.
    """
    t, h, w = block.stride
    repeats = t * h * w // block.upscale_factor
    residual = torch.cat([hidden_states] * repeats, 1) if block.residual else None
    y = conv(block.conv, hidden_states, causal, residual=residual)
    return channels_to_positions(y, block.stride)[:, :, t - 1 :]


def positions_to_channels(x: Tensor, factors: tuple[int, int, int]) -> Tensor:
    """(B, C, T t, H h, W w) to (B, T, H, W, C t h w), the channels slowest."""
    t, h, w = factors
    x = channels_last(x).unflatten(3, (-1, w)).unflatten(2, (-1, h)).unflatten(1, (-1, t))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(4)


def channels_to_positions(x: Tensor, factors: tuple[int, int, int]) -> Tensor:
    """(B, C t h w, T, H, W) to (B, C, T t, H h, W w), channels-last."""
    x = channels_last(x).unflatten(-1, (-1, *factors)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return video(x.flatten(5, 6).flatten(3, 4).flatten(1, 2))


# ---- networks ----------------------------------------------------------------------------------------------


def encoder(network: nn.Module, hidden_states: Tensor, **causal: bool) -> Tensor:
    p, t = network.patch_size, network.patch_size_t
    x = channels_last(hidden_states).unflatten(3, (-1, p)).unflatten(2, (-1, p)).unflatten(1, (-1, t))
    x = network.conv_in(video(x.permute(0, 1, 3, 5, 7, 2, 6, 4).flatten(4)), **causal)
    for block in [*network.down_blocks, network.mid_block]:
        x = _run(network, block, x, None, **causal)
    x = conv(network.conv_out, norm(network.norm_out, x), **causal)
    return torch.cat([x, x[:, -1:].expand(-1, x.shape[1] - 2, -1, -1, -1)], 1)


def decoder(network: nn.Module, hidden_states: Tensor, temb: Tensor | None = None, **causal: bool) -> Tensor:
    x = network.conv_in(hidden_states, **causal)
    if network.timestep_scale_multiplier is not None:
        temb = temb * network.timestep_scale_multiplier
    for block in [network.mid_block, *network.up_blocks]:
        x = _run(network, block, x, temb, **causal)
    modulated: dict[str, Any] = {}
    if network.time_embedder is not None:
        temb = network.time_embedder(
            timestep=temb.flatten(),
            resolution=None,
            aspect_ratio=None,
            batch_size=x.shape[0],
            hidden_dtype=x.dtype,
        )
        shift, scale = modulation(temb.view(x.shape[0], -1, 1, 1, 1), network.scale_shift_table)
        modulated = {"scale": scale, "shift": shift}
    x = conv(network.conv_out, norm(network.norm_out, x, **modulated), **causal)
    p, t = network.patch_size, network.patch_size_t
    x = x.unflatten(1, (-1, t, p, p)).permute(0, 1, 5, 2, 6, 4, 7, 3)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _run(network: nn.Module, block: nn.Module, x: Tensor, temb: Tensor | None, **causal: bool) -> Tensor:
    if torch.is_grad_enabled() and network.gradient_checkpointing:
        return network._gradient_checkpointing_func(block, x, temb, None, *causal.values())
    return block(x, temb, **causal)


# ---- what is proposed --------------------------------------------------------------------------------------


def why_not_conv(layer: nn.Module | None) -> Reason:
    own = layer if type(layer) is nn.Conv3d else getattr(layer, "conv", None)
    if type(own) is not nn.Conv3d:
        return f"a convolution is a {type(own).__name__}, which this swap was not made for"
    if isinstance(own.padding, str) or own.padding[0] or own.padding_mode not in MODES:
        return f"its convolution pads {own.padding} in the mode {own.padding_mode!r}"
    return None


def why_not_block(kind: str, norms: str, shortcut: str, block: nn.Module) -> Reason:
    """Why a resnet block is not made of convolutions and norms of these classes."""
    layers = [block.conv1, block.conv2] + ([] if block.conv_shortcut is None else [block.conv_shortcut])
    return why_unlike(
        block,
        norm1=norms,
        norm2=norms,
        conv1=kind,
        conv2=kind,
        nonlinearity="SiLU",
        norm3=("LayerNorm", "None"),
        conv_shortcut=(shortcut, "None"),
    ) or next((why for why in map(why_not_conv, layers) if why), None)


def why_not_resampling(kind: str, block: nn.Module) -> Reason:
    return why_unlike(block, conv=kind) or why_not_conv(block.conv)


def block_sample(block: nn.Module) -> tuple:
    channels = block.conv1.in_channels
    temb = None if block.scale_shift_table is None else random(block, 1, 4 * channels, 1, 1, 1)
    return random(block, 1, channels, 3, 10, 14), temb


def without_noise(block: nn.Module) -> nn.Module:
    """A resnet block that draws no random numbers, which no two runs share."""
    clone = copy.copy(block)
    clone._parameters = {**block._parameters, "per_channel_scale1": None, "per_channel_scale2": None}
    return clone


def resampling_sample(block: nn.Module) -> tuple[Tensor]:
    frames = 2 if block.stride[0] == 1 else 3
    return (random(block, 1, block.conv.in_channels, frames, 6, 8),)


def network_swap(function: Callable[..., Tensor], norms: str, kind: str) -> Swap:
    """The swap of an encoder or a decoder whose last norm and convolution are of these classes."""
    return Swap(
        "norm + SiLU in one pass before conv_out",
        function,
        covers=("norm_out", "conv_act", "conv_out"),
        why_not=lambda network: (
            why_unlike(network, norm_out=norms, conv_act="SiLU", conv_out=kind)
            or why_not_conv(network.conv_out)
        ),
    )


def table(
    prefix: str, norms: str, shortcut: str, functions: tuple[Callable[..., Tensor], ...] | None = None
) -> Table:
    """What is swapped in the classes whose names begin so, by these functions for a convolution, a resnet
    block, a downsampling and an upsampling."""
    run_conv, run_block, down, up = functions or (conv, resnet_block, downsample, upsample)
    kind = f"{prefix}CausalConv3d"
    resampling: dict[str, Any] = {"sample": resampling_sample, "why_not": partial(why_not_resampling, kind)}
    return {
        kind: Swap(
            "causal conv with virtual padding",
            run_conv,
            contiguous=True,
            sample=lambda m: (random(m, 1, m.conv.in_channels, 3, 10, 14),),
            exact=conv_exact,
            exact_where=lambda layer: not any(map(any, rule(layer, True).pads)),
            why_not=why_not_conv,
        ),
        f"{prefix}ResnetBlock3d": Swap(
            "norm + SiLU in one pass, causal convs, residual fused",
            run_block,
            sample=block_sample,
            probe=without_noise,
            why_not=partial(why_not_block, kind, norms, shortcut),
        ),
        f"{prefix}Downsampler3d": Swap("positions to channels, channels-last", down, **resampling),
        f"{prefix}Upsampler3d": Swap("channels to positions, channels-last", up, **resampling),
    }


_SWAPS: Table = {
    **table("LTXVideo", "RMSNorm", "LTXVideoCausalConv3d"),
    "LTXVideoEncoder3d": network_swap(encoder, "RMSNorm", "LTXVideoCausalConv3d"),
    "LTXVideoDecoder3d": network_swap(decoder, "RMSNorm", "LTXVideoCausalConv3d"),
}
