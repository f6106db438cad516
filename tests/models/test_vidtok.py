"""VidTok: structure, files, tokens, what it refuses, gradients. tests/models/test_golden.py compares it with
the official code."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from vtok_fast.io.files import write_atomically
from vtok_fast.io.tokens import Tokens
from vtok_fast.models import ProMAG, VidTok, VidTokConfig
from vtok_fast.models.common.regularizers import FSQRegularizer, KLRegularizer
from vtok_fast.models.vidtok.config import CONFIGS

# Millions of parameters of the released models, by what their names say.
PARAMETERS = {"288": 148.8, "444": 154.9, "888": 164.9, "488": 157.4, "41616": 199.0}

SMALL = {"ch": 8, "ch_mult": (1, 2, 2), "num_res_blocks": 1, "z_channels": 4}
FSQ = {**SMALL, "levels": (8, 8, 5, 5)}


def make(**fields) -> VidTok:
    """A small model with random parameters everywhere (the 1D blocks start at zero)."""
    torch.manual_seed(0)
    model = VidTok(**{**FSQ, **fields}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def clip(frames: int = 5, height: int = 16, width: int = 8, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


# Structure


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "tiny"])
def test_released_configurations(name):
    with torch.device("meta"):
        model = VidTok(name)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    factors = next(part for part in name.split("_") if part in PARAMETERS)
    extra = {"8chn": 0.2, "16chn": 0.5}.get(name.split("_")[-1], 0.0) if factors in ("488", "41616") else 0.0
    assert millions == pytest.approx(PARAMETERS[factors] + extra, abs=0.1)
    if factors == "488":
        assert (len(model.encoder.state_dict()), len(model.decoder.state_dict())) == (176, 240)
    config = model.config
    assert f"{config.time_downsample_factor}{config.spatial_factor}{config.spatial_factor}" == factors
    assert config.causal == ("noncausal" not in name)
    if config.regularizer == "fsq":
        assert str(model.regularization.codebook_size) == name.split("_")[-1]
    else:
        assert f"{config.z_channels}chn" == name.split("_")[-1]


def test_tiny_is_small_and_suits_the_kernels():
    model = VidTok("tiny")
    assert sum(p.numel() for p in model.parameters()) <= 1_000_000
    assert (model.config.version, model.config.causal, model.config.levels) == ("1.0", True, (8,) * 6)
    planes = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert planes and all(m.in_channels % 16 == 0 and m.out_channels % 16 == 0 for m in planes)
    assert model.latent_shape(17, 128, 128) == (5, 32, 32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"config": "fsq_causal_999"}, "fsq_causal_999.*fsq_causal_488_4096"),
        ({"levels": (8, 8)}, "levels=.*z_channels=4"),
        ({"levels": (8, 8, 8, 1)}, "at least 2"),
        ({"levels": (2**16, 2**16, 2, 2)}, "2\\*\\*31"),
        ({"version": "2.0"}, "version='2.0'"),
        ({"interpolation_mode": "trilinear"}, "1.1"),
        ({"version": "1.1", "causal": False}, "causal=False"),
        ({"time_downsample_factor": 8}, "time_downsample_factor=8"),
        ({"norm_type": "groupnorm"}, "divisible by 32"),
        ({"color": "blue"}, "color"),
    ],
)
def test_impossible_structures(fields, message):
    with pytest.raises(ValueError, match=message):
        VidTok(**fields) if "config" in fields else VidTok(**{**FSQ, **fields})


@pytest.mark.parametrize(
    ("fields", "frames", "back"),
    [
        ({}, {1: 1, 5: 5, 17: 17, 8: 5, 6: 5}, None),
        ({"version": "1.1", "interpolation_mode": "trilinear"}, {1: 1, 5: 5, 6: 6, 8: 8}, None),
        ({"causal": False}, {4: 4, 8: 8, 11: 8}, None),
    ],
    ids=["1.0", "1.1", "non-causal"],
)
def test_frames_that_come_back(fields, frames, back):
    model = make(**fields)
    for given, returned in frames.items():
        tokens = model.encode(clip(given))
        assert tokens.grid == model.latent_shape(given, 16, 8)
        assert tokens.indices.numel() == model.num_tokens(given, 16, 8)
        assert model.decode(tokens).shape == (1, 3, returned, 16, 8)


# Encoding and decoding


@pytest.mark.parametrize("fields", [{}, {"regularizer": "kl", "levels": None}], ids=["fsq", "kl"])
def test_decode_of_encode_is_forward(fields):
    model, video = make(**fields), clip(batch=2)
    expected = model(video)
    torch.testing.assert_close(model.decode(model.encode(video)), expected, rtol=0, atol=0)
    torch.testing.assert_close(model.reconstruct(video).video, expected, rtol=0, atol=0)


def test_a_later_frame_changes_no_earlier_one():
    model, video = make(), clip(9)
    changed = video.clone()
    changed[:, :, 5:] *= -1
    assert torch.equal(model.encode(video).indices[:, :2], model.encode(changed).indices[:, :2])
    assert torch.equal(model(video)[:, :, :5], model(changed)[:, :, :5])


def test_views_and_half_precision():
    model, video = make(), clip(5, 16, 16)
    view = video.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    assert torch.equal(model.encode(view).indices, model.encode(video).indices)
    half = copy.deepcopy(model).bfloat16()
    tokens = half.encode(video.bfloat16())
    assert tokens.dtype == torch.bfloat16 and half.decode(tokens).dtype == torch.bfloat16
    assert (tokens.indices == model.encode(video).indices).float().mean() > 0.5


@pytest.mark.parametrize(
    ("video", "error", "message"),
    [
        ("clip.mp4", TypeError, "video must be a tensor, not str"),
        (torch.zeros(1, 3, 5, 8, 8, dtype=torch.uint8), TypeError, "video is torch.uint8"),
        (torch.zeros(1, 3, 5, 8, 8, dtype=torch.float64), TypeError, "video is torch.float64"),
        (torch.zeros(3, 5, 8, 8), ValueError, r"\(3, 5, 8, 8\)"),
        (torch.zeros(1, 4, 5, 8, 8), ValueError, "4 channels"),
        (torch.zeros(0, 3, 5, 8, 8), ValueError, "empty"),
        (torch.zeros(1, 3, 0, 8, 8), ValueError, "empty"),
        (torch.zeros(1, 3, 5, 18, 12), ValueError, "18x12.*multiples of 4.*16x12 would do"),
        (torch.zeros(1, 3, 5, 0, 8), ValueError, "0x8"),
        (torch.full((1, 3, 5, 8, 8), float("nan")), ValueError, "video has 960 values that are NaN"),
        (torch.zeros(1, 3, 5, 8, 8, device="meta"), ValueError, "video is on meta"),
    ],
)
def test_videos_that_are_refused(video, error, message):
    with pytest.raises(error, match=message):
        make().encode(video)


def test_too_few_frames_for_a_non_causal_model():
    with pytest.raises(ValueError, match="3 frames.*at least 4"):
        make(causal=False).encode(clip(3))


def test_tokens_that_are_refused():
    model = make()
    tokens = model.encode(clip())
    for bad, error, message in (
        (tokens.indices, TypeError, "not Tensor"),
        (replace(tokens, model="cosmos/x"), ValueError, "cosmos/x"),
        (make(version="1.1").encode(clip()), ValueError, "come from a 'vidtok/custom' model"),
        (replace(tokens, video_shape=(9, 16, 8)), ValueError, r"\(2, 4, 2\) positions.*\(3, 4, 2\)"),
        (replace(tokens, indices=tokens.indices + 1600), ValueError, "codebook has 1600"),
        (replace(tokens, indices=tokens.indices - 1600), ValueError, "codebook has 1600"),
    ):
        with pytest.raises(error, match=message):
            model.decode(bad)


def test_latents_that_are_refused():
    model = make(regularizer="kl", levels=None)
    tokens = model.encode(clip())
    with pytest.raises(ValueError, match="3 channels, the model has 4"):
        model.decode(replace(tokens, latents=tokens.latents[:, :3]))
    with pytest.raises(ValueError, match="NaN"):
        model.decode(replace(tokens, latents=tokens.latents * float("nan")))


# Files


def test_tokens_file(tmp_path):
    for model in (make(), make(regularizer="kl", levels=None)):
        tokens = model.encode(clip(batch=2))
        path = tmp_path / "tokens.safetensors"
        tokens.save(path)
        loaded = Tokens.load(path)
        assert torch.equal(loaded.data, tokens.data) and loaded.data.dtype == tokens.data.dtype
        for field in ("model", "config", "video_shape", "dtype"):
            assert getattr(loaded, field) == getattr(tokens, field), field
        # PyTorch rounds by layout on some processors, and a file has one layout.
        kept = {k: v.contiguous() for k in ("indices", "latents") if (v := getattr(tokens, k)) is not None}
        assert torch.equal(model.decode(loaded), model.decode(replace(tokens, **kept)))
    assert [p.name for p in tmp_path.iterdir()] == ["tokens.safetensors"]


def test_damaged_tokens_files(tmp_path):
    path = tmp_path / "tokens.safetensors"
    with pytest.raises(FileNotFoundError, match="tokens.safetensors"):
        Tokens.load(path)
    make().encode(clip()).save(path)
    whole = path.read_bytes()
    for content, message in (
        (whole[:-1] + bytes([whole[-1] ^ 1]), "checksum"),
        (whole.replace(b"[5, 16, 8]", b"[1, 16, 8]"), "checksum"),
        (whole[:-4], "truncated"),
        (whole[:20], "truncated"),
        (b"", "truncated"),
    ):
        assert content != whole
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            Tokens.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a tokens file"):
        Tokens.load(path)


def test_nothing_half_written(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary):
        with open(temporary, "w") as file:
            file.write("new, but")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="file: .*No space left"):
        write_atomically(path, write)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="absent"):
        make().save(tmp_path / "absent" / "model.safetensors")


def test_checkpoints(tmp_path):
    model, video = make(), clip()
    expected, state = model(video), model.state_dict()
    model.save(tmp_path / "ours.safetensors")
    lightning = {"state_dict": {**state, "loss.discriminator.weight": torch.zeros(3)}, "epoch": 3}
    torch.save(lightning, tmp_path / "lightning.ckpt")
    torch.save(state, tmp_path / "plain.pt")
    save_file(state, tmp_path / "bare.safetensors")
    for name, config in (
        ("ours.safetensors", None),
        ("lightning.ckpt", FSQ),
        ("plain.pt", FSQ),
        ("bare.safetensors", VidTokConfig(**FSQ)),
    ):
        loaded = VidTok.from_checkpoint(tmp_path / name, config)
        assert torch.equal(loaded(video), expected), name
        assert all(p.requires_grad and not p.is_meta for p in loaded.parameters())
    double = VidTok.from_checkpoint(tmp_path / "ours.safetensors", dtype=torch.float64)
    assert double.decoder.conv_in.conv.weight.dtype == torch.float64
    with pytest.raises(ValueError, match="does not say what model"):
        VidTok.from_checkpoint(tmp_path / "plain.pt")


def test_a_file_of_before_the_systems_had_one_format(tmp_path):
    model, path = make(), tmp_path / "old.safetensors"
    save_file(model.state_dict(), path, {"vidtok_config": json.dumps(model.config.to_dict())})
    loaded = VidTok.from_checkpoint(path)
    assert loaded.config == model.config and torch.equal(loaded(clip()), model(clip()))
    with pytest.raises(ValueError, match="holds a 'vidtok' model, not 'promag'"):
        ProMAG.from_checkpoint(path)


def test_what_a_tokenizer_says_of_its_tokens():
    """As of every system: the size of the codebook, or the channels of a latent; a token for each position of
    the grid."""
    fsq, kl = make(), make(regularizer="kl", levels=None)
    assert fsq.codebook_size == 8 * 8 * 5 * 5 and not hasattr(fsq, "latent_channels")
    assert kl.latent_channels == 4 and not hasattr(kl, "codebook_size")
    assert fsq.token_grid(5, 16, 8) == fsq.latent_shape(5, 16, 8) == fsq.encode(clip()).grid


def test_bad_checkpoints(tmp_path):
    path = tmp_path / "model.ckpt"
    with pytest.raises(FileNotFoundError, match="model.ckpt"):
        VidTok.from_checkpoint(path, FSQ)
    state = make().state_dict()
    torch.save({"state_dict": state}, path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:100], b"", b"not a checkpoint", b"hello\n", b"j\x00"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="model.ckpt"):
            VidTok.from_checkpoint(path, FSQ)
    torch.save({"state_dict": state, "when": object()}, path)
    with pytest.raises(ValueError, match="Python objects"):
        VidTok.from_checkpoint(path, FSQ)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="no state dict"):
        VidTok.from_checkpoint(path, FSQ)
    changed = {key: value for key, value in state.items() if key != "encoder.conv_in.conv.bias"}
    changed["encoder.extra"] = torch.zeros(1)
    changed["decoder.conv_out.conv.bias"] = torch.zeros(5)
    torch.save(changed, path)
    with pytest.raises(ValueError, match="does not fit") as caught:
        VidTok.from_checkpoint(path, FSQ)
    for part in (
        "1 missing: encoder.conv_in.conv.bias",
        "1 unknown: encoder.extra",
        r"decoder.conv_out.conv.bias (5,) instead of (3,)",
    ):
        assert part in str(caught.value)


# Training


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"version": "1.1", "interpolation_mode": "trilinear"},
        {"causal": False},
        {"regularizer": "kl", "levels": None},
    ],
    ids=["1.0", "1.1", "non-causal", "kl"],
)
def test_gradients_reach_every_parameter(fields):
    model = make(**fields).train()
    result = model.reconstruct(clip(8), step=100)
    (result.video.square().mean() + result.loss).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_forward_is_differentiable_in_the_video():
    video = clip().requires_grad_()
    make()(video).sum().backward()
    assert video.grad.isfinite().all() and video.grad.any()


def test_large_latents_give_finite_losses():
    """At 2 * 100 * z . code most probabilities underflow to zero."""
    for clamp in (False, True):
        layer = FSQRegularizer(
            (8, 8, 5), entropy_loss_weight=0.1, commitment_loss_weight=0.25, clamp_entropy=clamp
        )
        z = (100 * torch.randn(1, 3, 2, 4, 4)).requires_grad_()
        loss = layer(z, step=0).loss
        loss.backward()
        assert loss.isfinite() and z.grad.isfinite().all()


def test_factorized_entropy_is_the_dense_one():
    torch.manual_seed(0)
    layer = FSQRegularizer((4, 3, 5), entropy_loss_weight=1.0, inv_temperature=2.0)
    z = torch.randn(2, 3, 2, 3, 4, dtype=torch.float64)
    codebook = layer.decode(torch.arange(60).unsqueeze(0), torch.float64)[0].T
    p = torch.softmax(4.0 * z.movedim(1, -1).reshape(-1, 3) @ codebook.T, dim=-1)
    mean = p.mean(0)
    expected = torch.special.entr(p).sum(-1).mean() - torch.special.entr(mean).sum()
    assert mean.min() > 1e-5  # so that the clamp does nothing
    torch.testing.assert_close(layer(z, step=0).loss, expected, rtol=1e-12, atol=0)


def test_codes_and_indices():
    layer = FSQRegularizer((8, 5, 26))
    indices = torch.arange(8 * 5 * 26, dtype=torch.int32).reshape(1, -1, 1, 1)
    codes = layer.decode(indices)
    # The first channel runs fastest.
    assert torch.equal(codes[0, :, 1, 0, 0] - codes[0, :, 0, 0, 0], torch.tensor([0.25, 0.0, 0.0]))
    half_width = torch.tensor([4.0, 2.0, 13.0])[:, None, None, None]
    offset, reach, shift = (t[:, None, None, None] for t in (layer.offset, layer.reach, layer.shift))
    z = torch.atanh((codes * half_width + offset) / reach) - shift
    result = layer(z)
    assert torch.equal(result.indices, indices) and torch.equal(result.codes, codes)


def test_gaussian_latent():
    layer = KLRegularizer()
    mean, logvar = torch.randn(2, 3, 2, 2, 2), torch.randn(2, 3, 2, 2, 2)
    z = torch.cat((mean, logvar), dim=1)
    codes, _, loss = layer(z, step=0)
    normal = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum() / 2
    assert torch.equal(codes, mean)
    torch.testing.assert_close(loss, expected)
    torch.manual_seed(0)
    draws = torch.stack([layer(z, sample=True).codes for _ in range(2000)])
    assert ((draws.mean(0) - mean).abs() < 5 * normal.stddev / 2000**0.5).all()
    model = make(regularizer="kl", levels=None)
    assert torch.equal(model.reconstruct(clip()).video, model.reconstruct(clip()).video)
    model.train()
    assert not torch.equal(model.reconstruct(clip()).video, model.reconstruct(clip()).video)


def test_a_file_that_is_no_file_is_not_replaced(tmp_path):
    (tmp_path / "real.safetensors").write_bytes(b"")
    link = tmp_path / "link.safetensors"
    link.symlink_to("real.safetensors")
    VidTok("tiny").save(link)
    assert link.is_symlink() and (tmp_path / "real.safetensors").stat().st_size > 1000
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        VidTok("tiny").save(tmp_path / "pipe")


def test_thresholds_survive_a_narrower_model():
    layer = FSQRegularizer((8, 8, 5))
    expected = layer.reach.clone()
    assert torch.equal(layer.bfloat16().reach, expected) and torch.equal(
        layer.half().shift, FSQRegularizer((8, 8, 5)).shift
    )
