"""Tuning: the table's file, what the dispatcher makes of it, and how the winner of a class is found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vtok_fast import causal_conv3d
from vtok_fast.bench.harness import Settings
from vtok_fast.commands import tune
from vtok_fast.dispatch import backends, native, tuning
from vtok_fast.ops.causal_conv3d import cpu, sm80, sm90, tuned
from vtok_fast.ops.causal_conv3d.call import ConvCall, Geometry

QUICK = Settings(quick=True, min_rounds=3, min_seconds=0.0, max_seconds=1.0)
CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of tables, for this process."""
    monkeypatch.setenv("VTOK_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(tuning, "_enabled", True)
    tuning.forget()
    yield tmp_path / "cache"
    monkeypatch.undo()
    tuning.forget()


def a_call(channels=8, outputs=8, size=(3, 8, 8), kernel=(3, 3, 3), dtype=torch.float32):
    x, w = torch.randn(1, channels, *size, dtype=dtype), torch.randn(outputs, channels, *kernel, dtype=dtype)
    pad = (kernel[0] - 1, 0, kernel[1] // 2, kernel[1] // 2, kernel[2] // 2, kernel[2] // 2)
    return ConvCall(x, w, geometry=Geometry(pad=pad))


def write(entry, call, device=CPU):
    tuning.save(
        tuning.folder() / f"{tuning.machine(device)}.json",
        tuning.machine(device),
        {},
        {"causal_conv3d": {tuned.tuning_class(call): entry}},
    )


# ---- the table ---------------------------------------------------------------------------------------------


def test_a_table_round_trips_and_keeps_other_classes(cache):
    path = cache / "t.json"
    tuning.save(
        path,
        "m",
        {"torch": "2"},
        {"causal_conv3d": {"a": {"backend": "cpu", "choice": "direct"}, "b": {"backend": "cpu"}}},
    )
    tuning.save(
        path,
        "m",
        {"torch": "3"},
        {"causal_conv3d": {"b": None, "c": {"backend": "reference", "choice": None}}},
    )
    table = tuning.load(path)
    assert (table["version"], table["machine"], table["run"]) == (tuning.VERSION, "m", {"torch": "3"})
    assert set(table["ops"]["causal_conv3d"]) == {"a", "c"}  # b is as good untuned by now
    assert [p.name for p in cache.iterdir()] == ["t.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 99, "ops": {}}', '{"version": 1}'])
def test_another_table_is_an_error_to_load_and_nothing_to_the_dispatcher(cache, text):
    path = cache / f"{tuning.machine(CPU)}.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ValueError, match="not JSON|tuning table of version"):
        tuning.load(path)
    assert tuning.entries("causal_conv3d", CPU) == {}


def test_the_users_table_goes_before_the_shipped_one(cache, monkeypatch):
    name = f"{tuning.machine(CPU)}.json"
    tuning.save(
        tuning.SHIPPED / name, "m", {}, {"causal_conv3d": {"a": {"backend": "cpu"}, "b": {"backend": "cpu"}}}
    )
    tuning.save(cache / name, "m", {}, {"causal_conv3d": {"a": {"backend": "reference"}}})
    assert {k: e["backend"] for k, e in tuning.entries("causal_conv3d", CPU).items()} == {
        "a": "reference",
        "b": "cpu",
    }
    assert tuning.entries("norm_act", CPU) == {}
    monkeypatch.setattr(tuning, "_enabled", False)
    assert tuning.entries("causal_conv3d", CPU) == {}


def test_a_table_belongs_to_a_number_of_threads_and_a_gpu(cache, monkeypatch):
    threads = torch.get_num_threads()
    write({"backend": "cpu", "choice": "direct"}, a_call())
    assert tuning.entries("causal_conv3d", CPU)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 5)
    assert not tuning.entries("causal_conv3d", CPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert tuning.machine(torch.device("cuda", 0)) == "nvidia-h200"


def test_classes():
    names = {
        tuned.tuning_class(a_call(**change))
        for change in (
            {},
            {"channels": 16},
            {"outputs": 16},
            {"size": (3, 16, 16)},
            {"kernel": (1, 3, 3)},
            {"dtype": torch.bfloat16},
        )
    }
    assert len(names) == 6 and "3x3x3 /111 8->8 2^7 float32" in names
    # 192 and 224 positions are one class
    assert tuned.tuning_class(a_call(size=(4, 8, 7))) == tuned.tuning_class(a_call())


# ---- the dispatcher ----------------------------------------------------------------------------------------


@pytest.mark.needs_native
@pytest.mark.parametrize("choice", ["direct", "winograd2", "winograd4"])
def test_the_algorithm_of_the_table_runs_on_a_cpu(cache, monkeypatch, choice):
    call, seen = a_call(), []
    lib = native.lib()
    spy = type(
        "Spy",
        (),
        {
            "__getattr__": lambda self, name: getattr(lib, name),
            "causal_conv3d": lambda self, *args: (seen.append(args[-2]), lib.causal_conv3d(*args))[1],
        },
    )()
    monkeypatch.setattr(native, "_C", spy)
    write({"backend": "cpu", "choice": choice}, call)
    y = causal_conv3d(call.x, call.weight)
    assert seen == [cpu._ALGORITHM_CODES[choice]]
    torch.testing.assert_close(
        y, causal_conv3d(call.x, call.weight, backend="reference"), rtol=1e-4, atol=1e-4
    )
    with backends.algorithm("direct" if choice != "direct" else "winograd2"):  # a wish goes before the table
        causal_conv3d(call.x, call.weight)
    assert seen[1] != seen[0]


@pytest.mark.needs_native
def test_what_lost_its_measurement_is_not_chosen(cache):
    call = a_call()
    write({"backend": "reference", "choice": None}, call)
    assert backends.select("causal_conv3d", call).name == "reference"
    assert "reference was measured to be faster" in backends.fallbacks()["causal_conv3d"]["cpu"]
    assert backends.select("causal_conv3d", call, "cpu").name == "cpu"  # who insists gets it
    assert tuned.entry_for(a_call(channels=16)) is None
    assert all(
        tuned.entry_for(call._replace(geometry=call.geometry._replace(**other))) is None
        for other in ({"dilation": (1, 2, 2)}, {"groups": 2})
    )


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"backend": "cpu"},
        {"backend": "cpu", "choice": "winograd9"},
        {"backend": "cpu", "choice": ["direct"]},
        {"backend": "sm80", "choice": [128, 64]},
        {"backend": "sm90", "choice": [1, 2, 3, 4, "5"]},
        {"backend": ["cpu"], "choice": 1},
        {"backend": "tpu", "choice": None},
        "winograd4",
        None,
        7,
    ],
)
def test_an_entry_that_makes_no_sense_counts_as_none(cache, entry):
    call = a_call()
    want = causal_conv3d(call.x, call.weight)
    path = tuning.folder() / f"{tuning.machine(CPU)}.json"
    path.parent.mkdir()
    for known in ({tuned.tuning_class(call): entry}, entry):
        path.write_text(
            json.dumps(
                {"version": tuning.VERSION, "machine": "m", "run": {}, "ops": {"causal_conv3d": known}}
            )
        )
        tuning.forget()
        assert tuned.entry_for(call) is None
        assert torch.equal(causal_conv3d(call.x, call.weight), want)


