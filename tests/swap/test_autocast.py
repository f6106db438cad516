"""Under autocast every swapped module returns the dtype that its class returns there."""

from __future__ import annotations

import copy

import pytest
import torch
from support.swap_contract import noise, randomize
from torch import nn

import vtok_fast
from vtok_fast.models import VidTok

pytest.importorskip("diffusers", reason="diffusers is not installed")

from support.small_models import MAKERS as MODELS  # noqa: E402

pytestmark = [
    pytest.mark.needs_native,
    pytest.mark.filterwarnings("ignore:.*runs as it was before vtok_fast.accelerate:RuntimeWarning"),
]


class CastsBack(nn.Conv3d):
    """A convolution that returns the dtype of its input, autocast or not."""

    def forward(self, x):
        return super().forward(x).to(x.dtype)


class CastsBackInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(3, 8, 3)

    def forward(self, x):
        return self.conv(nn.functional.pad(x, (1, 1, 1, 1, 2, 0))).float()


LAYERS = {
    "casts back": lambda: CastsBack(3, 8, 3, padding=1),
    "casts back inside": CastsBackInside,
    "a convolution": lambda: nn.Conv3d(3, 8, 3, padding=1),
    "an image convolution, padded": lambda: nn.Conv3d(3, 8, (1, 3, 3), padding=(0, 1, 1)),
}


def run(model):
    if isinstance(model, nn.Sequential):
        return model(noise(1, 3, 3, 8, 8))
    x = noise(1, 3, 5, 32, 32).clamp(-1, 1)
    if hasattr(model, "encoder") and type(model).__module__.startswith("vtok_fast"):
        return model(x)
    encoded = model.encode(x)
    z = getattr(encoded, "latent_dist", None)
    z = z.mode() if z is not None else encoded[0]
    return model.decode(z)


def seen(model, paths, dtype):
    found = {path: [] for path in paths}

    def hook(path):
        def note(module, args, y):
            first = y[0] if isinstance(y, tuple) else y
            if isinstance(first, torch.Tensor):
                found[path].append(first.dtype)

        return note

    handles = [model.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
    try:
        with torch.no_grad(), torch.autocast("cpu", dtype):
            run(model)
    finally:
        [handle.remove() for handle in handles]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.bfloat16,), ids=str)
@pytest.mark.parametrize("name", [*LAYERS, *MODELS])
def test_dtypes(name, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[name]()) if name in LAYERS else randomize(MODELS[name]())
    model.eval()
    plain = copy.deepcopy(model)
    report = vtok_fast.accelerate(model, check=False)
    paths = [e.path for e in report.swapped]
    want = seen(plain, paths, dtype)
    for _ in range(2):
        got = seen(model, paths, dtype)
        # Within a block of the fast model its parts are not called one by one.
        assert all(set(got[path]) <= set(want[path]) for path in paths if want[path]), (got, want)
    assert any(want.values()) and (sum(report.ran().values()) or "casts" in name)
    with torch.no_grad():  # nothing of the look at dtypes is left
        run(model)


@pytest.mark.parametrize("name", MODELS)
def test_results_under_autocast_are_as_exact_as_before(name):
    """Without hooks: a block that calls its parts in a form of its own finds one that may not run there."""
    torch.manual_seed(0)
    model = randomize(MODELS[name]()).eval()
    plain, x = copy.deepcopy(model), torch.rand(1, 3, 5, 32, 32) * 2 - 1
    vtok_fast.accelerate(model, check=False)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            results = model.encoder(x), plain.encoder(x)
        results = *results, plain.double().encoder(x.double())
    # CogVideoX's gives what it keeps of its last frames too
    got, want, exact = (y[0] if isinstance(y, tuple) else y for y in results)
    assert got.dtype == want.dtype
    assert (got - exact).norm() <= 1.5 * (want - exact).norm()


def test_a_stream_under_autocast():
    """The look at dtypes leaves what a stream keeps by layer alone, and finds it there."""
    torch.manual_seed(0)
    model, x = VidTok("tiny").eval(), torch.rand(1, 3, 9, 32, 32) * 2 - 1
    plain = copy.deepcopy(model)
    for first in (True, False):  # the first look is at the first chunk, or at a later one
        report = vtok_fast.accelerate(model, check=False)
        stream = model.stream()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=first):
            stream.encode_chunk(x[:, :, :1])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            tokens, whole = stream.encode_chunk(x[:, :, 1:]), plain.encode(x)
        kept = stream._encoded.frames
        assert kept.keys() <= set(model.modules()) and all(type(v) is torch.Tensor for v in kept.values())
        assert not any("could not be found" in entry.why for entry in report.bypassed.values())
        assert tokens.data.shape[-3] == whole.data.shape[-3] - 1
        report.revert()
