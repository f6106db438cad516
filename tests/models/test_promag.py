"""ProMAG: latent sizes of the paper, causality, growth, the norm without mean, tiles, chunks, and the common
contract."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.tokenizer_contract import (
    check_acceleration,
    check_autocast,
    check_compile,
    check_files,
    check_gradients,
    check_learning,
    check_refusals,
    check_tokens,
    clip,
    randomize,
)

import vtok_fast
from vtok_fast import parity
from vtok_fast.models import ProMAG, ProMAGConfig
from vtok_fast.models.promag import blocks

SMALL = {
    "ch": 4,
    "ch_mult": (1, 2, 1),
    "strides": ((2, 2, 2), (1, 2, 2)),
    "num_res_blocks": 1,
    "mid_blocks": 1,
    "groups": 2,
    "z_channels": 3,
    "chunk_frames": 9,
    "overlap": 2,
}
KINDS = [
    {},
    {"growth": 1},
    {"growth": 2, "key_embedding": "position"},
    {"norm": "group"},
    {"per_frame": True, "growth": 1},
    {"chunk_frames": None},
]


def make(**fields) -> ProMAG:
    return randomize(ProMAG(**{**SMALL, **fields}), std=0.2)


# The paper


@pytest.mark.parametrize(
    ("name", "frames"),
    [("4x_8chn", 5), ("8x_8chn", 3), ("16x_16chn", 2), ("direct_8x_8chn", 3), ("direct_16x_8chn", 2)],
)
def test_latent_sizes_of_the_paper(name, frames):
    """17x256x256 has 5, 3 and 2 latent frames of 32x32."""
    with torch.device("meta"):
        model = ProMAG(name)
        assert model.encode_latent(torch.empty(1, 3, 17, 256, 256)).shape == (
            1,
            2 * model.config.z_channels,
            frames,
            32,
            32,
        )
        assert model.decode_latent(torch.empty(1, model.config.z_channels, frames, 32, 32)).shape == (
            1,
            3,
            17,
            256,
            256,
        )
    assert (
        model.token_grid(17, 256, 256) == (frames, 32, 32) and model.num_tokens(17, 256, 256) == frames * 1024
    )


def test_long_videos_of_the_paper():
    """340 frames are 26 chunks of 17 that overlap by 4, the last one of 15 frames; 16x needs 2 latent frames
    for each."""
    with torch.device("meta"):
        model = ProMAG("16x_8chn")
    plan = model.plan(340)
    assert plan[0] == (0, 17, 2) and plan[1] == (13, 30, 2) and plan[-1] == (325, 340, 2) and len(plan) == 26


# Layers


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("kind", ["group", "group_rms"])
def test_norm_by_its_formula(kind, per_frame):
    torch.manual_seed(0)
    layer = blocks.GroupNorm(
        ProMAGConfig(**{**SMALL, "norm": kind, "per_frame": per_frame, "eps": 0.1}), 6
    ).double()
    torch.nn.init.normal_(layer.weight), torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 6, 3, 4, 5, dtype=torch.float64) + 2
    expected = torch.empty_like(x)
    for b in range(2):
        for g in range(2):
            for frames in [[t] for t in range(3)] if per_frame else [[0, 1, 2]]:
                part = x[b, 3 * g : 3 * g + 3][:, frames]
                part = part - part.mean() if kind == "group" else part
                part = part / (part.square().mean() + 0.1).sqrt()
                for i in range(3):
                    expected[b, 3 * g + i, frames] = part[i] * layer.weight[3 * g + i] + layer.bias[3 * g + i]
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_norm_without_mean_keeps_a_flat_video():
    """Group norm maps a flat video to zero whatever its color, group norm without mean does not."""
    x = torch.full((1, 4, 3, 4, 4), 0.7)
    for kind, value in (("group", 0.0), ("group_rms", 1.0)):
        layer = blocks.GroupNorm(ProMAGConfig(**{**SMALL, "norm": kind}), 4)
        torch.testing.assert_close(layer(x), torch.full_like(x, value), atol=1e-3, rtol=0)


@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 1, 1)])
def test_convolution_pads_time_whatever_its_stride(stride):
    layer, x = blocks.CausalConv3d(2, 3, stride=stride), clip(1, 2, 9, 6, 8)
    y = layer(x)
    assert y.shape[2] == {1: 9, 2: 5}[stride[0]]
    expected = F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), layer.conv.weight, layer.conv.bias, stride=stride)
    assert torch.equal(y, expected)


def test_depth_to_space_position_by_position():
    x = torch.arange(2 * 8 * 2 * 2 * 3.0).view(2, 8, 2, 2, 3)
    y = blocks.depth_to_space(x, (2, 2, 2))
    assert y.shape == (2, 1, 3, 4, 6)
    for t in range(3):
        for h in range(4):
            for w in range(6):
                channel = (t + 1) % 2 * 4 + h % 2 * 2 + w % 2  # the first frame was dropped
                assert torch.equal(y[:, 0, t, h, w], x[:, channel, (t + 1) // 2, h // 2, w // 2])


def test_a_later_frame_changes_no_earlier_one():
    """With statistics per frame nothing else looks ahead, also in a grown model: its second latent frame ends
    with frame 4."""
    model, video = make(per_frame=True, growth=1), clip(1, 3, 9, 8, 8)
    changed = video.clone()
    changed[:, :, 5:] *= -1
    a, b = model.encode(video).latents, model.encode(changed).latents
    assert torch.equal(a[:, :, :2], b[:, :, :2]) and not torch.isclose(a[:, :, 2], b[:, :, 2]).all()
    codes = a.clone()
    codes[:, :, 2] *= -1
    assert torch.equal(model.decode_latent(a)[:, :, :5], model.decode_latent(codes)[:, :, :5])


# Growth


def test_a_grown_model_starts_as_the_lower_one_on_every_second_frame():
    lower, video = make(chunk_frames=17).double(), clip(2, 3, 17, 8, 12, dtype=torch.float64)
    for growth in (1, 2):
        grown = lower.grow().eval()
        assert grown.config == replace(lower.config, growth=growth)
        assert grown.config.time_downsample_factor == 2 * lower.config.time_downsample_factor
        latents = grown.encode(video).latents
        assert torch.equal(latents, lower.encode(video[:, :, ::2]).latents)
        twice = latents.repeat_interleave(2, dim=2)[:, :, 1:]
        torch.testing.assert_close(
            grown.decode_latent(latents), lower.decode_latent(twice), rtol=1e-11, atol=1e-12
        )
        lower = randomize(grown, std=0.2)


def test_growth_names_the_model_that_it_makes():
    model = ProMAG("tiny")
    assert [(model := model.grow()).config.name for _ in range(2)] == ["tiny_8x", "tiny_16x"]
    with pytest.raises(ValueError, match=r"chunk_frames=17 must be 1 \+ k \* 32"):
        model.grow()


def test_features_by_the_figure():
    """z = k + r, with r = down(blocks(norm(f) * (1 + affine(mean of k)))), every part written out."""
    model, video = make(growth=1).double(), clip(1, 3, 9, 8, 8, dtype=torch.float64)
    stage = model.encoder_growth[0]
    f, k = model.encoder(video), model.encoder(video[:, :, [0, 2, 4, 6, 8]])
    assert (f.shape[2], k.shape[2]) == (5, 3)
    scale = (
        F.conv3d(k.mean((3, 4), keepdim=True), stage.modulate.affine.weight, stage.modulate.affine.bias) + 1
    )
    scale = torch.stack([scale[:, :, t] for t in (0, 1, 1, 2, 2)], dim=2)
    groups = f.unflatten(1, (2, -1))
    normal = (groups / (groups.square().mean((2, 3, 4, 5), keepdim=True) + 1e-6).sqrt()).flatten(1, 2)
    z = model.to_latent(k + stage.down(stage.blocks(normal * scale)))
    torch.testing.assert_close(model.encode_latent(video), z, rtol=1e-12, atol=1e-12)


def test_each_frame_rate_is_encoded_once(monkeypatch):
    model, seen = make(growth=2, chunk_frames=17), []
    forward = blocks.Encoder.forward
    monkeypatch.setattr(
        blocks.Encoder, "forward", lambda self, x: (seen.append(x.shape[2]), forward(self, x))[1]
    )
    model.encode(clip(1, 3, 17, 8, 8))
    assert seen == [17, 9, 5]


def test_what_a_grown_model_leaves_as_it_was():
    model = make().grow().grow()
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(
        name.startswith(("encoder.", "encoder_growth.0.", "decoder.levels.2.", "decoder.out."))
        for name in learns
    )
    for part in (
        "encoder_growth.1.",
        "decoder_growth.0.",
        "decoder_growth.1.",
        "decoder.mid",
        "decoder.levels.0",
        "to_latent",
        "from_latent",
    ):
        assert any(name.startswith(part) for name in learns), part
    assert all(p.requires_grad for p in make(growth=1, freeze_lower=False).parameters())


# Tiles and chunks


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_tiles_change_nothing(fields):
    model, video = make(**fields).double(), clip(1, 3, 9, 20, 28, dtype=torch.float64)
    with torch.no_grad():
        whole = model(video)
        for tile in (1, 3, 8, 100) if not fields else (3,):
            tiled = model.tiling(tile)(video)
            assert (p := parity.close(tiled, whole)).ok, (tile, p)
        assert torch.equal(model.tiling(None)(video), whole)


def test_tiles_do_tile():
    """No convolution sees more than a square of tile positions and its halo."""
    model, sizes = make(), []
    for module in model.modules():
        if isinstance(module, blocks.CausalConv3d):
            module.conv.register_forward_pre_hook(
                lambda conv, args: sizes.append(
                    max(
                        (n - k + s) // s
                        for n, k, s in zip(args[0].shape[3:], conv.kernel_size[1:], conv.stride[1:])
                    )
                )
            )
    with torch.no_grad():
        model.tiling(4)(clip(1, 3, 5, 16, 24))
    assert max(sizes) == 4 and len(sizes) > 100
    with pytest.raises(ValueError, match="tile=0"):
        model.tiling(0)


def test_gradients_through_tiles():
    model, video = make(growth=1), clip(1, 3, 9, 8, 12)
    model = model.double()
    video = video.double().requires_grad_()
    gradients = []
    for tile in (None, 3):
        model.zero_grad()
        video.grad = None
        model.tiling(tile)(video).square().mean().backward()
        gradients.append([video.grad] + [p.grad for p in model.parameters() if p.grad is not None])
    for whole, tiled in zip(*gradients, strict=True):
        torch.testing.assert_close(tiled, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("frames", [1, 9, 10, 16, 27])
def test_chunks_are_encoded_apart_and_blended(frames):
    """Chunks of 9 frames, every 7: latents are those of each chunk alone, frames those of each chunk, mixed
    2:1 and 1:2."""
    model, video = make().double(), clip(1, 3, frames, 8, 8, dtype=torch.float64)
    starts = [0] if frames <= 9 else list(range(0, frames - 2, 7))
    parts = [video[:, :, start : start + 9] for start in starts]
    alone = [model.encode(part).latents for part in parts]
    tokens = model.encode(video)
    assert torch.equal(tokens.latents, torch.cat(alone, dim=2))
    expected, weights = torch.zeros_like(video), torch.zeros(frames, dtype=torch.float64)
    for i, (start, part, codes) in enumerate(zip(starts, parts, alone)):
        n = part.shape[2]
        weight = torch.ones(n, dtype=torch.float64)
        if i:
            weight[:2] = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)
        if i + 1 < len(starts):
            weight[-2:] = torch.tensor([2 / 3, 1 / 3], dtype=torch.float64)
        weights[start : start + n] += weight
        expected[:, :, start : start + n] += weight[:, None, None] * model.decode_latent(codes)[:, :, :n]
    torch.testing.assert_close(weights, torch.ones_like(weights))
    torch.testing.assert_close(model.decode(tokens), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frames", [5, 9, 23])
def test_stream_is_the_whole(frames):
    model, video = make(), clip(1, 3, frames, 8, 8)
    stream = model.stream()
    tokens = [stream.encode_chunk(video[:, :, start:end]) for start, end in stream.chunks(frames)]
    assert torch.equal(torch.cat([part.latents for part in tokens], dim=2), model.encode(video).latents)
    parts = [stream.decode_chunk(part, lookahead=after) for part, after in zip(tokens, [*tokens[1:], None])]
    torch.testing.assert_close(
        torch.cat(parts, dim=2), model.decode(model.encode(video)), rtol=1e-6, atol=1e-6
    )


# The common contract


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_contract(fields, tmp_path):
    model = make(**fields)
    for frames in (1, 9, 19):
        check_tokens(model, clip(2, 3, frames, 8, 12), tmp_path / "tokens.safetensors")
    video = clip(1, 3, 11, 8, 8)
    check_files(model, video, tmp_path)
    check_refusals(model, video)
    check_gradients(model, video)


@pytest.mark.needs_native
@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_acceleration(fields):
    """Groups of the ops' own sizes, so that the kernels run, and not only their fallbacks."""
    model = make(**{**fields, "ch": 16, "groups": 4})
    report = check_acceleration(model, clip(1, 3, 9, 16, 24))
    swapped = {entry.kind for entry in report.swapped}
    assert {"ResBlock", "NormConv", "NormSiLU", "CausalConv3d"} <= swapped and ("AdaNorm" in swapped) == (
        model.config.growth > 0
    )
    assert not [
        entry
        for entry in report.skipped
        if entry.kind in ("GroupNorm", "CausalConv3d", "ResBlock", "AdaNorm")
    ]


