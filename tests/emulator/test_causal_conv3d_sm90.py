"""The Hopper convolution, run on a CPU by the emulator with every access checked, against float64."""

from __future__ import annotations

import json
import math
import mmap
from pathlib import Path

import pytest
import torch
from support.conv_cases import (
    KERNELS,
    checked_call,
    close,
    drawn,
    expected_gradients,
    in_double,
    make_call,
)
from support.conv_sm90_emulated import Emulated, compiled

from vtok_fast import parity
from vtok_fast.dispatch import native
from vtok_fast.ops.causal_conv3d import launch, sm90
from vtok_fast.ops.causal_conv3d.call import ConvBackwardCall

pytestmark = pytest.mark.needs_emulator
BF16, F16 = torch.bfloat16, torch.float16
LAST = torch.channels_last_3d
SEEDS = [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
TILES = [(256, 160), (256, 128), (256, 96), (128, 144), (128, 128), (128, 112), (128, 96), (128, 64)]
PREDICTIONS = Path(__file__).resolve().parents[2] / "benchmarks" / "predictions" / "causal_conv3d_sm90.json"
CHIP = {"multiprocessors": 132}  # of an H200, where the plan matters


def forward(call, seed=0, choice=sm90.ANY, **device):
    out = call.empty_output()
    return sm90.forward(call, out, lib=Emulated(seed, **device), choice=choice)


def plan(call, choice=sm90.ANY, **device):
    out = call.empty_output(device="meta")
    return sm90.plan(call, out, lib=Emulated(**{**CHIP, **device}), choice=choice)


def untouched(*shape):
    """A channels-last tensor in memory that is reserved and never touched."""
    strides = torch.empty(shape, device="meta").contiguous(memory_format=LAST).stride()
    memory = torch.frombuffer(mmap.mmap(-1, 2 * math.prod(shape)), dtype=BF16)
    return memory.as_strided(shape, strides)


def layer(kernel, channels, outputs, size, **options):
    """A call of this shape, to be planned and not to be run."""
    return checked_call(
        untouched(1, channels, *size), torch.empty(outputs, channels, *kernel, dtype=BF16), **options
    )


# ---- every tile --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cluster, seed",
    [("either", 0), *(pytest.param(c, s, marks=pytest.mark.slow) for c in (1, 2) for s in (0, 1, 2))],
)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_tile(tile, cluster, seed):
    """More than one tile in every direction, the last of each partial; five slices of 16 channels; a residual
    and a SiLU."""
    if cluster == "either":
        cluster = 1 + TILES.index(tile) % 2
    dtype = BF16 if (TILES.index(tile) // 2 + cluster + seed) % 2 else F16
    x, weight, bias = drawn(80, tile[1] + 8, (2, 1, 3), (2, tile[0] // 14, 19), dtype)
    residual = drawn(tile[1] + 8, 1, (1, 1, 1), (2, tile[0] // 14, 19), dtype, seed=1)[0]
    call = checked_call(x, weight, bias, residual=residual, activation="silu", time_mode="replicate")
    close(forward(call, seed, (*tile, 1, cluster, 0)), call)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"activation": "silu"}, {"alpha": 0.25}, {"alpha": 0.25, "activation": "silu"}], ids=str
)
def test_epilogues(options, dtype):
    x, weight, bias = drawn(32, 72, (1, 3, 3), (2, 7, 9), dtype)
    residual = drawn(72, 1, (1, 1, 1), (2, 7, 9), dtype, seed=1)[0] if "alpha" in options else None
    call = checked_call(x, weight, bias, residual=residual, **options)
    close(forward(call), call)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("splits, cluster", [(2, 1), (5, 2)])
def test_splits(splits, cluster, seed):
    """Six steps of K where all three time taps exist, two at the first frame; the sum finishes with bias,
    SiLU and residual."""
    x, weight, bias = drawn(104, 136, (3, 1, 3), (3, 7, 9), BF16)
    residual = drawn(136, 1, (1, 1, 1), (3, 7, 9), BF16, seed=1)[0]
    call = checked_call(x, weight, bias, residual=residual, activation="silu")
    close(forward(call, seed, (128, 128, splits, cluster, 0)), call)


@pytest.mark.parametrize("stages", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", SEEDS)
def test_stages(stages, seed):
    """Rings that wrap often and at other places than the taps."""
    x, weight, bias = drawn(72, 64, (3, 3, 3), (3, 6, 9), BF16)
    call = checked_call(x, weight, bias)
    close(forward(call, seed, (128, 64, 1, 2, stages)), call)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_block_does_everything(seed):
    """Every ring goes on from one tile to the next, and the store of a tile overlaps the products of the
    next."""
    x, weight, bias = drawn(64, 136, (3, 1, 3), (3, 11, 13), BF16)
    residual = drawn(136, 1, (1, 1, 1), (3, 11, 13), BF16, seed=1)[0]
    call = checked_call(x, weight, bias, residual=residual)
    close(forward(call, seed, (128, 64, 1, 1, 0), multiprocessors=1), call)


# ---- every geometry ----------------------------------------------------------------------------------------

REFUSED = {
    "replicate everywhere": "rows and columns padded",
    "reflect everywhere": "rows and columns padded",
    "upsampled and reflected": "upsampling that cannot be split",
    "upsampled, stride 2": "upsampling that cannot be split",
    "upsampled by 3, other pads": "rows and columns padded",
    "first frame once, zeros": "upsampling that cannot be split",
    "depth to space": "depth_to_space",
    "depth to space in time": "depth_to_space",
    "two groups": "groups must be 1",
    "groups of 4": "groups must be 1",
    "depthwise": "groups must be 1",
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", KERNELS)
def test_geometry(name, seed):
    call = make_call(*KERNELS[name], BF16, channels=16 if name == "large" else 32)
    if name in REFUSED:
        with pytest.raises(NotImplementedError, match=f"sm90: .*{REFUSED[name]}"):
            forward(call, seed)
    else:
        close(forward(call, seed), call)


@pytest.mark.parametrize("mode", ["zeros", "replicate", "reflect", "cache", "short cache"])
@pytest.mark.parametrize("frames", ["together", "one by one"])
def test_time_modes(frames, mode):
    """Frames of a tile together, in one patch, or a patch per frame and time tap (the splits see to that)."""
    x, weight, bias = drawn(128, 64, (3, 1, 1), (7, 3, 5), BF16, batch=2)
    cached = 1 if "short" in mode else 4
    cache = drawn(128, 1, (1, 1, 1), (cached, 3, 5), BF16, 2, 1)[0]
    options = {"cache": cache} if "cache" in mode else {"time_mode": mode}
    call = checked_call(x, weight, bias, time_pad=(2, 2) if mode != "cache" else (2, 0), **options)
    choice = (128, 64, 1 if frames == "together" else 3, 0, 0)
    assert (plan(call, choice, multiprocessors=1).frames > 1) == (frames == "together")
    close(forward(call, 0, choice, multiprocessors=1), call)


@pytest.mark.parametrize("channels", [8, 16, 24, 40, 48, 56, 72, 96, 112, 136])
def test_channel_counts(channels):
    x, weight, bias = drawn(channels, channels, (1, 3, 3), (1, 6, 9), BF16)
    call = checked_call(x, weight, bias)
    close(forward(call), call)


@pytest.mark.parametrize("channels, outputs", [(12, 16), (3, 16), (16, 12)])
def test_channels_that_tma_cannot_address(channels, outputs):
    with pytest.raises(NotImplementedError, match="sm90: .*multiple of 8"):
        plan(checked_call(*drawn(channels, outputs, (1, 3, 3), (1, 6, 9), BF16)))


def test_layouts():
    """Padded strides, a batch apart, a crop of a larger video; and an input expanded over the batch, which is
    refused."""
    whole = drawn(48, 32, (3, 3, 3), (4, 9, 11), BF16, batch=3)[0]
    _, weight, bias = drawn(32, 32, (3, 3, 3), (1, 1, 1), BF16)
    call = checked_call(whole[::2, 8:40, 1:, 1:-1, 2:], weight, bias)
    close(forward(call), call)
    with pytest.raises(NotImplementedError, match="expanded"):
        plan(checked_call(whole[:1, 8:40].expand(2, -1, -1, -1, -1), weight, bias))


def test_weights_are_read_in_place():
    """Channels-last weights, and those of one tap, need no copy in another order; others one per call."""
    x, weight, bias = drawn(64, 64, (3, 3, 3), (2, 6, 9), BF16)
    other = checked_call(x, weight, bias)
    last = other._replace(weight=weight.contiguous(memory_format=LAST))
    point = checked_call(x, weight[:, :, :1, :1, :1].contiguous(), bias)
    whole = (0, 0, 1, 0, 0)
    assert plan(other, whole).scratch_bytes == 64 * 27 * 64 * 2
    assert plan(last, whole).scratch_bytes == plan(point, whole).scratch_bytes == 0
    assert torch.equal(forward(other), forward(last))
    close(forward(point), point)


def test_time_taps_before_the_first_frame_are_not_computed():
    x, weight, bias = drawn(64, 64, (3, 3, 3), (1, 9, 9), BF16)
    weight[:, :, :2] = torch.inf  # times zero they would be NaN
    assert torch.equal(
        forward(checked_call(x, weight, bias)), forward(checked_call(x, weight[:, :, 2:].contiguous(), bias))
    )


def test_results_do_not_depend_on_the_order_of_blocks():
    call = make_call((3, 1, 3), {"cache": 1}, BF16, channels=128, size=(2, 4, 7))
    runs = [forward(call, seed, (128, 64, 3, 2, 0)) for seed in (0, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


# ---- the input's gradient ----------------------------------------------------------------------------------

REFUSED_DGRAD = {
    "stride 2": "strided",
    "upsampled, stride 2": "strided",
    "two groups": "groups must be 1",
    "groups of 4": "groups must be 1",
    "depthwise": "groups must be 1",
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", [name for name in KERNELS if not name.startswith("depth to space")])
def test_input_gradient(name, seed):
    outputs = 16 if name == "large" else 32 if "groups" in KERNELS[name][1] else 40
    call = make_call(*KERNELS[name], BF16, outputs=outputs, size=(4, 6, 5) if name != "large" else (4, 5, 4))
    g = torch.Generator().manual_seed(9)
    grad = (
        torch.randn(call.empty_output((1, 1, 1)).shape, generator=g).to(BF16).contiguous(memory_format=LAST)
    )
    x, cache = launch.inputs(call.x, call.cache, call.geometry.groups)
    found = (
        torch.empty_like(x, memory_format=LAST),
        None if cache is None else torch.empty_like(cache, memory_format=LAST),
    )
    backward = ConvBackwardCall(
        grad, x, call.weight, cache, call.geometry, (True, False, False, cache is not None)
    )
    if name in REFUSED_DGRAD:
        with pytest.raises(NotImplementedError, match=f"sm90: .*{REFUSED_DGRAD[name]}"):
            sm90.dgrad(backward, *found, lib=Emulated(seed))
        return
    sm90.dgrad(backward, *found, lib=Emulated(seed))
    call = call._replace(bias=torch.zeros(call.weight.shape[0], dtype=BF16))
    want, same = expected_gradients(in_double(call), grad.double()), expected_gradients(call, grad)
    for f, w, s in zip(found, (want[0], want[3]), (same[0], same[3])):
        if f is not None:
            result = parity.close(f, w, s)
            assert result.ok, result


# ---- what shared memory has to do ----------------------------------------------------------------------


def bank_cycles(p, tile_m, kernel, stride):
    """Cycles of ldmatrix for a matrix of eight rows, of the tile that the plan has: rows of 128 bytes lie in
    one of eight groups of banks, and different rows of one group are read one after another."""
    width = (p.columns - 1) * stride[2] + kernel[2]
    frame = -(-((p.rows - 1) * stride[1] + kernel[1]) * width // 8) * 8
    rows = [
        t * stride[0] * frame + h * stride[1] * width + w * stride[2]
        for t in range(p.frames)
        for h in range(p.rows)
        for w in range(p.columns)
    ]
    rows += [0] * (tile_m - len(rows))
    groups = [set(rows[i : i + 8]) for i in range(0, tile_m, 8)]
    return sum(max(sum(r % 8 == bank for r in g) for bank in range(8)) for g in groups) / len(groups)


@pytest.mark.parametrize(
    "size, stride, cycles",
    [
        ((1, 16, 16), (1, 1, 1), 1.0),  # eight rows of a matrix in a row of the patch
        ((1, 9, 13), (1, 1, 1), None),
        ((1, 6, 22), (1, 1, 1), None),
        ((1, 16, 32), (1, 2, 2), 2.0),  # every second row is in half of the banks
        ((1, 17, 29), (1, 2, 2), None),
    ],
)
def test_bank_conflicts(size, stride, cycles):
    """As the emulator counts them, they are those for which the plan accounts."""
    x, weight, bias = drawn(64, 64, (1, 3, 3), size, BF16)
    call = checked_call(x, weight, bias, stride=stride, spatial_pad=((1, 1), (1, 1)))
    choice, device = (128, 64, 1, 1, 0), {"multiprocessors": 1}
    p = plan(call, choice, **device)
    close(forward(call, 0, choice, **device), call)
    library = compiled()
    found = 1 + library.bank_conflicts / library.matrices_read
    assert found == pytest.approx(bank_cycles(p, 128, (1, 3, 3), stride))
    assert cycles is None or found == cycles
    # The model's: products read 64 weights for each of 16 channels, TMA writes both operands.
    tensor, read = p.tensor_cycles, (p.tensor_cycles / 32) * (2048 * found + 64 * 32)
    patch = ((p.rows - 1) * stride[1] + 3) * ((p.columns - 1) * stride[2] + 3) * 128
    assert p.shared_cycles == int((read + 9 * 64 * 128 + patch) / 128) and tensor == 9 * 4 * 2 * 32


# ---- the plan ----------------------------------------------------------------------------------------------


def tabulated_time(m, n, shared, l2):
    """Of a product, in cycles of the tensor cores, by the table of sm90_kernel.cuh: shares of shared memory
    and of the 24 bytes a cycle of L2; three resources that overlap; a start and the output for two slabs of
    64 channels, three time taps and nine in the plane."""
    tensor = 2 * 3 * 9 * 4 * (m // 64) * n / 2
    return (1 + shared**3 + (l2 / 24) ** 3) ** (1 / 3) + (1500 + m * n / 16) / tensor


def test_channels_waste_little():
    """Of the products, in both directions: channels of a multiple of 16 from 96 up. Some tile wastes a tenth
    at most; a wider one may be chosen for what its products save, at most that of the fastest, 256 x 128, to
    the slowest, 128 x 112 (of 96 columns there are 256 rows)."""
    saved = tabulated_time(128, 112, 1.08, 21.7) / tabulated_time(256, 128, 0.91, 12.5)
    assert saved == pytest.approx(1.184, abs=0.001)
    for outputs in range(96, 1040, 16):
        waste = {n: -(-outputs // n) * n / outputs for _, n in TILES if n >= 96}
        least, tile = min(waste.values()), plan(layer((3, 3, 3), 128, outputs, (17, 256, 256))).tile_n
        assert least <= 1.1 and waste[tile] <= saved * least, (outputs, tile)


@pytest.mark.parametrize(
    "kernel, channels, outputs, size",
    [
        ((3, 3, 3), 512, 512, (1, 32, 32)),
        ((3, 3, 3), 384, 384, (1, 32, 32)),
        ((3, 3, 3), 96, 96, (1, 256, 256)),
        ((3, 3, 3), 512, 512, (5, 32, 32)),
        ((3, 1, 1), 512, 512, (5, 32, 32)),
        ((1, 3, 3), 512, 512, (3, 32, 32)),
        ((3, 3, 3), 512, 512, (5, 16, 16)),
    ],
    ids=str,
)
def test_small_problems_fill_the_chip(kernel, channels, outputs, size):
    """At least two thirds of the multiprocessors have work."""
    p = plan(layer(kernel, channels, outputs, size))
    tiles = (
        -(-size[0] // p.frames) * -(-size[1] // p.rows) * -(-size[2] // p.columns)
        if kernel[1] > 1
        else -(-size[0] // p.frames) * -(-size[1] * size[2] // p.columns)
    )
    units = -(-tiles // p.cluster) * p.cluster * -(-outputs // p.tile_n) * p.splits
    assert units >= 88, p


def test_large_problems_take_the_tile_of_fewest_bytes():
    p = plan(layer((3, 3, 3), 128, 128, (17, 256, 256)))
    assert (p.tile_m, p.tile_n, p.splits, p.frames) == (256, 128, 1, 1) and p.weight_stages >= 4
    assert p.rows * p.columns > 240


def test_the_model_chooses_what_its_predictions_say():
    """Else python scripts/predict_causal_conv3d_sm90.py, and a look at what changed."""
    entries = json.loads(PREDICTIONS.read_text())["classes"]
    assert len(entries) >= 30
    for name, entry in entries.items():
        call = layer(
            tuple(entry["kernel"]),
            entry["channels"],
            entry["outputs"],
            entry["size"],
            stride=tuple(entry["stride"]),
            time_pad=entry["time_pad"],
            spatial_pad=entry["spatial_pad"],
            time_mode="replicate",
        )
        own = plan(call)
        assert own.choice == tuple(entry["choice"]) and (own.frames, own.rows, own.columns) == tuple(
            entry["tile"]
        ), name


def test_reasons():
    x = drawn(16, 16, (1, 1, 1), (1, 2, 2), BF16)[0]
    assert "on cpu" in launch.why_not_machine(x)
    with pytest.raises(NotImplementedError, match="capability is not 9.0"):
        plan(checked_call(*drawn(16, 16, (1, 1, 1), (1, 2, 2), BF16)), capability=80)
    with pytest.raises(NotImplementedError, match="bfloat16 and float16 only"):
        plan(checked_call(*drawn(16, 16, (1, 1, 1), (1, 2, 2), torch.float32)))
    with pytest.raises(NotImplementedError, match="no tile whose patches"):  # products of two taps at once
        plan(checked_call(*drawn(16, 16, (1, 3, 3), (1, 8, 8), BF16)), (128, 64, 1, 1, 1))
    with pytest.raises(NotImplementedError, match="no tile whose patches"):
        plan(checked_call(*drawn(16, 16, (1, 1, 3), (1, 2, 900), BF16), dilation=(1, 1, 200)))
    assert native.why_no_cuda() is None or not x.is_cuda