def test_a_tile_that_the_gpu_kernels_have_no_more_gives_way_to_their_own_choice(cache, monkeypatch):
    call, got = a_call(), []

    def forward(call, *, choice):
        got.append(choice)
        if choice[0] == 512:
            raise NotImplementedError("no such tile")

    monkeypatch.setattr(sm80, "forward", forward)
    monkeypatch.setattr(sm90, "forward", forward)
    write({"backend": "sm80", "choice": [512, 64, 2]}, call)
    sm80.run(call)
    write({"backend": "sm90", "choice": [512, 64, 2, 1, 0]}, call)
    sm90.run(call)
    assert got == [(512, 64, 2), (0, 0, 0), (512, 64, 2, 1, 0), sm90.ANY]


def test_tiles_of_the_table_reach_the_gpu_kernels(cache, monkeypatch):
    call, got = a_call(), {}
    monkeypatch.setattr(sm80, "forward", lambda call, **options: got.update(sm80=options["choice"]))
    monkeypatch.setattr(sm90, "forward", lambda call, **options: got.update(sm90=options["choice"]))
    sm80.run(call)
    sm90.run(call)
    assert got == {"sm80": (0, 0, 0), "sm90": sm90.ANY}
    write({"backend": "sm80", "choice": [128, 64, 2]}, call)
    sm80.run(call)
    sm90.run(call)
    assert got == {"sm80": (128, 64, 2), "sm90": sm90.ANY}
    assert "sm80 was measured" in sm90.why_slower(call) and sm80.why_slower(call) is None
    write({"backend": "sm90", "choice": [256, 128, 1, 2, 0]}, call)
    sm90.run(call)
    assert got["sm90"] == (256, 128, 1, 2, 0)
    assert "sm90 was measured" in sm80.why_slower(call) and sm90.why_slower(call) is None


