"""The adapter for ``vtok_fast.models.Cosmos``: whole blocks, so that a video stays channels-last from the
first layer to the last.

What each block gains: norm and SiLU in one pass, per frame without folding frames into the batch;
convolutions without padded copies, the residual added in their epilogue; repetition folded into the
convolution that follows, so that no repeated video exists; average pools folded into the weights of the
strided convolution beside them.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vtok_fast.dispatch.backends import Reason
from vtok_fast.models.common.regularizers import Regularized
from vtok_fast.models.cosmos import blocks
from vtok_fast.models.cosmos.networks import Decoder, Encoder
from vtok_fast.models.cosmos.quantizers import FSQuantizer
from vtok_fast.ops.causal_conv3d import causal_conv3d
from vtok_fast.ops.fsq import fsq_quantize
from vtok_fast.swap.adapters import cosmos_exact, vidtok_exact
from vtok_fast.swap.adapters.layers import Answer, group_norm, judge_fsq, lookup, only_end, random
from vtok_fast.swap.patch import Swap

NETWORKS = {Encoder: "conv_out", Decoder: "conv_out"}


def propose(module: nn.Module) -> Answer:
    return lookup(module, _SWAPS)


# ---- layers ------------------------------------------------------------------------------------------------


def norm(layer: blocks.Norm, x: Tensor, activation: str | None = "silu") -> Tensor:
    return group_norm(layer.norm, x, activation, per_frame=layer.per_frame)


def conv(layer: blocks.CausalConv3d, x: Tensor, **options) -> Tensor:
    """A causal convolution layer; ``options`` go to ``causal_conv3d``."""
    inner, pad = layer.conv3d, (layer.padding, layer.padding)
    options = {"time_pad": (layer.time_pad, 0), "spatial_pad": (pad, pad), "weight": inner.weight, **options}
    return causal_conv3d(
        x,
        options.pop("weight"),
        inner.bias,
        stride=inner.stride,
        dilation=inner.dilation,
        time_mode="replicate",
        **options,
    )


def factorized(pair: nn.Sequential, x: Tensor, **options) -> Tensor:
    """Over H and W, then over T; ``options`` are for the second step."""
    return conv(pair[1], conv(pair[0], x), **options)


# ---- what takes the place of each forward ------------------------------------------------------------------


def resblock(block: blocks.ResBlock, x: Tensor) -> Tensor:
    h = factorized(block.conv1, norm(block.norm1, x))
    h = block.dropout(norm(block.norm2, h))
    shortcut = x if isinstance(block.nin_shortcut, nn.Identity) else conv(block.nin_shortcut, x)
    return factorized(block.conv2, h, residual=shortcut)


def attention(block: blocks.SpatialAttention | blocks.TemporalAttention, x: Tensor) -> Tensor:
    y = norm(block.norm, x, activation=None)
    q, k, v = conv(block.q, y), conv(block.k, y), conv(block.v, y)
    # PyTorch's kernel for channels-last on a CPU has no second derivative; the one that eager code takes has.
    recorded = q.is_cpu and torch.is_grad_enabled() and q.requires_grad
    with sdpa_kernel(SDPBackend.MATH) if recorded else nullcontext():
        y = block.attend(q, k, v)
    return conv(block.proj_out, y, residual=x)


def hybrid_down(block: blocks.HybridDown, x: Tensor) -> Tensor:
    """Pool and convolution see the same padded video, so their sum is one convolution with the pool's kernel
    added to the weights."""
    if block.spatial:
        x = _pooled_conv(block.conv1, x, (1, 2, 2), slice(0, 1), slice(0, 2), spatial_pad=((0, 1), (0, 1)))
    if block.temporal:  # the copy of the first frame in front, and then the layer's own
        x = _pooled_conv(
            block.conv2, x, (2, 1, 1), slice(1, 3), slice(0, 1), time_pad=(1 + block.conv2.time_pad, 0)
        )
    return conv(block.conv3, x)


def hybrid_up(block: blocks.HybridUp, x: Tensor) -> Tensor:
    if block.temporal:
        x = conv(block.conv1, x, upsample=(2, 1, 1), upsample_first_frame_once=True, residual=x)
    if block.spatial:
        x = conv(block.conv2, x, upsample=(1, 2, 2), residual=x)
    return conv(block.conv3, x)


def _pooled_conv(
    layer: blocks.CausalConv3d, x: Tensor, kernel: tuple[int, int, int], time: slice, space: slice, **pads
) -> Tensor:
    weight = layer.conv3d.weight
    if weight.dtype in (torch.float16, torch.bfloat16):  # such weights would be rounded twice
        # A pool of whole windows never reaches the zeros at the end
        front = x[:, :, :1] if kernel[0] > 1 else x[:, :, :0]
        return conv(layer, x, residual=blocks.pool(torch.cat((front, x), dim=2), kernel), **pads)
    average = torch.zeros_like(weight)
    eye = torch.eye(*weight.shape[:2], dtype=weight.dtype, device=weight.device)[..., None, None, None]
    average[:, :, time, space, space] = eye / (kernel[0] * kernel[1] * kernel[2])
    return conv(layer, x, weight=weight + average, **pads)


def norm_forward(layer: blocks.Norm, x: Tensor) -> Tensor:
    return norm(layer, x, None)


def run_out(network: nn.Module, x: Tensor) -> Tensor:
    return network.conv_out(norm(network.norm_out, x))


def fsq_forward(quantizer: FSQuantizer, z: Tensor, *, step: int | None = None) -> Regularized:
    codes, indices = fsq_quantize(z, quantizer.levels)
    return Regularized(codes, indices, None if step is None else z.new_zeros(()))


# ---- inputs for the check ----------------------------------------------------------------------------------


def _block_input(block: nn.Module) -> tuple[Tensor]:
    layer = next(m for m in block.modules() if isinstance(m, blocks.CausalConv3d))
    return (random(block, 1, layer.conv3d.in_channels, 5, 10, 14),)


def _why_not_resampler(block: blocks.HybridDown | blocks.HybridUp) -> Reason:
    return None if block.spatial or block.temporal else "passes its input on"


def _why_not_fsq(quantizer: FSQuantizer) -> Reason:
    plain = quantizer.num_codebooks == 1 and not isinstance(quantizer.project_in, nn.Linear)
    return None if plain else "several codebooks, or projections around them"


_END = Swap(
    "norm + SiLU in one pass before conv_out",
    run_out,
    "run_out",
    covers=("norm_out",),
    probe=only_end,
    sample=lambda m: (random(m, 1, m.norm_out.norm.num_channels, 3, 10, 14),),
    exact=cosmos_exact.run_out,
)
_ATTENTION = Swap(
    "norm, projections and residual fused", attention, sample=_block_input, exact=cosmos_exact.attention
)
_SWAPS: dict[type, Swap] = {
    Encoder: _END,
    Decoder: _END,
    blocks.ResBlock: Swap(
        "norm + SiLU in one pass, factorized convs, residual fused",
        resblock,
        sample=_block_input,
        exact=cosmos_exact.resblock,
    ),
    blocks.SpatialAttention: _ATTENTION,
    blocks.TemporalAttention: _ATTENTION,
    blocks.HybridDown: Swap(
        "pools folded into the convs",
        hybrid_down,
        sample=_block_input,
        exact=cosmos_exact.hybrid_down,
        why_not=_why_not_resampler,
    ),
    blocks.HybridUp: Swap(
        "repetition folded into the convs, residuals fused",
        hybrid_up,
        sample=_block_input,
        exact=cosmos_exact.hybrid_up,
        why_not=_why_not_resampler,
    ),
    blocks.CausalConv3d: Swap(
        "conv with virtual padding", conv, sample=_block_input, exact=cosmos_exact.causal_conv3d
    ),
    blocks.Norm: Swap(
        "norm in one pass", norm_forward, sample=lambda m: (random(m, 1, m.norm.num_channels, 4, 10, 14),)
    ),
    FSQuantizer: Swap(
        "thresholds instead of tanh and rounding",
        fsq_forward,
        sample=lambda m: (torch.randn(1, len(m.levels), 4, 10, 14),),
        judge=judge_fsq,
        exact=vidtok_exact.fsq,
        why_not=_why_not_fsq,
    ),
}
