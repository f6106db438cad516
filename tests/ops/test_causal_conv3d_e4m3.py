"""Operands of e4m3: the rounding itself, which calls it is for, and how large its error is."""

from __future__ import annotations

import math

import pytest
import torch

from vtok_fast import parity
from vtok_fast.ops.causal_conv3d import causal_conv3d, e4m3
from vtok_fast.ops.causal_conv3d.call import ConvCall, Geometry
from vtok_fast.reference import e4m3 as reference


def every_value() -> torch.Tensor:
    """The finite values of e4m3, in ascending order."""
    bits = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    return bits[bits.isfinite()].unique()


def test_rounding_is_to_the_nearest_and_ties_to_even():
    """By a search among all values, of each of them, of all midpoints and of their neighbors."""
    known = every_value()
    middle = (known[1:] + known[:-1]) / 2
    x = torch.cat([known, middle, middle * (1 + 2**-20), middle * (1 - 2**-20)])
    for scale in (1.0, 2.0**-14, 2.0**9):
        found = reference.rounded(x.float() * scale, torch.tensor(scale)).double() / scale
        distance = (x.float().double()[:, None] - known).abs()
        least = distance.amin(1)
        assert torch.equal((found - x.float().double()).abs(), least)
        ties = (distance == least[:, None]).sum(1) > 1
        # Of the two, the one whose last bit of fraction is 0: an even multiple of its own step.
        step = 2.0 ** torch.clamp(torch.floor(torch.log2(found[ties].abs().clamp(min=1e-9))) - 3, min=-9)
        assert ties.sum() >= 100 and (found[ties] / step % 2 == 0).all()


def test_what_lies_outside():
    x = torch.tensor([500.0, -1e9, math.inf, math.nan, 0.0, 2.0**-11])
    found = reference.rounded(x, torch.tensor(1.0))
    assert found[:3].tolist() == [448, -448, 448] and found[3].isnan() and found[4:].tolist() == [0, 0]


def test_scales_are_powers_of_two():
    largest = torch.tensor([0.0, 1.0, 448.0, 447.9, 3e38, 1e-42, math.nan, math.inf])
    scale = reference.power_of_two(largest)
    assert (torch.frexp(scale).mantissa == 0.5).all()
    within = (largest / scale)[1:5]
    assert (within >= 224).all() and (within < 448).all()
    assert scale[0] == scale[6] == scale[7] == 1 and scale[5] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_of_a_convolution(dtype):
    """Of independent products the relative error is that of two operands. A rounding errs by up to half of
    the step 2^-3 in the significand m, evenly: 2^-4 / sqrt(3) / m, whose mean square over m with a density
    of 1 / m is 2^-8 / 3 times 3 / (8 ln 2). So an operand errs by 2.65 %, a product by 3.76 %; of 4608
    outputs of 432 products each the mean square is within 10 % of it."""
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, generator=g) for s in ((1, 16, 4, 12, 12), (8, 16, 3, 3, 3)))
    # A density of 1 / m, which normal numbers have only nearly.
    x, w = (t.sign() * torch.exp2(torch.rand(t.shape, generator=g) * 4) for t in (x, w))
    call = ConvCall(x.to(dtype), w.to(dtype), geometry=Geometry(pad=(2, 0, 1, 1, 1, 1)))
    with e4m3.Scales() as scales:
        y = causal_conv3d(call.x, call.weight)
    assert scales.ran == 1
    error = parity.relative_errors(y, causal_conv3d(call.x.double(), call.weight.double()))["whole"]
    operand = (2.0**-8 / 3 * 3 / (8 * math.log(2))) ** 0.5
    assert error == pytest.approx(math.sqrt(2) * operand, rel=0.1)
    assert error < parity.FAST


def conv(kernel=(3, 3, 3), channels=16, outputs=8, **options):
    x, weight = torch.randn(1, channels, 2, 6, 6), torch.randn(outputs, channels, *kernel)
    return causal_conv3d(x, weight, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": (1, 1, 1)},
        {"kernel": (3, 1, 1)},
        {"channels": 8},
        {"outputs": 4},
        {"upsample": (1, 2, 2)},
        {"depth_to_space": (1, 2, 2)},
        {"spatial_mode": "replicate"},
        {"backend": "reference"},
    ],
    ids=str,
)
def test_other_calls_are_as_outside(options):
    with e4m3.Scales() as scales:
        torch.manual_seed(0)
        inside = conv(**options)
    torch.manual_seed(0)
    assert scales.ran == 0 and torch.equal(inside, conv(**options))


def test_gradients_are_as_outside():
    x = torch.randn(1, 16, 2, 6, 6, requires_grad=True)
    weight = torch.randn(8, 16, 3, 3, 3)
    with e4m3.Scales() as scales:
        y = causal_conv3d(x, weight)
        y.sum().backward()
    assert scales.ran == 0 and torch.equal(y, causal_conv3d(x, weight))


def test_nothing_is_rounded_within_off():
    with e4m3.Scales() as scales, e4m3.OFF:
        conv()
    assert scales.ran == 0
    with e4m3.Scales() as outer, e4m3.Scales() as inner:
        conv()
    assert (outer.ran, inner.ran) == (0, 1)


def test_scales_come_from_the_record_or_from_the_input():
    """A record holds for the parameter, through views of it, and only while that lives; a larger input is
    then cut off at twice what was recorded."""
    weight = torch.nn.Parameter(torch.randn(8, 16, 3, 3, 3), requires_grad=False)
    x = torch.randn(1, 16, 2, 6, 6)
    scales = e4m3.Scales()
    scales.recording = True
    with scales:
        for scale in (1, 4, 2):
            assert torch.equal(causal_conv3d(scale * x, weight), causal_conv3d(scale * x, weight[:]))
    scales.recording = False
    recorded = reference.power_of_two(8 * x.abs().max())
    assert scales.of(ConvCall(x, weight)) == scales.of(ConvCall(x, weight[:])) == recorded
    assert scales.of(ConvCall(x, weight.clone())) == reference.power_of_two(2 * x.abs().max())
    half = 6e4 * torch.ones(1, 16, 2, 6, 6, dtype=torch.float16)  # whose double it does not hold
    assert scales.of(ConvCall(half, weight.half())) == 512
    cache = 100 * x[:, :, :1]
    assert scales.of(ConvCall(x, weight.clone(), cache=cache)) == reference.power_of_two(
        2 * cache.abs().max()
    )
    huge = torch.full_like(x, 1e4)
    with scales:
        y = causal_conv3d(huge, weight)
    cut = causal_conv3d(
        torch.full_like(x, 448.0 * recorded.item()),
        reference.rounded(weight, reference.scale_of_weight(weight)),
    )
    assert torch.equal(y, cut)
