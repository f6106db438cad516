"""The adapter for ``vtok_fast.models.VidTok``: whole blocks, so that a video stays channels-last from the
first layer to the last.

What each block gains: norm and SiLU in one pass without permutes; convolutions without padded copies, the
residual added in their epilogue; 2D and 1D blocks as 3D ones, without folding an axis into the batch; nearest
upsampling folded into the convolution that follows; the identity branch of the temporal resamplers folded
into the weights of the convolution beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vtok_fast.dispatch.backends import Reason
from vtok_fast.models.common.regularizers import FSQRegularizer, Regularized
from vtok_fast.models.vidtok import blocks
from vtok_fast.models.vidtok.networks import Decoder, Encoder, over_time, per_frame
from vtok_fast.ops.causal_conv3d import causal_conv3d
from vtok_fast.ops.fsq import fsq_quantize
from vtok_fast.ops.norm_act import norm_act
from vtok_fast.swap.adapters import vidtok_exact
from vtok_fast.swap.adapters.layers import (
    Answer,
    attention_per_frame,
    frame_conv,
    group_norm,
    judge_fsq,
    lookup,
    only_end,
    random,
)
from vtok_fast.swap.patch import Swap, runs

Caches = blocks.Caches
NETWORKS = {Encoder: "conv_out", Decoder: "conv_out"}


def propose(module: nn.Module) -> Answer:
    return lookup(module, _SWAPS)


def quantizers(model: nn.Module) -> list[tuple[nn.Module, tuple[int, ...]]]:
    """The FSQ quantizers in a model whose inputs are latents themselves, and their levels."""
    return [(m, m.levels) for m in model.modules() if isinstance(m, FSQRegularizer) and not _why_not_fsq(m)]


# ---- layers ------------------------------------------------------------------------------------------------


def norm_silu(
    norm: nn.Module, x: Tensor, *, per_frame: bool = True, activation: str | None = "silu"
) -> Tensor:
    """norm, then SiLU, on a video: LayerNorm over channels, or GroupNorm per frame or over T, H, W."""
    if isinstance(norm, blocks.LayerNorm):
        return norm_act(
            x, norm.norm.weight, norm.norm.bias, kind="layer", eps=norm.norm.eps, activation=activation
        )
    return group_norm(norm, x, activation, per_frame=per_frame)


def conv(layer: nn.Module, x: Tensor, caches: Caches | None = None, **options) -> Tensor:
    """A 1D or 3D convolution layer of VidTok, causal or not, on a video; ``options`` go to
    ``causal_conv3d``."""
    if not hasattr(layer, "time_pad"):
        inner, pads = layer, layer.padding
        time_pad, space = (pads[0], pads[0]), [(p, p) for p in pads[1:]] or [(0, 0), (0, 0)]
        front: dict = {}
    else:
        inner = layer.conv
        left, right, top, bottom = getattr(layer, "spatial_padding", (0, 0, 0, 0))
        time_pad, space = (layer.time_pad, 0), [(top, bottom), (left, right)]
        front = {"time_mode": "zeros" if layer.version == "1.0" else "replicate"}
        if caches is not None:
            front["cache"] = earlier_frames(layer, x, caches)
    # Torch.compile of torch 2.6 knows no | of dicts
    options = {
        "weight": inner.weight,
        "bias": inner.bias,
        **front,
        **options,
    }
    weight = options.pop("weight")
    if weight.dim() == 3:  # over time alone
        weight = weight[..., None, None]
    stride, dilation = (tuple(v) + (1,) * (3 - len(v)) for v in (inner.stride, inner.dilation))
    return causal_conv3d(
        x,
        weight,
        options.pop("bias"),
        stride=stride,
        dilation=dilation,
        time_pad=time_pad,
        spatial_pad=space,
        **options,
    )


def earlier_frames(layer: nn.Module, x: Tensor, caches: Caches) -> Tensor | None:
    """The frames before x, for a streamed layer, and what the next chunk will need, kept in the layer's own
    format."""
    if layer.time_pad == 0:
        caches.keep(layer, _as_layer_input(layer, x[:, :, :0]), 0)
        return None
    if caches.first:
        previous = None
        front = x[:, :, :1].expand(-1, -1, layer.time_pad, -1, -1)
        front = torch.zeros_like(front) if layer.version == "1.0" else front
    else:
        front = previous = _as_video(layer, caches.frames[layer], x)
    needed = layer.time_pad + caches.lookahead.get(layer, 0)
    # The end of "front, then x", copying only the frames that are kept.
    tail = x[:, :, -needed:] if x.shape[2] >= needed else torch.cat((front, x), 2)
    caches.keep(layer, _as_layer_input(layer, tail), layer.time_pad)
    return previous


def _as_layer_input(layer: nn.Module, x: Tensor) -> Tensor:
    if not isinstance(layer, blocks.CausalConv1d):
        return x
    return x.permute(0, 3, 4, 1, 2).flatten(0, 2)


def _as_video(layer: nn.Module, frames: Tensor, like: Tensor) -> Tensor:
    if not isinstance(layer, blocks.CausalConv1d):
        return frames
    b, _, _, h, w = like.shape
    return frames.unflatten(0, (b, h, w)).permute(0, 3, 4, 1, 2)


# ---- blocks, on whole videos (B, C, T, H, W) ---------------------------------------------------------------


def resblock2d(block: blocks.ResBlock2d, x: Tensor) -> Tensor:
    h = frame_conv(block.conv1, norm_silu(block.norm1, x))
    h = block.dropout(norm_silu(block.norm2, h))
    shortcut = (
        frame_conv(block.nin_shortcut, x, spatial_pad=((0, 0), (0, 0)))
        if hasattr(block, "nin_shortcut")
        else x
    )
    return frame_conv(block.conv2, h, residual=shortcut)


def resblock(block: blocks.ResBlock1d | blocks.ResBlock3d, x: Tensor, caches: Caches | None = None) -> Tensor:
    h = conv(block.conv1, norm_silu(block.norm1, x, per_frame=block.causal), caches)
    h = block.dropout(norm_silu(block.norm2, h, per_frame=block.causal))
    shortcut = conv(block.nin_shortcut, x) if hasattr(block, "nin_shortcut") else x
    return conv(block.conv2, h, caches, residual=shortcut)


def attention(block: blocks.FrameAttention, x: Tensor, caches: Caches | None = None) -> Tensor:
    y = norm_silu(block.norm, x, per_frame=block.causal, activation=None)
    y = attention_per_frame(*(conv(layer, y) for layer in (block.q, block.k, block.v)))
    return conv(block.proj_out, y, residual=x)


def time_down(block: blocks.TimeDown, x: Tensor, caches: Caches | None = None) -> Tensor:
    """alpha * average of 3 frames + (1 - alpha) * conv is one convolution: the average is a third on every
    temporal tap."""
    layer = block.conv.conv if block.causal else block.conv
    alpha = torch.sigmoid(block.mix_factor)
    options = {"weight": _blend_average(layer.weight, alpha), "bias": (1 - alpha) * layer.bias}
    if caches is not None:  # the pool's own cache is the last frame of the convolution's input
        caches.keep(block, x, 1)
    if block.causal:
        return conv(block.conv, x, caches, **options)
    return causal_conv3d(
        x,
        options["weight"],
        options["bias"],
        stride=layer.stride,
        time_pad=(0, 1),
        spatial_pad=((1, 1), (1, 1)),
    )


def time_up(block: blocks.TimeUp, x: Tensor, caches: Caches | None = None) -> Tensor:
    """alpha * u + (1 - alpha) * conv(u) of the upsampled u; with nearest upsampling u is never made."""
    alpha = torch.sigmoid(block.mix_factor)
    if block.mode == "nearest" and caches is None:
        return conv(block.conv, x, upsample=(2, 1, 1), residual=x, alpha=alpha)
    u = block.upsample(x, caches)
    return conv(block.conv, u, caches, residual=u, alpha=alpha)


def _blend_average(weight: Tensor, alpha: Tensor) -> Tensor:
    """(1 - alpha) * weight + alpha * the kernel of an average over time."""
    o, c, kt, kh, kw = weight.shape
    average = torch.zeros_like(weight)
    average[:, :, :, kh // 2, kw // 2] = (
        torch.eye(o, c, dtype=weight.dtype, device=weight.device).unsqueeze(-1) / kt
    )
    return (1 - alpha) * weight + alpha * average


# ---- what takes the place of each forward ------------------------------------------------------------------


def resblock2d_forward(block: blocks.ResBlock2d, x: Tensor) -> Tensor:
    return _frames(resblock2d, block, x)


def resblock1d_forward(block: blocks.ResBlock1d, x: Tensor, caches: Caches | None = None) -> Tensor:
    if x.dim() == 5:  # from run_level below
        return resblock(block, x, caches)
    # (N, C, T): the pixels as the columns of one video
    y = resblock(block, x.permute(1, 2, 0)[None, :, :, None], caches)
    return y[0, :, :, 0].permute(2, 0, 1)


def spatial_down_forward(block: blocks.SpatialDown, x: Tensor) -> Tensor:
    return _frames(lambda b, x: frame_conv(b.conv, x, spatial_pad=((0, 1), (0, 1))), block, x)


def spatial_up_forward(block: blocks.SpatialUp, x: Tensor) -> Tensor:
    return _frames(lambda b, x: frame_conv(b.conv, x, upsample=(1, 2, 2)), block, x)


def _frames(function, block: nn.Module, x: Tensor) -> Tensor:
    """Runs a function of videos on frames (N, C, H, W), as one video of N frames."""
    return function(block, x.unsqueeze(0).transpose(1, 2)).transpose(1, 2).squeeze(0)


def causal_conv3d_forward(layer: blocks.CausalConv3d, x: Tensor, caches: Caches | None = None) -> Tensor:
    return conv(layer, x, caches)


def run_level(
    network: nn.Module, spatial: nn.Module, temporal: nn.Module, x: Tensor, caches: Caches | None
) -> Tensor:
    """As the network's own, but a swapped 1D block takes the video as it is: folding pixels into the batch
    would copy it."""
    for block, over_frames in zip(spatial.block, temporal.block):
        x = per_frame(block, x)
        if runs(over_frames, resblock1d_forward, x, like=(x[..., 0, 0],)):
            x = blocks.run(over_frames, x, caches)
        else:
            x = over_time(over_frames, x, caches)
    return x


def run_out(network: nn.Module, x: Tensor, caches: Caches | None) -> Tensor:
    return blocks.run(network.conv_out, norm_silu(network.norm_out, x, per_frame=network.causal), caches)


def fsq_forward(regularizer: FSQRegularizer, z: Tensor, *, step: int | None = None) -> Regularized:
    codes, indices = fsq_quantize(z, regularizer.levels)
    loss = None
    if step is not None:
        wide = z.movedim(1, -1).unflatten(-1, (1, len(regularizer.levels)))
        wide = wide if z.dtype == torch.float64 else wide.float()
        loss = regularizer.loss(wide, codes.detach().movedim(1, -1).unsqueeze(-2).to(wide.dtype), step)
    return Regularized(codes, indices, loss)


# ---- inputs for the check ----------------------------------------------------------------------------------


def _channels(block: nn.Module) -> int:
    norm = next(getattr(block, name) for name in ("norm1", "norm", "norm_out") if hasattr(block, name))
    return norm.norm.normalized_shape[0] if isinstance(norm, blocks.LayerNorm) else norm.num_channels


def _conv_channels(block: nn.Module) -> int:
    return next(m for m in block.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))).in_channels


def _why_not_resblock1d(block: blocks.ResBlock1d) -> Reason:
    per_channel = isinstance(block.norm1, blocks.LayerNorm)
    return None if per_channel else "GroupNorm over a single pixel's channels has no kernel"


def _why_not_time_down(block: blocks.TimeDown) -> Reason:
    half = block.mix_factor.dtype in (torch.float16, torch.bfloat16)
    return "a pool folded into 16-bit weights would be rounded twice" if half else None


def _why_not_fsq(regularizer: FSQRegularizer) -> Reason:
    plain = regularizer.num_codebooks == 1 and not isinstance(regularizer.project_in, nn.Linear)
    return None if plain else "several codebooks, or projections around them"


_NETWORK = (
    Swap("levels without relayouts", run_level, "run_level", covers=(), inner=True),
    Swap(
        "norm + SiLU in one pass before conv_out",
        run_out,
        "run_out",
        contiguous=True,
        covers=("norm_out",),
        probe=only_end,
        sample=lambda m: (random(m.conv_out, 1, _channels(m), 4, 10, 14), None),
        exact=vidtok_exact.run_out,
    ),
)
_SWAPS: dict[type, Swap | tuple[Swap, ...]] = {
    Encoder: _NETWORK,
    Decoder: _NETWORK,
    blocks.ResBlock2d: Swap(
        "norm + SiLU in one pass, 3x3 convs, residual fused",
        resblock2d_forward,
        sample=lambda m: (random(m, 2, _channels(m), 10, 14),),
        exact=vidtok_exact.resblock2d,
    ),
    blocks.ResBlock1d: Swap(
        "norm + SiLU in one pass, temporal convs, residual fused",
        resblock1d_forward,
        sample=lambda m: (random(m, 70, _channels(m), 5),),
        exact=vidtok_exact.resblock1d,
        why_not=_why_not_resblock1d,
    ),
    blocks.ResBlock3d: Swap(
        "norm + SiLU in one pass, 3x3x3 convs, residual fused",
        resblock,
        sample=lambda m: (random(m, 1, _channels(m), 4, 10, 14),),
        exact=vidtok_exact.resblock3d,
    ),
    blocks.FrameAttention: Swap(
        "norm, projections and residual fused",
        attention,
        sample=lambda m: (random(m, 1, _channels(m), 2, 10, 14),),
        exact=vidtok_exact.attention,
    ),
    blocks.SpatialDown: Swap(
        "strided conv with virtual padding",
        spatial_down_forward,
        sample=lambda m: (random(m, 2, _conv_channels(m), 10, 14),),
    ),
    blocks.SpatialUp: Swap(
        "upsampling folded into the conv",
        spatial_up_forward,
        sample=lambda m: (random(m, 2, _conv_channels(m), 10, 14),),
    ),
    blocks.TimeDown: Swap(
        "pool folded into the conv",
        time_down,
        sample=lambda m: (random(m, 1, _conv_channels(m), 4, 10, 14),),
        why_not=_why_not_time_down,
    ),
    blocks.TimeUp: Swap(
        "upsampling folded into the conv, blend fused",
        time_up,
        sample=lambda m: (random(m, 1, _conv_channels(m), 3, 10, 14),),
        exact=vidtok_exact.time_up,
    ),
    blocks.CausalConv3d: Swap(
        "conv with virtual padding",
        causal_conv3d_forward,
        contiguous=True,
        sample=lambda m: (random(m, 1, m.conv.in_channels, 4, 10, 14),),
        exact=vidtok_exact.causal_conv3d,
    ),
    FSQRegularizer: Swap(
        "thresholds instead of tanh and rounding",
        fsq_forward,
        contiguous=True,
        sample=lambda m: (random(m, 1, len(m.levels), 4, 10, 14),),
        exact=vidtok_exact.fsq,
        judge=judge_fsq,
        why_not=_why_not_fsq,
    ),
}