@pytest.mark.needs_native
def test_acceleration_without_an_example():
    """Every kind of layer is checked on inputs of its own."""
    for fields in (
        {"growth": 1},
        {"growth": 1, "key_embedding": "position", "norm": "group", "per_frame": True},
    ):
        report = vtok_fast.accelerate(make(**{**fields, "ch": 16, "groups": 4}))
        assert not [entry for entry in report.skipped if entry.error is not None], report
        measured = {entry.kind for entry in report.swapped if entry.error is not None}
        assert {"ResBlock", "NormConv", "NormSiLU", "CausalConv3d", "AdaNorm"} <= measured


def test_latent_is_sampled_in_training_alone():
    model, video = make(), clip(1, 3, 5, 8, 8)
    assert torch.equal(model.reconstruct(video).codes, model.encode(video).latents)
    torch.manual_seed(0)
    assert not torch.isclose(model.train().reconstruct(video).codes, model.encode(video).latents).all()


def test_half_precision():
    model, video = make(growth=1), clip(1, 3, 11, 8, 8)
    tokens = model.bfloat16().encode(video.bfloat16())
    assert tokens.latents.dtype == torch.bfloat16 and model.decode(tokens).dtype == torch.bfloat16
    check_autocast(make(growth=1), clip(1, 3, 11, 8, 8))


