"""The Hopper convolution on a GPU that has it, against float64."""

import pytest
import torch

from vtok_fast import parity
from vtok_fast.dispatch import backends
from vtok_fast.ops.causal_conv3d import causal_conv3d, launch, sm90
from vtok_fast.ops.causal_conv3d.call import ConvCall, Geometry
from vtok_fast.reference.causal_conv3d import causal_conv3d as reference

REASON = (
    launch.why_not_machine(torch.empty(0, device="cuda")) if torch.cuda.is_available() else "there is no GPU"
)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
BF16, F16 = torch.bfloat16, torch.float16
LAST = torch.channels_last_3d


def drawn(channels, outputs, kernel, size, dtype=BF16, batch=1, seed=0):
    g = torch.Generator(device="cuda").manual_seed(seed)
    x = (
        torch.randn(batch, channels, *size, generator=g, device="cuda")
        .to(dtype)
        .contiguous(memory_format=LAST)
    )
    fan_in = channels * kernel[0] * kernel[1] * kernel[2]
    weight = (torch.randn(outputs, channels, *kernel, generator=g, device="cuda") / fan_in**0.5).to(dtype)
    return x, weight, torch.randn(outputs, generator=g, device="cuda").to(dtype)


def check(x, weight, bias, **options):
    double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    want = reference(x.double(), weight.double(), bias.double(), **double)
    y = causal_conv3d(x, weight, bias, backend="sm90", **options)
    result = parity.close(y, want, reference(x, weight, bias, **options))
    assert result.ok, result
    return y


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (3, 1, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize(
    "channels, outputs, size",
    [
        (128, 128, (5, 64, 64)),
        (96, 96, (4, 60, 52)),
        (512, 512, (3, 32, 32)),
        (160, 320, (2, 30, 52)),
        (72, 104, (3, 17, 23)),
    ],
    ids=str,
)
def test_layers(channels, outputs, size, kernel, dtype):
    x, weight, bias = drawn(channels, outputs, kernel, size, dtype)
    residual = drawn(outputs, 1, (1, 1, 1), size, dtype, seed=1)[0]
    check(x, weight, bias)
    check(x, weight, bias, time_mode="replicate", residual=residual, activation="silu")
    check(
        x,
        weight,
        bias,
        cache=drawn(channels, 1, (1, 1, 1), (2, *size[1:]), dtype, seed=2)[0],
        residual=residual,
        alpha=0.25,
    )


@pytest.mark.parametrize(
    "tile",
    [(256, 160), (256, 128), (256, 96), (128, 144), (128, 128), (128, 112), (128, 96), (128, 64)],
    ids=str,
)
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("splits", [1, 3])
def test_tiles(tile, cluster, splits):
    x, weight, bias = drawn(192, tile[1] + 8, (3, 3, 3), (3, 37, 45))
    call = ConvCall(x, weight, bias, geometry=Geometry(pad=(2, 0, 1, 1, 1, 1), time_mode="replicate"))
    out = call.empty_output((1, 1, 1))
    sm90.forward(call, out, choice=(*tile, splits, cluster, 0))
    options = {"time_mode": "replicate"}
    result = parity.close(
        out,
        reference(x.double(), weight.double(), bias.double(), **options),
        reference(x, weight, bias, **options),
    )
    assert result.ok, result


@pytest.mark.parametrize(
    "stride, pad", [((1, 2, 2), ((0, 1), (0, 1))), ((2, 1, 1), ((1, 1), (1, 1)))], ids=str
)
def test_strides(stride, pad):
    check(*drawn(128, 128, (3, 3, 3), (5, 32, 36)), stride=stride, spatial_pad=pad)


def test_it_is_chosen_and_falls_back():
    x, weight, bias = drawn(128, 128, (3, 3, 3), (3, 16, 16))
    call = ConvCall(x, weight, bias, geometry=Geometry(pad=(2, 0, 1, 1, 1, 1)))
    assert sm90.why_not(call) is None
    assert "rows and columns" in sm90.why_not(
        call._replace(geometry=call.geometry._replace(spatial_mode="reflect"))
    )
    with pytest.raises(backends.BackendError, match="rows and columns"):
        causal_conv3d(x, weight, bias, spatial_mode="reflect", backend="sm90")
    causal_conv3d(x, weight, bias, spatial_mode="reflect")


@pytest.mark.parametrize("options", [{}, {"time_mode": "replicate"}, {"cache": 2}], ids=str)
def test_input_gradient(options):
    x, weight, bias = drawn(128, 96, (3, 3, 3), (4, 24, 20))
    if "cache" in options:
        options = {"cache": drawn(128, 1, (1, 1, 1), (2, 24, 20), seed=3)[0]}
    grad = drawn(96, 1, (1, 1, 1), (4, 24, 20), seed=4)[0]

    def gradients(function, dtype):
        leaves = [
            t.detach().to(dtype).requires_grad_()
            for t in (x, *options.values())
            if isinstance(t, torch.Tensor)
        ]
        rest = dict(zip(options, leaves[1:])) if "cache" in options else options
        function(leaves[0], weight.to(dtype), bias.to(dtype), **rest).backward(grad.to(dtype))
        return [t.grad for t in leaves]

    for found, want, same in zip(
        gradients(causal_conv3d, BF16), gradients(reference, torch.float64), gradients(reference, BF16)
    ):
        result = parity.close(found, want, same)
        assert result.ok, result


def test_no_wait_for_the_host_and_cuda_graphs():
    x, weight, bias = drawn(128, 128, (3, 3, 3), (3, 32, 32))
    want = causal_conv3d(x, weight, bias, backend="sm90")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = causal_conv3d(x, weight, bias, backend="sm90")
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, want)


def test_results_repeat():
    x, weight, bias = drawn(256, 256, (3, 3, 3), (5, 32, 32))
    first = causal_conv3d(x, weight, bias, backend="sm90")
    for _ in range(20):
        assert torch.equal(first, causal_conv3d(x, weight, bias, backend="sm90"))


def test_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free memory")
    x, weight, bias = drawn(64, 64, (1, 3, 3), (1, 8, 8))
    big = torch.zeros(1, 64, 35, 1024, 1024, dtype=BF16, device="cuda").contiguous(memory_format=LAST)
    big[:, :, -1:, -8:, -8:] = x
    y = causal_conv3d(big, weight, bias, backend="sm90")
    crop = causal_conv3d(
        big[:, :, -1:, -9:, -9:].contiguous(memory_format=LAST), weight, bias, backend="sm90"
    )
    torch.testing.assert_close(y[:, :, -1:, -8:, -8:], crop[..., 1:, 1:], rtol=0, atol=0)
