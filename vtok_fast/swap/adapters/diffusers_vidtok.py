"""The adapter for diffusers' ``AutoencoderVidTok``.

Its causal layers keep their state on themselves: ``causal_cache`` (as shipped a clone of the whole padded
input), ``is_first_chunk`` and ``cache_offset``. All three keep their meaning, but a cache holds only the
frames that will be read, and a video that is processed whole leaves none behind. Within a network the video
stays channels-last: neither frames nor pixels are folded into the batch by a copy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_fast.dispatch.backends import Reason
from vtok_fast.ops.causal_conv3d import causal_conv3d
from vtok_fast.ops.fsq import fsq_quantize
from vtok_fast.ops.norm_act import norm_act
from vtok_fast.parity import Parity
from vtok_fast.swap.adapters.fsq_parity import compare
from vtok_fast.swap.adapters.layers import (
    Answer,
    Table,
    attention_per_frame,
    channels_last,
    frame_conv,
    lookup,
    plain_conv2d,
    random,
    video,
    why_unlike,
)
from vtok_fast.swap.adapters.padding import MODES
from vtok_fast.swap.patch import CHECKPOINTING, EVERYTHING, Skip, Swap, runs

LIBRARY = "diffusers.models.autoencoders.autoencoder_vidtok"
CONVS_3D, CONVS_1D = ("VidTokCausalConv3d", "Conv3d"), ("VidTokCausalConv1d", "Conv1d")

_local = threading.local()  # .whole: the clip is processed whole in this thread, so that no cache is read
_CHUNK = ("causal_cache", "is_first_chunk", "cache_offset", "enable_cached")  # read at each call
NETWORKS = {"VidTokEncoder3D": "conv_out", "VidTokDecoder3D": "conv_out"}


def propose(module: nn.Module) -> Answer:
    return lookup(module, _SWAPS, LIBRARY)


def quantizers(model: nn.Module) -> list[tuple[nn.Module, tuple[int, ...]]]:
    """The FSQ quantizers in a model whose inputs are latents themselves, and their levels."""
    return [
        (m, tuple(m._levels.tolist()))
        for m in model.modules()
        if type(m).__module__ == LIBRARY
        and type(m).__name__ == "FSQRegularizer"
        and isinstance(_propose_fsq(m), list)
    ]


# ---- layers, on videos (B, C, T, H, W) ---------------------------------------------------------------------


def conv(layer: nn.Module, x: Tensor, **options) -> Tensor:
    """A 1D (over time) or 3D convolution, causal or not; ``options`` go to ``causal_conv3d``."""
    if not hasattr(layer, "time_pad"):
        time, *space = [(p, p) for p in layer.padding]
        return causal_conv3d(
            x,
            _weight(layer),
            layer.bias,
            stride=_triple(layer.stride),
            dilation=_triple(layer.dilation),
            time_pad=time,
            spatial_pad=space or ((0, 0), (0, 0)),
            **options,
        )
    inner, pad = layer.conv, layer.time_pad
    left, right, top, bottom, *_ = getattr(layer, "spatial_padding", (0,) * 6)
    before = (
        None if layer.is_first_chunk or pad == 0 else _as_video(layer, layer.causal_cache[:, :, -pad:], x)
    )
    options = {"weight": _weight(inner), "bias": inner.bias, **options}
    y = causal_conv3d(
        x,
        options.pop("weight"),
        options.pop("bias"),
        stride=_triple(inner.stride),
        dilation=_triple(inner.dilation),
        time_pad=(pad, 0),
        time_mode="replicate",
        spatial_pad=((top, bottom), (left, right)),
        spatial_mode=MODES[getattr(layer, "pad_mode", "constant")],
        cache=before,
        **options,
    )
    if not getattr(_local, "whole", False):
        layer.causal_cache = _as_layer_input(layer, _kept(layer, x, before))
    return y


def _kept(layer: nn.Module, x: Tensor, before: Tensor | None) -> Tensor:
    """A copy of the frames that stand before the next chunk, which begins ``cache_offset`` frames before the
    end of this one."""
    pad, end = layer.time_pad, x.shape[2] - layer.cache_offset
    if end < pad:
        front = x[:, :, :1].expand(-1, -1, pad, -1, -1) if before is None else before
        x, end = torch.cat([front, x], 2), end + pad
    return x[:, :, end - pad : end].clone()


def _weight(conv: nn.Module) -> Tensor:
    return conv.weight if conv.weight.dim() == 5 else conv.weight[..., None, None]


def _triple(values: tuple[int, ...]) -> tuple[int, ...]:
    return (*values, 1, 1)[:3]


def _as_layer_input(layer: nn.Module, x: Tensor) -> Tensor:
    return x if layer.conv.weight.dim() == 5 else x.permute(0, 3, 4, 1, 2).flatten(0, 2)


def _as_video(layer: nn.Module, frames: Tensor, like: Tensor) -> Tensor:
    if layer.conv.weight.dim() == 5:
        return frames
    b, _, _, h, w = like.shape
    return frames.unflatten(0, (b, h, w)).permute(0, 3, 4, 1, 2)


def norm_silu(norm: nn.Module, x: Tensor, activation: str | None = "silu") -> Tensor:
    return norm_act(
        x, norm.norm.weight, norm.norm.bias, kind="layer", eps=norm.norm.eps, activation=activation
    )


# ---- blocks ------------------------------------------------------------------------------------------------


def resnet_block(block: nn.Module, x: Tensor, temb: Tensor | None = None) -> Tensor:
    """On a video, and as shipped on frames (N, C, H, W) or on pixels (N, C, T)."""
    if temb is not None:
        return type(block).forward(block, x, temb)
    if x.dim() == 4:
        return resnet_block(block, x.unsqueeze(0).transpose(1, 2)).transpose(1, 2).squeeze(0)
    if x.dim() == 3:  # the pixels as the columns of one video
        return resnet_block(block, x.permute(1, 2, 0)[None, :, :, None])[0, :, :, 0].permute(2, 0, 1)
    run = frame_conv if type(block.conv1) is nn.Conv2d else conv
    h = run(block.conv1, norm_silu(block.norm1, x))
    h = block.dropout(norm_silu(block.norm2, h))
    if block.in_channels != block.out_channels:
        x = run(block.conv_shortcut if block.use_conv_shortcut else block.nin_shortcut, x)
    return run(block.conv2, h, residual=x)


def attention(block: nn.Module, x: Tensor) -> Tensor:
    y = norm_silu(block.norm, x, None)
    return conv(
        block.proj_out,
        attention_per_frame(*(conv(layer, y) for layer in (block.q, block.k, block.v))),
        residual=x,
    )


def space_down(block: nn.Module, x: Tensor) -> Tensor:
    return (
        frame_conv(block.conv, x.unsqueeze(0).transpose(1, 2), spatial_pad=((0, 1), (0, 1)))
        .transpose(1, 2)
        .squeeze(0)
    )


def space_up(block: nn.Module, x: Tensor) -> Tensor:
    return (
        frame_conv(block.conv, x.unsqueeze(0).transpose(1, 2), upsample=(1, 2, 2)).transpose(1, 2).squeeze(0)
    )


def time_down(block: nn.Module, x: Tensor) -> Tensor:
    """alpha * average of 3 frames + (1 - alpha) * conv is one convolution: the average is a third on every
    temporal tap."""
    alpha = torch.sigmoid(block.mix_factor)
    layer = block.conv.conv if block.is_causal else block.conv
    average = torch.zeros_like(layer.weight)
    average[:, :, :, 1, 1] = (
        torch.eye(*layer.weight.shape[:2], dtype=average.dtype, device=average.device).unsqueeze(-1) / 3
    )
    options = {"weight": (1 - alpha) * layer.weight + alpha * average, "bias": (1 - alpha) * layer.bias}
    if block.is_causal:
        if not getattr(_local, "whole", False):
            block.causal_cache = x[:, :, -1:].clone()
        return conv(block.conv, x, **options)
    return causal_conv3d(x, **options, stride=layer.stride, time_pad=(0, 1), spatial_pad=((1, 1), (1, 1)))


def time_up(block: nn.Module, x: Tensor) -> Tensor:
    """alpha * u + (1 - alpha) * conv(u) of twice the frames u."""
    alpha = torch.sigmoid(block.mix_factor)
    if not block.is_causal:
        return conv(block.conv, x, upsample=(2, 1, 1), residual=x, alpha=alpha)
    u = _twice(block, x)
    return conv(block.conv, u, residual=u, alpha=alpha)


def _twice(block: nn.Module, x: Tensor) -> Tensor:
    """The block's upsampling in time: its first frames, and each chunk, by themselves."""
    grow, first = block.num_temp_upsample, block.is_first_chunk
    if not block.enable_cached:
        return _double(x, block.interpolation_mode)
    if not first:
        x = torch.cat([block.causal_cache, x], 2)
        block.causal_cache = x[:, :, -2 * grow : -grow].clone()
        return _double(x, block.interpolation_mode)[:, :, 2 * grow :]
    if not getattr(_local, "whole", False):
        block.causal_cache = x[:, :, -grow:].clone()
    parts = [
        _double(part, block.interpolation_mode) for part in (x[:, :, :grow], x[:, :, grow:]) if part.shape[2]
    ]
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


