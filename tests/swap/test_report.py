"""What a report says first, what it counts, and that a failure looks like one, also in the picture."""

import copy
import importlib
import warnings

import pytest
import torch
from torch import nn

import vtok_fast
from vtok_fast.models import VidTok
from vtok_fast.swap import report_picture, summary
from vtok_fast.swap.patch import Swap
from vtok_fast.swap.record import Entry
from vtok_fast.swap.report import Report
from vtok_fast.swap.whole import without

accelerating = importlib.import_module("vtok_fast.swap.accelerate")  # the package has the function


class Slow(nn.Module):
    """Three layers; the adapter below swaps the convolutions, and for one of them computes something else."""

    def __init__(self, wrong: float = 0.0):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3), nn.LayerNorm(8)
        self.b.wrong = wrong

    def forward(self, x):
        return self.norm(self.b(self.a(x)))


class Adapter:
    @staticmethod
    def propose(module):
        if not isinstance(module, nn.Conv1d):
            return None
        function = lambda m, x: type(m).forward(m, x) * (1 + getattr(m, "wrong", 0.0))
        return [Swap("the same convolution", function, sample=lambda m: (torch.randn(1, 4, 12),))]


def accelerated(monkeypatch, model, **options):
    monkeypatch.setattr(accelerating, "ADAPTERS", (Adapter,))
    return vtok_fast.accelerate(model, **options)


def test_the_first_lines_are_the_verdict_and_the_whole_model():
    model = VidTok("tiny").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = vtok_fast.accelerate(model, example=torch.rand(1, 3, 5, 32, 32) * 2 - 1)
    assert not report.notes
    first, second = str(report).splitlines()[:2]
    assert report.ok and first.startswith(f"VidTok: OK: {len(report.swapped)} modules swapped")
    e = report.end_to_end
    assert second.startswith("Whole model, on the example: ") and f"error {e.error:.1e}" in str(report)
    assert min(e.eager_ms, e.fast_ms, e.eager_bytes, e.fast_bytes) > 0
    assert f"{e.eager_ms / e.fast_ms:.2f} times faster" in str(report) or e.fast_ms > e.eager_ms
    assert not any(report.ran().values())  # what the check ran does not count
    assert report.to_dict()["ok"] is True and report.to_dict()["model"] == "VidTok"


def test_kinds_are_counted_and_details_have_every_module():
    report = vtok_fast.accelerate(VidTok("tiny").eval(), check=False)
    text, details = str(report), report.details()
    assert len(text.splitlines()) < 40 < len(details.splitlines())
    assert all(e.path in details for e in report.swapped) and "nothing was measured" in text
    kinds = summary._kinds(report.swapped)
    assert sum(int(str(count)) for count in kinds.columns[1].cells) == len(report.swapped)


def test_a_failure_is_one(monkeypatch, tmp_path):
    report = accelerated(monkeypatch, Slow(wrong=0.01))
    assert not report.ok and [e.path for e in report.swapped] == ["a"]
    assert str(report).startswith("Slow: FAILED: 1 modules swapped") and "b was beyond its contract" in str(
        report
    )
    figure = report_picture.draw(report)
    words = [t.get_text() for axes in figure.axes for t in axes.texts]
    assert any("FAILED" in word for word in words) and figure._suptitle.get_color() == report_picture.RED
    assert "vtok_fast.accelerate(Slow)" in figure._suptitle.get_text()
    assert report.to_dict()["ok"] is False


class Cancels(Slow):
    """What is left of a layer's result without most of it: an error of the layer counts a hundred times."""

    def forward(self, x):
        y = self.b(self.a(x))
        return y - torch.round(y, decimals=2)


def test_swaps_are_taken_out_until_the_whole_model_is_within_its_contract(monkeypatch):
    torch.manual_seed(0)
    model, x = Cancels(wrong=9e-7).eval(), torch.randn(1, 4, 40)
    with torch.no_grad():
        eager = model(x)
    report = accelerated(monkeypatch, model, example=x)
    assert [e.path for e in report.swapped] == ["a"] and report.end_to_end.why == ""
    (taken,) = (e for e in report.skipped if e.path == "b")
    assert taken.error > taken.bound and "the whole model was beyond its contract" in taken.why
    assert "by itself it had an error of" in taken.note
    assert not report.ok and "FAILED" in str(report) and "b" not in report.ran()
    assert report.end_to_end.error <= report.end_to_end.bound
    with torch.no_grad():
        assert torch.equal(model(x), eager) and report.ran() == {"a": 1}
    report.revert()
    assert "forward" not in vars(model.a) and "forward" not in vars(model.b)


