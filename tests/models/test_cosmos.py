"""The Cosmos tokenizer: structure, files, tokens, what it refuses, windows, acceleration.

test_golden.py compares it with the official code.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from support import tokenizer_contract as contract

import vtok_fast
from vtok_fast import parity
from vtok_fast.models import Cosmos, CosmosConfig
from vtok_fast.models.common.windows import WindowStream
from vtok_fast.models.cosmos import blocks
from vtok_fast.models.cosmos.checkpoint import CONSTANTS
from vtok_fast.models.cosmos.patcher import Patcher, UnPatcher, haar

SMALL = {
    "channels": 8,
    "channels_mult": (1, 2, 2),
    "num_res_blocks": 1,
    "patch_size": 2,
    "temporal_compression": 4,
    "z_channels": 8,
}
FSQ = {**SMALL, "levels": (8, 5, 5)}
AE = {**SMALL, "formulation": "AE", "latent_channels": 3}
VAE = {**AE, "formulation": "VAE", "z_factor": 2}
KINDS = {"FSQ": FSQ, "AE": AE, "VAE": VAE, "FSQ predict1": {**FSQ, "layout": "predict1"}}


def make(kind: str = "FSQ", **fields) -> Cosmos:
    # So that frames differ behind the quantizer
    return contract.randomize(Cosmos(**{**KINDS[kind], **fields}), std=0.3)


# Structure


@pytest.mark.parametrize(
    ("name", "millions"),
    [("predict1-DV4x8x8-360p", 112.6), ("predict1-DV8x16x16-720p", 110.9), ("predict1-CV8x8x8-720p", 105.7)],
)
def test_sizes_of_the_released_models(name, millions):
    with torch.device("meta"):
        model = Cosmos(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("name", CosmosConfig.presets)
def test_presets(name):
    config = CosmosConfig.get(name)
    if name != "tiny":
        time, height, width = (int(part) for part in name.split("V")[1].split("-")[0].split("x"))
        assert (config.temporal_compression, config.spatial_compression, width) == (time, height, height)
        assert (config.formulation == "FSQ") == ("-DV" in name)
    with torch.device("meta"):
        model = Cosmos(config)
    assert any(key.endswith("wavelets") for key in model.state_dict()) == (config.layout == "predict1")
    assert CosmosConfig.get(config.to_dict()) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"config": "0.1-DV1x1x1"}, "0.1-DV1x1x1.*0.1-DV4x8x8"),
        ({"levels": None}, "levels=None"),
        ({"levels": (8, 1)}, "at least 2"),
        ({"levels": (2**16, 2**16)}, "2\\*\\*31"),
        ({"formulation": "AE", "latent_channels": 4}, "no levels"),
        ({"formulation": "VAE", "levels": None, "latent_channels": 4}, "z_factor=1"),
        ({"patch_size": 3}, "patch_size=3"),
        ({"temporal_compression": 1}, "temporal_compression=1"),
        ({"spatial_compression": 32}, "spatial_compression=32: the encoder gives 8"),
        (
            {"channels_mult": (1, 2)},
            "temporal_compression=4: the decoder gives 2|spatial_compression=8: the encoder gives 4",
        ),
        ({"decoder_channels_mult": (1, 2)}, "the decoder gives"),
        ({"color": "blue"}, "color"),
    ],
)
def test_impossible_structures(fields, message):
    with pytest.raises(ValueError, match=message):
        Cosmos(**fields) if "config" in fields else Cosmos(**{**FSQ, **fields})


# The patcher


def test_haar_is_what_its_definition_says():
    """Signed sums over 2x2x2, divided by 8, in integers: exact."""
    x = torch.randint(-99, 99, (2, 3, 4, 6, 8)).double()
    y = haar(x)
    cubes = x.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, C, t, 2, h, 2, w, 2)
    for band, high in enumerate(itertools.product((0, 1), repeat=3)):
        expected = cubes
        for axis, is_high in zip((7, 5, 3), reversed(high), strict=True):
            first, second = expected.unbind(axis)
            expected = first - second if is_high else first + second
        assert torch.equal(y[:, 3 * band : 3 * band + 3], expected / 8)


@pytest.mark.parametrize("method", ["haar", "rearrange"])
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches_and_back(method, patch):
    """Multiples of 2^-3 survive sums and halvings exactly; random ones to rounding."""
    x = torch.randint(-8, 8, (2, 3, 1 + 2 * patch, 8, 4)).float() / 8
    y = Patcher(patch, method)(x)
    assert y.shape == (2, 3 * patch**3, 3, 8 // patch, 4 // patch)
    assert torch.equal(UnPatcher(patch, method)(y), x)


# Encoding and decoding


@pytest.mark.parametrize("kind", KINDS)
def test_the_common_contract(kind, tmp_path):
    contract.check_tokens(make(kind), contract.clip(2, 3, 5, 16, 8), tmp_path / "clip.tokens")
    contract.check_refusals(make(kind), contract.clip(1, 3, 5, 16, 8))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    contract.check_gradients(make(kind), contract.clip(1, 3, 5, 16, 16))


def test_gaussian_latent_is_sampled_in_training_only():
    model, video = make("VAE"), contract.clip(1, 3, 5, 16, 16)
    assert torch.equal(model.reconstruct(video).video, model(video))
    model.train()
    assert not torch.equal(model.reconstruct(video).video, model.reconstruct(video).video)
    assert model.reconstruct(video).loss > 0


@pytest.mark.parametrize("frames", [1, 2, 4, 5, 7])
def test_every_length_comes_back(frames):
    model, video = make(), contract.clip(1, 3, frames, 8, 8)
    assert model.encode(video).grid == (1 + -(-(frames - 1) // 4), 1, 1)
    assert model(video).shape == video.shape
    filled = torch.cat((video, *[video[:, :, -1:]] * (-(frames - 1) % 4)), dim=2)
    assert torch.equal(model(video), model(filled)[:, :, :frames])


def test_a_later_frame_changes_no_earlier_one():
    model, video = make(), contract.clip(1, 3, 9, 16, 8)
    changed = video.clone()
    changed[:, :, 5:] *= -1
    before, after = model.encode(video).indices, model.encode(changed).indices
    assert torch.equal(before[:, :2], after[:, :2]) and not torch.equal(before[:, 2:], after[:, 2:])
    assert torch.equal(model(video)[:, :, :5], model(changed)[:, :, :5])


# Files


def test_files(tmp_path):
    contract.check_files(make(), contract.clip(1, 3, 5, 16, 8), tmp_path)


def test_constants_of_the_other_layout(tmp_path):
    """A file with constants is read into a model without, and the other way round; values of the model's own
    are kept."""
    with_them, video = make("FSQ predict1"), contract.clip(1, 3, 5, 16, 8)
    constants = {key for key in with_them.state_dict() if key.rpartition(".")[2] in CONSTANTS}
    assert len(constants) == 8
    state = {key: value for key, value in with_them.state_dict().items() if key not in constants}
    torch.save(state, tmp_path / "without.pt")
    loaded = Cosmos.from_checkpoint(tmp_path / "without.pt", with_them.config)
    assert loaded.state_dict().keys() == with_them.state_dict().keys()
    assert all(
        torch.equal(loaded.state_dict()[key], with_them.state_dict()[key]) for key in loaded.state_dict()
    )
    assert torch.equal(loaded(video), with_them(video))


class Part(torch.nn.Sequential):
    """The order of a released encoder.jit or decoder.jit."""


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_torchscript_files(tmp_path):
    tiny = {"channels": 4, "channels_mult": (1, 1), "spatial_compression": 4, "legacy_mode": True}
    model, video = make("AE", **tiny), contract.clip(1, 3, 5, 8, 8)
    latent = model.encode(video).latents
    halves = {
        "encoder": (("encoder", "quant_conv"), video),
        "decoder": (("post_quant_conv", "decoder"), latent),
    }
    for name, (parts, example) in halves.items():
        part = Part()
        for key in parts:
            part.add_module(key, getattr(model, key))
        torch.jit.trace(part, example, check_trace=False).save(tmp_path / f"{name}.jit")
    torch.jit.trace(model, video, check_trace=False).save(tmp_path / "model.jit")
    for path in (tmp_path, tmp_path / "model.jit"):
        assert torch.equal(Cosmos.from_checkpoint(path, model.config)(video), model(video))
    with pytest.raises(ValueError, match="does not fit.*missing"):
        Cosmos.from_checkpoint(tmp_path / "encoder.jit", model.config)
    (tmp_path / "decoder.jit").write_bytes((tmp_path / "decoder.jit").read_bytes()[:999])
    with pytest.raises(ValueError, match="truncated"):
        Cosmos.from_checkpoint(tmp_path, model.config)
    with pytest.raises(FileNotFoundError, match="decoder.jit"):
        (tmp_path / "decoder.jit").unlink()
        Cosmos.from_checkpoint(tmp_path, model.config)


# Windows


def run(stream: WindowStream, video: torch.Tensor) -> list[torch.Tensor]:
    tokens = [stream.encode_chunk(video[:, :, a:b]) for a, b in stream.chunks(video.shape[2])]
    return [
        stream.decode_chunk(part, lookahead=after)
        for part, after in zip(tokens, [*tokens[1:], None], strict=True)
    ]


@pytest.mark.parametrize("frames", [1, 3, 5, 6, 8, 14])
@pytest.mark.parametrize("overlap", [0, 2])
def test_windows(frames, overlap):
    """Frames of one window alone are its own; shared ones are mixed with weights that fall linearly."""
    model, video = make(), contract.clip(1, 3, frames, 8, 8)
    stream = model.stream(5, overlap)
    result = torch.cat(run(stream, video), dim=2)
    expected, weights = torch.zeros_like(video), torch.zeros(frames)
    windows = stream.chunks(frames)
    assert windows[0][0] == 0 and windows[-1][1] == frames and all(b - a <= 5 for a, b in windows)
    for i, (start, end) in enumerate(windows):
        part, weight = model(video[:, :, start:end]), torch.ones(end - start)
        ramp = torch.arange(1, overlap + 1) / (overlap + 1)
        if i:
            weight[:overlap] = ramp
        if i + 1 < len(windows):
            weight[-overlap or end :] *= 1 - ramp
        expected[:, :, start:end] += weight[:, None, None] * part
        weights[start:end] += weight
    torch.testing.assert_close(weights, torch.ones(frames))
    torch.testing.assert_close(result, expected)


def test_windows_refuse():
    model = make()
    for size, overlap, message in ((4, 0, "size=4"), (5, 5, "overlap=5"), (5, -1, "overlap=-1")):
        with pytest.raises(ValueError, match=message):
            model.stream(size, overlap)
    stream = model.stream(5, 2)
    with pytest.raises(ValueError, match="frames=0"):
        stream.chunks(0)
    with pytest.raises(ValueError, match="at most 5 frames, not 9"):
        stream.encode_chunk(contract.clip(1, 3, 9, 8, 8))
    tokens = stream.encode_chunk(contract.clip(1, 3, 5, 8, 8))
    stream.decode_chunk(tokens, lookahead=tokens)
    with pytest.raises(ValueError, match="reset"):
        stream.decode_chunk(stream.encode_chunk(contract.clip(1, 3, 5, 16, 8)))


# Acceleration


BLOCKS = {
    "residual": lambda: blocks.ResBlock(16, 24),
    "residual, same width": lambda: blocks.ResBlock(16, 16, groups=4),
    "spatial attention": lambda: blocks.SpatialAttention(16),
    "temporal attention": lambda: blocks.TemporalAttention(16),
    "down": lambda: blocks.HybridDown(16),
    "down, time alone": lambda: blocks.HybridDown(16, spatial=False),
    "up": lambda: blocks.HybridUp(16),
    "up, space alone": lambda: blocks.HybridUp(16, temporal=False, unused=False),
    "convolution": lambda: blocks.CausalConv3d(16, 8, (3, 3, 3)),
    "norm": lambda: blocks.Norm(16),
}


def outputs(module: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The result and all gradients. A bias of k moves every score of a softmax by the same amount: its
    gradient is rounding noise."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(contract.clip(*y.shape, seed=2).to(y.dtype))
    grads = {
        name: p.grad.clone()
        for name, p in module.named_parameters()
        if p.grad is not None and name != "k.conv3d.bias"
    }
    return {"y": y.detach(), "x": x.grad, **grads}


@pytest.mark.needs_native
@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize("name", BLOCKS)
def test_each_accelerated_block_is_close(name, frames):
    module, x = contract.randomize(BLOCKS[name](), std=0.3), contract.clip(2, 16, frames, 12, 10)
    with vtok_fast.backend("reference"):
        eager, ref64 = outputs(module, x), outputs(copy.deepcopy(module).double(), x.double())
    with vtok_fast.accelerated(module, check=False) as report:
        assert [entry.path for entry in report.swapped] == [""]
        fast = outputs(module, x)
    assert fast.keys() == ref64.keys()
    for key, expected in ref64.items():
        measured = parity.close(fast[key], expected, eager[key])
        zero = frames == 1 and name == "temporal attention" and key[0] in "qk"  # one key: no score matters
        assert measured.ok or (zero and not expected.any()), f"{key}: {measured}"


@pytest.mark.needs_native
@pytest.mark.parametrize("kind", ["FSQ", "VAE"])
def test_acceleration(kind):
    """A whole model: every block swapped within its contract, tokens equal except for latents at a threshold,
    and gradients as near to those in float64 as a float32 implementation must come (errors of forty layers
    add up: the contract is each layer's)."""
    model, video = make(kind, channels=16, attn_resolutions=(512,)), contract.clip(1, 3, 5, 32, 32)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = outputs(copy.deepcopy(model).double(), video.double())
    before = model(video)
    report = vtok_fast.accelerate(model, example=video)
    assert not [entry for entry in report.skipped if entry.error is not None], report
    kinds = {entry.kind for entry in report.swapped}
    assert {
        "ResBlock",
        "SpatialAttention",
        "TemporalAttention",
        "HybridDown",
        "HybridUp",
        "CausalConv3d",
    } <= kinds
    assert (kind == "FSQ") == ("FSQuantizer" in kinds)
    assert not [entry for entry in report.skipped if entry.kind in kinds and "passes" not in entry.why], (
        report
    )
    for tokens in report.tokens:
        assert tokens.ok and tokens.total == 2 * 4 * 4
    fast = outputs(model, video)
    for part in ("y", "x", "encoder", "decoder"):
        a, b = (
            torch.cat([v.double().flatten() for k, v in values.items() if k.startswith(part)])
            for values in (fast, expected)
        )
        assert (a - b).norm() <= 1e-5 * b.norm(), part
    report.revert()
    assert torch.equal(model(video), before)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@pytest.mark.needs_native
def test_acceleration_in_bfloat16():
    model, video = make().bfloat16(), contract.clip(1, 3, 5, 16, 16, dtype=torch.bfloat16)
    report = vtok_fast.accelerate(model)
    assert not [entry for entry in report.skipped if entry.error is not None], report
    assert model(video).isfinite().all()
