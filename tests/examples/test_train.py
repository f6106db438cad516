"""The training example: that it learns, that it resumes where it stopped, and what it says to bad input."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("matplotlib")

from vtok_fast.commands.load_model import systems
from vtok_fast.io.video import write_video
from vtok_fast.models import VidTok

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--threads", "1", "--crop", "1x5x16x16", "--warmup", "2", "--ema", "0.5")
HELD_OUT = ("--hold-out", "two.mp4:0-17")


def train(*options: str | Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, ROOT / "examples" / "train.py", *map(str, options)],
        capture_output=True,
        text=True,
        env=environment,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 96), indexing="ij")
    for name, phase in (("one", 0.0), ("two", 1.5)):
        frames = [torch.stack((torch.sin(3 * x + phase + t / 5), torch.cos(2 * y), x * y)) for t in range(20)]
        write_video(folder / f"{name}.mp4", torch.stack(frames, 1))
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Six steps without a break, with three frames of validation held out of one clip."""
    output = tmp_path_factory.mktemp("run")
    result = train("--data", data, "--output", output, "--steps", 6, "--every", 3, *HELD_OUT, *SMALL)
    assert result.returncode == 0, result.stderr
    return output, result.stdout


def test_it_writes_what_it_says(run):
    output, said = run
    assert {path.name for path in output.iterdir()} == {"state.pt", "model.safetensors", "loss.png"}
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [line["step"] for line in lines] == [3, 6]
    assert all(0 < line["psnr"] < 60 for line in lines)
    assert VidTok.from_checkpoint(output / "model.safetensors").config.name == "tiny"


def test_the_average_lags_behind(run):
    state = torch.load(run[0] / "state.pt", weights_only=True)
    saved = VidTok.from_checkpoint(run[0] / "model.safetensors").state_dict()
    assert all(torch.equal(saved[key], value) for key, value in state["average"].items())
    assert any(not torch.equal(saved[key], value) for key, value in state["model"].items())


def test_a_resumed_run_ends_where_an_unbroken_one_does(run, data, tmp_path):
    options = ("--data", data, "--output", tmp_path, "--every", 3, *HELD_OUT, *SMALL)
    for stop in (("--stop", 3), ("--resume",)):
        result = train("--steps", 6, *stop, *options)
        assert result.returncode == 0, result.stderr
    unbroken, resumed = (torch.load(folder / "state.pt", weights_only=True) for folder in (run[0], tmp_path))
    assert resumed["step"] == 6 and resumed["losses"] == unbroken["losses"]
    for part in ("model", "average"):
        assert all(torch.equal(resumed[part][key], value) for key, value in unbroken[part].items())


@pytest.mark.parametrize(
    "model",
    ["infotok", *(pytest.param(m, marks=pytest.mark.slow) for m in ("cosmos", "promag", "tivtok", "vtok"))],
)
def test_every_model_trains(data, tmp_path, model):
    crop = ("--crop", "1x16x32x32") if model in ("tivtok", "vtok") else ("--crop", "1x5x32x32")
    result = train(
        "--model", model, "--data", data, "--output", tmp_path, "--steps", 2, "--threads", "1", *crop
    )
    assert result.returncode == 0, result.stderr
    saved = systems()[model].from_checkpoint(tmp_path / "model.safetensors")
    fresh = torch.load(tmp_path / "state.pt", weights_only=True)
    assert (
        saved.config.name == "tiny"
        and len(fresh["losses"]) == 2
        and all(0 < loss < 100 for loss in fresh["losses"])
    )


