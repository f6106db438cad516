"""The Triton kernels of scope_attention, without a GPU: under the interpreter, and compiled ahead of time."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
from support.triton_every import TENSORS, attention, with_types  # noqa: E402
from support.triton_harness import CAPABILITIES, ROOT, assert_fits, compile_for, run_interpreted  # noqa: E402

import vtok_fast  # noqa: E402
from vtok_fast.kernels import scope_attention as kernels  # noqa: E402
from vtok_fast.ops.scope_attention import schedule  # noqa: E402
from vtok_fast.ops.scope_attention import triton as launcher  # noqa: E402
from vtok_fast.ops.scope_attention.scope import Scope  # noqa: E402

INTERPRETED = Path(__file__).resolve().parents[1] / "support" / "scope_attention_interpreted.py"
OTHERS = {"lse", "delta", "merges", "blocks", "ranges", "scale"}
OTHERS |= {"partial", "partial_lse", "partial_dk", "partial_dv"}
ELEMENTS = {"bf16": 2, "fp16": 2, "fp32": 4}
HEADS = (8, 16, 32, 64, 96, 128, 256, 384, 512, 1024)


@pytest.mark.volatile
def test_results_under_the_interpreter():
    assert "passed" in run_interpreted(INTERPRETED, "-m", "not slow")


@pytest.mark.slow
def test_results_of_large_heads_under_the_interpreter():
    assert "passed" in run_interpreted(INTERPRETED, "-m", "slow")


def compile_kernel(kernel, dim, element, cc, short=False, c=None):
    return attention(kernel, dim, element, cc, short, c).on(cc, compile_for)


def judge(resources, dim, cc, element, kernel, short=False):
    assert_fits(resources, cc, spills=16 if cc == 90 and dim in (256, 512) else 0)  # of a whole head
    if element != "fp32":
        # Blocks of 32 rows are too small for the instructions of 9.0 and 10.0: short segments, and the
        # gradients of keys where a whole head of 512 leaves room for no more.
        small = short or (cc, dim, kernel) == (90, 512, "keys")
        own = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}[cc]
        assert resources.has("mma.sync" if small else own)
        if dim >= 64:  # rows are known to be aligned although no length is: threads copy 16 bytes at a time
            assert resources.has(r"cp\.async\.cg\.shared\.global.* 0x10")


@pytest.mark.parametrize("cc", CAPABILITIES)
@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_kernels_fit(kernel, cc):
    judge(compile_kernel(kernel, 64, "bf16", cc), 64, cc, "bf16", kernel)


@pytest.mark.slow
@pytest.mark.parametrize("cc", CAPABILITIES)
@pytest.mark.parametrize("kernel", kernels.KERNELS)
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("dim", HEADS)
def test_every_kernel_fits(kernel, dim, element, cc):
    judge(compile_kernel(kernel, dim, element, cc), dim, cc, element, kernel)
    if element != "fp32":  # which has no other blocks for short segments
        judge(compile_kernel(kernel, dim, element, cc, short=True), dim, cc, element, kernel, short=True)


def variants_fit(kernel, dim, element, cc):
    for short in (False, True) if element != "fp32" else (False,):
        for c in kernels.variants(kernel, kernels.config(kernel, dim, ELEMENTS[element], cc, short))[1:]:
            assert_fits(compile_kernel(kernel, dim, element, cc, c=c), cc, spills=16)


@pytest.mark.parametrize("cc", (80, 90))
def test_what_a_table_may_choose_fits(cc):
    variants_fit("forward", 64, "bf16", cc)


@pytest.mark.slow
@pytest.mark.parametrize("cc", (80, 90))
@pytest.mark.parametrize("kernel", kernels.KERNELS)
@pytest.mark.parametrize("dim", (16, 32, 64, 128, 512))
def test_everything_that_a_table_may_choose_fits(kernel, dim, cc):
    variants_fit(kernel, dim, "bf16", cc)


@pytest.mark.slow
@pytest.mark.parametrize("cc", (86, 89))
@pytest.mark.parametrize("kernel", kernels.KERNELS)
@pytest.mark.parametrize("dim", (8, 64, 128, 512))
def test_kernels_fit_gpus_with_less_shared_memory(kernel, dim, cc):
    """8.6 and 8.9: the instructions of 8.0 on the shared memory of 12.0."""
    assert_fits(compile_kernel(kernel, dim, "bf16", cc), cc)
    assert_fits(compile_kernel(kernel, dim, "bf16", cc, short=True), cc)


@pytest.mark.parametrize("dim", (64, *(pytest.param(dim, marks=pytest.mark.slow) for dim in (8, 384, 1024))))
@pytest.mark.parametrize("cc", CAPABILITIES)
def test_the_kernel_of_delta_fits(cc, dim):
    block_d = triton.next_power_of_2(dim)
    constants = {"D": dim, "BLOCK_D": block_d, "BLOCK_M": max(1, 4096 // block_d)}
    assert_fits(with_types(kernels.delta_kernel, "bf16", constants, 4, 3).on(cc, compile_for), cc)


@pytest.mark.parametrize("dim", (64, 512))
@pytest.mark.parametrize("cc", CAPABILITIES)
def test_the_kernels_that_combine_fit(cc, dim):
    constants = {"D": dim, "BLOCK_D": dim, "BLOCK_M": 128, "ROWS": 4096 // dim}
    for kernel in (kernels.combine_kernel, kernels.add_kernel):
        found = with_types(kernel, "bf16", constants, 4, 3).on(cc, compile_for)
        assert_fits(found, cc)
        assert found.has(r"ld\.global[.\w]*\.v4")


def test_no_length_is_specialised_on():
    """What Triton compiles anew for: constants, the alignment of pointers, and integers, of which there are
    none."""
    others = kernels.delta_kernel, kernels.combine_kernel, kernels.add_kernel
    for function in (*kernels.KERNELS.values(), *others):
        integers = [
            p
            for p in function.params
            if not p.is_constexpr and p.name not in TENSORS and p.name not in OTHERS
        ]
        assert len(integers) >= 5 and all(p.do_not_specialize for p in integers)
        constants = {p.name for p in function.params if p.is_constexpr}
        tile = {"D", "BLOCK_D", "BLOCK_M", "BLOCK_N", "CHUNK", "ROWS", "REST"}
        assert constants <= tile | {"NEGATIVE", "IN_EXPONENT"}


def test_configurations_do_not_depend_on_lengths_but_for_short_segments():
    scopes = [
        Scope.time_invariant(tiv=96, tv=8, patches=64 * i, slices=s)
        for i, s in itertools.product(range(1, 6), (1, 4, 32))
    ]
    assert not any(map(launcher.is_short, scopes))
    assert launcher.is_short(Scope.per_frame(100, 16)) and not launcher.is_short(Scope.per_frame(100, 33))


@pytest.mark.parametrize(
    "scope",
    (
        Scope.block_causal(3, 50),
        Scope.time_invariant(tiv=20, tv=3, patches=33, slices=3),
        Scope.packed([0, 5, 5, 64], q_len=99),
        Scope.from_segments([], 7, 9),
    ),
    ids=repr,
)
@pytest.mark.parametrize("exact", (True, False))
def test_work_list_covers_each_row_once_and_heavy_blocks_first(scope, exact):
    work = launcher.work_list(scope, 16, exact).tolist()
    work = [item for item in work if item[0] < item[1]] if not exact else work
    assert sorted(row for start, end, *_ in work for row in range(start, end)) == list(range(scope.q_len))
    mask, ranges = scope.mask(), scope.ranges.tolist()
    keys = []
    for start, end, first, last, slot in work:
        assert slot == -1
        assert 0 < end - start <= 16
        row = torch.zeros(scope.k_len, dtype=torch.bool)
        for lo, hi in ranges[first:last]:
            row[lo:hi] = True
        assert (mask[start:end] == row).all()
        keys.append(int(row.sum()))
    assert keys == sorted(keys, reverse=True)


def test_work_lists_on_a_device_wait_for_no_value():
    scope = Scope.packed(torch.empty(5, dtype=torch.int32, device="meta"), q_len=100)
    assert launcher.work_list(scope, 16, exact=False).shape == ((100 + 5 * 15) // 16, 5)


TIVTOK = Scope.time_invariant(tiv=96, tv=8, patches=1024, slices=4)


def steps_of(items, ranges, block_n):
    """The steps of each program, walked as the kernel walks them, and the ranges that it sees."""
    found = []
    for _, _, first, last, _ in items:
        ends = ranges[first:last]
        found.append((sum(-(-(hi - lo) // block_n) for lo, hi in ends), ends))
    return found


@pytest.mark.parametrize(
    "scope, copies, places",
    (
        (TIVTOK, 12, 264),
        (Scope.block_causal(5, 1560), 1, 132),
        (Scope.packed([0, 5, 5, 900, 1000], q_len=1100), 1, 30),
        (Scope.from_segments([(0, 40, [(0, 7), (9, 9), (20, 600)]), (40, 300, [(3, 5)])], 300, 600), 2, 9),
    ),
    ids=repr,
)
def test_parts_of_a_block_see_its_keys_once_and_in_order(scope, copies, places):
    block_m, block_n = 128, 64
    whole = launcher.work_list(scope, block_m, True)
    work, ranges, merges, slots = launcher.shared_out(whole, scope, block_n, block_n, copies, places)
    assert slots, "this scope has a block that is longer than the others"
    before, after, ranges = whole.tolist(), work.tolist(), ranges.tolist()
    assert ranges[: len(scope.ranges)] == scope.ranges.tolist()
    of_slot = {item[4]: item for item in after if item[4] >= 0}
    assert sorted(of_slot) == list(range(slots))
    merged = set()
    for start, end, first, count in merges.tolist():
        parts = steps_of([of_slot[first + i] for i in range(count)], ranges, block_n)
        (block,) = [item for item in before if item[:2] == [start, end]]
        (steps, keys), merged = steps_of([block], ranges, block_n)[0], merged | {(start, end)}
        seen = [n for _, ends in parts for lo, hi in ends for n in range(lo, hi)]
        assert seen == [n for lo, hi in keys for n in range(lo, hi)]
        assert sum(n for n, _ in parts) == steps and count > 1 and min(n for n, _ in parts) > 0
    assert [i for i in before if (i[0], i[1]) not in merged] == [i for i in after if i[4] < 0]
    lengths = [n for n, _ in steps_of(after, ranges, block_n)]
    assert lengths == sorted(lengths, reverse=True)


def spans(scope, kernel, dim, copies, multiprocessors=132):
    """(before, after, the share of the places' time that goes into pairs that are seen, likewise) on a GPU
    with so many multiprocessors; the kernel that combines is counted by itself."""
    scope = scope.transposed() if kernel == "keys" else scope
    c = kernels.config(kernel, dim, 2, 90, launcher.is_short(scope))
    block, step = (c.block_n, c.block_m) if kernel == "keys" else (c.block_m, c.block_n)
    places = multiprocessors * (8 // c.num_warps)
    whole = launcher.work_list(scope, block, True)
    useful = scope.pairs() / block / step * copies / places
    rest, found = kernels.rest(c) if kernel == "forward" else step, []
    alone = launcher.Plan(whole, scope.ranges)
    for plan in (alone, launcher.shared_out(whole, scope, step, rest, copies, places)):
        costs = [
            sum(schedule.steps_over(hi - lo, step, rest) for lo, hi in ends) + schedule.FIXED
            for _, ends in steps_of(plan.work.tolist(), plan.ranges.tolist(), step)
            for _ in range(copies)
        ]
        found.append(schedule.makespan(costs, places))
    return *found, *(useful / span for span in found)


@pytest.mark.parametrize(
    "case, kernel, dim, heads, before, after",
    (
        (TIVTOK, "forward", 64, 12, 0.41, 0.64),
        (Scope.time_invariant(tiv=128, tv=8, patches=1024, slices=8), "forward", 64, 12, 0.44, 0.67),
        (Scope.time_invariant(tiv=384, tv=32, patches=1024, slices=4), "forward", 64, 12, 0.58, 0.70),
        (Scope.block_causal(5, 1560), "forward", 512, 1, 0.55, 0.80),
        (Scope.block_causal(5, 6240), "forward", 512, 1, 0.90, 0.90),
        # One program a multiprocessor: the longest block is no longer than the four rounds of the others
        (TIVTOK, "queries", 64, 12, 0.64, 0.63),
        (TIVTOK, "keys", 64, 12, 0.65, 0.64),
        (TIVTOK, "queries", 64, 2, 0.14, 0.40),
        (TIVTOK, "keys", 64, 2, 0.14, 0.40),
        (Scope.block_causal(5, 1560), "queries", 512, 1, 0.55, 0.88),
        (Scope.block_causal(5, 1560), "keys", 512, 1, 0.91, 0.90),
    ),
    ids=lambda value: repr(value) if isinstance(value, Scope) else str(value),
)
def test_the_makespan_of_the_benchmarks_scopes(case, kernel, dim, heads, before, after):
    """Simulated for an H200: programs on the first place that is free, three steps of fixed cost each."""
    _, _, was, now = spans(case, kernel, dim, heads)
    assert was == pytest.approx(before, abs=0.03) and now >= after


def test_the_simulator_keeps_the_order_and_fills_every_place():
    assert schedule.makespan([5, 4, 3, 3], 2) == 8 and schedule.makespan([3, 3, 4, 5], 2) == 8
    assert schedule.makespan([7], 264) == 7 and schedule.makespan([2] * 10, 5) == 4
    assert schedule.costs([10, 4], 2, None) == [13, 13, 7, 7]
    assert schedule.costs([10, 4], 1, 5) == [8, 8, 7]
    assert schedule.longest_part((20,) * 40, 12, 264) is None, "all blocks are as long: nothing to gain"
    assert schedule.longest_part((100, *[1] * 20), 1, 132) < 100
    assert schedule.longest_part((), 1, 132) is None and schedule.longest_part((0, 0), 3, 8) is None


def test_reasons():
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(vtok_fast.BackendError, match="the tensors are on cpu"):
        vtok_fast.scope_attention(q, q, q, Scope.dense(4), backend="triton")
    with pytest.raises(vtok_fast.BackendError, match="no kernel for torch.float64"):
        vtok_fast.scope_attention(*[q.double()] * 3, Scope.dense(4), backend="triton")
    assert all(kernels.why_not_head(dim) is None for dim in HEADS)
    for dim in (4, 20, 136, 400, 1152):
        assert f"head of {dim}" in kernels.why_not_head(dim)


def test_everything_but_the_kernels_works_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch, vtok_fast
q = torch.randn(1, 1, 4, 8)
vtok_fast.scope_attention(q, q, q, vtok_fast.Scope.dense(4))
why = vtok_fast.available_backends()["scope_attention"]["triton"]
assert "Triton cannot be imported" in why, why
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
