"""causal_conv3d: the reference against the padding chains of the models it stands for, every backend against
the reference."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

import vtok_fast
from vtok_fast import parity
from vtok_fast.ops.causal_conv3d.call import Geometry

NONE = ((0, 0), (0, 0))
ONE = ((1, 1), (1, 1))
DOWN = ((0, 1), (0, 1))


def repeat_first(x, n):
    return torch.cat([x[:, :, :1].repeat(1, 1, n, 1, 1), x], 2)


def conv(x, w, b, **kw):
    return F.conv3d(x, w, b, **kw)


# One row per padding rule found in public video models: (name, kernel, chain as the model writes it, our
# arguments).
ROWS = [
    ("wan, qwen-image: zeros", (3, 3, 3), lambda x, w, b, c: conv(F.pad(x, (1, 1, 1, 1, 2, 0)), w, b), {}),
    (
        "wan: two cached frames",
        (3, 3, 3),
        lambda x, w, b, c: conv(F.pad(torch.cat([c, x], 2), (1, 1, 1, 1, 0, 0)), w, b),
        {"cache": 2},
    ),
    (
        "wan: one cached frame, a zero frame before it",
        (3, 3, 3),
        lambda x, w, b, c: conv(F.pad(torch.cat([c, x], 2), (1, 1, 1, 1, 1, 0)), w, b),
        {"cache": 1},
    ),
    (
        "wan: time_conv of stride 2 behind one cached frame",
        (3, 1, 1),
        lambda x, w, b, c: conv(torch.cat([c, x], 2), w, b, stride=(2, 1, 1)),
        {"cache": 1, "stride": (2, 1, 1), "time_pad": (1, 0), "spatial_pad": NONE},
    ),
    (
        "cogvideox: first frame repeated, zeros around",
        (3, 3, 3),
        lambda x, w, b, c: conv(repeat_first(x, 2), w, b, padding=(0, 1, 1)),
        {"time_mode": "replicate"},
    ),
    (
        "cogvideox: conv_cache",
        (3, 3, 3),
        lambda x, w, b, c: conv(torch.cat([c, x], 2), w, b, padding=(0, 1, 1)),
        {"cache": 2, "time_mode": "replicate"},
    ),
    (
        "mochi, hunyuanvideo: replicate on all sides",
        (3, 3, 3),
        lambda x, w, b, c: conv(F.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate"), w, b),
        {"time_mode": "replicate", "spatial_mode": "replicate"},
    ),
    (
        "hunyuanvideo: replicate, stride 2",
        (3, 3, 3),
        lambda x, w, b, c: conv(F.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate"), w, b, stride=2),
        {"time_mode": "replicate", "spatial_mode": "replicate", "stride": 2, "spatial_pad": ONE},
    ),
    (
        "mochi: kernel and stride 2",
        (2, 2, 2),
        lambda x, w, b, c: conv(repeat_first(x, 1), w, b, stride=2),
        {"time_mode": "replicate", "stride": 2, "spatial_pad": NONE},
    ),
    (
        "cosmos: temporal stride 2",
        (3, 1, 1),
        lambda x, w, b, c: conv(repeat_first(x, 1), w, b, stride=(2, 1, 1)),
        {"time_mode": "replicate", "stride": (2, 1, 1), "time_pad": (1, 0), "spatial_pad": NONE},
    ),
    ("cosmos: factorized plane", (1, 3, 3), lambda x, w, b, c: conv(F.pad(x, (1, 1, 1, 1)), w, b), {}),
    (
        "cosmos: spatial stride 2, zeros right and below",
        (1, 3, 3),
        lambda x, w, b, c: conv(F.pad(x, (0, 1, 0, 1)), w, b, stride=(1, 2, 2)),
        {"stride": (1, 2, 2), "spatial_pad": DOWN},
    ),
    (
        "ltx decoder: not causal, first and last frame",
        (3, 3, 3),
        lambda x, w, b, c: conv(torch.cat([x[:, :, :1], x, x[:, :, -1:]], 2), w, b, padding=(0, 1, 1)),
        {"time_mode": "replicate", "time_pad": (1, 1)},
    ),
    (
        "ltx: stride 2",
        (3, 3, 3),
        lambda x, w, b, c: conv(repeat_first(x, 2), w, b, stride=2, padding=(0, 1, 1)),
        {"time_mode": "replicate", "stride": 2, "spatial_pad": ONE},
    ),
    (
        "ltx2 decoder: reflect around",
        (3, 3, 3),
        lambda x, w, b, c: conv(F.pad(repeat_first(x, 2), (1, 1, 1, 1, 0, 0), mode="reflect"), w, b),
        {"time_mode": "replicate", "spatial_mode": "reflect"},
    ),
    (
        "easyanimate: one cached frame, stride 2",
        (3, 3, 3),
        lambda x, w, b, c: conv(F.pad(torch.cat([c, x], 2), (0, 1, 0, 1)), w, b, stride=2),
        {"cache": 1, "stride": 2, "time_pad": (1, 0), "spatial_pad": DOWN},
    ),
    (
        "kvae: temporal stride 2, two frames in front",
        (3, 1, 1),
        lambda x, w, b, c: conv(repeat_first(x, 2), w, b, stride=(2, 1, 1)),
        {"time_mode": "replicate", "stride": (2, 1, 1), "spatial_pad": NONE},
    ),
    (
        "minimax: zeros in time, reflect right and below, stride 2",
        (3, 3, 3),
        lambda x, w, b, c: conv(
            F.pad(F.pad(x, (0, 1, 0, 1, 0, 0), mode="reflect"), (0, 0, 0, 0, 2, 0)), w, b, stride=(1, 2, 2)
        ),
        {"spatial_mode": "reflect", "stride": (1, 2, 2), "spatial_pad": DOWN},
    ),
    (
        "vidtok 1.0: temporal stride 2, zeros",
        (3, 3, 3),
        lambda x, w, b, c: conv(F.pad(x, (1, 1, 1, 1, 1, 0)), w, b, stride=(2, 1, 1)),
        {"stride": (2, 1, 1), "time_pad": (1, 0)},
    ),
    (
        "vidtok 1.1: over time",
        (3, 1, 1),
        lambda x, w, b, c: conv(repeat_first(x, 2), w, b),
        {"time_mode": "replicate"},
    ),
    ("vidtok, not causal", (3, 3, 3), lambda x, w, b, c: conv(x, w, b, padding=1), {"time_pad": (1, 1)}),
    (
        "magvit2: reflect on all sides",
        (3, 3, 3),
        lambda x, w, b, c: conv(F.pad(x, (1, 1, 1, 1, 2, 0), mode="reflect"), w, b),
        {"time_mode": "reflect", "spatial_mode": "reflect"},
    ),
    ("magvit2: first layer", (7, 7, 7), lambda x, w, b, c: conv(F.pad(x, (3, 3, 3, 3, 6, 0)), w, b), {}),
    (
        "allegro: first and last frame, no causality",
        (3, 1, 1),
        lambda x, w, b, c: conv(torch.cat([x[:, :, :1], x, x[:, :, -1:]], 2), w, b),
        {"time_mode": "replicate", "time_pad": (1, 1)},
    ),
    (
        "dilated, causal",
        (3, 3, 3),
        lambda x, w, b, c: conv(F.pad(x, (2, 2, 2, 2, 4, 0)), w, b, dilation=2),
        {"dilation": 2},
    ),
    (
        "nearest upsampling in space",
        (1, 3, 3),
        lambda x, w, b, c: conv(F.interpolate(x, scale_factor=(1, 2, 2)), w, b, padding=(0, 1, 1)),
        {"upsample": (1, 2, 2)},
    ),
    (
        "nearest upsampling in time, causal",
        (3, 3, 3),
        lambda x, w, b, c: conv(F.pad(x.repeat_interleave(2, 2), (1, 1, 1, 1, 2, 0)), w, b),
        {"upsample": (2, 1, 1)},
    ),
    (
        "cosmos: time upsampling, the first frame once",
        (3, 1, 1),
        lambda x, w, b, c: conv(repeat_first(x.repeat_interleave(2, 2)[:, :, 1:], 2), w, b),
        {"upsample": (2, 1, 1), "upsample_first_frame_once": True, "time_mode": "replicate"},
    ),
]


def make(kernel, cache=0, channels=(5, 6), size=(4, 7, 9), dtype=torch.float64):
    x = torch.randn(2, channels[0], *size, dtype=dtype)
    w = torch.randn(channels[1], channels[0], *kernel, dtype=dtype) * 0.2
    b = torch.randn(channels[1], dtype=dtype)
    c = torch.randn(2, channels[0], cache, *size[1:], dtype=dtype) if cache else None
    return x, w, b, c


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=pytest.mark.needs_native)])
@pytest.mark.parametrize("name, kernel, chain, options", ROWS, ids=[row[0] for row in ROWS])
def test_padding_rule_of_public_models(name, kernel, chain, options, backend):
    options = dict(options)
    x, w, b, c = make(kernel, options.pop("cache", 0))
    expected = chain(x, w, b, c)
    if backend == "reference":
        actual = vtok_fast.causal_conv3d(x, w, b, cache=c, backend=backend, **options)
        assert parity.close(actual, expected).ok
    else:
        single = [t if t is None else t.float() for t in (x, w, b, c)]
        expected = chain(*[t if t is None else t.double() for t in single])
        actual = vtok_fast.causal_conv3d(*single[:3], cache=single[3], backend=backend, **options)
        assert (p := parity.close(actual, expected, chain(*single))).ok, p
    assert actual.is_contiguous(memory_format=torch.channels_last_3d)


@st.composite
def calls(draw):
    """A random valid call: shapes, pads, modes, cache, epilogue."""
    ints = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    kernel = pick((3, 3, 3), (1, 3, 3), (3, 1, 1), (1, 1, 1), (2, 3, 2), (1, 2, 4))
    time_mode, spatial_mode = pick("zeros", "replicate", "reflect"), pick("zeros", "replicate", "reflect")
    plane = pick(True, False)
    stride, dilation = (
        ((1, 1, 1), (1, 1, 1))
        if plane
        else ((ints(1, 2), ints(1, 2), ints(1, 2)), (ints(1, 2), 1, ints(1, 2)))
    )
    upsample = pick((1, 1, 1), (1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 2))
    groups = pick(1, 1, 1, 2)
    size = (ints(3, 5), ints(6, 13), ints(6, 19))
    return {
        "size": size,
        "kernel": kernel,
        "batch": ints(1, 2),
        "channels": groups * pick(1, 3, 8, 16, 20),
        "groups": groups,
        "out_channels": groups * pick(1, 3, 8, 16, 33),
        "stride": stride,
        "dilation": dilation,
        "time_mode": time_mode,
        "spatial_mode": spatial_mode,
        "time_pad": (ints(0, 2), ints(0, 1)),
        "spatial_pad": ((ints(0, 2), ints(0, 2)), (ints(0, 2), ints(0, 2))),
        "cached": pick(0, 0, 1, 2, 3),
        "upsample": upsample,
        "upsample_first_frame_once": pick(True, False),
        "bias": pick(True, False),
        "activation": pick(None, "silu"),
        "residual": pick(None, "same", "before upsampling"),
        "alpha": pick(None, 0.3),
        "layout": pick("channels_last_3d", "contiguous", "strided"),
        "seed": ints(0, 10**6),
    }


def run_call(call, dtype, backend):
    """The result of a random call, its float64 reference and PyTorch's result in the same dtype."""
    g = torch.Generator().manual_seed(call["seed"])

    def rand(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    b, c, o, size = call["batch"], call["channels"], call["out_channels"], call["size"]
    x = rand(b, c, *size)
    if call["layout"] == "channels_last_3d":
        x = x.contiguous(memory_format=torch.channels_last_3d)
    elif call["layout"] == "strided":
        x = rand(b, c + 1, size[0], size[1], 2 * size[2])[:, 1:, :, :, ::2]
    weight = rand(o, c // call["groups"], *call["kernel"], scale=0.3)
    bias = rand(o) if call["bias"] else None
    cache = rand(b, c, call["cached"], *size[1:]) if call["cached"] else None
    options = {
        k: call[k]
        for k in (
            "stride",
            "dilation",
            "groups",
            "time_pad",
            "spatial_pad",
            "time_mode",
            "spatial_mode",
            "activation",
            "upsample",
            "upsample_first_frame_once",
        )
    }
    once = call["upsample_first_frame_once"] and cache is None
    pad = (*call["time_pad"], *call["spatial_pad"][0], *call["spatial_pad"][1])
    geometry = Geometry(
        call["stride"], call["dilation"], pad=pad, upsample=call["upsample"], upsample_first_frame_once=once
    )
    out = geometry.output_size(size, call["kernel"])
    if min(out) < 1:
        return None
    residual = None
    if call["residual"] == "same":
        residual = rand(b, o, *out)
    elif call["residual"] and not once and all(n % u == 0 for n, u in zip(out, call["upsample"])):
        residual = rand(b, o, *(n // u for n, u in zip(out, call["upsample"])))
    options["alpha"] = call["alpha"] if residual is not None else None

    def compute(cast, backend):
        args = [t if t is None else cast(t) for t in (x, weight, bias, cache, residual)]
        return vtok_fast.causal_conv3d(*args[:3], cache=args[3], residual=args[4], backend=backend, **options)

    same = lambda t: t
    return compute(same, backend), compute(torch.Tensor.double, "reference"), compute(same, "reference")


@pytest.mark.needs_native
@pytest.mark.parametrize("algorithm", ["direct", "winograd2", "winograd4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=40, deadline=None)
@given(call=calls())
def test_cpu_kernel_against_float64(call, dtype, algorithm):
    try:
        with vtok_fast.algorithm(algorithm):
            results = run_call(call, dtype, "cpu")
    except ValueError as error:
        assert "reflect needs pads smaller" in str(error)
        return
    if results is not None:
        assert (p := parity.close(*results)).ok, p


@pytest.mark.needs_native
def test_every_element_of_the_output_is_written():
    x, w, b, _ = make((3, 3, 3), channels=(16, 16), dtype=torch.float32)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        for algorithm in ("direct", "winograd2", "winograd4"):
            with vtok_fast.algorithm(algorithm):
                assert torch.empty(4).isnan().all()
                assert vtok_fast.causal_conv3d(x, w, b, backend="cpu").isfinite().all()
                assert (
                    vtok_fast.causal_conv3d(x[:, :, :1], w, b, time_pad=(5, 0), backend="cpu")
                    .isfinite()
                    .all()
                )
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.needs_native
@pytest.mark.parametrize("algorithm", ["direct", "winograd4"])
def test_offsets_beyond_2_to_the_31(algorithm):
    """Frames that lie 2**29 elements apart: the last one starts beyond 2**31. Untouched pages cost no
    memory."""
    frames = torch.zeros(1, 6, 2**13, 2**12, 16, dtype=torch.bfloat16)
    x = frames.permute(0, 4, 1, 2, 3)[:, :, :, :8, :12]
    x.copy_(torch.randn(x.shape))
    w = torch.randn(16, 16, 3, 3, 3).bfloat16()
    assert x.stride(2) * (x.shape[2] - 1) > 2**31
    with vtok_fast.algorithm(algorithm):
        y = vtok_fast.causal_conv3d(x, w, backend="cpu")
    small = x.clone(memory_format=torch.contiguous_format)
    assert parity.close(
        y,
        vtok_fast.causal_conv3d(small.double(), w.double()),
        vtok_fast.causal_conv3d(small, w, backend="reference"),
    ).ok


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"time_mode": "replicate", "spatial_mode": "reflect", "activation": "silu"},
        {"stride": 2, "spatial_pad": DOWN, "time_mode": "replicate"},
        {"upsample": (2, 1, 1), "time_pad": (1, 0)},
        {"upsample": (1, 2, 2), "spatial_mode": "replicate"},
        {"depth_to_space": (1, 2, 1), "activation": "silu"},
        {"dilation": (2, 1, 1)},
        {"groups": 2},
        {"time_pad": (1, 1), "time_mode": "reflect"},
    ],
    ids=str,
)
def test_gradients_against_finite_differences(options):
    channels = 2 * options.get("groups", 1)
    x = torch.randn(1, channels, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, dtype=torch.float64, requires_grad=True)
    c = torch.randn(1, channels, 1, 4, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(
        lambda x, w, b, c: vtok_fast.causal_conv3d(x, w, b, cache=c, **options), (x, w, b, c), fast_mode=True
    )


def test_gradients_of_residual_and_alpha():
    x = torch.randn(1, 2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    r = torch.randn(1, 4, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    a = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    options = {
        "upsample": (2, 2, 2),
        "upsample_first_frame_once": True,
        "time_mode": "replicate",
        "activation": "silu",
    }
    assert gradcheck(
        lambda x, w, r, a: vtok_fast.causal_conv3d(x, w, residual=r, alpha=a, **options),
        (x, w, r, a),
        fast_mode=True,
    )
    assert gradcheck(
        lambda x, w, r: vtok_fast.causal_conv3d(x, w, residual=r, alpha=0.3, **options),
        (x, w, r),
        fast_mode=True,
    )


@pytest.mark.needs_native
def test_float32_gradients_are_close():
    x, w, b, c = make((3, 3, 3), cache=2, channels=(16, 24), size=(4, 12, 14), dtype=torch.float32)

    def gradients(cast, backend):
        inputs = [cast(t).detach().requires_grad_() for t in (x, w, b, c)]
        y = vtok_fast.causal_conv3d(*inputs[:3], cache=inputs[3], activation="silu", backend=backend)
        return torch.autograd.grad(y, inputs, cast(torch.ones_like(y, dtype=torch.float32)).expand_as(y))

    fast, eager = gradients(lambda t: t, None), gradients(lambda t: t, "reference")
    ref64 = gradients(lambda t: t.double(), "reference")
    for name, f, r, e in zip(("x", "weight", "bias", "cache"), fast, ref64, eager):
        assert (p := parity.close(f, r, e)).ok, (name, p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(dtype):
    x, w, b, c = (t.requires_grad_() for t in make((3, 3, 3), cache=1, size=(3, 4, 5), dtype=dtype))
    residual = torch.randn(2, 6, 3, 4, 5, dtype=dtype)
    geometry = ([1, 1, 1], [1, 1, 1], 1, [2, 0, 1, 1, 1, 1], "replicate", "zeros")
    torch.library.opcheck(
        torch.ops.vtok_fast.causal_conv3d,
        (x, w, b, c, residual, *geometry, [1, 1, 1], False, 0.25, "silu", [1, 1, 1], None, None),
    )
    torch.library.opcheck(
        torch.ops.vtok_fast.causal_conv3d,
        (x, w, None, None, None, *geometry, [2, 1, 1], True, None, None, [1, 1, 2], None, None),
    )


def test_compiles_without_graph_breaks():
    x, w, b, c = make((3, 3, 3), cache=1, dtype=torch.float32)

    def f(x, w, b, c):
        return (
            vtok_fast.causal_conv3d(x, w, b, cache=c, activation="silu", residual=torch.zeros(2, 6, 4, 7, 9))
            * 2
        )

    torch.testing.assert_close(
        torch.compile(f, fullgraph=True, backend="aot_eager")(x, w, b, c), f(x, w, b, c)
    )


X, W = torch.zeros(1, 4, 3, 8, 8), torch.zeros(6, 4, 3, 3, 3)
BAD = [
    ({"x": X[0]}, ValueError, r"x: expected \(B, C, T, H, W\), got shape \(4, 3, 8, 8\)"),
    ({"x": X.int()}, TypeError, "x: expected a floating point dtype .* got torch.int32"),
    ({"weight": W[0]}, ValueError, "weight: expected"),
    ({"weight": W[:, :3]}, ValueError, "weight: expects 3 input channels.*x has 4"),
    ({"weight": W.double()}, TypeError, "weight: expected the dtype of x, torch.float32, got torch.float64"),
    ({"bias": torch.zeros(5)}, ValueError, r"bias: expected shape \(6,\), got \(5,\)"),
    ({"groups": 3}, ValueError, "groups: must divide 4 input and 6 output channels, got 3"),
    ({"stride": 0}, ValueError, "stride: .* got 0"),
    ({"dilation": (1, 1)}, ValueError, r"dilation: .* got \(1, 1\)"),
    ({"stride": 2}, ValueError, "spatial_pad: must be given with stride"),
    ({"time_pad": (-1, 0)}, ValueError, "time_pad: .* got -1"),
    ({"time_pad": (2**31, 0)}, ValueError, "time_pad: .* got 2147483648"),
    ({"spatial_pad": (1, 1)}, ValueError, r"spatial_pad: expected .* got .* \(1, 1\)"),
    (
        {"spatial_pad": ((8, 0), (0, 0)), "spatial_mode": "reflect"},
        ValueError,
        "spatial_pad: reflect needs pads smaller than the 8 .* got 8",
    ),
    (
        {"time_mode": "reflect", "time_pad": (3, 0)},
        ValueError,
        "time_pad: reflect needs pads smaller than the 3 .* got 3",
    ),
    ({"time_mode": "wrap"}, ValueError, "time_mode: expected one of zeros, replicate, reflect, got 'wrap'"),
    ({"time_pad": (0, 0), "x": X[:, :, :2]}, ValueError, "x: too small for the kernel"),
    (
        {"x": X[:, :, :0]},
        ValueError,
        r"x: no dimension but the batch may be empty, got shape \(1, 4, 0, 8, 8\)",
    ),
    ({"cache": torch.zeros(1, 4, 2, 8, 7)}, ValueError, r"cache: expected .* got \(1, 4, 2, 8, 7\)"),
    ({"residual": torch.zeros(1, 6, 3, 8, 7)}, ValueError, r"residual: expected .* got \(1, 6, 3, 8, 7\)"),
    ({"alpha": 0.5}, ValueError, "alpha: blends with residual, which is None; got alpha=0.5"),
    ({"activation": "relu"}, ValueError, "activation: expected None or 'silu', got 'relu'"),
    ({"upsample": (1, 0, 1)}, ValueError, "upsample: .* got"),
    ({"depth_to_space": (1, 2, 2)}, ValueError, r"depth_to_space: \(1, 2, 2\) does not divide 6"),
    ({"backend": "fpga"}, ValueError, "backend: expected one of .* got 'fpga'"),
    ({"backend": "triton"}, vtok_fast.BackendError, "backend='triton' does not exist for this op"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[str(list(row[0])) + row[2][:20] for row in BAD])
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        vtok_fast.causal_conv3d(**{"x": X, "weight": W, **change})


@pytest.mark.needs_native
def test_float64_has_no_cpu_kernel_and_says_so():
    with pytest.raises(vtok_fast.BackendError, match="no torch.float64 kernel"):
        vtok_fast.causal_conv3d(X.double(), W.double(), backend="cpu")
    # Automatic choice falls back
    assert vtok_fast.causal_conv3d(X.double(), W.double()).dtype == torch.float64
    assert "float64" in vtok_fast.dispatch.backends.fallbacks()["causal_conv3d"]["cpu"]


def test_empty_batch():
    y = vtok_fast.causal_conv3d(X[:0], W)
    assert y.shape == (0, 6, 3, 8, 8)


@pytest.mark.needs_native
def test_tensors_that_are_not_what_their_memory_says():
    n = torch.conj(torch.randn(1, 4, 3, 8, 8, dtype=torch.complex64)).imag  # a view with its sign bit pending
    assert n.is_neg()
    torch.testing.assert_close(
        vtok_fast.causal_conv3d(n, W + 1, backend="cpu"),
        vtok_fast.causal_conv3d(n.clone(), W + 1, backend="reference"),
    )
    with torch.autograd.forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="forward-mode"):
            vtok_fast.causal_conv3d(torch.autograd.forward_ad.make_dual(X, X), W)
    with pytest.raises(RuntimeError, match="torch.jit.trace cannot record"):
        torch.jit.trace(lambda x: vtok_fast.causal_conv3d(x, W), X)
    with pytest.raises(ValueError, match="time_pad, spatial_pad: .* make an axis of"):
        vtok_fast.causal_conv3d(X, W, spatial_pad=((10**9, 0), (10**9, 0)))
    with pytest.raises(TypeError, match="x: expected a tensor, got list"):
        vtok_fast.causal_conv3d([1], W)


@pytest.mark.needs_native
@pytest.mark.parametrize("algorithm", ["direct", "winograd4"])
def test_strided_and_expanded_arguments(algorithm):
    x, w = torch.randn(1, 16, 3, 8, 8), torch.randn(32, 16, 3, 3, 3)
    for bias in (torch.randn(32, 2)[:, 0], torch.randn(1).expand(32)):
        for image in (x, x[:, :, :1].expand(-1, -1, 3, -1, -1), x.transpose(3, 4)):
            residual = torch.randn(1, 1, 3, 8, 8).expand(1, 32, 3, 8, 8)
            expected = vtok_fast.causal_conv3d(
                image.double(), w.double(), bias.double(), residual=residual.double()
            )
            with vtok_fast.algorithm(algorithm):
                actual = vtok_fast.causal_conv3d(image, w, bias, residual=residual, backend="cpu")
            same = vtok_fast.causal_conv3d(image, w, bias, residual=residual, backend="reference")
            assert (p := parity.close(actual, expected, same)).ok, p


@pytest.mark.parametrize(
    "options",
    [
        {"time_pad": (10**9, 0)},
        {"spatial_pad": ((0, 0), (2**31 - 1, 0))},
        {"upsample": (1, 1, 2**30)},
        {"stride": 2**40, "spatial_pad": ONE},
    ],
    ids=str,
)
def test_absurd_sizes_are_refused_at_once(options):
    with pytest.raises(ValueError, match="time_pad|upsample|stride"):
        vtok_fast.causal_conv3d(X, W, **options)
