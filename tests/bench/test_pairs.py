"""The choices of the Triton kernels that a run on a GPU has yet to decide, each beside what ships."""

from __future__ import annotations

import importlib

import pytest
import torch

pytest.importorskip("triton")

from support.triton_launches import recorded  # noqa: E402

from vtok_fast.bench import pairs
from vtok_fast.bench.harness import Candidate, Settings
from vtok_fast.kernels import norm_act, scope_attention, token_packing
from vtok_fast.ops.scope_attention import triton as launcher
from vtok_fast.ops.scope_attention.call import ScopeCall
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


def norm_act_of_groups(x):
    norm_act.norm_act(
        x, None, None, None, None, None, torch.empty_like(x), kind="group", groups=2, per_frame=False,
        eps=1e-6, silu=True, rounding="once",
    )  # fmt: skip


def test_each_choice_changes_what_is_launched(monkeypatch):
    keys = recorded(monkeypatch, norm_act, scope_attention, token_packing)
    dense, small = Scope.dense(40), torch.empty(1, 1, 40, 64, dtype=torch.bfloat16, device="meta")
    video = torch.empty(1, 8, 2, 4, 4, device="meta")
    whole = norm_act.view(video), norm_act.View(None), video.shape
    budget, flag = torch.empty(1, dtype=torch.int64, device="meta"), torch.empty(1, device="meta")

    def launches(function, *args):
        for found in keys.values():
            found.clear()
        function(*args)
        return {name: set(found) for name, found in keys.items()}

    scope = Scope.time_invariant(tiv=9, tv=3, patches=70, slices=3)
    sharing = launcher.Sharing(step=16, rest=16, copies=2, places=200)
    found = {
        "a program for each block": lambda: (
            launcher.prepared(scope, 16, torch.device("cpu"), sharing).slots > 0
        ),
        "large heads in chunks": lambda: scope_attention.config("forward", 512, 2, 90).block_d,
        "a product for the scale": lambda: launches(
            launcher.run, ScopeCall(small, small, small, dense, 0.1), 90
        ),
        "whole steps for what is left": lambda: launches(
            launcher.run, ScopeCall(small, small, small, dense, 0.1), 90
        ),
        "sums that wait for each tile": lambda: launches(
            norm_act.statistics, *whole, True, 1, False, 1e-6, True
        ),
        "selection by histograms": lambda: launches(
            token_packing.select_tokens, torch.empty(1, 70, device="meta"), budget, False, flag
        ),
        "the video's beginning first": lambda: launches(norm_act_of_groups, video),
        "wide programs of scores": lambda: launches(
            token_packing.router_scores, *[torch.empty(1, 3, 9, 64, 256, device="meta")] * 2, (4, 8, 8)
        ),
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
