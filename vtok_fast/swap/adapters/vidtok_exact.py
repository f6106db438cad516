"""VidTok's blocks under the contract *exact*: PyTorch's own operations on fewer buffers (`in_place`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vtok_fast.models.common.layers import fold_frames, unfold_frames
from vtok_fast.models.common.regularizers import FSQRegularizer, Regularized
from vtok_fast.models.vidtok import blocks
from vtok_fast.swap.adapters.in_place import padded, plus, silu_, without_gradients

Caches = blocks.Caches


def conv(layer: nn.Module, x: Tensor, caches: Caches | None = None) -> Tensor:
    """A convolution layer, whose input is copied once where it is padded, and else not."""
    around = getattr(layer, "spatial_padding", (0, 0, 0, 0))
    if not hasattr(layer, "time_pad"):
        return layer(x)
    if caches is not None or min(*around, layer.time_pad) < 0:  # a kernel of 1x1 with a stride takes away
        return type(layer).forward(layer, x, caches)

    def pad(x: Tensor) -> Tensor:
        if around == (0, 0, 0, 0) and x.dim() == 3:
            return blocks.pad_front(layer, x, None)
        if layer.version == "1.0":
            return nn.functional.pad(x, (*around, layer.time_pad, 0))
        return nn.functional.pad(blocks.pad_front(layer, x, None), (*around, 0, 0))

    x = padded(x, pad, layer.time_pad, around, replicate=layer.version != "1.0")  # x itself may be freed
    return layer.conv(x)


def norm_silu(norm: nn.Module, x: Tensor, *, per_frame: bool) -> Tensor:
    return unfold_frames(silu_(norm(fold_frames(x))), x.shape[0]) if per_frame else silu_(norm(x))


def _shortcut(block: nn.Module, x: Tensor) -> Tensor:
    return conv(block.nin_shortcut, x) if hasattr(block, "nin_shortcut") else x


@without_gradients
def resblock2d(block: blocks.ResBlock2d, x: Tensor) -> Tensor:
    h = block.conv1(silu_(block.norm1(x)))
    h = block.conv2(silu_(block.norm2(h)))
    return plus(_shortcut(block, x), h, into=h)


@without_gradients
def resblock1d(block: blocks.ResBlock1d, x: Tensor, caches: Caches | None = None) -> Tensor:
    def normalized(norm: nn.Module, x: Tensor) -> Tensor:
        if not block.causal:
            return silu_(norm(x))
        n, c, t = x.shape
        y = x.permute(0, 2, 1).reshape(n * t, c, 1)
        y = blocks.group_norm_of_position(norm, y) if isinstance(norm, nn.GroupNorm) else norm(y)
        return silu_(y).reshape(n, t, c).permute(0, 2, 1)

    h = conv(block.conv1, normalized(block.norm1, x), caches)
    h = conv(block.conv2, normalized(block.norm2, h), caches)
    return plus(_shortcut(block, x), h, into=h)


@without_gradients
def resblock3d(block: blocks.ResBlock3d, x: Tensor, caches: Caches | None = None) -> Tensor:
    h = conv(block.conv1, norm_silu(block.norm1, x, per_frame=block.causal), caches)
    h = conv(block.conv2, norm_silu(block.norm2, h, per_frame=block.causal), caches)
    return plus(_shortcut(block, x), h, into=h)


@without_gradients
def attention(block: blocks.FrameAttention, x: Tensor, caches: Caches | None = None) -> Tensor:
    b, c, t, h, w = x.shape
    y = unfold_frames(block.norm(fold_frames(x)), b) if block.causal else block.norm(x)
    q, k, v = (
        conv(layer, y).permute(0, 2, 3, 4, 1).reshape(b, t, h * w, c) for layer in (block.q, block.k, block.v)
    )
    y = nn.functional.scaled_dot_product_attention(q, k, v)
    y = conv(block.proj_out, y.reshape(b, t, h, w, c).permute(0, 4, 1, 2, 3))
    return plus(x, y, into=y)


@without_gradients
def time_up(block: blocks.TimeUp, x: Tensor, caches: Caches | None = None) -> Tensor:
    alpha = torch.sigmoid(block.mix_factor)
    u = block.upsample(x, caches)
    y = conv(block.conv, u, caches)
    if caches is not None or not alpha.dtype == u.dtype == y.dtype:
        return alpha * u + (1 - alpha) * y
    y.mul_(1 - alpha)
    return plus(u.mul_(alpha), y, into=u)


@without_gradients
def causal_conv3d(layer: blocks.CausalConv3d, x: Tensor, caches: Caches | None = None) -> Tensor:
    return conv(layer, x, caches)


def run_out(network: nn.Module, x: Tensor, caches: Caches | None) -> Tensor:
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return type(network).run_out(network, x, caches)
    return blocks.run(network.conv_out, norm_silu(network.norm_out, x, per_frame=network.causal), caches)


@without_gradients
def fsq(regularizer: FSQRegularizer, z: Tensor, *, step: int | None = None) -> Regularized:
    if step is not None:
        return type(regularizer).forward(regularizer, z, step=step)
    z = regularizer.project_in(z.movedim(1, -1))
    wide = z if z.dtype == torch.float64 else z.float()
    wide = wide.unflatten(-1, (regularizer.num_codebooks, len(regularizer.levels)))
    q = wide.add(regularizer.shift).tanh_().mul_(regularizer.reach).sub_(regularizer.offset).round_()
    indices = q.to(torch.int64).add_(regularizer.width).mul_(regularizer.basis).sum(-1).to(torch.int32)
    codes = q.add_(0.0).div_(regularizer.width)  # as the gradient's way past the rounding makes -0 a 0
    codes = regularizer.project_out(codes.flatten(-2).to(z.dtype)).movedim(-1, 1)
    return Regularized(codes, indices.squeeze(-1) if regularizer.num_codebooks == 1 else indices, None)
