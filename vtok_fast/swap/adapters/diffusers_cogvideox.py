"""The adapter for diffusers' ``AutoencoderKLCogVideoX``, whose convolutions Mochi shares.

Its convolutions and blocks return their cache, ``(y, conv_cache)``, in dicts of dicts; they take the one from
the chunk before. That stays, except that a convolution over one frame returns None instead of a copy of its
whole input: nothing ever reads that.

In the decoder, norms are scaled and shifted by two 1x1 convolutions of the latent, which is first enlarged to
the video's size. A 1x1 convolution and nearest enlarging commute, so here the small latent is convolved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_fast.dispatch.backends import Reason
from vtok_fast.ops.causal_conv3d import causal_conv3d
from vtok_fast.swap.adapters.layers import (
    Answer,
    Table,
    channels_last,
    frame_conv,
    group_norm,
    lookup,
    plain_conv2d,
    random,
    video,
    why_unlike,
)
from vtok_fast.swap.adapters.pad_conv import own_rule
from vtok_fast.swap.adapters.padding import Rule, exact, virtual
from vtok_fast.swap.patch import CHECKPOINTING, Swap

LIBRARY = "diffusers.models.autoencoders.autoencoder_kl_cogvideox"
Cache = dict
NETWORKS = {"CogVideoXEncoder3D": "conv_out", "CogVideoXDecoder3D": "conv_out"}


def propose(module: nn.Module) -> Answer:
    return (
        lookup(module, _SWAPS, LIBRARY)
        or lookup(module, _DOWN, "diffusers.models.downsampling")
        or lookup(module, _UP, "diffusers.models.upsampling")
    )


# ---- layers ------------------------------------------------------------------------------------------------


def rule(layer: nn.Module, conv_cache: Tensor | None) -> Rule | None:
    """How a ``CogVideoXCausalConv3d`` pads at this call; None for a combination that only its own code can
    do.

    ``pad_mode`` is read at each call, because models change it after construction; what ``conv`` pads itself
    was fixed then."""
    inner, k = layer.conv, layer.time_kernel_size
    own = own_rule(inner)
    if layer.pad_mode == "replicate":
        if any(map(any, own.pads)):
            return None
        left, right, top, bottom, front, back = layer.time_causal_padding
        return Rule(((front, back), (top, bottom), (left, right)), "replicate", "replicate")
    if (
        own.mode != "zeros"
        or any(own.pads[0])
        or conv_cache is not None
        and k > 1
        and conv_cache.shape[2] != k - 1
    ):
        return None
    return Rule(((k - 1, 0), *own.pads[1:]), "replicate", "zeros")


def conv(layer: nn.Module, inputs: Tensor, conv_cache: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    return convolve(layer, inputs, conv_cache)


def convolve(
    layer: nn.Module, x: Tensor, conv_cache: Tensor | None, run=virtual, **options
) -> tuple[Tensor, Tensor | None]:
    """``CogVideoXCausalConv3d``: the first frame repeated in front, or the frames that the chunk before
    returned."""
    how = rule(layer, conv_cache)
    if how is None:
        y, kept = type(layer).forward(layer, x, conv_cache)
        return y + options["residual"] if options.get("residual") is not None else y, kept
    if how.mode == "replicate":
        return run(layer.conv, x, how, **options), None
    return run(layer.conv, x, how, conv_cache, **options), _last_frames(
        x, conv_cache, layer.time_kernel_size - 1
    )


def conv_exact(
    layer: nn.Module, inputs: Tensor, conv_cache: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    return convolve(layer, inputs, conv_cache, run=exact)


def _last_frames(x: Tensor, before: Tensor | None, count: int) -> Tensor | None:
    """A copy of the last frames of what came before and ``x``; before the first chunk its first frame stood
    still."""
    if count == 0:
        return None
    if x.shape[2] >= count:
        return x[:, :, -count:].clone()
    before = x[:, :, :1].expand(-1, -1, count, -1, -1) if before is None else before
    return torch.cat([before[:, :, x.shape[2] :], x], 2)


def safe_conv(layer: nn.Module, input: Tensor) -> Tensor:
    """``CogVideoXSafeConv3d``, which splits what is too large for 32-bit indices; the op counts in 64
    bits."""
    return virtual(layer, input, own_rule(layer))


def spatial_norm(
    norm: nn.Module, f: Tensor, zq: Tensor, conv_cache: Cache | None = None, activation: str | None = None
):
    """GroupNorm of ``f``, times conv_y(latent), plus conv_b(latent), both enlarged to the size of ``f``; then
    SiLU."""
    weight, bias = (
        torch.cat([getattr(layer.conv, name) for layer in (norm.conv_y, norm.conv_b)])
        for name in ("weight", "bias")
    )
    modulation = _enlarge(causal_conv3d(zq, weight, bias, time_pad=(0, 0)), f.shape[2:])
    scale, shift = modulation.chunk(2, 1)
    return group_norm(norm.norm_layer, f, activation, scale=scale, shift=shift), {
        "conv_y": None,
        "conv_b": None,
    }


def _enlarge(x: Tensor, size: torch.Size) -> Tensor:
    """Nearest, with the first of an odd number of frames by itself."""
    if size[0] > 1 and size[0] % 2:
        first, rest = x[:, :, :1], x[:, :, 1:]
        return torch.cat(
            [F.interpolate(first, size=(1, *size[1:])), F.interpolate(rest, size=(size[0] - 1, *size[1:]))], 2
        )
    return F.interpolate(x, size=size)


def norm_silu(norm: nn.Module, x: Tensor, zq: Tensor | None, kept: Cache, name: str) -> Tensor:
    if zq is None:
        return group_norm(norm, x)
    y, kept[name] = spatial_norm(norm, x, zq, activation="silu")
    return y


# ---- blocks ------------------------------------------------------------------------------------------------


def resnet_block(
    block: nn.Module,
    inputs: Tensor,
    temb: Tensor | None = None,
    zq: Tensor | None = None,
    conv_cache: Cache | None = None,
) -> tuple[Tensor, Cache]:
    before, kept = conv_cache or {}, {}
    h = norm_silu(block.norm1, inputs, zq, kept, "norm1")
    h, kept["conv1"] = convolve(block.conv1, h, before.get("conv1"))
    if temb is not None:
        h = h + block.temb_proj(block.nonlinearity(temb))[:, :, None, None, None]
    h = block.dropout(norm_silu(block.norm2, h, zq, kept, "norm2"))
    if block.in_channels != block.out_channels:
        if block.use_conv_shortcut:
            inputs, kept["conv_shortcut"] = convolve(block.conv_shortcut, inputs, before.get("conv_shortcut"))
        else:
            inputs = safe_conv(block.conv_shortcut, inputs)
    h, kept["conv2"] = convolve(block.conv2, h, before.get("conv2"), residual=inputs)
    return h, kept


def downsample(block: nn.Module, x: Tensor) -> Tensor:
    if block.compress_time and x.shape[2] > 1:
        first, pairs = x[:, :, : x.shape[2] % 2], x[:, :, x.shape[2] % 2 :]
        mean = (pairs[:, :, ::2] + pairs[:, :, 1::2]) / 2
        x = torch.cat([first, mean], 2) if first.shape[2] else mean
    return frame_conv(block.conv, x, spatial_pad=tuple((p, p + 1) for p in block.conv.padding))


def upsample(block: nn.Module, inputs: Tensor) -> Tensor:
    """Frames are enlarged within the convolution, and repeated after it: it has one frame's depth, so equal
    frames stay equal."""
    y, frames = frame_conv(block.conv, inputs, upsample=(1, 2, 2)), inputs.shape[2]
    if block.compress_time and frames > 1:
        # The first of an odd number only once
        y = video(channels_last(y).repeat_interleave(2, 1)[:, frames % 2 :])
    return y


def encoder(
    network: nn.Module, sample: Tensor, temb: Tensor | None = None, conv_cache: Cache | None = None
) -> tuple[Tensor, Cache]:
    return _network(
        network,
        sample,
        temb,
        None,
        conv_cache,
        [(f"down_block_{i}", b) for i, b in enumerate(network.down_blocks)]
        + [("mid_block", network.mid_block)],
    )


def decoder(
    network: nn.Module, sample: Tensor, temb: Tensor | None = None, conv_cache: Cache | None = None
) -> tuple[Tensor, Cache]:
    return _network(
        network,
        sample,
        temb,
        sample,
        conv_cache,
        [("mid_block", network.mid_block)] + [(f"up_block_{i}", b) for i, b in enumerate(network.up_blocks)],
    )


def _network(
    network: nn.Module,
    x: Tensor,
    temb: Tensor | None,
    zq: Tensor | None,
    conv_cache: Cache | None,
    parts: list,
):
    if torch.is_grad_enabled() and network.gradient_checkpointing:
        return type(network).forward(network, x, temb, conv_cache)
    before, kept = conv_cache or {}, {}
    h, kept["conv_in"] = network.conv_in(x, conv_cache=before.get("conv_in"))
    for name, part in parts:
        h, kept[name] = part(h, temb, zq, conv_cache=before.get(name))
    h = norm_silu(network.norm_out, h, zq, kept, "norm_out")
    h, kept["conv_out"] = network.conv_out(h, conv_cache=before.get("conv_out"))
    return h, kept


# ---- what is proposed --------------------------------------------------------------------------------------


def _why_not_conv(layer: nn.Module) -> Reason:
    return why_unlike(layer, conv="CogVideoXSafeConv3d")


def _norm_sample(norm: nn.Module) -> tuple[Tensor, Tensor]:
    return _video(norm, norm.norm_layer.num_channels, 3), random(
        norm, 1, norm.conv_y.conv.in_channels, 2, 5, 7
    )


def _why_not_norm(norm: nn.Module) -> Reason:
    if type(norm) is nn.GroupNorm:
        return None
    why = why_unlike(
        norm, norm_layer="GroupNorm", conv_y="CogVideoXCausalConv3d", conv_b="CogVideoXCausalConv3d"
    )
    if not why and any(
        layer.conv.kernel_size != (1, 1, 1) or any(layer.conv.padding) or layer.conv.bias is None
        for layer in (norm.conv_y, norm.conv_b)
    ):
        return "conv_y or conv_b is not a 1x1 convolution"
    return why


def _why_not_block(block: nn.Module) -> Reason:
    norms = ("GroupNorm", "CogVideoXSpatialNorm3D")
    shortcut = ("None", "CogVideoXCausalConv3d", "CogVideoXSafeConv3d")
    return (
        why_unlike(
            block,
            norm1=norms,
            norm2=norms,
            conv1="CogVideoXCausalConv3d",
            conv2="CogVideoXCausalConv3d",
            nonlinearity="SiLU",
            conv_shortcut=shortcut,
        )
        or _why_not_norm(block.norm1)
        or _why_not_norm(block.norm2)
    )


def _block_sample(block: nn.Module) -> tuple:
    x, temb = _video(block, block.in_channels, 3), None
    if isinstance(getattr(block, "temb_proj", None), nn.Linear):
        temb = random(block, 1, block.temb_proj.in_features)
    return (
        x,
        temb,
        None if block.spatial_norm_dim is None else random(block, 1, block.spatial_norm_dim, 2, 5, 7),
    )


def _network_swap(function: Callable[..., Any]) -> Swap:
    return Swap(
        "norm + SiLU in one pass before conv_out",
        function,
        covers=("norm_out", "conv_act"),
        state=CHECKPOINTING,
        why_not=lambda network: (
            why_unlike(network, norm_out=("GroupNorm", "CogVideoXSpatialNorm3D"), conv_act="SiLU")
            or _why_not_norm(network.norm_out)
        ),
    )


def _resample_swap(what: str, function: Callable[..., Tensor]) -> Swap:
    return Swap(
        what,
        function,
        sample=lambda m: (_video(m, m.conv.in_channels, 3),),
        why_not=lambda block: None if plain_conv2d(block.conv) else "conv was replaced",
    )


def _video(module: nn.Module, channels: int, frames: int) -> Tensor:
    return random(module, 1, channels, frames, 10, 14)


_SWAPS: Table = {
    "CogVideoXCausalConv3d": Swap(
        "causal conv with virtual padding and cache",
        conv,
        contiguous=True,
        sample=lambda m: (_video(m, m.conv.in_channels, 3),),
        exact=conv_exact,
        exact_where=lambda layer: not any(layer.conv.padding) and not any(layer.time_causal_padding),
        why_not=_why_not_conv,
        state=("pad_mode",),
    ),
    "CogVideoXSafeConv3d": Swap(
        "conv with virtual padding",
        safe_conv,
        sample=lambda m: (_video(m, m.in_channels, 3),),
        contiguous=True,
    ),
    "CogVideoXSpatialNorm3D": Swap(
        "scale and shift made from the small latent, applied in one pass",
        spatial_norm,
        sample=_norm_sample,
        why_not=_why_not_norm,
    ),
    "CogVideoXResnetBlock3D": Swap(
        "norm + SiLU in one pass, causal convs, residual fused",
        resnet_block,
        sample=_block_sample,
        why_not=_why_not_block,
        state=("pad_mode",),
    ),
    "CogVideoXEncoder3D": _network_swap(encoder),
    "CogVideoXDecoder3D": _network_swap(decoder),
}
_DOWN: Table = {
    "CogVideoXDownsample3D": _resample_swap(
        "frames averaged in place, strided conv with virtual padding", downsample
    )
}
_UP: Table = {
    "CogVideoXUpsample3D": _resample_swap(
        "upsampling folded into the conv, frames repeated after it", upsample
    )
}
