"""Garbage stays where it is: a value that is not finite, or huge, reaches the outputs whose taps read it.

It reaches no others, whatever computes the convolution. People who look for the source of a NaN in a video
VAE read its extent (kijai/ComfyUI-WanVideoWrapper #1339 and #1372); Winograd convolution is known to widen it
to whole tiles and to turn infinities into NaN (tensorflow/tensorflow #60315, uxlfoundation/oneDNN #748,
openvinotoolkit/openvino #21623).
"""

import functools
import itertools

import pytest
import torch

from vtok_fast import parity
from vtok_fast.dispatch import backends, native
from vtok_fast.ops.causal_conv3d import causal_conv3d

lib = native.lib()
pytestmark = pytest.mark.skipif(lib is None, reason=f"{native.why_missing()}")
ALGORITHMS = ("direct", "winograd2", "winograd4")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LAST = torch.channels_last_3d
INF, NAN = float("inf"), float("nan")
# Kernel and options; "cache" is its number of frames. In the second half several taps read one element.
GEOMETRIES = {
    "plane": ((1, 3, 3), {}),
    "cube": ((3, 3, 3), {}),
    "cache": ((3, 3, 3), {"cache": 2}),
    "stride in time": ((3, 3, 3), {"stride": (2, 1, 1), "spatial_pad": ((1, 1), (1, 1))}),
    "no padding": ((2, 3, 3), {"spatial_pad": ((0, 0), (0, 0))}),
    "stride in the plane": ((1, 3, 3), {"stride": (1, 2, 2), "spatial_pad": ((0, 1), (0, 1))}),
    "upsampled": ((3, 3, 3), {"upsample": (1, 2, 2)}),
    "upsampled in time": ((3, 3, 3), {"upsample": (2, 2, 2), "upsample_first_frame_once": True}),
    "replicated": ((3, 3, 3), {"time_mode": "replicate", "spatial_mode": "replicate"}),
    "reflected": ((3, 3, 3), {"spatial_mode": "reflect"}),
}
SINGLE = list(GEOMETRIES)[:6]
PIXELS = ((0, 0), (0, 17), (14, 0), (14, 17), (3, 4), (4, 4), (7, 8), (9, 6))  # corners, both sides of tiles


ISAS = [] if lib is None else lib.supported_isas()
# The instance that runs here; the others take most of the time of them all.
PACED = [pytest.param(i, marks=[] if i == lib.isa() else [pytest.mark.slow]) for i in ISAS]


@pytest.fixture(params=PACED)
def isa(request):
    before = lib.isa()
    lib.set_isa(request.param)
    yield request.param
    lib.set_isa(before)


@pytest.fixture(params=ALGORITHMS)
def algorithm(request):
    with backends.algorithm(request.param):
        yield request.param


def drawn(name, dtype, channels=24, outputs=20, size=(3, 15, 18), seed=0):
    kernel, options = GEOMETRIES[name]
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1, channels, *size, generator=g).to(dtype)
    weight = torch.randn(outputs, channels, *kernel, generator=g) / (channels * 9 * kernel[0]) ** 0.5
    options = dict(options)
    if "cache" in options:
        cache = torch.randn(1, channels, options["cache"], *size[1:], generator=g).to(dtype)
        options["cache"] = cache.contiguous(memory_format=LAST)
    return x.contiguous(memory_format=LAST), weight.to(dtype), options


def in_double(x, weight, options):
    double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return causal_conv3d(x.double(), weight.double(), backend="reference", **double)


def seen(x, weight, options, place):
    """Which outputs read element `place` of x, or of the cache where there is one."""
    marks = {"x": torch.zeros_like(x, dtype=torch.float64)}
    options = dict(options)
    if "cache" in options:
        marks["cache"] = options["cache"] = torch.zeros_like(options["cache"], dtype=torch.float64)
    marks.get("cache", marks["x"])[place] = 1
    return (
        causal_conv3d(
            marks["x"], torch.ones_like(weight, dtype=torch.float64), backend="reference", **options
        )
        > 0
    )


def spoil(x, options, place, value):
    """Writes the value into the cache where there is one, else into x."""
    options = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    x = x.clone()
    options.get("cache", x)[place] = value
    return x, options


