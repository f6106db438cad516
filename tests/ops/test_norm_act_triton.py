"""The Triton kernels of norm_act on a machine without a GPU: their results, and that they compile for every
generation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
from support.triton_harness import CAPABILITIES, run_interpreted
from support.triton_signatures import AFTER, OPTIONAL, compiled

import vtok_fast
from vtok_fast.kernels import norm_act as kernels
from vtok_fast.kernels import norm_act_backward as backward

INTERPRETED = Path(__file__).resolve().parents[1] / "support" / "norm_act_interpreted.py"


def test_results_under_the_interpreter():
    assert "passed" in run_interpreted(INTERPRETED, "-m", "not slow")


@pytest.mark.slow
def test_slow_results_under_the_interpreter():
    assert "passed" in run_interpreted(INTERPRETED, "-m", "slow")


@pytest.mark.parametrize("cc", CAPABILITIES)
def test_forward_compiles(cc):
    everything, wide = OPTIONAL[:6], r"{}\.global[.\w]*\.v4"
    once = {"CENTER": True, "SILU": True, "CHAIN": 0, **AFTER}
    for element, width, planar, present in (
        ("bf16", 512, False, OPTIONAL[1:3]),
        ("fp32", 1024, False, OPTIONAL[1:3]),
        ("fp16", 128, True, OPTIONAL[1:3]),
        ("bf16", 128, False, everything),
    ):
        resources = compiled(
            kernels.position_kernel, cc, element, width, planar=planar, present=present, **once
        )
        assert resources.has(wide.format("ld")) and resources.has(wide.format("st")), (width, planar)
    for planar in (False, True):
        width = 16 if planar else 128
        assert compiled(kernels.sums_kernel, cc, "bf16", width, planar=planar, CENTER=True).has(
            wide.format("ld")
        )
        resources = compiled(
            kernels.group_kernel, cc, "bf16", width, planar=planar, present=everything, SILU=True
        )
        assert resources.has(wide.format("st"))
    compiled(kernels.statistics_kernel, cc, "bf16", 32, CENTER=True, BLOCK_PARTS=32, WIDTH=4, warps=4)


@pytest.mark.parametrize("cc", CAPABILITIES)
@pytest.mark.parametrize("chain", ("wan", "ltx"))
def test_chains_compile(cc, chain):
    x = torch.empty(1, dtype=torch.bfloat16)
    types = kernels.chain_types(x, x, None, None, None, chain)
    resources = compiled(
        kernels.position_kernel,
        cc,
        "bf16",
        128,
        present=("weight",),
        CENTER=False,
        SILU=True,
        CHAIN=kernels.CHAINS[chain],
        **dict(zip(AFTER, types)),
    )
    if chain == "wan":  # as exact as ATen's own division and root
        assert resources.has(r"div\.rn\.f32") and resources.has(r"sqrt\.rn\.f32")


@pytest.mark.parametrize("cc", CAPABILITIES)
def test_backward_compiles(cc):
    for element, width, planar in (("bf16", 512, False), ("fp32", 128, True)):
        compiled(
            backward.position_backward_kernel,
            cc,
            element,
            width,
            planar=planar,
            CENTER=True,
            SILU=True,
            WAN=False,
        )
    compiled(
        backward.position_backward_kernel, cc, "bf16", 128, present=OPTIONAL, CENTER=True, SILU=True, WAN=True
    )
    for planar in (False, True):
        width = 16 if planar else 128
        compiled(backward.group_sums_kernel, cc, "bf16", width, planar=planar, present=OPTIONAL, SILU=True)
        compiled(
            backward.group_backward_kernel,
            cc,
            "fp32",
            width,
            planar=planar,
            present=OPTIONAL,
            CENTER=True,
            SILU=True,
            FLAT=False,
        )


ALL = [
    k
    for module in (kernels, backward)
    for k in vars(module).values()
    if isinstance(k, triton.JITFunction) and k.__name__.endswith("_kernel")
]


@pytest.mark.parametrize("kernel", ALL, ids=lambda k: k.__name__)
def test_sizes_of_one_compile(kernel):
    """The compiler sees an argument of value 1 as a constant, which can do less than a variable."""
    sizes = (
        "frames",
        "span",
        "plane",
        "channels",
        "groups",
        "parts",
        "steps",
        "positions",
        "programs",
        "clips",
    )
    chain = {name: triton.language.float16 for name in AFTER} if kernel is kernels.position_kernel else {}
    for flat in (True, False):
        compiled(
            kernel,
            90,
            "fp16",
            1,
            present=OPTIONAL,
            warps=4,
            CENTER=True,
            SILU=True,
            CHAIN=1,
            WAN=True,
            BLOCK_PARTS=1,
            FLAT=flat,
            unit=1,
            **chain,
            **{name: 1 for name in sizes if name in kernel.arg_names},
        )


def test_the_statistics_see_the_same_parts_as_the_sums():
    """Both derive from positions and parts how many blocks a part has: the last ones may be empty, none may
    be left out."""
    for blocks in range(1, 200):
        for wanted in (1, 3, 64, 1024):
            steps = triton.cdiv(blocks, min(blocks, wanted))
            parts = triton.cdiv(blocks, steps)
            assert triton.cdiv(blocks, parts) == steps


def test_a_cpu_is_refused_by_name():
    with pytest.raises(vtok_fast.BackendError, match="the tensors are on cpu"):
        vtok_fast.norm_act(torch.zeros(1, 8, 1, 2, 2), backend="triton")
