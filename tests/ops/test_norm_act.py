"""norm_act against its float64 definition, PyTorch's own layers, and the rounding chains of two libraries."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import vtok_fast
from vtok_fast import parity
from vtok_fast.dispatch import native
from vtok_fast.nn.norm_act import NormAct
from vtok_fast.ops.norm_act import norm_act
from vtok_fast.reference import norm_act as reference

NARROW = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}


def video(c, t=2, h=5, w=7, b=2, dtype=torch.float32, layout=torch.channels_last_3d, seed=0):
    x = torch.randn(b, c, t, h, w, generator=torch.Generator().manual_seed(seed)) * 2 + 3
    return x.to(dtype).contiguous(memory_format=layout)


def widen(options):
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def assert_close(x, weight, bias, **options):
    y = norm_act(x, weight, bias, backend="cpu", **options)
    wide = [None if t is None else t.double() for t in (weight, bias)]
    measured = parity.close(
        y,
        reference.norm_act(x.double(), *wide, **widen(options)),
        reference.norm_act(x, weight, bias, **options),
    )
    assert measured.ok, str(measured)
    return y


@pytest.mark.needs_native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", reference.KINDS)
def test_kernel_is_close_to_float64(isa, kind, layout):
    for dtype in NARROW:
        for c, groups in ((32, 4), (96, 1), (33, 3), (5, 5), (1, 1), (128, 32)):
            x = video(c, dtype=dtype, layout=LAYOUTS[layout])
            weight, bias = torch.randn(2, c).to(dtype)
            for per_frame in (False, True) if "group" in kind else (False,):
                assert_close(
                    x, weight, bias, kind=kind, groups=groups, per_frame=per_frame, activation="silu"
                )
            if c not in (33, 128):
                continue
            assert_close(x, None, None, kind=kind, groups=groups)
            full, per_channel = torch.randn_like(x), torch.randn(2, c, 1, 1, 1).to(dtype)
            per_frame = torch.randn(c, 2, 1, 1).to(dtype)
            for scale, shift in (
                (full, per_channel),
                (per_frame, full[:, :1]),
                (None, per_channel),
                (full[:1, :, :1], None),
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
                )


@pytest.mark.needs_native
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_shape_and_strides(data):
    b, t, h, w = (data.draw(st.integers(1, n)) for n in (2, 4, 9, 40))
    groups, per_group = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    x = torch.randn(b, groups * per_group, t + 2, h + 1, w + 1)
    view = data.draw(st.sampled_from(("slice", "channels_last slice", "transposed", "every second")))
    if view == "channels_last slice":
        x = x.contiguous(memory_format=torch.channels_last_3d)
    x = (
        x.transpose(3, 4)
        if view == "transposed"
        else x[..., ::2]
        if view == "every second"
        else x[:, :, 1:-1, 1:, :-1]
    )
    kind = data.draw(st.sampled_from(reference.KINDS))
    y = assert_close(
        x,
        torch.randn(x.shape[1]),
        None,
        kind=kind,
        groups=groups,
        activation="silu",
        residual=torch.randn_like(x),
    )
    assert y.is_contiguous(memory_format=torch.channels_last_3d) or x.is_contiguous()


@pytest.mark.needs_native
@pytest.mark.parametrize("layout", LAYOUTS.values())
@pytest.mark.parametrize("kind", ("layer", "group"))
def test_large_mean_costs_no_accuracy(isa, kind, layout):
    x = video(48, layout=layout) + 3000
    x = x.contiguous(memory_format=layout)
    assert_close(x, None, None, kind=kind)


@pytest.mark.needs_native
@pytest.mark.parametrize("layout", LAYOUTS.values())
def test_every_element_is_written_and_none_beside(isa, layout):
    for c in (3, 17, 32):
        x = video(c, layout=layout)
        room = torch.full((x.numel() + 64,), float("nan"))
        y = room[32:-32].as_strided(x.shape, x.stride())
        arg = native.arg
        for over_positions in (False, True):
            room.fill_(float("nan"))
            native.lib().norm_act(
                arg(x),
                None,
                None,
                None,
                None,
                None,
                arg(y),
                layout == torch.channels_last_3d,
                True,
                over_positions,
                False,
                1,
                1e-6,
                True,
                2,
            )
            assert y.isfinite().all() and room[:32].isnan().all() and room[-32:].isnan().all()


def test_reference_is_torchs_own_layers():
    x, weight, bias = video(32, dtype=torch.float64), *torch.randn(2, 32, dtype=torch.float64)
    last = x.permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(
        norm_act(x, weight, bias), F.layer_norm(last, (32,), weight, bias, 1e-6).permute(0, 4, 1, 2, 3)
    )
    torch.testing.assert_close(
        norm_act(x, weight, kind="rms"), F.rms_norm(last, (32,), weight, 1e-6).permute(0, 4, 1, 2, 3)
    )
    torch.testing.assert_close(
        norm_act(x, weight, bias, kind="group", groups=8), F.group_norm(x, 8, weight, bias, 1e-6)
    )
    frames = torch.stack([F.group_norm(x[:, :, t], 8, weight, bias, 1e-6) for t in range(2)], 2)
    torch.testing.assert_close(norm_act(x, weight, bias, kind="group", groups=8, per_frame=True), frames)
    rms = x.unflatten(1, (8, 4)).square().mean((2, 3, 4, 5), keepdim=True).add(1e-6).rsqrt()
    torch.testing.assert_close(
        norm_act(x, kind="group_rms", groups=8, activation="silu"),
        F.silu((x.unflatten(1, (8, 4)) * rms).flatten(1, 2)),
    )


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("layout", LAYOUTS.values())
def test_chains_are_exact(dtype, layout):
    x, gamma = video(24, dtype=dtype, layout=layout), torch.randn(24).to(dtype)
    narrow = dtype != torch.float32
    wan = F.normalize(x.float() if narrow else x, dim=1).to(dtype) * 24**0.5 * gamma.view(-1, 1, 1, 1) + 0.0
    assert torch.equal(norm_act(x, gamma, kind="rms", rounding="wan", activation="silu"), F.silu(wan))
    last = x.movedim(1, -1)
    ltx = last * torch.rsqrt(last.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-8)
    ltx = (ltx.to(dtype) * gamma).movedim(-1, 1)
    assert torch.equal(norm_act(x, gamma, kind="rms", rounding="ltx", eps=1e-8), ltx)
    with pytest.raises(vtok_fast.BackendError, match="rounding='wan'"):
        norm_act(x, gamma, kind="rms", rounding="wan", backend="cpu")


def test_tail_is_fresh_and_equal():
    x = video(16)
    y, tail = norm_act(x, activation="silu", tail_frames=2)
    assert torch.equal(tail, y[:, :, -2:]) and tail.data_ptr() != y[:, :, -2:].data_ptr()
    assert torch.equal(norm_act(x, tail_frames=9)[1], norm_act(x))


@pytest.mark.parametrize("rounding", ("once", "wan", "ltx"))
@pytest.mark.parametrize("kind", reference.KINDS)
def test_gradients(kind, rounding):
    if rounding != "once" and kind != "rms":
        return
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    args = (
        make(2, 4, 2, 2, 2),
        make(4),
        make(4),
        make(2, 4, 1, 1, 1),
        make(2, 1, 2, 2, 2),
        make(2, 4, 2, 2, 2),
    )

    def f(x, weight, bias, scale, shift, residual):
        return norm_act(
            x,
            weight,
            bias,
            scale=scale,
            shift=shift,
            residual=residual,
            kind=kind,
            activation="silu",
            groups=1 if rounding != "once" else 2,
            rounding=rounding,
        )

    # Its variance is float32 whatever the input, too coarse for differences; its gradient is that of "once"
    if rounding == "ltx":
        upstream = torch.randn_like(args[0])
        got = torch.autograd.grad(f(*args), args, upstream)
        options = {
            "scale": args[3],
            "shift": args[4],
            "residual": args[5],
            "kind": kind,
            "activation": "silu",
        }
        want = torch.autograd.grad(norm_act(*args[:3], **options), args, upstream)
        return torch.testing.assert_close(got, want)
    assert torch.autograd.gradcheck(f, args)


@pytest.mark.needs_native
def test_kernel_gradient_is_close():
    x = video(32).requires_grad_()
    weight = torch.randn(32, requires_grad=True)
    norm_act(x, weight, activation="silu", backend="cpu").square().sum().backward()
    x64, w64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    reference.norm_act(x64, w64, activation="silu").square().sum().backward()
    assert parity.close(x.grad, x64.grad).ok and parity.close(weight.grad, w64.grad).ok


@pytest.mark.parametrize("layout", LAYOUTS.values())
def test_opcheck(layout):
    x = video(8, layout=layout).requires_grad_()
    for dtype, backend in ((torch.float32, None), (torch.bfloat16, "reference")):
        args = (
            x.to(dtype),
            torch.randn(8),
            torch.randn(8),
            torch.randn(2, 8, 1, 1, 1).to(dtype),
            None,
            None,
            "group",
            2,
            True,
            1e-6,
            "silu",
            "once",
            backend,
        )
        torch.library.opcheck(torch.ops.vtok_fast.norm_act, args)


def test_compile_fullgraph():
    module, x = NormAct(16, activation="silu"), video(16)
    compiled = torch.compile(lambda v: module(v, tail_frames=1), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x), module(x, tail_frames=1)):
        assert torch.equal(got, want) and got.stride() == want.stride()


def test_module_keeps_the_state_keys_of_torchs_layers():
    module = NormAct(32, kind="group", groups=8)
    module.load_state_dict(torch.nn.GroupNorm(8, 32).state_dict())
    assert "bias" not in NormAct(32, kind="rms").state_dict() and not NormAct(32, affine=False).state_dict()
    torch.nn.LayerNorm(32).load_state_dict(NormAct(32).state_dict())


@pytest.mark.parametrize("layout", LAYOUTS.values())
def test_empty_and_single(layout):
    assert norm_act(
        torch.empty(0, 8, 3, 4, 4).contiguous(memory_format=layout), kind="group", groups=2
    ).shape == (0, 8, 3, 4, 4)
    x = torch.randn(1, 8, 1, 1, 1)
    torch.testing.assert_close(norm_act(x), F.layer_norm(x.flatten(), (8,), eps=1e-6).view_as(x))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "batch"}, "kind: .*'batch'"),
        ({"groups": 3}, "groups: .* 8 channels.*3"),
        ({"groups": 0}, "groups: .*0"),
        ({"eps": -1.0}, "eps: .*-1.0"),
        ({"activation": "gelu"}, "activation: .*'gelu'"),
        ({"tail_frames": -1}, "tail_frames: .*-1"),
        ({"rounding": "twice"}, "rounding: .*'twice'"),
        ({"rounding": "wan"}, "rounding: 'wan'.*'layer'"),
        ({"weight": torch.ones(7)}, r"weight: .*\(8,\).*\(7,\)"),
        ({"bias": torch.ones(8, 1)}, r"bias: .*\(8, 1\)"),
        ({"scale": torch.ones(3, 1, 1, 1, 1)}, r"scale: .*\(3, 1, 1, 1, 1\)"),
        ({"shift": torch.ones(2, 2, 8, 3, 4, 4)}, "shift: "),
        ({"residual": torch.ones(2, 8, 3, 4, 1)}, r"residual: .*\(2, 8, 3, 4, 1\)"),
        ({"backend": "fast"}, "backend: .*'fast'"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        norm_act(torch.randn(2, 8, 3, 4, 4), **options)


def test_bad_inputs_are_named():
    with pytest.raises(ValueError, match=r"x: expected \(B, C, T, H, W\), got shape \(8, 4, 4\)"):
        norm_act(torch.randn(8, 4, 4))
    with pytest.raises(TypeError, match="x: .*int64"):
        norm_act(torch.ones(1, 8, 1, 1, 1, dtype=torch.int64))
    with pytest.raises(TypeError, match="residual: .*float16"):
        norm_act(torch.randn(1, 8, 1, 2, 2), residual=torch.randn(1, 8, 1, 2, 2).half())
    with pytest.raises(ValueError, match="groups: .*5"):
        NormAct(8, kind="group", groups=5)


@pytest.mark.parametrize("plane", [(1, 2), (2, 1), (1, 1)])
def test_modulation_of_frames_of_one_row(plane):
    x = torch.randn(2, 3, 1, *plane)  # contiguous, and with frames of one row or column
    # Strides of sizes 1 say nothing
    scale = torch.randn(2, 3, 1, 1, 1).as_strided((2, 3, 1, 1, 1), (3, 1, 7, 7, 7))
    want = reference.norm_act(x.double(), scale=scale.double())
    assert parity.close(vtok_fast.norm_act(x, scale=scale), want).ok
