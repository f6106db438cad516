"""What finite scalar quantization means (Mentzer et al. 2023, "Finite Scalar Quantization"), in plain
PyTorch.

Each channel is bounded, ``b(z) = tanh(z + shift) * half_l - offset``, and rounded to one of its L levels. The
index is *defined* by that formula in float64. It is monotone, so for values that float32 holds (float16 and
bfloat16 too) it equals the number of thresholds that the value has reached, where threshold k is the smallest
float32 whose level is at least k + 1.

Two variants: ``vidtok`` (also Cosmos and lucidrains), half_l = (L-1)(1+eps)/2 and shift =
atanh(offset/half_l); ``elastictok``, half_l = (L-1)(1-eps)/2 and shift = tan(offset/half_l). In both eps =
1e-3, and offset = 1/2 for an even L, 0 for an odd one.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

VARIANTS = ("vidtok", "elastictok")
EPS = 1e-3
# from 1001 on, (1 +- eps) shifts the outermost level by half a level and the formula names levels that are
# not
MAX_LEVEL = 1000


def bound_constants(level: int, variant: str = "vidtok") -> tuple[float, float, float]:
    """(half_l, offset, shift) of one channel, in float64."""
    offset = 0.5 if level % 2 == 0 else 0.0
    if variant == "vidtok":
        half_l = (level - 1) * (1 + EPS) / 2
        return half_l, offset, math.atanh(offset / half_l)
    half_l = (level - 1) * (1 - EPS) / 2
    return half_l, offset, math.tan(offset / half_l)


@functools.cache
def thresholds(level: int, variant: str = "vidtok") -> Tensor:
    """The level - 1 thresholds of a channel, float32, ascending: the level is how many of them are <= z. Do
    not write to it."""
    half_l, offset, shift = bound_constants(level, variant)

    def index(z: float) -> int:
        return round(math.tanh(z + shift) * half_l - offset) + level // 2

    found: list[float] = []
    for k in range(1, level):
        below, reached = _key(found[-1]) if found else _key(-32.0), _key(32.0)
        while reached - below > 1:
            middle = (below + reached) // 2
            below, reached = (below, middle) if index(_value(middle)) >= k else (middle, reached)
        found.append(_value(reached))
    with torch.inference_mode(False):  # the table outlives the call
        return torch.tensor(found, dtype=torch.float32, device="cpu")


def _key(z: float) -> int:
    """An integer per float32, in the order of the floats and without gaps."""
    bits = struct.unpack("<i", struct.pack("<f", z))[0]
    return bits if bits >= 0 else -(bits & 0x7FFFFFFF)


def _value(key: int) -> float:
    value = struct.unpack("<f", struct.pack("<i", abs(key)))[0]
    return value if key >= 0 else -value


def fsq_quantize(
    z: Tensor, levels: Sequence[int], *, variant: str = "vidtok", dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Codes and indices; arguments and the treatment of NaN as in `vtok_fast.fsq_quantize`."""
    last = z.movedim(dim, -1)
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    codes = torch.empty_like(last, dtype=wide)
    indices = torch.zeros_like(last[..., 0], dtype=torch.int64)
    basis = 1
    for channel, level in enumerate(levels):
        value = last[..., channel].to(wide)
        if wide == torch.float64:
            half_l, offset, shift = bound_constants(level, variant)
            index = (
                torch.round(torch.tanh(value + shift) * half_l - offset).nan_to_num(0.0).to(torch.int64)
                + level // 2
            )
        else:
            index = torch.bucketize(value.contiguous(), thresholds(level, variant).to(z.device), right=True)
        half = level // 2
        codes[..., channel] = torch.where(value.isnan(), value, (index - half).to(wide) / half)
        indices += index * basis
        basis *= level
    indices.masked_fill_(last.isnan().any(-1), -1)
    return codes.movedim(-1, dim).to(z.dtype), indices.to(torch.int32)


