"""How benchmarks measure: statistics, taking turns, the list of layers."""

import json
import statistics
from dataclasses import replace

import pytest
import torch

from vtok_fast.bench import harness, report
from vtok_fast.bench.cases import layers
from vtok_fast.bench.harness import Candidate, Settings, Trial

TINY = Settings(quick=True, min_rounds=3, min_seconds=0.0, max_seconds=1.0)


# ---- statistics --------------------------------------------------------------------------------------------


def test_geometric_mean():
    assert harness.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert harness.geometric_mean([3.0]) == pytest.approx(3.0)
    # A plain product would underflow
    assert harness.geometric_mean([1e-200, 1e-200]) == pytest.approx(1e-200)
    for bad in ([], [1.0, 0.0], [-1.0]):
        with pytest.raises(ValueError, match="positive"):
            harness.geometric_mean(bad)


def test_spread_is_median_and_quartiles():
    assert harness.spread([5.0]) == {"median": 5.0, "q1": 5.0, "q3": 5.0}
    assert harness.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0}


def test_ratios_are_taken_within_rounds():
    # The machine is three times slower in the second round; the ratio of medians would see it, that of the
    # rounds does not.
    seconds = {"a": [1.0, 3.0, 1.0, 3.0], "b": [2.0, 6.0, 2.0, 6.0]}
    assert harness.ratios(seconds, "a") == {"b": {"median": 2.0, "q1": 2.0, "q3": 2.0}}


# ---- taking turns ------------------------------------------------------------------------------------------


def test_candidates_take_turns(monkeypatch):
    clock = iter(range(10**6))  # every look at the clock is a second later, so one call makes a sample
    monkeypatch.setattr(harness.time, "perf_counter", lambda: float(next(clock)))
    order = []
    a = Candidate("a", lambda: order.append("a"))
    b = Candidate("b", lambda: order.append("b"), "ours", prepare=lambda: order.append("prepare b"))
    seconds, extras = harness.interleave([a, b], Settings(min_rounds=4, min_seconds=0))
    assert order == ["a", "a", "prepare b", "b", "b"] + ["a", "prepare b", "b"] * 4
    assert [len(s) for s in seconds.values()] == [4, 4] and set(extras["a"]) == {"page_faults"}


def test_rounds_go_on_for_the_time_asked_for_and_no_longer(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])

    def work():
        now[0] += 0.5

    def rounds(**limits):
        return len(harness.interleave([Candidate("a", work)], Settings(**limits))[0]["a"])

    assert rounds(min_rounds=2, min_seconds=4.0, max_seconds=9.0) == 8
    assert rounds(min_rounds=5, min_seconds=0.0, max_seconds=9.0) == 5
    assert rounds(min_rounds=100, min_seconds=0.0, max_seconds=3.0) == 6
    assert rounds(min_rounds=100, min_seconds=0.0, max_seconds=0.1) == 3  # never fewer


def test_short_calls_are_repeated_within_a_sample(monkeypatch):
    now, calls = [0.0], [0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])

    def work():
        now[0] += harness.SAMPLE_SECONDS / 8
        calls[0] += 1

    seconds, _ = harness.interleave([Candidate("a", work)], Settings(min_rounds=3, min_seconds=0.0))
    assert calls[0] == 2 + 3 * 8
    assert statistics.median(seconds["a"]) == pytest.approx(harness.SAMPLE_SECONDS / 8)


@pytest.mark.volatile
def test_measure_names_the_fastest_peer_and_ignores_floors(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])

    def busy(n):
        def work():
            now[0] += n * 1e-8

        return work

    trial = Trial(
        "t",
        "g",
        [
            Candidate("slow", busy(300_000), "eager"),
            Candidate("fast", busy(60_000)),
            Candidate("copy", busy(1), "floor"),
            Candidate("mine", busy(20_000), "ours"),
            Candidate("mine, other", busy(20_000), "variant"),
        ],
    )
    record = harness.measure(trial, TINY)
    assert (record["ours"], record["eager"], record["best"]) == ("mine", "slow", "fast")
    assert set(record["ratios"]) == {"mine", "mine, other"} and set(record["ratios"]["mine"]) == {
        "slow",
        "fast",
        "copy",
        "mine, other",
    }
    assert report.ratio(record, "best") == record["ratios"]["mine"]["fast"]
    assert (
        report.ratio(record, "eager")["median"]
        > report.ratio(record, "best")["median"]
        > 1
        > report.ratio(record, "copy")["median"]
    )
    assert json.loads(json.dumps(record)) == record


def test_a_peer_that_does_not_compile_is_missing_with_its_reason():
    def breaks(x):
        return torch.from_numpy(x.numpy().copy()) if x.sum().item() > 0 else x  # leaves the graph

    function, why = harness.compiled(breaks, torch.ones(2))
    assert function is None and why


# ---- layers ------------------------------------------------------------------------------------------------


def test_layers_are_those_of_the_models():
    chosen = layers.load()
    assert {layer.model.split("-")[0] for layer in chosen} == {"wan2.1", "vidtok", "cosmos"}
    hot = next(
        x
        for x in chosen
        if x.model == "vidtok"
        and x.cin == x.cout == 256
        and x.kernel == (3, 3, 3)
        and x.size == (20, 256, 256)
    )
    assert (
        hot.share == pytest.approx(0.3122)
        and hot.gflop == pytest.approx(4638.6, rel=1e-4)
        and hot.out_size == (20, 256, 256)
    )
    for model in ("wan2.1", "vidtok", "cosmos-cv8x8x8", "cosmos-dv4x8x8"):
        stage_entries = [e for e in json.loads(layers.FILE.read_text())["layers"] if e["model"] == model]
        for stage in ("encode", "decode"):  # the layers left out have less than 1% each
            assert (
                0.85 < sum(e["stages"][stage]["share"] for e in stage_entries if stage in e["stages"]) <= 1.0
            )


def test_first_and_continuing_chunks_are_half_each():
    kinds = [layer.chunk for layer in layers.benchmark_layers() if layer.kernel[0] > 1]
    assert abs(kinds.count("first") - kinds.count("continuing")) <= 2
    assert all(layer.front == layer.kernel[0] - layer.stride[0] for layer in layers.load())


@pytest.mark.parametrize("quick", [False, True])
def test_scaled_layers_keep_what_matters(quick):
    cap = layers.QUICK_GFLOP if quick else layers.GFLOP
    chosen = layers.benchmark_layers(quick=quick)
    assert {layer.group for layer in chosen} == {"3x3 planes", "rest"} and len(set(map(str, chosen))) == len(
        chosen
    )
    for layer in layers.load():
        small = layers.scaled(layer, cap)
        assert small.gflop <= cap or (small.size[0] <= 4 and min(small.size[1:]) < 8 + 4 * max(small.stride))
        assert all(n <= m for n, m in zip(small.size, layer.size)) and min(small.size[1:]) >= 8
        assert replace(small, size=layer.size) == layer
        assert all(
            (n + sum(p) - k) % s == 0
            for n, p, k, s in zip(small.size[1:], small.spatial_pad, small.kernel[1:], small.stride[1:])
        )