def _double(x: Tensor, mode: str) -> Tensor:
    """Linear interpolation to twice the frames, each at a quarter of the way: computed in float32 as shipped,
    but channels-last."""
    if mode != "trilinear":
        return F.interpolate(x.float(), scale_factor=[2.0, 1.0, 1.0], mode=mode).to(x.dtype)
    y = channels_last(x)
    wide = y if y.dtype == torch.float64 else y.float()
    u = torch.empty((*y.shape[:2], 2, *y.shape[2:]), dtype=x.dtype, device=x.device)
    u[:, 0, 0], u[:, -1, 1] = y[:, 0], y[:, -1]
    u[:, 1:, 0] = torch.lerp(wide[:, :-1], wide[:, 1:], 0.75)
    u[:, :-1, 1] = torch.lerp(wide[:, :-1], wide[:, 1:], 0.25)
    return video(u.flatten(1, 2))


# ---- networks and the model --------------------------------------------------------------------------------


def encoder(network: nn.Module, x: Tensor) -> Tensor:
    if torch.is_grad_enabled() and network.gradient_checkpointing:
        return type(network).forward(network, x)
    x = network.conv_in(x)
    for i in range(network.num_resolutions):
        down, down_temporal = network.down[i], network.down_temporal[i]
        x = _blocks(down.block, down_temporal.block, x)
        if i in network.spatial_ds:
            x = _over_frames(down.downsample, x)
            if i in network.tempo_ds:
                x = down_temporal.downsample(x)
    x = network.mid.block_2(network.mid.attn_1(network.mid.block_1(x, None)), None)
    return network.conv_out(norm_silu(network.norm_out, x))


