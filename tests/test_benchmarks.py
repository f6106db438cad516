"""The benchmarks' own machinery: statistics, taking turns, files, the list of layers; and that every benchmark runs."""

import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import causal_conv3d, fsq, harness, layers, machine, norm_act, report, scope_attention, vidtok  # noqa: E402
from benchmarks import token_packing  # noqa: E402
from benchmarks.harness import Candidate, Settings, Trial  # noqa: E402
from vtok_fast import native  # noqa: E402

TINY = Settings(quick=True, min_rounds=3, min_seconds=0.0, max_seconds=1.0)


# ---- statistics ----------------------------------------------------------------------------------------------------------


def test_geometric_mean():
    assert harness.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert harness.geometric_mean([3.0]) == pytest.approx(3.0)
    assert harness.geometric_mean([1e-200, 1e-200]) == pytest.approx(1e-200)  # a plain product would underflow
    for bad in ([], [1.0, 0.0], [-1.0]):
        with pytest.raises(ValueError, match="positive"):
            harness.geometric_mean(bad)


def test_spread_is_median_and_quartiles():
    assert harness.spread([5.0]) == {"median": 5.0, "q1": 5.0, "q3": 5.0}
    assert harness.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0}


def test_ratios_are_taken_within_rounds():
    # The machine is three times slower in the second round; the ratio of medians would see it, that of the rounds does not.
    seconds = {"a": [1.0, 3.0, 1.0, 3.0], "b": [2.0, 6.0, 2.0, 6.0]}
    assert harness.ratios(seconds, "a") == {"b": {"median": 2.0, "q1": 2.0, "q3": 2.0}}


# ---- taking turns --------------------------------------------------------------------------------------------------------


def test_candidates_take_turns(monkeypatch):
    clock = iter(range(10**6))  # every look at the clock is a second later, so one call makes a sample
    monkeypatch.setattr(harness.time, "perf_counter", lambda: float(next(clock)))
    order = []
    a = Candidate("a", lambda: order.append("a"))
    b = Candidate("b", lambda: order.append("b"), "ours", prepare=lambda: order.append("prepare b"))
    seconds, faults = harness.interleave([a, b], Settings(min_rounds=4, min_seconds=0))
    assert order == ["a", "a", "prepare b", "b", "b"] + ["a", "prepare b", "b"] * 4
    assert [len(s) for s in seconds.values()] == [4, 4] and set(faults) == {"a", "b"}


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


def test_measure_names_the_fastest_peer_and_ignores_floors():
    def busy(n):
        return lambda: sum(range(n))

    trial = Trial("t", "g", [Candidate("slow", busy(300_000), "eager"), Candidate("fast", busy(60_000)), Candidate("copy", busy(1), "floor"),
                             Candidate("mine", busy(20_000), "ours"), Candidate("mine, other", busy(20_000), "variant")])
    record = harness.measure(trial, TINY)
    assert (record["ours"], record["eager"], record["best"]) == ("mine", "slow", "fast")
    assert set(record["ratios"]) == {"mine", "mine, other"} and set(record["ratios"]["mine"]) == {"slow", "fast", "copy", "mine, other"}
    assert report.ratio(record, "best") == record["ratios"]["mine"]["fast"]
    assert report.ratio(record, "eager")["median"] > report.ratio(record, "best")["median"] > 1 > report.ratio(record, "copy")["median"]
    assert json.loads(json.dumps(record)) == record


def test_a_peer_that_does_not_compile_is_missing_with_its_reason():
    def breaks(x):
        return torch.from_numpy(x.numpy().copy()) if x.sum().item() > 0 else x  # leaves the graph

    function, why = harness.compiled(breaks, torch.ones(2))
    assert function is None and why


# ---- layers --------------------------------------------------------------------------------------------------------------


def test_layers_are_those_of_the_models():
    chosen = layers.load()
    assert {layer.model.split("-")[0] for layer in chosen} == {"wan2.1", "vidtok", "cosmos"}
    hot = next(x for x in chosen if x.model == "vidtok" and x.cin == x.cout == 256 and x.kernel == (3, 3, 3) and x.size == (20, 256, 256))
    assert hot.share == pytest.approx(0.3122) and hot.gflop == pytest.approx(4638.6, rel=1e-4) and hot.out_size == (20, 256, 256)
    for model in ("wan2.1", "vidtok", "cosmos-cv8x8x8", "cosmos-dv4x8x8"):
        stage_entries = [e for e in json.loads(layers.FILE.read_text())["layers"] if e["model"] == model]
        for stage in ("encode", "decode"):  # the layers left out have less than 1% each
            assert 0.85 < sum(e["stages"][stage]["share"] for e in stage_entries if stage in e["stages"]) <= 1.0


