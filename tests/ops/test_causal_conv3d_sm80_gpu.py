"""The convolution's kernels for every GPU from sm_80 on, on a GPU, against float64: forward and gradients."""

import pytest
import torch

from vtok_fast import parity
from vtok_fast.dispatch import native
from vtok_fast.ops.causal_conv3d import gradient, op, sm80
from vtok_fast.ops.causal_conv3d.call import ConvBackwardCall, ConvCall, Geometry

REASON = native.why_no_cuda(torch.empty(0, device="cuda")) if torch.cuda.is_available() else "there is no GPU"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
LAST = torch.channels_last_3d
TILES = [(256, 128), (256, 96), (128, 128), (128, 64), (128, 32)]


@pytest.fixture(autouse=True)
def exact_float32():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def drawn(channels, outputs, kernel, size, dtype, groups=1, batch=1):
    g = torch.Generator(device="cuda").manual_seed(1)
    x = (
        torch.randn(batch, channels, *size, generator=g, device="cuda")
        .to(dtype)
        .contiguous(memory_format=LAST)
    )
    weight = torch.randn(outputs, channels // groups, *kernel, generator=g, device="cuda")
    weight = weight / weight[0].numel() ** 0.5
    return x, weight.to(dtype), torch.randn(outputs, generator=g, device="cuda").to(dtype)


def geometry_of(kernel, **options):
    pad = (kernel[0] - 1, 0, *(k // 2 for k in kernel[1:] for _ in range(2)))
    return Geometry(**{"pad": pad, **options})


def double(call):
    return call._replace(**{k: v.double() for k, v in call._asdict().items() if isinstance(v, torch.Tensor)})


def close(found, want, same):
    result = parity.close(found, want, same)
    assert result.ok, result


def check_forward(call, choice=sm80.ANY):
    y = sm80.forward(call, call.empty_output(), choice=choice)
    close(y, op.run_reference(double(call)), op.run_reference(call))
    return y


def check_backward(call, cached=False):
    grad = torch.randn(call.empty_output((1, 1, 1)).shape, device="cuda").to(call.x.dtype)
    grad = grad.contiguous(memory_format=LAST)
    wanted = (True, True, True, cached)
    backward = ConvBackwardCall(grad, call.x, call.weight, call.cache, call.geometry, wanted)
    found = gradient.run_cuda(backward, hopper=False)
    want, same = gradient.run_reference(double(backward)), gradient.run_reference(backward)
    for f, w, s in zip(found, want, same):
        if f is not None:
            close(f, w, s)
    return backward, found


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_tiles(dtype, tile, splits):
    x, weight, bias = drawn(96, tile[1] + 8, (3, 3, 3), (3, 19, 23), dtype)
    check_forward(ConvCall(x, weight, bias, geometry=geometry_of((3, 3, 3))), (*tile, splits))


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (3, 1, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("channels, outputs", [(128, 128), (3, 96), (96, 3), (40, 72)])
def test_layers(channels, outputs, kernel, dtype):
    x, weight, bias = drawn(channels, outputs, kernel, (4, 18, 22), dtype)
    call = ConvCall(x, weight, bias, geometry=geometry_of(kernel))
    check_forward(call)
    check_backward(call)


@pytest.mark.parametrize(
    "options",
    [
        {"stride": (1, 2, 2)},
        {"stride": (2, 1, 1)},
        {"dilation": (1, 2, 2), "pad": (2, 0, 2, 2, 2, 2)},
        {"time_mode": "replicate"},
        {"time_mode": "replicate", "spatial_mode": "replicate"},
        {"time_mode": "reflect", "spatial_mode": "reflect"},
        {"upsample": (2, 2, 2)},
        {"groups": 4},
    ],
    ids=str,
)
def test_geometry(options):
    groups = options.get("groups", 1)
    x, weight, bias = drawn(64, 64, (3, 3, 3), (4, 12, 14), BF16, groups, batch=2)
    call = ConvCall(x, weight, bias, geometry=geometry_of((3, 3, 3), **options))
    check_forward(call)
    check_backward(call)


def test_cache_and_its_gradient():
    x, weight, bias = drawn(64, 48, (3, 3, 3), (4, 12, 14), BF16)
    cache = drawn(64, 1, (1, 1, 1), (2, 12, 14), BF16)[0]
    call = ConvCall(x, weight, bias, cache, geometry=geometry_of((3, 3, 3)))
    check_forward(call)
    check_backward(call, cached=True)


def test_weights_of_so_many_taps_that_fewer_channels_are_relaid_at_once():
    """16 x 4 x 8 taps of 64 channels in float32 are 128 KiB: more than a block has on many GPUs."""
    x, weight, bias = drawn(64, 16, (16, 4, 8), (16, 9, 11), F32)
    check_forward(ConvCall(x, weight, bias, geometry=Geometry(pad=(15, 0, 2, 1, 4, 3))))


def test_gradients_repeat():
    x, weight, bias = drawn(64, 64, (3, 3, 3), (5, 24, 24), BF16)
    backward, first = check_backward(ConvCall(x, weight, bias, geometry=geometry_of((3, 3, 3))))
    for _ in range(10):
        again = gradient.run_cuda(backward, hopper=False)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, again))
