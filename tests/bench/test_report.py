"""Result files, tables, comparisons and pictures of them."""

import math
import time
from pathlib import Path

import pytest
import torch

import vtok_fast
from vtok_fast.bench import (
    compare,
    harness,
    machine,
    picture,
    products,
    report,
)
from vtok_fast.bench.harness import Settings
from vtok_fast.dispatch import backends, native

TINY = Settings(quick=True, min_rounds=3, min_seconds=0.0, max_seconds=1.0)


def _record(case="c", group="3x3 planes", ours=1.0, eager=6.0, peer=3.0):
    seconds = {"eager": [eager] * 3, "p": [peer] * 3, "vtok_fast": [ours] * 3}
    roles = {"eager": "eager", "p": "peer", "vtok_fast": "ours"}
    return {
        "case": case,
        "group": group,
        "facts": {"algorithm": "direct", "gflop": 1.0, "cached_bytes": 0, "error": 1e-7, "eager_error": 1e-7},
        "missing": {"q": "not installed"},
        "wrong": None,
        "rounds": 3,
        "ours": "vtok_fast",
        "eager": "eager",
        "best": "p",
        "seconds": {
            n: {"role": roles[n], **harness.spread(s), "page_faults": 0.0} for n, s in seconds.items()
        },
        "ratios": {"vtok_fast": harness.ratios(seconds, "vtok_fast")},
    }


def _memory_record():
    return {
        "case": "big 17x256x256 memory",
        "variants": {
            name: {
                "peak": peak * 2**30,
                "loaded": 2**30,
                "seconds": 1.0,
                "encode_seconds": 0.5,
                "weight_cache": 0,
                "model": 2**20,
            }
            for name, peak in (("eager", 4), ("vtok_fast", 3), ("vtok_fast, no weight cache", 2))
        },
    }


@pytest.mark.parametrize(
    "path",
    sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*.json")),
    ids=lambda p: p.stem,
)
def test_committed_results_stay_readable(path, capsys):
    results = report.load(path)
    assert "times the best PyTorch" in report.markdown(results)
    report.show(results)
    assert "targets" in capsys.readouterr().out
    same = compare.compare(results, results)
    assert (
        same.changes and not same.regressions and not same.remarks and not same.only_before + same.only_after
    )


def test_compare_tells_regressions_from_noise(tmp_path):
    def results(sections, gpu=None, **changes):
        return {
            "version": report.VERSION,
            "machine": machine.describe() | ({"gpu": gpu} if gpu else {}),
            "sections": {
                name: machine.state() | changes | {"quick": False, "cases": cases}
                for name, cases in sections.items()
            },
        }

    def case(name, eager, q1, q3):
        record = _record(name, ours=1.0, eager=eager)
        record["ratios"]["vtok_fast"]["eager"] = {"median": eager, "q1": q1, "q3": q3}
        return record

    before = results(
        {
            "fsq": [
                case("a", 4.0, 3.9, 4.1),
                case("b", 4.0, 3.0, 5.0),
                case("c", 4.0, 3.99, 4.01),
                case("gone", 1, 1, 1),
                case("d", 4.0, 3.9, 4.1),
            ]
        }
    )
    after = results(
        {
            "fsq": [
                case("a", 3.0, 2.9, 3.1),
                case("b", 3.3, 2.9, 3.7),
                case("c", 3.95, 3.94, 3.96),
                case("new", 1, 1, 1),
                case("d", 5.0, 4.9, 5.1),
            ]
        },
        torch="9.9",
    )
    found = compare.compare(before, after)
    assert {c.case: c.verdict for c in found.changes} == {
        "a": "slower",
        "b": "same",
        "c": "same",
        "d": "faster",
    }
    assert [c.case for c in found.regressions] == ["a"] and found.regressions[0].change == pytest.approx(
        -0.25
    )
    assert found.regressions[0].noise == pytest.approx(0.1 / 3.0)
    assert found.only_before == ["fsq gone"] and found.only_after == ["fsq new"]
    assert found.remarks == [f"torch: {torch.__version__}, then 9.9"]
    # On a GPU the times themselves are compared.
    slow, fast = (results({"fsq": [_record("a", ours=s, eager=6 * s)]}, "H200") for s in (1.0, 0.5))
    assert compare.compare(slow, fast).changes[0].verdict == "faster"
    with pytest.raises(ValueError, match="a CPU, the second of a GPU"):
        compare.compare(before, fast)


@pytest.mark.parametrize(("name", "m"), [("winograd2", 2), ("winograd4", 4)])
@pytest.mark.parametrize("size", [(4, 4), (8, 12), (5, 7), (1, 1), (17, 3)])
def test_winograds_products_are_counted_as_they_are_done(name, m, size):
    h, w = size
    tiles = sum(1 for y in range(0, h, m) for x in range(0, w, m))
    assert products.share(name, h, w) * 9 * h * w == pytest.approx(tiles * (m + 2) ** 2)
    assert products.share("direct", h, w) == products.share("reference") == 1.0


