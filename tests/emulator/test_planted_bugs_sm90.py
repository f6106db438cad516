"""The same as test_planted_bugs.py for mbarrier, TMA and wgmma, planted_sm90.cu; and with clusters,
planted_cluster.cu."""

import math

import pytest
import torch
from support import emulator

pytestmark = pytest.mark.needs_emulator

BUGS = {
    1: ("tiles not at multiples of 1024", "must start at a multiple of 1024"),
    2: ("barrier for one thread too many", "deadlock: .* wait at mbarrier_wait"),
    3: (
        "barrier for too few threads",
        "more threads arrive|race in shared memory|deadlock: .* wait at mbarrier_wait",
    ),
    4: ("no fence after mbarrier_init", "no fence_mbarrier_init"),
    5: (
        "no barrier after mbarrier_init",
        "no mbarrier was initialized here|not ordered after the mbarrier's initialization",
    ),
    6: ("producer waits for the wrong parity", "deadlock: .* wait at mbarrier_wait"),
    7: ("fewer bytes expected than come", "fewer bytes expected than come|race in shared memory|deadlock"),
    8: ("more bytes expected than come", "deadlock: .* wait at mbarrier_wait"),
    9: ("a stage too many", "out of bounds in shared memory: tma_load"),
    10: ("signals the other stage", "deadlock|race in shared memory|fewer bytes expected than come"),
    11: ("no wgmma_fence", "no wgmma_fence before the first product"),
    12: (
        "consumer waits for the wrong parity",
        "(race in|uninitialized) shared memory|deadlock: .* wait at mbarrier_wait",
    ),
    13: ("registers changed without a fence", "registers changed since the last wgmma_fence"),
    14: ("not all of a warpgroup", "deadlock|divergence"),
    15: ("different descriptors", "threads have different descriptors"),
    16: (
        "stage released before the product has read it",
        "race in shared memory: (tma_load|st_shared)|no wgmma_wait",
    ),
    17: ("no fence between st_shared and the TMA store", "no fence.proxy.async: tma_store"),
    18: (
        "no barrier before the TMA store",
        "race in shared memory: (tma_store|st_shared)|uninitialized|no fence.proxy.async",
    ),
    19: ("named barrier for too many threads", "deadlock: .* wait at bar_sync"),
    20: ("all blocks write to one place", "race in global memory: tma_store"),
    21: ("the kernel ends while TMA reads", "no tma_store_wait_read"),
    22: ("overwrites what TMA still reads", "race in shared memory: st_shared"),
    23: ("a row stride that is not a multiple of 16", "refuses a tensor map .* byte strides 2x8"),
    24: ("box rows longer than the swizzle", "refuses a tensor map .* boxes of 128x64"),
}
RIGHT = 0, 25  # 25 overwrites what TMA has read, after a barrier with the thread that has waited for that


@pytest.fixture(scope="module")
def gemm():
    return emulator.build(
        "tests/emulator/planted_sm90.cu",
        exports={"run": "planted_sm90", "reload": "planted_reload"},
        glue="vtok::Status planted_sm90(vtok::Tensor, vtok::Tensor, vtok::Tensor, int);\n"
        "vtok::Status planted_reload(vtok::Tensor, int);",
    )


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
    refused = NotImplementedError if "refuses" in BUGS[bug][1] else emulator.EmulatorError
    with pytest.raises(refused, match=BUGS[bug][1]):
        gemm.run(*operands(torch.bfloat16), bug, seed=seed, capability=90)


@pytest.mark.parametrize("seed", range(3))
def test_a_fragment_under_way_is_not_loaded_again(gemm, seed):
    """Not even with the values that it has."""
    out = torch.zeros(128)
    gemm.reload(out, 0, seed=seed, capability=90)
    with pytest.raises(emulator.EmulatorError, match="into registers that a product under way still reads"):
        gemm.reload(out, 1, seed=seed, capability=90)


def test_other_gpus_have_no_such_instructions(gemm):
    with pytest.raises(emulator.EmulatorError, match="only sm_90a has it"):
        gemm.run(*operands(torch.bfloat16), 0, capability=80)


