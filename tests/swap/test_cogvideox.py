"""diffusers' AutoencoderKLCogVideoX: caches are returned and taken, chunk by chunk; Mochi's use of its
convolutions."""

import copy

import pytest
import torch
from torch import nn

import vtok_fast
from vtok_fast import parity

pytest.importorskip("diffusers", reason="diffusers is not installed")
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.autoencoders import autoencoder_kl_cogvideox as library
from diffusers.models.downsampling import CogVideoXDownsample3D
from diffusers.models.upsampling import CogVideoXUpsample3D
from support import swap_contract as contract

pytestmark = pytest.mark.needs_native


class TestCogVideoX(contract.SwapContract):
    video, latent = (1, 3, 9, 32, 24), (1, 4, 3, 4, 3)
    part = "decoder.mid_block.resnets.0"

    def make(self):
        return AutoencoderKLCogVideoX(
            block_out_channels=(16, 32, 32, 32),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=4,
            sample_height=64,
            sample_width=64,
        )

    def encode(self, model, x):
        return model.encode(x).latent_dist.parameters

    def decode(self, model, z):
        return model.decode(z).sample

    def example(self, x):
        return x

    @pytest.mark.parametrize("frames", [1, 2, 4, 5, 8, 16, 17])
    def test_any_number_of_frames(self, model, frames):
        self.check(
            model, contract.noise(1, 3, frames, 32, 24), contract.noise(1, 4, max(frames // 4, 1), 4, 3)
        )

    def test_caches_of_the_same_shape_change_hands(self, model):
        z, fast = contract.noise(1, 4, 5, 4, 3), copy.deepcopy(model)
        vtok_fast.accelerate(fast, check=False)
        with torch.no_grad():
            _, theirs = model.decoder(z[:, :, :3])
            _, ours = fast.decoder(z[:, :, :3])
            expected, _ = model.decoder(z[:, :, 3:], conv_cache=theirs)
            for takes_over, cache in ((model, ours), (fast, theirs), (fast, ours)):
                y, _ = takes_over.decoder(z[:, :, 3:], conv_cache=cache)
                torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)

        def compare(a, b, path=()):
            assert a.keys() == b.keys(), path
            for key in a:
                if isinstance(b[key], dict):
                    compare(a[key], b[key], (*path, key))
                elif a[key] is None:
                    assert key in ("conv_y", "conv_b")  # 1x1 convolutions, whose cache nothing reads
                else:
                    torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4)
                    assert a[key].untyped_storage().nbytes() == a[key].numel() * 4

        compare(ours, theirs)

    def test_tiles_and_slices(self, model):
        fast = copy.deepcopy(model)
        for m in (model, fast):
            m.enable_slicing()
            m.enable_tiling()
        vtok_fast.accelerate(fast, check=False)
        x, z = contract.noise(2, 3, 9, 48, 40), contract.noise(2, 4, 3, 6, 5)
        for y, e in zip(self.results(fast, x, z), self.results(model, x, z)):
            torch.testing.assert_close(y, e, rtol=1e-3, atol=1e-3)

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

    def test_statistics_span_the_chunk_as_before(self, model):
        """One call on nine latent frames is not two calls: the swap must not make them equal, or different in
        another way."""
        z = contract.noise(1, 4, 5, 4, 3)
        vtok_fast.accelerate(model, check=False)
        with torch.no_grad():
            whole, _ = model.decoder(z)
            first, cache = model.decoder(z[:, :, :3])
            rest, _ = model.decoder(z[:, :, 3:], conv_cache=cache)
        assert (torch.cat((first, rest), 2) - whole).norm() > 1e-3 * whole.norm()


def check(layer, *args):
    fast = copy.deepcopy(layer)
    report = vtok_fast.accelerate(fast)
    assert [e.path for e in report.swapped] == [""], report
    with torch.no_grad():
        results = [fast(*args), layer(*args), copy.deepcopy(layer).double()(*(a.double() for a in args))]
    for y, e, r in zip(*(r if isinstance(r, tuple) else (r,) for r in results)):
        if y is not None:
            assert (p := parity.close(y, r, e)).ok, p
    return results[0]


