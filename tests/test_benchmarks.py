"""The benchmarks' own machinery: statistics, taking turns, files, the list of layers; and that every benchmark runs."""

import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vtok_fast import native
from vtok_fast.bench import (
    causal_conv3d,
    ceilings,
    compare,
    fsq,
    harness,
    layers,
    machine,
    norm_act,
    picture,
    report,
    scope_attention,
    timers,
    token_packing,
    vidtok,
)
from vtok_fast.bench import run as runner
from vtok_fast.bench.harness import Candidate, Settings, Trial
from vtok_fast.bench.own import Own

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


def test_measure_names_the_fastest_peer_and_ignores_floors():
    def busy(n):
        return lambda: sum(range(n))

    trial = Trial("t", "g", [Candidate("slow", busy(300_000), "eager"), Candidate("fast", busy(60_000)),
                             Candidate("copy", busy(1), "floor"),
                             Candidate("mine", busy(20_000), "ours"), Candidate("mine, other", busy(20_000), "variant")])
    record = harness.measure(trial, TINY)
    assert (record["ours"], record["eager"], record["best"]) == ("mine", "slow", "fast")
    assert set(record["ratios"]) == {"mine", "mine, other"} and set(record["ratios"]["mine"]) == {"slow", "fast", "copy",
                                                                                                  "mine, other"}
    assert report.ratio(record, "best") == record["ratios"]["mine"]["fast"]
    assert report.ratio(record, "eager")["median"] > report.ratio(record, "best")["median"] > 1 > report.ratio(record,
                                                                                                               "copy")["median"]
    assert json.loads(json.dumps(record)) == record


def test_a_peer_that_does_not_compile_is_missing_with_its_reason():
    def breaks(x):
        return torch.from_numpy(x.numpy().copy()) if x.sum().item() > 0 else x  # leaves the graph

    function, why = harness.compiled(breaks, torch.ones(2))
    assert function is None and why


# ---- a GPU, in place of which a clock stands -----------------------------------------------------------------------------


class FakeCuda:
    """What DeviceTimer asks of torch.cuda. ``milliseconds`` passes while calls work; reading an event before the device has been
    waited for is an error, as it is on a GPU."""

    def __init__(self, cache=1 << 12):
        self.milliseconds, self.waited, self.cache, self.now, self.most = 0.0, 0, cache, 100, 0
        fake = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at, self.order = fake.milliseconds, fake.waited

            def elapsed_time(self, end):
                assert fake.waited > end.order, "not waited for"
                return end.at - self.at

        self.Event = Event

    def get_device_properties(self, device):
        return type("Properties", (), {"L2_cache_size": self.cache})

    def synchronize(self):
        self.waited += 1

    def reset_peak_memory_stats(self):
        self.most = self.now

    def memory_allocated(self):
        return self.now

    def max_memory_allocated(self):
        return self.most


@pytest.fixture
def cuda(monkeypatch):
    """Settings("gpu") then measure by events of a fake device, on tensors of the CPU."""
    fake = FakeCuda()
    monkeypatch.setattr(timers.DeviceTimer, "LEAST_FLUSH", 1 << 10)
    monkeypatch.setattr(timers.DeviceTimer.__init__, "__defaults__", (fake,))
    monkeypatch.setattr(Settings, "on_gpu", property(lambda self: True))
    return fake


def test_events_measure_what_lies_between_them(cuda):
    cuda.cache = 1 << 20
    seen = []

    def work(x, extra):
        seen.append(x.data_ptr())
        cuda.milliseconds += 3.0
        cuda.most = cuda.now + 700

    x = torch.randn(1 << 16)  # a quarter of the cache: eight copies fill it twice
    seconds, extras = harness.interleave([Candidate("a", work, inputs=(x, None))], TINY)
    assert seconds["a"] == [pytest.approx(3e-3)] * 3
    assert extras["a"]["peak_bytes"] == 700 and extras["a"]["host_seconds"] > 0
    assert set(seen) - {x.data_ptr()} and len(set(seen)) <= 8