CLUSTER_BUGS = {
    1: (
        "no cluster barrier after mbarrier_init",
        "no mbarrier was initialized here|not ordered after|uninitialized shared memory",
    ),
    2: (
        "bytes of its own loads only",
        "fewer bytes expected than come|race in shared memory|deadlock|uninitialized",
    ),
    3: ("both blocks load the same half", "race in shared memory: tma_load|uninitialized"),
    4: (
        "a stage is released to its own block only",
        "race in shared memory: tma_load|fewer bytes expected than come",
    ),
    5: ("a wait that does not see other blocks", "race in shared memory: tma_load"),
    6: (
        "a block ends before its peer is done with it",
        "a block ends, and its shared memory with it|of a block that has ended",
    ),
    7: ("multicast to a block that is not there", "to blocks that the cluster does not have"),
    8: (
        "registers loaded again before the products have read them",
        "into registers that a product under way still reads",
    ),
    9: ("registers loaded after the fence", "left operand changed since the last wgmma_fence"),
    10: ("more registers than there are", "deadlock: .* wait at setmaxnreg_inc"),
    11: ("takes registers by asking for fewer", "setmaxnreg_inc: to 160 registers from 168"),
    12: ("one warp of a warpgroup gives back registers", "deadlock: .* wait at setmaxnreg_dec"),
    13: ("no fence between stmatrix and the TMA store", "no fence.proxy.async: tma_store"),
    14: ("the peer's address in an ordinary load", "an address for shared::cluster"),
    15: ("waits for the cluster without arriving", "cluster_wait: no cluster_arrive before it"),
    16: (
        "reads its peer's memory without a barrier",
        "(uninitialized|race in) shared memory: ld_shared_cluster|not ordered after",
    ),
    17: ("reads back what TMA may not have written yet", "race in global memory: ld_global"),
    18: ("another lane waits for the TMA store", "race in global memory: ld_global"),
    19: ("tries once", "(uninitialized|race in) shared memory|deadlock"),
    20: ("prefetches what is not a tensor map", "prefetch_tensor_map: this is not a tensor map"),
    21: (
        "a block leaves out the last barrier",
        "a block ends, and its shared memory with it|of a block that has ended",
    ),
}


@pytest.fixture(scope="module")
def cluster_gemm():
    return emulator.build(
        "tests/emulator/planted_cluster.cu",
        exports={"run": "planted_cluster"},
        glue="vtok::Status planted_cluster(vtok::Tensor, vtok::Tensor, vtok::Tensor, vtok::Tensor, int);",
    )


def run_cluster(library, bug, seed, m=256, k=320):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-1, 2, (n, k), generator=generator).bfloat16() for n in (m, 64))
    c, words = (
        torch.full((m, 64), math.nan, dtype=torch.bfloat16),
        torch.full((2 * m,), -1, dtype=torch.int32),
    )
    library.run(a, b, c, words, bug, seed=seed, capability=90)
    return a, b, c, words


@pytest.mark.parametrize("seed", range(4))
def test_a_cluster_without_a_bug(cluster_gemm, seed):
    a, b, c, words = run_cluster(cluster_gemm, 0, seed)
    assert torch.equal(c.float(), a.float() @ b.float().T)  # of small integers: exact
    assert torch.equal(words[:256], torch.cat([1000 * (1 - i % 2) + torch.arange(64) for i in range(4)]))
    assert torch.equal(words[256:], (c[:, 0] == 0).int())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bug", CLUSTER_BUGS, ids=lambda n: f"{n}-{CLUSTER_BUGS[n][0].replace(' ', '-')}")
def test_bug_in_a_cluster_is_found(cluster_gemm, bug, seed):
    with pytest.raises(emulator.EmulatorError, match=CLUSTER_BUGS[bug][1]):
        run_cluster(cluster_gemm, bug, seed)


def test_a_grid_is_made_of_whole_clusters(cluster_gemm):
    with pytest.raises(
        emulator.EmulatorError, match="cluster of 2 x 1 x 1 blocks: at most 8, and whole clusters in the grid"
    ):
        run_cluster(cluster_gemm, 0, 0, m=192)
