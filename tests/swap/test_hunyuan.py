"""diffusers' AutoencoderKLHunyuanVideo: replicated edges, and frame-causal attention without its mask."""

import copy

import pytest
import torch
from torch import nn

import vtok_fast
from vtok_fast import parity

pytest.importorskip("diffusers", reason="diffusers is not installed")
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders import autoencoder_kl_hunyuan_video as library
from support import swap_contract as contract

pytestmark = pytest.mark.needs_native


class TestHunyuanVideo(contract.SwapContract):
    video, latent = (1, 3, 9, 32, 24), (1, 4, 3, 4, 3)
    part = "decoder.mid_block.resnets.0"
    exact_swaps = True

    def make(self):
        return AutoencoderKLHunyuanVideo(
            block_out_channels=(16, 32, 32, 32), latent_channels=4, layers_per_block=1, norm_num_groups=4
        )

    def encode(self, model, x):
        return model.encode(x).latent_dist.parameters

    def decode(self, model, z):
        return model.decode(z).sample

    def example(self, x):
        return x

    @pytest.mark.parametrize("frames", [1, 2, 5])
    def test_any_number_of_frames(self, model, frames):
        self.check(model, contract.noise(1, 3, frames, 32, 24), contract.noise(1, 4, frames, 4, 3))

    def test_batches(self, model):
        self.check(model, contract.noise(3, 3, 5, 32, 24), contract.noise(2, 4, 2, 4, 3))

    def test_the_temporal_tiles_that_are_on_as_shipped(self, model):
        self.check(model, contract.noise(1, 3, 25, 32, 16), contract.noise(1, 4, 7, 4, 2))

    def test_tiles_and_slices(self, model):
        fast = copy.deepcopy(model)
        for m in (model, fast):
            m.enable_slicing()
            m.enable_tiling(32, 32, 16, 24, 24, 12)
        vtok_fast.accelerate(fast, check=False)
        x, z = contract.noise(2, 3, 5, 48, 40), contract.noise(2, 4, 2, 6, 5)
        for y, e in zip(self.results(fast, x, z), self.results(model, x, z)):
            torch.testing.assert_close(y, e, rtol=1e-3, atol=1e-3)

    def test_no_mask_is_made(self, model, x, monkeypatch):
        monkeypatch.setattr(
            library, "prepare_causal_attention_mask", lambda *a, **k: pytest.fail("a dense mask was made")
        )
        vtok_fast.accelerate(model, check=False)
        with torch.no_grad():
            self.encode(model, x)

    def test_gradient_checkpointing(self, model, z):
        fast = copy.deepcopy(model)
        vtok_fast.accelerate(fast, check=False)
        grads = []
        for m in (model, fast):
            m.train()
            m.enable_gradient_checkpointing()
            self.decode(m, z).square().mean().backward()
            grads.append(torch.cat([p.grad.flatten() for p in m.decoder.parameters() if p.grad is not None]))
        assert (grads[0] - grads[1]).norm() <= 1e-4 * grads[0].norm()

    def test_another_attention_processor_is_left_alone(self, model, x, z):
        from diffusers.models.attention_processor import AttnProcessor

        model.encoder.mid_block.attentions[0].set_processor(AttnProcessor())
        report = vtok_fast.accelerate(copy.deepcopy(model), check=False)
        assert any(e.path == "encoder.mid_block" and "AttnProcessor" in e.why for e in report.skipped)
        assert any(e.path == "decoder.mid_block" for e in report.swapped)

    def test_a_layer_of_the_attention_with_more_to_it_runs(self, model, z):
        attn = model.decoder.mid_block.attentions[0]
        attn.to_q = contract.Attached(attn.to_q)
        fast = copy.deepcopy(model)
        vtok_fast.accelerate(fast, check=False)
        with torch.no_grad():
            torch.testing.assert_close(self.decode(fast, z), self.decode(model, z), rtol=1e-3, atol=1e-4)

    def test_without_attention(self):
        model = contract.randomize(
            AutoencoderKLHunyuanVideo(
                block_out_channels=(16, 32, 32, 32),
                latent_channels=4,
                layers_per_block=1,
                norm_num_groups=4,
                mid_block_add_attention=False,
            )
        )
        self.check(model, contract.noise(1, 3, 5, 16, 16), contract.noise(1, 4, 2, 2, 2))


@pytest.mark.parametrize("head_dim,frames,batch", [(16, 1, 1), (16, 4, 2), (8, 3, 2)])
def test_attention_is_that_of_the_mask(head_dim, frames, batch):
    torch.manual_seed(0)
    block = contract.randomize(
        library.HunyuanVideoMidBlock3D(16, resnet_groups=4, attention_head_dim=head_dim)
    )
    fast, x = copy.deepcopy(block), contract.noise(batch, 16, frames, 6, 5)
    assert any(e.path == "" for e in vtok_fast.accelerate(fast).swapped)
    with torch.no_grad():
        assert (p := parity.close(fast(x), copy.deepcopy(block).double()(x.double()), block(x))).ok, p


@pytest.mark.parametrize(
    "kernel,stride,pad_mode,swapped",
    [
        (3, 1, "replicate", True),
        (1, 1, "replicate", True),
        (3, (1, 2, 2), "replicate", True),
        (3, 2, "replicate", True),
        ((3, 3, 5), 1, "replicate", True),
        (3, 1, "constant", True),
        (3, 1, "reflect", True),
        (3, 1, "circular", False),
    ],
    ids=str,
)
def test_convolutions(kernel, stride, pad_mode, swapped):
    torch.manual_seed(0)
    layer = library.HunyuanVideoCausalConv3d(8, 12, kernel, stride, pad_mode=pad_mode)
    fast, x = copy.deepcopy(layer), contract.noise(2, 8, 5, 11, 9)
    report = vtok_fast.accelerate(fast)
    assert ([e.path for e in report.swapped] == [""]) == swapped
    with torch.no_grad():
        assert parity.close(fast(x), copy.deepcopy(layer).double()(x.double()), layer(x)).ok


def test_a_convolution_that_pads_itself_is_left_to_its_class():
    layer = library.HunyuanVideoDownsampleCausal3D(8)  # padding=1 by default, which no model uses
    fast, x = copy.deepcopy(layer), contract.noise(1, 8, 5, 11, 9)
    report = vtok_fast.accelerate(fast)
    assert any(e.path == "conv" and "itself" in e.why for e in report.skipped)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "factor,frames",
    [((2, 2, 2), 1), ((2, 2, 2), 4), ((1, 2, 2), 3), ((2, 1, 1), 3), ((1.5, 2, 2), 3)],
    ids=str,
)
def test_upsampling(factor, frames):
    torch.manual_seed(0)
    block = library.HunyuanVideoUpsampleCausal3D(8, upsample_factor=factor)
    fast, x = copy.deepcopy(block), contract.noise(2, 8, frames, 6, 5)
    report = vtok_fast.accelerate(fast, check=False)
    assert ("" in [e.path for e in report.swapped]) == (1.5 not in factor)
    with torch.no_grad():
        assert parity.close(fast(x), copy.deepcopy(block).double()(x.double()), block(x)).ok


def test_dropout_is_applied():
    torch.manual_seed(0)
    block = library.HunyuanVideoResnetBlockCausal3D(8, 8, dropout=0.5, groups=4).train()
    vtok_fast.accelerate(block, check=False)
    x = contract.noise(1, 8, 3, 6, 6)
    assert isinstance(block.dropout, nn.Dropout) and not torch.equal(block(x), block(x))