@pytest.mark.slow
def test_the_second_stage_trains_the_decoder_alone(run, data, tmp_path, monkeypatch):
    start = run[0] / "model.safetensors"
    result = train("--data", data, "--output", tmp_path, "--steps", 2, "--start", start, "--stage", 2, *SMALL)
    assert result.returncode == 0, result.stderr
    before, after = (
        VidTok.from_checkpoint(file).state_dict() for file in (start, tmp_path / "model.safetensors")
    )
    changed = {key.split(".")[0] for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed == {"decoder"}
    monkeypatch.syspath_prepend(ROOT / "examples")
    arguments = importlib.import_module("train").arguments
    second, first = (
        arguments([*words, "--steps", "1"]).crop for words in (["--stage", "2", "--start", "x"], [])
    )
    assert [(b, t, h // 2, w // 2) for b, t, h, w in second] == [*first]
    assert "--start" in train("--stage", 2, "--steps", 1).stderr


@pytest.mark.slow
def test_a_grown_model_learns_above_its_lower_one(data, tmp_path):
    common = ("--model", "promag", "--data", data, "--steps", 2, "--threads", 1, "--crop", "1x9x16x16")
    result = train(*common, "--output", tmp_path / "4x")
    assert result.returncode == 0, result.stderr
    lower = tmp_path / "4x" / "model.safetensors"
    result = train(*common, "--output", tmp_path / "8x", "--start", lower, "--grow")
    assert result.returncode == 0, result.stderr
    kind = systems()["promag"]
    before, after = kind.from_checkpoint(lower), kind.from_checkpoint(tmp_path / "8x" / "model.safetensors")
    assert after.config.growth == 1
    for key, value in before.encoder.state_dict().items():
        assert torch.equal(after.encoder.state_dict()[key], value)
    grown = before.grow().state_dict()
    assert any(
        not torch.equal(grown[key], value)
        for key, value in after.state_dict().items()
        if key.startswith("encoder_growth")
    )
    refused = train(*common, "--output", tmp_path / "no", "--config", "tiny_8x")
    assert refused.returncode == 1 and "frozen" in refused.stderr


def test_weights_of_losses(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    weights_of = importlib.import_module("recipes").weights_of
    assert weights_of("vidtok", "paper", False) == {
        "mse": 0.0,
        "edges": 0.0,
        "aux": 1.0,
        "lpips": 1.0,
        "gan": 0.2,
        "gan_start": 20001,
        "lecam": 0.005,
    }
    # A Gaussian's divergence is a sum, FSQ's loss a mean
    assert weights_of("vidtok", "paper", True)["aux"] == 1e-6
    assert weights_of("vidtok", "package", False)["lpips"] == 0


@pytest.mark.slow
def test_it_learns(data, tmp_path):
    result = train("--data", data, "--output", tmp_path, "--steps", 40, "--every", 40, "--lr", "3e-3", *SMALL)
    assert result.returncode == 0, result.stderr
    losses = torch.load(tmp_path / "state.pt", weights_only=True)["losses"]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])


@pytest.mark.slow
def test_a_discriminator_learns_beside_it_and_is_resumed(data, tmp_path):
    gan = ("--gan", 0.2, "--gan-start", 1, "--steps", 4, "--every", 2, "--data", data, *SMALL)
    for folder, *more in (("whole",), ("parts", "--stop", 2), ("parts", "--resume")):
        result = train("--output", tmp_path / folder, *more, *gan)
        assert result.returncode == 0, result.stderr
    whole, parts = (
        torch.load(tmp_path / folder / "state.pt", weights_only=True) for folder in ("whole", "parts")
    )
    assert whole["losses"] == parts["losses"]
    for key, value in whole["adversary"]["discriminator"].items():
        assert torch.equal(value, parts["adversary"]["discriminator"][key])
    result = train("--output", tmp_path / "parts", "--resume", "--steps", 6, "--data", data, *SMALL)
    assert result.returncode == 1 and "with a discriminator" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lpips", 1), "lpips: "),
        (("--data", "nowhere"), "no video"),
        (("--hold-out", "other.mp4:0-17"), "hold_out='other.mp4'"),
        (("--hold-out", "two.mp4:0-9"), "fewer than"),
        (("--crop", "1x5x512x512"), "512x512"),
        (("--config", "huge"), "config='huge'"),
        (("--resume",), "state.pt"),
    ],
)
def test_bad_input_is_one_line(data, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.syspath_prepend(ROOT / "examples")
    threads = torch.get_num_threads()
    try:
        code = importlib.import_module("train").main(
            [str(o) for o in ("--data", data, "--output", tmp_path, "--steps", 1, *SMALL, *options)]
        )
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 1
    assert len(lines) == 1 and lines[0].startswith("train: ") and message in lines[0]
