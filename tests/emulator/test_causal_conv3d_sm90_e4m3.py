"""The Hopper convolution with operands of e4m3, run on a CPU by the emulator, against its definition: the
same convolution of operands that were rounded before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.conv_cases import checked_call, drawn
from support.conv_sm90_emulated import Emulated

from vtok_fast import parity
from vtok_fast.ops.causal_conv3d import e4m3, op, sm90
from vtok_fast.ops.causal_conv3d.call import ConvCall, Geometry
from vtok_fast.reference import e4m3 as reference

pytestmark = pytest.mark.needs_emulator
BF16 = torch.bfloat16
PREDICTIONS = (
    Path(__file__).resolve().parents[2] / "benchmarks" / "predictions" / "causal_conv3d_sm90_e4m3.json"
)
TILES = [(256, 160), (256, 128), (256, 96), (128, 144), (128, 128), (128, 112), (128, 96), (128, 64)]


def rounded_call(call, scale):
    """The call in float64 with the operands that the kernel multiplies."""
    x, weight, cache = call.x, call.weight, call.cache
    wide = {k: v.double() for k, v in call._asdict().items() if isinstance(v, torch.Tensor)}
    wide["x"] = reference.rounded(x.double(), scale)
    wide["weight"] = reference.rounded(weight.double(), reference.scale_of_weight(weight))
    if cache is not None:
        wide["cache"] = reference.rounded(cache.double(), scale)
    return call._replace(**wide)


def check(call, choice=sm90.ANY, seed=0, **device):
    """The kernel against float64 on the same operands: by the contract *close*, rounded once to bfloat16."""
    scale = e4m3.Scales().of(call)
    y = e4m3.forward(call, scale, lib=Emulated(seed, **device), choice=choice)
    found = parity.close(y, op.run_reference(rounded_call(call, scale)))
    assert found.ok, found
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    return y


def test_splits_cache_and_epilogue():
    """Channels of a slice and a quarter; x and the cache of very different sizes; shares of the sum."""
    x, weight, bias = drawn(160, 136, (3, 3, 3), (2, 7, 9), BF16)
    cache = 40 * drawn(160, 1, (1, 1, 1), (1, 7, 9), BF16, 1, 3)[0]
    residual = drawn(136, 1, (1, 1, 1), (2, 7, 9), BF16, seed=1)[0]
    options = {"cache": cache, "residual": residual, "activation": "silu"}
    check(checked_call(x, weight, bias, **options), (128, 128, 2, 1, 0))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_tile(tile, cluster, seed):
    x, weight, bias = drawn(144, tile[1] + 8, (1, 3, 3), (2, tile[0] // 14, 19), BF16)
    residual = drawn(tile[1] + 8, 1, (1, 1, 1), (2, tile[0] // 14, 19), BF16, seed=1)[0]
    call = checked_call(x, weight, bias, residual=residual, alpha=0.25)
    check(call, (*tile, 1, cluster, 0), seed)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [16, 32, 48, 64, 80, 96, 112, 128, 144, 272])
def test_channel_counts(channels):
    check(checked_call(*drawn(channels, 24, (3, 3, 3), (2, 6, 9), BF16)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"time_mode": "replicate"}, {"stride": (1, 2, 2), "spatial_pad": ((0, 1), (0, 1))}, {"dilation": 2}],
    ids=str,
)
def test_geometry(options):
    x, weight, bias = drawn(48, 64, (3, 3, 3), (3, 9, 11), BF16, batch=2)
    check(checked_call(x, weight, bias, **options))


def test_layouts_and_large_values():
    """A crop of a larger video, planar weights and channels-last ones; values beyond 448 scales are cut off,
    a NaN spoils what reads it and no more."""
    whole = drawn(48, 32, (1, 3, 3), (2, 8, 10), BF16, batch=2)[0]
    _, weight, bias = drawn(32, 32, (1, 3, 3), (1, 1, 1), BF16)
    x = whole[:, 8:40, :, 1:, 2:]
    call = checked_call(x, weight, bias)
    y = check(call)
    last = call._replace(weight=weight.contiguous(memory_format=torch.channels_last_3d))
    assert torch.equal(check(last), y)
    small = torch.tensor(2.0**-9)
    cut = e4m3.forward(call, small, lib=Emulated(0))
    assert x.abs().max() > 448 * small and parity.close(cut, op.run_reference(rounded_call(call, small))).ok
    spoiled = x.clone()
    spoiled[0, 3, 0, 0, 0] = torch.nan
    z = e4m3.forward(call._replace(x=spoiled), e4m3.Scales().of(call), lib=Emulated(0))
    assert z[0, :, 0, :2, :2].isnan().all() and z.isnan().sum() == 32 * 4


def test_the_model_chooses_what_its_predictions_say():
    """Else python scripts/predict_causal_conv3d_sm90.py, and a look at what changed."""
    entries = json.loads(PREDICTIONS.read_text())["classes"]
    assert len(entries) >= 15
    for name, entry in entries.items():

        def tensor(*shape):
            return torch.empty(shape, dtype=BF16, device="meta", memory_format=torch.channels_last_3d)

        x, weight = (
            tensor(1, entry["channels"], *entry["size"]),
            tensor(entry["outputs"], entry["channels"], *entry["kernel"]),
        )
        pad = (*entry["time_pad"], *entry["spatial_pad"][0], *entry["spatial_pad"][1])
        call = ConvCall(x, weight, geometry=Geometry(tuple(entry["stride"]), pad=pad, time_mode="replicate"))
        own = e4m3.plan(call, lib=Emulated(multiprocessors=132))
        assert own.choice == tuple(entry["choice"]), name
        assert (own.frames, own.rows, own.columns) == tuple(entry["tile"]), name


def test_what_is_asked_for():
    x, weight, bias = drawn(32, 32, (3, 3, 3), (2, 8, 8), BF16)
    call = checked_call(x, weight, bias)
    found = e4m3.plan(call, lib=Emulated(0), choice=(128, 64, 1, 1, 0))
    assert found.scratch_bytes == x.numel() + 32 * 27 * 32 + 256  # x, the weights, their scales
    for bad, message in (
        (drawn(24, 32, (1, 3, 3), (1, 4, 4), BF16), "multiple of 16"),
        (drawn(32, 32, (1, 3, 3), (1, 4, 4), torch.float32), "bfloat16 and float16 only"),
    ):
        with pytest.raises(NotImplementedError, match=f"sm90: .*{message}"):
            e4m3.plan(checked_call(*bad), lib=Emulated(0))
    with pytest.raises(NotImplementedError, match="capability is not 9.0"):
        e4m3.plan(call, lib=Emulated(0, capability=80))
    with pytest.raises(ValueError, match="x_scale: expected one float32"):
        e4m3.forward(call, torch.tensor(1.0, dtype=torch.float64), lib=Emulated(0))