def test_no_share_of_the_roofline_is_of_operations_that_were_not_done():
    """Ours, which does a quarter of the definition's products, is placed by that quarter; a peer by all."""
    limits = {"copy_gb_s": 1e9, "matmul_tflop_s": {"float32": 0.1}}
    sleep = lambda: time.sleep(0.01)
    candidates = [harness.Candidate("eager", sleep, "eager"), harness.Candidate("vtok_fast", sleep, "ours")]
    facts = {"gflop": 4.0, "done_gflop": 1.0, "dtype": "float32", "algorithm": "winograd4"}
    seconds = harness.measure(harness.Trial("c", "g", candidates, facts), TINY, limits)["seconds"]
    for name, gflop in (("eager", 4.0), ("vtok_fast", 1.0)):
        entry = seconds[name]
        assert entry["tflop_s"] == pytest.approx(gflop / 1e3 / entry["median"])
        assert entry["roofline"] == pytest.approx(gflop / 1e3 / 0.1 / entry["median"])
    assert products.done(facts) == 1.0 and products.done({"gflop": 4.0, "algorithm": "winograd4"}) == 1.0


@pytest.mark.skipif(native.lib() is None, reason="Winograd is the native module's")
def test_what_a_run_saves():
    x, w = torch.randn(1, 16, 3, 9, 14), torch.randn(16, 16, 3, 3, 3)
    whole = 2e-9 * 16 * 3 * 9 * 14 * 16 * 27
    for algorithm in ("direct", "winograd2", "winograd4"):
        with backends.algorithm(algorithm):
            saved = products.saved_gflop(lambda: vtok_fast.causal_conv3d(x, w, backend="cpu"))
        assert saved == pytest.approx(whole * (1 - products.share(algorithm, 9, 14)))


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    limits = {"copy_gb_s": 10.0, "matmul_tflop_s": {"float32": 0.1}}
    record = _record()
    record["facts"] |= {"gflop": 2.0, "megabytes": 10.0}
    mover = _record("m")
    mover["facts"] = {"megabytes": 10.0}
    sections = {
        "causal_conv3d": machine.state() | {"ceilings": limits, "cases": [record]},
        "fsq": machine.state() | {"ceilings": limits, "cases": [mover]},
        "memory": {"cases": [_memory_record()]},
    }
    assert picture.points(sections["causal_conv3d"]) == [(200.0, 2e9 / 3.0, "best"), (200.0, 2e9, "ours")]
    assert picture.points(sections["fsq"])[1] == (picture.NO_OPERATIONS, picture.NO_OPERATIONS * 1e7, "ours")
    picture.draw({"machine": machine.describe(), "sections": sections}, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="no ceilings"):
        picture.draw({"machine": {}, "sections": {"causal_conv3d": {"cases": [record]}}}, tmp_path / "q.png")


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
    sections = {
        "causal_conv3d": state
        | {"cases": [_record("a", ours=1.0), _record("b", ours=4.0), _record("c", "rest", peer=1.5)]},
        "memory": state | {"cases": [_memory_record()]},
    }
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


def test_names_with_brackets_are_shown(capsys):
    record = _record()
    record["best"] = "x[mask]"
    record["seconds"]["x[mask]"] = record["seconds"].pop("p")
    record["ratios"]["vtok_fast"]["x[mask]"] = record["ratios"]["vtok_fast"].pop("p")
    section = machine.state() | {"quick": False, "cases": [record], "failed": {"big": "no memory [oom]"}}
    report.show({"machine": machine.describe(), "sections": {"token_packing": section}})
    said = capsys.readouterr().out
    assert "x[mask]" in said and "[quartiles]" in said and "no memory [oom]" in said


def test_own_shapes_have_no_targets(capsys):
    section = machine.state() | {"quick": False, "cases": [_record("own 8x8")], "failed": {}}
    report.show({"machine": machine.describe(), "sections": {"norm_act": section}})
    assert "targets" not in capsys.readouterr().out


def test_the_clocks_of_a_cpu_are_recorded(monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(
        "processor\t: 0\ncpu MHz\t\t: 2400.5\n\nprocessor\t: 1\ncpu MHz\t\t: 3100.000\n"
    )
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert machine.state()["cpu_mhz"] == [2400.5, 3100.0]
    (tmp_path / "cpuinfo").write_text("processor\t: 0\n")
    assert machine.state()["cpu_mhz"] is None
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "none")
    assert machine.state()["cpu_mhz"] is None


def test_graphs_and_peaks_have_columns_where_they_were_measured(capsys):
    plain, record = _record("plain"), _record("graph")
    record["seconds"]["vtok_fast"] |= {"graph_seconds": 0.0123, "peak_bytes": 77e6}
    record["seconds"]["p"]["no_graph"] = "it waits for the device"
    here = {"cpu": "c", "family": 1, "model": 1, "cores": 1, "isa": "avx2", "caches": {}}
    state = {
        "torch": "2",
        "threads": 1,
        "commit": "c",
        "date": "2026-01-01",
        "load_before": 0,
        "quick": False,
        "failed": {},
    }
    for cases, there in (([plain], False), ([plain, record], True)):
        report.show({"machine": here, "sections": {"norm_act": state | {"cases": cases}}})
        out = capsys.readouterr().out
        assert "targets" in out
        assert (
            "graph ms" in out
            and "12.3" in out
            and "77" in out
            and "no CUDA graph: p (graph): it waits" in out
        ) == there


def test_the_machine_is_named():
    here = machine.describe()
    assert here["cpu"] and here["cores"] >= 1
    assert (
        machine.slug(here | {"cpu": "A(R) B @ 2 GHz", "family": 1, "model": 2, "cores": 3, "isa": "avx2"})
        == "a-r-b-2-ghz-family1-model2-3cores-avx2"
    )
    state = machine.state()
    assert state["torch"] == torch.__version__ and state["threads"] == torch.get_num_threads()
