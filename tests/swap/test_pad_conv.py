"""The general rule: what a module pads is read off, and anything that is more than padding and convolving is
left alone."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vtok_fast
from vtok_fast import parity

pytestmark = pytest.mark.needs_native


class PadThenConv(nn.Module):
    """Somebody's wrapper: pads time and space, each in its own mode, then convolves."""

    def __init__(self, kernel, pads, time_mode, mode, **options):
        super().__init__()
        self.pads, self.time_mode, self.mode = pads, time_mode, mode
        self.conv = nn.Conv3d(4, 6, kernel, **options)

    def forward(self, x):
        (front, back), *space = self.pads
        mode = {"zeros": "constant"}.get(self.time_mode, self.time_mode)
        x = F.pad(x, (0, 0, 0, 0, front, back), mode)
        (top, bottom), (left, right) = space
        mode = {"zeros": "constant"}.get(self.mode, self.mode)
        return self.conv(F.pad(x, (left, right, top, bottom, 0, 0), mode))


def check(module, x, paths=("",)):
    """Accelerates a copy and compares it with the module; returns the report."""
    fast = copy.deepcopy(module)
    report = vtok_fast.accelerate(fast)
    assert [e.path for e in report.swapped] == list(paths), report
    with torch.no_grad():
        eager, ref64, y = module(x), copy.deepcopy(module).double()(x.double()), fast(x)
    assert (p := parity.close(y, ref64, eager)).ok, p
    return report


@pytest.mark.parametrize(
    "time_mode,mode", list(itertools.product(("zeros", "replicate", "reflect"), repeat=2))
)
@pytest.mark.parametrize(
    "kernel,pads,options",
    [
        (3, ((2, 0), (1, 1), (1, 1)), {}),
        ((3, 1, 1), ((1, 1), (0, 0), (0, 0)), {"stride": (2, 1, 1)}),
        ((1, 3, 3), ((0, 0), (0, 1), (0, 1)), {"stride": (1, 2, 2)}),
        ((2, 3, 5), ((1, 0), (2, 2), (3, 1)), {"dilation": (1, 2, 1)}),
        (1, ((0, 0), (0, 0), (0, 0)), {"bias": False}),
        (3, ((2, 0), (0, 0), (0, 0)), {"padding": (0, 1, 1), "groups": 2}),
    ],
    ids=str,
)
def test_the_padding_is_read_off(kernel, pads, options, time_mode, mode):
    torch.manual_seed(0)
    module = PadThenConv(kernel, pads, time_mode, mode, **options)
    report = check(module, torch.randn(2, 4, 5, 9, 8))
    assert "virtual padding" in report.swapped[0].what
    if sum(pads[0]) >= module.conv.kernel_size[0] - 1 and (time_mode != "reflect" or sum(pads[0]) == 0):
        check(module, torch.randn(1, 4, 1, 9, 8))  # a single frame


class Scaled(PadThenConv):
    def forward(self, x):
        return super().forward(x) * 1.5


class Stateful(PadThenConv):
    def forward(self, x):
        self.last = x
        return super().forward(x)


class Pair(PadThenConv):
    def forward(self, x):
        return super().forward(x), x


class ByLength(PadThenConv):
    """Pads single frames in another way, as some libraries do silently."""

    def forward(self, x):
        if x.shape[2] == 1:
            x = F.pad(x, (1, 1, 1, 1, 2, 0))
            return self.conv(x)
        return super().forward(x)


class Dropping(PadThenConv):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class Standardized(PadThenConv):
    def forward(self, x):
        w = self.conv.weight
        return F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0), "replicate"), w / w.norm(), self.conv.bias)


class Narrow(PadThenConv):
    def forward(self, x):
        return F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)).float(), self.conv.weight.float(), None).to(x.dtype)


class Cropping(PadThenConv):
    def forward(self, x):
        return self.conv(F.pad(x, (1, 1, 1, 1, -1, 0)))


