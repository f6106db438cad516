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
from support.triton_harness import CAPABILITIES, ROOT, assert_fits, compile_for, run_interpreted  # noqa: E402

import vtok_fast  # noqa: E402
from vtok_fast.kernels import scope_attention as kernels  # noqa: E402
from vtok_fast.ops.scope_attention import triton as launcher  # noqa: E402
from vtok_fast.ops.scope_attention.scope import Scope  # noqa: E402

INTERPRETED = Path(__file__).resolve().parents[1] / "support" / "scope_attention_interpreted.py"
TENSORS = {"q", "k", "v", "out", "grad", "dq", "dk", "dv"}
TYPES = {"lse": "*fp32", "delta": "*fp32", "blocks": "*i32", "ranges": "*i32", "scale": "fp32"}
ELEMENTS = {"bf16": 2, "fp16": 2, "fp32": 4}
HEADS = (8, 16, 32, 64, 96, 128, 256, 384, 512, 1024)


@pytest.mark.volatile
def test_results_under_the_interpreter():
    assert "passed" in run_interpreted(INTERPRETED, "-m", "not slow")


@pytest.mark.slow
def test_results_of_large_heads_under_the_interpreter():
    assert "passed" in run_interpreted(INTERPRETED, "-m", "slow")


def compile_kernel(kernel, dim, element, cc, short=False, c=None):
    function = kernels.KERNELS[kernel]
    c = c or kernels.config(kernel, dim, ELEMENTS[element], cc, short)
    constants = {"D": dim, "BLOCK_D": c.block_d, "BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "CHUNK": c.chunk}
    signature = {
        name: f"*{element}" if name in TENSORS else TYPES.get(name, "i32") for name in function.arg_names
    }
    pointers = [name for name, kind in signature.items() if kind.startswith("*")]
    return compile_for(function, signature, constants, cc, c.num_warps, c.num_stages, aligned=pointers)


def judge(resources, dim, cc, element, short=False):
    assert_fits(resources, cc)
    if element != "fp32":  # blocks of 32 rows are too small for the instructions of 9.0 and 10.0
        assert resources.has(
            "mma.sync" if short else {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}[cc]
        )
        if dim >= 64:  # rows are known to be aligned although no length is: threads copy 16 bytes at a time
            assert resources.has(r"cp\.async\.cg\.shared\.global.* 0x10")


@pytest.mark.parametrize("cc", CAPABILITIES)
@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_kernels_fit(kernel, cc):
    judge(compile_kernel(kernel, 64, "bf16", cc), 64, cc, "bf16")


@pytest.mark.slow
@pytest.mark.parametrize("cc", CAPABILITIES)
@pytest.mark.parametrize("kernel", kernels.KERNELS)
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("dim", HEADS)
def test_every_kernel_fits(kernel, dim, element, cc):
    judge(compile_kernel(kernel, dim, element, cc), dim, cc, element)
    if element != "fp32":  # which has no other blocks for short segments
        judge(compile_kernel(kernel, dim, element, cc, short=True), dim, cc, element, short=True)


def variants_fit(kernel, dim, element, cc):
    for short in (False, True) if element != "fp32" else (False,):
        for c in kernels.variants(kernel, kernels.config(kernel, dim, ELEMENTS[element], cc, short))[1:]:
            assert_fits(compile_kernel(kernel, dim, element, cc, c=c), cc)


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
    signature = {
        name: "*bf16" if name in ("out", "grad") else "*fp32" if name == "delta" else "i32"
        for name in kernels.delta_kernel.arg_names
    }
    assert_fits(
        compile_for(kernels.delta_kernel, signature, constants, cc, aligned=("out", "grad", "delta")), cc
    )


def test_no_length_is_specialised_on():
    """What Triton compiles anew for: constants, the alignment of pointers, and integers, of which there are
    none."""
    for function in (*kernels.KERNELS.values(), kernels.delta_kernel):
        integers = [
            p for p in function.params if not p.is_constexpr and p.name not in TENSORS and p.name not in TYPES
        ]
        assert len(integers) > 5 and all(p.do_not_specialize for p in integers)
        constants = {p.name for p in function.params if p.is_constexpr}
        assert constants <= {"D", "BLOCK_D", "BLOCK_M", "BLOCK_N", "CHUNK"}


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
    assert sorted(row for start, end, _, _ in work for row in range(start, end)) == list(range(scope.q_len))
    mask, ranges = scope.mask(), scope.ranges.tolist()
    keys = []
    for start, end, first, last in work:
        assert 0 < end - start <= 16
        row = torch.zeros(scope.k_len, dtype=torch.bool)
        for lo, hi in ranges[first:last]:
            row[lo:hi] = True
        assert (mask[start:end] == row).all()
        keys.append(int(row.sum()))
    assert keys == sorted(keys, reverse=True)


def test_work_lists_on_a_device_wait_for_no_value():
    scope = Scope.packed(torch.empty(5, dtype=torch.int32, device="meta"), q_len=100)
    assert launcher.work_list(scope, 16, exact=False).shape == ((100 + 5 * 15) // 16, 4)


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
