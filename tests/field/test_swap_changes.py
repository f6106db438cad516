"""What is changed for all instances of a class, or among the settings of a layer, before accelerate() or
after it: the result is that of the same modules without it."""

from __future__ import annotations

import functools
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn

import vtok_fast

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from diffusers.models.autoencoders import autoencoder_kl_cogvideox, autoencoder_kl_wan  # noqa: E402
from support import small_models  # noqa: E402
from support.swap_contract import noise, randomize  # noqa: E402

from vtok_fast.models.vidtok import blocks  # noqa: E402

pytestmark = [
    pytest.mark.needs_native,
    pytest.mark.filterwarnings("ignore:.*runs as it was before vtok_fast.accelerate:RuntimeWarning"),
]
MAKERS = {
    **small_models.MAKERS,
    "convolutions": lambda: nn.Sequential(nn.Conv3d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv3d(8, 4, 1)),
}


def make(name):
    torch.manual_seed(0)
    return randomize(MAKERS[name]())


@torch.no_grad()
def run(name, model):
    z = noise(1, 6 if name == "VidTok" else 4, 2, 4, 4)
    if name == "convolutions":
        return model(z)
    y = model.decoder(z) if name == "VidTok" else model.decode(z)
    return getattr(y, "sample", y)


def shifted(y):
    if isinstance(y, tuple):
        return (shifted(y[0]), *y[1:])
    return y + torch.linspace(-1, 1, y.shape[1], dtype=y.dtype).view(-1, *[1] * (y.dim() - 2))


def changed(function):
    """As a library that patches a class does it: with the name and the docstring of what it replaces."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return shifted(function(*args, **kwargs))

    return wrapper


CLASSES = {
    "Wan": (
        (autoencoder_kl_wan.WanCausalConv3d, "forward"),
        (autoencoder_kl_wan.WanRMS_norm, "forward"),
        (autoencoder_kl_wan.WanResidualBlock, "forward"),
        (nn.Conv2d, "forward"),
        (nn.Conv2d, "_conv_forward"),
        (nn.SiLU, "forward"),
    ),
    "CogVideoX": (
        (autoencoder_kl_cogvideox.CogVideoXCausalConv3d, "forward"),
        (autoencoder_kl_cogvideox.CogVideoXSafeConv3d, "forward"),
        (nn.GroupNorm, "forward"),
    ),
    "HunyuanVideo": ((nn.Conv3d, "forward"), (nn.GroupNorm, "forward"), (nn.Conv3d, "_conv_forward")),
    "VidTok": ((blocks.CausalConv3d, "forward"), (blocks.LayerNorm, "forward"), (nn.Conv2d, "forward")),
    "convolutions": ((nn.Conv3d, "forward"), (nn.Conv3d, "_conv_forward"), (nn.Conv3d, "__call__")),
}
PATCHES = [(name, kind, attribute) for name, found in CLASSES.items() for kind, attribute in found]


@pytest.mark.parametrize("order", ("after", "before"))
@pytest.mark.parametrize("name,kind,attribute", PATCHES, ids=lambda v: getattr(v, "__name__", v))
def test_a_class_that_is_patched(name, kind, attribute, order, monkeypatch):
    """Libraries patch the forward of a class for seamless tiling, offloading or profiling."""
    plain, fast = make(name), make(name)
    before = run(name, plain)
    if order == "after":
        report = vtok_fast.accelerate(fast, check=False)
        ran = (run(name, fast), report.ran())[1]
    with monkeypatch.context() as patch:
        patch.setattr(kind, attribute, changed(getattr(kind, attribute)))
        want = run(name, plain)
        assert (want - before).abs().max() > 1e-2
        if order == "before":
            report = vtok_fast.accelerate(fast, check=False)
            assert (
                any(f"{kind.__name__}.{attribute}" in e.why for e in report.skipped)
                or attribute == "__call__"
            )
        torch.testing.assert_close(run(name, fast), want, rtol=1e-3, atol=1e-4)
        if order == "after" and attribute != "__call__":
            assert any(f"{kind.__name__}.{attribute} was replaced" in b.why for b in report.bypassed.values())
    if order == "after":  # when the patch goes, the swaps are back
        torch.testing.assert_close(run(name, fast), before, rtol=1e-3, atol=1e-4)
        assert all(count > ran[path] for path, count in report.ran().items() if ran[path])


def test_a_patch_of_every_module(monkeypatch):
    plain, fast = make("Wan"), make("Wan")
    report, seen = vtok_fast.accelerate(fast, check=False), []
    run("Wan", fast)
    own = nn.Module.__call__
    monkeypatch.setattr(
        nn.Module, "__call__", lambda m, *a, **k: (seen.append(type(m).__name__), own(m, *a, **k))[1]
    )
    want, kinds = run("Wan", plain), set(seen)
    seen.clear()
    torch.testing.assert_close(run("Wan", fast), want, rtol=1e-3, atol=1e-4)
    assert set(seen) == kinds and report.bypassed


def test_classes_of_a_program_are_its_own():
    """A forward that a program gives its own class is that class's."""

    class Own(nn.Conv3d):
        pass

    Own.forward = lambda self, x: nn.Conv3d.forward(self, x) * 2
    model, x = nn.Sequential(nn.Conv3d(3, 4, 3), Own(4, 4, 1)), torch.randn(1, 3, 4, 6, 6)
    want = model(x)
    report = vtok_fast.accelerate(model)
    assert [e.path for e in report.swapped] == ["0"]
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)


