"""`vtok-fast check --models`: every model is compared, and a wrong kernel is found."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from vtok_fast import cli
from vtok_fast.commands import check_models
from vtok_fast.models import VTok


@pytest.mark.slow
def test_every_model_keeps_its_contract(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # no clip of the demo there
    result = CliRunner().invoke(cli.app, ["check", "--models", "--json"])
    said = json.loads(result.stdout)
    assert result.exit_code == 0 and said["ok"] and said["video"] == "a synthetic clip", said
    cases = {
        name: {o["case"].split(" ")[-1] for o in said["outcomes"] if o["op"] == name}
        for name in check_models.MODELS
    }
    for name, found in cases.items():
        assert {"video", "gradients"} < found and {"tokens", "latents"} & found, (name, found)
    assert "scores" in cases["InfoTok"]
    assert all(o["skipped"] is None for o in said["outcomes"] if "gradients" not in o["case"])


@pytest.mark.parametrize(
    ("method", "case"), [("decode", "decoded video"), ("encode", "latents"), ("forward", "gradients")]
)
def test_a_wrong_model_is_found(monkeypatch, method, case):
    """Once accelerated, the model is off by 1e-4 in one place."""
    import vtok_fast

    accelerate = vtok_fast.accelerate

    def spoil(model, **options):
        report = accelerate(model, **options)
        part = model.motion if method == "encode" else model.decoder
        part.register_forward_hook(lambda module, args, y: y * (1 + 1e-4))
        return report

    monkeypatch.setattr(vtok_fast, "accelerate", spoil)
    monkeypatch.setitem(check_models.MODELS, "VTok", lambda: VTok("tiny"))
    found = list(check_models.model_outcomes(check_models.real_clip()[0], ["VTok"]))
    assert [o.case for o in found if not o.ok and case in o.case], found


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="NoTok"):
        next(check_models.model_outcomes(torch.zeros(1, 3, 9, 48, 64), ["NoTok"]))
