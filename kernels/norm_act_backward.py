"""Triton kernels of ``norm_act``, backward. The forward pass is computed again from its input.

With x^ the normalized input, r the reciprocal deviation and g the gradient with respect to x^, the gradient
with respect to the input is r (g - mean(g) - x^ mean(g x^)), the first mean only where the mean was
subtracted. ``layer`` and ``rms`` take one pass; ``group`` and ``group_rms`` add up g and g x^ per channel
first, which also gives the gradients of weight and bias.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtok_fast.kernels import on_device_of
from vtok_fast.kernels.norm_act import (
    LENGTHS,
    View,
    _at,
    _input,
    _modulation,
    _per_channel,
    _place,
    _sigmoid,
    how,
    is_fast,
    is_flat,
    statistics,
    tile,
    view,
)

VALUES = {"positions": 2048, "groups": 4096}  # of a tile: twice as many spill registers
PROGRAMS = 1024  # of the pass over positions: each leaves one partial sum per channel for weight and bias

# ---- kernels -----------------------------------------------------------------------------------------------


@triton.jit
def _upstream(
    xhat,
    grad,
    weight,
    bias,
    scale,
    shift,
    grad_scale,
    grad_shift,
    b,
    c,
    t,
    p,
    mask,
    inside,
    grad_batch_stride,
    grad_channel_stride,
    grad_frame_stride,
    grad_position_stride,
    scale_batch_stride,
    scale_channel_stride,
    scale_frame_stride,
    scale_position_stride,
    shift_batch_stride,
    shift_channel_stride,
    shift_frame_stride,
    shift_position_stride,
    grad_x_batch_stride,
    grad_x_channel_stride,
    grad_x_frame_stride,
    grad_x_position_stride,
    HOW: tl.constexpr,
    SILU: tl.constexpr,
    FAST: tl.constexpr,
):
    """The gradient with respect to the output of the affine step; those of scale and shift are written on the
    way."""
    g = tl.load(
        _at(
            grad,
            b,
            c,
            t,
            p,
            grad_batch_stride,
            grad_channel_stride,
            grad_frame_stride,
            grad_position_stride,
            HOW >> 16,
        ),
        mask=mask,
        other=0.0,
    ).to(tl.float32)
    u = xhat
    if weight is not None:
        u = u * _per_channel(weight, c, inside)
    if bias is not None:
        u = u + _per_channel(bias, c, inside)
    if scale is not None:
        factor = _modulation(
            scale,
            b,
            c,
            t,
            p,
            mask,
            inside,
            scale_batch_stride,
            scale_channel_stride,
            scale_frame_stride,
            scale_position_stride,
            HOW >> 8,
        )
    if SILU:
        m = u
        if scale is not None:
            m = m * factor
        if shift is not None:
            m = m + _modulation(
                shift,
                b,
                c,
                t,
                p,
                mask,
                inside,
                shift_batch_stride,
                shift_channel_stride,
                shift_frame_stride,
                shift_position_stride,
                HOW >> 12,
            )
        sigmoid = _sigmoid(m, FAST)
        g = g * (sigmoid * (1.0 + m * (1.0 - sigmoid)))
    if grad_shift is not None:
        tl.store(
            _at(
                grad_shift,
                b,
                c,
                t,
                p,
                grad_x_batch_stride,
                grad_x_channel_stride,
                grad_x_frame_stride,
                grad_x_position_stride,
                HOW >> 20,
            ),
            g.to(grad_shift.dtype.element_ty),
            mask=mask,
        )
    if grad_scale is not None:
        tl.store(
            _at(
                grad_scale,
                b,
                c,
                t,
                p,
                grad_x_batch_stride,
                grad_x_channel_stride,
                grad_x_frame_stride,
                grad_x_position_stride,
                HOW >> 20,
            ),
            (g * u).to(grad_scale.dtype.element_ty),
            mask=mask,
        )
    if scale is not None:
        g = g * factor
    return tl.where(mask, g, 0.0)


@triton.jit(do_not_specialize=LENGTHS)
def position_backward_kernel(
    x,
    residual,
    grad,
    weight,
    bias,
    scale,
    shift,
    grad_x,
    grad_scale,
    grad_shift,
    grad_weight,
    grad_bias,
    clips,
    frames,
    plane,
    channels,
    size,
    eps,
    programs,
    x_batch_stride,
    x_channel_stride,
    x_frame_stride,
    x_position_stride,
    residual_batch_stride,
    residual_channel_stride,
    residual_frame_stride,
    residual_position_stride,
    scale_batch_stride,
    scale_channel_stride,
    scale_frame_stride,
    scale_position_stride,
    shift_batch_stride,
    shift_channel_stride,
    shift_frame_stride,
    shift_position_stride,
    grad_batch_stride,
    grad_channel_stride,
    grad_frame_stride,
    grad_position_stride,
    grad_x_batch_stride,
    grad_x_channel_stride,
    grad_x_frame_stride,
    grad_x_position_stride,
    HOW: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    PLANE_UNIT: tl.constexpr,
    CENTER: tl.constexpr,
    SILU: tl.constexpr,
    FAST: tl.constexpr,
    WAN: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Programs (programs, groups); each walks over blocks of positions and leaves its sums of weight and bias
    gradients."""
    plane *= PLANE_UNIT
    size *= CHANNEL_UNIT
    positions = frames * plane
    blocks = tl.cdiv(positions, BLOCK)
    k = tl.arange(0, BLOCK_C)
    inside = k < size
    c = tl.program_id(1) * size + k
    sum_weight = tl.zeros((BLOCK_C,), tl.float32)
    sum_bias = tl.zeros((BLOCK_C,), tl.float32)
    for block in range(tl.program_id(0), clips * blocks, programs):
        q = block % blocks * BLOCK + tl.arange(0, BLOCK)
        b, t, p = _place(block // blocks, q, frames, frames, plane, FLAT)
        mask = (q < positions)[:, None] & inside[None, :]
        v = _input(
            x,
            residual,
            b,
            c,
            t,
            p,
            mask,
            x_batch_stride,
            x_channel_stride,
            x_frame_stride,
            x_position_stride,
            residual_batch_stride,
            residual_channel_stride,
            residual_frame_stride,
            residual_position_stride,
            HOW,
            0,
        )
        if CENTER:
            v = tl.where(inside[None, :], v - (tl.sum(v, 1) / size)[:, None], 0.0)
        square = tl.sum(v * v, 1)
        if WAN:
            norm = tl.sqrt_rn(square)
            rstd = tl.sqrt_rn(tl.full((), channels, tl.float32)) / tl.maximum(norm, 1e-12)
        else:
            rstd = tl.rsqrt(square / size + eps)
        xhat = v * rstd[:, None]
        g = _upstream(
            xhat,
            grad,
            weight,
            bias,
            scale,
            shift,
            grad_scale,
            grad_shift,
            b,
            c,
            t,
            p,
            mask,
            inside,
            grad_batch_stride,
            grad_channel_stride,
            grad_frame_stride,
            grad_position_stride,
            scale_batch_stride,
            scale_channel_stride,
            scale_frame_stride,
            scale_position_stride,
            shift_batch_stride,
            shift_channel_stride,
            shift_frame_stride,
            shift_position_stride,
            grad_x_batch_stride,
            grad_x_channel_stride,
            grad_x_frame_stride,
            grad_x_position_stride,
            HOW,
            SILU,
            FAST,
        )
        sum_weight += tl.sum(g * xhat, 0)
        sum_bias += tl.sum(g, 0)
        if weight is not None:
            g = g * _per_channel(weight, c, inside)
        along = tl.sum(g * xhat, 1) / size
        if WAN:  # under the floor the factor is a constant
            along = tl.where(norm > 1e-12, along, 0.0)
        if CENTER:
            g = g - (tl.sum(g, 1) / size)[:, None]
        result = rstd[:, None] * (g - xhat * along[:, None])
        tl.store(
            _at(
                grad_x,
                b,
                c,
                t,
                p,
                grad_x_batch_stride,
                grad_x_channel_stride,
                grad_x_frame_stride,
                grad_x_position_stride,
                HOW >> 20,
            ),
            result.to(grad_x.dtype.element_ty),
            mask=mask,
        )
    at = tl.program_id(0).to(tl.int64) * channels + c
    tl.store(grad_weight + at, sum_weight, mask=inside)
    tl.store(grad_bias + at, sum_bias, mask=inside)


@triton.jit
def _normalized(
    x,
    residual,
    origin,
    mean,
    rstd,
    instance,
    b,
    c,
    t,
    p,
    mask,
    inside,
    channels,
    groups,
    x_batch_stride,
    x_channel_stride,
    x_frame_stride,
    x_position_stride,
    residual_batch_stride,
    residual_channel_stride,
    residual_frame_stride,
    residual_position_stride,
    HOW: tl.constexpr,
):
    v = _input(
        x,
        residual,
        b,
        c,
        t,
        p,
        mask,
        x_batch_stride,
        x_channel_stride,
        x_frame_stride,
        x_position_stride,
        residual_batch_stride,
        residual_channel_stride,
        residual_frame_stride,
        residual_position_stride,
        HOW,
        0,
    )
    group = instance * groups + c // (channels // groups)
    r = _per_channel(rstd, group, inside)
    return (v - _per_channel(origin, group, inside) - _per_channel(mean, group, inside)) * r, r, group


@triton.jit(do_not_specialize=LENGTHS)
def group_sums_kernel(
    x,
    residual,
    grad,
    weight,
    bias,
    scale,
    shift,
    origin,
    mean,
    rstd,
    grad_scale,
    grad_shift,
    sums,
    sums_along,
    frames,
    span,
    plane,
    channels,
    groups,
    parts,
    x_batch_stride,
    x_channel_stride,
    x_frame_stride,
    x_position_stride,
    residual_batch_stride,
    residual_channel_stride,
    residual_frame_stride,
    residual_position_stride,
    scale_batch_stride,
    scale_channel_stride,
    scale_frame_stride,
    scale_position_stride,
    shift_batch_stride,
    shift_channel_stride,
    shift_frame_stride,
    shift_position_stride,
    grad_batch_stride,
    grad_channel_stride,
    grad_frame_stride,
    grad_position_stride,
    grad_x_batch_stride,
    grad_x_channel_stride,
    grad_x_frame_stride,
    grad_x_position_stride,
    HOW: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    PLANE_UNIT: tl.constexpr,
    SILU: tl.constexpr,
    FAST: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Per channel over a part of an instance's positions: the sums of g and of g x^. Programs (instances x
    parts, channels)."""
    instance = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    plane *= PLANE_UNIT
    channels *= CHANNEL_UNIT
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    positions = span * plane
    steps = tl.cdiv(tl.cdiv(positions, BLOCK), parts)
    begin = part * steps * BLOCK
    end = tl.minimum(begin + steps * BLOCK, positions)
    total = tl.zeros((BLOCK_C,), tl.float32)
    along = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(begin, end, BLOCK):
        q = first + tl.arange(0, BLOCK)
        b, t, p = _place(instance, q, frames, span, plane, FLAT)
        mask = (q < end)[:, None] & inside[None, :]
        xhat, r, group = _normalized(
            x,
            residual,
            origin,
            mean,
            rstd,
            instance,
            b,
            c,
            t,
            p,
            mask,
            inside,
            channels,
            groups,
            x_batch_stride,
            x_channel_stride,
            x_frame_stride,
            x_position_stride,
            residual_batch_stride,
            residual_channel_stride,
            residual_frame_stride,
            residual_position_stride,
            HOW,
        )
        g = _upstream(
            xhat,
            grad,
            weight,
            bias,
            scale,
            shift,
            grad_scale,
            grad_shift,
            b,
            c,
            t,
            p,
            mask,
            inside,
            grad_batch_stride,
            grad_channel_stride,
            grad_frame_stride,
            grad_position_stride,
            scale_batch_stride,
            scale_channel_stride,
            scale_frame_stride,
            scale_position_stride,
            shift_batch_stride,
            shift_channel_stride,
            shift_frame_stride,
            shift_position_stride,
            grad_x_batch_stride,
            grad_x_channel_stride,
            grad_x_frame_stride,
            grad_x_position_stride,
            HOW,
            SILU,
            FAST,
        )
        total += tl.sum(g, 0)
        along += tl.sum(g * xhat, 0)
    at = tl.program_id(0).to(tl.int64) * channels + c
    tl.store(sums + at, total, mask=inside)
    tl.store(sums_along + at, along, mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def group_backward_kernel(
    x,
    residual,
    grad,
    weight,
    bias,
    scale,
    shift,
    origin,
    mean,
    rstd,
    average,
    along,
    grad_x,
    frames,
    span,
    plane,
    channels,
    groups,
    x_batch_stride,
    x_channel_stride,
    x_frame_stride,
    x_position_stride,
    residual_batch_stride,
    residual_channel_stride,
    residual_frame_stride,
    residual_position_stride,
    scale_batch_stride,
    scale_channel_stride,
    scale_frame_stride,
    scale_position_stride,
    shift_batch_stride,
    shift_channel_stride,
    shift_frame_stride,
    shift_position_stride,
    grad_batch_stride,
    grad_channel_stride,
    grad_frame_stride,
    grad_position_stride,
    grad_x_batch_stride,
    grad_x_channel_stride,
    grad_x_frame_stride,
    grad_x_position_stride,
    HOW: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    PLANE_UNIT: tl.constexpr,
    CENTER: tl.constexpr,
    SILU: tl.constexpr,
    FAST: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradient with respect to the input, given the means of g and g x^ per group."""
    plane *= PLANE_UNIT
    channels *= CHANNEL_UNIT
    positions = span * plane
    blocks = tl.cdiv(positions, BLOCK)
    instance = tl.program_id(0) // blocks
    q = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    b, t, p = _place(instance, q, frames, span, plane, FLAT)
    mask = (q < positions)[:, None] & inside[None, :]
    xhat, r, group = _normalized(
        x,
        residual,
        origin,
        mean,
        rstd,
        instance,
        b,
        c,
        t,
        p,
        mask,
        inside,
        channels,
        groups,
        x_batch_stride,
        x_channel_stride,
        x_frame_stride,
        x_position_stride,
        residual_batch_stride,
        residual_channel_stride,
        residual_frame_stride,
        residual_position_stride,
        HOW,
    )
    g = _upstream(
        xhat,
        grad,
        weight,
        bias,
        scale,
        shift,
        None,
        None,
        b,
        c,
        t,
        p,
        mask,
        inside,
        grad_batch_stride,
        grad_channel_stride,
        grad_frame_stride,
        grad_position_stride,
        scale_batch_stride,
        scale_channel_stride,
        scale_frame_stride,
        scale_position_stride,
        shift_batch_stride,
        shift_channel_stride,
        shift_frame_stride,
        shift_position_stride,
        grad_x_batch_stride,
        grad_x_channel_stride,
        grad_x_frame_stride,
        grad_x_position_stride,
        HOW,
        SILU,
        FAST,
    )
    if weight is not None:
        g = g * _per_channel(weight, c, inside)
    g = g - xhat * _per_channel(along, group, inside)
    if CENTER:
        g = g - _per_channel(average, group, inside)
    tl.store(
        _at(
            grad_x,
            b,
            c,
            t,
            p,
            grad_x_batch_stride,
            grad_x_channel_stride,
            grad_x_frame_stride,
            grad_x_position_stride,
            HOW >> 20,
        ),
        (r * g).to(grad_x.dtype.element_ty),
        mask=mask,
    )


# ---- launcher ----------------------------------------------------------------------------------------------


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
    layout: torch.memory_format = torch.channels_last_3d,
    wanted: tuple[bool, ...] = (True,) * 6,
) -> tuple[Tensor | None, ...]:
    """Gradients for (x, weight, bias, scale, shift, residual), None for the absent, as
    `vtok_fast.reference.norm_act.norm_act_backward` gives them. Videos come in the memory format
    ``layout``; of scale and shift only those ``wanted``, by their places in the result."""
    b, channels, frames, h, w = x.shape
    plane, span = h * w, 1 if per_frame and "group" in kind else frames
    center, silu = kind in ("layer", "group"), activation == "silu"
    full_scale, full_shift = (
        None if t is None else t.reshape((1,) * (5 - t.dim()) + t.shape) for t in (scale, shift)
    )
    vx, vr, vg = view(x), view(residual), view(grad)
    vs, vh = view(full_scale, x.shape), view(full_shift, x.shape)
    grad_x = torch.empty_like(x, memory_format=layout)
    if x.numel() == 0:
        grad_x.zero_()
        zeros = [None if t is None else torch.zeros_like(t) for t in (weight, bias, scale, shift)]
        return grad_x, *zeros, None if residual is None else grad_x
    # One that broadcasts is added up afterwards, from float32.
    grad_scale, grad_shift = (
        None
        if t is None or not want
        else torch.empty_like(x, dtype=t.dtype if t.shape == x.shape else torch.float32, memory_format=layout)
        for t, want in zip((scale, shift), wanted[3:5])
    )
    vo, vos, voh = view(grad_x), view(grad_scale), view(grad_shift)
    flat = is_flat(frames, plane, vx, vr, vg, vs, vh, vo)
    planar = vx.strides[1] != 1
    each = groups if kind in ("layer", "rms") else 1
    bits, strides, channel_unit, plane_unit = how(flat, each, vx, vr, vs, vh, vg, vo)
    layout_of = (*strides, bits, channel_unit, plane_unit)
    fast = is_fast(x, silu) and rounding == "once"
    inputs = vx.tensor, vr.tensor, vg.tensor, weight, bias, vs.tensor, vh.tensor
    with on_device_of(x):
        if kind in ("layer", "rms"):
            block_c = triton.next_power_of_2(channels // groups)
            block, warps = tile(block_c, frames * plane, planar, VALUES["positions"])
            programs = min(PROGRAMS, b * triton.cdiv(frames * plane, block))
            sums = torch.empty(2, programs, channels, dtype=torch.float32, device=x.device)
            position_backward_kernel[(programs, groups)](
                *inputs,
                vo.tensor,
                vos.tensor,
                voh.tensor,
                *sums,
                b,
                frames,
                plane // plane_unit,
                channels,
                channels // groups // channel_unit,
                eps,
                programs,
                *layout_of,
                center,
                silu,
                fast,
                rounding == "wan",
                flat,
                block,
                block_c,
                num_warps=warps,
            )
            grad_weight, grad_bias = sums.sum(1)
        else:
            grad_weight, grad_bias = _group_backward(
                inputs, vx, vr, vo, vos, voh, layout_of, x.shape, center, silu, fast, groups, span, eps, flat
            )
    grad_scale, grad_shift = (
        None if g is None else g.sum_to_size(t.shape).to(t.dtype)
        for g, t in ((grad_scale, scale), (grad_shift, shift))
    )
    return (
        grad_x,
        None if weight is None else grad_weight.to(weight.dtype),
        None if bias is None else grad_bias.to(bias.dtype),
        grad_scale,
        grad_shift,
        None if residual is None else grad_x,
    )


def _group_backward(
    inputs: tuple,
    vx: View,
    vr: View,
    vo: View,
    vos: View,
    voh: View,
    layout_of: tuple,
    shape: torch.Size,
    center: bool,
    silu: bool,
    fast: bool,
    groups: int,
    span: int,
    eps: float,
    flat: bool,
) -> tuple[Tensor, Tensor]:
    """Writes the gradients of the video, scale and shift; returns those of weight and bias."""
    b, channels, frames, h, w = shape
    plane, instances = h * w, b * (frames // span)
    positions = span * plane
    channel_unit, plane_unit = layout_of[-2:]
    found = statistics(vx, vr, shape, center, groups, span == 1, eps, flat)
    block_c = min(triton.next_power_of_2(channels), 16 if vx.strides[1] != 1 else 128)
    block, warps = tile(block_c, positions, vx.strides[1] != 1, VALUES["groups"])
    blocks, columns = triton.cdiv(positions, block), triton.cdiv(channels, block_c)
    steps = triton.cdiv(blocks, min(blocks, max(1, 1024 // (instances * columns))))
    parts = triton.cdiv(blocks, steps)
    sums = torch.empty(2, instances, parts, channels, dtype=torch.float32, device=vx.tensor.device)
    group_sums_kernel[(instances * parts, columns)](
        *inputs,
        *found,
        vos.tensor,
        voh.tensor,
        *sums,
        frames,
        span,
        plane // plane_unit,
        channels // channel_unit,
        groups,
        parts,
        *layout_of,
        silu,
        fast,
        flat,
        block,
        block_c,
        num_warps=warps,
    )
    per_channel = sums.sum(2)  # (2, instances, channels): of g, of g x^
    weighted = per_channel if inputs[3] is None else per_channel * inputs[3].float()
    average, along = weighted.unflatten(2, (groups, -1)).sum(3) / (positions * (channels // groups))
    group_backward_kernel[(instances * blocks, columns)](
        *inputs,
        *found,
        average,
        along,
        vo.tensor,
        frames,
        span,
        plane // plane_unit,
        channels // channel_unit,
        groups,
        *layout_of,
        center,
        silu,
        fast,
        flat,
        block,
        block_c,
        num_warps=warps,
    )
    return per_channel[1].sum(0), per_channel[0].sum(0)
