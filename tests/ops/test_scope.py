"""Scope: its builders against masks written out by hand, what it refuses, and its transposition with and
without values."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.scope_cases import by_hand, ints, scopes

from vtok_fast.ops.scope_attention import transpose
from vtok_fast.ops.scope_attention.csr import CSR, clamp
from vtok_fast.ops.scope_attention.scope import Scope


def test_builders():
    i = torch.arange(12)
    assert torch.equal(Scope.dense(3, 5).mask(), torch.ones(3, 5, dtype=torch.bool))
    assert torch.equal(Scope.block_causal(4, 3).mask(), i[:, None] // 3 >= i // 3)
    assert torch.equal(Scope.per_frame(4, 3).mask(), i[:, None] // 3 == i // 3)
    clip = torch.bucketize(i, ints(0, 2, 2, 9), right=True)
    packed = (clip[:, None] == clip) & (clip < 4)
    for cu in ((0, 2, 2, 9), ints(0, 2, 2, 9), ints(0, 2, 2, 9).long()):
        assert torch.equal(Scope.packed(cu).mask(), packed[:9, :9])
        assert torch.equal(Scope.packed(cu, q_len=12).mask(), packed)
    across = Scope.packed([0, 2, 5], [0, 0, 3], k_len=4)
    assert torch.equal(across.mask(), by_hand(Scope.from_segments([(2, 5, [(0, 3)])], 5, 4)))
    for empty in (
        Scope.dense(0),
        Scope.block_causal(0, 3),
        Scope.per_frame(3, 0),
        Scope.packed([0]),
        Scope.from_segments([], 0, 0),
        Scope.time_invariant(tiv=0, tv=0, patches=0, slices=2),
    ):
        assert empty.mask().shape == (0, 0) and empty.pairs() == 0 and empty.density() == 0


@pytest.mark.parametrize("see", ("slice", "patches", "all"))
def test_time_invariant(see):
    """The table of the paper, token by token: what kind it is and of which slice."""
    tiv, tv, patches, slices = 3, 2, 4, 3
    kind = ["tiv"] * tiv + (["tv"] * tv + ["x"] * patches) * slices
    of = [-1] * tiv + [t for t in range(slices) for _ in range(tv + patches)]
    mask = Scope.time_invariant(tiv=tiv, tv=tv, patches=patches, slices=slices, patches_see=see).mask()
    for q, (kq, tq) in enumerate(zip(kind, of)):
        for k, (kk, tk) in enumerate(zip(kind, of)):
            wide = kq == "tiv" or kq == "x" and see == "all"
            narrow = kq == "x" and see == "patches"
            assert mask[q, k] == (wide or (tq == tk and kk == "x" if narrow else kk == "tiv" or tq == tk))


def test_time_invariant_of_the_paper_is_28_percent():
    scope = Scope.time_invariant(tiv=96, tv=8, patches=1024, slices=4)
    assert (scope.q_len, scope.pairs()) == (4224, 96 * 4224 + 4128 * (96 + 1032))
    assert scope.density() == pytest.approx(0.2837, abs=1e-4)
    assert (
        scope.flops(64, heads=12) == 4 * 64 * 12 * scope.pairs()
        and scope.flops(64, backward=True) == 10 * 64 * scope.pairs()
    )


def test_from_segments_takes_any_order_and_fills_gaps():
    scope = Scope.from_segments([(6, 8, [(5, 9), (0, 2), (2, 2)]), (1, 3, [(4, 5)]), (3, 3, [])], 10, 9)
    mask = torch.zeros(10, 9, dtype=torch.bool)
    mask[1:3, 4:5] = mask[6:8, :2] = mask[6:8, 5:] = True
    assert torch.equal(scope.mask(), mask) and scope.segments == 5


def test_cat_is_block_diagonal():
    parts = [
        Scope.block_causal(2, 3),
        Scope.dense(2, 4),
        Scope.from_segments([], 3, 1),
        Scope.packed([0, 1, 4]),
    ]
    whole = Scope.cat(parts)
    assert torch.equal(whole.mask(), torch.block_diag(*(p.mask().float() for p in parts)).bool())
    assert torch.equal(Scope.cat(parts[:1]).mask(), parts[0].mask())


@settings(max_examples=100, deadline=None)
@given(scopes())
def test_mask_pairs_and_transposition(scope):
    mask = by_hand(scope)
    assert torch.equal(scope.mask(), mask) and scope.pairs() == mask.sum()
    back = scope.transposed()
    assert torch.equal(back.mask(), mask.T) and back.transposed() is scope and scope.transposed() is back
    Scope(*back.csr, back.q_len, back.k_len)  # is itself well formed
    # What a device computes without waiting for a value.
    without = Scope._make(*transpose.on_device(scope.safe()[0], scope.k_len), scope.k_len, scope.q_len)
    used = int(without.range_offsets[-1])
    assert torch.equal(
        by_hand(Scope(*without.csr[:2], without.ranges[:used], without.q_len, without.k_len)), mask.T
    )


@settings(max_examples=100, deadline=None)
@given(scopes())
def test_valid_values_are_left_alone(scope):
    safe, changed = clamp(scope.csr, scope.q_len, scope.k_len)
    assert not changed and all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(safe, scope.csr))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_values_are_clamped_to_a_valid_scope(data):
    """Whatever a device holds, what the kernels get is well formed; and if it is not what was given, that is
    known."""
    number = st.integers(-5, 15)
    segments, count, q_len, k_len = (data.draw(st.integers(low, 5)) for low in (1, 0, 0, 0))
    row = lambda n: ints(*data.draw(st.lists(number, min_size=n, max_size=n)))  # noqa: E731
    csr = CSR(row(segments + 1), row(segments + 1), row(2 * count).reshape(-1, 2))
    safe, changed = clamp(csr, q_len, k_len)
    Scope(*safe, q_len, k_len)
    try:
        Scope(*csr, q_len, k_len)
        valid = True
    except ValueError:
        valid = False
    assert bool(changed) != valid


def test_cached_and_immutable():
    scope = Scope.block_causal(3, 4)
    assert (
        Scope.of(scope.csr, 12, 12) is scope
        and Scope.of(CSR(*(t.clone() for t in scope.csr)), 12, 12) is not scope
    )
    with pytest.raises(AttributeError):
        scope.q_len = 3
    for twin in (pickle.loads(pickle.dumps(scope)), copy.deepcopy(scope)):
        assert torch.equal(twin.mask(), scope.mask())
    assert scope.to("cpu") is scope and "12 queries in 3 segments" in repr(scope)


def test_a_device_is_not_waited_for():
    """On the meta device every look at a value is an error."""
    cu = torch.empty(4, dtype=torch.int32, device="meta")
    scope = Scope.packed(cu, q_len=10)
    assert (
        scope.transposed().q_len == 10
        and scope.safe()[0].ranges.shape == (3, 2)
        and "device='meta'" in repr(scope)
    )
    both = Scope.cat([scope, Scope.block_causal(2, 3).to("meta")])
    assert (
        (both.q_len, both.segments) == (16, 6)
        and not both.validated
        and both.transposed().transposed() is both
    )
    assert Scope.cat([scope, scope]).transposed().segments == 8  # clips, not the pieces between all ends
    assert Scope.block_causal(5000, 2).to("meta").transposed().segments == 5000  # transposed on the host
    with pytest.raises(ValueError, match="5000 ranges in 5000 segments on meta"):
        transpose.on_device(Scope.block_causal(5000, 2).to("meta").csr, 10_000)
    with pytest.raises(ValueError, match="q_len: must be given for cu_seqlens on meta"):
        Scope.packed(cu)


def test_plot_draws_the_ranges():
    pytest.importorskip("matplotlib").use("agg")
    scope = Scope.time_invariant(tiv=3, tv=2, patches=4, slices=3)
    ax = scope.plot()
    image = ax.collections[0]
    area = sum(
        abs(p.vertices[:, 0].max() - p.vertices[:, 0].min())
        * (p.vertices[:, 1].max() - p.vertices[:, 1].min())
        for p in image.get_paths()
    )
    assert area == scope.pairs() and "%" in ax.get_title()


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot_writes_a_file(suffix, tmp_path):
    pytest.importorskip("matplotlib")
    ax = Scope.time_invariant(tiv=3, tv=2, patches=4, slices=2).plot(str(tmp_path / f"scope{suffix}"))
    assert [path.name for path in tmp_path.iterdir()] == [f"scope{suffix}"]
    start = (tmp_path / f"scope{suffix}").read_bytes()[:5]
    assert start == {".png": b"\x89PNG\r", ".svg": b"<?xml"}[suffix]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["invariant tokens", "slice 1", "slice 2"]


@pytest.mark.parametrize(
    ("scope", "names"),
    [
        (Scope.dense(4), ["all queries"]),
        (Scope.block_causal(2, 3), ["frame 1", "frame 2"]),
        (Scope.per_frame(2, 3), ["frame 1", "frame 2"]),
        (Scope.packed([0, 2, 5]), ["clip 1", "clip 2", "after the last clip"]),
        (
            Scope.time_invariant(tiv=2, tv=1, patches=2, slices=2, patches_see="patches"),
            ["invariant tokens", "tokens 1", "patches 1", "tokens 2", "patches 2"],
        ),
        (Scope.time_invariant(tiv=0, tv=1, patches=2, slices=1), ["slice 1"]),
        (Scope.from_segments([(1, 2, [(0, 1)])], 3, 3), ["segment 1", "segment 2", "segment 3"]),
        (Scope.cat([Scope.dense(2), Scope.per_frame(1, 2)]), ["1: all queries", "2: frame 1"]),
        (pickle.loads(pickle.dumps(Scope.dense(4))), ["segment 1"]),
    ],
)
def test_segments_have_names(scope, names):
    assert list(scope.names) == names and len(names) == scope.segments


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Scope.packed([0, 5, 3]), "cu_seqlens: .*never descend, got 3 after 5 at index 2"),
        (lambda: Scope.packed([1, 5]), "cu_seqlens: .*begin with 0, got 1"),
        (lambda: Scope.packed([0, 5], q_len=4), "cu_seqlens: .*at most 4, got 5"),
        (lambda: Scope.packed([0, 5], [0, 6], k_len=5), "cu_seqlens_k: .*at most 5, got 6"),
        (lambda: Scope.packed([0, 5], [0, 6, 7]), r"cu_seqlens_k: .*\(2,\).*\(3,\)"),
        (lambda: Scope.packed(torch.zeros(2, 2, dtype=torch.int32)), r"cu_seqlens: .*\(2, 2\)"),
        (lambda: Scope.dense(-1), "q_len: .*-1"),
        (lambda: Scope.block_causal(2, -3), "tokens_per_frame: .*-3"),
        (lambda: Scope.per_frame(1.5, 3), "frames: .*1.5"),
        (
            lambda: Scope.time_invariant(tiv=1, tv=1, patches=1, slices=1, patches_see="none"),
            "patches_see: .*'none'",
        ),
        (
            lambda: Scope.from_segments([(0, 5, []), (4, 6, [])], 6, 6),
            r"segments: \(4, 6\) overlaps.*ends at 5",
        ),
        (lambda: Scope.from_segments([(0, 7, [])], 6, 6), r"segments: .*0 to 6, got \(0, 7\)"),
        (lambda: Scope.from_segments([(4, 2, [])], 6, 6), r"segments: .*got \(4, 2\)"),
        (
            lambda: Scope.from_segments([(0, 2, [(0, 7)])], 6, 6),
            r"segments: \(0, 2\) sees \(0, 7\); expected keys from 0 to 6",
        ),
        (
            lambda: Scope.from_segments([(0, 2, [(3, 5), (0, 4)])], 6, 6),
            r"segments: \(0, 2\) sees \(0, 4\) and \(3, 5\).*overlap",
        ),
        (lambda: Scope.cat([]), "scopes: "),
        (lambda: Scope.cat([Scope.dense(1), Scope.dense(1).to("meta")]), "scopes: .*cpu, meta"),
        (lambda: Scope(ints(0), ints(0), ints().reshape(-1, 2), 0, 0), r"q_offsets: .*\(1,\)"),
        (
            lambda: Scope(ints(0, 2), ints(0, 1, 1), ints(0, 1).reshape(1, 2), 2, 2),
            r"range_offsets: .*\(2,\), got \(3,\)",
        ),
        (
            lambda: Scope(ints(0, 2), ints(0, 1), ints(0, 1), 2, 2),
            r"ranges: expected shape \(ranges, 2\), got \(2,\)",
        ),
        (
            lambda: Scope(ints(0, 3), ints(0, 1), ints(0, 1).reshape(1, 2), 2, 2),
            "q_offsets: expected to end with 2, got 3",
        ),
        (
            lambda: Scope(ints(0, 2), ints(0, 2), ints(0, 1).reshape(1, 2), 2, 2),
            "range_offsets: expected to end with 1, got 2",
        ),
        (
            lambda: Scope(ints(0, 2), ints(0, 1), ints(1, 3).reshape(1, 2), 2, 2),
            r"ranges: .*0 to 2, got \(1, 3\) at index 0",
        ),
        (
            lambda: Scope(ints(0, 2), ints(0, 2), ints(0, 2, 1, 2).reshape(2, 2), 2, 2),
            r"segment 0 sees \(0, 2\) and \(1, 2\)",
        ),
        (
            lambda: Scope(ints(0, 2), ints(0, 2), ints(1, 2, 0, 1).reshape(2, 2), 2, 2),
            r"segment 0 sees \(1, 2\) and \(0, 1\)",
        ),
    ],
)
def test_bad_values_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_bad_types_are_named():
    with pytest.raises(TypeError, match="cu_seqlens: .*float32"):
        Scope.packed(torch.zeros(2))
    with pytest.raises(TypeError, match="ranges: .*int64"):
        Scope(ints(0, 2), ints(0, 1), torch.zeros(1, 2, dtype=torch.int64), 2, 2)
