"""The fuzzer itself: what it spoils was sound before, it finds what is planted, and a short run of each
target holds."""

from __future__ import annotations

import collections
import random
import sys

import pytest
import torch
from support import fuzz

from vtok_fast.dispatch import native


@pytest.fixture(autouse=True)
def notes(tmp_path, monkeypatch):
    """A run notes its last case for whoever finds the process dead."""
    monkeypatch.setattr(fuzz, "SEED", tmp_path / "seed")
    monkeypatch.setattr(fuzz, "LAST", tmp_path / "call")


@pytest.mark.needs_native
def test_calls_are_sound_before_they_are_spoilt():
    """Of every entry point that takes tensors, except for pads too wide for `reflect`, which are refused."""
    ran, refused = collections.Counter(), collections.Counter()
    for seed in range(60):
        torch.manual_seed(seed)
        for call, arguments in fuzz.native_calls(random.Random(seed)):
            try:
                call(*[native.arg(a) if isinstance(a, torch.Tensor) else a for a in arguments])
                ran[call.__name__] += 1
            except ValueError as error:
                assert "reflect" in str(error), f"{call.__name__}, seed {seed}: {error}"
                refused[call.__name__] += 1
    tensor = "tuple[int, int, tuple[int, ...], tuple[int, ...]]"  # how the module's signatures write one
    taking = {name for name in dir(native.lib()) if tensor in str(getattr(native.lib(), name).__doc__)}
    taking = {name for name in taking if "cuda" not in name and "sm90" not in name}
    assert len(taking) > 8 and taking <= set(ran) and sum(refused.values()) < 10, (taking - set(ran), refused)


@pytest.mark.parametrize(
    "target", [pytest.param("native", marks=pytest.mark.needs_native), "packed", "tokens", "results"]
)
def test_a_short_run(target, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fuzz.py", target, "--cases", "150", "--seed", "11"])
    assert fuzz.main() == 0
    said = capsys.readouterr().out
    assert f"{target}: 150 cases from seed 11" in said
    assert target == "results" or {"native": " ran'"}.get(target, "'taken'") in said  # not all was refused


def test_what_a_reader_should_not_raise_ends_the_run_with_its_seed(monkeypatch, capsys):
    """A reader that lets one damaged byte through as another kind of error."""

    def fragile(r: random.Random) -> str:
        if r.random() < 0.1:
            raise IndexError("planted")
        return "refused"

    monkeypatch.setitem(fuzz.TARGETS, "packed", fragile)
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "packed", "--cases", "500", "--seed", "3"])
    assert fuzz.main() == 1
    seed = capsys.readouterr().out.split("--seed ")[1].split()[0]
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "packed", "--cases", "1", "--seed", seed])
    assert fuzz.main() == 1
