"""The adapter for diffusers' ``AutoencoderKLHunyuanVideo15`` and ``AutoencoderKLHunyuanImageRefiner``, which
has the same blocks under other names.

Replicated edges without a padded copy, norm and SiLU in one pass, and attention that is causal over frames
without the dense mask of (frames x pixels) squared elements, which the library fills row by row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from vtok_fast.dispatch.backends import Reason
from vtok_fast.ops.scope_attention import scope_attention
from vtok_fast.ops.scope_attention.scope import Scope
from vtok_fast.swap.adapters import diffusers_hunyuan as hunyuan
from vtok_fast.swap.adapters.diffusers_wan import rms
from vtok_fast.swap.adapters.layers import Answer, Table, channels_last, lookup, random, video, why_unlike
from vtok_fast.swap.adapters.pad_conv import own_rule
from vtok_fast.swap.patch import CHECKPOINTING, Swap

MODULE = "diffusers.models.autoencoders.autoencoder_kl_hunyuan"
PREFIXES = {f"{MODULE}video15": "HunyuanVideo15", f"{MODULE}image_refiner": "HunyuanImageRefiner"}
LIBRARY = tuple(PREFIXES)
NETWORKS = {
    f"{prefix}{part}3D": "conv_out" for prefix in PREFIXES.values() for part in ("Encoder", "Decoder")
}


def propose(module: nn.Module) -> Answer:
    for library, table in _SWAPS.items():
        if (answer := lookup(module, table, library)) is not None:
            return answer
    return None


# ---- layers and blocks -------------------------------------------------------------------------------------


def _pixelwise(conv: nn.Conv3d, tokens: Tensor) -> Tensor:
    """A convolution of one tap, on (B, N, C)."""
    return F.linear(tokens, conv.weight.flatten(1), conv.bias)


def _attend(block: nn.Module, x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    b, c, t, h, w = x.shape
    tokens = channels_last(rms(block.norm, x)).reshape(b, t * h * w, c)
    q, k, v = (_pixelwise(conv, tokens).unsqueeze(1) for conv in (block.to_q, block.to_k, block.to_v))
    y = _pixelwise(block.proj_out, attend(q, k, v).squeeze(1))
    return video(y.reshape(b, t, h, w, c)) + x


def causal_attention(block: nn.Module, x: Tensor) -> Tensor:
    """Each pixel sees those of its own and of earlier frames."""
    t, pixels = x.shape[2], x.shape[3] * x.shape[4]
    return _attend(block, x, lambda q, k, v: scope_attention(q, k, v, Scope.block_causal(t, pixels)))


def dense_attention(block: nn.Module, x: Tensor) -> Tensor:
    return _attend(block, x, F.scaled_dot_product_attention)


def resnet_block(block: nn.Module, hidden_states: Tensor) -> Tensor:
    h = hunyuan.conv(block.conv1, rms(block.norm1, hidden_states, "silu"))
    shortcut = hidden_states if block.conv_shortcut is None else block.conv_shortcut(hidden_states)
    return hunyuan.conv(block.conv2, rms(block.norm2, h, "silu"), residual=shortcut)


def encoder(network: nn.Module, hidden_states: Tensor) -> Tensor:
    """The shortcut is the mean of groups of channels."""
    run = hunyuan.runner(network)
    x = network.conv_in(hidden_states)
    for part in [*network.down_blocks, network.mid_block]:
        x = run(part, x)
    shortcut = x.unflatten(1, (-1, network.group_size)).mean(2)
    return network.conv_out(rms(network.norm_out, x, "silu")) + shortcut


def decoder(network: nn.Module, hidden_states: Tensor) -> Tensor:
    run = hunyuan.runner(network)
    x = network.conv_in(hidden_states) + hidden_states.repeat_interleave(network.repeat, dim=1)
    for part in [network.mid_block, *network.up_blocks]:
        x = run(part, x)
    return network.conv_out(rms(network.norm_out, x, "silu"))


# ---- what is proposed --------------------------------------------------------------------------------------


def _why_not_conv(layer: nn.Module, kind: str) -> Reason:
    if type(layer).__name__ != kind:
        return f"a convolution is a {type(layer).__name__}, which this swap was not made for"
    if why := why_unlike(layer, conv="Conv3d"):
        return why
    if hunyuan.rule(layer) is None:
        return f"pad_mode {layer.pad_mode!r} with a convolution that pads {layer.conv.padding} itself"
    return None


def _why_not_attention(block: nn.Module, norm: str) -> Reason:
    parts = ("to_q", "to_k", "to_v", "proj_out")
    if why := why_unlike(block, norm=norm, **dict.fromkeys(parts, "Conv3d")):
        return why
    for name in parts:
        conv = getattr(block, name)
        if {*conv.kernel_size, *conv.stride, conv.groups} != {1} or any(map(any, own_rule(conv).pads)):
            return f"{name} is not a convolution of one tap"
    return None


def _swaps(prefix: str, attention: Callable[[nn.Module, Tensor], Tensor]) -> Table:
    norm, conv = f"{prefix}RMS_norm", f"{prefix}CausalConv3d"

    def why_not_block(block: nn.Module) -> Reason:
        return (
            why_unlike(block, norm1=norm, norm2=norm, nonlinearity="SiLU", conv_shortcut=("Conv3d", "None"))
            or _why_not_conv(block.conv1, conv)
            or _why_not_conv(block.conv2, conv)
        )

    def network(function: Callable[..., Tensor]) -> Swap:
        return Swap(
            "norm + SiLU in one pass before conv_out",
            function,
            covers=("norm_out", "conv_act"),
            state=CHECKPOINTING,
            why_not=lambda network: why_unlike(network, norm_out=norm, conv_act="SiLU"),
        )

    return {
        conv: Swap(
            "causal conv with virtual padding",
            hunyuan.conv,
            sample=lambda m: (_video(m, m.conv.in_channels),),
            exact=hunyuan.conv_exact,
            exact_where=lambda layer: not any(layer.time_causal_padding),
            why_not=lambda layer: _why_not_conv(layer, conv),
        ),
        f"{prefix}ResnetBlock": Swap(
            "norm + SiLU in one pass, causal convs, residual fused",
            resnet_block,
            covers=("norm1", "norm2", "nonlinearity", "conv1", "conv2"),
            sample=lambda m: (_video(m, m.norm1.gamma.numel()),),
            why_not=why_not_block,
        ),
        f"{prefix}AttnBlock": Swap(
            "norm in one pass, attention without a mask",
            attention,
            sample=lambda m: (_video(m, m.in_channels),),
            why_not=lambda block: _why_not_attention(block, norm),
        ),
        f"{prefix}Encoder3D": network(encoder),
        f"{prefix}Decoder3D": network(decoder),
    }


def _video(module: nn.Module, channels: int) -> Tensor:
    return random(module, 1, channels, 3, 10, 14)


_ATTENTION = {"HunyuanVideo15": causal_attention, "HunyuanImageRefiner": dense_attention}
_SWAPS = {library: _swaps(prefix, _ATTENTION[prefix]) for library, prefix in PREFIXES.items()}