def decoder(network: nn.Module, z: Tensor) -> Tensor:
    if torch.is_grad_enabled() and network.gradient_checkpointing:
        return type(network).forward(network, z)
    x = network.conv_in(z)
    x = network.mid.block_2(network.mid.attn_1(network.mid.block_1(x, None)), None)
    for i in reversed(range(network.num_resolutions)):
        up, up_temporal = network.up[i], network.up_temporal[i]
        x = _blocks(up.block, up_temporal.block, x)
        if i in network.spatial_us:
            x = _over_frames(up.upsample, x)
            if i in network.tempo_us:
                x = up_temporal.upsample(x)
    return network.conv_out(norm_silu(network.norm_out, x))


def _blocks(over_frames: nn.ModuleList, over_time: nn.ModuleList, x: Tensor) -> Tensor:
    for spatial, temporal in zip(over_frames, over_time):
        x = _over_frames(spatial, x, None)
        if runs(temporal, resnet_block, x, like=(x[..., 0, 0], None)):
            x = temporal(x, None)
        else:
            b, _, _, h, w = x.shape
            x = (
                temporal(x.permute(0, 3, 4, 1, 2).flatten(0, 2), None)
                .unflatten(0, (b, h, w))
                .permute(0, 3, 4, 1, 2)
            )
    return x


