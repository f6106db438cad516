"""What the adapters share: how a table answers for a module, layers on videos, inputs for the check."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_fast import parity
from vtok_fast.dispatch.backends import Reason
from vtok_fast.ops.causal_conv3d import causal_conv3d
from vtok_fast.ops.norm_act import norm_act
from vtok_fast.ops.scope_attention import scope_attention
from vtok_fast.ops.scope_attention.scope import Scope
from vtok_fast.swap.patch import Skip, Swap

Answer = list[Swap] | Skip | None
# What is swapped in a class, given itself or by name: a record, several, or a function of the instance where
# the record depends on it.
Table = Mapping[Any, Swap | tuple[Swap, ...] | Callable[[nn.Module], Answer]]


def lookup(module: nn.Module, table: Table, library: str | None = None) -> Answer:
    """What a table says to a module. It is keyed by class, or by the names of the classes of one library
    (which nobody imports for this)."""
    kind = type(module)
    if library is not None and kind.__module__ != library:
        return None
    found = table.get(kind if library is None else kind.__name__)
    if found is None or callable(found):
        return None if found is None else found(module)
    swaps = [found] if isinstance(found, Swap) else list(found)
    why = next((why for swap in swaps if (why := swap.why_not(module))), None)
    return Skip(why) if why else swaps


def why_unlike(module: nn.Module, **expected: str | tuple[str, ...]) -> Reason:
    """Why a block is not made of the parts that its class makes: a wrapper in the place of one (LoRA,
    quantization) does more.

    ``expected`` has the class name, or several, of each child; "None" where there may be none.
    """
    for name, kinds in expected.items():
        kind = type(getattr(module, name, None)).__name__.replace("NoneType", "None")
        if kind not in ((kinds,) if isinstance(kinds, str) else kinds):
            return f"{name} is a {kind}, which this swap was not made for"
    return None


def frame_conv(conv: nn.Conv2d, x: Tensor, *, spatial_pad=None, **options) -> Tensor:
    """A 2D convolution on each frame of a video (B, C, T, H, W), by default with its own (zero) padding."""
    spatial_pad = tuple((p, p) for p in conv.padding) if spatial_pad is None else spatial_pad
    return causal_conv3d(
        x,
        conv.weight.unsqueeze(2),
        conv.bias,
        stride=(1, *conv.stride),
        time_pad=(0, 0),
        spatial_pad=spatial_pad,
        **options,
    )


def plain_conv2d(conv: nn.Module) -> bool:
    """Whether ``frame_conv`` does all that this convolution does."""
    return (
        type(conv) is nn.Conv2d
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and conv.dilation == (1, 1)
        and conv.groups == 1
    )


def group_norm(
    norm: nn.GroupNorm, x: Tensor, activation: str | None = "silu", *, per_frame: bool = False, **options
) -> Tensor:
    """GroupNorm over (C/groups, T, H, W), or per frame, then SiLU."""
    return norm_act(
        x,
        norm.weight,
        norm.bias,
        kind="group",
        groups=norm.num_groups,
        per_frame=per_frame,
        eps=norm.eps,
        activation=activation,
        **options,
    )


def attention_per_frame(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head over the pixels of each frame of videos (B, C, T, H, W)."""
    b, c, t, h, w = q.shape
    q, k, v = (x.permute(0, 2, 3, 4, 1).reshape(b, t, h * w, c) for x in (q, k, v))
    if q.is_cpu and torch.is_grad_enabled() and q.requires_grad:
        # PyTorch's CPU kernel for four axes has no second derivative; the one that eager code takes has.
        y = scope_attention(q, k, v, Scope.dense(h * w))
    else:
        y = F.scaled_dot_product_attention(q, k, v)
    return y.reshape(b, t, h, w, c).permute(0, 4, 1, 2, 3)


def channels_last(x: Tensor) -> Tensor:
    """A view (B, T, H, W, C)."""
    return x.permute(0, 2, 3, 4, 1)


def video(x: Tensor) -> Tensor:
    """The inverse of `channels_last`."""
    return x.permute(0, 4, 1, 2, 3)


def random(module: nn.Module, *shape: int) -> Tensor:
    """Random input in a module's dtype, on its device."""
    like = next(module.parameters(), torch.empty(()))
    return torch.randn(shape, dtype=like.dtype, device=like.device)


def only_end(network: nn.Module) -> nn.Module:
    """The part of a network that its ``run_out`` uses."""
    end = copy.copy(network)
    end._modules = {name: network._modules[name] for name in ("norm_out", "conv_out")}
    return end


def judge_fsq(fast: Any, eager: Any, ref64: Any) -> parity.Parity:
    """For results with ``indices``: those must equal the formula's in float64, codes are then the same
    numbers."""
    return parity.exact(fast.indices, ref64.indices)
