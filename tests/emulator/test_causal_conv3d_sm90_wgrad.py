"""The Hopper kernel of the weights' and the bias's gradient in the emulator, races on, against float64.

Inputs are small integers, whose sums float32 holds exactly in any order: results must be the rounded
reference, bit for bit.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.conv_sm90_emulated import Emulated
from torch import Tensor

from vtok_fast.ops.causal_conv3d import gradient, sm90_wgrad
from vtok_fast.ops.causal_conv3d.call import ConvBackwardCall, Geometry
from vtok_fast.reference import causal_conv3d as reference

pytestmark = pytest.mark.needs_emulator

LAST = torch.channels_last_3d
BF16, F16 = torch.bfloat16, torch.float16
PLAIN = Geometry(pad=(0, 0, 1, 1, 1, 1))  # of a 1x3x3 kernel
WEIGHTS = (False, True, True, False)


def integers(*size: int, seed: int, dtype: torch.dtype) -> Tensor:
    return (
        torch.randint(-4, 5, size, generator=torch.Generator().manual_seed(seed))
        .to(dtype)
        .contiguous(memory_format=LAST)
    )


def both(
    channels: int,
    outputs: int,
    size: tuple[int, int, int],
    kernel: tuple[int, int, int],
    *,
    dtype: torch.dtype = BF16,
    batch: int = 1,
    stride: tuple[int, int, int] = (1, 1, 1),
    dilation: tuple[int, int, int] = (1, 1, 1),
    time_pad=None,
    space=None,
    time_mode: str = "zeros",
    cached: int = 0,
    choice: tuple[int, int, int] = (0, 0, 0),
    **options: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kernel's gradients of weight and bias, and the reference's."""
    spans = [d * (k - 1) for d, k in zip(dilation, kernel)]
    time_pad = (spans[0], 0) if time_pad is None else time_pad
    space = (
        ((spans[1] // 2, (spans[1] + 1) // 2), (spans[2] // 2, (spans[2] + 1) // 2))
        if space is None
        else space
    )
    x = integers(batch, channels, *size, seed=1, dtype=dtype)
    cache = integers(batch, channels, cached, *size[1:], seed=2, dtype=dtype) if cached else None
    weight = torch.zeros(outputs, channels, *kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(outputs, dtype=torch.float64, requires_grad=True)
    out = reference.causal_conv3d(
        x.double(),
        weight,
        bias,
        stride=stride,
        dilation=dilation,
        time_pad=time_pad,
        spatial_pad=space,
        time_mode=time_mode,
        cache=None if cache is None else cache.double(),
    )
    grad = integers(*out.shape, seed=3, dtype=dtype)
    want = torch.autograd.grad(out, (weight, bias), grad.double())
    geometry = Geometry(stride, dilation, 1, (*time_pad, *space[0], *space[1]), time_mode)
    got = [torch.full(like.shape, math.nan, dtype=dtype) for like in want]
    sm90_wgrad.wgrad(
        ConvBackwardCall(grad, x, got[0], cache, geometry, WEIGHTS),
        got[0],
        got[1],
        lib=Emulated(**options),
        choice=choice,
    )
    return got[0], got[1], want[0].to(dtype), want[1].to(dtype)


def check(*args: Any, **options: Any) -> None:
    weight, bias, want_weight, want_bias = both(*args, **options)
    assert torch.equal(weight, want_weight) and torch.equal(bias, want_bias)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", (BF16, F16), ids=str)
def test_3x3x3(dtype, seed):
    check(64, 64, (2, 8, 9), (3, 3, 3), dtype=dtype, seed=seed)


CASES: dict[str, tuple[tuple, dict[str, Any]]] = {
    "partial tiles": ((72, 136, (1, 9, 17), (1, 3, 3)), {"batch": 2}),
    "a cluster": ((64, 256, (2, 8, 8), (1, 3, 3)), {"choice": (384, 0, 2)}),
    "a cluster, one box": ((64, 256, (2, 8, 8), (1, 3, 3)), {"choice": (192, 3, 2)}),
    "a cluster, boxes of one tap": ((128, 256, (3, 8, 8), (2, 1, 1)), {"choice": (128, 2, 2)}),
    "shares": ((64, 64, (3, 8, 16), (2, 3, 3)), {"choice": (384, 5, 1)}),
    "more shares than slices": ((64, 64, (1, 8, 8), (1, 3, 3)), {"choice": (192, 3, 1)}),
    "whole tiles, then shares": ((64, 64, (3, 8, 16), (3, 3, 3)), {"multiprocessors": 4}),
    "1x1x1": ((264, 64, (1, 8, 8), (1, 1, 1)), {}),
    "3x1x1": ((64, 64, (4, 8, 8), (3, 1, 1)), {"choice": (256, 0, 0)}),
    "kernel 2x2": ((64, 64, (1, 8, 8), (1, 2, 2)), {}),
    "kernel 1x5": ((64, 64, (1, 8, 8), (1, 1, 5)), {}),
    "stride 2": ((64, 64, (3, 17, 17), (3, 3, 3)), {"stride": (2, 2, 2), "space": ((0, 1), (0, 1))}),
    "stride 2, boxes of one tap": (
        (64, 64, (1, 16, 16), (1, 2, 2)),
        {"stride": (1, 2, 2), "space": ((0, 0), (0, 0))},
    ),
    "stride 2 in rows, 3 in columns": ((64, 64, (1, 16, 24), (1, 3, 3)), {"stride": (1, 2, 3)}),
    "dilation": ((64, 64, (3, 10, 10), (2, 3, 3)), {"dilation": (2, 2, 2)}),
    "padded on one side": ((64, 64, (1, 8, 8), (1, 3, 3)), {"space": ((2, 0), (0, 3))}),
    "time replicate": ((64, 64, (3, 8, 8), (3, 3, 3)), {"time_mode": "replicate"}),
    "time reflect": ((64, 64, (3, 8, 8), (3, 1, 1)), {"time_mode": "reflect"}),
    "time both sides": ((64, 64, (3, 8, 8), (3, 1, 1)), {"time_pad": (1, 1)}),
    "no frame for a tap": ((64, 64, (1, 8, 8), (3, 3, 3)), {}),
    "stride in time": ((64, 64, (5, 8, 8), (3, 1, 1)), {"stride": (2, 1, 1), "time_mode": "replicate"}),
    "cache": ((64, 64, (2, 8, 8), (3, 3, 3)), {"cached": 2}),
    "part of the cache": ((64, 64, (2, 8, 8), (2, 1, 1)), {"cached": 3}),
    "cache and zeros": ((64, 64, (1, 8, 8), (3, 1, 1)), {"cached": 1}),
    "cache and replicate": ((64, 64, (2, 8, 8), (4, 1, 1)), {"cached": 2, "time_mode": "replicate"}),
    "smaller shared memory": ((64, 64, (1, 8, 24), (1, 3, 3)), {"shared_limit": 100 << 10}),
}


@pytest.mark.parametrize("case", CASES)
def test_cases(case):
    args, options = CASES[case]
    check(*args, **options, seed=len(case) % 3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("case", CASES)
def test_cases_in_every_order(case, seed):
    args, options = CASES[case]
    check(*args, **options, seed=seed, dtype=F16)


def weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """Of a 1x3x3 kernel between 64 channels."""
    return torch.ops.aten.convolution_backward(
        grad,
        x,
        x.new_empty(64, 64, 1, 3, 3),
        None,
        [1] * 3,
        [0, 1, 1],
        [1] * 3,
        False,
        [0] * 3,
        1,
        [False, True, False],
    )[1]


def test_any_values_are_close_to_float64():
    """Sums in float32 of n products, rounded once: an error of a few float32 units of the sum of sizes, and
    half a unit of bf16."""
    generator = torch.Generator().manual_seed(5)
    x, grad = (
        torch.randn(1, 64, 2, 8, 16, generator=generator).bfloat16().contiguous(memory_format=LAST)
        for _ in range(2)
    )
    weight, bias = (
        torch.full((64, 64, 1, 3, 3), math.nan, dtype=BF16),
        torch.full((64,), math.nan, dtype=BF16),
    )
    sm90_wgrad.wgrad(ConvBackwardCall(grad, x, weight, None, PLAIN, WEIGHTS), weight, bias, lib=Emulated())
    want, sizes = (
        weight_gradient(x.double(), grad.double()),
        weight_gradient(x.double().abs(), grad.double().abs()),
    )
    positions = 2 * 8 * 16
    in_float32 = positions * 2.0**-24 * sizes
    assert ((weight.double() - want).abs() <= in_float32 + 2.0**-8 * (want.abs() + in_float32)).all()
    want, in_float32 = (
        grad.double().sum((0, 2, 3, 4)),
        positions * 2.0**-24 * grad.double().abs().sum((0, 2, 3, 4)),
    )
    assert ((bias.double() - want).abs() <= in_float32 + 2.0**-8 * (want.abs() + in_float32)).all()


@pytest.mark.parametrize("weights_like", ("contiguous", "channels_last", "no bias"))
def test_weights_of_any_strides(weights_like):
    x, grad = integers(1, 64, 1, 8, 8, seed=1, dtype=BF16), integers(1, 64, 1, 8, 8, seed=3, dtype=BF16)
    weight = torch.full((64, 64, 1, 3, 3), math.nan, dtype=BF16)
    weight = weight.contiguous(memory_format=LAST) if weights_like == "channels_last" else weight
    bias = None if weights_like == "no bias" else torch.full((64,), math.nan, dtype=BF16)
    sm90_wgrad.wgrad(ConvBackwardCall(grad, x, weight, None, PLAIN, WEIGHTS), weight, bias, lib=Emulated())
    assert torch.equal(weight, weight_gradient(x.double(), grad.double()).to(BF16))


def with_infinity(size: tuple[int, int], at: tuple[int, int]) -> tuple[Tensor, Tensor]:
    x = integers(1, 64, 1, *size, seed=1, dtype=BF16)
    x[0, 5, 0, at[0], at[1]] = math.inf
    grad = integers(1, 64, 1, *size, seed=3, dtype=BF16).abs() + 1
    return x, grad.contiguous(memory_format=LAST)


@pytest.mark.parametrize("size, at", [((9, 9), (8, 8)), ((8, 9), (3, 8)), ((9, 8), (8, 2)), ((9, 9), (4, 4))])
def test_an_infinity_beside_the_edge_stays_one(size, at):
    """Slices of 8 x 8 positions hang over the edge, where the gradient is zero: times an Inf in x that would
    be NaN."""
    x, grad = with_infinity(size, at)
    weight = torch.full((64, 64, 1, 3, 3), math.nan, dtype=BF16)
    call = ConvBackwardCall(grad, x, weight, None, PLAIN, (False, True, False, False))
    sm90_wgrad.wgrad(call, weight, None, lib=Emulated())
    want = weight_gradient(x.double(), grad.double())
    assert want.isinf().any()
    torch.testing.assert_close(weight.double(), want, rtol=2.0**-8, atol=0, equal_nan=True)


REFUSED = {
    "compute capability is not 9.0": {"capability": 80},
    "bfloat16 and float16 only": {"dtype": torch.float32},
    "channels_last_3d of 8, 16": {"channels": 12},
    "no tile suits": {"shared_limit": 32 << 10},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_says_why_not(reason):
    options = dict(REFUSED[reason])
    channels = options.pop("channels", 64)
    with pytest.raises(NotImplementedError, match=f"sm90: .*{reason}|{reason}"):
        both(channels, 64, (1, 8, 8), (1, 3, 3), **options)


@pytest.mark.parametrize(
    "channels, size, kernel, of_peak",
    (
        (128, (20, 64, 64), (3, 3, 3), 0.6),
        (256, (20, 64, 64), (3, 3, 3), 0.8),
        (512, (4, 32, 32), (3, 3, 3), 0.6),
        (512, (4, 64, 64), (1, 3, 3), 0.6),
        (256, (4, 64, 64), (1, 1, 1), 0.1),
    ),
)
def test_the_plan_is_the_best_by_its_own_model(channels, size, kernel, of_peak):
    """Of an H200: no choice to insist on is predicted to be faster, nor anything faster than the matrix
    units under its power limit, 0.83 of their peak; `of_peak` is of that."""
    x = torch.empty(1, channels, *size, dtype=BF16).contiguous(memory_format=LAST)
    weight = torch.empty(channels, channels, *kernel, dtype=BF16)
    pad = [kernel[0] - 1, 0, kernel[1] // 2, kernel[1] // 2, kernel[2] // 2, kernel[2] // 2]
    lib = Emulated(multiprocessors=132)
    call = ConvBackwardCall(x, x, weight, None, Geometry(pad=tuple(pad)), WEIGHTS)
    plan = sm90_wgrad.plan(call, lib=lib)
    blocks = (plan.whole_tiles + plan.split_tiles * plan.splits) * plan.cluster
    assert plan.scratch_bytes == blocks * 128 * plan.columns * 4 and plan.stages >= 4
    at_peak = 2 * math.prod(size) * weight.numel() / 4096 / 132 / 0.83
    assert at_peak <= plan.cycles <= at_peak / of_peak
    for columns in (384, 192) if kernel[1] == 3 else (256, 128):
        for splits in (1, 4, 16):
            for cluster in (1, 2) if channels > 128 else (1,):
                other = sm90_wgrad.plan(call, lib=lib, choice=(columns, splits, cluster))
                assert other.cycles >= plan.cycles


@pytest.mark.parametrize("wants_x", (True, False))
def test_backward_leaves_the_weights_to_it(monkeypatch, wants_x):
    monkeypatch.setattr(sm90_wgrad, "why_not", lambda *args: None)
    others = []
    lib = Emulated()
    lib.causal_conv3d_sm80_backward = lambda *args: others.append(args)
    x, grad = integers(1, 64, 1, 8, 8, seed=1, dtype=BF16), integers(1, 64, 1, 8, 8, seed=3, dtype=BF16)
    weight = torch.zeros(64, 64, 1, 3, 3, dtype=BF16)
    grads = gradient.run_cuda(
        ConvBackwardCall(grad, x, weight, None, PLAIN, (wants_x, True, True, False)), hopper=True, lib=lib
    )
    assert torch.equal(grads[1], weight_gradient(x.double(), grad.double()).to(BF16))
    assert torch.equal(grads[2], grad.double().sum((0, 2, 3, 4)).to(BF16))
    of_x, of_weight = slice(6, 7), slice(8, 10)  # among the launcher's arguments
    assert len(others) == wants_x
    assert all(None not in args[of_x] and args[of_weight] == (None, None) for args in others)


def test_why_not_on_this_machine():
    x, weight = torch.zeros(1, 64, 1, 8, 8), torch.zeros(64, 64, 1, 3, 3)
    assert (
        sm90_wgrad.why_not(ConvBackwardCall(x, x, weight, None, PLAIN, WEIGHTS)) == "the tensors are on cpu"
    )
