"""VTok: token counts, the mean-difference identity, backbones, what a residual token changes, and the common
contract."""

from __future__ import annotations

from types import SimpleNamespace

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
    check_stream,
    check_tokens,
    clip,
    randomize,
)
from torch import nn

from vtok_fast.models import VTok, VTokConfig
from vtok_fast.models.vtok import model as implementation
from vtok_fast.models.vtok.backbones import CLIP_MEAN, CLIP_STD, CLIPBackbone

SMALL = {
    "dim": 16,
    "depth": 1,
    "heads": 2,
    "freeze_backbone": False,
    "key_grid": (2, 3),
    "token_dim": 10,
    "motion_hidden": 12,
    "patch": 4,
    "decoder_dim": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "mlp_ratio": 2.0,
}


def make(**fields) -> VTok:
    return randomize(VTok(**{**SMALL, **fields}))


class Patches(nn.Module):
    """A backbone of a user's own: features (N, P, D) of square patches, without a class token."""

    def __init__(self, features: int = 16, patch: int = 4):
        super().__init__()
        self.conv = nn.Conv2d(3, features, patch, stride=patch)

    def forward(self, frames):
        return self.conv(frames).tanh().flatten(2).mT


class StandInCLIP(nn.Module):
    """What CLIPBackbone uses of a CLIPVisionModel: its config, its call, and hidden states with a class token
    in front."""

    def __init__(self, size: int = 8, patch: int = 4, dim: int = 16):
        super().__init__()
        self.config = SimpleNamespace(image_size=size)
        self.conv = nn.Conv2d(3, dim, patch, stride=patch)

    def forward(self, pixel_values, output_hidden_states=False):
        assert pixel_values.shape[2:] == (self.config.image_size,) * 2
        self.seen = pixel_values
        patches = self.conv(pixel_values).flatten(2).mT
        states = torch.cat((torch.full_like(patches[:, :1], 1e6), patches), dim=1)
        return SimpleNamespace(
            hidden_states=(states * 0, states, states * 0) if output_hidden_states else None
        )


# Tokens


@pytest.mark.parametrize(
    ("frames", "stride", "count"), [(1, 1, 16), (30, 1, 16 + 29), (30, 6, 16 + 4), (121, 4, 46), (4, 6, 16)]
)
def test_token_counts(frames, stride, count):
    """S + (T - 1); 30 frames at stride 6 are 16 + 4; five seconds at 24 frames per second and 6 tokens per
    second are 46."""
    model = VTok(VTokConfig(**VTokConfig.presets["tiny"], stride=stride))
    assert model.num_tokens(frames, 64, 64) == count
    assert model.encode(clip(1, 3, frames, 8, 8)).latents.shape == (1, 64, 1, 1, count)


@pytest.mark.parametrize("stride", [1, 3])
def test_mean_of_differences_is_difference_of_means(stride, monkeypatch):
    """The residual token by its definition, from the map F(x_t) - F(x_1); also when frames go through in
    groups."""
    model, video = make(stride=stride).double(), clip(2, 3, 10, 8, 12, dtype=torch.float64)
    maps = torch.stack([model.features(video[:, :, t]) for t in range(0, 10, stride)], dim=1)
    residual = (maps[:, 1:] - maps[:, :1]).mean((3, 4))
    expected = torch.cat(
        (model.key(F.adaptive_avg_pool2d(maps[:, 0], (2, 3)).flatten(2).mT), model.motion(residual)), dim=1
    )
    for at_once in (16, 2):
        monkeypatch.setattr(implementation, "FRAMES_AT_ONCE", at_once)
        torch.testing.assert_close(model.sequence(model.encode(video)), expected, rtol=1e-12, atol=1e-13)


def test_residual_tokens_by_hand():
    """With an identity for a head: the residual token is the change of the mean feature, nothing for a clip
    that stands still."""
    model = VTok(backbone=Patches(), **{**SMALL, "feature_dim": 16, "token_dim": 16})
    model.motion = nn.Sequential(nn.Linear(16, 16))
    nn.init.eye_(model.motion[0].weight), nn.init.zeros_(model.motion[0].bias)
    video = clip(1, 3, 1, 8, 8).repeat(1, 1, 4, 1, 1)
    video[:, :, 2] = 0.5
    row = model.sequence(model.encode(video))
    assert not row[:, [6, 8]].any()
    expected = model.backbone(video[:, :, 2]).mean(1) - model.backbone(video[:, :, 0]).mean(1)
    torch.testing.assert_close(row[:, 7], expected)
    key = F.adaptive_avg_pool2d(model.backbone(video[:, :, 0]).mT.unflatten(2, (2, 2)), (2, 3))
    torch.testing.assert_close(row[:, :6], key.flatten(2).mT)


def test_a_residual_token_changes_its_own_frame():
    model, video = make(), clip(1, 3, 5, 8, 8)
    changed = video.clone()
    changed[:, :, 3] *= -1
    same = [0, 1, 2, 4]
    a, b = model(video), model(changed)
    torch.testing.assert_close(a[:, :, same], b[:, :, same], rtol=0, atol=1e-6)
    assert not torch.isclose(a[:, :, 3], b[:, :, 3]).all()


def test_frames_between_residual_tokens_are_interpolated():
    motion = torch.tensor([0.0, 3.0, 9.0])[None, :, None]
    assert torch.equal(
        implementation.at_frames(motion, 9, 3)[0, :, 0], torch.tensor([0.0, 1, 2, 3, 5, 7, 9, 9, 9])
    )
    assert torch.equal(implementation.at_frames(motion, 3, 1), motion)


# Backbones


