"""Rows that a query does not see may hold anything: NaN and infinities reach neither results nor gradients.

fla-org/flash-linear-attention #892, tile-ai/tilelang #2461, Dao-AILab/flash-attention #2421 and #2568: zero
times NaN in a masked row, and slack rows of packed batches that hold uninitialized memory.
"""

from __future__ import annotations

import pytest
import torch

import vtok_fast
from vtok_fast import Scope
from vtok_fast.dispatch import native
from vtok_fast.ops.scope_attention import cpu

GARBAGE = (float("nan"), float("inf"), float("-inf"))
SCOPES = {
    "packed, with slack": Scope.packed([0, 3, 3, 8], q_len=12, k_len=12),
    "longer keys": Scope.packed([0, 3, 8], [0, 5, 9], q_len=10, k_len=14),
    "gaps": Scope.from_segments([(2, 5, [(1, 3), (6, 8)]), (7, 9, [(3, 6)])], 12, 12),
    "per frame": Scope.per_frame(3, 4),
    "block causal": Scope.block_causal(3, 4),
}
BACKENDS = ("cpu", "cpu, without masks", "reference")


def spoiled(t: torch.Tensor, rows: torch.Tensor, value: float) -> torch.Tensor:
    return t.masked_fill(rows[:, None], value)


def run(scope, q, k, v, grad, backend):
    q, k, v = (t.clone().requires_grad_() for t in (q, k, v))
    y = vtok_fast.scope_attention(q, k, v, scope, backend=backend)
    return (y.detach(), *torch.autograd.grad(y, (q, k, v), grad))


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    if "without" in request.param:
        monkeypatch.setattr(cpu, "LARGEST_MASK", -1)
    return request.param.split(",")[0]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("value", GARBAGE)
@pytest.mark.parametrize("name", SCOPES)
def test_garbage_in_unseen_rows(name, value, dtype, backend):
    scope = SCOPES[name]
    torch.manual_seed(0)
    q, grad = torch.randn(2, 2, 4, scope.q_len, 16, dtype=dtype).unbind(0)
    k, v = torch.randn(2, 2, 2, scope.k_len, 16, dtype=dtype).unbind(0)
    blind, unseen = ~scope.mask().any(1), ~scope.mask().any(0)
    clean = run(scope, q, k, v, grad, backend)
    dirty = run(
        scope,
        spoiled(q, blind, value),
        spoiled(k, unseen, value),
        spoiled(v, unseen, value),
        spoiled(grad, blind, value),
        backend,
    )
    tolerance = 8 * torch.finfo(dtype).eps  # a mask and the plan's calls may add up in another order
    for a, b in zip(clean, dirty):
        assert b.isfinite().all()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    y, dq, dk, dv = dirty
    assert not y[:, :, blind].any() and not dq[:, :, blind].any()
    assert not dk[:, :, unseen].any() and not dv[:, :, unseen].any()


@pytest.mark.parametrize("value", GARBAGE)
@pytest.mark.parametrize("what", ("k", "v", "q", "grad"))
def test_garbage_of_one_clip_stays_in_it(what, value, backend):
    """A frame that others do not see spoils itself only."""
    scope = Scope.per_frame(3, 4)
    torch.manual_seed(0)
    given = dict(zip(("q", "k", "v", "grad"), torch.randn(4, 1, 2, 12, 16).unbind(0)))
    clean = run(scope, *given.values(), backend)
    bad = torch.zeros(12, dtype=torch.bool)
    bad[5] = True
    dirty = run(scope, *(given | {what: spoiled(given[what], bad, value)}).values(), backend)
    others = [0, 1, 2, 3, 8, 9, 10, 11]
    for a, b in zip(clean, dirty):
        torch.testing.assert_close(a[:, :, others], b[:, :, others], rtol=1e-6, atol=1e-6)
    assert not all(t.isfinite().all() for t in dirty), "what a query sees must show"


@pytest.mark.skipif(native.lib() is None, reason="needs the native module")
@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("value", GARBAGE)
def test_tokens_that_are_not_kept(value, backend):
    """Packing moves what is kept, unpacking fills the rest, whatever stands there; gradients too."""
    torch.manual_seed(0)
    keep = torch.rand(2, 3, 4, 4) < 0.4
    tokens = torch.randn(2, 5, 3, 4, 4)
    dirty = tokens.masked_fill(~keep[:, None], value)
    for capacity in (None, 50):
        wanted, got = (
            vtok_fast.pack_tokens(t, keep, capacity=capacity, backend=backend) for t in (tokens, dirty)
        )
        assert torch.equal(wanted.values, got.values)
    levels = (8, 8, 8, 5, 5)
    wanted, got = (
        vtok_fast.pack_tokens(t, keep, levels=levels, capacity=60, backend=backend) for t in (tokens, dirty)
    )
    assert torch.equal(wanted.values, got.values)
    packed = vtok_fast.pack_tokens(tokens, keep, backend=backend)
    values = packed.values.clone().requires_grad_()
    y = vtok_fast.unpack_tokens(packed.with_values(values), backend=backend)
    y.backward(torch.ones_like(y).masked_fill(~keep[:, None], value))
    assert torch.equal(values.grad, torch.ones_like(values))
    x = dirty.clone().requires_grad_()
    vtok_fast.pack_tokens(x, keep, backend=backend).values.sum().backward()
    assert torch.equal(x.grad, keep[:, None].expand_as(x).float())


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("value", GARBAGE)
def test_frames_that_a_convolution_does_not_read(value, backend):
    """The oldest frames of a cache that is longer than the kernel's reach, and what strides pass over."""
    torch.manual_seed(0)
    x, w = torch.randn(1, 4, 3, 6, 6), torch.randn(5, 4, 2, 3, 3)
    cache = torch.randn(1, 4, 3, 6, 6)
    dirty = cache.clone()
    dirty[:, :, :2] = value
    found = []
    for c in (cache, dirty):
        leaves = [t.clone().requires_grad_() for t in (x, w, c)]
        y = vtok_fast.causal_conv3d(*leaves[:2], cache=leaves[2], time_pad=(1, 0), backend=backend)
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*found))
    wide = x.clone()
    wide[:, :, :, 1::2] = wide[..., 1::2] = value
    taps = torch.randn(5, 4, 1, 1, 1)
    options = {"stride": (1, 2, 2), "spatial_pad": ((0, 0), (0, 0)), "backend": backend}
    found = []
    for t in (x, wide):
        leaves = [t.clone().requires_grad_(), taps.clone().requires_grad_()]
        y = vtok_fast.causal_conv3d(*leaves, **options)
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("kind", ("layer", "rms", "group", "group_rms"))
def test_garbage_in_one_set_of_statistics(kind, backend):
    """Another position, clip or group of channels keeps its norm and its gradient."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 3, 4, 4)
    dirty = x.clone()
    dirty[1, :4, 2, 3, 3] = float("nan")
    found = []
    for t in (x, dirty):
        leaf = t.clone().requires_grad_()
        y = vtok_fast.norm_act(leaf, kind=kind, groups=2, per_frame=True, activation="silu", backend=backend)
        (grad,) = torch.autograd.grad(
            y[:, :, :2].square().sum() + y[:1, :, 2].sum() + y[1, 4:, 2].sum(), leaf
        )
        found.append((y.detach(), grad))
    for a, b in zip(*found):
        assert (
            torch.equal(a[:1], b[:1])
            and torch.equal(a[1, :, :2], b[1, :, :2])
            and torch.equal(a[1, 4:], b[1, 4:])
        )
