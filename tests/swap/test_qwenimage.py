"""diffusers' AutoencoderKLQwenImage: Wan's blocks and feature cache under other names."""

import copy

import pytest
import torch

import vtok_fast

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from support import swap_contract as contract  # noqa: E402

pytestmark = pytest.mark.needs_native


class TestQwenImage(contract.SwapContract):
    video, latent = (1, 3, 5, 32, 24), (1, 4, 2, 4, 3)
    part = "decoder.mid_block.resnets.0"

    def make(self):
        if not hasattr(diffusers, "AutoencoderKLQwenImage"):
            pytest.skip("this diffusers has no AutoencoderKLQwenImage")
        return diffusers.AutoencoderKLQwenImage(
            base_dim=16, z_dim=4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
        )

    def encode(self, model, x):
        return model.encode(x).latent_dist.parameters

    def decode(self, model, z):
        return model.decode(z).sample

    def example(self, x):
        return x

    @pytest.mark.parametrize("frames", [1, 9])
    def test_any_number_of_frames(self, model, frames):
        """One frame is an image, which is what this model is for; more run through the cache in chunks."""
        latents = (frames + 3) // 4
        self.check(model, contract.noise(1, 3, frames, 32, 24), contract.noise(1, 4, latents, 4, 3))

    def test_batches(self, model):
        self.check(model, contract.noise(2, 3, 5, 32, 24), contract.noise(3, 4, 2, 4, 3))

    def test_every_call_runs_in_the_swap(self, model, x, z):
        report = vtok_fast.accelerate(model)
        self.results(model, x, z)
        assert not report.skipped and not report.bypassed and all(report.ran().values()), report

    def test_the_second_video_sees_nothing_of_the_first(self, model, x, z):
        vtok_fast.accelerate(model, check=False)
        first = self.results(model, x, z)
        self.results(model, contract.noise(1, 3, 9, 40, 24), contract.noise(1, 4, 1, 4, 4))
        for y, e in zip(self.results(model, x, z), first):
            contract.near(y, e)

    def test_swapped_and_unswapped_blocks_take_turns_on_one_cache(self, model, x, z):
        fast = copy.deepcopy(model)
        report = vtok_fast.accelerate(fast, check=False)
        for path, part in fast.named_modules():
            if path.endswith("resnets.0") or path.endswith("down_blocks.2"):
                part.register_forward_hook(lambda *_: None)
                part.conv1.register_forward_hook(lambda *_: None) if hasattr(part, "conv1") else None
        with pytest.warns(RuntimeWarning, match="has hooks"):
            results = self.results(fast, x, z)
        assert report.bypassed
        for y, e in zip(results, self.results(model, x, z)):
            torch.testing.assert_close(y, e, rtol=1e-3, atol=1e-4)

    def test_tiles_and_slices(self, model):
        fast = copy.deepcopy(model)
        vtok_fast.accelerate(fast, check=False)
        for m in (model, fast):
            m.enable_slicing()
            m.enable_tiling(32, 32, 24, 24)
        x, z = contract.noise(2, 3, 5, 48, 40), contract.noise(2, 4, 2, 6, 5)
        for y, e in zip(self.results(fast, x, z), self.results(model, x, z)):
            torch.testing.assert_close(y, e, rtol=1e-3, atol=1e-3)

    def test_autocast(self, model, x, z):
        with torch.autocast("cpu", torch.bfloat16):
            eager = self.results(model, x, z)
            vtok_fast.accelerate(model, check=False)
            for y, e in zip(self.results(model, x, z), eager):
                assert y.dtype == e.dtype and (y - e).norm() <= 0.05 * e.norm()

    @pytest.mark.slow
    def test_a_larger_picture(self, model):
        self.check(model, contract.noise(1, 3, 1, 256, 256), contract.noise(1, 4, 1, 32, 32))
