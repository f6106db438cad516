"""Winograd convolution of every instruction set against float64, over random shapes, memory layouts, paddings
and dtypes."""

import random

import pytest
import torch

from vtok_fast.dispatch import native
from vtok_fast.ops.causal_conv3d.call import MODES, Geometry
from vtok_fast.reference.causal_conv3d import causal_conv3d as reference

lib = native.lib()
pytestmark = pytest.mark.needs_native
FLOOR = 16 * 2**-23  # the close contract's, of the norm-wise relative error
HALF_EPS = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(params=[2, 4])
def m(request):
    return request.param


def run(
    x,
    weight,
    bias,
    cache,
    residual,
    shape,
    *,
    m,
    stride=1,
    dilation=1,
    pad,
    time_mode="zeros",
    spatial_mode="zeros",
    upsample=(1, 1, 1),
    once=False,
    alpha=None,
    silu=False,
    threads=2,
):
    out = torch.full(shape, float("nan"), dtype=x.dtype).to(memory_format=torch.channels_last_3d)
    geometry = Geometry((stride, 1, 1), (dilation, 1, 1), 1, pad, time_mode, spatial_mode, upsample, once)
    lib.causal_conv3d(
        *(native.arg(t) for t in (x, weight, bias, cache, residual, out)),
        geometry.native(),
        alpha,
        silu,
        m,
        threads,
    )
    return out


def laid_out(r, t):
    kind = r.choice(["first", "last", "last", "every other"])
    if kind == "every other":
        return torch.empty([n * 2 for n in t.shape], dtype=t.dtype)[(slice(1, None, 2),) * 5].copy_(t)
    return t.contiguous(memory_format=torch.channels_last_3d if kind == "last" else torch.contiguous_format)


def error(y, ref):
    return ((y.double() - ref).norm() / ref.norm()).item()


def check(y, ref, dtype):
    """The close contract: whole, per frame, and on the outermost rows and columns alone."""
    parts = [(y, ref)] + [(y[:, :, t], ref[:, :, t]) for t in range(ref.shape[2])]
    parts += [(y[..., i, :], ref[..., i, :]) for i in (0, -1)] + [(y[..., i], ref[..., i]) for i in (0, -1)]
    assert y.shape == ref.shape
    for part, expected in parts:
        assert error(part, expected) <= FLOOR + HALF_EPS[dtype] or not expected.any() and not part.any()


@pytest.mark.parametrize("seed", range(3))
def test_random_calls(isa, m, seed):
    r = random.Random(f"{isa} {m} {seed}")
    torch.manual_seed(r.randrange(2**31))
    for _ in range(4):
        dtype = r.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
        batch, channels, outputs = (
            r.choice([1, 2]),
            r.choice([1, 16, 20, 33, 64, 130]),
            r.choice([1, 16, 24, 40, 64]),
        )
        T, H, W, kt = r.choice([1, 2, 3, 9]), r.randint(2, 18), r.randint(2, 18), r.choice([1, 2, 3])
        stride, dilation = r.choice([1, 1, 2]), r.choice([1, 1, 2])
        upsample = r.choice([(1, 1, 1), (1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 1, 1)])
        cached = r.choice([0, 1, 2])
        once = upsample[0] > 1 and not cached
        front = dilation * (kt - 1)
        time_mode, spatial_mode = r.choice(["zeros", "replicate"]), r.choice(MODES)
        x = laid_out(r, (torch.randn(batch, channels, T, H, W) + r.choice([0, 0.5])).to(dtype))
        cache = laid_out(r, torch.randn(batch, channels, cached, H, W).to(dtype)) if cached else None
        weight = (torch.randn(outputs, channels, kt, 3, 3) / (9 * kt * channels) ** 0.5).to(dtype)
        bias = r.choice([None, torch.randn(outputs).to(dtype)])
        silu, alpha = r.random() < 0.5, r.choice([None, 0.3])
        arguments = dict(
            stride=(stride, 1, 1),
            dilation=(dilation, 1, 1),
            time_pad=(front, 0),
            spatial_pad=((1, 1), (1, 1)),
            time_mode=time_mode,
            spatial_mode=spatial_mode,
            upsample=upsample,
            upsample_first_frame_once=once,
            activation="silu" if silu else None,
        )
        double = lambda t: None if t is None else t.double()  # noqa: E731
        ref = reference(x.double(), weight.double(), double(bias), cache=double(cache), **arguments)
        residual = torch.randn(ref.shape).to(dtype).contiguous(memory_format=torch.channels_last_3d)
        ref = ref + residual.double() if alpha is None else alpha * residual.double() + (1 - alpha) * ref
        y = run(
            x,
            weight,
            bias,
            cache,
            residual,
            ref.shape,
            m=m,
            stride=stride,
            dilation=dilation,
            pad=(front, 0, 1, 1, 1, 1),
            time_mode=time_mode,
            spatial_mode=spatial_mode,
            upsample=upsample,
            once=once,
            alpha=alpha,
            silu=silu,
            threads=r.choice([1, 2, 3]),
        )
        check(y, ref, dtype)


@pytest.mark.parametrize("channels, kt", [(16, 3), (128, 3), (288, 3), (512, 1)])
@pytest.mark.parametrize("mean", [0.0, 2.0])
def test_error_over_channel_counts(m, channels, kt, mean):
    """288 channels of three frames and 512 of one exceed what is transformed in advance: their weights are
    made on the way."""
    torch.manual_seed(channels)
    x = (torch.randn(1, channels, 2, 13, 14) + mean).contiguous(memory_format=torch.channels_last_3d)
    weight = torch.randn(96, channels, kt, 3, 3) / (9 * kt * channels) ** 0.5
    ref = reference(x.double(), weight.double(), time_pad=(kt - 1, 0), spatial_pad=((1, 1), (1, 1)))
    check(run(x, weight, None, None, None, ref.shape, m=m, pad=(kt - 1, 0, 1, 1, 1, 1)), ref, torch.float32)


def test_many_frames_pass_in_groups(m):
    torch.manual_seed(0)
    x = torch.randn(1, 16, 37, 9, 10)
    weight = torch.randn(16, 16, 3, 3, 3) / 20
    ref = reference(
        x.double(), weight.double(), time_pad=(2, 0), spatial_pad=((1, 1), (1, 1)), time_mode="replicate"
    )
    check(
        run(x, weight, None, None, None, ref.shape, m=m, pad=(2, 0, 1, 1, 1, 1), time_mode="replicate"),
        ref,
        torch.float32,
    )
