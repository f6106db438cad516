"""What the miniatures of the claims stand on: training, pages, rates, and that each script runs."""

from __future__ import annotations

import importlib
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")
ROOT = Path(__file__).resolve().parents[2]

import miniature  # noqa: E402

from vtok_fast.models import VidTok  # noqa: E402


class Noise:
    """Stands in for the clips: batches that depend on the dice alone."""

    def sample(self, dice, shape):
        return (
            torch.rand(
                shape[0], 3, *shape[1:], generator=torch.Generator().manual_seed(dice.randrange(1 << 30))
            )
            * 2
            - 1
        )


def small(**fields) -> VidTok:
    torch.manual_seed(0)
    return VidTok(ch=4, ch_mult=(1, 2, 2), num_res_blocks=1, z_channels=4, **fields)


def test_training_depends_on_the_seed_alone_and_spares_what_is_frozen():
    runs = []
    for _ in range(2):
        model = small(levels=(8,) * 4)
        model.encoder.requires_grad_(False)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        runs.append(
            miniature.train(
                model, Noise(), 4, (1, 5, 16, 16), lr=1e-3, loss=miniature.plain_loss(), label="noise"
            )
        )
        changed = {
            key.split(".")[0]
            for key, value in model.state_dict().items()
            if not torch.equal(value, before[key])
        }
        assert changed == {"decoder"} and not model.training
    assert runs[0] == runs[1] and miniature.CURVES.pop("noise") == runs[0]


def test_a_section_is_added_once_and_then_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(miniature, "CURVES", {"a run": [1.0, 0.5]})
    options = miniature.arguments("x", ["--docs", str(tmp_path)])
    for name, body in (("one", "first"), ("two", "other"), ("one", "again")):
        miniature.publish(options, name, f"{name}: title", body, miniature.new_figure()[0])
    text = (tmp_path / "results.md").read_text()
    assert text.count("## one: title") == 1 and "again" in text and "first" not in text and "other" in text
    assert text.index("## one") < text.index("## two") and text.startswith("# The papers' claims")
    assert "| a run | 2 | 1.000 | 0.500 |" in (tmp_path / "training.md").read_text()
    pictures = {f"{page}_{name}.png" for page in ("results", "training") for name in ("one", "two")}
    assert {path.name for path in tmp_path.iterdir()} == {"results.md", "training.md", *pictures}


def test_tables():
    assert (
        miniature.table(("a", "b"), [("x", 1.234), ("y", 5)])
        == "| a | b |\n| --- | --- |\n| x | 1.23 |\n| y | 5 |"
    )


def test_the_rate_of_a_gaussian_is_steered():
    claims = importlib.import_module("claims_vidtok")
    model = small(regularizer="kl").train()
    x = Noise().sample(random.Random(0), (2, 5, 16, 16))
    result = model.reconstruct(x)
    steer = claims.EqualRate(1e9)
    before = steer.weight
    steer(model, x, 0)
    assert steer.weight < before  # too few bits: pay less attention to them
    assert steer.rate == pytest.approx(
        result.loss.item() * 2 / 0.6931472 / result.codes[:, 0].numel(), rel=1e-4
    )
    steer = claims.EqualRate(1e-9)
    steer(model, x, 0)
    assert steer.weight > before
    assert claims.rate(model.eval(), x) == pytest.approx(steer.rate, rel=1e-4)


@pytest.mark.parametrize(("frames", "tokens", "every"), [(16, 16, 8), (8, 16, 8), (4, 16, 4), (33, 16, 11)])
def test_frames_sampled_at_the_same_cost(frames, tokens, every):
    pytest.importorskip("transformers")
    claims = importlib.import_module("claims_vtok")
    assert claims.interval(frames, tokens) == every


@pytest.mark.slow
@pytest.mark.parametrize("name", ["infotok", "tivtok", "vtok", "promag", "vidtok"])
def test_every_script_runs(name, tmp_path):
    pytest.importorskip("transformers")
    if not (ROOT / "data" / "bikes.mp4").is_file():
        pytest.skip("the clips are not here: vtok_fast.commands.clips")
    assert importlib.import_module(f"claims_{name}").main(["--docs", str(tmp_path), "--scale", "0.004"]) == 0
    assert f"<!-- end of {name} -->" in (tmp_path / "results.md").read_text()
