"""diffusers' AutoencoderKLLTXVideo and AutoencoderKLLTX2Video: one kind of block, told at construction or
at each call whether it is causal."""

import copy

import pytest
import torch
from torch import nn

import vtok_fast
from vtok_fast import parity

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from support import swap_contract as contract  # noqa: E402

pytestmark = pytest.mark.needs_native
SMALL = {
    "latent_channels": 8,
    "block_out_channels": (16, 16, 32, 32),
    "decoder_block_out_channels": (16, 16, 32, 32),
    "layers_per_block": (1,) * 5,
    "decoder_layers_per_block": (1,) * 5,
    "patch_size": 2,
    "spatio_temporal_scaling": (True, True, False, False),
    "decoder_spatio_temporal_scaling": (True, True, False, False),
}
LTX_095 = {  # blocks that move positions to channels, with residuals
    "latent_channels": 8,
    "block_out_channels": (16, 16, 32, 32),
    "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
    "decoder_block_out_channels": (16, 32),
    "layers_per_block": (1,) * 5,
    "decoder_layers_per_block": (1,) * 3,
    "spatio_temporal_scaling": (True, True, True, True),
    "decoder_spatio_temporal_scaling": (True, True),
    "decoder_inject_noise": (False,) * 3,
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "conv"),
    "upsample_residual": (True, False),
    "upsample_factor": (2, 2),
    "patch_size": 1,
}
LTX_2 = {
    "latent_channels": 8,
    "block_out_channels": (16, 16, 32, 32),
    "decoder_block_out_channels": (16, 32, 64),
    "layers_per_block": (1,) * 5,
    "decoder_layers_per_block": (1,) * 4,
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "conv"),
    "patch_size": 1,
}


def ltx(**options):
    return diffusers.AutoencoderKLLTXVideo(**options)


