"""Triton kernels of ``norm_act``, forward: LayerNorm, RMSNorm and GroupNorm with what comes before and after
them in one pass.

``layer`` and ``rms`` hold all channels of a group at some positions in registers, so that the video is read
once. ``group`` and ``group_rms`` read it twice: first the sums of each channel over parts of the positions,
then, with the
    statistics of each group,
the result. A large mean costs no accuracy: sums are of differences from a value close to the mean, the
origin, and a mean is kept as an origin and the rest, since one float32 could be off by more than the
differences' own rounding.

A video is seen as (instance, channel, position). An instance is a clip, or a frame where GroupNorm is per
frame; position q of it lies at frame q // plane and pixel q % plane. All is computed in float32 and rounded
once; ``CHAIN`` rounds where a library's own chain of operations does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtok_fast.dispatch.tuning import power_of_two
from vtok_fast.kernels import on_device_of, tuned_tile, unit_of

SUMS = 4096  # values of a tile whose sums stay in registers
TILES_AHEAD = 3  # of the sums: so many are under way while one is added up
GROUP_LAST_FIRST = True  # the second reading of a video begins at its end
STATISTICS = 1024  # sums that one step of the statistics reads: eight for each thread
MAX_CHANNELS = 8192  # of a group of kind layer or rms: one tile holds them
CHAINS = {"once": 0, "wan": 1, "ltx": 2}
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

LOG2_E = tl.constexpr(1.4426950408889634)
_VIDEOS = ("x", "residual", "scale", "shift", "y", "tail", "grad", "grad_x")
# Integers that differ from call to call, or are counted in units: nothing is compiled anew for one that
# happens to be 1 or a multiple of 16.
LENGTHS = [
    *("frames", "span", "plane", "tail_first", "parts", "steps", "positions", "programs", "clips"),
    *("channels", "size", "columns"),
    *(f"{name}_{of}_stride" for name in _VIDEOS for of in ("batch", "channel", "frame", "position")),
]

# ---- kernels -----------------------------------------------------------------------------------------------


@triton.jit
def _place(instance, q, frames, span, plane, FLAT: tl.constexpr):
    """Clip, frame and pixel of the positions q of an instance of ``span`` frames; FLAT: frames follow one
    another without gaps."""
    per_clip = frames // span
    b = (instance // per_clip).to(tl.int64)
    first = (instance % per_clip * span).to(tl.int64)
    if FLAT:
        t, p = first * 0, first * plane + q
    else:
        t, p = first + q // plane, (q % plane).to(tl.int64)
    return b, t, p


@triton.jit
def _at(pointer, b, c, t, p, batch_stride, channel_stride, frame_stride, position_stride, HOW: tl.constexpr):
    """Pointers (positions, channels) into a tensor (B, C, T, P) that is laid out as `how` says: strides are
    counted in units that the compiler knows, so that it knows what is aligned whatever the lengths."""
    UNIT: tl.constexpr = 1 << ((HOW >> 2) & 3)
    at = pointer + b * batch_stride * UNIT
    channel = c.to(tl.int64)[None, :]
    if (HOW & 3) == 3:
        at += channel
    elif (HOW & 3) == 2:
        at += (t * frame_stride * UNIT + p)[:, None] + channel * channel_stride * UNIT
    elif (HOW & 3) == 1:
        at += (t * frame_stride * UNIT + p * position_stride * UNIT)[:, None] + channel
    else:
        at += (t * frame_stride * UNIT + p * position_stride * UNIT)[:, None]
        at += channel * channel_stride * UNIT
    return at


@triton.jit
def _modulation(pointer, b, c, t, p, mask, inside, batch, channel, frame, position, HOW: tl.constexpr):
    """Scale or shift in float32: a row of channels where it is the same at all positions."""
    at = _at(pointer, b, c, t, p, batch, channel, frame, position, HOW)
    return tl.load(at, mask=inside[None, :] if (HOW & 3) == 3 else mask, other=0.0).to(tl.float32)


@triton.jit
def _sigmoid(v, FAST: tl.constexpr):
    """FAST: in two instructions of NVIDIA's, within 4 units of the last place of 1 + exp(-v); what is less
    than 2**-126 is 0."""
    if FAST:
        grown = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [v * -LOG2_E], dtype=tl.float32, is_pure=True, pack=1
        )
        result = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + grown], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        result = 1.0 / (1.0 + tl.exp(-v))
    return result


@triton.jit
def _input(
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
    HOW: tl.constexpr,
    CHAIN: tl.constexpr,
):
    v = tl.load(
        _at(x, b, c, t, p, x_batch_stride, x_channel_stride, x_frame_stride, x_position_stride, HOW),
        mask=mask,
        other=0.0,
    ).to(tl.float32)
    if residual is not None:
        v += tl.load(
            _at(
                residual,
                b,
                c,
                t,
                p,
                residual_batch_stride,
                residual_channel_stride,
                residual_frame_stride,
                residual_position_stride,
                HOW >> 4,
            ),
            mask=mask,
            other=0.0,
        ).to(tl.float32)
        if CHAIN:
            v = v.to(x.dtype.element_ty).to(tl.float32)
    return v


@triton.jit
def _per_channel(pointer, c, inside):
    return tl.load(pointer + c, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _affine(
    v,
    weight,
    bias,
    scale,
    shift,
    b,
    c,
    t,
    p,
    mask,
    inside,
    channels,
    scale_batch_stride,
    scale_channel_stride,
    scale_frame_stride,
    scale_position_stride,
    shift_batch_stride,
    shift_channel_stride,
    shift_frame_stride,
    shift_position_stride,
    HOW: tl.constexpr,
    SILU: tl.constexpr,
    FAST: tl.constexpr,
    CHAIN: tl.constexpr,
    AFTER_NORM: tl.constexpr,
    AFTER_WEIGHT: tl.constexpr,
    AFTER_BIAS: tl.constexpr,
    AFTER_SCALE: tl.constexpr,
    AFTER_SHIFT: tl.constexpr,
):
    """What follows the norm. The AFTER types are those of a chain's intermediate results."""
    if CHAIN:
        v = v.to(AFTER_NORM).to(tl.float32)
    if CHAIN == 1:
        v = (v * tl.sqrt_rn(tl.full((), channels, tl.float32))).to(AFTER_NORM).to(tl.float32)
    if weight is not None:
        v = v * _per_channel(weight, c, inside)
        if CHAIN:
            v = v.to(AFTER_WEIGHT).to(tl.float32)
    if bias is not None:
        v = v + _per_channel(bias, c, inside)
        if CHAIN:
            v = v.to(AFTER_BIAS).to(tl.float32)
    if scale is not None:
        v = v * _modulation(
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
        if CHAIN:
            v = v.to(AFTER_SCALE).to(tl.float32)
    if shift is not None:
        v = v + _modulation(
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
        if CHAIN:
            v = v.to(AFTER_SHIFT).to(tl.float32)
    if SILU:
        v = v * _sigmoid(v, True) if FAST else v / (1.0 + tl.exp(-v))
        if CHAIN:
            v = v.to(AFTER_SHIFT).to(tl.float32)
    return v


@triton.jit
def _store(
    v,
    y,
    tail,
    b,
    c,
    t,
    p,
    mask,
    y_batch_stride,
    y_channel_stride,
    y_frame_stride,
    y_position_stride,
    tail_batch_stride,
    tail_channel_stride,
    tail_frame_stride,
    tail_position_stride,
    tail_first,
    plane,
    HOW: tl.constexpr,
    FLAT: tl.constexpr,
):
    """The result, and once more where it belongs to the last frames: ``tail_first`` is the first of them."""
    tl.store(
        _at(y, b, c, t, p, y_batch_stride, y_channel_stride, y_frame_stride, y_position_stride, HOW >> 16),
        v.to(y.dtype.element_ty),
        mask=mask,
    )
    if tail is not None:
        behind = p - tail_first * plane if FLAT else p
        late = (behind >= 0) if FLAT else (t >= tail_first)
        tl.store(
            _at(
                tail,
                b,
                c,
                t * 0 if FLAT else t - tail_first,
                behind,
                tail_batch_stride,
                tail_channel_stride,
                tail_frame_stride,
                tail_position_stride,
                HOW >> 20,
            ),
            v.to(tail.dtype.element_ty),
            mask=mask & late[:, None],
        )


@triton.jit(do_not_specialize=LENGTHS)
def position_kernel(
    x,
    residual,
    weight,
    bias,
    scale,
    shift,
    y,
    tail,
    frames,
    plane,
    channels,
    size,
    eps,
    tail_first,
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
    y_batch_stride,
    y_channel_stride,
    y_frame_stride,
    y_position_stride,
    tail_batch_stride,
    tail_channel_stride,
    tail_frame_stride,
    tail_position_stride,
    HOW: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    PLANE_UNIT: tl.constexpr,
    CENTER: tl.constexpr,
    SILU: tl.constexpr,
    FAST: tl.constexpr,
    CHAIN: tl.constexpr,
    AFTER_NORM: tl.constexpr,
    AFTER_WEIGHT: tl.constexpr,
    AFTER_BIAS: tl.constexpr,
    AFTER_SCALE: tl.constexpr,
    AFTER_SHIFT: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Statistics over the channels of each position. Programs (clips x blocks of positions, groups).
    ``plane`` is counted in PLANE_UNIT, ``size``, the channels of a group, in CHANNEL_UNIT."""
    plane *= PLANE_UNIT
    size *= CHANNEL_UNIT
    positions = frames * plane
    blocks = tl.cdiv(positions, BLOCK)
    q = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    b, t, p = _place(tl.program_id(0) // blocks, q, frames, frames, plane, FLAT)
    k = tl.arange(0, BLOCK_C)
    c = tl.program_id(1) * size + k
    inside = k < size
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
        CHAIN,
    )
    if CENTER:
        v = tl.where(inside[None, :], v - (tl.sum(v, 1) / size)[:, None], 0.0)
    square = tl.sum(v * v, 1)
    if CHAIN == 1:
        v = tl.div_rn(v, tl.maximum(tl.sqrt_rn(square), 1e-12)[:, None] + tl.zeros_like(v))
    else:
        v = v * tl.rsqrt(square / size + eps)[:, None]
    v = _affine(
        v,
        weight,
        bias,
        scale,
        shift,
        b,
        c,
        t,
        p,
        mask,
        inside,
        channels,
        scale_batch_stride,
        scale_channel_stride,
        scale_frame_stride,
        scale_position_stride,
        shift_batch_stride,
        shift_channel_stride,
        shift_frame_stride,
        shift_position_stride,
        HOW,
        SILU,
        FAST,
        CHAIN,
        AFTER_NORM,
        AFTER_WEIGHT,
        AFTER_BIAS,
        AFTER_SCALE,
        AFTER_SHIFT,
    )
    _store(
        v,
        y,
        tail,
        b,
        c,
        t,
        p,
        mask,
        y_batch_stride,
        y_channel_stride,
        y_frame_stride,
        y_position_stride,
        tail_batch_stride,
        tail_channel_stride,
        tail_frame_stride,
        tail_position_stride,
        tail_first,
        plane,
        HOW,
        FLAT,
    )


@triton.jit
def _differences(
    x,
    residual,
    origin,
    instance,
    c,
    first,
    end,
    frames,
    span,
    plane,
    channels,
    x_batch_stride,
    x_channel_stride,
    x_frame_stride,
    x_position_stride,
    residual_batch_stride,
    residual_channel_stride,
    residual_frame_stride,
    residual_position_stride,
    HOW: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile less the origin of each channel, if there is one; 0 where nothing is."""
    q = first + tl.arange(0, BLOCK)
    b, t, p = _place(instance, q, frames, span, plane, FLAT)
    mask = (q < end)[:, None] & (c < channels)[None, :]
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
    if origin is not None:
        v = tl.where(mask, v - origin[None, :], 0.0)
    return v


@triton.jit(do_not_specialize=LENGTHS)
def sums_kernel(
    x,
    residual,
    origins,
    means,
    squares,
    frames,
    span,
    plane,
    channels,
    parts,
    x_batch_stride,
    x_channel_stride,
    x_frame_stride,
    x_position_stride,
    residual_batch_stride,
    residual_channel_stride,
    residual_frame_stride,
    residual_position_stride,
    HOW: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    PLANE_UNIT: tl.constexpr,
    CENTER: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Per WIDTH channels of one group, over a part of an instance's positions: an origin, the mean less that,
    and the sum of squared differences from the mean (without CENTER the sum of squares). Programs (instances
    x parts, blocks of channels)."""
    plane *= PLANE_UNIT
    channels *= CHANNEL_UNIT
    instance = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    positions = span * plane
    steps = tl.cdiv(tl.cdiv(positions, BLOCK), parts)
    begin = part * steps * BLOCK
    end = tl.minimum(begin + steps * BLOCK, positions)
    count = tl.maximum(end - begin, 1)
    origin = tl.zeros((BLOCK_C,), tl.float32)
    total = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    if CENTER:  # any value near the mean will do: that of the first tile, which then is in a cache
        v = _differences(
            x,
            residual,
            None,
            instance,
            c,
            begin,
            end,
            frames,
            span,
            plane,
            channels,
            x_batch_stride,
            x_channel_stride,
            x_frame_stride,
            x_position_stride,
            residual_batch_stride,
            residual_channel_stride,
            residual_frame_stride,
            residual_position_stride,
            HOW,
            FLAT,
            BLOCK,
        )
        origin = tl.sum(v, 0) / tl.minimum(count, BLOCK)
    square = tl.zeros((BLOCK, BLOCK_C), tl.float32)
    for first in tl.range(begin, end, BLOCK, num_stages=STAGES):
        v = _differences(
            x,
            residual,
            origin,
            instance,
            c,
            first,
            end,
            frames,
            span,
            plane,
            channels,
            x_batch_stride,
            x_channel_stride,
            x_frame_stride,
            x_position_stride,
            residual_batch_stride,
            residual_channel_stride,
            residual_frame_stride,
            residual_position_stride,
            HOW,
            FLAT,
            BLOCK,
        )
        if CENTER:
            total += v
        square += v * v
    mean = tl.sum(total, 0) / count
    squared = tl.sum(square, 0) - mean * mean * count
    if WIDTH > 1:  # all count the same, so the mean of means is the mean
        each = tl.reshape(origin, (BLOCK_C // WIDTH, WIDTH))
        origin = tl.sum(each, 1) / WIDTH
        away = each - origin[:, None] + tl.reshape(mean, (BLOCK_C // WIDTH, WIDTH))
        mean = tl.sum(away, 1) / WIDTH
        away -= mean[:, None]
        squared = tl.sum(tl.reshape(squared, (BLOCK_C // WIDTH, WIDTH)) + away * away * count, 1)
    columns = channels // WIDTH
    column = tl.program_id(1) * (BLOCK_C // WIDTH) + tl.arange(0, BLOCK_C // WIDTH)
    at = tl.program_id(0).to(tl.int64) * columns + column
    tl.store(origins + at, origin, mask=column < columns)
    tl.store(means + at, mean, mask=column < columns)
    tl.store(squares + at, squared, mask=column < columns)


@triton.jit(do_not_specialize=LENGTHS)
def statistics_kernel(
    origins,
    means,
    squares,
    origin,
    mean,
    rstd,
    parts,
    steps,
    positions,
    columns,
    groups,
    eps,
    CENTER: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Per instance and group: the parts' sums, each of WIDTH channels, as one origin, one mean less that, and
    one reciprocal deviation."""
    instance = (tl.program_id(0) // groups).to(tl.int64)
    size = columns // groups
    first_c = tl.program_id(0) % groups * size
    elements = tl.full((), positions, tl.float32) * (size * WIDTH)
    base = tl.load(origins + instance * parts * columns + first_c)
    average = tl.zeros((), tl.float32)
    deviation = tl.zeros((), tl.float32)
    for phase in tl.static_range(2 if CENTER else 1):
        total = tl.zeros((BLOCK_PARTS, BLOCK_C), tl.float32)
        for first in range(0, parts, BLOCK_PARTS):
            for k in range(0, size, BLOCK_C):
                part = first + tl.arange(0, BLOCK_PARTS)
                c = k + tl.arange(0, BLOCK_C)
                mask = (part < parts)[:, None] & (c < size)[None, :]
                at = (instance * parts + part)[:, None] * columns + (first_c + c)[None, :]
                begin = tl.minimum(part * steps * BLOCK, positions)
                count = (tl.minimum(begin + steps * BLOCK, positions) - begin).to(tl.float32)[:, None] * WIDTH
                if CENTER:
                    away = (tl.load(origins + at, mask=mask, other=0.0) - base) + tl.load(
                        means + at, mask=mask, other=0.0
                    )
                    away = tl.where(mask, away - average, 0.0)
                if phase == 0 and CENTER:
                    total += away * count
                else:
                    total += tl.load(squares + at, mask=mask, other=0.0)
                    if CENTER:
                        total += away * away * count
        if phase == 0 and CENTER:
            average = tl.sum(tl.sum(total, 1), 0) / elements
        else:
            deviation = tl.sum(tl.sum(total, 1), 0) / elements
    tl.store(origin + tl.program_id(0), base)
    tl.store(mean + tl.program_id(0), average)
    tl.store(rstd + tl.program_id(0), tl.rsqrt(deviation + eps))


@triton.jit(do_not_specialize=LENGTHS)
def group_kernel(
    x,
    residual,
    weight,
    bias,
    scale,
    shift,
    origin,
    mean,
    rstd,
    y,
    tail,
    frames,
    span,
    plane,
    channels,
    groups,
    tail_first,
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
    y_batch_stride,
    y_channel_stride,
    y_frame_stride,
    y_position_stride,
    tail_batch_stride,
    tail_channel_stride,
    tail_frame_stride,
    tail_position_stride,
    HOW: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    PLANE_UNIT: tl.constexpr,
    SILU: tl.constexpr,
    FAST: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LAST_FIRST: tl.constexpr,
):
    """The result, given the statistics. Programs (instances x blocks of positions, blocks of channels).
    LAST_FIRST: the end of the video comes first, which the sums have left in the cache."""
    plane *= PLANE_UNIT
    channels *= CHANNEL_UNIT
    positions = span * plane
    blocks = tl.cdiv(positions, BLOCK)
    task = tl.num_programs(0) - 1 - tl.program_id(0) if LAST_FIRST else tl.program_id(0)
    instance = task // blocks
    q = task % blocks * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b, t, p = _place(instance, q, frames, span, plane, FLAT)
    inside = c < channels
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
    group = instance * groups + c // (channels // groups)
    v = (v - _per_channel(origin, group, inside) - _per_channel(mean, group, inside)) * _per_channel(
        rstd, group, inside
    )
    v = _affine(
        v,
        weight,
        bias,
        scale,
        shift,
        b,
        c,
        t,
        p,
        mask,
        inside,
        channels,
        scale_batch_stride,
        scale_channel_stride,
        scale_frame_stride,
        scale_position_stride,
        shift_batch_stride,
        shift_channel_stride,
        shift_frame_stride,
        shift_position_stride,
        HOW,
        SILU,
        FAST,
        0,
        None,
        None,
        None,
        None,
        None,
    )
    _store(
        v,
        y,
        tail,
        b,
        c,
        t,
        p,
        mask,
        y_batch_stride,
        y_channel_stride,
        y_frame_stride,
        y_position_stride,
        tail_batch_stride,
        tail_channel_stride,
        tail_frame_stride,
        tail_position_stride,
        tail_first,
        plane,
        HOW,
        FLAT,
    )


# ---- launchers ---------------------------------------------------------------------------------------------


class View(NamedTuple):
    """A tensor (B, C, T, H, W) as the kernels take it: with H and W as one, and its four strides."""

    tensor: Tensor | None
    strides: tuple[int, ...] = (0, 0, 0, 0)
    constant: bool = False  # may be the same at all positions


def view(tensor: Tensor | None, shape: torch.Size | None = None) -> View:
    """Copies only where rows of pixels do not follow one another at a constant step. ``shape``: to broadcast
    to."""
    if tensor is None:
        return View(None)
    if shape is not None:
        tensor = tensor.expand(shape)
    flat = tensor.flatten(3)
    return View(flat, flat.stride(), shape is not None)


def how(flat: bool, groups: int, *views: View) -> tuple[int, list[int], int, int]:
    """How the kernels find their way in tensors (B, C, T, P): four bits for each, the strides in the units
    that these name, and the units of channels and planes.

    The lower two bits say what follows what: 1, channels; 2, positions; 3, channels, the same ones at all
    positions, where `view` was told to broadcast; 0, anything. The upper two are log2 of the unit, which
    divides all other strides. The other units divide the channels of a group, and the plane.
    """
    present = [v for v in views if v.tensor is not None]
    kinds = {_near(v) for v in present}
    sizes = present[0].tensor.shape
    # One unit for all that have neighbors, so that their combinations are few.
    lengths = [sizes[1] // groups] * bool(kinds & {1, 3}) + [sizes[3]] * (2 in kinds)
    shared = unit_of(*lengths, *(s for v in present if _near(v) for s in _steps(v, flat)))
    bits, strides = 0, []
    for i, v in enumerate(views):
        if v.tensor is None:
            strides += [0, 0, 0, 0]
            continue
        unit = shared if _near(v) else unit_of(*_steps(v, flat))
        strides += [s // unit for s in _steps(v, flat)]
        bits |= (_near(v) | (unit.bit_length() - 1) << 2) << 4 * i
    return bits, strides, shared if kinds & {1, 3} else 1, shared if 2 in kinds else 1


def _steps(v: View, flat: bool) -> list[int]:
    """The strides that the kernels use: 0 for others, and for that which is 1."""
    kind, own = _near(v), [0 if n == 1 else s for n, s in zip(v.tensor.shape, v.strides)]
    return [own[0], own[1] * (kind not in (1, 3)), own[2] * (not flat), own[3] * (kind != 2)]


def _near(v: View) -> int:
    channel, frame, position = (0 if n == 1 else s for n, s in zip(v.tensor.shape[1:], v.strides[1:]))
    if channel == 1:
        return 3 if v.constant and frame == position == 0 else 1
    return 2 if position == 1 else 0


def is_flat(frames: int, plane: int, *views: View) -> bool:
    """Whether in all tensors frame follows frame at the step of pixels."""
    return all(v.tensor is None or frames == 1 or v.strides[2] == plane * v.strides[3] for v in views)


def tile(width: int, positions: int, planar: bool, values: int = 8192) -> tuple[int, int]:
    """Positions of a tile of ``width`` channels with about ``values`` values, and its warps. Planar videos
    want long runs."""
    block = max(values // width, 32 if planar and width <= 256 else 1)
    block = min(block, triton.next_power_of_2(max(positions, 1)))
    return block, 4 if block * width <= values // 2 else 8


def tuned(
    kernel: str, x: Tensor, width: int, positions: int, planar: bool, values: int = 8192
) -> tuple[int, int]:
    """`tile`, unless the tuning table has another one for this class of launches."""
    return tuned_tile(
        "norm_act",
        x,
        tile(width, positions, planar, values),
        kernel,
        x.dtype,
        f"width {width}",
        "planar" if planar else "channels last",
        power_of_two(positions),
    )


def chain_types(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    rounding: str,
) -> list:
    """The types that the library's intermediate results have, as PyTorch promotes them."""
    now = x.dtype
    # To the weight's type if that is narrow, else it stays in float32
    if rounding == "ltx" and weight is not None:
        now = weight.dtype if weight.dtype in (torch.float16, torch.bfloat16) else torch.float32
    types = [now]
    for t in (weight, bias, scale, shift):
        now = now if t is None else torch.promote_types(now, t.dtype)
        types.append(now)
    return [TYPES[t] for t in types]


def statistics(
    vx: View, vr: View, shape: torch.Size, center: bool, groups: int, per_frame: bool, eps: float, flat: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Origin, mean less that, and reciprocal deviation of each instance and group, float32 (instances,
    groups)."""
    b, channels, frames, h, w = shape
    span, plane = 1 if per_frame else frames, h * w
    positions, instances = span * plane, b * (frames // span)
    planar = vx.strides[1] != 1
    block_c = min(triton.next_power_of_2(channels), 16 if planar else 128)
    block, warps = tuned("sums", vx.tensor, block_c, positions, planar, SUMS)
    blocks = triton.cdiv(positions, block)
    # Enough programs to fill a GPU, each with some blocks to read.
    wanted = max(1, 1024 // max(1, instances * triton.cdiv(channels, block_c)))
    steps = triton.cdiv(blocks, min(blocks, wanted))
    parts = triton.cdiv(blocks, steps)
    device, width = vx.tensor.device, joined(channels // groups, block_c)
    columns = channels // width
    bits, strides, channel_unit, plane_unit = how(flat, 1, vx, vr)
    sums = torch.empty(3, instances, parts, columns, dtype=torch.float32, device=device)
    result = torch.empty(3, instances, groups, dtype=torch.float32, device=device)
    sums_kernel[(instances * parts, triton.cdiv(channels, block_c))](
        vx.tensor,
        vr.tensor,
        *sums,
        frames,
        span,
        plane // plane_unit,
        channels // channel_unit,
        parts,
        *strides,
        bits,
        channel_unit,
        plane_unit,
        center,
        flat,
        block,
        block_c,
        width,
        TILES_AHEAD,
        num_warps=warps,
    )
    wide = min(triton.next_power_of_2(columns // groups), 32)
    statistics_kernel[(instances * groups,)](
        *sums,
        *result,
        parts,
        steps,
        positions,
        columns,
        groups,
        eps,
        center,
        block,
        STATISTICS // wide,
        wide,
        width,
    )
    return tuple(result)


def joined(size: int, block_c: int) -> int:
    """Channels of a group of ``size`` whose sums leave a block of ``block_c`` channels as one: all that the
    block has of them, where that is always the same number."""
    whole = min(size, block_c)
    return whole if size % whole == 0 and block_c % whole == 0 else 1


def is_fast(x: Tensor, silu: bool) -> bool:
    """Whether SiLU may be two instructions that only NVIDIA's GPUs have."""
    return silu and x.is_cuda and torch.version.hip is None


def norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    *,
    kind: str,
    groups: int,
    per_frame: bool,
    eps: float,
    silu: bool,
    rounding: str,
    tail: Tensor | None = None,
) -> None:
    """Writes ``y``, and its last frames also to ``tail``; arguments as in `vtok_fast.norm_act`.

    ``y`` and ``tail`` are fresh tensors in one memory format. Scale and shift broadcast to ``x``.
    """
    b, channels, frames, h, w = x.shape
    plane = h * w
    if x.numel() == 0:
        return
    scale, shift = (None if t is None else t.reshape((1,) * (5 - t.dim()) + t.shape) for t in (scale, shift))
    vx, vr, vy, vt = view(x), view(residual), view(y), view(tail)
    vs, vh = view(scale, x.shape), view(shift, x.shape)
    flat = is_flat(frames, plane, vx, vr, vs, vh, vy, vt)
    planar = vx.strides[1] != 1
    tail_first = 0 if tail is None else frames - tail.shape[2]
    each = groups if kind in ("layer", "rms") else 1
    bits, strides, channel_unit, plane_unit = how(flat, each, vx, vr, vs, vh, vy, vt)
    center = kind in ("layer", "group")
    with on_device_of(x):
        if kind in ("layer", "rms"):
            block_c = triton.next_power_of_2(channels // groups)
            block, warps = tuned("position", x, block_c, frames * plane, planar)
            chain = CHAINS[rounding]
            types = chain_types(x, weight, bias, scale, shift, rounding) if chain else [None] * 5
            position_kernel[(b * triton.cdiv(frames * plane, block), groups)](
                vx.tensor,
                vr.tensor,
                weight,
                bias,
                vs.tensor,
                vh.tensor,
                vy.tensor,
                vt.tensor,
                frames,
                plane // plane_unit,
                channels,
                channels // groups // channel_unit,
                eps,
                tail_first,
                *strides,
                bits,
                channel_unit,
                plane_unit,
                center,
                silu,
                is_fast(x, silu) and not chain,
                chain,
                *types,
                flat,
                block,
                block_c,
                num_warps=warps,
                # A library rounds between a product and a sum; in float32 no cast keeps them apart.
                enable_fp_fusion=tl.float32 not in types,
            )
            return
        found = statistics(vx, vr, x.shape, center, groups, per_frame, eps, flat)
        span = 1 if per_frame else frames
        block_c = min(triton.next_power_of_2(channels), 16 if planar else 128)
        block, warps = tuned("group", x, block_c, span * plane, planar)
        group_kernel[(b * frames // span * triton.cdiv(span * plane, block), triton.cdiv(channels, block_c))](
            vx.tensor,
            vr.tensor,
            weight,
            bias,
            vs.tensor,
            vh.tensor,
            *found,
            vy.tensor,
            vt.tensor,
            frames,
            span,
            plane // plane_unit,
            channels // channel_unit,
            groups,
            tail_first,
            *strides,
            bits,
            channel_unit,
            plane_unit,
            silu,
            is_fast(x, silu),
            flat,
            block,
            block_c,
            GROUP_LAST_FIRST,
            num_warps=warps,
        )
