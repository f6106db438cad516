"""The Triton kernels with one of their choices undone, beside what ships. Choices that were made from what
the compiler shows, without a GPU, are here until a run on one has decided."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from vtok_fast.bench.harness import Candidate, Settings


class Undone(NamedTuple):
    """What a candidate is called, and what of which module is then in force in place of what ships."""

    name: str
    module: str
    attribute: str
    value: Any


PAIRS = {
    "scope_attention": (
        Undone("a program for each block", "vtok_fast.ops.scope_attention.triton", "SHARES_BLOCKS", False),
        Undone(
            "large heads in chunks",
            "vtok_fast.kernels.scope_attention",
            "_WHOLE",
            {"forward": {}, "queries": {}, "keys": {}},
        ),
        Undone("whole steps for what is left", "vtok_fast.kernels.scope_attention", "HALF_STEPS", False),
        Undone("a product for the scale", "vtok_fast.kernels.scope_attention", "SCALE_IN_EXPONENT", False),
    ),
    "norm_act": (
        Undone("SiLU by division", "vtok_fast.kernels.norm_act", "is_fast", lambda x, silu: False),
        Undone("sums that wait for each tile", "vtok_fast.kernels.norm_act", "TILES_AHEAD", 1),
        Undone("the video's beginning first", "vtok_fast.kernels.norm_act", "GROUP_LAST_FIRST", False),
        Undone("sums for each channel", "vtok_fast.kernels.norm_act", "joined", lambda size, block_c: 1),
        Undone("strides in units of 1", "vtok_fast.kernels.norm_act", "unit_of", lambda *sizes: 1),
    ),
    "token_packing": (
        Undone("selection by histograms", "vtok_fast.kernels.token_packing", "FEW", 0),
        Undone("wide programs of scores", "vtok_fast.kernels.token_packing", "ENOUGH", 0),
    ),
}


def without(undone: Undone, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with that choice undone while it runs."""

    def run(*inputs: Any) -> Any:
        module = importlib.import_module(undone.module)
        ships = getattr(module, undone.attribute)
        setattr(module, undone.attribute, undone.value)
        try:
            return function(*inputs)
        finally:
            setattr(module, undone.attribute, ships)

    return run


def undone(op: str, ours: Candidate, settings: Settings, *names: str) -> list[Candidate]:
    """A variant of our candidate for each choice of the op's Triton kernels, or for those named; none on a
    CPU, which has other kernels."""
    return [
        replace(ours, name=f"vtok_fast, {pair.name}", function=without(pair, ours.function), role="variant")
        for pair in PAIRS[op]
        if settings.device != "cpu" and (not names or pair.name in names)
    ]
