"""diffusers' AutoencoderKLMochi: norms of each frame, replicated edges."""

import copy

import pytest
import torch

import vtok_fast
from vtok_fast import parity

diffusers = pytest.importorskip("diffusers", minversion="0.32")
from diffusers.models.autoencoders import autoencoder_kl_mochi as library  # noqa: E402
from support import swap_contract as contract  # noqa: E402

pytestmark = pytest.mark.needs_native


@pytest.mark.slow
class TestMochi(contract.SwapContract):
    video, latent = (1, 3, 13, 32, 48), (1, 4, 3, 4, 6)
    part = "decoder.block_in.resnets.0"
    left_alone = {"SiLU", "FourierFeatures", "Linear", "LpNorm"}

    def make(self):
        return diffusers.AutoencoderKLMochi(
            latent_channels=4,
            encoder_block_out_channels=(32,) * 4,
            decoder_block_out_channels=(32,) * 4,
            layers_per_block=(1,) * 5,
        )

    def encode(self, model, x):
        return model.encode(x).latent_dist.parameters

    def decode(self, model, z):
        return model.decode(z).sample

    def example(self, x):
        return x

    def check(self, *args, **options):
        """With tiles of 2: Fourier features multiply every error, and with tiles of 4, where only layers are
        checked, the encoder is beyond twice eager's."""
        with vtok_fast.algorithm("winograd2"):
            return super().check(*args, **options)

    def test_batches(self, model):
        self.check(model, contract.noise(2, 3, 7, 32, 32), contract.noise(2, 4, 2, 4, 4))


@pytest.mark.parametrize("frames, chunk", [(1, 8), (9, 4)])
def test_norms_of_frames(frames, chunk):
    torch.manual_seed(0)
    norm = contract.randomize(library.MochiChunkedGroupNorm3D(24, 3, chunk_size=chunk))
    fast, x = copy.deepcopy(norm), contract.noise(2, 24, frames, 6, 5) + 3
    assert vtok_fast.accelerate(fast).swapped
    with torch.no_grad():
        assert (p := parity.close(fast(x), copy.deepcopy(norm).double()(x.double()), norm(x))).ok, p
