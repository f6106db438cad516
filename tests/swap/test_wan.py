"""diffusers' AutoencoderKLWan, 2.1 and 2.2: its feature-cache lists keep working, chunk by chunk."""

import copy
import sys

import pytest
import torch

import vtok_fast
from vtok_fast import parity

pytest.importorskip("diffusers", reason="diffusers is not installed")
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders import autoencoder_kl_wan as library
from support import swap_contract as contract

pytestmark = pytest.mark.needs_native
PLANS = [(1, 4, 4, 4), (1, 8, 4), (1, 4, 8), (1, 12)]


class Wan(contract.SwapContract):
    part = "decoder.mid_block.resnets.0"

    def encode(self, model, x):
        return model.encode(x).latent_dist.parameters

    def decode(self, model, z):
        return model.decode(z).sample

    def example(self, x):
        return x

    def lists(self, model, which):
        return [None] * model._cached_conv_counts[which]

    @torch.no_grad()
    def stream_encoder(self, model, x, plan, cache=None):
        cache, parts, start = cache or self.lists(model, "encoder"), [], 0
        for size in plan:
            index = [0]
            parts.append(model.encoder(x[:, :, start : start + size], feat_cache=cache, feat_idx=index))
            assert index[0] == sum(entry is not None for entry in cache)  # every slot visited, in order
            start += size
        return torch.cat(parts, 2), cache

    @torch.no_grad()
    def stream_decoder(self, model, z, plan):
        cache, parts, start = self.lists(model, "decoder"), [], 0
        for size in plan:
            parts.append(
                model.decoder(
                    z[:, :, start : start + size], feat_cache=cache, feat_idx=[0], first_chunk=start == 0
                )
            )
            start += size
        return torch.cat(parts, 2), cache

    def test_encoding_does_not_depend_on_the_chunk_plan(self, model):
        x = contract.noise(1, model.config.in_channels, 13, 16, 24)
        expected, _ = self.stream_encoder(model, x, PLANS[0])
        ref64, _ = self.stream_encoder(copy.deepcopy(model).double(), x.double(), PLANS[0])
        vtok_fast.accelerate(model, check=False)
        for plan in PLANS:
            y, _ = self.stream_encoder(model, x, plan)
            assert (p := parity.close(y, ref64, expected)).ok, (plan, p)

    def test_decoding_does_not_depend_on_the_chunk_plan(self, model):
        z = contract.noise(1, model.config.z_dim, 4, 4, 6)
        expected, _ = self.stream_decoder(model, z, (1, 1, 1, 1))
        ref64, _ = self.stream_decoder(copy.deepcopy(model).double(), z.double(), (1, 1, 1, 1))
        vtok_fast.accelerate(model, check=False)
        for plan in ((1, 1, 1, 1), (1, 2, 1), (1, 3)):
            y, _ = self.stream_decoder(model, z, plan)
            assert (p := parity.close(y, ref64, expected)).ok, (plan, p)

    def test_caches_have_the_same_entries_and_can_change_hands(self, model):
        x = contract.noise(1, model.config.in_channels, 9, 16, 24)
        fast = copy.deepcopy(model)
        vtok_fast.accelerate(fast, check=False)
        expected, theirs = self.stream_encoder(model, x, (1, 4, 4))
        _, ours = self.stream_encoder(fast, x[:, :, :5], (1, 4))
        _, theirs_there = self.stream_encoder(model, x[:, :, :5], (1, 4))
        assert [a is None for a in ours] == [b is None for b in theirs_there]  # more slots than are visited
        for a, b in ((a, b) for a, b in zip(ours, theirs_there) if a is not None):
            torch.testing.assert_close(a, b[:, :, -a.shape[2] :], rtol=1e-4, atol=1e-4)
        for takes_over, cache in ((model, ours), (fast, theirs_there)):  # the last chunk by the other one
            y, after = self.stream_encoder(takes_over, x[:, :, 5:], (4,), cache)
            torch.testing.assert_close(y, expected[:, :, 2:], rtol=1e-4, atol=1e-4)

    def test_the_mark_of_the_first_chunk(self, model):
        vtok_fast.accelerate(model, check=False)
        z = contract.noise(1, model.config.z_dim, 2, 4, 6)
        cache = self.lists(model, "decoder")
        with torch.no_grad():
            model.decoder(z[:, :, :1], feat_cache=cache, feat_idx=[0], first_chunk=True)
            marks = [i for i, entry in enumerate(cache) if isinstance(entry, str)]
            assert len(marks) == 2 and all(cache[i] == "Rep" for i in marks)
            model.decoder(z[:, :, 1:], feat_cache=cache, feat_idx=[0])
        # A single frame after the mark is kept with zeros before it.
        assert not cache[marks[0]][:, :, 0].any() and cache[marks[0]][:, :, 1].any()

    def test_caches_are_copies(self, model):
        """Neither the caller's frames nor whole activations are kept alive by a cache entry."""
        vtok_fast.accelerate(model, check=False)
        x = contract.noise(1, model.config.in_channels, 5, 16, 24)
        cache = self.lists(model, "encoder")
        with torch.no_grad():
            for start, end in ((0, 1), (1, 5)):
                part = x[:, :, start:end].clone()
                model.encoder(part, feat_cache=cache, feat_idx=[0])
                kept = cache[0].clone()
                part.zero_()
                assert torch.equal(cache[0], kept)
        assert all(
            entry.untyped_storage().nbytes() == entry.numel() * 4 for entry in cache if entry is not None
        )

    def test_tiles_and_slices(self, model):
        for m in (model, fast := copy.deepcopy(model)):
            m.enable_slicing()
            m.enable_tiling(32, 32, 24, 24)
        vtok_fast.accelerate(fast, check=False)
        x, z = contract.noise(2, 3, 5, 48, 32), contract.noise(2, model.config.z_dim, 2, *self.tile)
        for y, e in zip(self.results(fast, x, z), self.results(model, x, z)):
            torch.testing.assert_close(y, e, rtol=1e-4, atol=1e-4)

    def test_it_is_still_counted_by_class(self, model):
        vtok_fast.accelerate(model, check=False)
        for which in ("encoder", "decoder"):
            count = sum(isinstance(m, library.WanCausalConv3d) for m in getattr(model, which).modules())
            assert count == model._cached_conv_counts[which]