def test_first_and_continuing_chunks_are_half_each():
    kinds = [layer.chunk for layer in layers.benchmark_layers() if layer.kernel[0] > 1]
    assert abs(kinds.count("first") - kinds.count("continuing")) <= 2
    assert all(layer.front == layer.kernel[0] - layer.stride[0] for layer in layers.load())


@pytest.mark.parametrize("quick", [False, True])
def test_scaled_layers_keep_what_matters(quick):
    cap = layers.QUICK_GFLOP if quick else layers.GFLOP
    chosen = layers.benchmark_layers(quick=quick)
    assert {layer.group for layer in chosen} == {"3x3 planes", "rest"} and len(set(map(str, chosen))) == len(chosen)
    for layer in layers.load():
        small = layers.scaled(layer, cap)
        assert small.gflop <= cap or (small.size[0] <= 4 and min(small.size[1:]) < 8 + 4 * max(small.stride))
        assert all(n <= m for n, m in zip(small.size, layer.size)) and min(small.size[1:]) >= 8
        assert replace(small, size=layer.size) == layer
        assert all((n + sum(p) - k) % s == 0 for n, p, k, s in zip(small.size[1:], small.spatial_pad, small.kernel[1:], small.stride[1:]))


# ---- files and tables ----------------------------------------------------------------------------------------------------


def _record(case="c", group="3x3 planes", ours=1.0, eager=6.0, peer=3.0):
    seconds = {"eager": [eager] * 3, "p": [peer] * 3, "vtok_fast": [ours] * 3}
    roles = {"eager": "eager", "p": "peer", "vtok_fast": "ours"}
    return {"case": case, "group": group, "facts": {"algorithm": "direct", "gflop": 1.0, "cached_bytes": 0, "error": 1e-7, "eager_error": 1e-7},
            "missing": {"q": "not installed"}, "wrong": None, "rounds": 3, "ours": "vtok_fast", "eager": "eager", "best": "p",
            "seconds": {n: {"role": roles[n], **harness.spread(s), "page_faults": 0.0} for n, s in seconds.items()},
            "ratios": {"vtok_fast": harness.ratios(seconds, "vtok_fast")}}


def _memory_record():
    return {"case": "big 17x256x256 memory", "variants": {
        name: {"peak": peak * 2**30, "loaded": 2**30, "seconds": 1.0, "encode_seconds": 0.5, "weight_cache": 0, "model": 2**20}
        for name, peak in (("eager", 4), ("vtok_fast", 3), ("vtok_fast, no weight cache", 2))}}


def test_results_round_trip_and_sections_are_kept(tmp_path):
    path, here = tmp_path / "results" / "r.json", machine.describe()
    state = machine.state() | {"quick": False}
    first = {"causal_conv3d": state | {"cases": [_record()]}}
    report.save(path, here, first)
    assert report.load(path) == {"version": report.VERSION, "machine": here, "sections": first}
    report.save(path, here, {"memory": state | {"cases": [_memory_record()]}})
    assert set(report.load(path)["sections"]) == {"causal_conv3d", "memory"}
    report.save(path, here, {"causal_conv3d": state | {"cases": [_record("other")]}})
    assert [c["case"] for c in report.load(path)["sections"]["causal_conv3d"]["cases"]] == ["other"]
    with pytest.raises(ValueError, match="another machine"):
        report.save(path, here | {"cpu": "abacus"}, first)
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        report.load(path)


def test_targets_and_markdown_come_from_the_results(capsys):
    state = machine.state() | {"quick": False}
    sections = {"causal_conv3d": state | {"cases": [_record("a", ours=1.0), _record("b", ours=4.0), _record("c", "rest", peer=1.5)]},
                "memory": state | {"cases": [_memory_record()]}}
    figures = {(t.section, t.group, t.statistic): report.reached(t, sections) for t in report.TARGETS}
    assert figures["causal_conv3d", "3x3 planes", "mean"] == pytest.approx(math.sqrt(3.0 * 0.75))
    assert figures["causal_conv3d", "rest", "mean"] == pytest.approx(1.5)
    assert figures["causal_conv3d", None, "least"] == pytest.approx(0.75)
    assert figures["fsq", None, "mean"] is None
    assert report.memory_ratios(_memory_record()) == {"vtok_fast": 0.75, "vtok_fast, no weight cache": 0.5}
    results = {"machine": machine.describe(), "sections": sections}
    text = report.markdown(results)
    assert "| causal_conv3d, 3x3 planes | 2 | 1.50 | 0.75 | 3.00 |" in text
    copied = _record("f", "large")
    copied["ratios"]["vtok_fast"]["plain copy"] = harness.spread([0.8])
    with_fsq = report.markdown(results | {"sections": {"fsq": state | {"cases": [copied]}}})
    assert "fsq takes 1.25 times (large) as long as a plain copy" in with_fsq
    assert "| big 17x256x256, vtok_fast, no weight cache | 2.00 | 0.50 |" in text
    report.show(results)
    assert "peak memory" in capsys.readouterr().out


