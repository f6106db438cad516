"""What ``norm_act`` means, in plain PyTorch: normalize, scale and shift per channel, modulate, activate. And
its gradient.

LayerNorm (Ba et al. 2016), RMSNorm (Zhang & Sennrich 2019) and GroupNorm (Wu & He 2018) over videos (B, C, T,
H, W); ``group_rms`` is a GroupNorm that subtracts no mean.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("layer", "rms", "group", "group_rms")
ROUNDINGS = ("once", "wan", "ltx")
WAN_FLOOR = 1e-12  # of the norm, as in torch.nn.functional.normalize


def norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: str = "layer",
    groups: int = 1,
    per_frame: bool = False,
    eps: float = 1e-6,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    rounding: str = "once",
) -> Tensor:
    """``activation(norm(x + residual) * weight + bias) * scale + shift)``; arguments as in
    `vtok_fast.norm_act`."""
    if rounding != "once":
        return _chain(x, weight, bias, eps, scale, shift, residual, activation, rounding)
    wide = _wide(x)
    v = x.to(wide) if residual is None else x.to(wide) + residual.to(wide)
    y = affine(normalize(v, kind, groups, per_frame, eps)[0], weight, bias)
    if scale is not None:
        y = y * scale.to(wide)
    if shift is not None:
        y = y + shift.to(wide)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)


def normalize(
    v: Tensor, kind: str, groups: int, per_frame: bool, eps: float, rounding: str = "once"
) -> tuple[Tensor, Tensor]:
    """The normalized video and the reciprocal deviation that it was multiplied by, (B, groups, 1, T or 1, H
    or 1, W or 1)."""
    g = _grouped(v, groups)
    over = _reduced(kind, per_frame)
    if kind in ("layer", "group"):
        g = g - g.mean(over, keepdim=True)
    mean_square = g.square().mean(over, keepdim=True)
    if rounding == "wan":  # a floor under the norm takes the place of eps
        rstd = v.shape[1] ** 0.5 / (mean_square * v.shape[1]).sqrt().clamp_min(WAN_FLOOR)
    else:
        rstd = (mean_square + eps).rsqrt()
    return (g * rstd).reshape(v.shape), rstd


def affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``y * weight + bias`` with one value per channel, in the type of ``y``."""
    if weight is not None:
        y = y * weight.to(y.dtype).view(-1, 1, 1, 1)
    return y if bias is None else y + bias.to(y.dtype).view(-1, 1, 1, 1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _grouped(v: Tensor, groups: int) -> Tensor:
    b, c, *rest = v.shape
    return v.reshape(b, groups, c // groups, *rest)


def _reduced(kind: str, per_frame: bool) -> tuple[int, ...]:
    """Dimensions of the grouped video that share their statistics: channels, and for groups the positions
    too."""
    if kind in ("layer", "rms"):
        return (2,)
    return (2, 4, 5) if per_frame else (2, 3, 4, 5)


def _chain(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    rounding: str,
) -> Tensor:
    """The operation by operation chains of two libraries, each step rounded to the dtype that it has
    there."""
    if residual is not None:
        x = x + residual
    narrow = x.dtype in (torch.float16, torch.bfloat16)
    # Normalize in float32, then times sqrt(C), gamma, and plus a bias that is 0.0 where absent
    if rounding == "wan":
        y = F.normalize(x.float() if narrow else x, dim=1, eps=WAN_FLOOR).to(x.dtype) * x.shape[1] ** 0.5
        if weight is not None:
            y = y * weight.view(-1, 1, 1, 1)
        y = y + (0.0 if bias is None else bias.view(-1, 1, 1, 1))
    # ltx: on a channels-last view, the variance in float32, one rounding to the weight's type before the
    # weight
    else:
        y = x.movedim(1, -1)
        y = y * torch.rsqrt(y.to(torch.float32).pow(2).mean(-1, keepdim=True) + eps)
        if weight is None:
            y = y.to(x.dtype)
        else:
            y = (y.to(weight.dtype) if weight.dtype in (torch.float16, torch.bfloat16) else y) * weight
        y = (y if bias is None else y + bias).movedim(-1, 1)
    if scale is not None:
        y = y * scale
    if shift is not None:
        y = y + shift
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)


def norm_act_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    *,
    kind: str,
    groups: int,
    per_frame: bool,
    eps: float,
    activation: str | None,
    rounding: str,
) -> tuple[Tensor | None, ...]:
    """Gradients for (x, weight, bias, scale, shift, residual), None for the absent; the forward pass is
    computed again.

    With x^ the normalized input, r the reciprocal deviation and g the gradient with respect to x^, the
    gradient with respect to the input is r (g - mean(g) - x^ mean(g x^)), the first mean only where the mean
    was subtracted. All in float32, or in float64 for a float64 input; roundings inside the chains count as
    exact.
    """
    wide = _wide(x)
    v = x.to(wide) if residual is None else x.to(wide) + residual.to(wide)
    xhat, rstd = normalize(v, kind, groups, per_frame, eps, rounding)
    u = affine(xhat, weight, bias)
    m = u if scale is None else u * scale.to(wide)
    if shift is not None:
        m = m + shift.to(wide)
    g = grad.to(wide)
    if activation == "silu":
        sigmoid = torch.sigmoid(m)
        g = g * (sigmoid * (1 + m * (1 - sigmoid)))
    grad_shift = None if shift is None else g.sum_to_size(shift.shape).to(shift.dtype)
    grad_scale = None if scale is None else (g * u).sum_to_size(scale.shape).to(scale.dtype)
    if scale is not None:
        g = g * scale.to(wide)
    grad_weight = None if weight is None else (g * xhat).sum((0, 2, 3, 4)).to(weight.dtype)
    grad_bias = None if bias is None else g.sum((0, 2, 3, 4)).to(bias.dtype)
    g, n = _grouped(affine(g, weight, None), groups), _grouped(xhat, groups)
    over = _reduced(kind, per_frame)
    along = n * (g * n).mean(over, keepdim=True)
    if rounding == "wan":  # below the floor the factor is a constant
        along = torch.where(rstd < x.shape[1] ** 0.5 / WAN_FLOOR, along, torch.zeros_like(along))
    if kind in ("layer", "group"):
        g = g - g.mean(over, keepdim=True)
    grad_x = (rstd * (g - along)).reshape(x.shape).to(x.dtype)
    return grad_x, grad_weight, grad_bias, grad_scale, grad_shift, None if residual is None else grad_x