def test_nothing_is_left_where_no_swap_may_stay(monkeypatch):
    torch.manual_seed(0)
    model, x = Cancels(wrong=9e-7).eval(), torch.randn(1, 4, 40)
    model.a.wrong = 8e-7
    report = accelerated(monkeypatch, model, example=x)
    assert not report.swapped and not report.active and report.end_to_end.error <= report.end_to_end.bound
    assert {e.path for e in report.skipped if "whole model" in e.why} == {"a", "b"}


class Overflows(Slow):
    def forward(self, x):
        return super().forward(x) * 1e38 * 1e38 * 1e-38 * 1e-38  # infinite on the way, but not in float64


def test_no_swap_is_taken_out_where_the_model_itself_is_beyond_its_contract(monkeypatch):
    report = accelerated(monkeypatch, Overflows().eval(), example=torch.randn(1, 4, 12))
    assert [e.path for e in report.swapped] == ["a", "b"]
    assert "values that are not finite" in report.end_to_end.why and not report.ok


def test_the_picture_of_what_holds_is_not_red(monkeypatch):
    report = accelerated(monkeypatch, Slow())
    figure = report_picture.draw(report)
    assert report.ok and figure._suptitle.get_color() == "black" and "OK" in figure._suptitle.get_text()
    report_picture.draw(Report("close", "Empty"))


def _entry(eager, fast):
    return Entry("m", "Kind", "now", error=1e-7, bound=1e-6, eager_ms=eager, fast_ms=fast)


@pytest.mark.parametrize(
    ("eager", "fast", "shown"),
    [(52.0, 0.2, None), (0.02, 1.5, None), (0.9, 0.9, None), (None, 3.0, None), (3.0, 1.5, "2.00")],
)
def test_no_speed_up_of_what_is_too_short_to_tell(eager, fast, shown):
    report = Report("close")
    report.swapped.append(_entry(eager, fast))
    for text in (str(report), report.details()):
        assert (shown is not None and shown in text) or (
            shown is None and "260" not in text and "0.01" not in text
        )
    assert summary.speedup(report.swapped[0]) == (None if shown is None else float(shown))
    assert ("speed-up" in str(report)) == (shown is not None)


def test_whole_costs_leave_the_model_as_it_was(monkeypatch):
    model = Slow().eval()
    x = torch.randn(2, 4, 12)
    state, want = copy.deepcopy(model.state_dict()), model(x)
    torch.manual_seed(5)
    report = accelerated(monkeypatch, model, example=x)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    with without(report._patches):
        assert not report.active and torch.equal(model(x), want)
    assert report.active and torch.equal(model(x), want)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report.revert()
    assert "forward" not in model.a.__dict__


def test_the_first_call_keeps_nothing():
    """Else small things that stay lie between the large buffers of the first call."""
    model = VidTok("tiny").eval()
    report = vtok_fast.accelerate(model, check=False)
    guards = [patch.method.__func__.__guard__ for patch in report._patches]
    watches = [guard._watch for guard in guards]
    assert None not in watches
    with torch.no_grad():
        model.decode(model.encode(torch.rand(1, 3, 5, 16, 16)))
    assert all(guard._watch is watch for guard, watch in zip(guards, watches))


class DTensor(nn.Parameter):
    """By its name a sharded weight, which is whole by the time it is used, or the swap does not run."""


def test_weights_that_no_kernel_takes_are_seen_at_the_first_call(monkeypatch):
    model, x = Slow().eval(), torch.randn(1, 4, 12)
    model.b.weight = DTensor(model.b.weight.detach())
    report = accelerated(monkeypatch, model, check=False)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="sharded"):
        model(x)
    assert report.ran() == {"a": 1, "b": 0} and "sharded" in report.bypassed["b"].why