def places(channels=24, frames=(0, 1)):
    return [
        (0, c, t, *p)
        for (c, t), p in zip(itertools.cycle(itertools.product((0, channels - 1), frames)), PIXELS)
    ]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_it_reaches_what_reads_it(isa, algorithm, name, dtype):
    x, weight, options = drawn(name, dtype)
    for place, value in zip(
        places()[list(GEOMETRIES).index(name) % 2 :: 2], itertools.cycle((NAN, INF, -INF))
    ):
        bad, more = spoil(x, options, place, value)
        y = causal_conv3d(bad, weight, backend="cpu", **more)
        reached = seen(x, weight, options, place)
        assert torch.equal(~torch.isfinite(y), reached), (place, value)
        if name in SINGLE:  # where taps share an element, the sum of infinities depends on the order
            want = in_double(bad, weight, more)
            assert torch.equal(y.isnan(), want.isnan()), (place, value)
            assert torch.equal(y == INF, want == INF) and torch.equal(y == -INF, want == -INF), (place, value)
        clean, fine = spoil(x, options, place, 0.0)
        ordinary = in_double(clean, weight, fine)[~reached]
        found = parity.close(y[~reached][None], ordinary[None])
        assert found.ok, (place, value, found)


@pytest.mark.parametrize(
    "dtype, value", [(F32, 1e4), (F32, 1e30), (F32, -3e38), (BF16, 1e30), (F16, 6e4)], ids=str
)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_huge_value_rounds_only_what_reads_it(isa, algorithm, name, dtype, value):
    """What does not read it is as exact as PyTorch within a factor of 8, or within the contract's floor."""
    _, weight, _ = drawn(name, dtype, channels=64)
    for place in places(64)[list(GEOMETRIES).index(name) % 3 :: 3]:
        bad, more, want, reached, torchs = expected(name, dtype, place, value)
        y = causal_conv3d(bad, weight, backend="cpu", **more)
        assert torch.equal(torch.isfinite(y), torch.isfinite(want.to(dtype)))
        for part in (~reached, ~reached & near(reached)):
            norm = want[part].norm()
            error = ((y - want)[part].norm() / norm).item()
            theirs = ((torchs - want)[part].norm() / norm).item()
            assert error <= 8 * theirs, (place, error, theirs)
        assert (found := parity.close_locally(y, bad, weight, **more)).ok, (place, found)


@functools.lru_cache(maxsize=64)  # the same for every instruction set and algorithm
def expected(name, dtype, place, value):
    x, weight, options = drawn(name, dtype, channels=64)
    bad, more = spoil(x, options, place, value)
    torchs = causal_conv3d(bad, weight, backend="reference", **more)
    return bad, more, in_double(bad, weight, more), seen(x, weight, options, place), torchs


def near(reached):
    """Within three rows and columns of a marked output: where tiles share it."""
    frames = reached.transpose(1, 2).flatten(0, 1).double()
    around = torch.nn.functional.max_pool2d(frames, 7, 1, 3)
    return around.unflatten(0, (reached.shape[0], reached.shape[2])).transpose(1, 2) > 0


@pytest.mark.parametrize("channels, outputs", [(1, 1), (3, 16), (17, 33), (16, 8), (160, 40)])
@pytest.mark.parametrize("layout", ["first", "last"])
def test_every_width_and_layout(isa, algorithm, channels, outputs, layout):
    """Padding of channels up to whole vectors is multiplied too, and must hold zeros."""
    for name in ("plane", "cube"):
        x, weight, options = drawn(name, F32, channels, outputs)
        for place, value in zip(places(channels, (2,)), (NAN, INF, 1e30)):
            bad, _ = spoil(x, options, place, value)
            bad = bad.contiguous() if layout == "first" else bad
            y = causal_conv3d(bad, weight, backend="cpu")
            reached = seen(x, weight, options, place)
            if value != 1e30:
                assert torch.equal(~torch.isfinite(y), reached)
            ordinary = in_double(spoil(x, options, place, 0.0)[0], weight, options)
            found = parity.close(y[~reached][None], ordinary[~reached][None])
            assert found.ok, (name, place, value, found)


