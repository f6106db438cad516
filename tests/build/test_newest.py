"""scripts/newest.py: which requirements it tries, and that one that breaks the package is reported."""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("tomllib")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "newest.py")))


def test_everything_that_an_installation_asks_for_is_tried(script):
    names = script.requirements(ROOT / "pyproject.toml")
    assert {"torch", "numpy", "safetensors", "rich", "typer", "av", "torchmetrics"} <= set(names)
    assert len(names) == len(set(names)) and all(name.replace("-", "").isalnum() for name in names)


@pytest.mark.parametrize(
    ("newest", "broken", "said", "failed"),
    [
        ("999.0", None, "works", False),
        ("999.0", "check", "3 outside of their contract", True),
        ("999.0", "install", "no such release", True),
        (None, None, "the same", False),
    ],
)
def test_an_outcome(script, monkeypatch, newest, broken, said, failed):
    """Without an index: what a command says is given."""

    def run(*words, **how):
        words = [str(word) for word in words]
        if broken in words:
            raise RuntimeError(said)
        return f"{newest or script.version_here('numpy')}\n" if "numpy" in words[-1:] else ""

    monkeypatch.setitem(script.attempt.__globals__, "environment", lambda name: Path("/t/bin/python"))
    outcome = script.attempt("numpy", "numpy", run)
    assert (outcome.said, outcome.failed) == (said, failed)
    assert outcome.newest == ("?" if broken == "install" else newest or script.version_here("numpy"))
    assert said in outcome.row()


def test_an_unknown_requirement_is_refused(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["newest.py", "no_such_package"])
    with pytest.raises(SystemExit, match="newest: expected one of torch, .* got no_such_package"):
        script.main()
