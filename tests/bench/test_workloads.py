"""Every benchmark runs, on tiny cases, and by the command line."""

import json
from dataclasses import replace

import pytest
import torch

from vtok_fast.bench import ceilings, harness, report
from vtok_fast.bench import run as runner
from vtok_fast.bench.cases import causal_conv3d, fsq, layers, norm_act, scope_attention, token_packing, vidtok
from vtok_fast.bench.harness import Settings
from vtok_fast.bench.own import Own

TINY = Settings(quick=True, min_rounds=3, min_seconds=0.0, max_seconds=1.0)


# ---- every benchmark runs ----------------------------------------------------------------------------------


def _run(module, case):
    with torch.no_grad():
        trial = module.build(case, TINY)
        record = harness.measure(trial, TINY)
    assert trial.wrong is None
    assert report.ratio(record, "best")["median"] > 0 and report.ratio(record, "eager")["median"] > 0
    json.dumps(record)
    return record


@pytest.mark.parametrize("layer", layers.benchmark_layers(quick=True), ids=str)
def test_causal_conv3d_runs(layer):
    record = _run(causal_conv3d, causal_conv3d.Case(layers.scaled(replace(layer, cin=32, cout=32), 0.02)))
    assert "vtok_fast, no weight cache" in record["ratios"]


@pytest.mark.parametrize("layer", layers.benchmark_layers(), ids=str)
def test_all_peers_compute_the_same(layer):
    layer = replace(layer, cin=8, cout=8)
    layer = layers.scaled(layer, 0.001)
    trial = causal_conv3d.build(causal_conv3d.Case(layer), TINY)
    ours = trial.ours.call()
    for c in trial.candidates:
        torch.testing.assert_close(c.call(), ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", norm_act.cases(TINY), ids=str)
def test_norm_act_runs(case):
    case = replace(case, size=(*case.size[:1], 2, 8, 8), compile=False)
    _run(norm_act, case)
    trial = norm_act.build(case, TINY)
    for c in trial.candidates:
        y = c.call()
        video = y if y.dim() == 5 else y.unsqueeze(0).transpose(1, 2)  # VidTok's own norm works on frames
        torch.testing.assert_close(video, trial.ours.call())


@pytest.mark.parametrize("layout", ["planar", "channels last"])
def test_fsq_runs(layout):
    record = _run(fsq, fsq.Case("large", (8, 5, 5), (2, 8, 8), layout))
    assert record["facts"]["differ_from_float64"] == 0 and "plain copy" in record["ratios"]["vtok_fast"]


@pytest.mark.parametrize("case", token_packing.cases(TINY), ids=str)
def test_token_packing_runs(case):
    _run(token_packing, replace(case, compile=False))
    trial = token_packing.build(case, TINY)
    # In which eager scores are rounded, and tie
    for c in trial.candidates if case.dtype != torch.bfloat16 else ():
        assert torch.equal(c.call().reshape(trial.ours.call().shape), trial.ours.call())


@pytest.mark.parametrize("case", scope_attention.cases(TINY), ids=str)
def test_scope_attention_runs(case):
    record = _run(scope_attention, replace(case, flex=False))
    assert record["facts"]["gflop"] > 0


def test_scope_attention_and_flex_attention_see_the_same():
    for case in scope_attention.cases(TINY):
        positions = torch.arange(case.scope().q_len)
        assert torch.equal(case.sees()(positions[:, None], positions), case.scope().mask())


def test_vidtok_runs():
    record = _run(vidtok, vidtok.Case("tiny", (1, 32, 32)))
    assert record["facts"]["swapped"] > 0 and record["facts"]["tokens"] == 64


# ---- the command line's part -------------------------------------------------------------------------------


def test_own_shapes():
    wish = Own((1, 8, 5, 16, 16), kernel=(3, 3, 3), channels=4, time_mode="cache")
    ((name, case),) = runner.choose(["causal_conv3d"], TINY, wish=wish)
    assert case.layer.out_size == (5, 16, 16) and (case.layer.cout, case.layer.front, case.layer.chunk) == (
        4,
        2,
        "continuing",
    )
    _run(causal_conv3d, case)
    _run(
        causal_conv3d,
        causal_conv3d.own(Own((2, 4, 3, 9, 9), kernel=(1, 3, 3), stride=(1, 2, 2), time_mode="replicate")),
    )
    _run(norm_act, norm_act.own(Own((2, 8, 3, 4, 4), kind="group", groups=4)))
    _run(norm_act, norm_act.own(Own((2, 8, 3, 4, 4))))
    _run(fsq, fsq.own(Own((2, 3, 2, 4, 4), levels=(8, 5, 5))))
    _run(scope_attention, scope_attention.own(Own((2, 2, 24, 8), kind="per frame", numbers=(3, 8))))
    _run(token_packing, token_packing.own(Own((2, 3, 5, 16, 16), kind="router")))
    _run(token_packing, token_packing.own(Own((2, 6, 2, 8, 8))))


@pytest.mark.parametrize(
    ("names", "wish", "said"),
    [
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
    ],
)
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


def test_listed_peers_are_those_that_run():
    layer = layers.scaled(next(x for x in layers.load() if x.kernel[0] == 1), 0.002)
    built = [
        (causal_conv3d, causal_conv3d.Case(layer, compile=True)),
        (norm_act, norm_act.cases(TINY)[0]),
        (fsq, fsq.cases(TINY)[2]),
        (token_packing, token_packing.cases(TINY)[0]),
        (token_packing, token_packing.cases(TINY)[-1]),
    ]
    for module, case in built:
        trial = module.build(case, replace(TINY, compile=False))
        peers = {c.name for c in trial.candidates if c.role not in ("ours", "variant")}
        assert all(peer in module.PEERS for peer in peers), peers
        if getattr(case, "compile", False):
            assert set(trial.missing.values()) == {"not asked for"}


def test_a_case_that_fails_leaves_the_others(tmp_path, monkeypatch):
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