def test_inputs_rotate_until_they_fill_the_cache(cuda):
    timer = timers.DeviceTimer("cpu")
    big, small, tiny = torch.randn(1 << 12), torch.randn(64, 8), torch.randn(4)
    assert [len(timer.calls(torch.neg, (t,))) for t in (big, small, tiny)] == [1, 4, timers.DeviceTimer.MOST_SETS]
    calls = timer.calls(torch.clone, (small.t(), None))
    assert len({call.args[0].data_ptr() for call in calls}) == 4 and calls[0].args[0].data_ptr() == small.data_ptr()
    assert all(call.args[1] is None and torch.equal(call.args[0], small.t()) for call in calls)


def test_a_twin_has_the_same_strides():
    part = torch.randn(2, 6, 4)[:, ::2].transpose(1, 2)
    other = timers.twin(part)
    assert other.stride() == part.stride() and torch.equal(other, part) and other.data_ptr() != part.data_ptr()


def test_what_a_gpu_run_records(cuda, monkeypatch):
    properties = type("Properties", (), {"name": "NVIDIA H200", "major": 9, "minor": 0, "multi_processor_count": 132, "uuid": "ab",
                                         "total_memory": 141 * 2**30, "L2_cache_size": 50 << 20})
    asked = []

    def smi(command, **_):
        asked.append(command)
        return type("Done", (), {"stdout": "1980, 1980, [N/A], 33, 120.5\n" if "clocks.sm" in command[1] else "580.65.06\n"})

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(machine.subprocess, "run", smi)
    monkeypatch.setattr(machine, "_commit", lambda: "abc")
    here = machine.describe("cuda")
    assert machine.slug(here) == "h200" and here["capability"] == "9.0" and here["sms"] == 132
    state = machine.state("cuda")
    assert state["driver"] == "580.65.06" and {"cudnn", "triton", "cuda", "commit"} <= state.keys()
    assert machine.clocks("cuda") == {"sm_mhz": 1980.0, "sm_mhz_most": 1980.0, "memory_mhz": None, "temperature": 33.0,
                                      "watts": 120.5}
    assert asked[-1][-2:] == ["-i", "GPU-ab"]
    monkeypatch.setattr(machine.subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError("nvidia-smi")))
    assert machine.clocks("cuda")["sm_mhz"] is None


@pytest.mark.parametrize(("section", "case"), [
    (causal_conv3d, causal_conv3d.Case(layers.scaled(layers.load()[0], 0.002))),
    (norm_act, norm_act.Case("m", "group", 4, (8, 2, 8, 8))),
    (fsq, fsq.Case("large", (8, 5, 5), (2, 8, 8), "planar")),
    (scope_attention, scope_attention.Case("m", "block causal", (3, 16), 2, 8)),
    (scope_attention, scope_attention.Case("m", "per frame", (3, 16), 2, 8, backward=True)),
    (token_packing, token_packing.Case("router", (1, 3, 5, 16, 16))),
    (token_packing, token_packing.Case("unpack", (1, 4, 2, 8, 8))),
    (vidtok, vidtok.Case("tiny", (1, 16, 16)))], ids=lambda x: getattr(x, "__name__", str(x)).rpartition(".")[2])
def test_workloads_as_on_a_gpu(cuda, monkeypatch, one_thread, section, case):
    """In bfloat16, without the CPU's weight cache, with rotating inputs; on tensors of the CPU."""
    def no_compiler(candidates, settings):
        return [], {f"torch.compile({c.name})": "no compiler" for c in candidates}

    def pass_time(self, calls, repeats, name=""):
        calls[-1]()
        cuda.milliseconds += 1.0
        return 1e-3

    monkeypatch.setattr(vidtok, "with_compiled", no_compiler)
    monkeypatch.setattr(timers.DeviceTimer, "sample", pass_time)
    monkeypatch.setattr(timers.DeviceTimer, "extras", lambda self, name, call: {"peak_bytes": 1, "host_seconds": 1e-6})
    limits = {"copy_gb_s": 1000.0, "matmul_tflop_s": {"bfloat16": 100.0, "float32": 50.0}}
    with torch.no_grad():
        trial = section.build(case, TINY)
        record = harness.measure(trial, TINY, limits)
    assert trial.wrong is None and set(record["ratios"]) == {"vtok_fast"}
    assert record["seconds"]["vtok_fast"]["peak_bytes"] == 1
    assert record["seconds"]["vtok_fast"]["roofline"] > 0
    json.dumps(record)


