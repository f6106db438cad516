"""Signatures under which the Triton kernels are compiled ahead of time."""

from __future__ import annotations

from support.triton_harness import assert_fits, compile_for
from vtok_fast.kernels import norm_act as kernels
from vtok_fast.kernels import norm_act_backward as backward

OPTIONAL = ("residual", "weight", "bias", "scale", "shift", "tail", "grad_scale", "grad_shift")


STATISTICS = (
    "origins",
    "origin",
    "means",
    "squares",
    "mean",
    "rstd",
    "sums",
    "sums_along",
    "average",
    "along",
    "grad_weight",
    "grad_bias",
)


AFTER = {name: None for name in ("AFTER_NORM", "AFTER_WEIGHT", "AFTER_BIAS", "AFTER_SCALE", "AFTER_SHIFT")}


def described(
    kernel, element, width, *, planar=False, present=("weight", "bias"), unit=8, rows=False, **constants
):
    """(signature, constants, aligned arguments, warps) of a kernel for contiguous or channels-last videos
    whose sizes are multiples of ``unit``, flat in time unless told otherwise. ``rows``: scale and shift are
    the same at all positions."""
    values = {
        kernels.sums_kernel: kernels.SUMS,
        backward.position_backward_kernel: backward.VALUES["positions"],
        backward.group_sums_kernel: backward.VALUES["groups"],
        backward.group_backward_kernel: backward.VALUES["groups"],
    }
    block, warps = kernels.tile(width, 1 << 20, planar, values.get(kernel, 8192))
    near = [2 if planar else 1] * 8
    near[2:4] = [3, 3] if rows else near[2:4]
    constants = {
        "FLAT": True,
        "BLOCK": block,
        "BLOCK_C": width,
        "WIDTH": 1,
        "STAGES": kernels.TILES_AHEAD,
        "LAST_FIRST": kernels.GROUP_LAST_FIRST,
        "HOW": sum((n | (unit.bit_length() - 1) << 2) << 4 * i for i, n in enumerate(near)),
        "CHANNEL_UNIT": 1 if planar else unit,
        "PLANE_UNIT": unit if planar else 1,
        "FAST": not constants.get("CHAIN"),
        **constants,
    }
    constants |= {name: None for name in OPTIONAL if name in kernel.arg_names and name not in present}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, aligned = {}, []
    for name in kernel.arg_names:
        if name not in constants:
            video = name in ("x", "y", "grad", "grad_x", *OPTIONAL)
            statistic = "*fp32" if name in STATISTICS else "fp32" if name == "eps" else "i32"
            signature[name] = f"*{element}" if video else statistic
            aligned += [name] if signature[name].startswith("*") else []
    return signature, constants, aligned, warps


def compiled(kernel, cc, element, width, *, warps=None, spills=0, options=None, **how):
    signature, constants, aligned, usual = described(kernel, element, width, **how)
    resources = compile_for(
        kernel, signature, constants, cc, num_warps=warps or usual, aligned=aligned, options=options
    )
    assert_fits(resources, cc, spills)
    return resources


def types(kernel, constants, **kinds):
    """i32 for every argument that is neither a constant nor named."""
    return {name: kinds.get(name, "i32") for name in kernel.arg_names if name not in constants}
