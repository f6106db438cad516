"""The Triton kernels of scope_attention under Triton's interpreter (see tests/support/triton_harness.py),
against float64."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.scope_cases import by_hand, rounding, scopes
from vtok_fast import parity
from vtok_fast.kernels import scope_attention as kernels
from vtok_fast.ops.scope_attention import transpose
from vtok_fast.ops.scope_attention import triton as launcher
from vtok_fast.ops.scope_attention.call import ScopeBackwardCall, ScopeCall
from vtok_fast.ops.scope_attention.csr import CSR, clamp
from vtok_fast.ops.scope_attention.scope import Scope
from vtok_fast.ops.token_packing.packed_tokens import raise_device_errors
from vtok_fast.reference import scope_attention as reference


def tiny(kernel, dim, itemsize, capability, short=False):
    """Small blocks, which many ranges cross."""
    if dim > kernels.LARGEST_WHOLE_HEAD:
        return kernels.Config(16, 16, 128, 64, 1, 1)
    block_d = max(16, 1 << (dim - 1).bit_length())
    return kernels.Config(16, 32 if kernel == "queries" else 16, block_d, block_d, 1, 1)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "config", tiny)


@pytest.fixture(autouse=True)
def poisoned():
    """Memory is NaN where nobody writes."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


def check(scope, dim, heads=2, kv_heads=2, dtype=torch.float32, batch=1, mask=None, make=None, capability=80):
    """Forward and backward against the reference in float64.

    float32 is *close* beside the reference in float32. In float16 the probabilities and the gradients of the
    scores are rounded before the second product, as in every flash attention: half an eps for each of at most
    three factors of a result, and for itself. Where a result is much smaller than what it is the difference
    of, zero among that, each of its elements is as near as `rounding` can take it.
    """
    make = make or (lambda h, n: torch.randn(batch, h, n, dim).to(dtype))
    q, k, v = make(heads, scope.q_len), make(kv_heads, scope.k_len), make(kv_heads, scope.k_len)
    scale, mask = 0.7 * dim**-0.5, by_hand(scope) if mask is None else mask
    call = ScopeCall(q, k, v, scope, scale)
    out, lse = launcher.run(call, capability)
    grad = torch.randn_like(out)
    backward = ScopeBackwardCall(grad, q, k, v, out, lse, scope, scale)
    got = (out, *launcher.run_backward(backward, capability))

    def refer(*tensors):
        q, k, v, grad = tensors
        out, lse = reference.scope_attention(q, k, v, mask, scale)
        return (out, *reference.scope_attention_backward(grad, q, k, v, out, lse, mask, scale)), lse

    wants, want_lse = refer(*(t.double() for t in (q, k, v, grad)))
    bounds = rounding(*(t.double() for t in (q, k, v, grad)), mask, scale, dtype)
    for ours, exact, same, bound in zip(got, wants, refer(q, k, v, grad)[0], bounds):
        assert ours.dtype == dtype and ours.isfinite().all()
        difference = ours - exact
        if dtype == torch.float32:
            close = (measured := parity.close(ours, exact, same)).ok
        else:
            close = difference.norm() <= (measured := 2 * torch.finfo(dtype).eps * exact.norm())
        assert close or (difference.abs() <= bound).all(), f"{measured}; {(difference.abs() / bound).max()}"
    seen = mask.any(1)
    assert (lse[..., ~seen] == -torch.inf).all() and (out[:, :, ~seen] == 0).all()
    if seen.any():
        assert (lse - want_lse)[..., seen].abs().max() <= 1e-5 * (1 + want_lse[..., seen].abs().max())
    return got


@settings(max_examples=15, deadline=None)
@given(scopes(), st.sampled_from((8, 16)), st.sampled_from((torch.float32, torch.float16)))
def test_any_scope(scope, dim, dtype):
    if not scope.q_len or not scope.k_len:
        return  # never gets to a kernel
    before, kernels.config = kernels.config, tiny
    try:
        check(scope, dim, 2, 1, dtype)
    finally:
        kernels.config = before


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_gradients_that_are_zero(dtype, small_blocks, monkeypatch):
    """One key a query: no gradient but rounding reaches queries and keys. The bound finds an error of one
    hundredth of a sum whose difference is zero."""
    scope = Scope.from_segments([(i, i + 1, [(i % 3, i % 3 + 1)]) for i in range(9)], 9, 3)
    check(scope, 16, 2, 1, dtype)
    delta = kernels.delta
    monkeypatch.setattr(kernels, "delta", lambda out, grad: delta(out, grad) * 1.01)
    with pytest.raises(AssertionError):
        check(scope, 16, 2, 1, dtype)