# ---- measuring ---------------------------------------------------------------------------------------------


def test_calls_are_recorded_by_class():
    x, w = torch.randn(1, 4, 3, 8, 8), torch.randn(4, 4, 3, 3, 3)

    def run():
        causal_conv3d(x, w)
        causal_conv3d(x, w)
        causal_conv3d(x, w[:, :, :1])
        causal_conv3d(x, w[:2, :2], groups=2)  # not one that a table knows

    found = tune.calls_of(run)
    assert list(found) == ["3x3x3 /111 4->4 2^7 float32", "1x3x3 /111 4->4 2^7 float32"]
    assert all(call.x.is_meta and call.x.shape == x.shape for call in found.values())


def timed(monkeypatch, times):
    """Candidates take these microseconds, in every round; others a second."""

    def interleave(candidates, settings):
        return {c.name: [times.get(c.name, 1e6) * 1e-6] * 4 for c in candidates}, {}

    monkeypatch.setattr(tune.harness, "interleave", interleave)


@pytest.mark.needs_native
@pytest.mark.parametrize(
    ("times", "entry"),
    [
        ({"untuned": 10, "cpu winograd2": 5, "cpu direct": 7, "reference": 8}, ("cpu", "winograd2")),
        ({"untuned": 10, "reference": 8, "cpu direct": 9}, ("reference", None)),
        ({"untuned": 10, "cpu direct": 9.9}, None),
        ({"untuned": 10}, None),
    ],
)
def test_the_winner_of_a_class(monkeypatch, times, entry):
    timed(monkeypatch, times)
    found, facts = tune.measure(a_call(), QUICK)
    assert (None if found is None else (found["backend"], found["choice"])) == entry
    if entry is not None:
        assert found["measured_us"] == min(times.values()) and found["untuned_us"] == 10
    assert facts["microseconds"]["untuned"] == 10 and tuning._enabled


@pytest.mark.needs_native
def test_what_computes_something_else_cannot_win(monkeypatch):
    timed(monkeypatch, {"untuned": 10, "cpu winograd2": 1, "cpu direct": 5})
    execute = tune.execute

    def wrong(call, way, *tensors):
        return execute(call, way, *tensors) * (1.001 if way == ("cpu", "winograd2") else 1.0)

    monkeypatch.setattr(tune, "execute", wrong)
    found, facts = tune.measure(a_call(), QUICK)
    assert found["choice"] == "direct" and "another result" in facts["left_out"]["cpu winograd2"]


