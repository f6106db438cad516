"""The choices of the Triton kernels that a run on a GPU has yet to decide, each beside what ships."""

from __future__ import annotations

import importlib

import pytest
import torch

pytest.importorskip("triton")

from vtok_fast.bench import pairs
from vtok_fast.bench.harness import Candidate, Settings
from vtok_fast.kernels import norm_act, scope_attention
from vtok_fast.ops.scope_attention import triton as launcher
from vtok_fast.ops.scope_attention.scope import Scope

EVERY = [pair for op in pairs.PAIRS.values() for pair in op]


@pytest.mark.parametrize("pair", EVERY, ids=lambda pair: pair.name)
def test_a_choice_is_undone_while_the_candidate_runs_and_only_then(pair):
    module = importlib.import_module(pair.module)
    ships = getattr(module, pair.attribute)
    assert type(ships) is type(pair.value) or callable(ships) and callable(pair.value)

    def fails():
        assert getattr(module, pair.attribute) is pair.value
        raise KeyError

    with pytest.raises(KeyError):
        pairs.without(pair, fails)()
    assert getattr(module, pair.attribute) is ships


def test_each_choice_changes_what_is_launched():
    scope = Scope.time_invariant(tiv=9, tv=3, patches=70, slices=3)
    sharing = 16, 2, 200
    found = {
        "a program for each block": lambda: (
            launcher.prepared(scope, 16, torch.device("cpu"), sharing).slots > 0
        ),
        "large heads in chunks": lambda: scope_attention.config("forward", 512, 2, 90).block_d,
        "SiLU by division": lambda: norm_act.is_fast(type("OnGPU", (), {"is_cuda": True})(), True),
        "sums for each channel": lambda: norm_act.joined(4, 128),
        "strides in units of 1": lambda: norm_act.how(True, 1, norm_act.view(torch.empty(1, 8, 2, 4, 4))),
    }
    assert found.keys() == {pair.name for pair in EVERY}
    for pair in EVERY:
        assert pairs.without(pair, found[pair.name])() != found[pair.name]()


def test_there_are_none_on_a_cpu():
    ours = Candidate("vtok_fast", torch.neg, "ours")
    assert pairs.undone("norm_act", ours, Settings(device="cpu")) == []
    names = [c.name for c in pairs.undone("norm_act", ours, Settings(device="cuda"))]
    assert names == [f"vtok_fast, {pair.name}" for pair in pairs.PAIRS["norm_act"]]
    assert all(c.role == "variant" for c in pairs.undone("norm_act", ours, Settings(device="cuda")))