class FakeCudnn:
    """As much of the cudnn package as a convolution with bias asks for; ``execute`` computes what the graph says."""

    data_type = type("data_type", (), {"BFLOAT16": "bf16", "HALF": "half", "FLOAT": "float"})
    heur_mode = type("heur_mode", (), {"A": 0, "FALLBACK": 1})

    def __init__(self, wrong=0.0):
        self.wrong, self.stated = wrong, {}

    def create_handle(self):
        return "handle"

    def set_stream(self, handle, stream):
        self.stated["stream"] = stream

    def pygraph(self, **options):
        assert options["handle"] == "handle"
        return self

    def tensor_like(self, tensor):
        return Node(dim=list(tensor.shape), stride=list(tensor.stride()))

    def conv_fprop(self, **options):
        self.conv = options
        return Node()

    def bias(self, name, input, bias):
        self.out = Node()
        return self.out

    def __getattr__(self, name):
        if name in ("validate", "build_operation_graph", "create_execution_plans", "check_support", "build_plans"):
            return lambda *args: self.stated.__setitem__(name, True)
        raise AttributeError(name)

    def get_workspace_size(self):
        return 0

    def execute(self, pack, workspace, handle):
        assert self.stated["build_plans"] and workspace.numel() and handle == "handle"
        x, w, b, y = pack.values()
        assert [n.dim for n in pack] == [list(t.shape) for t in (x, w, b, y)]
        assert [n.stride for n in pack] == [list(t.stride()) for t in (x, w, b, y)]
        pads = [p for before, behind in zip(self.conv["pre_padding"], self.conv["post_padding"]) for p in (before, behind)]
        padded = torch.nn.functional.pad(x, (*pads[4:], *pads[2:4], *pads[:2]))
        y.copy_(torch.nn.functional.conv3d(padded, w, b.flatten(), self.conv["stride"]) + self.wrong)


class Node:
    def __init__(self, dim=None, stride=None):
        self.dim, self.stride = dim, stride

    def set_output(self, value):
        return self

    def set_data_type(self, kind):
        return self

    def set_dim(self, dim):
        self.dim = dim
        return self

    def set_stride(self, stride):
        self.stride = stride
        return self


@pytest.mark.parametrize("layer", [layers.scaled(replace(x, cin=8, cout=8), 0.001) for x in layers.load()[::9]], ids=str)
def test_cudnn_by_its_own_frontend(cuda, monkeypatch, layer):
    monkeypatch.setitem(sys.modules, "cudnn", FakeCudnn())
    trial = causal_conv3d.build(causal_conv3d.Case(layer), TINY)
    found, = (c for c in trial.candidates if c.name == "cuDNN frontend")
    torch.testing.assert_close(found.call(), trial.ours.call(), rtol=0.05, atol=0.05)
    assert "cuDNN frontend" not in trial.missing
    monkeypatch.setitem(sys.modules, "cudnn", FakeCudnn(wrong=0.5))
    assert causal_conv3d.build(causal_conv3d.Case(layer), TINY).missing["cuDNN frontend"] == "another result than eager's"


def test_a_missing_frontend_is_a_missing_peer(cuda, monkeypatch):
    monkeypatch.setitem(sys.modules, "cudnn", None)
    trial = causal_conv3d.build(causal_conv3d.Case(layers.scaled(layers.load()[0], 0.001)), TINY)
    assert "cudnn" in trial.missing["cuDNN frontend"] and all(c.name != "cuDNN frontend" for c in trial.candidates)


def test_the_roofline_is_the_longer_of_operations_and_bytes():
    limits = {"copy_gb_s": 100.0, "matmul_tflop_s": {"bfloat16": 2.0}}
    facts = {"gflop": 4.0, "megabytes": 100.0, "dtype": "bfloat16"}
    assert harness.floor_seconds(facts, limits) == pytest.approx(2e-3)  # 4 GFLOP at 2 TFLOP/s; the bytes take 1 ms
    assert harness.rates(4e-3, facts, limits) == pytest.approx({"tflop_s": 1.0, "gb_s": 25.0, "roofline": 0.5})
    assert harness.floor_seconds(facts | {"gflop": 1.0}, limits) == pytest.approx(1e-3)
    assert harness.floor_seconds(facts | {"dtype": "int8"}, limits) == pytest.approx(1e-3)
    assert harness.floor_seconds({}, limits) is None and harness.rates(1.0, facts, None).keys() == {"tflop_s", "gb_s"}


