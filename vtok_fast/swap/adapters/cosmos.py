"""The adapter for ``vtok_fast.models.Cosmos``: whole blocks, so that a video stays channels-last from the
first layer to the last.

What each block gains: norm and SiLU in one pass, per frame without folding frames into the batch;
convolutions without padded copies, the residual added in their epilogue; repetition folded into the
convolution that follows, so that no repeated video exists; average pools folded into the weights of the
strided convolution beside them.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from vtok_fast import parity
from vtok_fast.models.common.regularizers import Regularized
from vtok_fast.models.cosmos import blocks
from vtok_fast.models.cosmos.networks import Decoder, Encoder
from vtok_fast.models.cosmos.quantizers import FSQuantizer
from vtok_fast.ops.causal_conv3d import causal_conv3d
from vtok_fast.ops.fsq import fsq_quantize
from vtok_fast.ops.norm_act import norm_act
from vtok_fast.swap.patch import Skip, Swap


def propose(module: nn.Module) -> list[Swap] | Skip | None:
    kind = type(module)
    if kind in (Encoder, Decoder):
        return [
            Swap(
                "norm + SiLU in one pass before conv_out",
                run_out,
                "run_out",
                covers=("norm_out",),
                probe=_only_end,
                sample=lambda m: (_random(m, 1, m.norm_out.norm.num_channels, 3, 10, 14),),
            )
        ]
    if kind not in _SWAPS:
        return None
    if kind is FSQuantizer and (module.num_codebooks > 1 or isinstance(module.project_in, nn.Linear)):
        return Skip("several codebooks, or projections around them")
    if kind in (blocks.HybridDown, blocks.HybridUp) and not (module.spatial or module.temporal):
        return Skip("passes its input on")
    what, function, sample, judge = _SWAPS[kind]
    return [Swap(what, function, sample=sample, judge=judge)]


# ---- layers ------------------------------------------------------------------------------------------------


def norm(layer: blocks.Norm, x: Tensor, activation: str | None = "silu") -> Tensor:
    inner = layer.norm
    return norm_act(
        x,
        inner.weight,
        inner.bias,
        kind="group",
        groups=inner.num_groups,
        per_frame=layer.per_frame,
        eps=inner.eps,
        activation=activation,
    )


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
    return conv(
        block.proj_out, block.attend(conv(block.q, y), conv(block.k, y), conv(block.v, y)), residual=x
    )


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
        # A pool of whole windows never reaches the zeros behind
        front = x[:, :, :1] if kernel[0] > 1 else x[:, :, :0]
        return conv(layer, x, residual=blocks.pool(torch.cat((front, x), dim=2), kernel), **pads)
    average = torch.zeros_like(weight)
    eye = torch.eye(*weight.shape[:2], dtype=weight.dtype, device=weight.device)[..., None, None, None]
    average[:, :, time, space, space] = eye / (kernel[0] * kernel[1] * kernel[2])
    return conv(layer, x, weight=weight + average, **pads)


def run_out(network: nn.Module, x: Tensor) -> Tensor:
    return network.conv_out(norm(network.norm_out, x))


def fsq_forward(quantizer: FSQuantizer, z: Tensor, *, step: int | None = None) -> Regularized:
    codes, indices = fsq_quantize(z, quantizer.levels)
    return Regularized(codes, indices, None if step is None else z.new_zeros(()))


def _judge_fsq(fast: Regularized, eager: Regularized, ref64: Regularized) -> parity.Parity:
    """Indices must equal those of the formula in float64, codes are then the same numbers."""
    return parity.exact(fast.indices, ref64.indices)


# ---- inputs for the check ----------------------------------------------------------------------------------


def _random(module: nn.Module, *shape: int) -> Tensor:
    like = next(module.parameters(), None)
    return (
        torch.randn(shape, dtype=like.dtype, device=like.device) if like is not None else torch.randn(shape)
    )


def _only_end(network: nn.Module) -> nn.Module:
    """The part of a network that ``run_out`` uses."""
    end = copy.copy(network)
    end._modules = {name: network._modules[name] for name in ("norm_out", "conv_out")}
    return end


def _block_input(block: nn.Module) -> tuple[Tensor]:
    layer = next(m for m in block.modules() if isinstance(m, blocks.CausalConv3d))
    return (_random(block, 1, layer.conv3d.in_channels, 5, 10, 14),)


_SWAPS = {
    blocks.ResBlock: (
        "norm + SiLU in one pass, factorised convs, residual fused",
        resblock,
        _block_input,
        None,
    ),
    blocks.SpatialAttention: ("norm, projections and residual fused", attention, _block_input, None),
    blocks.TemporalAttention: ("norm, projections and residual fused", attention, _block_input, None),
    blocks.HybridDown: ("pools folded into the convs", hybrid_down, _block_input, None),
    blocks.HybridUp: ("repetition folded into the convs, residuals fused", hybrid_up, _block_input, None),
    blocks.CausalConv3d: ("conv with virtual padding", conv, _block_input, None),
    blocks.Norm: (
        "norm in one pass",
        lambda layer, x: norm(layer, x, None),
        lambda m: (_random(m, 1, m.norm.num_channels, 4, 10, 14),),
        None,
    ),
    FSQuantizer: (
        "thresholds instead of tanh and rounding",
        fsq_forward,
        lambda m: (torch.randn(1, len(m.levels), 4, 10, 14),),
        _judge_fsq,
    ),
}
