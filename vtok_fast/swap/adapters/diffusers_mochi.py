"""The adapter for diffusers' ``AutoencoderKLMochi``: CogVideoX's convolutions with replicated edges, and
norms of each frame, which the library takes of chunks of frames that it then joins again."""

from __future__ import annotations

from torch import Tensor, nn

from vtok_fast.dispatch.backends import Reason
from vtok_fast.swap.adapters.diffusers_cogvideox import Cache, convolve
from vtok_fast.swap.adapters.layers import Answer, Table, group_norm, lookup, random, why_unlike
from vtok_fast.swap.patch import Swap

LIBRARY = "diffusers.models.autoencoders.autoencoder_kl_mochi"
NETWORKS = {"MochiEncoder3D": "proj_out", "MochiDecoder3D": "proj_out"}


def propose(module: nn.Module) -> Answer:
    return lookup(module, _SWAPS, LIBRARY)


def frame_norm(norm: nn.Module, x: Tensor) -> Tensor:
    return group_norm(norm.norm_layer, x, None, per_frame=True)


def resnet_block(
    block: nn.Module, inputs: Tensor, conv_cache: Cache | None = None
) -> tuple[Tensor, dict[str, Tensor | None]]:
    before, kept = conv_cache or {}, {}
    h = group_norm(block.norm1.norm_layer, inputs, per_frame=True)
    h, kept["conv1"] = convolve(block.conv1, h, before.get("conv1"))
    h = group_norm(block.norm2.norm_layer, h, per_frame=True)
    h, kept["conv2"] = convolve(block.conv2, h, before.get("conv2"), residual=inputs)
    return h, kept


def _why_not_norm(norm: nn.Module) -> Reason:
    return why_unlike(norm, norm_layer="GroupNorm")


def _why_not_block(block: nn.Module) -> Reason:
    norm, conv = "MochiChunkedGroupNorm3D", "CogVideoXCausalConv3d"
    return (
        why_unlike(block, norm1=norm, norm2=norm, conv1=conv, conv2=conv, nonlinearity="SiLU")
        or _why_not_norm(block.norm1)
        or _why_not_norm(block.norm2)
        or why_unlike(block.conv1, conv="CogVideoXSafeConv3d")
        or why_unlike(block.conv2, conv="CogVideoXSafeConv3d")
    )


def _sample(module: nn.Module, channels: int) -> tuple[Tensor]:
    return (random(module, 1, channels, 3, 10, 14),)


_SWAPS: Table = {
    "MochiChunkedGroupNorm3D": Swap(
        "norm of all frames in one pass",
        frame_norm,
        sample=lambda m: _sample(m, m.norm_layer.num_channels),
        why_not=_why_not_norm,
    ),
    "MochiResnetBlock3D": Swap(
        "norm + SiLU in one pass, causal convs, residual fused",
        resnet_block,
        sample=lambda m: _sample(m, m.in_channels),
        why_not=_why_not_block,
        state=("pad_mode",),
    ),
}
