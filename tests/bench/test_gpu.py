"""Measuring on a GPU, in place of which a clock stands; cuDNN by its own frontend; the roofline."""

import contextlib
import json
import sys
from dataclasses import replace

import pytest
import torch

from vtok_fast.bench import ceilings, harness, machine, timers
from vtok_fast.bench.cases import causal_conv3d, fsq, layers, norm_act, scope_attention, token_packing, vidtok
from vtok_fast.bench.harness import Candidate, Settings

TINY = Settings(quick=True, min_rounds=3, min_seconds=0.0, max_seconds=1.0)


class FakeCuda:
    """What DeviceTimer asks of torch.cuda. ``milliseconds`` passes while calls work; reading an event before
    the device has been waited for is an error, as it is on a GPU. Nothing works while a graph is captured;
    its replay does what was captured."""

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

        class CUDAGraph:
            def replay(self):
                fake.milliseconds += self.work

        self.Event, self.CUDAGraph, self.Stream = Event, CUDAGraph, lambda: self
        self.current_stream, self.stream = lambda: self, contextlib.nullcontext

    def wait_stream(self, other):
        pass

    @contextlib.contextmanager
    def graph(self, graph):
        before = self.milliseconds
        yield
        graph.work, self.milliseconds = self.milliseconds - before, before

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


def test_a_graph_is_timed_where_it_is_asked_for_and_can_be_captured(cuda):
    calls = []

    def work(x):
        calls.append(x)
        cuda.milliseconds += 3.0

    def waits(x):
        cuda.milliseconds += 2.0
        if len(calls) > 0 and calls[-1] == "capture":
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    x = torch.randn(8)
    assert "graph_seconds" not in harness.interleave([Candidate("a", work, inputs=(x,))], TINY)[1]["a"]
    wish = replace(TINY, graphs=True)
    before = len(calls)
    seconds, extras = harness.interleave([Candidate("a", work, inputs=(x,))], wish)
    assert extras["a"]["graph_seconds"] == pytest.approx(3e-3) and extras["a"]["host_seconds"] > 0
    assert before < len(calls) < before + 100  # a replay does not call
    inside = cuda.graph

    @contextlib.contextmanager
    def capture(graph):
        calls.append("capture")
        with inside(graph):
            yield

    cuda.graph = capture
    extras = harness.interleave([Candidate("b", waits, inputs=(x,))], wish)[1]["b"]
    assert (
        extras["no_graph"] == "operation not permitted when stream is capturing"
        and "graph_seconds" not in extras
    )


def test_inputs_rotate_until_they_fill_the_cache(cuda):
    timer = timers.DeviceTimer("cpu")
    big, small, tiny = torch.randn(1 << 12), torch.randn(64, 8), torch.randn(4)
    assert [len(timer.calls(torch.neg, (t,))) for t in (big, small, tiny)] == [
        1,
        4,
        timers.DeviceTimer.MOST_SETS,
    ]
    calls = timer.calls(torch.clone, (small.t(), None))
    assert (
        len({call.args[0].data_ptr() for call in calls}) == 4
        and calls[0].args[0].data_ptr() == small.data_ptr()
    )
    assert all(call.args[1] is None and torch.equal(call.args[0], small.t()) for call in calls)


def test_a_twin_has_the_same_strides():
    for part in (
        torch.randn(2, 6, 4)[:, ::2].transpose(1, 2),
        torch.randn(2, 1, 4).expand(2, 3, 4),
        torch.randn(()),
    ):
        other = timers.twin(part)
        assert (
            other.stride() == part.stride()
            and torch.equal(other, part)
            and other.data_ptr() != part.data_ptr()
        )


def test_what_a_gpu_run_records(cuda, monkeypatch):
    properties = type(
        "Properties",
        (),
        {
            "name": "NVIDIA H200",
            "major": 9,
            "minor": 0,
            "multi_processor_count": 132,
            "uuid": "ab",
            "total_memory": 141 * 2**30,
            "L2_cache_size": 50 << 20,
        },
    )
    asked = []

    def smi(command, **_):
        asked.append(command)
        return type(
            "Done",
            (),
            {"stdout": "1980, 1980, [N/A], 33, 120.5\n" if "clocks.sm" in command[1] else "580.65.06\n"},
        )

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(machine.subprocess, "run", smi)
    monkeypatch.setattr(machine, "_commit", lambda: "abc")
    here = machine.describe("cuda")
    assert machine.slug(here) == "h200" and here["capability"] == "9.0" and here["sms"] == 132
    state = machine.state("cuda")
    assert state["driver"] == "580.65.06" and {"cudnn", "triton", "cuda", "commit"} <= state.keys()
    assert machine.clocks("cuda") == {
        "sm_mhz": 1980.0,
        "sm_mhz_most": 1980.0,
        "memory_mhz": None,
        "temperature": 33.0,
        "watts": 120.5,
    }
    assert asked[-1][-2:] == ["-i", "GPU-ab"]
    monkeypatch.setattr(
        machine.subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError("nvidia-smi"))
    )
    assert machine.clocks("cuda")["sm_mhz"] is None


