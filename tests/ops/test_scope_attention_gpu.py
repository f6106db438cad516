"""scope_attention on a GPU: parity, no compilation for a new length, no waiting, CUDA graphs, late errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from support.scope_cases import by_hand

from vtok_fast import parity
from vtok_fast.kernels import scope_attention as kernels
from vtok_fast.ops.scope_attention import scope_attention
from vtok_fast.ops.scope_attention.scope import Scope
from vtok_fast.ops.token_packing.packed_tokens import raise_device_errors
from vtok_fast.reference import scope_attention as reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
SCOPES = {
    "time invariant": Scope.time_invariant(tiv=96, tv=8, patches=256, slices=4),
    "block causal": Scope.block_causal(5, 405),
    "per frame": Scope.per_frame(5, 256),
    "short": Scope.block_causal(40, 7),
    "packed": Scope.packed([0, 300, 300, 1000, 1001], q_len=1100),
}


@pytest.fixture(autouse=True)
def exact_float32():
    torch.manual_seed(0)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def inputs(scope, dim, dtype, heads=2, kv_heads=2, batch=2):
    make = lambda h, n: (
        torch.randn(batch, n, h, dim, device="cuda").to(dtype).transpose(1, 2).requires_grad_()
    )  # noqa: E731
    return make(heads, scope.q_len), make(kv_heads, scope.k_len), make(kv_heads, scope.k_len)


def both_ways(attend, tensors, grad):
    y = attend(*tensors)
    return (y, *torch.autograd.grad(y, tensors, grad.to(y.dtype)))


@pytest.mark.parametrize("dim", (8, 16, 32, 64, 96, 128, 256, 384, 512, 1024))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("name", SCOPES)
def test_is_close_in_both_directions(name, dtype, dim):
    scope, heads = SCOPES[name], 4 if dim <= 128 else 1
    tensors = inputs(scope, dim, dtype, heads, heads // 2 or 1)
    mask, grad = by_hand(scope).cuda(), torch.randn(2, heads, scope.q_len, dim, device="cuda")
    wide = [t.detach().double().requires_grad_() for t in tensors]
    got = both_ways(lambda *x: scope_attention(*x, scope, backend="triton"), tensors, grad)
    want = both_ways(lambda *x: reference.scope_attention(*x, mask, dim**-0.5)[0], wide, grad)
    seen = mask | ~mask.any(1, keepdim=True)
    theirs = both_ways(
        lambda *x: F.scaled_dot_product_attention(*x, seen, enable_gqa=True) * mask.any(1)[:, None],
        tensors,
        grad,
    )
    for ours, exact, other in zip(got, want, theirs):
        measured = parity.close(ours.detach(), exact.detach(), other.detach())
        assert measured.ok, str(measured)


def compiled():
    return sum(
        len(cache[0])
        for kernel in (*kernels.KERNELS.values(), kernels.delta_kernel)
        for cache in kernel.device_caches.values()
    )


def test_a_new_length_compiles_nothing():
    def run(slices, patches):
        scope = Scope.time_invariant(tiv=96, tv=8, patches=patches, slices=slices)
        tensors = inputs(scope, 64, torch.bfloat16, batch=1)
        both_ways(
            lambda *x: scope_attention(*x, scope, backend="triton"), tensors, torch.randn_like(tensors[0])
        )

    run(4, 256)
    before = compiled()
    for i in range(20):
        run(1 + i, 240 + 17 * i)
    assert compiled() == before > 0


@pytest.mark.parametrize("where", ("host", "device"))
def test_nothing_waits_for_the_device(where):
    cu = torch.tensor([0, 300, 300, 1000], dtype=torch.int32)
    tensors = inputs(Scope.dense(1100), 64, torch.bfloat16)
    grad, cu = torch.randn_like(tensors[0]), cu if where == "host" else cu.cuda()
    host = Scope.packed([0, 300, 300, 1000], q_len=1100)
    want = both_ways(lambda *x: scope_attention(*x, host, backend="triton"), tensors, grad)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scope = Scope.packed(cu, q_len=1100)
        got = both_ways(lambda *x: scope_attention(*x, scope, backend="triton"), tensors, grad)
        # Of a device: without what the builder knows
        raw = Scope(*(t.clone() for t in scope.csr), 1100, 1100)
        again = both_ways(lambda *x: scope_attention(*x, raw, backend="triton"), tensors, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b, c in zip(got, want, again):  # whose blocks programs may share otherwise
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)


def test_cuda_graph():
    scope = SCOPES["time invariant"]
    tensors = [t.detach() for t in inputs(scope, 64, torch.bfloat16)]
    want = scope_attention(*tensors, scope)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = scope_attention(*tensors, scope)
    for t in tensors:
        t.neg_()
    tensors[0].neg_()
    y.zero_()
    graph.replay()
    assert not torch.equal(y, want) and torch.equal(y, scope_attention(*tensors, scope))


def test_gradients_do_not_depend_on_chance():
    scope = SCOPES["block causal"]
    tensors = inputs(scope, 64, torch.bfloat16)
    grad = torch.randn_like(tensors[0])
    first, second = (
        both_ways(lambda *x: scope_attention(*x, scope, backend="triton"), tensors, grad) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_what_a_device_says_amiss_is_raised_late():
    ints = lambda *x: torch.tensor(x, dtype=torch.int32, device="cuda")  # noqa: E731
    scope = Scope(ints(0, 10, 100), ints(0, 1, 3), ints(0, 9, -4, 20, 10, 10**9).view(3, 2), 100, 100)
    q, k, v = inputs(scope, 64, torch.bfloat16)
    assert scope_attention(q, k, v, scope, backend="triton").isfinite().all()
    with pytest.raises(ValueError, match="scope: a range"):
        raise_device_errors(q.device)
    with pytest.raises(ValueError, match="ranges: "):
        scope.density()