SETTINGS = [
    ("Wan", "decoder.mid_block.resnets.0.norm2", "scale", 5.0),
    ("Wan", "decoder.mid_block.resnets.0.norm1", "bias", 0.5),
    ("Wan", "decoder.mid_block.attentions.0.norm", "scale", 0.5),
    ("Wan", "decoder.norm_out", "scale", 3.0),
    ("Wan", "decoder.up_blocks.0.upsamplers.0", "mode", "upsample2d"),
    ("Wan", "decoder.up_blocks.0.upsamplers.0.resample.0", "mode", "bilinear"),
    ("Wan", "decoder.mid_block.resnets.1.conv1", "_padding", (2, 0, 1, 1, 2, 0)),
    ("Wan", "decoder.mid_block.attentions.0.to_qkv", "padding_mode", "circular"),
    ("CogVideoX", "decoder.mid_block.resnets.0.norm2.norm_layer", "eps", 3.0),
    ("CogVideoX", "decoder.mid_block.resnets.0.norm1.norm_layer", "num_groups", 2),
    ("CogVideoX", "decoder.mid_block.resnets.0.conv1", "pad_mode", "replicate"),
    ("HunyuanVideo", "decoder.mid_block.resnets.0.norm1", "eps", 3.0),
    ("HunyuanVideo", "decoder.mid_block.resnets.0.conv1", "pad_mode", "constant"),
    ("HunyuanVideo", "decoder.mid_block.attentions.0", "rescale_output_factor", 4.0),
    ("HunyuanVideo", "decoder.mid_block.attentions.0", "heads", 2),
    ("HunyuanVideo", "decoder.up_blocks.0.upsamplers.0", "upsample_factor", (2, 2, 2)),
    ("VidTok", "decoder.mid.block_1.norm1.norm", "eps", 3.0),
    ("VidTok", "decoder.mid.block_1.conv1", "version", "1.1"),
    ("VidTok", "decoder.conv_out", "spatial_padding", (2, 0, 1, 1)),
    ("convolutions", "0", "padding_mode", "circular"),
    ("convolutions", "0", "padding", (0, 1, 1)),
    ("convolutions", "2", "dilation", (2, 1, 1)),
]


@pytest.mark.parametrize("name,path,attribute,value", SETTINGS, ids=lambda v: str(v)[-40:])
def test_a_setting_that_is_changed_afterwards(name, path, attribute, value):
    plain, fast = make(name), make(name)
    before = run(name, plain)
    report = vtok_fast.accelerate(fast, check=False)
    run(name, fast)
    known = getattr(plain.get_submodule(path), attribute)
    for model in (plain, fast):
        setattr(model.get_submodule(path), attribute, value)
        if attribute == "padding_mode":
            model.get_submodule(path)._reversed_padding_repeated_twice = (1, 1) * (3 if name != "Wan" else 2)
    try:
        want = run(name, plain)
    except (RuntimeError, ValueError, TypeError):  # a setting that the model itself does not survive
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            run(name, fast)
        return
    assert want.shape != before.shape or attribute in ("dilation",) or (want - before).abs().max() > 1e-4
    torch.testing.assert_close(run(name, fast), want, rtol=1e-3, atol=1e-4)
    assert known != value and (report.bypassed or attribute == "pad_mode")


@pytest.mark.parametrize("name", ("Wan", "CogVideoX", "VidTok"))
@pytest.mark.parametrize("kind", ("_forward_hooks", "_forward_pre_hooks"))
def test_a_dictionary_put_in_the_place_of_a_modules_own_hooks(name, kind):
    plain, fast = make(name), make(name)
    report = vtok_fast.accelerate(fast, check=False)
    run(name, fast)
    path = "decoder.mid.block_1" if name == "VidTok" else "decoder.mid_block.resnets.0"
    for model in (plain, fast):
        hook = (lambda m, a: shifted(a)) if "pre" in kind else (lambda m, a, y: shifted(y))
        setattr(model.get_submodule(path).conv1, kind, OrderedDict({0: hook}))
    torch.testing.assert_close(run(name, fast), run(name, plain), rtol=1e-3, atol=1e-4)
    assert "conv1 has hooks" in report.bypassed[path].why


@pytest.mark.parametrize("name", ("Wan", "convolutions"))
def test_another_class_of_a_swapped_module_itself(name):
    plain, fast = make(name), make(name)
    report = vtok_fast.accelerate(fast, check=False)
    run(name, fast)
    path = "0" if name == "convolutions" else "decoder.mid_block.resnets.0"
    for model in (plain, fast):
        block = model.get_submodule(path)
        own = type(block)
        block.__class__ = type(
            "Mine", (own,), {"forward": lambda self, *a, own=own, **k: shifted(own.forward(self, *a, **k))}
        )
    torch.testing.assert_close(run(name, fast), run(name, plain), rtol=1e-3, atol=1e-4)
    assert "is a Mine, and was a" in report.bypassed[path].why


def test_a_patched_model_warns_once():
    model = make("Wan")
    vtok_fast.accelerate(model, check=False)
    model.decoder.mid_block.resnets[0].norm1.scale = 2.0
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run("Wan", model), run("Wan", model)
    ours = [str(w.message) for w in seen if "vtok_fast" in str(w.message)]
    assert len(ours) == 1 and "the settings of norm1 were changed (scale)" in ours[0]