def test_the_machine_is_named():
    here = machine.describe()
    assert here["cpu"] and here["cores"] >= 1
    assert machine.slug(here | {"cpu": "A(R) B @ 2 GHz", "family": 1, "model": 2, "cores": 3, "isa": "avx2"}) == "a-r-b-2-ghz-family1-model2-3cores-avx2"
    state = machine.state()
    assert state["torch"] == torch.__version__ and state["threads"] == torch.get_num_threads()


# ---- every benchmark runs ------------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread():
    """On a busy machine, small parallel regions wait for each other's threads most of the time. The benchmarks set the bound of
    the weight cache; it is given back too."""
    threads, lib = torch.get_num_threads(), native.lib()
    bound = lib.weight_cache_stats()["bound"] if lib else 0
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if lib:
        lib.set_weight_cache(bound)


def _run(module, case):
    with torch.no_grad():
        trial = module.build(case, TINY)
        record = harness.measure(trial, TINY)
    assert trial.wrong is None
    assert report.ratio(record, "best")["median"] > 0 and report.ratio(record, "eager")["median"] > 0
    json.dumps(record)
    return record


@pytest.mark.parametrize("layer", layers.benchmark_layers(quick=True), ids=str)
def test_causal_conv3d_runs(layer, one_thread):
    record = _run(causal_conv3d, causal_conv3d.Case(layers.scaled(replace(layer, cin=32, cout=32), 0.02)))
    assert "vtok_fast, no weight cache" in record["ratios"]


@pytest.mark.parametrize("layer", layers.benchmark_layers(), ids=str)
def test_all_peers_compute_the_same(layer, one_thread):
    layer = replace(layer, cin=8, cout=8)
    layer = layers.scaled(layer, 0.001)
    trial = causal_conv3d.build(causal_conv3d.Case(layer), TINY)
    ours = trial.ours.call()
    for c in trial.candidates:
        torch.testing.assert_close(c.call(), ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", norm_act.cases(TINY), ids=str)
def test_norm_act_runs(case, one_thread):
    case = replace(case, size=(*case.size[:1], 2, 8, 8), compile=False)
    _run(norm_act, case)
    trial = norm_act.build(case, TINY)
    for c in trial.candidates:
        y = c.call()
        video = y if y.dim() == 5 else y.unsqueeze(0).transpose(1, 2)  # VidTok's own norm works on frames
        torch.testing.assert_close(video, trial.ours.call())


@pytest.mark.parametrize("layout", ["planar", "channels last"])
def test_fsq_runs(layout, one_thread):
    record = _run(fsq, fsq.Case("large", (8, 5, 5), (2, 8, 8), layout))
    assert record["facts"]["differ_from_float64"] == 0 and "plain copy" in record["ratios"]["vtok_fast"]


@pytest.mark.parametrize("case", token_packing.cases(TINY), ids=str)
def test_token_packing_runs(case, one_thread):
    _run(token_packing, replace(case, compile=False))
    trial = token_packing.build(case, TINY)
    for c in trial.candidates if case.dtype != torch.bfloat16 else ():  # in which eager scores are rounded, and tie
        assert torch.equal(c.call().reshape(trial.ours.call().shape), trial.ours.call())


@pytest.mark.parametrize("case", scope_attention.cases(TINY), ids=str)
def test_scope_attention_runs(case, one_thread):
    record = _run(scope_attention, replace(case, flex=False))
    assert record["facts"]["gflop"] > 0


def test_scope_attention_and_flex_attention_see_the_same():
    for case in scope_attention.cases(TINY):
        positions = torch.arange(case.scope().q_len)
        assert torch.equal(case.sees()(positions[:, None], positions), case.scope().mask())


def test_vidtok_runs(one_thread):
    record = _run(vidtok, vidtok.Case("tiny", (1, 32, 32)))
    assert record["facts"]["swapped"] > 0 and record["facts"]["tokens"] == 64
