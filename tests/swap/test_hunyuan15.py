"""diffusers' AutoencoderKLHunyuanVideo15, and AutoencoderKLHunyuanImageRefiner of the same blocks."""

import copy

import pytest
import torch

import vtok_fast
from vtok_fast import parity

diffusers = pytest.importorskip("diffusers", minversion="0.36")
from diffusers.models.autoencoders import autoencoder_kl_hunyuanvideo15 as library  # noqa: E402
from support import swap_contract as contract  # noqa: E402

pytestmark = pytest.mark.needs_native
SMALL = {"latent_channels": 4, "block_out_channels": (16, 16, 32, 32, 32), "layers_per_block": 1}


@pytest.mark.slow
class TestHunyuanVideo15(contract.SwapContract):
    video, latent = (1, 3, 9, 32, 48), (1, 4, 3, 2, 3)
    part = "decoder.mid_block.resnets.0"
    exact_swaps = False  # every convolution of its class pads

    def make(self):
        return diffusers.AutoencoderKLHunyuanVideo15(**SMALL)

    def encode(self, model, x):
        return model.encode(x).latent_dist.parameters

    def decode(self, model, z):
        return model.decode(z).sample

    def example(self, x):
        return x

    def test_no_mask_is_made(self, model, z, monkeypatch):
        monkeypatch.setattr(
            library.HunyuanVideo15AttnBlock,
            "prepare_causal_attention_mask",
            staticmethod(lambda *a, **k: pytest.fail("a dense mask was made")),
        )
        report = vtok_fast.accelerate(model, check=False)
        with torch.no_grad():
            self.decode(model, z)
        assert not report.bypassed

    @pytest.mark.parametrize("frames", [1, 2])
    def test_any_number_of_frames(self, model, frames):
        self.check(model, contract.noise(1, 3, 4 * frames - 3, 32, 32), contract.noise(1, 4, frames, 2, 2))

    def test_batches(self, model):
        """The library's own attention takes no more than one video: its mask lacks a dimension for heads."""
        fast, x, z = copy.deepcopy(model), contract.noise(2, 3, 5, 32, 32), contract.noise(2, 4, 2, 2, 2)
        vtok_fast.accelerate(fast, check=False)
        each = [self.results(model, x[i : i + 1], z[i : i + 1]) for i in range(2)]
        for y, parts in zip(self.results(fast, x, z), zip(*each)):
            torch.testing.assert_close(y, torch.cat(parts), rtol=1e-3, atol=1e-4)

    def test_tiles(self, model):
        fast = copy.deepcopy(model)
        for m in (model, fast):
            m.enable_tiling(32, 32, 2, 2)
        vtok_fast.accelerate(fast, check=False)
        x, z = contract.noise(1, 3, 5, 64, 64), contract.noise(1, 4, 2, 4, 4)
        for y, e in zip(self.results(fast, x, z), self.results(model, x, z)):
            torch.testing.assert_close(y, e, rtol=1e-3, atol=1e-3)

    def test_a_wrapped_layer_of_the_attention_runs(self, model, z):
        attn = model.decoder.mid_block.attentions[0]
        attn.to_q = contract.Attached(attn.to_q)
        fast = copy.deepcopy(model)
        report = vtok_fast.accelerate(fast, check=False)
        assert any("to_q is a" in e.why for e in report.skipped)
        with torch.no_grad():
            torch.testing.assert_close(self.decode(fast, z), self.decode(model, z), rtol=1e-3, atol=1e-4)


def test_its_sibling_for_images():
    torch.manual_seed(0)
    model = contract.randomize(diffusers.AutoencoderKLHunyuanImageRefiner(**SMALL))
    fast, x, z = copy.deepcopy(model), contract.noise(1, 3, 5, 32, 48), contract.noise(1, 4, 2, 2, 3)
    report = vtok_fast.accelerate(fast)
    kinds = {e.kind for e in report.swapped}
    assert {f"HunyuanImageRefiner{part}" for part in ("AttnBlock", "ResnetBlock", "Decoder3D")} <= kinds
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        for run, given in (
            (lambda m, v: m.encode(v).latent_dist.parameters, x),
            (lambda m, v: m.decode(v).sample, z),
        ):
            found = parity.close(run(fast, given), run(double, given.double()), run(model, given))
            assert found.ok, found