def test_external_backbone(tmp_path):
    backbone = Patches()
    model = VTok(backbone=backbone, **{**SMALL, "feature_dim": 16, "freeze_backbone": True})
    video = clip(2, 3, 4, 8, 8)
    assert (
        not any(p.requires_grad for p in backbone.parameters())
        and not model.train().backbone.training
        and model.motion.training
    )
    assert (
        not any(key.startswith("backbone") for key in model.own_state())
        and model.config.backbone == "external"
    )
    check_gradients(model, video)
    model.eval()
    check_tokens(model, video, tmp_path / "tokens.safetensors")
    model.save(tmp_path / "model.safetensors")
    loaded = VTok.from_checkpoint(tmp_path / "model.safetensors", backbone=backbone)
    assert torch.equal(loaded.encode(video).data, model.encode(video).data)
    with pytest.raises(ValueError, match="backbone: .* wants a module of yours.*backbone=module"):
        VTok.from_checkpoint(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="backbone=Patches.*'vit'"):
        VTok("tiny", backbone=backbone)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (lambda x: x.new_zeros(len(x), 7, 16), "7 patches do not form a square"),
        (lambda x: x.new_zeros(len(x), 4, 15), "15 channels.*16"),
        (lambda x: x.new_zeros(len(x), 16), r"\(N, P, D\).*got"),
        (lambda x: (x, x), "got tuple"),
    ],
)
def test_features_that_are_refused(features, message):
    class Wrong(nn.Module):
        def forward(self, frames):
            return features(frames)

    model = VTok(backbone=Wrong(), **{**SMALL, "feature_dim": 16})
    with pytest.raises(ValueError, match=message):
        model.encode(clip(1, 3, 2, 8, 8))


def test_clip_gets_normalized_frames_and_loses_its_class_token():
    tower = StandInCLIP()
    frames = clip(2, 3, 8, 8)
    features = CLIPBackbone(tower)(frames)
    assert features.shape == (2, 4, 16) and features.abs().max() < 1e3
    mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    torch.testing.assert_close(tower.seen * std + mean, (frames + 1) / 2)
    flat = torch.full((1, 3, 12, 20), 0.25)
    CLIPBackbone(tower)(flat)
    torch.testing.assert_close(tower.seen * std + mean, torch.full((1, 3, 8, 8), 0.625))
    model = VTok(backbone=CLIPBackbone(tower), **{**SMALL, "feature_dim": 16})
    assert model.encode(clip(1, 3, 3, 8, 16)).latents.shape == (1, 10, 1, 1, 6 + 2)


def test_clip_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    torch.manual_seed(0)
    tower = transformers.CLIPVisionModel(config).eval()
    model = VTok(
        backbone=CLIPBackbone(tower), **{**SMALL, "feature_dim": 16, "key_grid": (2, 2), "token_dim": 16}
    ).eval()
    video = clip(1, 3, 3, 28, 28)
    mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    states = tower(((video[:, :, 0] + 1) / 2 - mean) / std, output_hidden_states=True).hidden_states
    assert len(states) == 3
    torch.testing.assert_close(model.sequence(model.encode(video))[:, :4], states[-2][:, 1:])


# The common contract


@pytest.mark.parametrize(
    "fields", [{}, {"stride": 3}, {"token_dim": 16}, {"key_pool": "max", "motion_layers": 3}], ids=str
)
def test_contract(fields, tmp_path):
    model = make(**fields)
    for frames in (1, 2, 8):
        check_tokens(model, clip(2, 3, frames, 8, 12), tmp_path / "tokens.safetensors")
    video = clip(1, 3, 8, 8, 8)
    check_files(model, video, tmp_path)
    check_refusals(model, video)
    check_gradients(model, video)


def test_acceleration():
    check_acceleration(make(), clip(1, 3, 5, 8, 12))
    model = randomize(VTok(backbone=Patches(), **{**SMALL, "feature_dim": 16}))
    assert "backbone.conv" in [entry.path for entry in check_acceleration(model, clip(1, 3, 5, 8, 8)).swapped]


def test_half_precision():
    model, video = make(), clip(1, 3, 5, 8, 8)
    tokens = model.bfloat16().encode(video.bfloat16())
    assert tokens.latents.dtype == torch.bfloat16 and model.decode(tokens).dtype == torch.bfloat16
    check_autocast(make(), clip(1, 3, 5, 8, 8))


def test_stream():
    model = make()
    check_stream(model, clip(1, 3, 21, 8, 8), model.stream(frames=8))


@pytest.mark.slow
def test_compile():
    check_compile(make(), clip(1, 3, 5, 8, 8))


def test_learning():
    torch.manual_seed(0)
    model = VTok("tiny")
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    ramp = torch.linspace(-1, 1, 32)
    video = (
        (ramp[:, None] * torch.linspace(0.5, 1, 8)[:, None, None] + 0 * ramp)
        .expand(1, 3, 8, 32, 32)
        .contiguous()
    )
    check_learning(model, video, steps=24, learning_rate=2e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"config": "clip_b_32"}, "clip_b_32.*clip_l_336"),
        ({"stride": 0}, "stride=0"),
        ({"backbone": "external"}, "backbone=.*feature_dim|feature_dim=None"),
        ({"feature_dim": 5}, "feature_dim=5.*dim=16"),
        ({"key_grid": (2, 0)}, r"key_grid=\(2, 0\)"),
        ({"decoder_heads": 5}, "decoder_heads=5.*decoder_dim=16"),
        ({"backbone": "resnet"}, "backbone='resnet'"),
    ],
)
def test_impossible_structures(fields, message):
    with pytest.raises(ValueError, match=message):
        VTokConfig.get(fields["config"]) if "config" in fields else VTokConfig(**{**SMALL, **fields})
