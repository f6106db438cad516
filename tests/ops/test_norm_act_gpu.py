"""norm_act's Triton kernels on a GPU, bfloat16 included, forward and backward."""

import pytest
import torch

from vtok_fast import parity
from vtok_fast.ops.norm_act import norm_act
from vtok_fast.reference import norm_act as reference

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {"planar": torch.contiguous_format, "channels_last": torch.channels_last_3d}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", reference.KINDS)
def test_forward_and_backward_are_close_to_float64(kind, dtype, layout):
    for c, groups, size in (
        (128, 32, (5, 40, 40)),
        (96, 1, (3, 33, 17)),
        (512, 32, (2, 16, 16)),
        (33, 3, (1, 1, 1)),
    ):
        x = (
            (torch.randn(2, c, *size) * 2 + 3)
            .to(dtype)
            .contiguous(memory_format=layout)
            .cuda()
            .requires_grad_()
        )
        weight, bias = torch.randn(2, c, device="cuda").to(dtype).requires_grad_().unbind()
        scale = torch.randn(2, c, 1, 1, 1, device="cuda").to(dtype).requires_grad_()
        residual = torch.randn_like(x).requires_grad_()
        arguments = [x, weight, bias, scale, residual]
        for per_frame in (False, True) if "group" in kind else (False,):
            options = {"kind": kind, "groups": groups, "per_frame": per_frame, "activation": "silu"}
            run = lambda x, w, b, s, r, **more: norm_act(x, w, b, scale=s, residual=r, **options, **more)  # noqa: E731
            y = run(*arguments, backend="triton")
            wide = [t.detach().double().requires_grad_() for t in arguments]
            exact = run(*wide, backend="reference")
            measured = parity.close(
                y.detach().cpu(), exact.detach().cpu(), run(*arguments, backend="reference").detach().cpu()
            )
            assert measured.ok, (str(measured), c, options)
            upstream = torch.randn_like(y)
            same = reference.norm_act_backward(
                upstream,
                x.detach(),
                weight.detach(),
                bias.detach(),
                scale.detach(),
                None,
                residual.detach(),
                eps=1e-6,
                rounding="once",
                **options,
            )
            same = [t.cpu() for t in same if t is not None]
            got = torch.autograd.grad(y, arguments, upstream)
            for g, e, s in zip(got, torch.autograd.grad(exact, wide, upstream.double()), same):
                measured = parity.close(g.cpu(), e.cpu(), s)
                assert measured.ok, (str(measured), c, options)


def test_tail_is_part_of_the_result():
    for layout in LAYOUTS.values():
        x = torch.randn(2, 96, 5, 12, 20, device="cuda").contiguous(memory_format=layout)
        for kind in ("layer", "group"):
            y, tail = norm_act(x, kind=kind, activation="silu", tail_frames=2, backend="triton")
            assert torch.equal(tail, y[:, :, -2:]) and tail.data_ptr() != y[:, :, -2:].data_ptr()


@pytest.mark.parametrize("rounding", ("wan", "ltx"))
def test_chains_differ_from_the_library_seldom(rounding):
    x = (
        (torch.randn(2, 96, 4, 64, 64, device="cuda") * 3)
        .bfloat16()
        .contiguous(memory_format=torch.channels_last_3d)
    )
    got = norm_act(x, kind="rms", rounding=rounding, backend="triton")
    want = norm_act(x, kind="rms", rounding=rounding, backend="reference")
    difference = (got.view(torch.int16).int() - want.view(torch.int16).int()).abs()
    share = (difference > 0).float().mean().item()
    print(f"{rounding}: {share:.2e} of the elements differ")
    # Norms that differ by 4 eps(float32) round to another bfloat16 for 2 x 4 x 2^-24 / 2^-8 of the elements,
    # at each rounding.
    assert difference.max() <= (2 if rounding == "wan" else 1) and share <= 2 * 2**-13


def test_more_than_2_to_31_elements():
    x = torch.zeros(1, 128, 17, 1024, 1024, dtype=torch.bfloat16, device="cuda").contiguous(
        memory_format=torch.channels_last_3d
    )
    x[..., -1, -1] = torch.randn(128, 17, device="cuda").bfloat16()
    for kind in ("layer", "group"):
        y = norm_act(x, kind=kind, per_frame=True, backend="triton")
        last = x[..., -2:, -2:].contiguous()
        if kind == "layer":
            torch.testing.assert_close(y[..., -2:, -2:], norm_act(last, kind=kind, backend="reference"))
        assert y.isfinite().all()
