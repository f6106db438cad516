"""What is attached to a model after accelerate() is honoured: a fused block sees what happened to its parts
and leaves the call to its class.

Each case is one that users of other libraries reported, in the order "accelerate first".
"""

import copy
import warnings

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
import torch.nn.utils.prune
from torch import nn

import vtok_fast
from vtok_fast.models import VidTok

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from support.swap_contract import noise, randomize  # noqa: E402

pytestmark = [
    pytest.mark.needs_native,
    pytest.mark.filterwarnings("ignore:.*runs as it was before vtok_fast.accelerate:RuntimeWarning"),
]
BLOCK = "decoder.mid_block.resnets.0"


def wan():
    torch.manual_seed(0)
    return randomize(
        diffusers.AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        )
    )


def hunyuan():
    torch.manual_seed(0)
    return randomize(
        diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
        )
    )


def cogvideox():
    torch.manual_seed(0)
    return randomize(
        diffusers.AutoencoderKLCogVideoX(
            latent_channels=4, layers_per_block=1, norm_num_groups=4, block_out_channels=(8, 8, 8, 8)
        )
    )


class Vid(nn.Module):
    """VidTok's decoder behind the interface of the others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = randomize(VidTok("tiny"))

    def decode(self, z):
        return self.model.decoder(z)


MODELS = {"Wan": wan, "HunyuanVideo": hunyuan, "CogVideoX": cogvideox, "VidTok": Vid}
PARTS = {
    "Wan": (BLOCK, "conv1", "norm2"),
    "HunyuanVideo": (BLOCK, "conv1", "norm2"),
    "CogVideoX": (BLOCK, "conv2", "norm2"),
    "VidTok": ("model.decoder.mid.block_1", "conv1", "norm2"),
}


def latent(name):
    return noise(1, 4 if name != "VidTok" else 6, 2, 4, 4)


@torch.no_grad()
def decode(model, z):
    y = model.decode(z)
    return getattr(y, "sample", y)


def check(name, change, *, changes=True):
    """Applies ``change(block, part name)`` to a model after accelerate(); its result is that of a model that
    was never accelerated and had the same change. Returns the report and the model."""
    plain, fast, z = MODELS[name](), MODELS[name](), latent(name)
    path, part, _ = PARTS[name]
    before = decode(plain, z)
    report = vtok_fast.accelerate(fast, check=False)
    decode(fast, z)  # a swap that has run once must notice all the same
    ran = sum(report.ran().values())
    assert ran and not report.bypassed
    change(plain.get_submodule(path), part)
    want = decode(plain, z)
    change(fast.get_submodule(path), part)
    torch.testing.assert_close(decode(fast, z), want, rtol=1e-3, atol=1e-4)
    if changes:
        assert (want - before).abs().max() > 1e-2  # the change shows
        assert path in report.bypassed and report.bypassed[path].count >= 1
    assert sum(report.ran().values()) > ran  # the other blocks are as fast as before
    return report, fast


def shifted(y):
    """A change that no norm takes away."""
    if isinstance(y, tuple):
        return (shifted(y[0]), *y[1:])
    return y + torch.linspace(-1, 1, y.shape[1], dtype=y.dtype).view(-1, *[1] * (y.dim() - 2))


class Adapter(nn.Module):
    """A wrapper that adds something and passes attributes on, as adapters of fine-tuning libraries do."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["base"], name)

    def forward(self, x, *args, **kwargs):
        return shifted(self.base(x, *args, **kwargs))


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_in_the_place_of_a_layer(name):
    """huggingface/peft #2353, AgileRL/AgileRL #585, axolotl-ai-cloud/axolotl #3732: the adapter had no effect
    on a fused forward. Right is the result of the same modules without accelerate()."""
    report, _ = check(name, lambda block, part: setattr(block, part, Adapter(getattr(block, part))))
    assert "Adapter" in next(iter(report.bypassed.values())).why


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ("forward", "pre", "kwargs"))
def test_a_hook_on_a_part_runs_and_may_change_the_result(name, kind):
    """huggingface/diffusers #11041 and #12096, huggingface/accelerate #1835: hooks on the layers of a fused
    block did not run. nn.Module's contract: they run at each call of the module's forward."""
    calls = []

    def change(block, part):
        part = getattr(block, part)

        def after(module, args, y):
            calls.append(1)
            return shifted(y)

        if kind == "forward":
            part.register_forward_hook(after)
        elif kind == "pre":
            part.register_forward_pre_hook(lambda m, a: (calls.append(1), shifted(a))[1])
        else:
            part.register_forward_pre_hook(
                lambda m, a, k: (calls.append(1), (shifted(a), k))[1], with_kwargs=True
            )

    check(name, change)
    assert len(calls) >= 2 and len(calls) % 2 == 0  # as often in both models


