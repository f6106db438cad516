"""diffusers' AutoencoderVidTok: the state that its layers keep on themselves still means what it did, and it
does not grow."""

import copy

import pytest
import torch

import vtok_fast
from vtok_fast import parity

library = pytest.importorskip(
    "diffusers.models.autoencoders.autoencoder_vidtok",
    reason="diffusers is not installed, or has no AutoencoderVidTok",
)

from support import swap_contract as contract  # noqa: E402

pytestmark = pytest.mark.needs_native


def caches(model):
    return {
        n: m.causal_cache for n, m in model.named_modules() if getattr(m, "causal_cache", None) is not None
    }


class VidTok(contract.SwapContract):
    part = "decoder.mid.block_1"
    options: dict = {}

    def make(self):
        return library.AutoencoderVidTok(
            **{"ch": 16, "ch_mult": [1, 2, 2, 2], "z_channels": 4, "num_res_blocks": 1} | self.options
        )

    def encode(self, model, x):
        return model._encode(x)

    def decode(self, model, z):
        return model.decode(z)

    def example(self, x):
        return x, False

    def test_nothing_is_kept(self, model, x, z):
        if model.is_causal:
            self.results(model, x, z)
            assert sum(c.numel() for c in caches(model).values()) > 50 * x.numel()  # as shipped
        vtok_fast.accelerate(model, check=False)
        self.results(model, x, z)
        assert not caches(model)


class TestCausal(VidTok):
    video, latent = (1, 3, 8, 32, 24), (1, 4, 2, 4, 3)
    options = {"double_z": True}

    @torch.no_grad()
    def stream(self, model, network, x, plan):
        """Chunks as the library's own tiles take them, without lookahead."""
        model._empty_causal_cached(network)
        parts, start = [], 0
        for i, size in enumerate(plan):
            model._set_first_chunk(i == 0)
            parts.append(network(x[:, :, start : start + size]))
            start += size
        model._set_first_chunk(True)
        return torch.cat(parts, 2)

    @pytest.mark.parametrize("plan", [(4, 4, 4, 4), (4, 8, 4), (8, 8), (4, 12)], ids=str)
    def test_encoding_does_not_depend_on_the_chunk_plan(self, model, plan):
        x = contract.noise(1, 3, 16, 24, 16)
        eager, double = self.stream(model, model.encoder, x, plan), copy.deepcopy(model).double()
        ref64 = self.stream(double, double.encoder, x.double(), (16,))
        vtok_fast.accelerate(model, check=False)
        assert (p := parity.close(self.stream(model, model.encoder, x, plan), ref64, eager)).ok, p

    @pytest.mark.parametrize("plan", [(1, 1, 1, 1), (1, 2, 1), (4,)], ids=str)
    def test_decoding_chunk_by_chunk_is_what_it_was(self, model, plan):
        z = contract.noise(1, 4, 4, 4, 3)
        eager = self.stream(model, model.decoder, z, plan)
        double = copy.deepcopy(model).double()
        ref64 = self.stream(double, double.decoder, z.double(), plan)
        vtok_fast.accelerate(model, check=False)
        assert (p := parity.close(self.stream(model, model.decoder, z, plan), ref64, eager)).ok, p

    def test_caches_are_short_and_change_hands(self, model):
        x, fast = contract.noise(1, 3, 8, 24, 16), copy.deepcopy(model)
        vtok_fast.accelerate(fast, check=False)
        with torch.no_grad():
            expected = self.stream(model, model.encoder, x, (4, 4))[:, :, 1:]
            for first, second in ((model, fast), (fast, model)):
                first._set_first_chunk(True)
                first.encoder(x[:, :, :4])
                second._set_first_chunk(False)
                for name, cache in caches(first).items():
                    second.get_submodule(name).causal_cache = cache
                if first is fast:
                    assert all(c.untyped_storage().nbytes() == 4 * c.numel() for c in caches(first).values())
                    assert max(c.shape[2] for c in caches(first).values()) == 2
                torch.testing.assert_close(second.encoder(x[:, :, 4:]), expected, rtol=1e-4, atol=1e-4)

    def test_tiles_in_space_and_time(self, model):
        """The library's own tiling: chunks, and a decoder that looks one latent frame ahead
        (``cache_offset``)."""
        for m in (model, fast := copy.deepcopy(model)):
            m.enable_slicing()
            m.enable_tiling(32, 32, 0.25, 0.25)
            m.num_sample_frames_batch_size, m.num_latent_frames_batch_size = 4, 1
        vtok_fast.accelerate(fast, check=False)
        x, z = contract.noise(2, 3, 12, 40, 32), contract.noise(2, 4, 4, 5, 4)
        for y, e in zip(self.results(fast, x, z), self.results(model, x, z)):
            torch.testing.assert_close(y, e, rtol=1e-3, atol=1e-3)
        assert not caches(fast)

    def test_a_later_chunk_without_a_first_one_fails_as_before(self, model):
        vtok_fast.accelerate(model, check=False)
        model._set_first_chunk(False)
        with pytest.raises(TypeError), torch.no_grad():
            model.encoder(contract.noise(1, 3, 4, 16, 16))

    def test_gradient_checkpointing(self, model, x):
        fast = copy.deepcopy(model)
        vtok_fast.accelerate(fast, check=False)
        grads = []
        for m in (model, fast):
            m.train()
            m.enable_gradient_checkpointing()
            self.encode(m, x).square().mean().backward()
            grads.append(torch.cat([p.grad.flatten() for p in m.encoder.parameters() if p.grad is not None]))
        assert (grads[0] - grads[1]).norm() <= 1e-4 * grads[0].norm()

    def test_a_hook_on_a_temporal_block_sees_pixels_as_before(self, model, x):
        shapes = []
        block = model.encoder.down_temporal[0].block[0]
        block.register_forward_hook(lambda m, inputs, y: shapes.append((inputs[0].shape, y.shape)))
        with torch.no_grad():
            expected = self.encode(model, x)
            vtok_fast.accelerate(model, check=False)
            near = self.encode(model, x)
        torch.testing.assert_close(near, expected, rtol=1e-3, atol=1e-4)
        assert shapes[0] == shapes[1] == ((32 * 24, 16, 8),) * 2


