"""That the harness for Triton kernels would notice: a failing test under the interpreter, a spill, too much
shared memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl
from support.triton_harness import CAPABILITIES, SHARED_LIMIT, assert_fits, compile_for, run_interpreted

FILE = """
import torch, triton, triton.language as tl

@triton.jit
def twice(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n) * {factor}, mask=i < n)

def test_twice():
    x, y = torch.randn(100), torch.full((100,), float("nan"))
    twice[(2,)](x, y, 100, 64)
    assert torch.equal(y, 2 * x)
"""


@triton.jit
def twice(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n) * 2, mask=i < n)


@triton.jit
def many(x, y, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a = tl.load(x + i)
    tl.store(y + i, tl.dot(a, tl.trans(a)) + a)


def test_the_interpreter_runs_and_judges(tmp_path):
    good, bad = tmp_path / "good_interpreted.py", tmp_path / "bad_interpreted.py"
    good.write_text(FILE.format(factor=2))
    bad.write_text(FILE.format(factor=3))
    assert "1 passed" in run_interpreted(good)
    with pytest.raises(AssertionError, match="1 failed"):
        run_interpreted(bad)
    with pytest.raises(AssertionError, match="1 deselected"):
        run_interpreted(good, "-k", "absent")


IN_ORDER = """
import torch, triton, triton.language as tl

@triton.jit
def after_the_one_before(y):
    i = tl.program_id(0)
    tl.store(y + i + 1, tl.load(y + i) + 1)

def test_programs_run_in_no_order():
    y = torch.zeros(65, dtype=torch.int32)
    after_the_one_before[(64,)](y)
    assert 0 < y.max() < 64
"""


def test_a_kernel_whose_programs_need_an_order_is_found(tmp_path):
    file = tmp_path / "order_interpreted.py"
    file.write_text(IN_ORDER)
    assert "1 passed" in run_interpreted(file)


@pytest.mark.parametrize("cc", CAPABILITIES)
def test_alignment_reaches_the_compiler(cc):
    signature = {"x": "*fp32", "y": "*fp32", "n": "i32"}
    plain = compile_for(twice, signature, {"BLOCK": 1024}, cc)
    aligned = compile_for(twice, signature, {"BLOCK": 1024}, cc, aligned=("x", "y", "n"))
    assert_fits(aligned, cc)
    assert aligned.has(r"ld\.global\.v4") and not plain.has(r"ld\.global\.v4")


def test_spills_and_shared_memory_are_noticed():
    signature = {"x": "*fp16", "y": "*fp16"}
    large = compile_for(many, signature, {"N": 128}, 80, num_warps=1)
    with pytest.raises(AssertionError, match="registers spill"):
        assert_fits(large, 80)
    assert_fits(compile_for(many, signature, {"N": 64}, 80), 80)
    with pytest.raises(AssertionError, match="shared memory"):
        assert_fits(replace(large, stack=0, shared=SHARED_LIMIT[120] + 1), 120)
