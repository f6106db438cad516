"""The adapter for diffusers' ``AutoencoderKLWan`` (2.1 and 2.2).

Its feature cache is a list that the blocks change in place, in the order in which they are visited; an entry
is None, the string "Rep", or the last frames that a causal convolution got. All of that stays: a swapped and
an unswapped block can take turns on one list. What goes: the padded input, the concatenation with the cache,
norms in six kernels, upsampled frames,
    clones of whole chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_fast.dispatch.backends import Reason
from vtok_fast.ops.norm_act import norm_act
from vtok_fast.swap.adapters.layers import (
    Answer,
    Table,
    channels_last,
    frame_conv,
    lookup,
    plain_conv2d,
    random,
    video,
    why_unlike,
)
from vtok_fast.swap.adapters.padding import Rule, exact, virtual
from vtok_fast.swap.patch import Skip, Swap

LIBRARY = "diffusers.models.autoencoders.autoencoder_kl_wan"
KEPT = 2  # frames that a cache entry holds
NETWORKS = {"WanEncoder3d": "conv_out", "WanDecoder3d": "conv_out"}


def propose(module: nn.Module) -> Answer:
    return lookup(module, _SWAPS, LIBRARY)


# ---- layers ------------------------------------------------------------------------------------------------


def rule(layer: nn.Module) -> Rule:
    left, right, top, bottom, front, back = layer._padding  # ``padding`` itself is zero after the constructor
    return Rule(((front, back), (top, bottom), (left, right)))


def conv(layer: nn.Module, x: Tensor, cache_x: Tensor | None = None, **options) -> Tensor:
    """``WanCausalConv3d``: zeros in front, or earlier frames; a cache of fewer frames than that has zeros
    before it."""
    cache = cache_x.to(x.device) if cache_x is not None and layer._padding[4] > 0 else None
    return virtual(layer, x, rule(layer), cache, **options)


def conv_exact(layer: nn.Module, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    return exact(
        layer, x, rule(layer), cache_x.to(x.device) if cache_x is not None and layer._padding[4] > 0 else None
    )


def cached_conv(
    layer: nn.Module, x: Tensor, feat_cache: list | None, feat_idx: list, *, owned: bool = True, **options
) -> Tensor:
    """A convolution with its slot in the feature cache, which may hold ``x`` itself where that is
    ``owned``."""
    if feat_cache is None:
        return conv(layer, x, **options)
    slot = feat_idx[0]
    before = feat_cache[slot]
    y = conv(layer, x, before, **options)
    enough = x.shape[2] == KEPT or x.shape[2] < KEPT and before is None
    feat_cache[slot] = x if owned and enough else last_frames(x, before)
    feat_idx[0] += 1
    return y


def last_frames(x: Tensor, before: Tensor | None) -> Tensor:
    """A copy of the last two frames of what came before and ``x``; a view would keep all of ``x``."""
    if x.shape[2] >= KEPT or before is None:
        return x[:, :, -KEPT:].clone()
    return torch.cat([before[:, :, -1:].to(x.device), x], 2)


def rms(norm: nn.Module, x: Tensor, activation: str | None = None) -> Tensor:
    """``WanRMS_norm`` on a video. Its floor of 1e-12 under the norm of a pixel becomes an eps of the same
    size."""
    bias = norm.bias.view(-1) if isinstance(norm.bias, Tensor) else None
    return norm_act(x, norm.gamma.view(-1), bias, kind="rms", eps=1e-24 / x.shape[1], activation=activation)


def rms_forward(norm: nn.Module, x: Tensor) -> Tensor:
    if x.dim() == 4:  # frames of images
        return rms(norm, x.unsqueeze(0).transpose(1, 2)).transpose(1, 2).squeeze(0)
    return rms(norm, x)


# ---- blocks ------------------------------------------------------------------------------------------------


def residual_block(
    block: nn.Module, x: Tensor, feat_cache: list | None = None, feat_idx: list | None = None
) -> Tensor:
    feat_idx = [0] if feat_idx is None else feat_idx
    h = cached_conv(block.conv1, rms(block.norm1, x, "silu"), feat_cache, feat_idx)
    h = block.dropout(rms(block.norm2, h, "silu"))
    shortcut = x if isinstance(block.conv_shortcut, nn.Identity) else conv(block.conv_shortcut, x)
    return cached_conv(block.conv2, h, feat_cache, feat_idx, residual=shortcut)


def attention(block: nn.Module, x: Tensor) -> Tensor:
    b, c, t, h, w = x.shape
    qkv = channels_last(frame_conv(block.to_qkv, rms(block.norm, x))).reshape(b, t, h * w, 3 * c)
    y = F.scaled_dot_product_attention(*qkv.chunk(3, -1))
    return frame_conv(block.proj, video(y.reshape(b, t, h, w, c)), residual=x)


def upsample(
    block: nn.Module, x: Tensor, feat_cache: list | None = None, feat_idx: list | None = None
) -> Tensor:
    if block.mode == "upsample3d" and feat_cache is not None:
        x = _upsample_time(block, x, feat_cache, feat_idx)
    return frame_conv(block.resample[1], x, upsample=(1, 2, 2))


def _upsample_time(block: nn.Module, x: Tensor, feat_cache: list, feat_idx: list | None) -> Tensor:
    """Twice the frames, except for the first chunk, which only leaves its mark."""
    feat_idx = [0] if feat_idx is None else feat_idx
    slot = feat_idx[0]
    before = feat_cache[slot]
    if before is None:
        feat_cache[slot] = "Rep"
        feat_idx[0] += 1
        return x
    first = isinstance(before, str)
    y = conv(block.time_conv, x, None if first else before)
    # A single frame has zeros before it there
    feat_cache[slot] = last_frames(x, torch.zeros_like(x) if first else before)
    feat_idx[0] += 1
    b, _, t, h, w = y.shape
    # Channels (2, C) become frames (T, 2): one copy, and the frames stay channels-last.
    return video(
        channels_last(y).reshape(b, t, h, w, 2, -1).permute(0, 1, 4, 2, 3, 5).reshape(b, 2 * t, h, w, -1)
    )


def downsample(
    block: nn.Module, x: Tensor, feat_cache: list | None = None, feat_idx: list | None = None
) -> Tensor:
    y = frame_conv(block.resample[1], x, spatial_pad=((0, 1), (0, 1)))
    if block.mode == "downsample3d" and feat_cache is not None:
        feat_idx = [0] if feat_idx is None else feat_idx
        slot = feat_idx[0]
        before, last = feat_cache[slot], y[:, :, -1:].clone()  # only the last frame is ever read
        if before is not None:  # the first chunk keeps its frames
            y = virtual(block.time_conv, y, Rule(((1, 0), (0, 0), (0, 0))), before[:, :, -1:])
        feat_cache[slot] = last
        feat_idx[0] += 1
    return y


def residual_down(
    block: nn.Module, x: Tensor, feat_cache: list | None = None, feat_idx: list | None = None
) -> Tensor:
    """As the block's own, without the clone of its input: nothing in it writes there."""
    feat_idx = [0] if feat_idx is None else feat_idx
    y = x
    for part in [*block.resnets, block.downsampler]:
        y = y if part is None else part(y, feat_cache=feat_cache, feat_idx=feat_idx)
    return y + block.avg_shortcut(x)


