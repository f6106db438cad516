"""Models that no adapter was made for come out correct: swapped by the general rule, or untouched."""

import copy

import pytest
import torch

import vtok_fast
from vtok_fast import parity

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from support import swap_contract as contract  # noqa: E402

pytestmark = pytest.mark.needs_native
FOUR = (16, 16, 16, 16)
LTX = {
    "latent_channels": 8,
    "block_out_channels": (8,) * 4,
    "decoder_block_out_channels": (8,) * 4,
    "layers_per_block": (1,) * 5,
    "decoder_layers_per_block": (1,) * 5,
    "patch_size": 1,
    "spatio_temporal_scaling": (True, True, False, False),
    "decoder_spatio_temporal_scaling": (True, True, False, False),
}
MODELS = {
    "QwenImage": (
        "AutoencoderKLQwenImage",
        {
            "base_dim": 16,
            "z_dim": 4,
            "num_res_blocks": 1,
            "latents_mean": [0.0] * 4,
            "latents_std": [1.0] * 4,
        },
        (1, 3, 5, 32, 32),
        "QwenImageCausalConv3d",
    ),
    "LTX": ("AutoencoderKLLTXVideo", LTX, (1, 3, 9, 32, 32), "LTXVideoCausalConv3d"),
    "Mochi": (
        "AutoencoderKLMochi",
        {
            "latent_channels": 4,
            "encoder_block_out_channels": (32,) * 4,
            "decoder_block_out_channels": (32,) * 4,
            "layers_per_block": (1,) * 5,
        },
        (1, 3, 7, 32, 32),
        "MochiResnetBlock3D",
    ),
    "EasyAnimate": (
        "AutoencoderKLMagvit",
        {
            "latent_channels": 4,
            "block_out_channels": FOUR,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "down_block_types": ("SpatialDownBlock3D",) + ("SpatialTemporalDownBlock3D",) * 3,
            "up_block_types": ("SpatialUpBlock3D",) + ("SpatialTemporalUpBlock3D",) * 3,
        },
        (1, 3, 9, 32, 32),
        None,
    ),
    "HunyuanVideo 1.5": (
        "AutoencoderKLHunyuanVideo15",
        {"latent_channels": 4, "block_out_channels": (16, 16, 32, 32, 32), "layers_per_block": 1},
        (1, 3, 5, 32, 32),
        "HunyuanVideo15CausalConv3d",
    ),
    "Stable Diffusion": (
        "AutoencoderKL",
        {
            "block_out_channels": (16, 32),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "norm_num_groups": 4,
        },
        (2, 3, 32, 32),
        "Conv2d",
    ),
}


def make(name):
    kind, options, size, swapped = MODELS[name]
    if not hasattr(diffusers, kind):
        pytest.skip(f"this diffusers has no {kind}")
    torch.manual_seed(0)
    return contract.randomize(getattr(diffusers, kind)(**options)), contract.noise(*size), swapped


@torch.no_grad()
def results(model, x, z=None):
    encoded = model.encode(x).latent_dist
    return encoded.parameters, model.decode(encoded.mode() if z is None else z).sample


@pytest.mark.parametrize("name", MODELS)
def test_they_stay_correct(name):
    model, x, swapped = make(name)
    z = model.encode(x).latent_dist.mode().detach()
    eager, ref64 = results(model, x, z), results(copy.deepcopy(model).double(), x.double(), z.double())
    report = vtok_fast.accelerate(model)
    assert not any("failed" in e.why for e in report.skipped), report
    assert swapped is None or any(e.kind == swapped for e in report.swapped), report
    for _ in range(2):  # the second video: nothing of the first is left behind
        for y, e, r in zip(results(model, x, z), eager, ref64):
            # Each module meets its contract; a chain of fifty is allowed what fifty may add up to.
            errors, bound = parity.relative_errors(y, r), parity.relative_errors(e, r)
            assert all(errors[k] <= max(4 * bound[k], 64 * torch.finfo(torch.float32).eps) for k in errors), (
                errors
            )
    report.revert()
    for y, e in zip(results(model, x, z), eager):
        assert torch.equal(y, e)


def test_convolutions_are_still_counted_by_class():
    """QwenImage counts them at each call: a module of another class would leave its feature cache too
    short."""
    model, x, _ = make("QwenImage")
    vtok_fast.accelerate(model, check=False)
    before = model.clear_cache()
    count = model._conv_num
    assert before is None and count > 0
    results(model, x)
    model.clear_cache()
    assert model._conv_num == count


def test_noise_that_a_decoder_adds_is_the_same():
    """LTX draws from torch.randn with a generator: order and shapes of the draws must stay."""
    if not hasattr(diffusers, "AutoencoderKLLTXVideo"):
        pytest.skip("this diffusers has no AutoencoderKLLTXVideo")
    torch.manual_seed(0)
    options = LTX | {"decoder_inject_noise": (True,) * 5, "timestep_conditioning": True}
    model = contract.randomize(diffusers.AutoencoderKLLTXVideo(**options))
    z, temb = contract.noise(1, 8, 3, 8, 8), torch.tensor([0.05])

    def decode():
        torch.manual_seed(3)
        with torch.no_grad():
            return model.decode(z, temb).sample

    expected = decode()
    report = vtok_fast.accelerate(model)
    assert report.swapped
    torch.testing.assert_close(decode(), expected, rtol=1e-3, atol=1e-4)
