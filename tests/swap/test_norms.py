"""Norms that stand alone are swapped by the general rule: as exact on channels-last as elsewhere, and
PyTorch's own code on any other layout."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vtok_fast
from vtok_fast import parity
from vtok_fast.swap.layout import is_channels_last

from support import swap_contract as contract  # isort: skip

pytestmark = pytest.mark.needs_native


class MeanSquare(nn.Module):
    """Somebody's RMS norm over the channels."""

    def __init__(self, dim=1, eps=1e-8):
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, x):
        return x / torch.sqrt(torch.mean(x**2, dim=self.dim, keepdim=True) + self.eps)


class RootPlusEps(MeanSquare):
    def forward(self, x):
        return x / (torch.sqrt(torch.mean(x**2, dim=self.dim, keepdim=True)) + self.eps)


class ChannelNorm(MeanSquare):
    def forward(self, x):
        return (x - x.mean(self.dim, keepdim=True)) / torch.sqrt(x.var(self.dim, keepdim=True) + self.eps)


def diffusers_rms(*args, **options):
    normalization = pytest.importorskip("diffusers.models.normalization")
    return normalization.RMSNorm(*args, **options)


NORMS = {
    "group": (lambda: nn.GroupNorm(4, 16), (2, 16, 7, 9)),
    "group of a video": (lambda: nn.GroupNorm(4, 16, eps=1e-3), (2, 16, 3, 7, 9)),
    "group without weights": (lambda: nn.GroupNorm(8, 16, affine=False), (1, 16, 7, 9)),
    "rms": (lambda: nn.RMSNorm(16), (2, 5, 16)),
    "rms with eps": (lambda: nn.RMSNorm(16, eps=1e-3), (2, 3, 5, 7, 16)),
    "diffusers": (lambda: diffusers_rms(16, 1e-6), (2, 5, 16)),
    "diffusers with bias": (lambda: diffusers_rms(16, 1e-6, bias=True), (4, 2, 5, 16)),
    "diffusers without weights": (lambda: diffusers_rms(16, 1e-8, elementwise_affine=False), (2, 3, 5, 16)),
    "mean square": (MeanSquare, (2, 16, 3, 7, 9)),
    "mean square of images": (MeanSquare, (2, 16, 7, 9)),
}


def make(name):
    build, shape = NORMS[name]
    norm = contract.randomize(build())
    return norm, contract.noise(*shape)


def layouts(x):
    """Contiguous, channels-last, and with the channels moved to the end."""
    yield x
    if x.dim() > 3:
        yield x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
        yield x.transpose(1, -1).contiguous().transpose(1, -1)


@pytest.mark.parametrize("name", NORMS)
def test_on_any_layout(name):
    norm, x = make(name)
    fast = copy.deepcopy(norm)
    assert [e.path for e in vtok_fast.accelerate(fast).swapped] == [""]
    for given in layouts(x):
        expected = norm(given)
        y = fast(given)
        assert y.dtype == expected.dtype
        assert (p := parity.close(y, copy.deepcopy(norm).double()(x.double()), norm(x))).ok, p
        if is_channels_last(given) or given.is_contiguous():
            assert y.stride() == expected.stride()


def test_a_group_norm_on_channels_last_is_as_exact_as_on_contiguous():
    torch.manual_seed(0)
    norm = contract.randomize(nn.GroupNorm(8, 32))
    x = contract.noise(1, 32, 256, 256) + 1
    ref64, bound = copy.deepcopy(norm).double()(x.double()), parity.relative_errors
    fast = copy.deepcopy(norm)
    vtok_fast.accelerate(fast)
    y = fast(x.contiguous(memory_format=torch.channels_last))
    assert bound(y, ref64)["whole"] <= 2 * bound(norm(x), ref64)["whole"]