def test_a_backward_hook_on_a_part_runs():
    """As above, for gradients."""
    model, z, seen = wan(), latent("Wan"), []
    vtok_fast.accelerate(model, check=False)
    decode(model, z)
    model.get_submodule(f"{BLOCK}.conv1").register_full_backward_hook(lambda m, i, o: seen.append(o[0].shape))
    model.decode(z.requires_grad_()).sample.sum().backward()
    assert seen and z.grad.isfinite().all()


def test_a_hook_on_all_modules_runs_on_the_parts_too():
    """torch.nn.modules.module.register_module_forward_hook promises every module of the process."""
    model, z = wan(), latent("Wan")
    kinds = []
    report = vtok_fast.accelerate(model, check=False)
    decode(model, z)
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: kinds.append(type(m).__name__))
    try:
        decode(model, z)
    finally:
        handle.remove()
    assert "WanRMS_norm" in kinds and report.bypassed
    ran = sum(report.ran().values())
    decode(model, z)
    assert sum(report.ran().values()) > ran


@pytest.mark.parametrize("name", MODELS)
def test_a_replaced_forward_of_a_part(name):
    """huggingface/accelerate #1835, huggingface/diffusers #12692: offloading and casting put their own
    forward on an instance."""

    def change(block, part):
        part = getattr(block, part)
        own = part.forward

        part.forward = lambda *args, **kwargs: shifted(own(*args, **kwargs))

    check(name, change)


@pytest.mark.parametrize("name", MODELS)
def test_a_parametrization_of_a_part(name):
    """pytorch/pytorch #102981: weights that a parametrization makes."""

    class Half(nn.Module):
        def forward(self, weight):
            return weight * 0.5

    def change(block, part):
        part = getattr(block, part)
        conv = next(m for m in part.modules() if isinstance(m, nn.modules.conv._ConvNd))
        parametrize.register_parametrization(conv, "weight", Half())

    check(name, change)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ("weight_norm", "spectral_norm", "pruning"))
@pytest.mark.parametrize("name", ("Wan", "HunyuanVideo"))
def test_weights_that_are_made_before_each_call(name, kind):
    """pytorch/pytorch #28594 and #102981, descriptinc/descript-audio-codec #81: weight_norm, spectral_norm
    and pruning keep the real weights under another name and make ``weight`` in a hook, which a fused block
    has to let run."""

    def change(block, part):
        conv = next(m for m in getattr(block, part).modules() if isinstance(m, nn.modules.conv._ConvNd))
        if kind == "pruning":
            torch.nn.utils.prune.l1_unstructured(conv, "weight", 0.5)
        else:
            torch.manual_seed(3)
            getattr(torch.nn.utils, kind)(conv)
            if kind == "weight_norm":
                conv.weight_g.data.mul_(2)

    check(name, change)


def test_another_activation_and_another_setting():
    """A plain setattr on a block or on one of its layers."""
    check("Wan", lambda block, part: setattr(block, "nonlinearity", nn.Tanh()))

    def stride_of_padding(block, part):
        getattr(block, part)._padding = (1, 1, 1, 1, 2, 0)

    check("Wan", stride_of_padding, changes=False)

    def forward_of_convolution(block, part):
        conv = getattr(block, part)
        own = conv._conv_forward
        conv._conv_forward = lambda *a: shifted(own(*a))

    check("Wan", forward_of_convolution)


