"""The CUDA kernels of causal_conv3d, run on a CPU by the emulator with every access checked, against
float64."""

import itertools
import mmap
import random

import pytest
import torch
from support.conv_cases import (
    KERNELS,
    checked_call,
    close,
    drawn,
    expected_gradients,
    in_double,
    laid_out,
    make_call,
    random_call,
)
from support.conv_sm80_emulated import Emulated

from vtok_fast import parity
from vtok_fast.ops.causal_conv3d import gradient, op, sm80
from vtok_fast.ops.causal_conv3d.call import ConvBackwardCall

pytestmark = pytest.mark.needs_emulator
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SEEDS = [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
A100, SMALL = {"shared_limit": 163 << 10}, {"shared_limit": 99 << 10}
LAST = torch.channels_last_3d
ONE = ((1, 1), (1, 1))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """What torch.empty returns, outputs and scratch memory alike, is full of NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[False, True], ids=["float32", "tf32"])
def tf32(request):
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = request.param
    yield request.param
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def exact_float32():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def forward(call, seed=0, choice=(0, 0, 0), device=A100):
    out = call.empty_output()
    return sm80.forward(call, out, lib=Emulated(seed, **device), choice=choice)


def scratch(call, **device):
    """Bytes of scratch memory that a call asks for."""
    need = torch.zeros(1, dtype=torch.int64)
    args = (
        call.x,
        call.weight,
        call.cache,
        call.geometry.native(),
        False,
        call.bias,
        None,
        call.empty_output((1, 1, 1)),
    )
    Emulated(**A100, **device).causal_conv3d_sm80(
        *args, None, False, (1, 1, 1), (0, 0, 0), None, need, (0, 0)
    )
    return int(need[0])


def rounded_to_tf32(t):
    bits = t.view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


# ---- forward -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("tile", [(256, 128), (256, 96), (128, 128), (128, 64), (128, 32)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_tile(dtype, tile, splits, seed):
    """A tile and a bit in both directions; frames that a tile straddles; three slices of channels; a residual
    and a SiLU."""
    rows = tile[0] // 25 + 1
    x, weight, bias = drawn(96, tile[1] + 8, (2, 1, 3), (2, rows, 13), dtype)
    residual = drawn(tile[1] + 8, 1, (1, 1, 1), (2, rows, 13), dtype, seed=1)[0]
    call = checked_call(x, weight, bias, residual=residual, activation="silu", time_mode="replicate")
    close(forward(call, seed, (*tile, splits)), call)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("channels", [32, 4, 3])
def test_float32(channels, splits, seed, tf32):
    x, weight, bias = drawn(channels, 72, (3, 3, 3), (2, 6, 12), F32)
    call = checked_call(
        x, weight, bias, alpha=0.25, residual=drawn(72, 1, (1, 1, 1), (2, 6, 12), F32, seed=1)[0]
    )
    rounded = call._replace(x=rounded_to_tf32(x), weight=rounded_to_tf32(weight))
    close(
        forward(call, seed, (0, 0, splits)),
        call,
        op.run_reference(in_double(rounded)).float() if tf32 else None,
    )


@pytest.mark.parametrize("outputs", [3, 16, 12])
@pytest.mark.parametrize("channels", [1, 3, 4, 6, 12, 15, 16, 24, 40, 48, 160])
def test_odd_channel_counts(channels, outputs):
    x, weight, bias = drawn(channels, outputs, (3, 3, 3), (2, 5, 4), BF16)
    call = checked_call(x, weight, bias)
    close(forward(call), call)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", KERNELS)
def test_geometry(name, seed):
    call = make_call(*KERNELS[name], BF16)
    close(forward(call, seed), call)


@pytest.mark.parametrize(
    "outputs, alpha, activation", [(64, None, None), (64, 0.3, "silu"), (12, 0.3, "silu"), (12, None, None)]
)
def test_residual_behind_depth_to_space(outputs, alpha, activation):
    """Eight channels at a time where a pixel holds that many, else one by one."""
    x, weight, bias = drawn(16, outputs, (1, 3, 3), (2, 6, 5), BF16)
    residual = drawn(outputs // 4, 1, (1, 1, 1), (2, 12, 10), BF16, seed=1)[0]
    call = checked_call(
        x, weight, bias, depth_to_space=(1, 2, 2), residual=residual, alpha=alpha, activation=activation
    )
    for splits in (1, 2):
        close(forward(call, choice=(0, 0, splits)), call)


@pytest.mark.parametrize("once", [False, True])
def test_residual_before_upsampling(once):
    x, weight, bias = drawn(16, 24, (3, 3, 3), (3, 4, 5), BF16)
    residual = drawn(24, 1, (1, 1, 1), (3, 4, 5), BF16, seed=1)[0]
    call = checked_call(
        x, weight, bias, upsample=(2, 2, 2), upsample_first_frame_once=once, residual=residual, alpha=0.6
    )
    close(forward(call), call)


def random_calls(seed, count):
    r = random.Random(seed)
    torch.manual_seed(seed)
    while count:
        if (found := random_call(r)) is not None and found[0]["x"].numel() * found[0]["weight"][
            0
        ].numel() < 2**21:
            count -= 1
            yield r, found[0]


def as_call(found, dtype):
    cast = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in found.items()}
    return checked_call(cast.pop("x"), cast.pop("weight"), cast.pop("bias"), **cast)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_random_geometry_and_layout(dtype, seed, exact_float32):
    for r, found in random_calls(seed, 12):
        call = as_call(found, dtype)
        moved = {
            k: laid_out(r, v)
            for k, v in call._asdict().items()
            if isinstance(v, torch.Tensor) and k != "bias"
        }
        close(
            forward(call._replace(**moved), seed, (0, 0, r.choice([0, 0, 1, 2])), r.choice([A100, SMALL])),
            call,
        )


def test_time_taps_before_the_first_frame_are_not_computed():
    x, weight, bias = drawn(32, 32, (3, 3, 3), (1, 9, 9), BF16)
    weight[:, :, :2] = torch.inf  # times zero they would be NaN
    y = forward(checked_call(x, weight, bias))
    torch.testing.assert_close(
        y, forward(checked_call(x, weight[:, :, 2:].contiguous(), bias)), rtol=0, atol=0
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tiles_that_read_nothing(seed):
    """Padded frames of a kernel that is short in time: their products are an empty sum, and what remains is
    the bias."""
    x, weight, bias = drawn(32, 32, (1, 1, 1), (1, 16, 16), BF16)
    call = checked_call(x, weight, bias, time_pad=(3, 0))
    y = forward(call, seed)
    close(y, call)
    assert torch.equal(y[:, :, :3], bias.view(1, -1, 1, 1, 1).expand_as(y[:, :, :3]))


@pytest.mark.parametrize("time_pad", [(2, 0), (1, 1), (0, 3)])
def test_a_replicated_image(time_pad):
    """One frame: the temporal taps are one tap."""
    x, weight, bias = drawn(32, 32, (3, 3, 3), (1, 9, 9), BF16)
    call = checked_call(x, weight, bias, time_mode="replicate", time_pad=time_pad)
    close(forward(call), call)
    assert scratch(call) == 32 * 9 * 32 * 2 + 256


def test_upsampling_merges_taps():
    """Two taps of three per axis and phase: the weights of a phase are 8 of 27."""
    x, weight, _ = drawn(64, 64, (3, 3, 3), (4, 16, 16), BF16)
    assert scratch(checked_call(x, weight, upsample=(2, 2, 2))) == 64 * 8 * 64 * 2 + 256
    assert (
        scratch(checked_call(x, weight, upsample=(2, 2, 2), spatial_mode="reflect"))
        == 64 * 2 * 9 * 64 * 2 + 256
    )


@pytest.mark.parametrize("channels", [8, 3])
def test_offsets_beyond_two_to_the_31(channels):
    """Frames and batch entries that lie gigabytes apart; the memory between is never touched."""
    frame = 2**31 + 64
    memory = torch.frombuffer(mmap.mmap(-1, 2 * 4 * (frame + 4096)), dtype=BF16)
    x = memory.as_strided((2, channels, 2, 3, 4), (2 * frame, 1, frame, 4 * channels, channels))
    small, weight, bias = drawn(channels, 8, (3, 3, 3), (2, 3, 4), BF16, batch=2)
    x.copy_(small)
    call = checked_call(x, weight, bias)
    close(forward(call), call._replace(x=small))


def test_more_tiles_than_multiprocessors_split_nothing():
    """The plan: K is split where the grid would leave multiprocessors idle, and only there."""
    relaid = 64 * 27 * 64 * 2 + 64 * 4  # weights and bias
    calls = [checked_call(*drawn(64, 64, (3, 3, 3), size, BF16)) for size in ((8, 64, 64), (1, 8, 8))]
    assert scratch(calls[0], multiprocessors=8) == relaid
    assert scratch(calls[1], multiprocessors=8) > relaid


def test_reasons():
    call = checked_call(*drawn(4, 4, (1, 1, 1), (1, 2, 2), BF16))
    assert "on cpu" in sm80.why_not(call)
    assert sm80.why_not_shape(call) is None
    assert "float64" in sm80.why_not_shape(in_double(call))
    assert "too large" in sm80.why_not_shape(call._replace(weight=torch.empty(4, 4, 40, 1, 1)))
    assert "too large" in sm80.why_not_shape(call._replace(weight=torch.empty(4, 4, 1, 9, 9)))
    grouped = call._replace(geometry=call.geometry._replace(groups=2), depth_to_space=(1, 2, 2))
    assert "depth_to_space" in sm80.why_not_shape(grouped)
    assert "empty" in sm80.why_not_shape(call._replace(x=call.x[:0]))


# ---- backward ----------------------------------------------------------------------------------------------


def gradients(call, grad, seed=0, choice=(0, 0, 0), wanted=(True, True, True, True), device=A100):
    wanted = tuple(
        w and t is not None for w, t in zip(wanted, (call.x, call.weight, call.weight, call.cache))
    )
    backward = ConvBackwardCall(grad, call.x, call.weight, call.cache, call.geometry, wanted)
    return gradient.run_cuda(backward, hopper=False, lib=Emulated(seed, **device), choice=choice)


def close_gradients(call, seed=0, choice=(0, 0, 0), device=A100, tf32=False):
    call = call._replace(bias=torch.zeros(call.weight.shape[0], dtype=call.x.dtype))
    g = torch.Generator().manual_seed(9)
    grad = (
        torch.randn(call.empty_output((1, 1, 1)).shape, generator=g)
        .to(call.x.dtype)
        .contiguous(memory_format=LAST)
    )
    found = gradients(call, grad, seed, choice, device=device)
    want = expected_gradients(in_double(call), grad.double())
    same = expected_gradients(call, grad)
    if tf32:
        rounded = call._replace(x=rounded_to_tf32(call.x), weight=rounded_to_tf32(call.weight))
        same = [
            t if t is None else t.float()
            for t in expected_gradients(in_double(rounded), rounded_to_tf32(grad).double())
        ]
    for name, f, w, s in zip(("x", "weight", "bias", "cache"), found, want, same):
        assert (f is None) == (w is None), name
        if f is not None:
            result = parity.close(f, w, s)
            assert result.ok, (name, result)
    return found


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", [name for name in KERNELS if not name.startswith("depth to space")])
def test_gradients(name, seed):
    close_gradients(make_call(*KERNELS[name], BF16, outputs=32, size=(4, 6, 5)), seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("channels, outputs", [(8, 136), (136, 8), (3, 16), (16, 3), (12, 15)])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_gradients_of_channel_counts(dtype, channels, outputs, seed):
    x, weight, bias = drawn(channels, outputs, (1, 3, 3), (2, 7, 12), dtype)
    for splits in (1, 3):
        close_gradients(checked_call(x, weight, bias), seed, (0, 0, splits))


@pytest.mark.parametrize("channels, outputs", [(8, 12), (3, 5)])
def test_gradients_in_float32(channels, outputs, tf32):
    x, weight, bias = drawn(channels, outputs, (3, 1, 3), (2, 7, 12), F32)
    close_gradients(checked_call(x, weight, bias, spatial_mode="reflect"), tf32=tf32)


@pytest.mark.parametrize("seed", SEEDS)
def test_gradients_of_random_geometry(seed, exact_float32):
    for (r, found), dtype in zip(random_calls(seed + 10, 10), itertools.cycle([BF16, F32])):
        close_gradients(as_call(found, dtype), seed, (0, 0, r.choice([0, 1, 2])), r.choice([A100, SMALL]))


def test_gradients_over_many_batches_of_positions():
    """More positions than wgrad's table holds, several times; rows of a batch are rebuilt while loads are
    under way."""
    x, weight, bias = drawn(16, 16, (3, 3, 3), (3, 20, 17), BF16)
    for seed in (0, 1, 2):
        close_gradients(checked_call(x, weight, bias, time_mode="replicate"), seed, (0, 0, 1))


def test_results_do_not_depend_on_the_order_of_blocks():
    """Sums are made in one order whatever the scheduling: bit for bit the same."""
    call = make_call((3, 3, 3), {"cache": 1, "spatial_mode": "replicate"}, BF16, outputs=32)
    grad = drawn(32, 1, (1, 1, 1), (4, 8, 7), BF16, batch=2, seed=5)[0]
    runs = [[forward(call, seed, (0, 0, 3)), *gradients(call, grad, seed, (0, 0, 3))] for seed in (0, 1, 2)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other))


def test_replicated_frames_cost_the_input_gradient_no_scratch_memory():
    """Their terms are added in the products themselves; replicated rows need a padded copy of the
    gradient."""

    def scratch_of_input_gradient(**options):
        call = checked_call(*drawn(16, 16, (3, 3, 3), (8, 16, 16), BF16), **options)
        need = torch.zeros(1, dtype=torch.int64)
        grad = call.empty_output((1, 1, 1))
        args = (
            call.x,
            call.weight,
            None,
            call.geometry.native(),
            False,
            grad,
            torch.empty_like(call.x),
            None,
            None,
            None,
        )
        Emulated(**A100).causal_conv3d_sm80_backward(*args, (0, 0, 1), None, need, (0, 0))
        return int(need[0])

    plain = scratch_of_input_gradient()
    assert scratch_of_input_gradient(time_mode="replicate") == plain
    assert scratch_of_input_gradient(spatial_mode="replicate") == plain + 8 * 18 * 18 * 16 * 2


def test_only_the_gradients_asked_for():
    call = make_call((2, 1, 2), {"cache": 2}, BF16, 8, 8, (2, 3, 4))
    grad = drawn(8, 1, (1, 1, 1), (2, 3, 4), BF16, batch=2, seed=5)[0]
    full = gradients(call, grad)
    for mask in itertools.product((False, True), repeat=4):
        if any(mask):
            for wanted, found, one_of_all in zip(mask, gradients(call, grad, wanted=mask), full):
                assert torch.equal(found, one_of_all) if wanted else found is None