def test_pytorch_runs_on_contiguous():
    norm, x = make("group")
    expected = norm(x)
    vtok_fast.accelerate(norm)
    assert torch.equal(norm(x), expected)
    assert norm(x[:, :, 0]).shape == x[:, :, 0].shape and norm(x[..., 0, 0]).dim() == 2


@pytest.mark.parametrize(
    "norm,why",
    [
        (RootPlusEps(), "eps outside of the root"),
        (ChannelNorm(), "a mean"),
        (MeanSquare(dim=2), "another axis"),
        (nn.RMSNorm((4, 16)), "two axes"),
        (nn.LayerNorm(16), "a mean"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_other_norms_are_left_alone(norm, why):
    assert not vtok_fast.accelerate(norm).swapped


def test_an_axis_that_is_changed_afterwards():
    norm, x = make("mean square")
    vtok_fast.accelerate(norm)
    norm.dim = 2
    last = x.contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(norm(last), MeanSquare(dim=2)(last))


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_the_dtype_is_that_of_the_class(name, autocast):
    norm, x = make(name)
    fast = copy.deepcopy(norm)
    vtok_fast.accelerate(fast)
    for given in layouts(x):
        for dtype in (torch.bfloat16, torch.float32) if autocast else (torch.float32,):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                assert fast(given.to(dtype)).dtype == norm(given.to(dtype)).dtype
    if not autocast:
        assert fast.bfloat16()(x.bfloat16()).dtype == norm.bfloat16()(x.bfloat16()).dtype


@pytest.mark.parametrize("name", ["group", "diffusers", "mean square"])
def test_gradients(name):
    norm, x = make(name)
    *_, x = layouts(x)
    grads = []
    for accelerated in (False, True):
        if accelerated:
            vtok_fast.accelerate(norm)
        leaf = x.double().requires_grad_()
        y = norm.double()(leaf)
        grads.append(torch.autograd.grad(y.pow(3).sum(), [leaf, *norm.parameters()]))
    for fast, eager in zip(*reversed(grads)):
        torch.testing.assert_close(fast, eager, rtol=1e-5, atol=1e-5)


def test_hooks_and_revert():
    norm, x = make("group")
    expected, seen = norm(x), []
    handle = norm.register_forward_hook(lambda *_: seen.append(1))
    report = vtok_fast.accelerate(norm)
    norm(x)
    handle.remove()
    report.revert()
    assert len(seen) == 1 and "forward" not in norm.__dict__ and torch.equal(norm(x), expected)


@pytest.mark.parametrize("name", ["group", "rms", "mean square"])
def test_in_one_graph(name):
    torch._dynamo.reset()  # what other tests compiled counts toward the limit of graphs of one function
    norm, x = make(name)
    vtok_fast.accelerate(norm, check=False)
    for given in layouts(x):
        compiled = torch.compile(norm, fullgraph=True, backend="aot_eager", dynamic=False)
        torch.testing.assert_close(compiled(given), norm(given))


class Chain(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.first, self.norm, self.second = (
            nn.Conv2d(3, 16, 3, padding=1),
            norm,
            nn.Conv2d(16, 4, 3, padding=1),
        )

    def forward(self, x):
        return self.second(F.silu(self.norm(self.first(x))))


@pytest.mark.parametrize("norm", [nn.GroupNorm(4, 16), MeanSquare()], ids=["group", "mean square"])
def test_results_flow_through_them(norm):
    torch.manual_seed(0)
    model, x = Chain(norm).eval(), contract.noise(2, 3, 24, 20)
    with torch.no_grad():
        expected, ref64 = model(x), copy.deepcopy(model).double()(x.double())
        report = vtok_fast.accelerate(model, example=x)
        assert len(report.swapped) == 3
        flow = {p.module: (p.switch.hands_on, bool(p.switch.fed_by)) for p in report._patches}
        assert flow == {model.first: (True, False), model.norm: (True, True), model.second: (False, True)}
        y = model(x)
    assert y.is_contiguous() and (p := parity.close(y, ref64, expected)).ok, p
