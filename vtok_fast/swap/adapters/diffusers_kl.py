"""The adapter for diffusers' image autoencoders: ``AutoencoderKL`` and whatever else is made of ``Encoder``
and ``Decoder`` of its ``vae`` module (Stable Diffusion, Flux), and for the same blocks in other models.

A batch of images is taken for the frames of one video. Within a network images stay channels-last.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_fast.dispatch.backends import Reason
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
from vtok_fast.swap.patch import Skip, Swap

LIBRARY = "diffusers.models.autoencoders.vae"
NETWORKS = {"Encoder": "conv_out", "Decoder": "conv_out"}


def propose(module: nn.Module) -> Answer:
    table = _TABLES.get(type(module).__module__)
    return None if table is None else lookup(module, table, type(module).__module__)


def as_frames(images: Tensor) -> Tensor:
    """(B, C, H, W) as a video (1, C, B, H, W)."""
    return images.unsqueeze(0).transpose(1, 2)


def as_images(frames: Tensor) -> Tensor:
    """The inverse of `as_frames`."""
    return frames.transpose(1, 2).squeeze(0)


# ---- blocks ------------------------------------------------------------------------------------------------


def resnet_block(
    block: nn.Module, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any
) -> Tensor | Skip:
    if args or kwargs:
        return Skip(f"it was called with {', '.join(kwargs) or 'more arguments'}")
    x = as_frames(input_tensor)
    h = frame_conv(block.conv1, group_norm(block.norm1, x, per_frame=True))
    modulation: dict[str, Any] = {}
    if block.time_emb_proj is not None:
        temb = block.time_emb_proj(temb if block.skip_time_act else block.nonlinearity(temb))[
            :, :, None, None
        ]
    if temb is not None and block.time_embedding_norm == "default":
        h = h + as_frames(temb)
    elif block.time_embedding_norm == "scale_shift":
        scale, shift = as_frames(temb).chunk(2, dim=1)
        modulation = {"scale": 1 + scale, "shift": shift}
    h = block.dropout(group_norm(block.norm2, h, per_frame=True, **modulation))
    shortcut = x if block.conv_shortcut is None else frame_conv(block.conv_shortcut, x)
    y = as_images(frame_conv(block.conv2, h, residual=shortcut))
    return y if block.output_scale_factor == 1 else y / block.output_scale_factor


def temporal_block(block: nn.Module, input_tensor: Tensor, temb: Tensor | None) -> Tensor:
    """``TemporalResnetBlock``, whose convolutions run over frames only."""
    h = block.conv1(group_norm(block.norm1, input_tensor))
    if block.time_emb_proj is not None:
        h = h + block.time_emb_proj(block.nonlinearity(temb))[:, :, :, None, None].permute(0, 2, 1, 3, 4)
    h = block.conv2(block.dropout(group_norm(block.norm2, h)))
    return h + (input_tensor if block.conv_shortcut is None else block.conv_shortcut(input_tensor))


def upsample(
    block: nn.Module, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any
) -> Tensor | Skip:
    if output_size is not None or args or kwargs:
        return Skip("it was called with an output size, or more arguments")
    return as_images(frame_conv(_conv_of(block), as_frames(hidden_states), upsample=(1, 2, 2)))


def downsample(block: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | Skip:
    if args or kwargs:
        return Skip(f"it was called with {', '.join(kwargs) or 'more arguments'}")
    pad = ((0, 1), (0, 1)) if block.padding == 0 else None
    return as_images(frame_conv(block.conv, as_frames(hidden_states), spatial_pad=pad))


def attention(
    attn: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | Skip:
    """``Attention`` over the pixels of each image; ``temb`` is for a norm that it does not have."""
    if encoder_hidden_states is not None or attention_mask is not None or kwargs.keys() - {"temb"}:
        return Skip("it was called with a mask, or more arguments")
    if hidden_states.dim() != 4:
        return Skip(f"its input has {hidden_states.dim()} axes")
    if why := _why_not_attention(attn):
        return Skip(why)
    b, _, height, width = hidden_states.shape
    x = as_frames(hidden_states)
    tokens = channels_last(group_norm(attn.group_norm, x, None, per_frame=True)).reshape(
        b, height * width, -1
    )
    q, k, v = (
        layer(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for layer in (attn.to_q, attn.to_k, attn.to_v)
    )
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    y = as_images(video(attn.to_out[1](attn.to_out[0](y)).reshape(1, b, height, width, -1)))
    y = y + hidden_states if attn.residual_connection else y
    return y if attn.rescale_output_factor == 1 else y / attn.rescale_output_factor


# ---- networks ----------------------------------------------------------------------------------------------


def encoder(network: nn.Module, sample: Tensor) -> Tensor:
    sample = network.conv_in(sample)
    for block in [*network.down_blocks, network.mid_block]:
        sample = _run(network, block, sample)
    return _end(network, sample)


def decoder(network: nn.Module, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor | Skip:
    if latent_embeds is not None:
        return Skip("it was called with latent_embeds")
    sample = network.conv_in(sample)
    for block in [network.mid_block, *network.up_blocks]:
        sample = _run(network, block, sample, None)
    return _end(network, sample)


def _run(network: nn.Module, block: nn.Module, *args: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() and network.gradient_checkpointing:
        return network._gradient_checkpointing_func(block, *args)
    return block(*args)


def _end(network: nn.Module, sample: Tensor) -> Tensor:
    return network.conv_out(as_images(group_norm(network.conv_norm_out, as_frames(sample), per_frame=True)))


# ---- what is proposed --------------------------------------------------------------------------------------


def _conv_of(block: nn.Module) -> nn.Module:
    return block.conv if block.name == "conv" else block.Conv2d_0


def _why_not_convs(*layers: nn.Module | None) -> Reason:
    for layer in layers:
        if layer is not None and not plain_conv2d(layer):
            return f"a convolution is a {type(layer).__name__} with more to it than this swap was made for"
    return None


def _why_not_resnet(block: nn.Module) -> Reason:
    if why := why_unlike(
        block, norm1="GroupNorm", norm2="GroupNorm", nonlinearity="SiLU", time_emb_proj=("Linear", "None")
    ):
        return why
    if block.upsample is not None or block.downsample is not None:
        return "it resamples too"
    return _why_not_convs(block.conv1, block.conv2, block.conv_shortcut)


def _why_not_temporal(block: nn.Module) -> Reason:
    return why_unlike(
        block, norm1="GroupNorm", norm2="GroupNorm", nonlinearity="SiLU", time_emb_proj=("Linear", "None")
    )


def _why_not_upsample(block: nn.Module) -> Reason:
    if block.norm is not None or block.use_conv_transpose or not block.use_conv or not block.interpolate:
        return "another upsampling than this swap was made for"
    return _why_not_convs(_conv_of(block))


def _why_not_downsample(block: nn.Module) -> Reason:
    if block.norm is not None or not block.use_conv:
        return "another downsampling than this swap was made for"
    return _why_not_convs(block.conv)


def _why_not_attention(attn: nn.Module) -> Reason:
    if (kind := type(attn.processor).__name__) != "AttnProcessor2_0":
        return f"attention with the processor {kind}, which this swap was not made for"
    if attn.spatial_norm is not None or attn.norm_q is not None or attn.norm_k is not None:
        return "attention with other norms than this swap was made for"
    return why_unlike(attn, group_norm="GroupNorm", to_q="Linear", to_k="Linear", to_v="Linear")


def _images(module: nn.Module, channels: int) -> Tensor:
    return random(module, 2, channels, 10, 14)


def _resnet_sample(block: nn.Module) -> tuple:
    width = None if block.time_emb_proj is None else block.time_emb_proj.in_features
    return _images(block, block.in_channels), None if width is None else random(block, 2, width)


def _temporal_sample(block: nn.Module) -> tuple:
    width = None if block.time_emb_proj is None else block.time_emb_proj.in_features
    x = random(block, 1, block.in_channels, 3, 10, 14)
    return x, None if width is None else random(block, 1, 3, width)


def _why_not_end(network: nn.Module) -> Reason:
    return why_unlike(network, conv_norm_out="GroupNorm", conv_act="SiLU")


def _network(function: Any) -> Swap:
    return Swap(
        "norm + SiLU in one pass before conv_out",
        function,
        covers=("conv_norm_out", "conv_act"),
        why_not=_why_not_end,
    )


_TABLES: dict[str, Table] = {
    LIBRARY: {"Encoder": _network(encoder), "Decoder": _network(decoder)},
    "diffusers.models.resnet": {
        "ResnetBlock2D": Swap(
            "norm + SiLU in one pass, convs, residual fused",
            resnet_block,
            sample=_resnet_sample,
            why_not=_why_not_resnet,
        ),
        "TemporalResnetBlock": Swap(
            "norm + SiLU in one pass",
            temporal_block,
            covers=("norm1", "norm2", "nonlinearity"),
            sample=_temporal_sample,
            why_not=_why_not_temporal,
        ),
    },
    "diffusers.models.upsampling": {
        "Upsample2D": Swap(
            "upsampling folded into the conv",
            upsample,
            sample=lambda m: (_images(m, m.channels),),
            why_not=_why_not_upsample,
        ),
    },
    "diffusers.models.downsampling": {
        "Downsample2D": Swap(
            "strided conv with virtual padding",
            downsample,
            sample=lambda m: (_images(m, m.channels),),
            why_not=_why_not_downsample,
        ),
    },
    "diffusers.models.attention_processor": {
        "Attention": lambda attn: (
            None
            if attn.group_norm is None
            else Skip(why)
            if (why := _why_not_attention(attn))
            else [Swap("norm in one pass, pixels as tokens", attention, sample=_attention_sample)]
        ),
    },
}


def _attention_sample(attn: nn.Module) -> tuple[Tensor]:
    return (_images(attn, attn.group_norm.num_channels),)