@pytest.mark.parametrize("mode", ("circular", "replicate"))
def test_seamless_tiling_of_plain_convolutions(mode):
    """Seamless pictures are made by another padding mode, or another ``_conv_forward``, on every convolution
    of a loaded model."""
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1)),
        noise(1, 3, 8, 8),
    )
    plain = copy.deepcopy(model)
    vtok_fast.accelerate(model)
    model(x)
    for net in (model, plain):
        net[0].padding_mode = net[2].padding_mode = mode
        net[0]._reversed_padding_repeated_twice = net[2]._reversed_padding_repeated_twice = [1, 1, 1, 1]
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    for net in (model, plain):
        net[0].padding_mode = "zeros"
        net[0]._conv_forward = lambda x, w, b: torch.nn.functional.conv2d(
            torch.nn.functional.pad(x, (1, 1, 1, 1), value=3.0), w, b
        )
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ("Wan", "HunyuanVideo", "CogVideoX"))
@pytest.mark.parametrize("order", ("after", "before"))
def test_layerwise_casting(name, order):
    """huggingface/diffusers #10347, #9177, kijai/ComfyUI-FluxTrainer #190: weights kept in float8 and cast
    for each layer's call. Right: what the model gives without accelerate()."""
    plain, fast, z = MODELS[name]().bfloat16(), MODELS[name]().bfloat16(), latent(name).bfloat16()
    if order == "after":
        report = vtok_fast.accelerate(fast, check=False)
        decode(fast, z)
    for model in (plain, fast):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    if order == "before":
        report = vtok_fast.accelerate(fast)
        assert any("hook of diffusers" in e.why for e in report.skipped), report
    y, want = decode(fast, z), decode(plain, z)
    assert y.isfinite().all() and (y - want).norm() <= 0.02 * want.norm()


@pytest.mark.parametrize("name", ("Wan", "HunyuanVideo"))
@pytest.mark.parametrize("order", ("after", "before"))
def test_cpu_offload(name, order):
    """huggingface/accelerate #1835 and #3617, huggingface/diffusers #7448: weights on the meta device, filled
    in for each layer's call."""
    offload = pytest.importorskip("accelerate", reason="accelerate is not installed")
    plain, fast, z = MODELS[name](), MODELS[name](), latent(name)
    want = decode(plain, z)
    if order == "after":
        report = vtok_fast.accelerate(fast, check=False)
        decode(fast, z)
    offload.cpu_offload(fast, execution_device=torch.device("cpu"))
    if order == "before":
        report = vtok_fast.accelerate(fast)
        assert any("hook of accelerate" in e.why for e in report.skipped), report
    torch.testing.assert_close(decode(fast, z), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ("leaf_level", "block_level"))
@pytest.mark.parametrize("name", ("Wan", "HunyuanVideo"))
def test_group_offload_and_revert(name, kind):
    """huggingface/diffusers #11041, #11086, #12096: group offloading of autoencoders, in both orders, and
    taking the swaps out again under the library's wrappers."""
    plain, fast, z = MODELS[name](), MODELS[name](), latent(name)
    want = decode(plain, z)
    report = vtok_fast.accelerate(fast, check=False)
    from diffusers.hooks import apply_group_offloading

    for model in (plain, fast):
        apply_group_offloading(
            model,
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type=kind,
            num_blocks_per_group=1 if kind == "block_level" else None,
        )
    torch.testing.assert_close(decode(fast, z), want, rtol=1e-3, atol=1e-4)
    report.revert()
    assert torch.equal(decode(fast, z), decode(plain, z))


@pytest.mark.parametrize("target", ("to_qkv", "proj", "decoder.mid_block.attentions.0.to_qkv"))
@pytest.mark.parametrize("order", ("after", "before"))
def test_lora(target, order):
    """huggingface/peft #2353, huggingface/diffusers #9177: the layers of peft have the class names of those
    that they wrap."""
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def attach(model):
        torch.manual_seed(4)
        config = peft.LoraConfig(target_modules=[target], init_lora_weights=False, r=2)
        try:
            return peft.inject_adapter_in_model(config, model)
        except TypeError as error:  # a convolution class that this peft cannot copy
            pytest.skip(f"peft: {error}")

    plain, fast, z = wan(), wan(), latent("Wan")
    before = decode(plain, z)
    if order == "after":
        report = vtok_fast.accelerate(fast, check=False)
        decode(fast, z)
    attach(plain), attach(fast)
    if order == "before":
        report = vtok_fast.accelerate(fast)
        assert report.swapped
    want = decode(plain, z)
    assert (want - before).abs().max() > 1e-4
    torch.testing.assert_close(decode(fast, z), want, rtol=1e-3, atol=1e-4)
    report.revert()
    torch.testing.assert_close(decode(fast, z), want, rtol=0, atol=0)


