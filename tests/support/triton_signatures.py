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


def compiled(
    kernel, cc, element, width, *, planar=False, present=("weight", "bias"), warps=None, **constants
):
    """The kernel for contiguous or channels-last videos whose sizes are multiples of 16, flat in time unless
    told otherwise."""
    values = {
        kernels.sums_kernel: kernels.SUMS,
        backward.position_backward_kernel: backward.VALUES["positions"],
        backward.group_sums_kernel: backward.VALUES["groups"],
        backward.group_backward_kernel: backward.VALUES["groups"],
    }
    block, usual = kernels.tile(width, 1 << 20, planar, values.get(kernel, 8192))
    if "CHAIN" in kernel.arg_names or "WAN" in kernel.arg_names:
        constants["groups"] = 1
    constants = {"FLAT": True, "BLOCK": block, "BLOCK_C": width} | constants
    constants |= {name: None for name in OPTIONAL if name in kernel.arg_names and name not in present}
    unit = "position" if planar else "channel"
    constants |= {
        name: 1 for name in kernel.arg_names if name.endswith(f"_{unit}_stride") and "tail" not in name
    }
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, aligned = {}, []
    for name in kernel.arg_names:
        if name not in constants:
            video = name in ("x", "y", "grad", "grad_x", *OPTIONAL)
            signature[name] = (
                f"*{element}"
                if video
                else "*fp32"
                if name in STATISTICS
                else "fp32"
                if name == "eps"
                else "i32"
            )
            if video or name in ("plane", "channels") or name.endswith("_stride"):
                aligned.append(name)
    resources = compile_for(kernel, signature, constants, cc, num_warps=warps or usual, aligned=aligned)
    assert_fits(resources, cc)
    return resources


def types(kernel, constants, **kinds):
    """i32 for every argument that is neither a constant nor named."""
    return {name: kinds.get(name, "i32") for name in kernel.arg_names if name not in constants}
