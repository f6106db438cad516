"""The Hopper gradient of weights and bias on a GPU that has it, against float64. Inputs are small integers,
whose sums float32 holds exactly in any order: results must be the rounded reference, bit for bit."""

import pytest
import torch

from vtok_fast.ops.causal_conv3d import launch, sm90_wgrad
from vtok_fast.ops.causal_conv3d.call import ConvBackwardCall, Geometry
from vtok_fast.reference.causal_conv3d import causal_conv3d as reference

REASON = (
    launch.why_not_machine(torch.empty(0, device="cuda")) if torch.cuda.is_available() else "there is no GPU"
)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
BF16, F16 = torch.bfloat16, torch.float16
LAST = torch.channels_last_3d


def integers(*size, dtype, seed):
    g = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randint(-2, 3, size, generator=g, device="cuda").to(dtype).contiguous(memory_format=LAST)


def wanted(x, grad, shape, geometry, cache):
    """The gradients of weights and bias in float64, through the definition."""
    weight = torch.zeros(shape, dtype=torch.double, device=x.device, requires_grad=True)
    bias = torch.zeros(shape[0], dtype=torch.double, device=x.device, requires_grad=True)
    pad = geometry.pad
    reference(
        x.double(),
        weight,
        bias,
        stride=geometry.stride,
        dilation=geometry.dilation,
        time_pad=pad[:2],
        spatial_pad=(pad[2:4], pad[4:]),
        time_mode=geometry.time_mode,
        cache=None if cache is None else cache.double(),
    ).backward(grad.double())
    return weight.grad, bias.grad


def check(
    kernel,
    size,
    channels=128,
    outputs=256,
    dtype=BF16,
    choice=sm90_wgrad.ANY,
    cached=0,
    bias=True,
    batch=1,
    **options,
):
    geometry = Geometry(
        **{"pad": (kernel[0] - 1, 0, *(k // 2 for k in kernel[1:] for _ in range(2))), **options}
    )
    x = integers(batch, channels, *size, dtype=dtype, seed=1)
    cache = integers(batch, channels, cached, *size[1:], dtype=dtype, seed=2) if cached else None
    out = geometry.output_size(size, kernel)
    grad = integers(batch, outputs, *out, dtype=dtype, seed=3)
    weight = torch.full((outputs, channels, *kernel), torch.nan, dtype=dtype, device="cuda")
    of_bias = torch.full((outputs,), torch.nan, dtype=dtype, device="cuda") if bias else None
    call = ConvBackwardCall(grad, x, weight, cache, geometry, (False, True, bias, False))
    sm90_wgrad.wgrad(call, weight, of_bias, choice=choice)
    want_weight, want_bias = wanted(x, grad, weight.shape, geometry, cache)
    assert torch.equal(weight, want_weight.to(dtype))
    assert of_bias is None or torch.equal(of_bias, want_bias.to(dtype))


def tiles_of(kernel):
    return (384, 192) if kernel[1] == 3 else (256, 128)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (3, 1, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("wide", [True, False], ids=["wide", "narrow"])
def test_tiles(kernel, stride, cluster, bias, dtype, wide):
    """Sizes that no slice of 8 x 8 divides, channels that no box of 64 divides."""
    columns = tiles_of(kernel)[0 if wide else 1]
    check(kernel, (3, 21, 27), 136, 256, dtype, (columns, 0, cluster), bias=bias, stride=(1, stride, stride))


@pytest.mark.parametrize("stride", [(2, 1, 1), (1, 4, 4), (1, 8, 8), (2, 2, 2)], ids=str)
def test_strides(stride):
    check((3, 3, 3), (5, 33, 41), stride=stride)
    check((1, 1, 1), (5, 33, 41), stride=stride)


@pytest.mark.parametrize("splits", [1, 2, 7])
def test_splits(splits):
    check((3, 3, 3), (5, 24, 40), 64, 128, choice=(0, splits, 0))


@pytest.mark.parametrize(
    "options",
    [
        {"time_mode": "replicate"},
        {"cached": 2},
        {"cached": 1},
        {"batch": 3},
        {"dilation": (1, 2, 2), "pad": (2, 0, 2, 2, 2, 2)},
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1)], ids=str)
def test_geometry(kernel, options):
    if kernel[1] == 1 and "dilation" in options:
        pytest.skip("no taps to be dilated")
    check(kernel, (4, 17, 23), **options)


def test_infinities_beside_the_edge():
    """Slices hang over the edge, where the gradient is zero and x is not."""
    x, grad = (
        integers(1, 64, 1, 9, 9, dtype=BF16, seed=1),
        integers(1, 64, 1, 9, 9, dtype=BF16, seed=2).abs() + 1,
    )
    x[0, 5, 0, 8, 8] = torch.inf
    geometry = Geometry(pad=(0, 0, 1, 1, 1, 1))
    weight = torch.full((64, 64, 1, 3, 3), torch.nan, dtype=BF16, device="cuda")
    call = ConvBackwardCall(
        grad.contiguous(memory_format=LAST), x, weight, None, geometry, (False, True, False, False)
    )
    sm90_wgrad.wgrad(call, weight, None)
    want = wanted(x, grad, weight.shape, geometry, None)[0]
    torch.testing.assert_close(weight.double(), want.to(BF16).double(), rtol=0, atol=0, equal_nan=True)