def fsq_quantize_backward(
    grad: Tensor, z: Tensor, levels: Sequence[int], *, variant: str = "vidtok", dim: int = 1
) -> Tensor:
    """Straight through the rounding, not through the bound: grad * (1 - tanh(z + shift)^2) * half_l / (L //
    2)."""
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    half_l, offset, shift = zip(*(bound_constants(level, variant) for level in levels))
    shape = [1] * z.dim()
    shape[dim] = len(levels)
    shifts = torch.tensor(shift, dtype=wide, device=z.device).view(shape)
    slopes = torch.tensor(
        [h / (level // 2) for h, level in zip(half_l, levels)], dtype=wide, device=z.device
    ).view(shape)
    t = torch.tanh(z.to(wide) + shifts)
    return (grad.to(wide) * (1 - t * t) * slopes).to(z.dtype)


def fsq_straight_through(
    z: Tensor, levels: Sequence[int], *, variant: str = "vidtok", dim: int = 1
) -> tuple[Tensor, Tensor]:
    """`fsq_quantize` with the gradient of `fsq_quantize_backward`, of operations that every transformation of
    PyTorch knows."""
    codes, indices = fsq_quantize(z.detach(), levels, variant=variant, dim=dim)
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    channels = []
    for channel, level in zip(z.to(wide).unbind(dim), levels):
        half_l, _, shift = bound_constants(level, variant)
        channels.append(torch.tanh(channel + shift) * (half_l / (level // 2)))
    slope = torch.stack(channels, dim)
    return codes + (slope - slope.detach()).to(z.dtype), indices  # adds zero, which has a gradient


def fsq_decode(
    indices: Tensor, levels: Sequence[int], *, dtype: torch.dtype = torch.float32, dim: int = 1
) -> Tensor:
    """The codes of indices, as in `vtok_fast.fsq_decode`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rest = indices.to(torch.int64)
    outside = (rest < 0) | (rest >= math.prod(levels))
    channels = []
    for level in levels:
        half = level // 2
        code = (torch.remainder(rest, level) - half).to(wide) / half
        channels.append(code.masked_fill(outside, math.nan))
        rest = torch.div(rest, level, rounding_mode="floor")
    return torch.stack(channels, -1).to(dtype).movedim(-1, dim)


def official_float32(
    z: Tensor, levels: Sequence[int], *, variant: str = "vidtok", dim: int = 1
) -> tuple[Tensor, Tensor]:
    """The formula as the public implementations evaluate it, all in float32; to compare with.

    Within a few float32 steps of a threshold it can name the level next to the one that float64 does. The
    index is rounded here where some of them truncate it (which is wrong for some levels from 26 on).
    """
    last = z.movedim(dim, -1).to(torch.float32)
    half_l, offset, shift = torch.tensor(
        [bound_constants(level, variant) for level in levels], dtype=torch.float32, device=z.device
    ).unbind(-1)
    half = torch.tensor([level // 2 for level in levels], dtype=torch.float32, device=z.device)
    basis = torch.tensor(
        [math.prod(levels[:i]) for i in range(len(levels))], dtype=torch.float64, device=z.device
    )
    level_index = torch.round(torch.tanh(last + shift) * half_l - offset)
    indices = ((level_index + half).to(torch.float64) * basis).sum(-1).round().to(torch.int32)
    return (level_index / half).to(z.dtype).movedim(-1, dim), indices


def fsq_entropy_loss(
    z: Tensor,
    levels: Sequence[int],
    codes: Tensor,
    *,
    inv_temperature: float = 100.0,
    gamma: float = 1.0,
    dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """(entropy term, commitment term), as in `vtok_fast.fsq_entropy_loss`; ``codes`` are the quantized
    ``z``."""
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    flat = z.movedim(dim, -1).reshape(-1, len(levels)).to(wide)
    token_entropy = flat.new_zeros(())
    probabilities = []
    for channel, level in enumerate(levels):
        centers = (torch.arange(level, device=z.device, dtype=wide) - level // 2) / (level // 2)
        log_p = torch.log_softmax(2 * inv_temperature * flat[:, channel, None] * centers, -1)
        p = log_p.exp()
        token_entropy = token_entropy - (p * log_p).sum(-1).mean()
        probabilities.append(p)
    mean = _mean_outer(probabilities)
    entropy = token_entropy + gamma * (mean * mean.clamp_min(1e-5).log()).sum()
    return entropy, (z.to(wide) - codes.detach().to(wide)).square().mean()


def _mean_outer(probabilities: list[Tensor]) -> Tensor:
    """The mean over tokens of the outer product of all channels' probabilities, flattened: one GEMM of two
    halves."""
    sizes = [p.shape[1] for p in probabilities]
    split = min(range(len(sizes)), key=lambda i: math.prod(sizes[:i]) + math.prod(sizes[i:]))

    def outer(parts: list[Tensor]) -> Tensor:
        product = probabilities[0].new_ones(len(probabilities[0]), 1)
        for p in parts:
            product = (p[:, :, None] * product[:, None, :]).flatten(1)
        return product

    return (outer(probabilities[split:]).T @ outer(probabilities[:split]) / len(probabilities[0])).flatten()