@pytest.mark.slow
def test_compile():
    check_compile(make(growth=1), clip(1, 3, 11, 8, 8))


@pytest.mark.parametrize("name", ["tiny", "tiny_8x"])
def test_learning(name):
    torch.manual_seed(0)
    model = ProMAG(name)
    assert sum(p.numel() for p in model.parameters()) < 1_500_000
    ramp = torch.linspace(-1, 1, 16)
    video = (
        (ramp[:, None] * torch.linspace(0.5, 1, 9)[:, None, None] + 0 * ramp)
        .expand(1, 3, 9, 16, 16)
        .contiguous()
    )
    check_learning(model, video, steps=12, learning_rate=2e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"config": "2x_8chn"}, "2x_8chn.*4x_8chn"),
        ({"strides": ((2, 2, 2),)}, "strides="),
        ({"strides": ((2, 2, 1), (1, 2, 2))}, "strides="),
        ({"groups": 3}, "groups=3"),
        ({"norm": "layer"}, "norm='layer'"),
        ({"key_embedding": "clip"}, "key_embedding='clip'"),
        ({"chunk_frames": 8}, r"chunk_frames=8 must be 1 \+ k \* 2"),
        ({"overlap": 9}, "overlap=9"),
        ({"growth": -1}, "growth=-1"),
    ],
)
def test_impossible_structures(fields, message):
    with pytest.raises(ValueError, match=message):
        ProMAGConfig.get(fields["config"]) if "config" in fields else ProMAGConfig(**{**SMALL, **fields})
