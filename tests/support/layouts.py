"""Tensors in memory layouts of every kind."""

from __future__ import annotations

import torch

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def laid(x, how):
    """A tensor of three or more axes in a layout; anything else as it is."""
    if not isinstance(x, torch.Tensor) or x.dim() < 3 or not x.is_floating_point():
        return x
    last = LAST.get(x.dim(), torch.preserve_format)
    wide = torch.cat([x, x], -1)
    return {
        "contiguous": x.contiguous(),
        "channels-last": x.contiguous(memory_format=last) if x.dim() > 3 else x,
        "permuted": x.mT.contiguous().mT,
        "slice": wide[..., 1 : 1 + x.shape[-1]],
        "slice of channels-last": wide.contiguous(memory_format=last)[..., 1 : 1 + x.shape[-1]]
        if x.dim() > 3
        else x,
        "expanded": x[:, :1].expand(x.shape),
    }[how]


def strides_of(result):
    """The strides of a tensor or of the first of a tuple, except those of axes of one element, which have no
    place in memory."""
    y = result[0] if isinstance(result, tuple) else result
    return [s for n, s in zip(y.shape, y.stride()) if n > 1]