@pytest.mark.parametrize("dim", (8, 24, 32, 64, 96, 128))
def test_heads(dim, small_blocks):
    check(Scope.time_invariant(tiv=9, tv=2, patches=20, slices=2), dim, 1, 1)


@pytest.mark.parametrize(
    "dim",
    (
        256,
        pytest.param(384, marks=pytest.mark.slow),
        pytest.param(512, marks=pytest.mark.slow),
        pytest.param(1024, marks=pytest.mark.slow),
    ),
)
def test_split_heads(dim, small_blocks):
    check(Scope.block_causal(2, 18), dim, 1, 1)


@pytest.mark.parametrize("dim", (256, pytest.param(512, marks=pytest.mark.slow)))
def test_whole_large_heads(dim, monkeypatch):
    """As on Hopper: one masked loop over keys, which every scope enters with ragged ranges."""
    monkeypatch.setattr(kernels, "config", lambda *args: kernels.Config(16, 16, dim, dim, 1, 1))
    check(Scope.from_segments([(0, 20, [(0, 7), (9, 40)]), (20, 33, [(3, 35)])], 33, 40), dim, 1, 1)


@pytest.fixture
def many_places(monkeypatch):
    """A GPU with so much room that long blocks are shared by several programs; returns how many parts there
    were to add up, launch by launch of each kernel."""
    slots = {}
    monkeypatch.setattr(launcher, "places", lambda device, c: 60)
    for name in ("attend", "queries_gradient", "keys_gradient"):

        def noted(*args, launch=getattr(kernels, name), found=slots.setdefault(name, [])):
            found.append(args[-3])
            return launch(*args)

        monkeypatch.setattr(kernels, name, noted)
    return slots


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_blocks_that_several_programs_share(dtype, small_blocks, many_places):
    """One block sees everything, with ragged and touching ranges, and is seen by all, as TivTok's invariant
    tokens are."""
    ragged = [(0, 7), (8, 8), (9, 170), (170, 299)]
    scope = Scope.from_segments([(0, 9, ragged), (9, 130, [(0, 9)])], 130, 300)
    check(scope, 24, 2, 1, dtype)
    assert all(found[0] for found in many_places.values()), many_places


def test_sharing_a_block_changes_rounding_only_and_is_repeatable(small_blocks, many_places, monkeypatch):
    scope = Scope.from_segments([(0, 9, [(0, 200)]), (9, 200, [(0, 9)])], 200, 200)
    q, k, v, grad = torch.randn(4, 1, 1, scope.q_len, 16).unbind(0)

    def results():
        out, lse = launcher.run(ScopeCall(q, k, v, scope, 0.25), 80)
        back = ScopeBackwardCall(grad, q, k, v, out, lse, scope, 0.25)
        return out, *launcher.run_backward(back, 80), lse

    first, second = results(), results()
    assert all(map(torch.equal, first, second))
    monkeypatch.setattr(launcher, "places", lambda device, c: 1)
    alone = results()
    for found in many_places.values():
        assert found[0] == found[1] > 0 == found[2]
    # The first block alone is shared; in the others the forward pass has the same bits.
    assert torch.equal(first[0][:, :, 9:], alone[0][:, :, 9:])
    assert any(not torch.equal(a, b) for a, b in zip(first, alone))
    assert torch.allclose(first[0], alone[0], atol=1e-6) and torch.allclose(first[-1], alone[-1], atol=1e-5)


@pytest.mark.parametrize("scale", (-0.3, 0.0, 1e-42, 30.0))
def test_any_scale(scale, small_blocks):
    """The scale moves into the exponent, whose largest value is that of the largest score only where the
    scale is positive; and 0 times the score of a masked key must be nothing."""
    scope = Scope.from_segments([(0, 20, [(0, 7), (9, 40)]), (20, 33, [(3, 35)])], 33, 40)
    q, k, v = (torch.randn(1, 1, n, 16) for n in (33, 40, 40))
    out, lse = launcher.run(ScopeCall(q, k, v, scope, scale), 80)
    wide, mask = [t.double() for t in (q, k, v)], by_hand(scope)
    want, want_lse = reference.scope_attention(*wide, mask, scale)
    bound = rounding(*wide, torch.zeros_like(wide[0]), mask, abs(scale), torch.float32)[0]
    assert ((out - want).abs() <= bound).all()
    assert (lse - want_lse).abs().max() <= 1e-5 * (1 + want_lse.abs().max())


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_the_blocks_that_ship(dtype):
    """Ranges shorter and longer than a block, and touching ones."""
    scope = Scope.from_segments(
        [(0, 40, [(0, 150)]), (40, 200, [(3, 20), (20, 149)]), (210, 213, [(64, 128)])], 220, 150
    )
    check(scope, 64, 2, 1, dtype, capability=90)
    check(Scope.per_frame(5, 7), 64, 1, 1, dtype, capability=90)  # short segments