def test_ways_on_a_gpu(monkeypatch):
    call = a_call()
    gpu = call._replace(x=type("X", (), {"device": torch.device("cuda"), "shape": call.x.shape})())
    monkeypatch.setattr(tune, "hopper_choices", lambda call: [(256, 128, 1, 2, 0)])
    ways = list(tune.ways(gpu))
    assert (
        ("sm80", (128, 64, 0)) in ways
        and ("sm90", (256, 128, 1, 2, 0)) in ways
        and ways[-1] == ("reference", None)
    )
    assert [w for w in tune.ways(call) if w[0] == "cpu"] == [
        ("cpu", "direct"),
        ("cpu", "winograd2"),
        ("cpu", "winograd4"),
    ]
    assert list(tune.ways(a_call(kernel=(3, 1, 1)))) == [("cpu", "direct"), ("reference", None)]


@pytest.mark.needs_native
def test_tune_writes_what_the_dispatcher_reads(cache, monkeypatch):
    timed(monkeypatch, {"untuned": 10, "cpu direct": 5})
    said = []
    result = tune.run("vidtok/tiny", QUICK, size=(1, 16, 16), say=said.append)
    classes, entries = result["classes"]["causal_conv3d"], result["entries"]["causal_conv3d"]
    assert entries and len(said) == len(classes) and "as good as any" not in said[0]
    assert set(tuning.entries("causal_conv3d", CPU)) == set(entries)
    table = json.loads(Path(result["file"]).read_text())
    assert table["run"]["model"] == "vidtok/tiny" and table["run"]["torch"] == torch.__version__
    with pytest.raises(ValueError, match="model='sora': expected one of vidtok/"):
        tune.run("sora", QUICK)


def test_an_op_is_tuned_by_its_workloads(cache, monkeypatch):
    """On a GPU the classes of Triton launches are measured beside those of convolutions, each once."""
    launch = tune.tune_triton.Launch(None, None, ((1,), (2,)))
    monkeypatch.setattr(tune, "workloads", lambda op, settings: iter([lambda: None] * 2))
    monkeypatch.setattr(Settings, "on_gpu", property(lambda self: True))
    monkeypatch.setattr(
        tune.tune_triton, "launches_of", lambda run: {("norm_act", "a"): launch, ("norm_act", "b"): launch}
    )
    facts = {"best": "untuned", "microseconds": {"untuned": 1.0}, "gain": 1.0}
    measured = []
    monkeypatch.setattr(
        tune,
        "measure_launch",
        lambda of, launch, settings: (
            measured.append(of) or ({"choice": [2]} if of[1] == "a" else None),
            facts,
        ),
    )
    monkeypatch.setattr(tune.machine, "clocks", lambda device: {})
    result = tune.run("norm_act", QUICK, say=lambda line: None)
    assert measured == [("norm_act", "a"), ("norm_act", "b")]
    assert result["classes"] == {"norm_act": ["a", "b"]} and result["entries"] == {
        "norm_act": {"a": {"choice": [2]}}
    }
    chosen = [tuning.chosen("norm_act", CPU, (1,), lambda tile: [tile, (2,)], key) for key in "ab"]
    assert chosen == [(2,), (1,)]
    assert tune.run("norm_act", QUICK, dry_run=True)["classes"] == result["classes"] and len(measured) == 2


def test_workloads_are_those_of_the_bench(monkeypatch):
    runs = list(tune.workloads("token_packing", QUICK))
    bench = tune.section("token_packing")
    assert len(runs) == len(bench.cases(QUICK)) > 2
    seen = []
    with tune.harness.selections(lambda op, call, backend: seen.append(op)):
        for run in runs:
            run()
    assert {"pack_tokens", "unpack_tokens", "router_scores", "select_tokens"} <= set(seen)


def test_the_command(tmp_path):
    command = [
        sys.executable,
        "-m",
        "vtok_fast.cli",
        "tune",
        "--dry-run",
        "--size",
        "1x16x16",
        "--device",
        "cpu",
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2])
    assert result.returncode == 0 and "causal_conv3d: 3x3x3 /111 3->16 2^10 float32" in result.stdout
    result = subprocess.run(
        [*command, "--size", "16x16"], capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2]
    )
    assert (
        result.returncode == 1
        and result.stderr.strip() == "vtok-fast: size='16x16': expected TxHxW, such as 17x256x256"
    )
