"""That the emulator computes, and finds each kind of mistake: planted.cu is right, and wrong in one way per
number."""

import math

import pytest
import torch
from support import emulator

pytestmark = pytest.mark.needs_emulator

BUGS = {
    1: ("both stages in one place", "race in shared memory: cp.async"),
    2: ("reads a row that is not there", "out of bounds in global memory: cp.async"),
    3: ("half a row of b is never copied", "uninitialized shared memory: ldmatrix_x2"),
    4: ("source of cp.async off by one element", "misaligned in global memory: cp_async"),
    5: ("no commit, so the wait waits for nothing", "race in shared memory: ldmatrix"),
    6: ("waits for too few groups", "race in shared memory: ldmatrix"),
    7: ("two different barriers", "divergence: meets others that are at __syncthreads"),
    8: ("no barrier after the wait", "race in shared memory: ldmatrix"),
    9: ("row of a matrix off 16 bytes", "misaligned in shared memory: ldmatrix_x4"),
    10: ("half a warp loads a matrix", "divergence: .* with ldmatrix_x2"),
    11: ("two different mma in one warp", "divergence: meets others that are at mma_m16n8k16"),
    12: ("stage overwritten while others read it", "race in shared memory: cp.async"),
    13: ("last row beyond the end", "out of bounds in shared memory: st_shared"),
    14: ("lanes read what other lanes write", "(uninitialized|race in) shared memory: ld_shared"),
    15: ("some threads leave early", "deadlock: 23 threads have ended, "),
    16: ("vector off 16 bytes", "misaligned in shared memory: ld_shared"),
    17: ("reads what another warp writes", "(uninitialized|race in) shared memory: ld_shared"),
    18: ("all blocks write to one place", "race in global memory: st_global"),
    19: ("two threads write to one place", "race in global memory: st_global"),
    20: ("writes behind the result", "out of bounds in global memory: st_global"),
    21: ("reads what another block writes", "race in global memory: (ld|st)_global"),
    22: ("reads what another thread writes", "race in global memory: ld_global"),
    23: ("a lane leaves before the shuffles", "deadlock: 2 threads have ended, 62 wait at __shfl_xor_sync"),
    24: ("a lane that its own mask leaves out", "the mask lacks the lane that calls it"),
    25: ("shuffle from outside of the mask", "__shfl_sync: reads a lane that is not in the mask"),
    26: ("plain store beside atomic additions", "race in global memory: (st_global|red_add)"),
    27: ("block of 2048 threads", "launch: block of 2048 x 1 x 1 threads"),
    28: ("more shared memory than a block may have", "204800 bytes of shared memory, .* granted 101376"),
}


@pytest.fixture(scope="module")
def gemm():
    return emulator.build(
        "tests/emulator/planted.cu",
        exports={"run": "planted"},
        glue="vtok::Status planted(vtok::Tensor, vtok::Tensor, vtok::Tensor, vtok::Tensor, int);",
    )


def operands(dtype, blocks=3, k=80):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-4, 5, (n, k), generator=generator).to(dtype) for n in (32 * blocks, 8))
    return a, b, torch.full((32 * blocks, 8), math.nan), torch.zeros(1)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_without_a_bug(gemm, dtype, seed):
    a, b, c, total = operands(dtype)
    gemm.run(a, b, c, total, 0, seed=seed)
    b[5] = 0
    want = a.float() @ b.float().T  # of small integers: exact
    assert torch.equal(c, want) and torch.equal(total, want.sum().view(1))
    assert gemm.bank_conflicts > 0  # rows of 32 bytes: two of eight in the same banks at a time


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bug", BUGS, ids=lambda n: f"{n}-{BUGS[n][0].replace(' ', '-')}")
def test_bug_is_found(gemm, bug, seed):
    with pytest.raises(emulator.EmulatorError, match=BUGS[bug][1]):
        gemm.run(*operands(torch.bfloat16), bug, seed=seed)


def test_an_argument_that_is_not_registered_is_out_of_bounds(gemm):
    a, b, c, total = operands(torch.bfloat16)
    with pytest.raises(emulator.EmulatorError, match="out of bounds in global memory: st_global"):
        gemm.run(a, b, c[:32], total, 0)
    with pytest.raises(emulator.EmulatorError, match=r"block \(0, 0, 0\) at planted.cu:\d+"):
        gemm.run(a, b[:, :16], c, total, 0)


def test_wrong_calls(gemm):
    with pytest.raises(ValueError, match="expected 5 arguments, got 1"):
        gemm.run(3)
    with pytest.raises(TypeError, match="argument 0"):
        gemm.run("a", None, None, None, 0)
