"""The memory layout of whole models' results, and of blocks in foreign code, for inputs of every layout."""

import copy
import sys

import pytest
import torch
from support.layouts import laid, strides_of
from torch import nn
from torch.utils._pytree import tree_map

import vtok_fast

pytestmark = pytest.mark.needs_native
FAST = ("AutoencoderKL",)
ask = sys.modules["vtok_fast.swap.accelerate"]._ask  # the package has a function of that name


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


GIVEN = ("contiguous", "channels-last", "permuted", "slice", "slice of channels-last", "expanded")
LISTED = (
    *("Wan 2.1", "Wan 2.2", "CogVideoX", "HunyuanVideo", "Cosmos CV8x8x8", "LTX Video", "QwenImage"),
    *("AutoencoderKL", "VidTok KL", "VidTok FSQ"),
)
OWN = ("VidTok", "Cosmos", "ProMAG")


def small_model(name):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    if name in OWN:
        from support.small_models import MAKERS

        torch.manual_seed(0)
        return MAKERS[name]().eval(), (1, 3, 9, 32, 32)
    from vtok_fast.bench.cases.models import MODELS

    model = MODELS[name]
    try:
        made = model.make(small=True)
    except ImportError as error:
        pytest.skip(str(error))
    pixels = model.smallest, model.smallest
    return made, (1, 3, *pixels) if name == "AutoencoderKL" else (1, 3, model.frames, *pixels)


def calls_of(model, x):
    """What a model's two networks are called with, in a pass."""
    seen = {}
    handles = [
        getattr(model, name).register_forward_pre_hook(
            lambda m, args, kwargs, name=name: seen.setdefault(name, (args, copy.copy(kwargs))) and None,
            with_kwargs=True,
        )
        for name in ("encoder", "decoder")
    ]
    encoded = model.encode(x)
    if hasattr(encoded, "latent_dist"):
        encoded = encoded.latent_dist.mode()
    model.decode(encoded[0] if isinstance(encoded, tuple) and not hasattr(encoded, "indices") else encoded)
    for handle in handles:
        handle.remove()
    return {
        name: (
            args,
            {
                k: [None] * len(v) if k == "feat_cache" else [0] if k == "feat_idx" else v
                for k, v in kw.items()
            },
        )
        for name, (args, kw) in seen.items()
    }


@pytest.mark.parametrize("name", [*FAST, *(slow(n) for n in (*LISTED, *OWN) if n not in FAST)])
def test_networks_of_all_models_give_pytorchs_layout(name):
    """NVIDIA/apex #1284 and its like, for inputs of every layout: whether a network keeps channels-last, only
    PyTorch knows, which decides by the sizes."""
    model, shape = small_model(name)
    fast = copy.deepcopy(model)
    with torch.no_grad():
        calls = calls_of(model, torch.randn(shape))
        assert vtok_fast.accelerate(fast, check=False).swapped
        for network, (args, kwargs) in calls.items():
            for how in GIVEN:
                given = laid(args[0], how), *args[1:]
                want = getattr(model, network)(*given, **copy.deepcopy(kwargs))
                got = getattr(fast, network)(*given, **copy.deepcopy(kwargs))
                assert strides_of(got) == strides_of(want), (network, how)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("Wan 2.1", "QwenImage", "CogVideoX", "HunyuanVideo", "AutoencoderKL"))
@pytest.mark.parametrize("shape", ((2, 9, 64), (1, 9, 96), (1, 5, 160)), ids=str)
def test_channels_last_goes_through_whole_models_as_in_pytorch(name, shape):
    """As above, for sizes on both sides of those from which PyTorch takes other convolutions, with batches,
    and with chunks that meet caches of earlier ones."""
    model, _ = small_model(name)
    batch, frames, side = shape
    fast = copy.deepcopy(model)
    x = torch.randn(batch, 3, frames, side, side)
    x = laid(x[:, :, 0] if name == "AutoencoderKL" else x, "channels-last")
    vtok_fast.accelerate(fast, check=False)
    with torch.no_grad():
        want, got = (m.encode(x).latent_dist.mode() for m in (model, fast))
        assert strides_of(got) == strides_of(want)
        z = laid(want, "channels-last")
        assert strides_of(fast.decode(z).sample) == strides_of(model.decode(z).sample)


@pytest.mark.parametrize("name", ("Wan 2.1", *(slow(n) for n in (*LISTED, *OWN) if n != "Wan 2.1")))
def test_blocks_in_foreign_code_give_pytorchs_layout(name):
    """As above, for each kind of layer and block by itself: an upsampler whose frames are images, an
    attention whose pixels are tokens, and what else leaves its axes in an order of its own."""
    model, _ = small_model(name)
    seen = set()
    for module in model.modules():
        answer = ask(module)
        swap = answer[0] if isinstance(answer, list) else None
        if swap is None or swap.attribute != "forward" or swap.sample is None or type(module) in seen:
            continue
        seen.add(type(module))
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            args = swap.sample(module)
            fast = copy.deepcopy(module)
            vtok_fast.accelerate(fast, check=False)
            for how in GIVEN[:4]:
                given = [tree_map(lambda v, how=how: laid(v, how), args) for _ in range(2)]
                try:
                    want = module(*given[0])
                except RuntimeError as error:  # diffusers' attention itself needs such inputs
                    assert "view size is not compatible" in str(error)
                    continue
                assert strides_of(fast(*given[1])) == strides_of(want), (type(module).__name__, how)
    assert seen


def test_a_first_call_of_the_layouts_leaves_everything_as_it_was():
    """Where a layout has to be found out, nothing runs twice: caches, random numbers and statistics."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv3d(16, 16, 3, padding=1))
    plain, x = copy.deepcopy(layer), laid(torch.randn(2, 16, 3, 8, 8), "channels-last")
    vtok_fast.accelerate(layer)
    state, calls = torch.random.get_rng_state(), []
    handle = layer[0].register_forward_hook(lambda m, a, y: calls.append(y.stride()))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert layer(x).stride() == plain(x).stride() == calls[-1]
    handle.remove()
    with torch.inference_mode():
        assert layer(x.clone()).stride() == plain(x.clone()).stride()
    assert len(calls) == 2 and torch.equal(torch.random.get_rng_state(), state)


def test_a_network_whose_blocks_alone_are_swapped(monkeypatch):
    """pytorch/pytorch #129362 and its like, for what is put around such a network to lay its results out: its
    class's forward of the moment runs, and nothing of it stays."""
    model, shape = small_model("Cosmos CV8x8x8")
    plain, x = copy.deepcopy(model.encoder), torch.randn(shape)
    report, kind = vtok_fast.accelerate(model, check=False), type(model.encoder)
    assert "encoder" not in {e.path for e in report.swapped} and "encoder" not in report.ran()
    with torch.no_grad():
        want = plain(x)
        torch.testing.assert_close(model.encoder(x), want, rtol=1e-4, atol=1e-5)
        with monkeypatch.context() as patch:
            own = kind.forward
            patch.setattr(kind, "forward", lambda self, *args, **kwargs: own(self, *args, **kwargs) + 1)
            torch.testing.assert_close(model.encoder(x), want + 1, rtol=1e-4, atol=1e-5)
        clone = copy.deepcopy(model)
        assert clone.encoder.__dict__["forward"].__self__ is clone.encoder
    report.revert()
    assert not report.active and not any("forward" in m.__dict__ for m in model.modules())
    assert not vtok_fast.accelerate(model.to("meta")).active