class OfLTX(contract.Trained, contract.SwapContract):
    part = "decoder.mid_block.resnets.0"
    left_alone = {"SiLU"}
    tiling = (32, 32, 16, 24, 24, 8)

    def encode(self, model, x):
        return model.encode(x).latent_dist.parameters

    def decode(self, model, z):
        return model.decode(z).sample

    def example(self, x):
        return x

    @pytest.mark.parametrize("frames", [1, 17])
    def test_any_number_of_frames(self, model, x, z, frames):
        _, channels, _, height, width = self.latent
        x = contract.noise(1, 3, frames, *self.video[3:])
        self.check(model, x, contract.noise(1, channels, (frames + 7) // 8, height, width))

    def test_batches(self, model):
        self.check(model, contract.noise(2, *self.video[1:]), contract.noise(3, *self.latent[1:]))

    def test_tiles(self, model):
        fast = copy.deepcopy(model)
        vtok_fast.accelerate(fast, check=False)
        for m in (model, fast):
            m.enable_tiling(*self.tiling)
        x = contract.noise(1, 3, 9, 64, 64)
        z = contract.noise(1, self.latent[1], 2, 8, 8)
        for y, e in zip(self.results(fast, x, z), self.results(model, x, z)):
            torch.testing.assert_close(y, e, rtol=1e-3, atol=1e-3)


class TestLTX(OfLTX):
    video, latent = (1, 3, 9, 32, 48), (1, 8, 3, 4, 6)

    def make(self):
        return ltx(**SMALL)

    def test_a_pixel_norm_in_the_place_of_the_norm_is_used(self, model, x, z):
        """A norm of another class stays what it is, and so does its block."""
        block = model.decoder.mid_block.resnets[0]
        block.norm1 = nn.LayerNorm(block.conv1.in_channels)
        report = self.check(model, x, z)
        assert any(e.path == self.part and "LayerNorm" in e.why for e in report.skipped)

    @pytest.mark.slow
    def test_a_larger_picture(self, model):
        self.check(model, contract.noise(1, 3, 9, 256, 256), contract.noise(1, 8, 3, 32, 32))


@pytest.mark.slow
class TestLTX095(OfLTX):
    video, latent = (1, 3, 9, 32, 48), (1, 8, 2, 8, 12)
    exact_swaps = False  # no convolution pads nothing

    def make(self):
        return ltx(**LTX_095)

    @pytest.mark.parametrize("frames", [1, 17])
    def test_any_number_of_frames(self, model, x, z, frames):
        super().test_any_number_of_frames(model, x, z, frames)


@pytest.mark.slow
class TestLTX2(OfLTX):
    video, latent = (1, 3, 9, 32, 48), (1, 8, 2, 4, 6)
    exact_swaps = False
    tiling = (64, 64, 16, 48, 48, 8)  # a tile of one latent has no edge to reflect

    def make(self):
        if not hasattr(diffusers, "AutoencoderKLLTX2Video"):
            pytest.skip("this diffusers has no AutoencoderKLLTX2Video")
        return diffusers.AutoencoderKLLTX2Video(**LTX_2)

    def test_nothing_is_left_to_the_class(self, model, x, z):
        report = vtok_fast.accelerate(model)
        self.results(model, x, z)
        assert not report.bypassed and not any(e.kind.startswith("LTX2") for e in report.skipped), report

    @pytest.mark.parametrize("causal", [True, False])
    def test_causal_as_the_call_says(self, model, x, z, causal):
        fast = copy.deepcopy(model)
        vtok_fast.accelerate(fast, check=False)
        with torch.no_grad():
            for run in (
                lambda m: m.encode(x.to(next(m.parameters()).dtype), causal=causal).latent_dist.parameters,
                lambda m: m.decode(z.to(next(m.parameters()).dtype), causal=causal).sample,
            ):
                assert (p := parity.close(run(fast), run(copy.deepcopy(model).double()), run(model))).ok, p


def conditioned():
    """The class cannot change channels where it is conditioned on a time step."""
    options = {"decoder_inject_noise": (True,) * 5, "timestep_conditioning": True}
    return contract.randomize(ltx(**SMALL | {"decoder_block_out_channels": (16,) * 4} | options))


def test_time_steps_and_noise():
    """Norms are modulated, and noise is drawn in the same order and shapes as without the swap."""
    torch.manual_seed(0)
    model = conditioned()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "per_channel_scale" in name:
                p.normal_(0, 0.1)
    z, step = contract.noise(1, 8, 3, 4, 6), torch.tensor([0.05])

    def decode(model):
        torch.manual_seed(3)
        with torch.no_grad():
            return model.decode(z, step).sample

    expected = decode(model)
    report = vtok_fast.accelerate(model)
    assert sum(e.kind == "LTXVideoResnetBlock3d" for e in report.swapped) == sum(
        type(m).__name__ == "LTXVideoResnetBlock3d" for m in model.modules()
    )
    torch.testing.assert_close(decode(model), expected, rtol=1e-3, atol=1e-4)


def test_a_conditioned_model_against_float64():
    torch.manual_seed(0)
    model = conditioned()  # noise of weight zero
    z = contract.noise(2, 8, 3, 4, 6)
    with torch.no_grad():
        eager = model.decode(z, torch.tensor([0.05, 0.5])).sample
        ref64 = copy.deepcopy(model).double().decode(z.double(), torch.tensor([0.05, 0.5]).double()).sample
        vtok_fast.accelerate(model, check=False)
        y = model.decode(z, torch.tensor([0.05, 0.5])).sample
    assert parity.relative_errors(y, ref64)["whole"] <= 2 * parity.relative_errors(eager, ref64)["whole"]


def test_a_hook_that_comes_later_is_called():
    torch.manual_seed(0)
    model, z, seen = contract.randomize(ltx(**SMALL)), contract.noise(1, 8, 3, 4, 6), []
    report = vtok_fast.accelerate(model, check=False)
    for path in ("decoder.mid_block.resnets.0.norm1", "decoder.up_blocks.3.upsamplers.0.conv.conv"):
        model.get_submodule(path).register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="has hooks"):
        model.decode(z)
    assert len(seen) == 2 and len(report.bypassed) == 2


@pytest.mark.slow
def test_in_graphs():
    torch.manual_seed(0)
    model, z = contract.randomize(ltx(**SMALL)), contract.noise(1, 8, 3, 4, 6)
    vtok_fast.accelerate(model, check=False)
    with torch.no_grad():
        expected = model.decoder(z)
        compiled = torch.compile(model.decoder, backend="aot_eager", fullgraph=True, dynamic=False)
        torch.testing.assert_close(compiled(z), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("width", (16, 32))
def test_the_error_of_the_whole_model_is_that_of_its_layers_together(width):
    """At most what the layers' errors make in quadrature, and not far below: the bound is met for its
    reason."""
    torch.manual_seed(0)
    widths, layers = (width, width, 32, 32), (1,) * 5
    model = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=widths,
        decoder_block_out_channels=widths,
        layers_per_block=layers,
        decoder_layers_per_block=layers,
    ).eval()

    class Pass(nn.Module):
        def __init__(self):
            super().__init__()
            self.vae = model

        def forward(self, x):
            return self.vae.decode(self.vae.encode(x).latent_dist.mode()).sample

    report = vtok_fast.accelerate(Pass().eval(), example=contract.noise(1, 3, 9, 64, 64))
    whole = report.end_to_end
    assert whole.error <= whole.bound and not whole.why
    assert whole.bound / 6 <= whole.error <= whole.bound / 2 * 1.5