def test_many_bad_values(isa, algorithm):
    """Scattered, a whole frame, everything: the same as directly."""
    x, weight, options = drawn("cube", F32, size=(5, 22, 25))
    scattered = x.clone()
    scattered[torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.002] = NAN
    frame, all_of_it = x.clone(), torch.full_like(x, INF)
    frame[:, :, 2] = NAN
    for bad in (scattered, frame, all_of_it):
        y, want = causal_conv3d(bad, weight, backend="cpu"), in_double(bad, weight, options)
        assert torch.equal(y.isnan(), want.isnan())
        assert torch.equal(y.isfinite(), want.isfinite())


@pytest.mark.parametrize("value", [NAN, INF, 1e37])
def test_a_bad_weight_spoils_its_own_output_channel(isa, algorithm, value):
    x, weight, options = drawn("cache", F32)
    weight[3, 5, 1, 1, 1] = value  # a tap that reads no padding
    y, want = causal_conv3d(x, weight, backend="cpu", **options), in_double(x, weight, options)
    others = [o for o in range(len(weight)) if o != 3]
    assert parity.close(y[:, others], want[:, others]).ok
    if value == 1e37:
        torch.testing.assert_close(y[:, 3].double(), want[:, 3], rtol=1e-5, atol=0)
    else:
        assert torch.equal(y[:, 3].isfinite(), want[:, 3].isfinite())


def test_epilogue_and_batches(isa, algorithm):
    """What is computed again has its bias, activation and residual, and stands at its own place."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(2, 16, 4, 18, 21, generator=g).contiguous(memory_format=LAST)
    weight, bias = torch.randn(24, 16, 3, 3, 3, generator=g) / 20, torch.randn(24, generator=g)
    residual = torch.randn(2, 24, 4, 18, 21, generator=g)
    x[1, 3, 1, 9, 10], x[0, 2, 3, 0, 20], x[0, 2, 0, 17, 3] = 1e8, NAN, -1e6
    options = {"residual": residual, "alpha": 0.3, "activation": "silu"}
    y = causal_conv3d(x, weight, bias, backend="cpu", **options)
    want = causal_conv3d(
        x.double(),
        weight.double(),
        bias.double(),
        backend="reference",
        **{**options, "residual": residual.double()},
    )
    assert torch.equal(y.isnan(), want.isnan())
    garbage = ~(x.abs() < 1e5)
    read = causal_conv3d(garbage.double(), torch.ones_like(weight).double(), backend="reference") > 0
    torch.testing.assert_close(y[~read].double(), want[~read], rtol=2e-5, atol=2e-5)
    assert (y - want)[read & ~want.isnan()].abs().max() <= 1e8 * 0.3 * 16 * torch.finfo(F32).eps


def test_an_impulse_leaves_zeros(isa, algorithm):
    x, weight, options = drawn("plane", F32, channels=32)
    x = torch.zeros_like(x)
    x[0, 5, 1, 6, 9] = 1
    y = causal_conv3d(x, weight, backend="cpu")
    assert not y[~seen(x, weight, options, (0, 5, 1, 6, 9))].any()
    assert parity.close(y, in_double(x, weight, options)).ok


def test_the_measure_tells_a_local_error(algorithm):
    """A rounding that is small beside the largest value, and large beside what the output reads."""
    x, weight, options = drawn("plane", F32, channels=64)
    x[0, 3, 1, 7, 8] = 1e6
    y = causal_conv3d(x, weight, backend="cpu")
    assert parity.close_locally(y, x, weight).ok
    wrong = y.clone()
    wrong[0, 2, 1, 13, 2] += 1e-3
    assert parity.close(wrong, in_double(x, weight, options)).ok
    found = parity.close_locally(wrong, x, weight)
    assert not found.ok and found.region == "[0, 2, 1, 13, 2]"
    wrong = y.clone()
    wrong[0, 0, 0, 0, 0] = INF
    assert not parity.close_locally(wrong, x, weight).ok


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_ordinary_input_is_locally_close(isa, algorithm, name, dtype):
    x, weight, options = drawn(name, dtype, channels=96)
    found = parity.close_locally(causal_conv3d(x, weight, backend="cpu", **options), x, weight, **options)
    assert found.ok, found
