"""diffusers' AutoencoderKLCosmos: no copies that pad nothing, pools and identities within the
convolutions."""

import copy
import threading

import pytest
import torch

import vtok_fast
from vtok_fast import parity

pytest.importorskip("diffusers", reason="diffusers is not installed")
from diffusers import AutoencoderKLCosmos
from diffusers.models.autoencoders import autoencoder_kl_cosmos as library
from support import swap_contract as contract

pytestmark = pytest.mark.needs_native


class TestCosmos(contract.SwapContract):
    video, latent = (1, 3, 9, 64, 32), (1, 4, 2, 8, 4)
    part = "decoder.mid_block.resnets.0"
    layer = "norm1"
    left_alone = {"CosmosPatchEmbed3d", "CosmosUnpatcher3d"}

    def make(self):
        return AutoencoderKLCosmos(
            latent_channels=4,
            encoder_block_out_channels=(16, 32, 32, 32),
            decode_block_out_channels=(16, 32, 32, 32),
            num_layers=1,
            resolution=128,
            attention_resolutions=(16,),
        )

    def encode(self, model, x):
        return model.encode(x).latent_dist.mode()

    def decode(self, model, z):
        return model.decode(z).sample

    def example(self, x):
        return x

    def test_bfloat16(self, model):
        """On a CPU the library pools in no 16-bit type, so only its blocks can be compared."""
        block, x = model.decoder.mid_block, contract.noise(1, 32, 2, 8, 4)
        with torch.no_grad():
            ref64 = copy.deepcopy(block).double()(x.double())
            eager = block.bfloat16()(x.bfloat16())
            assert vtok_fast.accelerate(block).swapped
            error, allowed = (parity.relative_errors(y, ref64)["whole"] for y in (block(x.bfloat16()), eager))
        assert error <= 2 * allowed

    @pytest.mark.parametrize("frames", [1, 17])
    def test_any_number_of_frames(self, model, frames):
        self.check(model, contract.noise(1, 3, frames, 32, 32), contract.noise(1, 4, 1 + frames // 8, 4, 4))

    def test_batches_and_slices(self, model):
        self.check(model, contract.noise(2, 3, 9, 32, 32), contract.noise(2, 4, 2, 4, 4))
        model.enable_slicing()
        self.check(model, contract.noise(2, 3, 9, 32, 32), contract.noise(2, 4, 2, 4, 4))

    def test_both_attentions_are_in_it(self, model):
        report = vtok_fast.accelerate(model, check=False)
        assert sum(e.kind == "CosmosCausalAttention" for e in report.swapped) > 4

    @pytest.mark.volatile
    def test_threads_share_one_model(self, model, x):
        vtok_fast.accelerate(model, check=False)
        with torch.no_grad():
            expected = [self.encode(model, x * (i + 1)) for i in range(4)]
        results = [None] * 4

        def work(i):
            with torch.no_grad():
                results[i] = self.encode(model, x * (i + 1))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        for y, e in zip(results, expected):
            contract.near(y, e)

    def test_compiles(self, model, x):
        vtok_fast.accelerate(model, check=False)
        with torch.no_grad():
            expected = model.decoder.mid_block(contract.noise(1, 32, 2, 8, 4))
            compiled = torch.compile(model.decoder.mid_block, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(
                compiled(contract.noise(1, 32, 2, 8, 4)), expected, rtol=1e-4, atol=1e-4
            )


def check(module, *args):
    fast = copy.deepcopy(module)
    report = vtok_fast.accelerate(fast)
    assert [e.path for e in report.swapped] == [""], report
    with torch.no_grad():
        y, e = fast(*args), module(*args)
        r = copy.deepcopy(module).double()(
            *(a.double() if a is not None and a.is_floating_point() else a for a in args)
        )
    assert (p := parity.close(y, r, e)).ok, p


@pytest.mark.parametrize(
    "kernel,stride,padding",
    [(3, 1, 1), ((1, 3, 3), (1, 2, 2), 0), ((3, 1, 1), (2, 1, 1), 0), ((1, 1, 1), 1, 0)],
    ids=str,
)
@pytest.mark.parametrize("dilation", [1, (2, 1, 1)], ids=str)
@pytest.mark.parametrize("pad_mode", ["constant", "replicate"])
def test_convolutions(kernel, stride, padding, dilation, pad_mode):
    torch.manual_seed(0)
    layer = library.CosmosCausalConv3d(8, 12, kernel, dilation, stride, padding, pad_mode)
    for frames in (1, 5) if stride != (2, 1, 1) else (5, 6):
        check(layer, contract.noise(2, 8, frames, 9, 11))


@pytest.mark.parametrize("space", [False, True])
@pytest.mark.parametrize("time", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_resampling(space, time, frames):
    torch.manual_seed(0)
    if space or time:
        check(library.CosmosDownsample3d(8, space, time), contract.noise(2, 8, frames, 6, 8))
        check(library.CosmosUpsample3d(8, space, time), contract.noise(2, 8, frames, 6, 8))
    else:
        x = contract.noise(1, 8, frames, 6, 8)
        module = library.CosmosUpsample3d(8, space, time)
        vtok_fast.accelerate(module)
        assert module(x) is x


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("kind", ["Spatial", "Temporal"])
def test_attention(kind, heads):
    torch.manual_seed(0)
    processor = getattr(library, f"Cosmos{kind}AttentionProcessor2_0")()
    block = contract.randomize(library.CosmosCausalAttention(heads, 16, processor=processor))
    if heads > 1:
        block.norm = contract.randomize(library.CosmosCausalGroupNorm(16))
    mask = torch.tril(torch.ones(3, 3)).bool() if kind == "Temporal" else None
    check(block, contract.noise(2, 16, 3, 5, 6), mask)


@pytest.mark.parametrize("groups", [1, 4])
def test_the_norm_is_per_frame_with_one_group_only(groups):
    check(contract.randomize(library.CosmosCausalGroupNorm(8, groups)), contract.noise(2, 8, 3, 6, 7))


def test_another_processor_is_left_alone():
    block = library.CosmosCausalAttention(
        1, 16, processor=lambda attn, hidden_states, attention_mask: hidden_states
    )
    report = vtok_fast.accelerate(block)
    assert any(e.path == "" and "processor" in e.why for e in report.skipped)


def test_dropout_is_applied():
    block = library.CosmosCausalAttention(
        1, 16, dropout=0.5, processor=library.CosmosSpatialAttentionProcessor2_0()
    ).train()
    vtok_fast.accelerate(block, check=False)
    x = contract.noise(1, 16, 2, 5, 6)
    assert not torch.equal(block(x), block(x))
