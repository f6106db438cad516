"""What a call of ``causal_conv3d`` must satisfy, and what an error says of one that does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtok_fast.ops.causal_conv3d.call import MODES, Geometry, Triple

LARGEST_STEP, LARGEST_AXIS = 2**16, 2**27  # beyond any video; the kernels' tables of an axis hold ints


def triple(name: str, value: int | Sequence[int], least: int) -> Triple:
    triple = (value,) * 3 if isinstance(value, int) else tuple(value)
    if len(triple) != 3 or any(not isinstance(v, int) or not least <= v <= LARGEST_STEP for v in triple):
        raise ValueError(
            f"{name}: expected one int or three (time, height, width), each from {least} to {LARGEST_STEP}, "
            f"got "
            f"{value!r}"
        )
    return triple


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Under autocast, the tensors in its dtype, as PyTorch's own convolutions take them; float64 is left
    alone."""
    devices = [t.device.type for t in tensors if isinstance(t, Tensor)]
    device = devices[0] if devices else "cpu"
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    narrow = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in narrow else t for t in tensors)


def check_tensors(x: Tensor, weight: Tensor, bias: Tensor | None, cache: Tensor | None, groups: int) -> None:
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("cache", cache)):
        if not isinstance(tensor, Tensor) and not (tensor is None and name in ("bias", "cache")):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if torch.jit.is_tracing():
        raise RuntimeError("torch.jit.trace cannot record vtok_fast's ops; use torch.compile or torch.export")
    if x.dim() != 5:
        raise ValueError(f"x: expected (B, C, T, H, W), got shape {tuple(x.shape)}")
    if weight.dim() != 5:
        raise ValueError(f"weight: expected (O, C/groups, kt, kh, kw), got shape {tuple(weight.shape)}")
    if x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(
            f"x: expected a floating point dtype (float32, float64, bfloat16, float16), got {x.dtype}"
        )
    if not isinstance(groups, int) or groups < 1 or x.shape[1] % groups or weight.shape[0] % groups:
        raise ValueError(
            f"groups: must divide {x.shape[1]} input and {weight.shape[0]} output channels, got {groups}"
        )
    if weight.shape[1] * groups != x.shape[1]:
        raise ValueError(
            f"weight: expects {weight.shape[1] * groups} input channels (shape {tuple(weight.shape)}, groups "
            f"{groups}), but x has {x.shape[1]} (shape {tuple(x.shape)})"
        )
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if cache is not None and (
        cache.dim() != 5 or cache.shape[:2] != x.shape[:2] or cache.shape[3:] != x.shape[3:]
    ):
        raise ValueError(f"cache: expected (B, C, n, H, W) like x {tuple(x.shape)}, got {tuple(cache.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias), ("cache", cache)):
        if tensor is not None:
            check_like(name, tensor, x)


def check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name}: expected the dtype of x, {x.dtype}, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected the device of x, {x.device}, got {tensor.device}")


