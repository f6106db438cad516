"""The sm90 convolution on the emulator, with the native module's own interface."""

from __future__ import annotations

import functools
from typing import Any

from support.conv_sm80_emulated import SOURCES, emulator

H200 = {"shared_limit": 227 << 10, "capability": 90}
SM90_SOURCES = [
    f"csrc/cuda/causal_conv3d/{part}.cu"
    for part in ("sm90_plan", "sm90_bf16", "sm90_f16", "sm90_wgrad", "sm90_e4m3", "sm90_e4m3_bf16")
]
# Those of e4m3 with an output of float16 are the same templates, and another 8 s to compile.
LEFT_OUT = """
#include "cuda/causal_conv3d/sm90_params.h"
namespace vtok::cuda { Sm90Variants sm90_variants_e4m3_f16() { return {nullptr, 0}; } }
"""


@functools.cache
def compiled() -> emulator.Library:
    exports = {
        "forward": "vtok::cuda::causal_conv3d_sm90_call",
        "e4m3": "vtok::cuda::causal_conv3d_sm90_e4m3_call",
        "dgrad": "vtok::cuda::causal_conv3d_sm90_dgrad_call",
        "wgrad": "vtok::cuda::causal_conv3d_sm90_wgrad_call",
    }
    return emulator.build(
        *SOURCES,
        *SM90_SOURCES,
        includes=["cuda/causal_conv3d/sm90_wgrad.h"],
        exports=exports,
        glue=LEFT_OUT,
        flags=["-DVTOK_SM90"],
    )


class Emulated:
    def __init__(self, seed: int = 0, **device: int) -> None:
        self.options = {"seed": seed, **H200, **device}

    def causal_conv3d_sm90(self, *args: Any) -> None:
        compiled().forward(*args, **self.options)

    def causal_conv3d_sm90_e4m3(self, *args: Any) -> None:
        compiled().e4m3(*args, **self.options)

    def causal_conv3d_sm90_dgrad(self, *args: Any) -> None:
        compiled().dgrad(*args, **self.options)

    def causal_conv3d_sm90_wgrad(self, *args: Any) -> None:
        compiled().wgrad(*args, **self.options)