@pytest.mark.parametrize(
    "mode,kernel,stride",
    [
        ("first", 3, 1),
        ("constant", (3, 1, 1), 1),
        ("replicate", 3, 1),
        ("replicate", (2, 3, 3), 1),
        ("replicate", 2, (2, 2, 2)),
        ("replicate", (3, 2, 2), (3, 2, 2)),
        ("first", 1, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("frames", [1, 2, 7])
def test_convolutions(mode, kernel, stride, frames):
    torch.manual_seed(0)
    layer = library.CogVideoXCausalConv3d(8, 12, kernel, stride=stride, pad_mode=mode)
    x = contract.noise(2, 8, frames, 10, 12)
    y, cache = check(layer, x)
    if cache is not None:
        check(layer, contract.noise(2, 8, frames, 10, 12, seed=3), cache)


def test_pad_mode_is_read_at_each_call():
    """Mochi's framewise decoding changes it after construction, with convolutions that then pad nothing
    themselves."""
    torch.manual_seed(0)
    layer = library.CogVideoXCausalConv3d(8, 12, 3, pad_mode="replicate")
    x = contract.noise(1, 8, 4, 10, 12)
    report = vtok_fast.accelerate(layer)
    with torch.no_grad():
        before = layer(x)[0]
        layer.pad_mode = "constant"
        changed, cache = layer(x)
        report.revert()
        expected, expected_cache = layer(x)
    assert before.shape[3] == 10 and changed.shape[3] == 8  # as shipped: the frames shrink
    torch.testing.assert_close(changed, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(cache, expected_cache)


def test_a_combination_that_only_the_class_can_do():
    layer = library.CogVideoXCausalConv3d(8, 12, 3)  # its convolution pads zeros
    x = contract.noise(1, 8, 4, 10, 12)
    report = vtok_fast.accelerate(layer, check=False)
    layer.pad_mode = "replicate"  # and now its input is padded as well
    with torch.no_grad():
        y = layer(x)[0]
        report.revert()
        assert y.shape[3] == 12 and torch.equal(y, layer(x)[0])


@pytest.mark.parametrize("compress_time", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 3, 8])
def test_resampling(compress_time, frames):
    torch.manual_seed(0)
    check(CogVideoXDownsample3D(8, 12, compress_time=compress_time), contract.noise(2, 8, frames, 10, 12))
    check(CogVideoXUpsample3D(8, 12, compress_time=compress_time), contract.noise(2, 8, frames, 5, 6))


@pytest.mark.parametrize("frames,latent", [(1, 1), (3, 3), (4, 2), (5, 3), (8, 2), (9, 3)])
def test_the_spatial_norm_is_made_from_the_small_latent(frames, latent):
    torch.manual_seed(0)
    norm = contract.randomize(library.CogVideoXSpatialNorm3D(16, 4, groups=4))
    f, zq = contract.noise(2, 16, frames, 12, 10), contract.noise(2, 4, latent, 3, 5)
    fast = copy.deepcopy(norm)
    vtok_fast.accelerate(fast)
    with torch.no_grad():
        (y, kept), (e, theirs), (r, _) = (
            fast(f, zq),
            norm(f, zq),
            copy.deepcopy(norm).double()(f.double(), zq.double()),
        )
    assert parity.close(y, r, e).ok and kept.keys() == theirs.keys()


def test_other_activations_are_left_to_the_block():
    block = library.CogVideoXResnetBlock3D(8, 8, groups=4, temb_channels=0, non_linearity="gelu")
    report = vtok_fast.accelerate(block)
    assert any(e.path == "" and "GELU" in e.why for e in report.skipped)
    assert {e.path for e in report.swapped} == {"norm1", "conv1", "norm2", "conv2"}


def test_a_time_embedding():
    torch.manual_seed(0)
    block = contract.randomize(
        library.CogVideoXResnetBlock3D(8, 12, groups=4, temb_channels=6, conv_shortcut=True)
    )
    assert isinstance(block.temb_proj, nn.Linear)
    fast = copy.deepcopy(block)
    vtok_fast.accelerate(fast)
    x, temb = contract.noise(1, 8, 3, 10, 12), contract.noise(1, 6)
    with torch.no_grad():
        (y, kept), (e, theirs) = fast(x, temb), block(x, temb)
    torch.testing.assert_close(y, e, rtol=1e-4, atol=1e-4)
    assert kept.keys() == theirs.keys()
