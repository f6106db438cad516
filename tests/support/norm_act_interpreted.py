"""The Triton kernels of norm_act under Triton's interpreter (see tests/support/triton_harness.py)."""

import math

import pytest
import torch

from vtok_fast import parity
from vtok_fast.kernels import norm_act as kernels
from vtok_fast.kernels import norm_act_backward as backward
from vtok_fast.reference import norm_act as reference

DTYPES = (torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow))
LAYOUTS = {"planar": torch.contiguous_format, "channels_last": torch.channels_last_3d}


def run(x, weight=None, bias=None, *, tail_frames=0, layout=torch.channels_last_3d, **options):
    """The launcher with a poisoned result."""
    options = {
        "kind": "layer",
        "groups": 1,
        "per_frame": False,
        "eps": 1e-6,
        "activation": None,
        "rounding": "once",
        "scale": None,
        "shift": None,
        "residual": None,
    } | options
    y = torch.full_like(x, math.nan, memory_format=layout)
    tail = torch.full_like(y[:, :, :tail_frames], math.nan, memory_format=layout) if tail_frames else None
    kernels.norm_act(
        x,
        weight,
        bias,
        options["scale"],
        options["shift"],
        options["residual"],
        y,
        kind=options["kind"],
        groups=options["groups"],
        per_frame=options["per_frame"],
        eps=options["eps"],
        silu=options["activation"] == "silu",
        rounding=options["rounding"],
        tail=tail,
    )
    if tail_frames:
        assert torch.equal(tail, y[:, :, x.shape[2] - tail_frames :])
    return y


def widen(options):
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def assert_close(x, weight, bias, layout=torch.channels_last_3d, tail_frames=0, **options):
    y = run(x, weight, bias, layout=layout, tail_frames=tail_frames, **options)
    wide = [None if t is None else t.double() for t in (weight, bias)]
    exact = reference.norm_act(x.double(), *wide, **widen(options))
    measured = parity.close(y, exact, reference.norm_act(x, weight, bias, **options))
    assert measured.ok, (str(measured), x.shape, options.keys())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", reference.KINDS)
def test_every_kind_is_close_to_float64(kind, dtype, layout):
    for c, groups in ((32, 4), (33, 3), (1, 1), (160, 1)):
        x = (torch.randn(2, c, 3, 5, 7) * 2 + 3).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        weight, bias = torch.randn(2, c).to(dtype)
        for per_frame in (False, True) if "group" in kind else (False,):
            assert_close(
                x,
                weight,
                bias,
                LAYOUTS[layout],
                tail_frames=2,
                kind=kind,
                groups=groups,
                per_frame=per_frame,
                activation="silu",
            )
        if c != 33:
            continue
        assert_close(x, None, None, kind=kind, groups=groups)
        full, per_channel, per_frame = (
            torch.randn_like(x),
            torch.randn(2, c, 1, 1, 1).to(dtype),
            torch.randn(c, 3, 1, 1).to(dtype),
        )
        rows = torch.randn(1, 1, 1, 5, 1).to(dtype)
        for scale, shift in (
            (full, per_channel),
            (per_frame, full[:, :1]),
            (rows, None),
            (full[:1, :, :1], rows),
        ):
            assert_close(
                x,
                weight,
                bias,
                kind=kind,
                groups=groups,
                scale=scale,
                shift=shift,
                residual=full,
                activation="silu",
                tail_frames=1,
            )


@pytest.mark.parametrize("kind", ("layer", "group"))
def test_any_strides_and_a_large_mean(kind):
    x = torch.randn(2, 12, 5, 7, 9) + 3000
    cut = x.contiguous(memory_format=torch.channels_last_3d)[:, :, ::2, 1:]
    for v in (x[:, :, 1:-1], x[..., 1:-1], x.transpose(3, 4), x[:, ::2], cut):
        residual = torch.randn(3, *v.shape[1:])[1:]
        assert_close(v, None, None, kind=kind, groups=2, residual=residual)


@pytest.mark.parametrize("kind", reference.KINDS)
def test_many_positions_in_parts(kind):
    x = (torch.randn(1, 6, 4, 40, 60) + torch.arange(4).view(1, 1, 4, 1, 1) * 5).contiguous(
        memory_format=torch.channels_last_3d
    )
    for per_frame in (False, True):
        assert_close(x, None, None, kind=kind, groups=2, per_frame=per_frame)
    assert_close(x.contiguous(), None, None, torch.contiguous_format, kind=kind, groups=3)