def residual_up(
    block: nn.Module,
    x: Tensor,
    feat_cache: list | None = None,
    feat_idx: list | None = None,
    first_chunk: bool = False,
) -> Tensor:
    """As the block's own, without the clone of its input."""
    feat_idx = [0] if feat_idx is None else feat_idx
    y = x
    for part in [*block.resnets, block.upsampler]:
        y = y if part is None else part(y, feat_cache=feat_cache, feat_idx=feat_idx)
    return y if block.avg_shortcut is None else y + block.avg_shortcut(x, first_chunk=first_chunk)


def encoder(
    network: nn.Module, x: Tensor, feat_cache: list | None = None, feat_idx: list | None = None
) -> Tensor:
    feat_idx = [0] if feat_idx is None else feat_idx
    x = cached_conv(network.conv_in, x, feat_cache, feat_idx, owned=False)
    for layer in network.down_blocks:
        x = layer(x) if feat_cache is None else layer(x, feat_cache=feat_cache, feat_idx=feat_idx)
    x = network.mid_block(x, feat_cache=feat_cache, feat_idx=feat_idx)
    return cached_conv(network.conv_out, rms(network.norm_out, x, "silu"), feat_cache, feat_idx)


def decoder(
    network: nn.Module,
    x: Tensor,
    feat_cache: list | None = None,
    feat_idx: list | None = None,
    first_chunk: bool = False,
) -> Tensor:
    feat_idx = [0] if feat_idx is None else feat_idx
    x = cached_conv(network.conv_in, x, feat_cache, feat_idx, owned=False)
    x = network.mid_block(x, feat_cache=feat_cache, feat_idx=feat_idx)
    for block in network.up_blocks:
        x = block(x, feat_cache=feat_cache, feat_idx=feat_idx, first_chunk=first_chunk)
    return cached_conv(network.conv_out, rms(network.norm_out, x, "silu"), feat_cache, feat_idx)


# ---- what is proposed --------------------------------------------------------------------------------------