@pytest.mark.parametrize("name", ("HunyuanVideo", "CogVideoX"))
def test_lora_on_the_convolution_inside_a_layer(name):
    """As above; the convolution inside a causal layer is the target."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    plain, fast, z = MODELS[name](), MODELS[name](), latent(name)
    early = MODELS[name]()
    report = vtok_fast.accelerate(fast, check=False)
    for model in (plain, fast, early):
        torch.manual_seed(4)
        config = peft.LoraConfig(target_modules=[f"{BLOCK}.conv1.conv"], init_lora_weights=False, r=2)
        try:
            peft.inject_adapter_in_model(config, model)
        except ValueError as error:  # a class of the library that peft does not know
            pytest.skip(f"peft: {error}")
    want = decode(plain, z)
    torch.testing.assert_close(decode(fast, z), want, rtol=1e-3, atol=1e-4)
    assert BLOCK in report.bypassed
    vtok_fast.accelerate(early)
    torch.testing.assert_close(decode(early, z), want, rtol=1e-3, atol=1e-4)


def test_norms_that_stay_in_float32():
    """huggingface/diffusers #12501 and #13316: norms kept in float32 in a half-precision model, which
    PyTorch's norms take on a CPU."""
    plain, fast, z = hunyuan(), hunyuan(), latent("HunyuanVideo").bfloat16()
    vtok_fast.accelerate(fast, check=False)
    for model in (plain, fast):
        model.bfloat16()
        for m in model.modules():
            if isinstance(m, nn.GroupNorm):
                m.float()
    want = decode(plain, z)
    assert (decode(fast, z) - want).norm() <= 0.02 * want.norm()


def test_the_first_bypass_warns_once_and_taking_the_hook_away_brings_the_swap_back():
    model, z = wan(), latent("Wan")
    report = vtok_fast.accelerate(model, check=False)
    handles = [
        model.get_submodule(path).register_forward_hook(lambda m, a, y: None)
        for path in (f"{BLOCK}.conv1", "decoder.mid_block.resnets.1.norm1")
    ]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        decode(model, z), decode(model, z)
    ours = [str(w.message) for w in seen if "vtok_fast" in str(w.message)]
    assert len(ours) == 1 and BLOCK in ours[0] and "conv1 has hooks" in ours[0]
    assert set(report.bypassed) == {BLOCK, "decoder.mid_block.resnets.1"}
    assert report.to_dict()["bypassed"][BLOCK]["count"] == report.bypassed[BLOCK].count > 1
    assert "left calls to their class" in str(report)
    [handle.remove() for handle in handles]
    count, ran = report.bypassed[BLOCK].count, report.ran()[BLOCK]
    decode(model, z)
    assert report.bypassed[BLOCK].count == count and report.ran()[BLOCK] > ran


def test_compiled_models_notice_what_was_attached_before_they_were_compiled():
    """huggingface/peft #2353 under torch.compile. The graph stays whole."""
    model, z, z_plain = Vid(), latent("VidTok"), Vid()
    vtok_fast.accelerate(model, check=False)
    for net in (model, z_plain):
        block = net.model.decoder.mid.block_1
        block.conv1 = Adapter(block.conv1)
        net.model.decoder.mid.block_2.norm2.register_forward_hook(lambda m, a, y: shifted(y))
    want = decode(z_plain, z)
    with torch.no_grad():
        y = torch.compile(model.model.decoder, backend="aot_eager", fullgraph=True)(z)
    torch.testing.assert_close(y, want, rtol=1e-3, atol=1e-4)


def test_copies_keep_their_own_state():
    """A deep copy's blocks look at the copy's parts."""
    model, z = wan(), latent("Wan")
    report = vtok_fast.accelerate(model, check=False)
    decode(model, z)
    clone = copy.deepcopy(model)
    clone.get_submodule(f"{BLOCK}.conv1").register_forward_hook(lambda m, a, y: shifted(y))
    plain = wan()
    want = decode(plain, z)
    torch.testing.assert_close(decode(model, z), want, rtol=1e-3, atol=1e-4)
    plain.get_submodule(f"{BLOCK}.conv1").register_forward_hook(lambda m, a, y: shifted(y))
    torch.testing.assert_close(decode(clone, z), decode(plain, z), rtol=1e-3, atol=1e-4)
    report.revert()
    torch.testing.assert_close(decode(clone, z), decode(plain, z), rtol=1e-3, atol=1e-4)
    assert torch.equal(decode(model, z), want)
