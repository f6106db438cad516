"""diffusers' AutoencoderKL, and what is made of the same blocks: images as the frames of a video."""

import copy

import pytest
import torch
from torch import nn

import vtok_fast
from vtok_fast import parity
from vtok_fast.swap.layout import is_channels_last

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
from diffusers.models import attention_processor, downsampling, resnet, upsampling  # noqa: E402
from support import swap_contract as contract  # noqa: E402

pytestmark = pytest.mark.needs_native
SMALL = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}


class TestKL(contract.Trained, contract.SwapContract):
    video, latent = (2, 3, 48, 40), (2, 4, 24, 20)
    part = "decoder.mid_block.resnets.0"
    exact_swaps = False

    def make(self):
        return diffusers.AutoencoderKL(**SMALL)

    def encode(self, model, x):
        return model.encode(x).latent_dist.parameters

    def decode(self, model, z):
        return model.decode(z).sample

    def example(self, x):
        return x

    def test_any_memory_format(self, model, x, z):
        vtok_fast.accelerate(model, check=False)
        expected = self.results(model, x, z)
        given = (t.contiguous(memory_format=torch.channels_last) for t in (x, z))
        for y, e in zip(self.results(model, *given), expected):
            torch.testing.assert_close(y, e, rtol=1e-4, atol=1e-4)

    def test_nothing_is_left_to_the_class(self, model, x, z):
        report = vtok_fast.accelerate(model)
        self.results(model, x, z)
        assert not report.skipped and not report.bypassed, report

    def test_images_stay_channels_last_within_a_network(self, model, z, monkeypatch):
        vtok_fast.accelerate(model, check=False)
        seen = []
        for part in model.decoder.modules():
            if type(part).__name__ in ("UpDecoderBlock2D", "UNetMidBlock2D"):
                own = part.forward
                part.forward = lambda *a, own=own, **k: seen.append(own(*a, **k)) or seen[-1]
        with torch.no_grad():
            y = model.decoder(contract.noise(2, 4, 24, 20))
        assert len(seen) == 3 and all(map(is_channels_last, seen)) and y.is_contiguous()

    def test_tiles_and_slices(self, model):
        fast = copy.deepcopy(model)
        vtok_fast.accelerate(fast, check=False)
        for m in (model, fast):
            m.enable_slicing()
            m.enable_tiling()
            m.tile_sample_min_size, m.tile_latent_min_size = 32, 16
        x, z = contract.noise(2, 3, 48, 40), contract.noise(2, 4, 24, 20)
        for y, e in zip(self.results(fast, x, z), self.results(model, x, z)):
            torch.testing.assert_close(y, e, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("batch", [1, 3])
    def test_batches(self, model, batch):
        self.check(model, contract.noise(batch, 3, 32, 24), contract.noise(batch, 4, 16, 12))

    def test_another_attention_processor(self, model, x, z):
        """Put there before it is left alone; after, the class takes the call."""
        model.decoder.mid_block.attentions[0].set_processor(attention_processor.AttnProcessor())
        report = self.check(model, x, z)
        assert any("AttnProcessor" in e.why for e in report.skipped)
        report = vtok_fast.accelerate(model, check=False)
        model.encoder.mid_block.attentions[0].set_processor(attention_processor.AttnProcessor())
        with pytest.warns(RuntimeWarning, match="AttnProcessor"):
            self.results(model, x, z)

    def test_lora_on_a_convolution(self, model, x, z):
        """Attached before it is left alone, after it is noticed."""
        peft = pytest.importorskip("peft")
        for accelerate_first in (False, True):
            m = copy.deepcopy(model)
            if accelerate_first:
                vtok_fast.accelerate(m, check=False)
            config = peft.LoraConfig(r=2, target_modules=["conv1", "to_q"], init_lora_weights=False)
            torch.manual_seed(0)
            m.add_adapter(config)
            expected = self.results(copy.deepcopy(m), x, z)
            if not accelerate_first:
                vtok_fast.accelerate(m, check=False)
            for y, e in zip(self.results(m, x, z), expected):
                torch.testing.assert_close(y, e, rtol=1e-3, atol=1e-3)
            plain = self.results(model, x, z)
            assert not torch.allclose(expected[0], plain[0], rtol=1e-2, atol=1e-2)

    @pytest.mark.slow
    def test_a_larger_picture(self, model):
        self.check(model, contract.noise(1, 3, 256, 256), contract.noise(1, 4, 128, 128))


def block(**options):
    return resnet.ResnetBlock2D(in_channels=16, groups=4, **{"temb_channels": None} | options)


BLOCKS = {
    "resnet": (lambda: block(), (2, 16, 9, 7), None),
    "wider": (lambda: block(out_channels=24, groups_out=3), (1, 16, 9, 7), None),
    "time": (lambda: block(temb_channels=8), (2, 16, 9, 7), (2, 8)),
    "time without SiLU": (lambda: block(temb_channels=8, skip_time_act=True), (2, 16, 9, 7), (2, 8)),
    "scale and shift": (
        lambda: block(temb_channels=8, time_embedding_norm="scale_shift"),
        (2, 16, 9, 7),
        (2, 8),
    ),
    "scaled": (lambda: block(output_scale_factor=2.0), (1, 16, 9, 7), None),
    "temporal": (lambda: resnet.TemporalResnetBlock(32, 64, temb_channels=8), (1, 32, 3, 9, 7), (1, 3, 8)),
    "up": (lambda: upsampling.Upsample2D(16, use_conv=True), (2, 16, 9, 7), ()),
    "up, wider": (lambda: upsampling.Upsample2D(16, True, out_channels=24, name="op"), (2, 16, 9, 7), ()),
    "down": (lambda: downsampling.Downsample2D(16, use_conv=True), (2, 16, 9, 8), ()),
    "down, padded at the end": (lambda: downsampling.Downsample2D(16, True, padding=0), (2, 16, 9, 8), ()),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name):
    build, shape, extra = BLOCKS[name]
    torch.manual_seed(0)
    plain = contract.randomize(build())
    x = contract.noise(*shape)
    rest = () if extra == () else (None if extra is None else contract.noise(*extra, seed=2),)
    fast = copy.deepcopy(plain)
    assert "" in [e.path for e in vtok_fast.accelerate(fast).swapped]
    double = copy.deepcopy(plain).double()
    with torch.no_grad():
        ref64 = double(x.double(), *(None if r is None else r.double() for r in rest))
        for given in (x, x.transpose(1, -1).contiguous().transpose(1, -1)):
            y = fast(given, *rest)
            assert (p := parity.close(y, ref64, plain(x, *rest))).ok, p


@pytest.mark.parametrize(
    "build",
    [
        lambda: block(up=True),
        lambda: block(down=True),
        lambda: block(non_linearity="gelu"),
        lambda: upsampling.Upsample2D(16),
        lambda: upsampling.Upsample2D(16, use_conv_transpose=True),
        lambda: upsampling.Upsample2D(
            16, use_conv=True, norm_type="rms_norm", eps=1e-6, elementwise_affine=True
        ),
        lambda: upsampling.Upsample2D(16, use_conv=True, interpolate=False),
        lambda: downsampling.Downsample2D(16),
    ],
)
def test_other_blocks_are_left_to_their_class(build):
    torch.manual_seed(0)
    plain = contract.randomize(build())
    fast, x = copy.deepcopy(plain), contract.noise(2, 16, 8, 6)
    report = vtok_fast.accelerate(fast, check=False)
    assert "" not in [e.path for e in report.swapped]
    rest = (None,) if isinstance(plain, resnet.ResnetBlock2D) else ()
    with torch.no_grad():
        torch.testing.assert_close(fast(x, *rest), plain(x, *rest), rtol=1e-4, atol=1e-5)


def test_a_size_for_the_upsampling():
    torch.manual_seed(0)
    plain = upsampling.Upsample2D(16, use_conv=True)
    fast, x = copy.deepcopy(plain), contract.noise(2, 16, 8, 6)
    vtok_fast.accelerate(fast, check=False)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="output size"):
        torch.testing.assert_close(fast(x, (15, 11)), plain(x, (15, 11)), rtol=1e-4, atol=1e-5)