def _why_not_conv(layer: nn.Module) -> Reason:
    if layer.padding != (0, 0, 0) or layer.padding_mode != "zeros" or layer._padding[5]:
        return "its padding was changed after construction"
    return None


def _conv_sample(layer: nn.Module) -> tuple:
    frames, cached = max(2, layer.kernel_size[0]), layer._padding[4]
    return _video(layer, layer.in_channels, frames), _video(layer, layer.in_channels) if cached else None


def _norm_sample(norm: nn.Module) -> tuple[Tensor]:
    channels = norm.gamma.numel()
    return (random(norm, 2, channels, 6, 7) if norm.gamma.dim() == 3 else _video(norm, channels),)


def _why_not_block(prefix: str, block: nn.Module) -> Reason:
    norm, conv = f"{prefix}RMS_norm", f"{prefix}CausalConv3d"
    return why_unlike(
        block,
        norm1=norm,
        norm2=norm,
        conv1=conv,
        conv2=conv,
        nonlinearity="SiLU",
        conv_shortcut=(conv, "Identity"),
    )


def _block_sample(block: nn.Module) -> tuple:
    return _video(block, block.in_dim), [_video(block, block.in_dim), _video(block, block.out_dim)], [0]


def _propose_resample(prefix: str, block: nn.Module) -> Answer:
    if block.mode not in ("upsample2d", "upsample3d", "downsample2d", "downsample3d"):
        return None
    up = block.mode.startswith("up")
    first, layer = block.resample
    if (
        type(first).__name__ != (f"{prefix}Upsample" if up else "ZeroPad2d")
        or not plain_conv2d(layer)
        or ("3d" in block.mode and why_unlike(block, time_conv=f"{prefix}CausalConv3d"))
    ):
        return Skip("its parts were replaced")
    if (
        (first.mode, first.scale_factor) != ("nearest-exact", (2.0, 2.0))
        if up
        else tuple(first.padding) != (0, 1, 0, 1)
    ):
        return Skip("another resampling than this swap was made for")
    what = "upsampling folded into the conv" if up else "strided conv with virtual padding"
    return [Swap(what, upsample if up else downsample, sample=_resample_sample)]


def _resample_sample(block: nn.Module) -> tuple:
    x = _video(block, block.dim)
    if "2d" in block.mode:
        return (x,)
    kept = _video(block, block.dim) if block.mode == "upsample3d" else random(block, 1, block.dim, 1, 5, 7)
    return x, [kept], [0]


def network(function: Callable[..., Tensor], prefix: str = "Wan") -> Swap:
    """The swap of an encoder or a decoder that is made of the classes whose names begin so."""
    conv = f"{prefix}CausalConv3d"
    return Swap(
        "norm + SiLU in one pass before conv_out",
        function,
        covers=("conv_in", "norm_out", "conv_out", "nonlinearity"),
        why_not=lambda network: why_unlike(
            network, norm_out=f"{prefix}RMS_norm", conv_in=conv, conv_out=conv, nonlinearity="SiLU"
        ),
    )


def _video(module: nn.Module, channels: int, frames: int = 2) -> Tensor:
    return random(module, 1, channels, frames, 10, 14)


def blocks(prefix: str) -> Table:
    """What is swapped in the blocks whose classes' names begin so."""
    return {
        f"{prefix}CausalConv3d": Swap(
            "causal conv with virtual padding and cache",
            conv,
            sample=_conv_sample,
            contiguous=True,
            exact=conv_exact,
            exact_where=lambda layer: not any(layer._padding),
            why_not=_why_not_conv,
        ),
        f"{prefix}RMS_norm": Swap(
            "norm in one pass",
            rms_forward,
            sample=_norm_sample,
            why_not=lambda norm: (
                None if norm.channel_first else "channels last: only used on pixels, not on videos"
            ),
        ),
        f"{prefix}ResidualBlock": Swap(
            "norm + SiLU in one pass, causal convs, residual fused",
            residual_block,
            sample=_block_sample,
            why_not=partial(_why_not_block, prefix),
        ),
        f"{prefix}AttentionBlock": Swap(
            "norm in one pass, projections and residual fused",
            attention,
            sample=lambda m: (_video(m, m.dim),),
            why_not=lambda block: why_unlike(block, norm=f"{prefix}RMS_norm", to_qkv="Conv2d", proj="Conv2d"),
        ),
        f"{prefix}Resample": partial(_propose_resample, prefix),
    }


_SWAPS: Table = {
    **blocks("Wan"),
    "WanResidualDownBlock": Swap("no clone of the input", residual_down, covers=(), exact=residual_down),
    "WanResidualUpBlock": Swap("no clone of the input", residual_up, covers=(), exact=residual_up),
    "WanEncoder3d": network(encoder),
    "WanDecoder3d": network(decoder),
}