def test_ceilings(monkeypatch):
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 1 << 16)
    monkeypatch.setitem(ceilings.MATMUL_SIZE, "cpu", 64)
    monkeypatch.setattr(ceilings, "_best", lambda function, inputs, settings: 1e-3)
    found = ceilings.measure(Settings(dtype=torch.bfloat16))
    assert found["copy_gb_s"] == pytest.approx(2 * (1 << 16) / 1e-3 / 1e9)
    assert found["matmul_tflop_s"] == pytest.approx({"bfloat16": 2 * 64**3 / 1e-3 / 1e12, "float32": 2 * 64**3 / 1e-3 / 1e12})
    assert "GB/s" in ceilings.line(found)


# ---- layers --------------------------------------------------------------------------------------------------------------


def test_layers_are_those_of_the_models():
    chosen = layers.load()
    assert {layer.model.split("-")[0] for layer in chosen} == {"wan2.1", "vidtok", "cosmos"}
    hot = next(x for x in chosen if x.model == "vidtok" and x.cin == x.cout == 256 and x.kernel == (3, 3, 3)
               and x.size == (20, 256, 256))
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
        assert all((n + sum(p) - k) % s == 0 for n, p, k, s in zip(small.size[1:], small.spatial_pad, small.kernel[1:],
                                                                   small.stride[1:]))


# ---- files and tables ----------------------------------------------------------------------------------------------------


def _record(case="c", group="3x3 planes", ours=1.0, eager=6.0, peer=3.0):
    seconds = {"eager": [eager] * 3, "p": [peer] * 3, "vtok_fast": [ours] * 3}
    roles = {"eager": "eager", "p": "peer", "vtok_fast": "ours"}
    return {"case": case, "group": group, "facts": {"algorithm": "direct", "gflop": 1.0, "cached_bytes": 0, "error": 1e-7,
                                                    "eager_error": 1e-7},
            "missing": {"q": "not installed"}, "wrong": None, "rounds": 3, "ours": "vtok_fast", "eager": "eager", "best": "p",
            "seconds": {n: {"role": roles[n], **harness.spread(s), "page_faults": 0.0} for n, s in seconds.items()},
            "ratios": {"vtok_fast": harness.ratios(seconds, "vtok_fast")}}


def _memory_record():
    return {"case": "big 17x256x256 memory", "variants": {
        name: {"peak": peak * 2**30, "loaded": 2**30, "seconds": 1.0, "encode_seconds": 0.5, "weight_cache": 0, "model": 2**20}
        for name, peak in (("eager", 4), ("vtok_fast", 3), ("vtok_fast, no weight cache", 2))}}


@pytest.mark.parametrize("path", sorted((Path(__file__).parent.parent / "benchmarks" / "results").glob("*.json")),
                         ids=lambda p: p.stem)
def test_committed_results_stay_readable(path, capsys):
    results = report.load(path)
    assert "times the best PyTorch" in report.markdown(results)
    report.show(results)
    assert "targets" in capsys.readouterr().out
    same = compare.compare(results, results)
    assert same.changes and not same.regressions and not same.remarks and not same.only_before + same.only_after


