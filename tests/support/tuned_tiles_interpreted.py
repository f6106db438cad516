"""The tiles that a tuning table may choose, under Triton's interpreter (see tests/support/triton_harness.py):
each gives the right result, reaches its kernel, and is found and measured by ``vtok-fast tune``."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from vtok_fast import parity
from vtok_fast.bench.harness import Settings
from vtok_fast.commands import tune, tune_triton
from vtok_fast.dispatch import backends, tuning
from vtok_fast.kernels import norm_act as norm_kernels
from vtok_fast.kernels import scope_attention as kernels
from vtok_fast.kernels import token_packing as packing_kernels
from vtok_fast.ops.norm_act import op as norm_act
from vtok_fast.ops.scope_attention import gradient as scope_gradient
from vtok_fast.ops.scope_attention import op as scope_attention
from vtok_fast.ops.scope_attention import triton as launcher
from vtok_fast.ops.scope_attention.call import ScopeBackwardCall, ScopeCall
from vtok_fast.ops.scope_attention.scope import Scope
from vtok_fast.ops.token_packing import call as token_packing
from vtok_fast.ops.token_packing import scores as token_scores
from vtok_fast.ops.token_packing import selection as token_selection

CPU = torch.device("cpu")
QUICK = Settings(quick=True, min_rounds=3, min_seconds=0.0, max_seconds=0.1)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VTOK_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(tuning, "_enabled", True)
    # The interpreter takes those of a CPU
    monkeypatch.setattr(backends, "why_not_triton_on", lambda tensor: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    tuning.forget()
    torch.manual_seed(0)
    yield
    monkeypatch.undo()
    tuning.forget()


def write(op, entries):
    tuning.save(tuning.folder() / f"{tuning.machine(CPU)}.json", "m", {}, {op: entries})


def attention(dtype=torch.float16, scope=None, dim=16):
    """A call with long segments, and its backward pass."""
    scope = scope or Scope.dense(40)
    q, k, v = torch.randn(3, 1, 1, scope.q_len, dim).to(dtype).unbind(0)
    call = ScopeCall(q, k, v, scope, dim**-0.5)
    out, lse = scope_attention.run(call, "reference")
    return call, ScopeBackwardCall(torch.randn_like(out), q, k, v, out, lse, scope, dim**-0.5)


def run_attention(call, backend):
    """A call of either direction on a backend."""
    if isinstance(call, ScopeCall):
        return scope_attention.run(call, backend)
    with backends.backend(backend):
        return scope_gradient.run(call)


def every_tile(run, call):
    """What a call gives with each tile of each class that it launches."""
    found = tune_triton.launches_of(partial(run, call, "triton"))
    for of, launch in found.items():
        assert len(launch.tiles) > 1 and len(set(launch.tiles)) == len(launch.tiles)
        for tile in launch.tiles:
            yield of, tile, tune_triton.execute(of, launch, tile, *call)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("direction", (0, 1), ids=("forward", "backward"))
def test_every_tile_of_attention_is_close(direction, dtype):
    call = attention(dtype, Scope.time_invariant(tiv=4, tv=2, patches=16, slices=2))[direction]
    wide = call._replace(**{n: t.double() for n, t in call._asdict().items() if isinstance(t, torch.Tensor)})
    exact, same = (run_attention(c, "reference")[: 3 if direction else 1] for c in (wide, call))
    kinds = set()
    for (op, key), tile, got in every_tile(run_attention, call):
        assert op == "scope_attention" and isinstance(tile, kernels.Config)
        kinds.add(key.split()[0])
        for ours, e, s in zip(got, exact, same):
            if dtype == torch.float32:
                assert (measured := parity.close(ours, e, s)).ok, (tile, str(measured))
            else:  # as in scope_attention_interpreted.py
                assert (ours - e).norm() <= 2 * torch.finfo(dtype).eps * e.norm(), tile
    assert kinds == ({"queries", "keys"} if direction else {"forward"})


@pytest.mark.parametrize("kind", ("layer", "group"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_every_tile_of_a_norm_is_close(kind, dtype):
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        x = (torch.randn(1, 24, 3, 5, 7) * 2 + 3).to(dtype).contiguous(memory_format=layout)
        call = norm_act.NormCall(
            x, *torch.randn(2, 24).to(dtype), None, None, None, kind, 2, False, 1e-6, "silu", "once"
        )
        wide = call._replace(
            **{n: t.double() for n, t in call._asdict().items() if isinstance(t, torch.Tensor)}
        )
        exact, same = norm_act.run(wide, "reference"), norm_act.run(call, "reference")
        tiles = [
            (key.split()[0], parity.close(got, exact, same))
            for (_, key), _, got in every_tile(norm_act.run, call)
        ]
        assert {kernel for kernel, _ in tiles} == ({"position"} if kind == "layer" else {"sums", "group"})
        assert all(measured.ok for _, measured in tiles)


def test_every_tile_of_packing_is_exact(monkeypatch):
    monkeypatch.setattr(packing_kernels, "FEW", 0)  # below, the tile is a matter of size
    tokens, keep = torch.randn(2, 5, 70), torch.rand(2, 70) < 0.4
    video, other = torch.randn(2, 1, 3, 5, 16, 24).unbind(0)
    pack = token_packing.PackCall(tokens, keep, 80, None, "vidtok")
    fsq = token_packing.PackCall(tokens[:, :3].contiguous(), keep, 80, (8, 5, 4), "vidtok")
    unpack = token_packing.UnpackCall(tokens[0].mT.contiguous(), keep, -1.0)
    select = token_selection.SelectCall(torch.randn(2, 70), torch.tensor([9, 30]), "topk", 4)
    scores = token_scores.ScoresCall(video, other, (4, 8, 8))

    def runs(op):
        return lambda call, backend: backends.select(op, call, backend).run(call)

    kinds = set()
    for op, call in (
        ("pack_tokens", pack),
        ("pack_tokens", fsq),
        ("unpack_tokens", unpack),
        ("select_tokens", select),
        ("router_scores", scores),
    ):
        want = tune_triton._tensors(runs(op)(call, "reference"))
        for (name, key), tile, got in every_tile(runs(op), call):
            kinds.add(key.split()[0])
            assert name == "token_packing"
            for ours, theirs in zip(tune_triton._tensors(got), want):
                assert torch.equal(ours, theirs), (op, tile)
    assert kinds == {"pack", "unpack", "select", "scores"}


# ---- what a table says reaches the kernel ------------------------------------------------------------------


def launched(monkeypatch, name):
    """The launches of a kernel of scope_attention: their configurations."""
    seen, launch = [], kernels._launch

    def watched(kernel, c, *args, **options):
        seen.append((kernel, c))
        launch(kernel, c, *args, **options)

    monkeypatch.setattr(kernels, "_launch", watched)
    return seen


def test_an_entry_of_the_table_is_what_attention_launches(monkeypatch):
    call, seen = attention()[0], launched(monkeypatch, "forward")
    ((of, found),) = tune_triton.launches_of(partial(scope_attention.run, call, "triton")).items()
    built_in, other = found.tiles[0], found.tiles[-1]
    seen.clear()
    write(of[0], {of[1]: {"choice": list(other)}})
    got = launcher.run(call)
    assert seen == [("forward", other)] and other != built_in
    torch.testing.assert_close(
        got[0], scope_attention.run(call, "reference")[0], rtol=0, atol=4 * torch.finfo(torch.float16).eps
    )
    # Of an older version; damaged
    for useless in (
        list(other._replace(block_m=24)),
        [1, 2],
        "wide",
        None,
        {},
        7,
        [None] * 6,
    ):
        seen.clear()
        write(of[0], {of[1]: {"choice": useless}})
        launcher.run(call)
        assert seen == [("forward", built_in)], useless
    seen.clear()
    write(of[0], {of[1]: {"choice": list(other)}})
    monkeypatch.setattr(tuning, "_enabled", False)  # VTOK_FAST_TUNING=0
    launcher.run(call)
    assert seen == [("forward", built_in)]


def test_a_tile_that_cannot_be_launched_puts_the_table_aside(monkeypatch):
    from triton.runtime.errors import OutOfResources

    call, seen = attention()[0], launched(monkeypatch, "forward")
    ((of, found),) = tune_triton.launches_of(partial(scope_attention.run, call, "triton")).items()
    built_in, other = found.tiles[0], found.tiles[1]
    launch = kernels._launch

    def too_large(kernel, c, *args, **options):
        if c == other:
            raise OutOfResources(300_000, 232_448, "shared memory")
        launch(kernel, c, *args, **options)

    monkeypatch.setattr(kernels, "_launch", too_large)
    write(of[0], {of[1]: {"choice": list(other)}})
    seen.clear()
    with pytest.warns(RuntimeWarning, match="scope_attention: the tuning table is put aside.*shared memory"):
        got = launcher.run(call)
    torch.testing.assert_close(
        got[0], scope_attention.run(call, "reference")[0], rtol=0, atol=4 * torch.finfo(torch.float16).eps
    )
    launcher.run(call)  # from now on without a word
    assert seen == [("forward", built_in)] * 2
    monkeypatch.setattr(kernels, "config", lambda *args: other)  # what is built in may not fail unnoticed
    with pytest.raises(OutOfResources):
        launcher.run(call)


def test_entries_reach_norms_and_packing(monkeypatch):
    x = torch.randn(1, 24, 2, 4, 4)
    norm = norm_act.NormCall(x, None, None, None, None, None, "layer", 1, False, 1e-6, None, "once")
    pack = token_packing.PackCall(
        torch.randn(1, 4, 99), torch.ones(1, 99, dtype=torch.bool), 99, None, "vidtok"
    )
    for op, call, module, kernel in (
        ("norm_act", norm, norm_kernels, "position_kernel"),
        ("pack_tokens", pack, packing_kernels, "pack_kernel"),
    ):
        run = partial(backends.select(op, call, "triton").run, call)
        ((of, found),) = tune_triton.launches_of(
            lambda: backends.select(op, call, "triton").run(call)
        ).items()
        before, warps = run(), []

        class Spy:
            def __init__(self, inner):
                self.inner = inner

            def __getitem__(self, grid):
                return lambda *args, **options: (
                    warps.append(options["num_warps"]),
                    self.inner[grid](*args, **options),
                )

        monkeypatch.setattr(module, kernel, Spy(getattr(module, kernel)))
        other = next(tile for tile in found.tiles if tile[1] != found.tiles[0][1])
        write(of[0], {of[1]: {"choice": list(other)}})
        after = run()
        assert warps == [other[1]]
        for a, b in zip(tune_triton._tensors(after), tune_triton._tensors(before)):
            torch.testing.assert_close(a, b)


# ---- measuring ---------------------------------------------------------------------------------------------


def test_tiles_are_measured_and_the_winner_is_used(monkeypatch):
    call, seen = attention()[0], launched(monkeypatch, "forward")
    ((of, launch),) = tune_triton.launches_of(partial(scope_attention.run, call, "triton")).items()
    winner = launch.tiles[2]

    def interleave(candidates, settings):
        return {c.name: [5e-6 if c.name == str(tuple(winner)) else 1e-5] * 4 for c in candidates}, {}

    monkeypatch.setattr(tune.harness, "interleave", interleave)
    entry, facts = tune.measure_launch(of, launch, QUICK)
    assert (
        entry == {"choice": list(winner), "measured_us": 5.0, "untuned_us": 10.0, "gain": 2.0}
        and not facts["left_out"]
    )
    write(of[0], {of[1]: entry})
    seen.clear()
    launcher.run(call)
    assert seen == [("forward", winner)]
    monkeypatch.setattr(
        tune.harness,
        "interleave",
        lambda candidates, settings: ({c.name: [1e-5] * 4 for c in candidates}, {}),
    )
    assert tune.measure_launch(of, launch, QUICK)[0] is None


def test_what_computes_something_else_or_does_not_fit_is_left_out(monkeypatch):
    call, launch_kernel = attention()[0], kernels._launch
    ((of, launch),) = tune_triton.launches_of(partial(scope_attention.run, call, "triton")).items()
    wrong, large = launch.tiles[1:3]

    def planted(kernel, c, blocks, n, x, q, k, v, out, *args, **options):
        if c == large:
            raise RuntimeError("out of shared memory")
        launch_kernel(kernel, c, blocks, n, x, q, k, v, out, *args, **options)
        if c == wrong:
            out.mul_(1.01)

    monkeypatch.setattr(kernels, "_launch", planted)
    found, left_out = tune_triton.candidates(of, launch)
    assert left_out == {
        str(tuple(wrong)): "another result than the built-in tile's",
        str(tuple(large)): "out of shared memory",
    }
    assert [c.name for c in found] == ["untuned", *(str(tuple(tile)) for tile in launch.tiles[3:])]
