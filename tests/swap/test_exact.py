"""The contract *exact* for our own models: the same bits, on fewer buffers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vtok_fast
from vtok_fast.models import Cosmos, InfoTok, VidTok
from vtok_fast.models.vidtok import blocks
from vtok_fast.swap.adapters import in_place
from vtok_fast.swap.live_memory import peak_bytes

SMALL = {"ch": 32, "ch_mult": (1, 2, 2), "num_res_blocks": 1, "z_channels": 4, "levels": (8, 8, 5, 5)}
MODELS = {
    "VidTok 1.0": lambda: VidTok(**SMALL),
    "VidTok 1.1": lambda: VidTok(**SMALL, version="1.1", interpolation_mode="trilinear"),
    "VidTok, GroupNorm": lambda: VidTok(**SMALL, norm_type="groupnorm"),
    "VidTok, not causal": lambda: VidTok(**SMALL, causal=False),
    "Cosmos": lambda: Cosmos("tiny"),
    "InfoTok": lambda: InfoTok("tiny"),
}


def randomized(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():  # layers that start as the identity would hide errors
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


def tensors(model: nn.Module, video: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        tokens = model.encode(video)
        return [tokens.indices, model.decode(tokens), model.encoder(video)]


def check(name: str, dtype: torch.dtype, *shapes: tuple[int, ...], example: bool) -> None:
    model = randomized(name).to(dtype)
    clips = [torch.rand(1, 3, *shape).to(dtype) * 2 - 1 for shape in shapes]
    expected = [tensors(model, clip) for clip in clips]
    plain = copy.deepcopy(model)
    report = vtok_fast.accelerate(model, contract="exact", example=clips[0] if example else None)
    assert report.ok and not any("failed" in entry.why for entry in report.skipped), report
    assert {"FSQRegularizer", "FSQuantizer"} & {entry.kind for entry in report.swapped}
    assert all(entry.error == 0 for entry in report.swapped if entry.error is not None)
    for results, clip in zip(expected, clips):
        assert all(map(torch.equal, tensors(model, clip), results))
    with torch.no_grad():
        before, after = (peak_bytes(each, clips[0]) for each in (plain, model))
    assert after < 0.95 * before
    report.revert()
    assert all(map(torch.equal, tensors(model, clips[0]), expected[0]))


@pytest.mark.parametrize("name", ["VidTok 1.1", "InfoTok"])
def test_the_bits_stay_and_the_memory_does_not(name):
    check(name, torch.float32, (5, 16, 32), example=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_so_for_every_kind_and_several_sizes(name):
    frames = 8 if name == "VidTok, not causal" else 5
    check(name, torch.float32, (frames, 32, 48), (frames + 4, 48, 32), example=True)


@pytest.mark.parametrize("kind", [blocks.ResBlock1d, blocks.ResBlock3d], ids=lambda kind: kind.__name__)
def test_so_in_bfloat16(kind):
    torch.manual_seed(0)
    block = kind(32, 32, version="1.1").eval().to(torch.bfloat16)
    torch.nn.init.normal_(block.conv2.conv.weight, std=0.1)
    x = torch.randn(2, 32, 4, *(() if kind is blocks.ResBlock1d else (6, 5))).to(torch.bfloat16)
    with torch.no_grad():
        expected = block(x)
        (entry,) = vtok_fast.accelerate(block, contract="exact", example=x).swapped
        result = block(x)
    assert entry.error == 0 and torch.equal(result, expected) and result.stride() == expected.stride()


def test_gradients_are_the_class_s_own():
    model = randomized("VidTok 1.0")
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    vtok_fast.accelerate(fast := copy.deepcopy(model), contract="exact")
    gradients = []
    for each in (model, fast):
        each.encoder(video).square().mean().backward()
        gradients.append([p.grad for p in each.encoder.parameters()])
    assert all(map(torch.equal, *gradients))


def test_the_report_says_what_is_done():
    report = vtok_fast.accelerate(randomized("Cosmos"), contract="exact", check=False)
    assert {entry.what for entry in report.swapped} == {"the same operations, fewer copies"}


def test_streams_keep_their_bits():
    model = randomized("VidTok 1.1")
    video = torch.rand(1, 3, 9, 16, 16) * 2 - 1

    def streamed() -> list[torch.Tensor]:
        stream = vtok_fast.stream(model)
        return [stream.encode_chunk(video[:, :, a:b]).indices for a, b in stream.chunks(9, 4)]

    expected = streamed()
    vtok_fast.accelerate(model, contract="exact")
    assert len(expected) == 3 and all(map(torch.equal, streamed(), expected))


@pytest.mark.parametrize("replicate", [False, True])
@pytest.mark.parametrize("around", [(0, 0, 0, 0), (1, 2, 0, 3)], ids=str)
@pytest.mark.parametrize("front", [0, 2])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_padding_is_pytorch_s(replicate, around, front, last):
    x = torch.randn(2, 5, 3, 4, 6)
    x = x.to(memory_format=torch.channels_last_3d) if last else x

    def pad(x: torch.Tensor) -> torch.Tensor:
        if replicate:
            x = torch.cat((x[:, :, :1].expand(-1, -1, front, -1, -1), x), 2)
            return F.pad(x, around)
        return F.pad(x, (*around, front, 0))

    y, expected = in_place.padded(x, pad, front, around, replicate=replicate), pad(x)
    assert torch.equal(y, expected) and y.stride() == expected.stride()
    if not front and not any(around) and not replicate:
        assert y is x


def test_a_sum_has_pytorch_s_strides():
    x = torch.randn(2, 5, 3, 4, 6)
    last = torch.randn(2, 5, 3, 4, 6).to(memory_format=torch.channels_last_3d)
    view = torch.randn(2, 5, 4, 4, 6)[:, :, 1:]
    for first, second in ((x, x), (last, last), (x, last), (last, x), (view, x), (x, view), (last, view)):
        first, second = first.clone() if first is not view else view, second.clone()
        expected = first + second
        result = in_place.plus(first, second, into=second)
        assert torch.equal(result, expected) and result.stride() == expected.stride()
    wide = in_place.plus(x.double(), y := x.clone(), into=y)
    assert wide.dtype == torch.float64 and torch.equal(y, x)