def _over_frames(module: nn.Module, x: Tensor, *args: None) -> Tensor:
    """A module of frames (N, C, H, W) on a video, which it sees as a view where that is channels-last."""
    return (
        module(x.transpose(1, 2).flatten(0, 1), *args).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
    )


def encode(model: nn.Module, x: Tensor) -> Tensor:
    with _state(model, model.encoder):
        return type(model)._encode(model, x)


def decode(model: nn.Module, z: Tensor, decode_from_indices: bool = False) -> Tensor:
    with _state(model, model.decoder):
        return type(model)._decode(model, z, decode_from_indices)


@contextmanager
def _state(model: nn.Module, network: nn.Module) -> Iterator[None]:
    """Keeps no caches for a clip that is processed whole, and leaves none behind, also after an exception."""
    before, _local.whole = getattr(_local, "whole", False), not model.use_tiling
    try:
        yield
    finally:
        _local.whole = before
        model._empty_causal_cached(network)


# ---- what is proposed --------------------------------------------------------------------------------------


def _why_not_causal_conv(layer: nn.Module) -> Reason:
    why = why_unlike(layer, conv=("Conv1d", "Conv3d"))
    if not why and (
        any(layer.conv.padding)
        or layer.conv.groups != 1
        or getattr(layer, "pad_mode", "constant") not in MODES
    ):
        why = "its convolution pads or groups by itself"
    return why


def _conv_forward(layer: nn.Module, x: Tensor) -> Tensor:
    if x.dim() == 3:
        return conv(layer, x.permute(1, 2, 0)[None, :, :, None])[0, :, :, 0].permute(2, 0, 1)
    return conv(layer, x)


def _conv_sample(layer: nn.Module) -> tuple[Tensor]:
    c = layer.conv.in_channels
    return (random(layer, 70, c, 5) if layer.conv.weight.dim() == 3 else random(layer, 1, c, 4, 10, 14),)


def _why_not_block(block: nn.Module) -> Reason:
    kinds = next((k for k in (CONVS_1D, CONVS_3D, ("Conv2d",)) if type(block.conv1).__name__ in k), ())
    shortcut = (
        ("conv_shortcut" if block.use_conv_shortcut else "nin_shortcut",)
        if block.in_channels != block.out_channels
        else ()
    )
    return why_unlike(
        block,
        conv1=kinds,
        conv2=kinds,
        norm1="VidTokLayerNorm",
        norm2="VidTokLayerNorm",
        nonlinearity="SiLU",
        **dict.fromkeys(shortcut, kinds),
    )


def _block_sample(block: nn.Module) -> tuple[Tensor, None]:
    size = {
        3: (70, block.in_channels, 5),
        4: (2, block.in_channels, 10, 14),
        5: (1, block.in_channels, 4, 10, 14),
    }
    inner = getattr(block.conv1, "conv", block.conv1)
    return random(block, *size[inner.weight.dim()]), None


def _why_not_attention(block: nn.Module) -> Reason:
    return why_unlike(block, norm="VidTokLayerNorm", q=CONVS_3D, k=CONVS_3D, v=CONVS_3D, proj_out=CONVS_3D)


def _space_swap(what: str, function: Callable[..., Tensor]) -> Swap:
    return Swap(
        what,
        function,
        sample=lambda m: (random(m, 2, m.in_channels, 10, 14),),
        why_not=lambda block: None if plain_conv2d(block.conv) else "conv was replaced",
    )


