"""CUDA graphs and streams on a GPU, as tests/ops/test_triton_graphs.py has them without one."""

from __future__ import annotations

import gc

import pytest
import torch

pytest.importorskip("triton")

from vtok_fast.ops.scope_attention import scope_attention
from vtok_fast.ops.scope_attention.scope import Scope
from vtok_fast.ops.token_packing import pack_tokens, packed_tokens, select_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def attention_inputs(scope, dim=64):
    return torch.randn(3, 1, 2, scope.q_len, dim, device="cuda", dtype=torch.bfloat16).unbind(0)


def compile_kernels(scope):
    """With another scope: kernels are compiled, plans of this one are not made."""
    scope_attention(*attention_inputs(scope), Scope.block_causal(2, scope.q_len // 2))
    torch.cuda.synchronize()


def test_a_recording_without_a_call_before_says_what_is_missing():
    scope = Scope.time_invariant(tiv=96, tv=8, patches=256, slices=4)
    compile_kernels(scope)
    inputs = attention_inputs(scope)
    with pytest.raises(RuntimeError, match="plan of a scope on the host must be made on cuda:0 before"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            scope_attention(*inputs, scope)
    torch.cuda.synchronize()
    want = scope_attention(*inputs, scope)  # the warm-up, on another stream than the recording
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = scope_attention(*inputs, scope)
    graph.replay()
    assert torch.equal(got, want)


def test_budgets_of_numbers_are_recorded_and_tensors_of_the_host_refused():
    scores = torch.randn(3, 500, device="cuda")
    want = select_tokens(scores, [5, 50, 500])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        keep = select_tokens(scores, [5, 50, 500])
    gc.collect()
    graph.replay()
    assert torch.equal(keep, want)
    with pytest.raises(RuntimeError, match="budget must be made on cuda:0 before"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            select_tokens(scores, torch.tensor([5, 50, 500]))


def test_reduce_overhead_keeps_nothing_in_the_memory_of_its_graphs(monkeypatch):
    monkeypatch.setattr(packed_tokens, "_flags", {})
    scope = Scope.time_invariant(tiv=96, tv=8, patches=256, slices=4).to("cuda")
    tokens = torch.randn(2, 16, 900, device="cuda")
    keep = torch.rand(2, 900, device="cuda") < 0.5

    def both(q, k, v, tokens, keep):
        return scope_attention(q, k, v, scope), pack_tokens(tokens, keep, capacity=1000).values

    compiled = torch.compile(both, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # warm-up, recording, replays
        inputs = (*attention_inputs(scope), tokens, keep)
        for got, want in zip(compiled(*inputs), both(*inputs)):
            torch.testing.assert_close(got, want)


def test_another_stream_uses_a_plan_at_once():
    for _ in range(20):
        scope = Scope.time_invariant(tiv=96, tv=8, patches=256, slices=4)
        inputs, side = attention_inputs(scope), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        first = scope_attention(*inputs, scope)
        with torch.cuda.stream(side):
            second = scope_attention(*inputs, scope)
        del scope  # its plan may be freed only after the other stream has read it
        torch.empty(1 << 20, device="cuda").fill_(-1)
        torch.cuda.synchronize()
        assert torch.equal(first, second)