class TestWan21(Wan):
    video, latent, tile = (1, 3, 5, 32, 24), (1, 4, 2, 4, 3), (6, 4)

    def make(self):
        return AutoencoderKLWan(
            base_dim=16, z_dim=4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
        )

    def test_without_a_cache(self, model):
        x = contract.noise(1, model.config.in_channels, 3, 16, 24)
        with torch.no_grad():
            expected, ref64 = model.encoder(x), copy.deepcopy(model).double().encoder(x.double())
            vtok_fast.accelerate(model, check=False)
            assert parity.close(model.encoder(x), ref64, expected).ok


@pytest.mark.slow
class TestWan22(Wan):
    video, latent, tile = (1, 3, 5, 64, 32), (1, 6, 2, 4, 2), (3, 2)
    left_alone = {"AvgDown3D", "DupUp3D"}

    def make(self):
        return AutoencoderKLWan(
            base_dim=16,
            decoder_base_dim=24,
            z_dim=6,
            num_res_blocks=1,
            latents_mean=[0.0] * 6,
            latents_std=[1.0] * 6,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
        )


@pytest.mark.parametrize("kernel,padding", [(3, 1), (1, 0), ((3, 1, 1), (1, 0, 0))], ids=str)
@pytest.mark.parametrize("cached", [0, 1, 2, 3])
def test_a_short_cache_has_zeros_before_it_and_a_long_one_is_cut(kernel, padding, cached):
    torch.manual_seed(0)
    layer = library.WanCausalConv3d(8, 8, kernel, padding=padding)
    assert layer.padding == (0, 0, 0)  # what it pads stands elsewhere
    x, cache = (
        contract.noise(1, 8, 3, 10, 12),
        contract.noise(1, 8, cached, 10, 12, seed=2) if cached else None,
    )
    with torch.no_grad():
        expected = layer(x, cache)
        vtok_fast.accelerate(layer)
        torch.testing.assert_close(layer(x, cache), expected, rtol=1e-4, atol=1e-5)
        report = vtok_fast.accelerate(copy.deepcopy(layer), contract="exact")
    assert not report.swapped  # as it is already accelerated


@pytest.mark.parametrize("images,shape", [(True, (3, 16, 6, 7)), (False, (1, 16, 3, 6, 7))])
@pytest.mark.parametrize("bias", [False, True])
def test_the_norm_of_nothing_is_nothing(images, shape, bias):
    norm = library.WanRMS_norm(16, images=images, bias=bias)
    vtok_fast.accelerate(norm)
    x = contract.noise(*shape)
    x[:, :, ..., 2:4, :] = 0
    x[..., 4:5, :] *= 1e-20
    with torch.no_grad():
        y = norm(x)
        ref64 = type(norm).forward(copy.deepcopy(norm).double(), x.double())
    assert y.shape == x.shape and torch.isfinite(y).all()
    torch.testing.assert_close(y.double(), ref64, rtol=1e-5, atol=1e-6)


def test_nothing_of_the_library_is_imported_for_other_models():
    import subprocess

    code = (
        "import sys, torch, vtok_fast; vtok_fast.accelerate(torch.nn.Conv3d(4, 4, 3)); "
        "assert not {'diffusers', 'vector_quantize_pytorch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
