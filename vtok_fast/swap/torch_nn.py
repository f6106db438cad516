"""The adapter for torch's own convolutions: ``nn.Conv3d`` and ``nn.Conv2d`` that are not part of a larger swap."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vtok_fast.ops.causal_conv3d import causal_conv3d
from vtok_fast.swap.patch import Skip, Swap

_MODES = {"zeros": "zeros", "replicate": "replicate", "reflect": "reflect"}


def propose(module: nn.Module) -> list[Swap] | Skip | None:
    kind = type(module)  # a subclass may do anything in its forward
    if kind not in (nn.Conv3d, nn.Conv2d):
        return None
    if module.padding_mode not in _MODES:
        return Skip(f"padding_mode {module.padding_mode!r} has no kernel")
    if module.padding == "same" and max(module.stride) > 1:
        return Skip("padding 'same' with a stride")
    if kind is nn.Conv3d:
        return [Swap("conv with virtual padding", conv3d_forward, sample=_sample)]
    return [Swap("conv with virtual padding, frame by frame", conv2d_forward, sample=_sample)]


def _pads(conv: nn.Conv2d | nn.Conv3d) -> list[tuple[int, int]]:
    if isinstance(conv.padding, str):
        spans = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size)]
        return [(0, 0) if conv.padding == "valid" else (s // 2, s - s // 2) for s in spans]
    return [(p, p) for p in conv.padding]


def conv3d_forward(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """``nn.Conv3d.forward`` by ``causal_conv3d`` for (B, C, T, H, W) or (C, T, H, W)."""
    if x.dim() == 4:
        return conv3d_forward(conv, x.unsqueeze(0)).squeeze(0)
    time, *space = _pads(conv)
    mode = _MODES[conv.padding_mode]
    return causal_conv3d(x, conv.weight, conv.bias, stride=conv.stride, dilation=conv.dilation, groups=conv.groups,
                         time_pad=time, spatial_pad=space, time_mode=mode, spatial_mode=mode)


def conv2d_forward(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """``nn.Conv2d.forward`` by ``causal_conv3d`` for (B, C, H, W) or (C, H, W); the batch becomes the time axis."""
    if x.dim() == 3:
        return conv2d_forward(conv, x.unsqueeze(0)).squeeze(0)
    y = causal_conv3d(x.unsqueeze(0).transpose(1, 2), conv.weight.unsqueeze(2), conv.bias, stride=(1, *conv.stride),
                      dilation=(1, *conv.dilation), groups=conv.groups, time_pad=(0, 0), spatial_pad=_pads(conv),
                      spatial_mode=_MODES[conv.padding_mode])
    return y.transpose(1, 2).squeeze(0)


def _sample(conv: nn.Conv2d | nn.Conv3d) -> tuple[Tensor]:
    reach = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size)]
    size = [max(n, r) for n, r in zip((4, 10, 14)[-len(reach):], reach)]
    batch = 1 if len(size) == 3 else 3
    return (torch.randn(batch, conv.in_channels, *size, dtype=conv.weight.dtype, device=conv.weight.device),)