def resolve_pads(
    x: Tensor,
    weight: Tensor,
    stride: Triple,
    dilation: Triple,
    time_pad: Sequence[int] | None,
    spatial_pad: Sequence[Sequence[int]] | None,
) -> tuple[int, int, int, int, int, int]:
    spans = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
    if spatial_pad is None:
        if stride[1] > 1 or stride[2] > 1:
            raise ValueError(
                f"spatial_pad: must be given with stride {stride}, because 'same' is ambiguous there"
            )
        spatial_pad = [(s // 2, s - s // 2) for s in spans[1:]]
    time_pad = (spans[0], 0) if time_pad is None else time_pad
    try:
        (top, bottom), (left, right) = spatial_pad
        front, back = time_pad
    except (TypeError, ValueError):
        raise ValueError(
            f"time_pad, spatial_pad: expected (front, back) and ((top, bottom), (left, right)), got "
            f"{time_pad!r} "
            f"and {spatial_pad!r}"
        ) from None
    pad = (front, back, top, bottom, left, right)
    for name, p in zip(("time_pad", "time_pad", *("spatial_pad",) * 4), pad):
        if not isinstance(p, int) or not 0 <= p < 2**31:
            raise ValueError(f"{name}: pads must be ints, not negative and below 2**31, got {p!r}")
    return pad


def check_geometry(
    x: Tensor, weight: Tensor, cache: Tensor | None, geometry: Geometry, depth_to_space: Triple
) -> list[int]:
    """The shape of the output.

    Raises:
        ValueError: a mode is unknown, a pad or factor impossible, or the output would be empty or too large.
    """
    pad, upsample = geometry.pad, geometry.upsample
    for name in ("time_mode", "spatial_mode"):
        if (mode := getattr(geometry, name)) not in MODES:
            raise ValueError(f"{name}: expected one of {', '.join(MODES)}, got {mode!r}")
    if 0 in x.shape[1:]:
        raise ValueError(f"x: no dimension but the batch may be empty, got shape {tuple(x.shape)}")
    if 0 in weight.shape:
        raise ValueError(f"weight: no dimension may be empty, got shape {tuple(weight.shape)}")
    cached = 0 if cache is None else cache.shape[2] * upsample[0]
    frames = x.shape[2] * upsample[0] - (upsample[0] - 1 if geometry.upsample_first_frame_once else 0)
    lengths = (frames + min(cached, pad[0]), x.shape[3] * upsample[1], x.shape[4] * upsample[2])
    rest = (max(pad[0] - cached, 0), *pad[1:])
    for axis, (name, length) in enumerate(zip(("time_pad", "spatial_pad", "spatial_pad"), lengths)):
        mode = geometry.spatial_mode if axis else geometry.time_mode
        largest = max(rest[2 * axis : 2 * axis + 2])
        if mode == "reflect" and largest >= length:
            raise ValueError(
                f"{name}: reflect needs pads smaller than the {length} elements of the axis, got {largest}"
            )
    size = geometry.output_size(x.shape[2:], weight.shape[2:])
    if min(size) < 1:
        raise ValueError(
            f"x: too small for the kernel: {tuple(x.shape[2:])} (T, H, W) with pads {pad} and kernel "
            f"{tuple(weight.shape[2:])} gives an output of {tuple(size)}"
        )
    if max(size[i] * weight.shape[2 + i] for i in range(3)) > LARGEST_AXIS or max(lengths) > LARGEST_AXIS:
        raise ValueError(
            f"time_pad, spatial_pad: {pad} (front, back, top, bottom, left, right) and upsample {upsample} "
            f"make an "
            f"axis of more than {LARGEST_AXIS} elements times taps"
        )
    if math.prod(size) * weight.shape[0] * max(x.shape[0], 1) >= 2**48:
        raise ValueError(
            f"time_pad, spatial_pad: {pad} (front, back, top, bottom, left, right) would make an output of "
            f"{tuple(size)} (T, H, W) with {weight.shape[0]} channels, which no machine holds"
        )
    factor = math.prod(depth_to_space)
    if weight.shape[0] % factor:
        raise ValueError(
            f"depth_to_space: {depth_to_space} does not divide {weight.shape[0]} output channels"
        )
    return [x.shape[0], weight.shape[0] // factor, *(s * r for s, r in zip(size, depth_to_space))]


def check_residual(
    x: Tensor,
    residual: Tensor | None,
    alpha: float | Tensor | None,
    size: list[int],
    geometry: Geometry,
    depth_to_space: Triple,
) -> None:
    """Raises where ``residual`` is neither of the output's shape ``size`` nor of the one that upsampling
    makes it."""
    upsample = geometry.upsample
    if residual is None:
        if alpha is not None:
            raise ValueError(f"alpha: blends with residual, which is None; got alpha={alpha!r}")
        return
    check_like("residual", residual, x)
    if isinstance(alpha, Tensor) and alpha.numel() != 1:
        raise ValueError(
            f"alpha: expected a number or a tensor of one element, got shape {tuple(alpha.shape)}"
        )
    shape = list(residual.shape)
    if shape == size:
        return
    if len(shape) == 5 and depth_to_space == (1, 1, 1):
        up = [n * u for n, u in zip(shape[2:], upsample)]
        if geometry.upsample_first_frame_once:
            up[0] -= upsample[0] - 1
        if shape[:2] + up == size:
            return
    raise ValueError(
        f"residual: expected the output's shape {tuple(size)}, as it is or before upsampling by {upsample}, "
        f"got "
        f"{tuple(residual.shape)}"
    )
