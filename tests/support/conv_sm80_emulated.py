"""The CUDA kernels of causal_conv3d on the emulator, behind the native module's own interface."""

import ctypes
import functools

import torch

from support import emulator

SOURCES = [
    f"csrc/cuda/causal_conv3d/{part}.cu" for part in ("sm80_forward", "dgrad", "sm80_wgrad", "plan", "phases")
]
DTYPES = {code: dtype for dtype, code in emulator.DTYPES.items()}


@functools.cache
def _compiled():
    exports = {
        "forward": "vtok::cuda::causal_conv3d_call",
        "backward": "vtok::cuda::causal_conv3d_backward_call",
    }
    return emulator.build(*SOURCES, includes=["cuda/causal_conv3d/call.h"], exports=exports)


def _tensor(value):
    """The tensor that native.arg took apart; other values as they are."""
    if not (isinstance(value, tuple) and len(value) == 4 and isinstance(value[2], torch.Size)):
        return value
    pointer, code, shape, strides = value
    dtype = DTYPES[code]
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    count = sum((n - 1) * s for n, s in zip(shape, strides)) + 1
    memory = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(pointer)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


class Emulated:
    def __init__(self, seed=0, **device):
        self.options = {"seed": seed, **device}

    def causal_conv3d_sm80(self, *args):
        _compiled().forward(*map(_tensor, args), **self.options)

    def causal_conv3d_sm80_backward(self, *args):
        _compiled().backward(*map(_tensor, args), **self.options)
