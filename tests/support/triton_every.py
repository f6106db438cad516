"""Every Triton kernel of the package, as a launcher would compile it: for tests that ask whether *all* of
them compile, be it for another GPU or with another Triton.

As a program it compiles them with the Triton that Python finds, which may be an older one than the tests':
``PYTHONPATH=older:.:tests python tests/support/triton_every.py 80 90``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import triton

from support.triton_harness import build
from support.triton_signatures import AFTER, OPTIONAL, described, types
from vtok_fast.kernels import norm_act, norm_act_backward, scope_attention, token_packing

TENSORS = {"q", "k", "v", "out", "grad", "dq", "dk", "dv"}
ATTENTION = {"scale": "fp32", "blocks": "*i32", "ranges": "*i32", "merges": "*i32"}
PACKING = {
    **dict.fromkeys(("before", "totals", "indices", "cu_seqlens", "flag", "basis"), "*i32"),
    **dict.fromkeys(("keep",), "*u8"),
    **dict.fromkeys(("tokens", "values", "dense"), "*i16"),
    **dict.fromkeys(("scores", "thresholds", "elbo_mean"), "*fp32"),
    **dict.fromkeys(("video", "other"), "*bf16"),
    **{"rate": "*fp64", "budget": "*i64"},
}


class Compilation(NamedTuple):
    """What `support.triton_harness.compile_for` takes, without the GPU."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int
    aligned: list[str]

    def on(self, cc: int | str, compile=build) -> Any:
        return compile(self.kernel, self.signature, self.constants, cc, self.warps, self.stages, self.aligned)


def attention(
    kernel: str, dim: int, element: str, gpu: int | str, short: bool = False, c=None
) -> Compilation:
    """A kernel of ``scope_attention`` with the tile ``c`` or that of ``config``, which takes the GPU."""
    itemsize = 4 if element == "fp32" else 2
    c = c or scope_attention.config(kernel, dim, itemsize, gpu, short)
    function, constants = scope_attention.KERNELS[kernel], scope_attention.constants(dim, c)
    if kernel == "forward":
        constants |= {"NEGATIVE": False, "IN_EXPONENT": True, "REST": scope_attention.rest(c)}
    return with_types(function, element, constants, c.num_warps, c.num_stages)


def with_types(function, element: str, constants: dict[str, Any], warps: int, stages: int) -> Compilation:
    """A kernel of ``scope_attention``: tensors of ``element``, everything else in float32 or int32."""
    signature = {}
    for name in (name for name in function.arg_names if name not in constants):
        other = "i32" if name.endswith("_stride") or name in scope_attention.INTEGERS else "*fp32"
        signature[name] = f"*{element}" if name in TENSORS else ATTENTION.get(name, other)
    return Compilation(
        function, signature, constants, warps, stages, [n for n, kind in signature.items() if kind[0] == "*"]
    )


def _norms(gpu: int | str) -> Iterator[tuple[str, Compilation]]:
    once = {"CENTER": True, "SILU": True, "CHAIN": 0, **AFTER}
    for planar in (False, True):
        layout, narrow = "planar" if planar else "channels last", 16 if planar else 128
        for kernel, width, options in (
            (norm_act.position_kernel, 512, once),
            (norm_act.sums_kernel, narrow, {"CENTER": True, "WIDTH": 4}),
            (norm_act.group_kernel, narrow, {"SILU": True, "present": OPTIONAL[:6]}),
            (norm_act_backward.position_backward_kernel, 512, {"CENTER": True, "SILU": True, "WAN": False}),
            (norm_act_backward.group_sums_kernel, narrow, {"SILU": True}),
            (norm_act_backward.group_backward_kernel, narrow, {"SILU": True, "CENTER": True}),
        ):
            fast = {} if gpu != "hip" else {"FAST": False}  # of NVIDIA's instructions
            signature, constants, aligned, warps = described(
                kernel, "bf16", width, planar=planar, **options, **fast
            )
            yield f"{kernel.__name__} {layout}", Compilation(kernel, signature, constants, warps, 3, aligned)
    options = {"CENTER": True, "BLOCK_PARTS": norm_act.STATISTICS // 4, "WIDTH": 4}
    signature, constants, aligned, _ = described(norm_act.statistics_kernel, "bf16", 4, **options)
    yield "statistics_kernel", Compilation(norm_act.statistics_kernel, signature, constants, 4, 3, aligned)


def _packing() -> Iterator[tuple[str, Compilation]]:
    block, block_c = token_packing.tiles(256, False)
    tile = {"BLOCK": block, "BLOCK_C": block_c, "CLIPS": token_packing.CLIPS, "CHANNEL_UNIT": 8}
    pixels = {"ROWS": 8, "COLUMNS": 8, "BLOCK_ROWS": 8, "CELLS": 32, "BLOCK_COLUMNS": 8}
    near = {"NEAR": 1, "UNIT": 8, "N_UNIT": 1, "PLANAR": False}
    for kernel, constants, warps in (
        (token_packing.scores_kernel, {**pixels, "UNIT": 8, "ADJACENT": True}, 4),
        (token_packing.budget_kernel, {"STRATEGY": 2, "RELEASED": False, "BLOCK": 2048}, 4),
        (
            token_packing.select_kernel,
            {"N_UNIT": 8, "STRICTLY": False, "BLOCK": token_packing.SELECT_BLOCK},
            token_packing.SELECT_WARPS,
        ),
        (token_packing.select_few_kernel, {"STRICTLY": False, "BLOCK": token_packing.FEW}, 16),
        (token_packing.count_kernel, {"N_UNIT": 8, "BLOCK": block, "BLOCKS": 4096 // block}, 4),
        (token_packing.pack_kernel, {**tile, **near, "FSQ": False}, 8),
        (token_packing.unpack_kernel, tile, 8),
    ):
        signature = types(kernel, constants, **PACKING)
        aligned = [name for name, kind in signature.items() if kind.startswith("*") and name != "before"]
        yield kernel.__name__, Compilation(kernel, signature, constants, warps, 3, aligned)


def every(gpu: int | str, heads: tuple[int, ...] = (64, 128, 512)) -> dict[str, Compilation]:
    """Each kernel by name, in half precision. ``gpu``: whose tiles, as for ``scope_attention.config``."""
    found = {
        f"{kernel} {dim}": attention(kernel, dim, "bf16", gpu)
        for kernel in scope_attention.KERNELS
        for dim in heads
    }
    delta = {"D": 64, "BLOCK_D": 64, "BLOCK_M": 64}
    found["delta"] = with_types(scope_attention.delta_kernel, "bf16", delta, 4, 3)
    combine = {"D": 64, "BLOCK_D": 64, "BLOCK_M": 128, "ROWS": 64}
    found["combine"] = with_types(scope_attention.combine_kernel, "bf16", combine, 4, 3)
    found["add"] = with_types(scope_attention.add_kernel, "bf16", combine, 4, 3)
    return found | dict(_norms(gpu)) | dict(_packing())


if __name__ == "__main__":
    for cc in map(int, sys.argv[1:]):
        for name, compilation in every(cc).items():
            compilation.on(cc)
            print(f"Triton {triton.__version__}, {cc}: {name}", flush=True)