def test_compare_tells_regressions_from_noise(tmp_path):
    def results(sections, gpu=None, **changes):
        return {"version": report.VERSION, "machine": machine.describe() | ({"gpu": gpu} if gpu else {}), "sections": {
            name: machine.state() | changes | {"quick": False, "cases": cases} for name, cases in sections.items()}}

    def case(name, eager, q1, q3):
        record = _record(name, ours=1.0, eager=eager)
        record["ratios"]["vtok_fast"]["eager"] = {"median": eager, "q1": q1, "q3": q3}
        return record

    before = results({"fsq": [case("a", 4.0, 3.9, 4.1), case("b", 4.0, 3.0, 5.0), case("c", 4.0, 3.99, 4.01), case("gone", 1, 1, 1),
                              case("d", 4.0, 3.9, 4.1)]})
    after = results({"fsq": [case("a", 3.0, 2.9, 3.1), case("b", 3.3, 2.9, 3.7), case("c", 3.95, 3.94, 3.96), case("new", 1, 1, 1),
                             case("d", 5.0, 4.9, 5.1)]}, torch="9.9")
    found = compare.compare(before, after)
    assert {c.case: c.verdict for c in found.changes} == {"a": "slower", "b": "same", "c": "same", "d": "faster"}
    assert [c.case for c in found.regressions] == ["a"] and found.regressions[0].change == pytest.approx(-0.25)
    assert found.regressions[0].noise == pytest.approx(0.1 / 3.0)
    assert found.only_before == ["fsq gone"] and found.only_after == ["fsq new"]
    assert found.remarks == [f"torch: {torch.__version__}, then 9.9"]
    # On a GPU the times themselves are compared.
    slow, fast = (results({"fsq": [_record("a", ours=s, eager=6 * s)]}, "H200") for s in (1.0, 0.5))
    assert compare.compare(slow, fast).changes[0].verdict == "faster"
    with pytest.raises(ValueError, match="a CPU, the second of a GPU"):
        compare.compare(before, fast)


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    limits = {"copy_gb_s": 10.0, "matmul_tflop_s": {"float32": 0.1}}
    record = _record()
    record["facts"] |= {"gflop": 2.0, "megabytes": 10.0}
    mover = _record("m")
    mover["facts"] = {"megabytes": 10.0}
    sections = {"causal_conv3d": machine.state() | {"ceilings": limits, "cases": [record]},
                "fsq": machine.state() | {"ceilings": limits, "cases": [mover]}, "memory": {"cases": [_memory_record()]}}
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
    sections = {"causal_conv3d": state | {"cases": [_record("a", ours=1.0), _record("b", ours=4.0),
                                                    _record("c", "rest", peer=1.5)]},
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


def test_names_with_brackets_are_shown(capsys):
    record = _record()
    record["best"] = "x[mask]"
    record["seconds"]["x[mask]"] = record["seconds"].pop("p")
    record["ratios"]["vtok_fast"]["x[mask]"] = record["ratios"]["vtok_fast"].pop("p")
    section = machine.state() | {"quick": False, "cases": [record], "failed": {"big": "no memory [oom]"}}
    report.show({"machine": machine.describe(), "sections": {"token_packing": section}})
    said = capsys.readouterr().out
    assert "x[mask]" in said and "[quartiles]" in said and "no memory [oom]" in said


def test_the_machine_is_named():
    here = machine.describe()
    assert here["cpu"] and here["cores"] >= 1
    assert machine.slug(here | {"cpu": "A(R) B @ 2 GHz", "family": 1, "model": 2, "cores": 3,
                                "isa": "avx2"}) == "a-r-b-2-ghz-family1-model2-3cores-avx2"
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


# ---- the command line's part ---------------------------------------------------------------------------------------------


def test_own_shapes(one_thread):
    wish = Own((1, 8, 5, 16, 16), kernel=(3, 3, 3), channels=4, time_mode="cache")
    (name, case), = runner.choose(["causal_conv3d"], TINY, wish=wish)
    assert case.layer.out_size == (5, 16, 16) and (case.layer.cout, case.layer.front, case.layer.chunk) == (4, 2, "continuing")
    _run(causal_conv3d, case)
    _run(causal_conv3d, causal_conv3d.own(Own((2, 4, 3, 9, 9), kernel=(1, 3, 3), stride=(1, 2, 2), time_mode="replicate")))
    _run(norm_act, norm_act.own(Own((2, 8, 3, 4, 4), kind="group", groups=4)))
    _run(norm_act, norm_act.own(Own((2, 8, 3, 4, 4))))
    _run(fsq, fsq.own(Own((2, 3, 2, 4, 4), levels=(8, 5, 5))))
    _run(scope_attention, scope_attention.own(Own((2, 2, 24, 8), kind="per frame", numbers=(3, 8))))
    _run(token_packing, token_packing.own(Own((2, 3, 5, 16, 16), kind="router")))
    _run(token_packing, token_packing.own(Own((2, 6, 2, 8, 8))))


@pytest.mark.parametrize(("names", "wish", "said"), [
    (["causal_conv3d"], Own(kernel=(3, 3, 3)), "expected --shape B,C,T,H,W"),
    (["causal_conv3d"], Own((1, 2, 3)), "shape=1,2,3: expected B,C,T,H,W"),
    (["causal_conv3d"], Own((1, 2, 3, 4, 5), kernel=(3, 3)), "kernel=3,3: expected three"),
    (["causal_conv3d"], Own((1, 2, 3, 4, 5), time_mode="mirror"), "time_mode='mirror'"),
    (["fsq"], Own((1, 2, 3, 4, 5), kernel=(3, 3, 3)), "fsq takes no such option"),
    (["fsq"], Own((1, 2, 3, 4, 5), levels=(8,)), "levels=8"),
    (["norm_act"], Own((1, 6, 3, 4, 5), groups=4), "groups=4: does not divide 6"),
    (["scope_attention"], Own((1, 1, 24, 8), numbers=(3, 9)), "has 27 tokens"),
    (["token_packing"], Own((1, 3, 4, 8, 8), kind="router"), "1 \\+ 4n frames"),
    ([], Own((1, 2, 3, 4, 5)), "own shapes need one op"),
    (["vidtok"], Own((1, 2, 3, 4, 5)), "own shapes need one op"),
])
def test_own_shapes_that_do_not_fit(names, wish, said):
    with pytest.raises(ValueError, match=said):
        runner.choose(names, TINY, wish=wish)


def test_workloads_are_chosen_by_model_and_words():
    chosen = runner.choose([], TINY, model="wan2.1")
    assert {name for name, _ in chosen} == {"causal_conv3d", "norm_act", "models"}
    assert runner.choose(["norm_act"], TINY, match="vidtok group")[0][1].kind == "group"
    with pytest.raises(ValueError, match="no case has model='sora'.*the models are"):
        runner.choose([], TINY, model="sora")
    with pytest.raises(ValueError, match="'no_such_op'"):
        runner.choose(["no_such_op"], TINY)
    listed = runner.listing(runner.choose([], TINY), TINY)
    assert {row["section"] for row in listed} == set(runner.SECTIONS) and all(row["peers"] for row in listed)


def test_listed_peers_are_those_that_run(one_thread):
    layer = layers.scaled(next(x for x in layers.load() if x.kernel[0] == 1), 0.002)
    built = [(causal_conv3d, causal_conv3d.Case(layer, compile=True)), (norm_act, norm_act.cases(TINY)[0]),
             (fsq, fsq.cases(TINY)[2]),
             (token_packing, token_packing.cases(TINY)[0]), (token_packing, token_packing.cases(TINY)[-1])]
    for module, case in built:
        trial = module.build(case, replace(TINY, compile=False))
        peers = {c.name for c in trial.candidates if c.role not in ("ours", "variant")}
        assert all(peer in module.PEERS for peer in peers), peers
        if getattr(case, "compile", False):
            assert set(trial.missing.values()) == {"not asked for"}


def test_a_case_that_fails_leaves_the_others(tmp_path, monkeypatch, one_thread):
    limits = {"copy_gb_s": 1.0, "matmul_tflop_s": {"float32": 1.0}}
    monkeypatch.setattr(ceilings, "measure", lambda settings: limits)
    chosen = runner.choose(["fsq"], TINY)[2:]
    build, said = fsq.build, []

    def first_is_too_large(case, settings):
        if case == chosen[0][1]:
            raise torch.OutOfMemoryError("out of memory")
        return build(case, settings)

    monkeypatch.setattr(fsq, "build", first_is_too_large)
    results = runner.run(chosen, TINY, file=tmp_path / "r.json", say=said.append)
    section = results["sections"]["fsq"]
    assert section["failed"] == {str(chosen[0][1]): "out of memory"} and len(section["cases"]) == 1
    assert report.load(tmp_path / "r.json") == results and section["ceilings"] == limits
    assert any("not measured: out of memory" in line for line in said)
    assert section["cases"][0]["seconds"]["vtok_fast"]["roofline"] > 0
    report.show(results)
