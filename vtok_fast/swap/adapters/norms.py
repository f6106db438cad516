"""The general rule for norms, for any library: torch's ``GroupNorm`` and ``RMSNorm``, diffusers' ``RMSNorm``,
and modules without weights that divide by the root mean square over the channels.

On a CPU PyTorch's group norm is far less exact on channels-last, which the convolutions write, and an RMS
norm of several passes is slower there. Those calls are taken; on any other layout PyTorch's own code runs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_fast.ops.norm_act import norm_act
from vtok_fast.swap.adapters.layers import Answer, random
from vtok_fast.swap.layout import is_channels_last
from vtok_fast.swap.patch import Swap

_DIFFUSERS = "diffusers.models.normalization"
_AXES = ("dim", "channel_dim")  # what libraries call the axis of a norm without weights


def propose(module: nn.Module) -> Answer:
    kind = type(module)
    if kind is nn.GroupNorm:
        return [Swap("norm in one pass on channels-last", group_norm, sample=_group_sample)]
    if kind is nn.RMSNorm or (kind.__module__, kind.__name__) == (_DIFFUSERS, "RMSNorm"):
        width = module.normalized_shape if kind is nn.RMSNorm else module.dim
        if len(width) == 1:
            return [Swap("norm in one pass", rms_norm, sample=lambda m: (random(m, 2, 3, 5, *width),))]
        return None
    if axis_of(module) is not None:
        return [Swap("norm in one pass on channels-last", rms_over_axis, sample=_axis_sample)]
    return None


def _is_autocast(x: Tensor) -> bool:
    """Under autocast the dtype of a norm's result is PyTorch's business."""
    return torch.is_autocast_enabled(x.device.type)


# ---- group norm --------------------------------------------------------------------------------------------


def group_norm(norm: nn.GroupNorm, input: Tensor) -> Tensor:
    """``nn.GroupNorm`` on images or videos."""
    if not is_channels_last(input) or input.is_contiguous() or _is_autocast(input):
        return F.group_norm(input, norm.num_groups, norm.weight, norm.bias, norm.eps)
    video = input if input.dim() == 5 else input.unsqueeze(2)
    y = norm_act(video, norm.weight, norm.bias, kind="group", groups=norm.num_groups, eps=norm.eps)
    return y if input.dim() == 5 else y.squeeze(2)


def _group_sample(norm: nn.GroupNorm) -> tuple[Tensor]:
    return (random(norm, 2, norm.num_channels, 10, 14).contiguous(memory_format=torch.channels_last),)


# ---- RMS norm over the last axis ---------------------------------------------------------------------------


def rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """``nn.RMSNorm``, or diffusers' ``RMSNorm``, on (..., C)."""
    if x.stride(-1) != 1 or x.dim() < 2 or _is_autocast(x):
        return type(norm).forward(norm, x)
    eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    rows = x.reshape(-1, x.shape[-1])  # a view of anything dense
    y = norm_act(_rows_as_video(rows), norm.weight, getattr(norm, "bias", None), kind="rms", eps=eps)
    return y[0, :, 0, 0].T.reshape(x.shape)


def _rows_as_video(rows: Tensor) -> Tensor:
    """(N, C) as a channels-last video (1, C, 1, 1, N)."""
    return rows.T[None, :, None, None]


# ---- RMS norm over a named axis ----------------------------------------------------------------------------


def axis_of(module: nn.Module) -> int | None:
    """The axis over which a module without weights is an RMS norm, as found by running it; None for any other
    module."""
    eps = module.__dict__.get("eps")
    if not isinstance(eps, float) or module._parameters or module._buffers or module._modules:
        return None
    axis = next((module.__dict__[name] for name in _AXES if name in module.__dict__), None)
    if type(axis) is not int or axis != 1:
        return None
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            x = torch.randn(2, 3, 2, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            for scale in (1.0, eps**0.5):  # the second one shows where eps stands
                y = type(module).forward(module, x * scale)  # no hook is called
                expected = x * scale / ((x * scale).square().mean(1, keepdim=True) + eps).sqrt()
                if not isinstance(y, Tensor) or not torch.allclose(y, expected, 1e-6, 0):
                    return None
    except Exception:  # foreign code on an input that it may not be made for
        return None
    return axis


def rms_over_axis(norm: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the channels of images or videos."""
    if args or kwargs or not is_channels_last(x) or _is_autocast(x):
        return type(norm).forward(norm, x, *args, **kwargs)
    video = x if x.dim() == 5 else x.unsqueeze(2)
    y = norm_act(video, kind="rms", eps=norm.eps)
    return y if x.dim() == 5 else y.squeeze(2)


def _axis_sample(norm: nn.Module) -> tuple[Tensor]:
    return (torch.randn(1, 16, 3, 10, 14).contiguous(memory_format=torch.channels_last_3d),)
