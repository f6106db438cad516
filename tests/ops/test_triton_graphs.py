"""What is made once and used later, beside CUDA graphs and streams, without a GPU: `support.fake_cuda` says
what torch.cuda was asked."""

from __future__ import annotations

import threading

import pytest
import torch
from support.fake_cuda import DEVICE, FakeCuda, OnDevice

import vtok_fast
from vtok_fast.dispatch import lasting
from vtok_fast.ops.scope_attention import triton as launcher
from vtok_fast.ops.scope_attention.scope import Scope
from vtok_fast.ops.token_packing import budget, packed_tokens, selection
from vtok_fast.ops.token_packing import triton as packing


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(packed_tokens, "_flags", {})
    monkeypatch.setattr(packing, "_tables", {})
    lasting._streams.cache_clear()
    yield FakeCuda(monkeypatch)
    lasting._streams.cache_clear()


def scores():
    """Scores that say that they are on a GPU."""
    return type("Scores", (), {"device": DEVICE, "shape": torch.Size((3, 8))})()


def refused():
    """Each thing that a recording cannot make: because later calls would use it, or because the host's memory
    would be gone when a replay reads it."""
    host = Scope.block_causal(3, 40)
    rates, whole = torch.rand(3), torch.tensor([1, 2, 3])
    return {
        "the flag for errors": lambda: packed_tokens.error_flag(DEVICE),
        "the tables of FSQ": lambda: packing._fsq_tables((8, 8), "vidtok", DEVICE),
        "the plan of a scope on the host": lambda: launcher.prepared(host, 16, DEVICE),
        "a scope of the host": lambda: Scope.block_causal(2, 8).to(torch.empty(0, device="meta").device),
        "rate": lambda: selection._quantile_call(scores(), rates, 4),
        "budget": lambda: selection._checked_budget(scores(), whole, False, False),
    }


@pytest.mark.parametrize("what", refused())
def test_a_recording_without_a_call_before_says_what_is_missing(cuda, what, monkeypatch):
    if what == "a scope of the host":  # another device that exists without a GPU
        monkeypatch.setattr(lasting, "is_recording", lambda device: True)
    cuda.recording = True
    with pytest.raises(RuntimeError, match=f"{what} must be made on .* before a CUDA graph is recorded"):
        refused()[what]()
    assert not packed_tokens._flags and not packing._tables


def test_rates_of_budgets_are_refused_too(cuda):
    cuda.recording = True
    floating = type("Scores", (), {"is_floating_point": lambda self: True, "dim": lambda self: 2})()
    floating.device, floating.shape = DEVICE, torch.Size((3, 8))
    with pytest.raises(RuntimeError, match="rate must be made on cuda:0 before a CUDA graph"):
        budget._checked(floating, torch.rand(3), "elbo", None, 0.9, False)


def test_a_budget_of_numbers_is_recorded_without_memory_of_the_host(cuda, monkeypatch):
    """Numbers are as much a part of the recording as the shape of a tensor; only fills carry them."""
    fills, full = [], torch.full
    monkeypatch.setattr(torch, "full", lambda s, n, **k: (fills.append(n), full(s, n, dtype=k["dtype"]))[1])
    monkeypatch.setattr(selection, "to_device", lambda values, *args: values)
    cuda.recording = True
    budget = selection._checked_budget(scores(), [1, 5, 8], False, False)
    assert budget.tolist() == fills == [1, 5, 8] and budget.dtype == torch.int64


def test_nothing_is_kept_while_a_graph_is_recorded(cuda):
    scope = Scope.block_causal(2, 3)
    cuda.recording = True
    assert scope.cached("what", object, DEVICE) is not scope.cached("what", object, DEVICE)
    assert "what" not in scope.cache
    cuda.recording = False
    kept = scope.cached("what", object, DEVICE)
    cuda.recording = True
    assert scope.cached("what", object, DEVICE) is kept


@pytest.mark.parametrize("first", ("thread", "stream"))
def test_what_lasts_is_not_allocated_where_a_graph_allocates(cuda, first):
    """``mode="reduce-overhead"`` warms up with the graph's memory, which torch chooses by thread (2.13) or by
    stream (2.6), and which is freed with the graph."""
    places = []

    def make():
        places.append({"thread": threading.get_ident(), "stream": torch.cuda.current_stream().cuda_stream})
        return OnDevice()

    # The warm-up's stream may be any, even one of those that are ours.
    for stream in (cuda.current, *lasting._streams(DEVICE)):
        with cuda.on(stream):
            before = {"thread": threading.get_ident(), "stream": stream.cuda_stream}
            lasting.keep({}, "key", DEVICE, make)
            assert places[-1][first] != before[first]


def test_every_stream_waits_once_and_holds_the_memory(cuda):
    """A plan that one stream fills is read by another: after it is ready, and before its memory is used
    again."""
    store, value = {}, OnDevice()
    assert lasting.keep(store, "key", DEVICE, lambda: (value, 3))[0] is value
    (waits, maker, first), (done, reader, event) = cuda.journal
    assert (waits, first) == ("waits for stream", cuda.current)  # for what the plan is made from
    assert (done, reader, event.stream) == ("waits for event", cuda.current, maker)
    second = type(cuda.current)(cuda)
    for _ in range(2):
        for stream in (cuda.current, second):
            with cuda.on(stream):
                lasting.keep(store, "key", DEVICE, pytest.fail)
    assert cuda.journal[2:] == [("waits for event", second, event)]
    assert value.used_by == [cuda.current, second]


def test_a_recording_uses_what_was_made_before_it_and_waits_for_nothing(cuda):
    """torch.cuda.graph waits for the device before it records; a wait within would be an error."""
    store, value = {}, OnDevice()
    lasting.keep(store, "key", DEVICE, lambda: value)
    cuda.recording, recorded = True, type(cuda.current)(cuda)
    with cuda.on(recorded):
        assert lasting.keep(store, "key", DEVICE, pytest.fail) is value
    assert value.used_by[-1] is recorded  # what frees it then waits for the recorded stream
    cuda.recording = False
    with cuda.on(recorded):
        lasting.keep(store, "key", DEVICE, pytest.fail)
    assert cuda.journal[-1][:2] == ("waits for event", recorded)


def test_the_tensors_of_plans_and_scopes_are_all_found():
    scope = Scope.block_causal(2, 3)
    parts = OnDevice(), OnDevice(), OnDevice()
    assert list(lasting._tensors((parts[0], None, 3, (parts[1], [parts[2]])))) == list(parts)
    assert not list(lasting._tensors(scope))  # of the host
    assert list(lasting._tensors(type("Like", (), {"csr": parts})())) == list(parts)


def test_a_failure_in_the_thread_reaches_the_caller(cuda):
    def fails():
        raise ValueError("frames: 3")

    store = {}
    with pytest.raises(ValueError, match="frames: 3"):
        lasting.keep(store, "key", DEVICE, fails)
    assert not store


def test_a_lasting_value_may_need_another(cuda):
    """A plan clamps a scope, and notes an error in the flag, which may be made on that occasion."""
    inner = {}
    assert lasting.keep({}, 1, DEVICE, lambda: lasting.keep(inner, 2, DEVICE, lambda: 5) + 1) == 6


def test_plans_are_kept_on_scopes(cuda):
    scope = vtok_fast.Scope.time_invariant(tiv=9, tv=2, patches=20, slices=2)
    assert scope.transposed() is scope.transposed() and scope.transposed().transposed() is scope