@pytest.mark.parametrize("kind", [Scaled, Stateful, Pair, ByLength, Dropping, Standardized, Narrow, Cropping])
def test_more_than_padding_is_left_alone_with_its_reason(kind):
    module = kind(3, ((2, 0), (1, 1), (1, 1)), "replicate", "replicate")
    before = dict(module.__dict__)
    report = vtok_fast.accelerate(module)
    assert [e.path for e in report.swapped] in ([], ["conv"])  # the convolution inside is an ordinary one
    assert next(e for e in report.skipped if e.path == "").why.startswith(
        "pads or convolves in a way of its own: "
    )
    report.revert()
    assert module.__dict__ == before
    torch.manual_seed(1)
    assert torch.equal(torch.rand(2), (torch.manual_seed(1), torch.rand(2))[1])


def test_what_a_class_reads_at_each_call_is_read_at_each_call():
    torch.manual_seed(0)
    module = PadThenConv(3, ((2, 0), (1, 1), (1, 1)), "replicate", "replicate")
    x = torch.randn(1, 4, 4, 8, 8)
    report = vtok_fast.accelerate(module)
    module.mode = module.time_mode = "zeros"  # after it was accelerated
    fast = module(x)
    report.revert()
    assert torch.equal(fast, module(x))


def test_calls_with_more_arguments_go_to_the_class():
    class WithCache(nn.Conv3d):
        def forward(self, x, cache=None):
            front = x.new_zeros(*x.shape[:2], 2, *x.shape[3:]) if cache is None else cache
            return super().forward(torch.cat([front, x], 2))

    torch.manual_seed(0)
    module = WithCache(4, 6, (3, 1, 1))
    x, cache = torch.randn(1, 4, 4, 8, 8), torch.randn(1, 4, 2, 8, 8)
    report = vtok_fast.accelerate(module)
    assert [e.path for e in report.swapped] == [""]
    fast = module(x, cache)
    report.revert()
    assert torch.equal(fast, module(x, cache))


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv1d(4, 6, 3, padding=1),
        nn.Conv1d(4, 6, 5, stride=2, padding=2, padding_mode="replicate"),
        nn.Conv1d(4, 4, 3, groups=4, padding="same", padding_mode="reflect", bias=False),
    ],
    ids=str,
)
def test_one_dimension(module):
    torch.manual_seed(0)
    check(module, torch.randn(3, 4, 11))
    report = vtok_fast.accelerate(module)
    fast = module(torch.ones(4, 11))
    report.revert()
    torch.testing.assert_close(fast, module(torch.ones(4, 11)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "pads,swapped", [(((2, 0), (1, 1), (1, 1)), []), (((0, 0), (0, 0), (0, 0)), [("", "exact", 0.0)])]
)
def test_exact_contract_saves_the_copies_that_pad_nothing(pads, swapped):
    torch.manual_seed(0)
    module = PadThenConv(3, pads, "replicate", "zeros")
    x = torch.randn(2, 4, 5, 9, 8)
    expected = module(x)
    report = vtok_fast.accelerate(module, contract="exact")
    assert [(e.path, e.contract, e.error) for e in report.swapped] == swapped
    assert torch.equal(module(x), expected)


def test_large_weights_are_not_copied():
    module = PadThenConv(3, ((2, 0), (1, 1), (1, 1)), "replicate", "replicate")
    module.conv = nn.Conv3d(2048, 2048, 3, device="meta")
    report = vtok_fast.accelerate(module, check=False)
    assert any(e.why == "its weights are on the meta device" for e in report.skipped)


def test_hooks_on_the_inner_convolution_run():
    module = PadThenConv(3, ((2, 0), (1, 1), (1, 1)), "replicate", "replicate")
    seen = []
    module.conv.register_forward_hook(lambda *a: seen.append(1))
    report = vtok_fast.accelerate(module)
    module(torch.randn(1, 4, 4, 8, 8))
    assert seen and "" not in [e.path for e in report.swapped]
