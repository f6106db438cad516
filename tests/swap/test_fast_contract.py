"""``accelerate(contract="fast")``: what is rounded to e4m3, what the report says of it, and what stays."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import vtok_fast
from vtok_fast import parity
from vtok_fast.models import VidTok
from vtok_fast.ops.causal_conv3d import e4m3
from vtok_fast.swap import results

pytestmark = pytest.mark.needs_native


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return VidTok("tiny").eval()


@pytest.fixture
def video() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.rand(1, 3, 5, 16, 16) * 2 - 1


@torch.no_grad()
def test_the_report_has_each_error_and_the_psnr(model, video):
    """And both are those of what the model then does."""
    z64 = copy.deepcopy(model).double()(video.double())
    kept = copy.deepcopy(model.state_dict())
    report = vtok_fast.accelerate(model, example=video, contract="fast")
    contracts = {e.contract for e in report.swapped}
    assert contracts == {"fast", "close"} and report.ok and report.contract == "fast"
    for e in report.swapped:
        assert e.error is None or e.error <= e.bound
        if e.contract == "fast":
            # By rounding, and not by more: two operands of a half step of 2^-4 each, through whole modules.
            assert e.error > 1e-3 and e.bound == parity.FAST and "e4m3" in e.what
    first = next(e for e in report.swapped if e.contract == "fast")
    assert float(first.note.rsplit(" ", 1)[1]) < 1e-5
    assert report.end_to_end.contract == "fast" and report.end_to_end.bound is None
    assert report.psnr == pytest.approx(results.psnr(model(video), z64), abs=0.01)
    assert f"{report.psnr:.1f} dB against float64" in " ".join(str(report).split())
    assert json.loads(report.to_json())["psnr"] == report.psnr
    assert any("simulated" in note for note in report.notes)
    assert all(torch.equal(a, b) for a, b in zip(kept.values(), model.state_dict().values()))


@torch.no_grad()
def test_it_is_never_chosen_by_itself(model):
    report = vtok_fast.accelerate(model, check=False)
    assert report.psnr is None and {e.contract for e in report.swapped} == {"close"}
    assert all(p.switch.scales is None for p in report._patches)


def block_of(model: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    """A block of two 3x3x3 convolutions, and an input."""
    block = model.decoder.mid.block_1
    return block, torch.randn(1, block.conv1.conv.in_channels, 2, 6, 6)


@torch.no_grad()
def test_what_fails_runs_as_under_close(model, monkeypatch):
    """A bound that no rounding keeps to: the module is that of the contract close, to the bit."""
    block, x = block_of(model)
    other = copy.deepcopy(block)
    vtok_fast.accelerate(other, contract="close")
    monkeypatch.setattr(parity, "FAST", 1e-4)
    report = vtok_fast.accelerate(block, contract="fast")
    assert {e.contract for e in report.swapped} == {"close"}
    assert any("not rounded to e4m3" in e.note for e in report.swapped)
    assert any("Nothing is rounded to e4m3" in note for note in report.notes)
    assert torch.equal(block(x), other(x))


@torch.no_grad()
def test_scales_come_from_the_example(model):
    """Another input of twice the size has the scales of the example; without an example each has its own."""
    block, x = block_of(model)
    report = vtok_fast.accelerate(block, example=x, contract="fast")
    (scales,) = [p.switch.scales for p in report._patches]
    recorded = dict(scales._largest)
    assert len(recorded) == 2  # a scale for each convolution
    block(2 * x)
    assert scales._largest == recorded
    report.revert()
    report = vtok_fast.accelerate(block, contract="fast")
    (scales,) = [p.switch.scales for p in report._patches]
    block(x)
    assert scales.ran == 2 and not scales._largest


@torch.no_grad()
def test_revert_gives_the_model_back(model, video):
    expected = model.encoder(video)
    with vtok_fast.accelerated(model, contract="fast", check=False) as report:
        assert (model.encoder(video) - expected).abs().max() > 1e-3 * expected.abs().max()
        copied = copy.deepcopy(model)
        assert torch.equal(copied.encoder(video), model.encoder(video))
    assert torch.equal(model.encoder(video), expected) and not report.active


def test_gradients_are_those_of_the_contract_close(model, video):
    """What is trained is not rounded."""
    other = copy.deepcopy(model)
    vtok_fast.accelerate(model, contract="fast", check=False)
    vtok_fast.accelerate(other, contract="close", check=False)
    for m in (model, other):
        m.encoder(video).square().sum().backward()
    pairs = list(zip(model.encoder.parameters(), other.encoder.parameters()))
    assert pairs and all(torch.equal(a.grad, b.grad) for a, b in pairs)


def test_calibration_ends_also_where_the_model_fails(model, monkeypatch):
    block, x = block_of(model)
    found = []

    def fail(self, call):
        found.append(self)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(e4m3.Scales, "record", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        vtok_fast.accelerate(block, example=x, contract="fast")
    assert found and not any(scales.recording for scales in found)
    assert "forward" not in vars(block)
