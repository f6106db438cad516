"""Rounding to e4m3, a float of 8 bits (4 of exponent, 3 of fraction, 448 at most), with scales that are
powers of two.

Such a scale costs no accuracy: a float's relative error is the same in every power of two, and to divide by
the scale and to multiply by it again is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
# Of an operand by rounding: half a unit of three bits of fraction
ROUNDING = 2.0**-4


def power_of_two(largest: Tensor) -> Tensor:
    """The power of two by which values of at most ``largest`` (>= 0) are divided: the largest is then between
    224 and 448. Float32; 1 for zeros and for what is not finite."""
    wanted = largest.float() / LARGEST
    exponent = torch.frexp(wanted).exponent.clamp(min=-126)
    scale = torch.ldexp(torch.ones_like(wanted), exponent)
    return torch.where((wanted > 0) & wanted.isfinite(), scale, 1.0)


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    """x with each element at the nearest multiple of ``scale`` (float32) that e4m3 has, ties to even; what is
    larger becomes the largest, NaN stays. The dtype of x."""
    narrow = (x.float() * (1 / scale)).clamp(-LARGEST, LARGEST).to(E4M3)
    return (narrow.float() * scale).to(x.dtype)


def scale_of_weight(weight: Tensor) -> Tensor:
    """(O, 1, 1, 1, 1): a scale for each output of a convolution's weights (O, C, kt, kh, kw)."""
    return power_of_two(weight.abs().amax((1, 2, 3, 4), keepdim=True))
