"""The CUDA kernels of causal_conv3d on the emulator, with the native module's own interface."""

import functools

from support import emulator

SOURCES = [
    "csrc/cuda/device.cu",
    *(
        f"csrc/cuda/causal_conv3d/{part}.cu"
        for part in ("sm80_forward", "forward", "dgrad", "sm80_wgrad", "plan", "phases")
    ),
]


@functools.cache
def _compiled():
    exports = {
        "forward": "vtok::cuda::causal_conv3d_sm80_call",
        "backward": "vtok::cuda::causal_conv3d_sm80_backward_call",
    }
    return emulator.build(*SOURCES, includes=["cuda/causal_conv3d/call.h"], exports=exports)


class Emulated:
    def __init__(self, seed=0, **device):
        self.options = {"seed": seed, **device}

    def causal_conv3d_sm80(self, *args):
        _compiled().forward(*args, **self.options)

    def causal_conv3d_sm80_backward(self, *args):
        _compiled().backward(*args, **self.options)