def ulps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many float16 lie between the two."""
    bits = [t.view(torch.int16).int() for t in (a, b)]
    x, y = (torch.where(t < 0, -(t & 0x7FFF), t) for t in bits)
    return (x - y).abs()


@pytest.mark.parametrize("rounding", ("wan", "ltx"))
def test_chains_round_where_the_library_does(rounding):
    """Reductions in another order than ATen's move the norm by some eps(float32), say 4, and so the next
    rounding to float16 goes the other way for a share of at most 2 x 4 x 2^-24 / 2^-11 = 2^-10 of the
    elements. Each rounding behind it can do so once more."""
    x = (torch.randn(2, 96, 2, 12, 20) * 3).half().contiguous(memory_format=torch.channels_last_3d)
    got, want = run(x, kind="rms", rounding=rounding), reference.norm_act(x, kind="rms", rounding=rounding)
    difference = ulps(got, want)
    # One ulp; behind Wan's factor sqrt(C) it can be two, where the factor carries a value over a power of
    # two.
    assert (
        difference.max() <= (2 if rounding == "wan" else 1) and (difference > 0).float().mean() < 2 * 2**-10
    )
    gamma, bias = torch.randn(96).half(), torch.randn(96)
    for weight, b in ((gamma, None), (gamma.float(), None), (gamma, bias), (None, bias.half())):
        options = {
            "kind": "rms",
            "rounding": rounding,
            "activation": "silu",
            "scale": torch.rand(2, 96, 1, 1, 1).half(),
        }
        got, want = run(x, weight, b, **options), reference.norm_act(x, weight, b, **options)
        wide = [None if t is None else t.double() for t in (weight, b)]
        exact = reference.norm_act(x.double(), *wide, **widen(options) | {"rounding": "once"})
        assert parity.close(got, exact, want).ok and (got != want).float().mean() < 6 * 2**-10


def test_wan_has_a_floor_under_the_norm():
    x = torch.zeros(1, 8, 1, 2, 2)
    x[0, :, 0, 0, 0], x[0, :, 0, 0, 1] = 1e-14, 1.0
    torch.testing.assert_close(
        run(x, kind="rms", rounding="wan"), reference.norm_act(x, kind="rms", rounding="wan")
    )


# ---- backward ----------------------------------------------------------------------------------------------


def assert_gradients_close(x, weight, bias, layout=torch.channels_last_3d, **options):
    options = {
        "kind": "layer",
        "groups": 1,
        "per_frame": False,
        "eps": 1e-6,
        "activation": "silu",
        "rounding": "once",
    } | options
    tensors = [x, weight, bias, *(options.pop(name, None) for name in ("scale", "shift", "residual"))]
    grad = torch.randn_like(x)
    got = backward.norm_act_backward(grad, *tensors, layout=layout, **options)
    exact = reference.norm_act_backward(
        grad.double(), *(None if t is None else t.double() for t in tensors), **options
    )
    same = reference.norm_act_backward(grad, *tensors, **options)
    for name, t, g, e, s in zip(
        ("x", "weight", "bias", "scale", "shift", "residual"), tensors, got, exact, same
    ):
        assert (g is None) == (t is None)
        if g is not None:
            assert g.shape == t.shape and g.dtype == t.dtype
            measured = parity.close(g, e, s)
            assert measured.ok, (name, str(measured), tuple(x.shape), options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", reference.KINDS)
def test_gradients_of_every_kind(kind, dtype, layout):
    for c, groups in ((32, 4), (33, 3)):
        x = (torch.randn(2, c, 3, 5, 7) * 2 + 3).to(dtype).contiguous(memory_format=LAYOUTS[layout])
        weight, bias = torch.randn(2, c).to(dtype)
        for per_frame in (False, True) if "group" in kind else (False,):
            assert_gradients_close(
                x, weight, bias, LAYOUTS[layout], kind=kind, groups=groups, per_frame=per_frame
            )
        if c == 33:
            assert_gradients_close(x, None, None, kind=kind, groups=groups, activation=None)
            full, per_channel = torch.randn_like(x), torch.randn(2, c, 1, 1, 1).to(dtype)
            per_frame = torch.randn(c, 3, 1, 1).to(dtype)
            for scale, shift in ((full, per_channel), (per_frame, full[:, :1])):
                assert_gradients_close(
                    x, weight, bias, kind=kind, groups=groups, scale=scale, shift=shift, residual=full
                )


@pytest.mark.parametrize("kind", reference.KINDS)
def test_gradients_over_many_programs(kind, monkeypatch):
    monkeypatch.setattr(backward, "PROGRAMS", 3)
    x = torch.randn(1, 6, 2, 40, 60) + 5
    assert_gradients_close(x, torch.randn(6), None, torch.contiguous_format, kind=kind, groups=2)
    assert_gradients_close(x[..., ::2], torch.randn(6), None, kind=kind, groups=2, per_frame=True)


def test_gradient_under_the_floor_of_wan():
    x = torch.randn(1, 8, 1, 2, 2)
    x[0, :, 0, 0, 0] *= 1e-14
    assert_gradients_close(x, torch.randn(8), None, kind="rms", rounding="wan")
    assert_gradients_close(x, torch.randn(8), None, kind="rms", rounding="ltx")


def test_only_what_is_wanted():
    x = torch.randn(1, 8, 1, 2, 2)
    options = {
        "kind": "layer",
        "groups": 1,
        "per_frame": False,
        "eps": 1e-6,
        "activation": None,
        "rounding": "once",
    }
    got = backward.norm_act_backward(
        x, x, None, None, x, x, None, wanted=(True, False, False, False, True, False), **options
    )
    assert got[3] is None and got[4] is not None
