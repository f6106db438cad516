"""Padding rules: what stands around the input of a convolution, and two ways to run one without more copies
than it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_fast.ops.causal_conv3d import causal_conv3d

Pads = tuple[tuple[int, int], ...]
# As torch and others call them
MODES = {
    "zeros": "zeros",
    "constant": "zeros",
    "replicate": "replicate",
    "reflect": "reflect",
}


@dataclass(frozen=True)
class Rule:
    """(before, after) for each axis of a convolution's kernel, and how the first axis of a 3D one, and all
    others, are filled."""

    pads: Pads
    time_mode: str = "zeros"
    mode: str = "zeros"


def virtual(conv: nn.Module, x: Tensor, rule: Rule, cache: Tensor | None = None, **options: Any) -> Tensor:
    """An ``nn.Conv1d``, ``2d`` or ``3d``'s own weights on a batched ``x``, with the padding never made;
    ``options`` go to ``causal_conv3d``. A 2D convolution takes the batch as the frames of one video."""
    if conv.weight.dim() == 5:
        time, *space = rule.pads
        return causal_conv3d(
            x,
            conv.weight,
            conv.bias,
            stride=conv.stride,
            dilation=conv.dilation,
            groups=conv.groups,
            time_pad=time,
            spatial_pad=space,
            time_mode=rule.time_mode,
            spatial_mode=rule.mode,
            cache=cache,
            **options,
        )
    if conv.weight.dim() == 4:
        y = causal_conv3d(
            x.unsqueeze(0).transpose(1, 2),
            conv.weight.unsqueeze(2),
            conv.bias,
            stride=(1, *conv.stride),
            dilation=(1, *conv.dilation),
            groups=conv.groups,
            time_pad=(0, 0),
            spatial_pad=rule.pads,
            spatial_mode=rule.mode,
            **options,
        )
        return y.transpose(1, 2).squeeze(0)
    y = causal_conv3d(
        x[:, :, None, None],
        conv.weight[:, :, None, None],
        conv.bias,
        stride=(1, 1, *conv.stride),
        dilation=(1, 1, *conv.dilation),
        groups=conv.groups,
        time_pad=(0, 0),
        spatial_pad=((0, 0), *rule.pads),
        spatial_mode=rule.mode,
        **options,
    )
    return y[:, :, 0, 0]


def exact(conv: nn.Module, x: Tensor, rule: Rule, cache: Tensor | None = None) -> Tensor:
    """PyTorch's own convolution after the same padding, without the copies that pad nothing: bit-equal to the
    eager chain."""
    x = padded(x, rule, cache)
    function = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[conv.weight.dim()]
    return function(x, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)


def padded(x: Tensor, rule: Rule, cache: Tensor | None = None) -> Tensor:
    """The padded input, ``cache`` in place of the last frames of the padding in front; ``x`` itself where
    nothing is padded."""
    pads = list(rule.pads)
    if cache is not None and pads[0][0]:
        cache = cache[:, :, -pads[0][0] :]
        x = torch.cat([cache, x], 2)
        pads[0] = (pads[0][0] - cache.shape[2], pads[0][1])
    mode = "constant" if rule.mode == "zeros" else rule.mode
    if len(pads) == 3 and rule.time_mode != rule.mode and pads[0] != (0, 0):
        (front, back), pads = pads[0], [(0, 0), *pads[1:]]
        if rule.time_mode == "replicate":
            parts = [x[:, :, :1].expand(-1, -1, front, -1, -1), x, x[:, :, -1:].expand(-1, -1, back, -1, -1)]
            x = torch.cat([part for part in parts if part.shape[2]], 2)
        else:
            x = F.pad(
                x, (0, 0, 0, 0, front, back), "constant" if rule.time_mode == "zeros" else rule.time_mode
            )
    flat = [p for pad in reversed(pads) for p in pad]
    if mode != "constant":
        flat = flat[: 2 * len(pads)]
    return F.pad(x, flat, mode) if any(flat) else x
