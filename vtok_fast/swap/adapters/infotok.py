"""The adapter for the transformers of ``vtok_fast.models.InfoTok``; the rest of it is a Cosmos tokenizer, see
``cosmos.py``.

What is gained: block-causal attention without its dense mask, which for 81 frames of 240x432 has 1.2 GB and
of which nearly half is empty; RMSNorm in one pass; the MLP's product in place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_fast.models.infotok.transformer import Attention, Block, SwiGLU
from vtok_fast.ops.norm_act import norm_act
from vtok_fast.ops.scope_attention import scope_attention
from vtok_fast.ops.scope_attention.scope import Scope
from vtok_fast.swap.adapters.in_place import without_gradients
from vtok_fast.swap.adapters.layers import Answer, lookup, random
from vtok_fast.swap.patch import Swap


def propose(module: nn.Module) -> Answer:
    return lookup(module, _SWAPS)


def attend(attention: Attention, q: Tensor, k: Tensor, v: Tensor, frames: int) -> Tensor:
    return scope_attention(q, k, v, Scope.block_causal(frames, q.shape[2] // frames))


def block(block: Block, x: Tensor, angles: Tensor, frames: int) -> Tensor:
    x = x + block.attention(norm(block.attention_norm, x), angles, frames)
    return x + block.mlp(norm(block.ffn_norm, x))


def norm(layer: nn.RMSNorm, x: Tensor) -> Tensor:
    """Tokens (B, N, C) are a video of one row, channels innermost."""
    y = norm_act(x.transpose(1, 2)[..., None, None], layer.weight, kind="rms", eps=layer.eps)
    return y[..., 0, 0].transpose(1, 2)


@without_gradients
def gated(mlp: SwiGLU, x: Tensor) -> Tensor:
    return mlp.w2(F.silu(mlp.w1(x), inplace=True).mul_(mlp.w3(x)))


def _heads(attention: Attention) -> tuple:
    weight = attention.mha.in_proj_weight
    q, k, v = torch.randn(
        3,
        1,
        attention.mha.num_heads,
        3 * 20,
        attention.mha.head_dim,
        dtype=weight.dtype,
        device=weight.device,
    )
    return q, k, v, 3


def _tokens(block: Block) -> tuple:
    weight, heads = block.attention.mha.in_proj_weight, block.attention.mha.num_heads
    x = torch.randn(1, 3 * 20, weight.shape[1], dtype=weight.dtype, device=weight.device)
    return x, torch.rand(20, weight.shape[1] // heads // 2, dtype=torch.float64, device=weight.device), 3


_SWAPS: dict[type, Swap] = {
    Attention: Swap("block-causal attention without a mask", attend, "attend", covers=(), sample=_heads),
    Block: Swap("RMSNorm in one pass", block, covers=("attention_norm", "ffn_norm"), sample=_tokens),
    SwiGLU: Swap(
        "SiLU and product in place, without gradients",
        gated,
        sample=lambda m: (random(m, 1, 60, m.w1.in_features),),
        exact=gated,
    ),
}