@pytest.mark.slow
class TestNotCausal(VidTok):
    video, latent = (1, 3, 16, 32, 24), (1, 4, 4, 4, 3)
    options = {"double_z": True, "is_causal": False}
    exact_swaps = False

    def test_batches(self, model):
        self.check(model, contract.noise(2, 3, 16, 16, 16), contract.noise(2, 4, 4, 2, 2))

    def test_the_exact_contract_is_bit_equal(self, model, x, z):
        expected = self.results(model, x, z)
        vtok_fast.accelerate(model, contract="exact")
        for y, e in zip(self.results(model, x, z), expected):
            assert torch.equal(y, e)


@pytest.mark.slow
class TestTokens(VidTok):
    video, latent = (1, 3, 9, 32, 24), (1, 4, 3, 4, 3)
    options = {"double_z": False, "regularizer": "fsq", "codebook_size": 4096}

    def test_tokens(self, model, x):
        with torch.no_grad():
            _, expected = model.encode(x)
            report = vtok_fast.accelerate(model, example=x)
            z, tokens = model.encode(x)
        (measured,) = report.tokens
        assert measured.ok and tokens.dtype == expected.dtype and tokens.shape == expected.shape
        assert int((tokens != expected).sum()) <= measured.total - measured.equal + measured.flips
        (entry,) = [e for e in report.swapped if e.kind == "FSQRegularizer"]
        assert (
            entry.note.endswith("tokens differ from eager's float32") or "ulp from a threshold" in entry.note
        )

    def test_decoding_from_tokens(self, model):
        tokens = torch.randint(0, 4096, (1, 3, 4, 3), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = model.decode(tokens, decode_from_indices=True)
            vtok_fast.accelerate(model, check=False)
            torch.testing.assert_close(
                model.decode(tokens, decode_from_indices=True), expected, rtol=1e-3, atol=1e-4
            )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("frames", [2, 4, 7])
def test_time_resampling(causal, frames):
    torch.manual_seed(0)
    modules = [
        library.VidTokDownsample3D(8, 8, is_causal=causal),
        library.VidTokUpsample3D(8, 8, is_causal=causal),
    ]
    for module in modules:
        module.mix_factor.data.fill_(0.3)
        fast, x = copy.deepcopy(module), contract.noise(2, 8, frames, 9, 7)
        assert [e.path for e in vtok_fast.accelerate(fast).swapped] == [""]
        with torch.no_grad():
            eager = module(x)
            assert (p := parity.close(fast(x), copy.deepcopy(module).double()(x.double()), eager)).ok, p


@pytest.mark.parametrize("shape", [(2, 4, 3, 5, 6), (2, 4, 5, 6), (2, 30, 4)], ids=str)
def test_quantizer(shape):
    torch.manual_seed(0)
    fsq = library.FSQRegularizer([8, 8, 8, 8])
    z = torch.randn(shape, requires_grad=True)
    out, tokens = fsq(z)
    out.square().sum().backward()
    gradient, z.grad = z.grad, None
    report = vtok_fast.accelerate(fast := copy.deepcopy(fsq))
    assert report.swapped[0].note
    ours, indices = fast(z)
    ours.square().sum().backward()
    assert ours.shape == out.shape and indices.shape == tokens.shape and indices.dtype == tokens.dtype
    # No latent of this seed is near a threshold
    assert torch.equal(indices, tokens) and torch.equal(ours, out)
    torch.testing.assert_close(z.grad, gradient, rtol=1e-4, atol=1e-5)
    assert not vtok_fast.accelerate(copy.deepcopy(fsq), contract="exact").swapped


def test_quantizers_that_do_more_are_left_alone():
    for options in ({"dim": 7}, {"num_codebooks": 2}, {"keep_num_codebooks_dim": True}):
        report = vtok_fast.accelerate(library.FSQRegularizer([8, 5, 5], **options), check=False)
        assert "FSQRegularizer" not in [e.kind for e in report.swapped], report
    assert not vtok_fast.accelerate(library.FSQRegularizer([26, 4]), check=False).swapped
