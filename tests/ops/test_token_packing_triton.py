"""The Triton kernels of token_packing on a machine without a GPU: their results, and that they compile for
every generation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
from support.triton_harness import CAPABILITIES, assert_fits, compile_for, run_interpreted
from support.triton_signatures import types

import vtok_fast
from vtok_fast.kernels import token_packing as kernels
from vtok_fast.kernels import unit_of
from vtok_fast.ops.token_packing import pack_tokens, router_scores, select_tokens

INTERPRETED = Path(__file__).resolve().parents[1] / "support" / "token_packing_interpreted.py"


def test_results_under_the_interpreter():
    assert "passed" in run_interpreted(INTERPRETED, "-m", "not slow")


@pytest.mark.slow
def test_slow_results_under_the_interpreter():
    assert "passed" in run_interpreted(INTERPRETED, "-m", "slow")


@pytest.mark.parametrize("cc", CAPABILITIES)
@pytest.mark.parametrize("element", ("fp32", "bf16", "fp16"))
def test_scores_compile(cc, element):
    constants = {
        "ROWS": 8,
        "COLUMNS": 8,
        "BLOCK_ROWS": 8,
        "CELLS": 32,
        "BLOCK_COLUMNS": 8,
        "UNIT": 8,
        "ADJACENT": True,
    }
    signature = types(
        kernels.scores_kernel, constants, video=f"*{element}", other=f"*{element}", scores="*fp32"
    )
    resources = compile_for(kernels.scores_kernel, signature, constants, cc, aligned=("video", "other"))
    assert_fits(resources, cc)
    assert resources.has(r"ld\.global[.\w]*\.v[24]")


@pytest.mark.parametrize("cc", CAPABILITIES)
@pytest.mark.parametrize("strictly", (False, True))
def test_selection_compiles(cc, strictly):
    constants = {"N_UNIT": 8, "STRICTLY": strictly, "BLOCK": kernels.SELECT_BLOCK}
    signature = types(
        kernels.select_kernel, constants, scores="*fp32", budget="*i64", keep="*u8", flag="*i32"
    )
    warps, aligned = kernels.SELECT_WARPS, ("scores", "keep")
    assert_fits(
        compile_for(kernels.select_kernel, signature, constants, cc, num_warps=warps, aligned=aligned), cc
    )
    for strategy, released in ((0, False), (1, True), (2, False)):
        constants = {"STRATEGY": strategy, "RELEASED": released, "BLOCK": 2048}
        signature = types(
            kernels.budget_kernel, constants, scores="*fp32", rate="*fp64", elbo_mean="*fp32", budget="*i64"
        )
        assert_fits(compile_for(kernels.budget_kernel, signature, constants, cc, aligned=("scores",)), cc)


@pytest.mark.parametrize("cc", CAPABILITIES)
@pytest.mark.parametrize(
    "channels, planar, element",
    ((256, False, "i16"), (256, True, "i16"), (6, False, "i32"), (1, False, "i32"), (6, False, "fsq")),
)
def test_moving_compiles(cc, channels, planar, element):
    block, block_c = kernels.tiles(channels, planar)
    fsq = element == "fsq"
    pointers = {
        "keep": "*u8",
        "before": "*i32",
        "totals": "*i32",
        "indices": "*i32",
        "cu_seqlens": "*i32",
        "flag": "*i32",
        "tokens": "*bf16" if fsq else f"*{element}",
        "values": "*i32" if fsq else f"*{element}",
        "dense": f"*{element}",
        "thresholds": "*fp32" if fsq else f"*{element}",
        "basis": "*i32" if fsq else f"*{element}",
    }
    tile = {"BLOCK": block, "BLOCK_C": block_c, "CLIPS": kernels.CLIPS}
    tile["CHANNEL_UNIT"] = unit_of(channels)
    aligned = ["tokens", "values", "dense", "keep"]
    warps = 8 if block * block_c >= 8192 else 4

    def compiled(kernel, constants, num_warps):
        names = [name for name in aligned if name in kernel.arg_names]
        resources = compile_for(
            kernel, types(kernel, constants, **pointers), constants, cc, num_warps=num_warps, aligned=names
        )
        assert_fits(resources, cc)
        return resources

    compiled(kernels.count_kernel, {"N_UNIT": 8, "BLOCK": block, "BLOCKS": 4096 // block}, 4)
    constants = tile | {
        "FSQ": fsq,
        "PLANAR": planar,
        "NEAR": 2 if planar else 1,
        "UNIT": 8 if planar else unit_of(channels),
        "N_UNIT": 8 if planar else 1,
    }
    packing = compiled(kernels.pack_kernel, constants, warps)
    if fsq:
        return
    unpacking = compiled(kernels.unpack_kernel, tile, warps)
    if channels == 256:  # rows of channels travel 16 bytes at a time
        assert packing.has(r"st\.global[.\w]*\.v4") and unpacking.has(r"st\.global[.\w]*\.v4")
        assert unpacking.has(r"ld\.global[.\w]*\.v4") and packing.has(r"ld\.global[.\w]*\.v4")


@pytest.mark.parametrize(
    "kernel",
    [
        k
        for k in vars(kernels).values()
        if isinstance(k, triton.JITFunction) and k.__name__.endswith("_kernel")
    ],
    ids=lambda k: k.__name__,
)
def test_sizes_of_one_compile(kernel):
    """The compiler sees an argument of value 1 as a constant, which can do less than a variable."""
    pointers = {
        "keep": "*u8",
        "before": "*i32",
        "totals": "*i32",
        "indices": "*i32",
        "cu_seqlens": "*i32",
        "flag": "*i32",
        "tokens": "*i8",
        "values": "*i8",
        "dense": "*i8",
        "thresholds": "*i8",
        "basis": "*i8",
        "video": "*fp32",
        "other": "*fp32",
        "scores": "*fp32",
        "rate": "*fp64",
        "elbo_mean": "*fp32",
        "budget": "*i64",
    }
    flags = {
        "NEAR": 1,
        "ADJACENT": True,
        "STRICTLY": True,
        "RELEASED": True,
        "STRATEGY": 2,
        "FSQ": False,
        "PLANAR": False,
    }
    for released in (True, False):
        constants = (
            {name: 1 for name in kernel.arg_names if name not in pointers} | flags | {"RELEASED": released}
        )
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        assert_fits(compile_for(kernel, types(kernel, constants, **pointers), constants, 90), 90)


def test_a_cpu_is_refused_by_name():
    video = torch.zeros(1, 3, 1, 8, 8)
    for call in (
        lambda: router_scores(video, video, backend="triton"),
        lambda: select_tokens(torch.zeros(1, 4), 1, backend="triton"),
        lambda: pack_tokens(torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool), backend="triton"),
    ):
        with pytest.raises(vtok_fast.BackendError, match="the tensors are on cpu"):
            call()