@pytest.mark.parametrize(
    ("section", "case"),
    [
        (causal_conv3d, causal_conv3d.Case(layers.scaled(layers.load()[0], 0.002))),
        (norm_act, norm_act.Case("m", "group", 4, (8, 2, 8, 8))),
        (fsq, fsq.Case("large", (8, 5, 5), (2, 8, 8), "planar")),
        (scope_attention, scope_attention.Case("m", "block causal", (3, 16), 2, 8)),
        (scope_attention, scope_attention.Case("m", "per frame", (3, 16), 2, 8, backward=True)),
        (token_packing, token_packing.Case("router", (1, 3, 5, 16, 16))),
        (token_packing, token_packing.Case("unpack", (1, 4, 2, 8, 8))),
        (vidtok, vidtok.Case("tiny", (1, 16, 16))),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)).rpartition(".")[2],
)
def test_workloads_as_on_a_gpu(cuda, monkeypatch, section, case):
    """In bfloat16, without the CPU's weight cache, with rotating inputs; on tensors of the CPU."""

    def no_compiler(candidates, settings):
        return [], {f"torch.compile({c.name})": "no compiler" for c in candidates}

    def pass_time(self, calls, repeats, name=""):
        calls[-1]()
        cuda.milliseconds += 1.0
        return 1e-3

    monkeypatch.setattr(vidtok, "with_compiled", no_compiler)
    monkeypatch.setattr(timers.DeviceTimer, "sample", pass_time)
    monkeypatch.setattr(
        timers.DeviceTimer, "extras", lambda self, name, call: {"peak_bytes": 1, "host_seconds": 1e-6}
    )
    limits = {"copy_gb_s": 1000.0, "matmul_tflop_s": {"bfloat16": 100.0, "float32": 50.0}}
    with torch.no_grad():
        trial = section.build(case, TINY)
        record = harness.measure(trial, TINY, limits)
    assert trial.wrong is None and set(record["ratios"]) == {"vtok_fast"}
    assert record["seconds"]["vtok_fast"]["peak_bytes"] == 1
    assert record["seconds"]["vtok_fast"]["roofline"] > 0
    json.dumps(record)


class FakeCudnn:
    """As much of the cudnn package as a convolution with bias asks for; ``execute`` computes what the graph
    says."""

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
        if name in (
            "validate",
            "build_operation_graph",
            "create_execution_plans",
            "check_support",
            "build_plans",
        ):
            return lambda *args: self.stated.__setitem__(name, True)
        raise AttributeError(name)

    def get_workspace_size(self):
        return 0

    def execute(self, pack, workspace, handle):
        assert self.stated["build_plans"] and workspace.numel() and handle == "handle"
        x, w, b, y = pack.values()
        assert [n.dim for n in pack] == [list(t.shape) for t in (x, w, b, y)]
        assert [n.stride for n in pack] == [list(t.stride()) for t in (x, w, b, y)]
        pads = [
            p
            for before, behind in zip(self.conv["pre_padding"], self.conv["post_padding"])
            for p in (before, behind)
        ]
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


@pytest.mark.parametrize(
    "layer", [layers.scaled(replace(x, cin=8, cout=8), 0.001) for x in layers.load()[::9]], ids=str
)
def test_cudnn_by_its_own_frontend(cuda, monkeypatch, layer):
    monkeypatch.setitem(sys.modules, "cudnn", FakeCudnn())
    trial = causal_conv3d.build(causal_conv3d.Case(layer), TINY)
    (found,) = (c for c in trial.candidates if c.name == "cuDNN frontend")
    torch.testing.assert_close(found.call(), trial.ours.call(), rtol=0.05, atol=0.05)
    assert "cuDNN frontend" not in trial.missing
    monkeypatch.setitem(sys.modules, "cudnn", FakeCudnn(wrong=0.5))
    assert (
        causal_conv3d.build(causal_conv3d.Case(layer), TINY).missing["cuDNN frontend"]
        == "another result than eager's"
    )


def test_a_missing_frontend_is_a_missing_peer(cuda, monkeypatch):
    monkeypatch.setitem(sys.modules, "cudnn", None)
    trial = causal_conv3d.build(causal_conv3d.Case(layers.scaled(layers.load()[0], 0.001)), TINY)
    assert "cudnn" in trial.missing["cuDNN frontend"] and all(
        c.name != "cuDNN frontend" for c in trial.candidates
    )


def test_the_roofline_is_the_longer_of_operations_and_bytes():
    limits = {"copy_gb_s": 100.0, "matmul_tflop_s": {"bfloat16": 2.0}}
    facts = {"gflop": 4.0, "megabytes": 100.0, "dtype": "bfloat16"}
    # 4 GFLOP at 2 TFLOP/s; the bytes take 1 ms
    assert harness.floor_seconds(facts, limits) == pytest.approx(2e-3)
    assert harness.rates(4e-3, facts, limits) == pytest.approx(
        {"tflop_s": 1.0, "gb_s": 25.0, "roofline": 0.5}
    )
    assert harness.floor_seconds(facts | {"gflop": 1.0}, limits) == pytest.approx(1e-3)
    assert harness.floor_seconds(facts | {"dtype": "int8"}, limits) == pytest.approx(1e-3)
    assert harness.floor_seconds({}, limits) is None and harness.rates(1.0, facts, None).keys() == {
        "tflop_s",
        "gb_s",
    }


def test_ceilings(monkeypatch):
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 1 << 16)
    monkeypatch.setitem(ceilings.MATMUL_SIZE, "cpu", 64)
    monkeypatch.setattr(ceilings, "_best", lambda function, inputs, settings: 1e-3)
    found = ceilings.measure(Settings(dtype=torch.bfloat16))
    assert found["copy_gb_s"] == pytest.approx(2 * (1 << 16) / 1e-3 / 1e9)
    assert found["matmul_tflop_s"] == pytest.approx(
        {"bfloat16": 2 * 64**3 / 1e-3 / 1e12, "float32": 2 * 64**3 / 1e-3 / 1e12}
    )
    assert "GB/s" in ceilings.line(found)