def test_videos_and_groups_of_heads(small_blocks):
    check(Scope.packed([0, 5, 5, 30], [0, 17, 20, 20], q_len=33, k_len=21), 16, 6, 2, batch=2)


def test_any_strides(small_blocks):
    scope, n = Scope.block_causal(2, 20), 40
    fused = torch.randn(2, n, 3, 2, 16).permute(2, 0, 3, 1, 4)
    one_head, narrow = (
        torch.randn(3, 1, 1, n, 16).expand(3, 2, 2, n, 16),
        torch.randn(3, 2, 2, n, 20)[..., 1:17],
    )
    for qkv in (fused, one_head, narrow, torch.randn(3, 2, 2, 16, n).mT):
        tensors = iter(qkv.unbind(0))
        dq = check(scope, 16, 2, 2, make=lambda heads, length: next(tensors))[1]
        assert dq.stride() == torch.empty_like(qkv[0]).stride()


def test_order_of_summation_is_fixed(small_blocks):
    scope = Scope.time_invariant(tiv=9, tv=2, patches=20, slices=2)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(check(scope, 16))
    assert all(map(torch.equal, *results))


def test_what_a_device_would_do(small_blocks, monkeypatch):
    """Values that nobody has checked: the kernels see the nearest scope that is valid, and the error is
    flagged."""
    monkeypatch.setattr(
        launcher, "work_list", lambda scope, block, exact, make=launcher.work_list: make(scope, block, False)
    )
    ints = lambda *x: torch.tensor(x, dtype=torch.int32)  # noqa: E731
    for csr, wrong in (
        ((ints(0, 10, 10, 33), ints(0, 1, 1, 3), ints(0, 9, 2, 20, 20, 41).view(3, 2)), False),
        ((ints(0, 10, 5, 33), ints(0, 1, 1, 3), ints(-5, 9, 2, 20, 15, 1000).view(3, 2)), True),
        ((ints(7, 900, -3, 2), ints(2, 50, 1, 3), ints(30, 9, 2**30, -(2**30), 5, 41).view(3, 2)), True),
    ):
        scope = Scope._make(*csr, 33, 41, False)
        safe = CSR(*clamp(scope.csr, 33, 41)[0])
        monkeypatch.setattr(
            Scope, "transposed", lambda self, csr=safe: Scope._make(*transpose.on_device(csr, 41), 41, 33)
        )
        check(scope, 16, 2, 2, mask=Scope(*safe, 33, 41).mask())
        with pytest.raises(ValueError, match="scope: a range") if wrong else contextlib.nullcontext():
            raise_device_errors(torch.device("cpu"))


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_garbage_in_unseen_rows(value):
    """Dao-AILab/flash-attention #2421, tile-ai/tilelang #2461: what nobody sees reaches nothing."""
    for scope in (Scope.packed([0, 3, 3, 8], q_len=12, k_len=12), Scope.per_frame(3, 5)):
        mask = by_hand(scope)
        blind, unseen = ~mask.any(1), ~mask.any(0)
        if not blind.any():  # a frame of its own, which others do not see
            blind = unseen = torch.arange(15) // 5 == 1
        q, k, v, grad = torch.randn(4, 1, 2, scope.q_len, 16).unbind(0)
        found = []
        for spoil in (False, True):
            bad = [t.masked_fill(rows[:, None], value) if spoil else t for t, rows in
                   ((q, blind), (k, unseen), (v, unseen), (grad, blind))]  # fmt: skip
            call = ScopeCall(*bad[:3], scope, 0.25)
            out, lse = launcher.run(call, 80)
            backward = ScopeBackwardCall(bad[3], *bad[:3], out, lse, scope, 0.25)
            found.append((out, *launcher.run_backward(backward, 80)))
        for clean, dirty, rows in zip(*found, (blind, blind, unseen, unseen)):
            assert torch.equal(clean[:, :, ~rows], dirty[:, :, ~rows])
