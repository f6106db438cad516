"""The tiles that a tuning table may choose: their results under the interpreter, and that they compile
without spilling."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from support.triton_harness import assert_fits, compile_for, run_interpreted
from support.triton_signatures import AFTER, OPTIONAL, compiled, types

from vtok_fast.kernels import norm_act, scope_attention, tiles_near, token_packing


@pytest.mark.slow
def test_results_under_the_interpreter():
    assert "passed" in run_interpreted(
        Path(__file__).resolve().parents[1] / "support" / "tuned_tiles_interpreted.py"
    )


def test_tiles_have_no_more_values_for_a_thread_and_warps_that_exist():
    for block, warps in ((2, 8), (2, 4), (32, 4), (4096, 8)):
        near = tiles_near((block, warps))
        assert near[0] == (block, warps) and len(set(near)) == len(near) > 1
        assert all(b & (b - 1) == 0 < b and w in (2, 4, 8) and b / w <= block / warps for b, w in near)
    for kernel in scope_attention.KERNELS:
        for dim in (16, 64, 128, 512):
            for itemsize in (2, 4):
                built_in = scope_attention.config(kernel, dim, itemsize, 90)
                found = scope_attention.variants(kernel, built_in)
                assert (
                    found[0] == built_in
                    and itemsize // 4 + len(set(found)) >= 2
                    and len(set(found)) == len(found) <= 8
                )
                assert all(c.block_m >= 16 and c.block_n >= 16 and c.num_warps >= 4 for c in found)


@pytest.mark.slow
@pytest.mark.parametrize("cc", (80, 90))
@pytest.mark.parametrize("planar", (False, True))
def test_tiles_of_norms_fit(cc, planar):
    once = {"CENTER": True, "SILU": True, "CHAIN": 0, **AFTER}
    channels = 16 if planar else 128
    for kernel, width, values, options in (
        (norm_act.position_kernel, 512, 8192, once),
        (norm_act.sums_kernel, channels, norm_act.SUMS, {"CENTER": True}),
        (norm_act.group_kernel, channels, 8192, {"SILU": True}),
    ):
        for block, warps in tiles_near(norm_act.tile(width, 1 << 20, planar, values))[1:]:
            compiled(
                kernel,
                cc,
                "bf16",
                width,
                planar=planar,
                present=OPTIONAL[1:3],
                warps=warps,
                BLOCK=block,
                **options,
            )


@pytest.mark.slow
@pytest.mark.parametrize("cc", (80, 90))
def test_tiles_of_packing_fit(cc):
    for block, warps in tiles_near((token_packing.SELECT_BLOCK, token_packing.SELECT_WARPS))[1:]:
        constants = {"N_UNIT": 8, "STRICTLY": False, "BLOCK": block}
        signature = types(
            token_packing.select_kernel, constants, scores="*fp32", budget="*i64", keep="*u8", flag="*i32"
        )
        assert_fits(
            compile_for(
                token_packing.select_kernel,
                signature,
                constants,
                cc,
                num_warps=warps,
                aligned=("scores", "keep"),
            ),
            cc,
        )
    for cells, warps in tiles_near((32, 4))[1:]:
        constants = {
            "ROWS": 8,
            "COLUMNS": 8,
            "BLOCK_ROWS": 8,
            "CELLS": cells,
            "BLOCK_COLUMNS": 8,
            "UNIT": 8,
            "ADJACENT": True,
        }
        signature = types(
            token_packing.scores_kernel, constants, video="*bf16", other="*bf16", scores="*fp32"
        )
        assert_fits(
            compile_for(
                token_packing.scores_kernel,
                signature,
                constants,
                cc,
                num_warps=warps,
                aligned=("video", "other"),
            ),
            cc,
        )
    pointers = {
        "keep": "*u8",
        "before": "*i32",
        "totals": "*i32",
        "indices": "*i32",
        "cu_seqlens": "*i32",
        "flag": "*i32",
        "tokens": "*i16",
        "values": "*i16",
        "dense": "*i16",
        "thresholds": "*i16",
        "basis": "*i16",
    }
    for planar in (False, True):
        first, block_c = token_packing.tiles(256, planar)
        for block, warps in tiles_near((first, 8))[1:]:
            tile = {"BLOCK": block, "BLOCK_C": block_c, "CLIPS": token_packing.CLIPS}
            tile["CHANNEL_UNIT"] = 8
            near = {"NEAR": 2 if planar else 1, "UNIT": 8, "N_UNIT": 8 if planar else 1}
            packing = tile | near | {"FSQ": False, "PLANAR": planar}
            for kernel, constants in (
                (token_packing.pack_kernel, packing),
                (token_packing.unpack_kernel, tile),
            ):
                assert_fits(
                    compile_for(
                        kernel,
                        types(kernel, constants, **pointers),
                        constants,
                        cc,
                        num_warps=warps,
                        aligned=("values", "keep"),
                    ),
                    cc,
                )
