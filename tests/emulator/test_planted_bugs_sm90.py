"""The same as test_planted_bugs.py for mbarrier, TMA and wgmma: planted_sm90.cu."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import emulator  # noqa: E402

pytestmark = pytest.mark.skipif(emulator.why_missing() is not None, reason=str(emulator.why_missing()))

BUGS = {
    1: ("tiles not at multiples of 1024", "must start at a multiple of 1024"),
    2: ("barrier for one thread too many", "deadlock: .* wait at mbarrier_wait"),
    3: ("barrier for too few threads", "more threads arrive|race in shared memory|deadlock: .* wait at mbarrier_wait"),
    4: ("no fence after mbarrier_init", "no fence_mbarrier_init"),
    5: ("no barrier after mbarrier_init", "no mbarrier was initialised here|not ordered after the mbarrier's initialisation"),
    6: ("producer waits for the wrong parity", "deadlock: .* wait at mbarrier_wait"),
    7: ("fewer bytes expected than come", "fewer bytes expected than come|race in shared memory|deadlock"),
    8: ("more bytes expected than come", "deadlock: .* wait at mbarrier_wait"),
    9: ("a stage too many", "out of bounds in shared memory: tma_load"),
    10: ("signals the other stage", "deadlock|race in shared memory|fewer bytes expected than come"),
    11: ("no wgmma_fence", "no wgmma_fence before the first product"),
    12: ("consumer waits for the wrong parity", "(race in|uninitialised) shared memory|deadlock: .* wait at mbarrier_wait"),
    13: ("registers changed without a fence", "registers changed since the last wgmma_fence"),
    14: ("not all of a warpgroup", "deadlock|divergence"),
    15: ("different descriptors", "threads have different descriptors"),
    16: ("stage released before the product has read it", "race in shared memory: (tma_load|st_shared)|no wgmma_wait"),
    17: ("no fence between st_shared and the TMA store", "no fence.proxy.async: tma_store"),
    18: ("no barrier before the TMA store", "race in shared memory: (tma_store|st_shared)|uninitialised|no fence.proxy.async"),
    19: ("named barrier for too many threads", "deadlock: .* wait at bar_sync"),
    20: ("all blocks write to one place", "race in global memory: tma_store"),
    21: ("the kernel ends while TMA reads", "no tma_store_wait_read"),
    22: ("overwrites what TMA still reads", "race in shared memory: st_shared"),
    23: ("a row stride that is no multiple of 16", "stride 8 of axis 1"),
    24: ("box rows longer than the swizzle", "are longer than the swizzle"),
}
RIGHT = 0, 25  # 25 overwrites what TMA has read, after a barrier with the thread that has waited for that


@pytest.fixture(scope="module")
def gemm():
    return emulator.build("tests/emulator/planted_sm90.cu", exports={"run": "planted_sm90"},
                          glue="vtok::Status planted_sm90(vtok::Tensor, vtok::Tensor, vtok::Tensor, int);")


def operands(dtype, m=150, k=320):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-4, 5, (n, k), generator=generator).to(dtype) for n in (m, 64))
    return a, b, torch.full((m, 64), math.nan)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("bug", RIGHT)
def test_without_a_bug(gemm, bug, dtype, seed):
    a, b, c = operands(dtype)
    gemm.run(a, b, c, bug, seed=seed, capability=90)
    assert torch.equal(c, a.float() @ b.float().T)  # of small integers: exact


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bug", BUGS, ids=lambda n: f"{n}-{BUGS[n][0].replace(' ', '-')}")
def test_bug_is_found(gemm, bug, seed):
    with pytest.raises(emulator.EmulatorError, match=BUGS[bug][1]):
        gemm.run(*operands(torch.bfloat16), bug, seed=seed, capability=90)


def test_other_gpus_have_no_such_instructions(gemm):
    with pytest.raises(emulator.EmulatorError, match="only sm_90a has it"):
        gemm.run(*operands(torch.bfloat16), 0, capability=80)