def test_attention_with_a_mask_is_the_class_s():
    torch.manual_seed(0)
    plain = contract.randomize(
        attention_processor.Attention(16, heads=2, dim_head=8, norm_num_groups=4, residual_connection=True)
    )
    fast, x = copy.deepcopy(plain), contract.noise(2, 16, 8, 6)
    assert [e.path for e in vtok_fast.accelerate(fast).swapped] == [""]
    mask = torch.zeros(2, 1, 48).masked_fill(torch.arange(48) > 30, -1e4)
    with torch.no_grad():
        assert parity.close(fast(x), copy.deepcopy(plain).double()(x.double()), plain(x)).ok
        with pytest.warns(RuntimeWarning, match="mask"):
            assert torch.equal(fast(x, attention_mask=mask), plain(x, attention_mask=mask))


OTHERS = {
    "AutoencoderKLTemporalDecoder": (
        {
            "block_out_channels": (32, 32),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "layers_per_block": 1,
        },
        (3, 3, 32, 24),
        {"num_frames": 3},
    ),
    "AutoencoderKLFlux2": (
        {"block_out_channels": (16, 32, 32, 32), "layers_per_block": 1, "norm_num_groups": 4},
        (2, 3, 32, 48),
        {},
    ),
    "VQModel": (
        {
            "block_out_channels": (32, 32),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "norm_type": "spatial",
        }
        | {"up_block_types": ("UpDecoderBlock2D",) * 2, "num_vq_embeddings": 16, "norm_num_groups": 4},
        (2, 3, 32, 24),
        {},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_of_these_blocks(name):
    options, shape, extra = OTHERS[name]
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    torch.manual_seed(0)
    model = contract.randomize(getattr(diffusers, name)(**options))
    x = contract.noise(*shape)

    @torch.no_grad()
    def encode(model, x):
        encoded = model.encode(x)
        return encoded.latents if name == "VQModel" else encoded.latent_dist.parameters

    z = encode(model, x) if name == "VQModel" else encode(model, x).chunk(2, 1)[0]

    @torch.no_grad()
    def decode(model, z):
        return model.decode(z, **extra).sample

    fast = copy.deepcopy(model)
    report = vtok_fast.accelerate(fast)
    assert any(e.kind == "ResnetBlock2D" for e in report.swapped), report
    assert not any("failed" in e.why or "raised" in e.why for e in report.skipped), report
    double = copy.deepcopy(model).double()
    for run, given in ((encode, x), (decode, z)):
        assert (p := parity.close(run(fast, given), run(double, given.double()), run(model, given))).ok, p


@pytest.mark.slow
def test_in_graphs():
    torch.manual_seed(0)
    model, z = contract.randomize(diffusers.AutoencoderKL(**SMALL)), contract.noise(1, 4, 12, 10)
    vtok_fast.accelerate(model, check=False)
    with torch.no_grad():
        expected = model.decoder(z)
        compiled = torch.compile(model.decoder, backend="aot_eager", fullgraph=True, dynamic=False)
        torch.testing.assert_close(compiled(z), expected, rtol=1e-4, atol=1e-4)


def test_a_replaced_layer_is_noticed():
    """A part that is put in the place of another after the swap."""
    torch.manual_seed(0)
    model, z = contract.randomize(diffusers.AutoencoderKL(**SMALL)), contract.noise(1, 4, 12, 10)
    vtok_fast.accelerate(model, check=False)
    part = model.decoder.mid_block.resnets[0]
    part.nonlinearity = nn.GELU()
    plain = copy.deepcopy(model)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="GELU"):
        y = model.decode(z).sample
    for m in plain.modules():
        m.__dict__.pop("forward", None)
    with torch.no_grad():
        torch.testing.assert_close(y, plain.decode(z).sample, rtol=1e-4, atol=1e-4)