def _why_not_time(block: nn.Module) -> Reason:
    return why_unlike(block, conv=CONVS_3D)


def _why_not_time_down(block: nn.Module) -> Reason:
    if why := _why_not_time(block):
        return why
    if block.mix_factor.dtype in (torch.float16, torch.bfloat16):
        return "a pool folded into 16-bit weights would be rounded twice"
    return None


def _time_sample(block: nn.Module) -> tuple[Tensor]:
    return (random(block, 1, getattr(block.conv, "conv", block.conv).in_channels, 4, 10, 14),)


def _network_swap(function: Callable[..., Tensor]) -> Swap:
    return Swap(
        "levels without relayouts, norm + SiLU in one pass before conv_out",
        function,
        covers=("norm_out", "nonlinearity"),
        state=CHECKPOINTING,
        why_not=lambda network: why_unlike(network, norm_out="VidTokLayerNorm", nonlinearity="SiLU"),
    )


def _propose_fsq(regularizer: nn.Module) -> list[Swap] | Skip:
    levels = tuple(regularizer._levels.tolist())
    if regularizer.num_codebooks > 1 or regularizer.has_projections or regularizer.keep_num_codebooks_dim:
        return Skip("several codebooks, or projections around them")
    if not all(2 <= level <= 25 for level in levels):
        return Skip(f"levels {list(levels)}: above 25 the library truncates some indices to wrong ones")

    def forward(regularizer: nn.Module, z: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(fsq_quantize(z, levels, dim=1 if z.dim() >= 4 else -1))

    def judge(fast: tuple, eager: tuple, z: Tensor) -> Parity:
        return compare(z, levels, 1 if z.dim() >= 4 else -1, fast[1], eager[1])

    return [
        Swap(
            "thresholds instead of tanh and rounding",
            forward,
            reference=lambda m, z: z,
            judge=judge,
            sample=lambda m: (torch.randn(1, len(levels), 4, 10, 14, device=m._levels.device) * 2,),
        )
    ]


_CONV = Swap(
    "causal conv with virtual padding and a short cache",
    _conv_forward,
    sample=_conv_sample,
    contiguous=True,
    why_not=_why_not_causal_conv,
    state=_CHUNK,
)
_SWAPS: Table = {
    "VidTokCausalConv1d": _CONV,
    "VidTokCausalConv3d": _CONV,
    "VidTokResnetBlock": Swap(
        "norm + SiLU in one pass, convs, residual fused",
        resnet_block,
        sample=_block_sample,
        why_not=_why_not_block,
        state=_CHUNK,
    ),
    "VidTokAttnBlock": Swap(
        "norm, projections and residual fused",
        attention,
        sample=lambda m: (random(m, 1, m.norm.norm.normalized_shape[0], 2, 10, 14),),
        why_not=_why_not_attention,
        state=_CHUNK,
    ),
    "VidTokDownsample2D": _space_swap("strided conv with virtual padding", space_down),
    "VidTokUpsample2D": _space_swap("upsampling folded into the conv", space_up),
    "VidTokDownsample3D": Swap(
        "pool folded into the conv",
        time_down,
        sample=_time_sample,
        why_not=_why_not_time_down,
        state=_CHUNK,
    ),
    "VidTokUpsample3D": Swap(
        "interpolation without relayouts, blend fused",
        time_up,
        sample=_time_sample,
        why_not=_why_not_time,
        state=_CHUNK,
    ),
    "VidTokEncoder3D": _network_swap(encoder),
    "VidTokDecoder3D": _network_swap(decoder),
    "AutoencoderVidTok": (
        Swap("no cache kept that is not read", encode, "_encode", covers=(), exact=encode, state=EVERYTHING),
        Swap("no cache kept that is not read", decode, "_decode", covers=(), exact=decode, state=EVERYTHING),
    ),
    "FSQRegularizer": _propose_fsq,
}
