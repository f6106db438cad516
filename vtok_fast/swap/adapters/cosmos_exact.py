"""Cosmos' blocks under the contract *exact*: PyTorch's own operations on fewer buffers (`in_place`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_fast.models.cosmos import blocks
from vtok_fast.swap.adapters.in_place import padded, plus, silu_, without_gradients


def conv(layer: blocks.CausalConv3d, x: Tensor) -> Tensor:
    """A convolution layer, whose input is copied once where it is padded, and else not."""
    if layer.time_pad < 0:  # a kernel of one frame with a stride takes away
        return type(layer).forward(layer, x)
    around = (layer.padding,) * 4

    def pad(x: Tensor) -> Tensor:
        x = torch.cat((x[:, :, :1].expand(-1, -1, layer.time_pad, -1, -1), x), dim=2)
        return F.pad(x, around)

    x = padded(x, pad, layer.time_pad, around, replicate=True)  # x itself may be freed
    return layer.conv3d(x)


@without_gradients
def resblock(block: blocks.ResBlock, x: Tensor) -> Tensor:
    h = conv(block.conv1[1], conv(block.conv1[0], silu_(block.norm1(x))))
    h = conv(block.conv2[1], conv(block.conv2[0], silu_(block.norm2(h))))
    shortcut = x if isinstance(block.nin_shortcut, nn.Identity) else conv(block.nin_shortcut, x)
    return plus(shortcut, h, into=h)


@without_gradients
def attention(block: blocks.SpatialAttention | blocks.TemporalAttention, x: Tensor) -> Tensor:
    y = block.norm(x)
    y = conv(block.proj_out, block.attend(*(conv(layer, y) for layer in (block.q, block.k, block.v))))
    return plus(x, y, into=y)


@without_gradients
def hybrid_down(block: blocks.HybridDown, x: Tensor) -> Tensor:
    if block.spatial:
        x = F.pad(x, (0, 1, 0, 1))
        h = conv(block.conv1, x)
        x = plus(h, blocks.pool(x, (1, 2, 2)), into=h)
    if block.temporal:
        x = torch.cat((x[:, :, :1], x), dim=2)
        h = conv(block.conv2, x)
        x = plus(h, blocks.pool(x, (2, 1, 1)), into=h)
    return conv(block.conv3, x) if block.spatial or block.temporal else x


@without_gradients
def hybrid_up(block: blocks.HybridUp, x: Tensor) -> Tensor:
    if block.temporal:
        x = x.repeat_interleave(2, dim=2)[:, :, 1:]
        h = conv(block.conv1, x)
        x = plus(x, h, into=h)
    if block.spatial:
        x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
        h = conv(block.conv2, x)
        x = plus(x, h, into=h)
    return conv(block.conv3, x) if block.spatial or block.temporal else x


@without_gradients
def causal_conv3d(layer: blocks.CausalConv3d, x: Tensor) -> Tensor:
    return conv(layer, x)


def run_out(network: nn.Module, x: Tensor) -> Tensor:
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return type(network).run_out(network, x)
    return network.conv_out(silu_(network.norm_out(x)))
