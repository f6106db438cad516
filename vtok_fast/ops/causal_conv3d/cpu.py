"""The CPU kernels of ``causal_conv3d``: which calls they take, and which algorithm."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vtok_fast.dispatch import backends, native
from vtok_fast.dispatch.backends import Reason
from vtok_fast.ops.causal_conv3d import tuned
from vtok_fast.ops.causal_conv3d.call import ConvCall, Geometry
from vtok_fast.reference import causal_conv3d as reference

_ALGORITHM_CODES = {"auto": 0, "direct": 1, "winograd2": 2, "winograd4": 4}


def why_not(call: ConvCall) -> Reason:
    """The reason why the kernels cannot run a checked call, or None."""
    return native.why_not_on_cpu(call.x, (torch.float32, torch.bfloat16, torch.float16))


@functools.lru_cache(maxsize=4096)
def _choice(x: tuple, weight: tuple, geometry: Geometry, threads: int, isa: str) -> str:
    """The native module's choice for these shapes, strides and types; it reads no data, so the pointers are
    zero."""
    size = geometry.output_size(x[2][2:], weight[2][2:])
    o, h, w = weight[2][0], size[1], size[2]
    out = (0, x[1], (x[2][0], o, *size), (o * size[0] * h * w, 1, o * h * w, o * w, o))
    return native.lib().causal_conv3d_choice(x, weight, out, geometry.native(), threads)


def why_slower(call: ConvCall) -> Reason:
    """The reason to leave a call to PyTorch, measured or modeled, or None."""
    if backends.current_algorithm() != "auto":
        return None
    if tuned.entry_for(call) is not None:
        return tuned.why_slower("cpu", call)
    x, weight = ((0, *native.arg(t)[1:]) for t in (call.x, call.weight))
    choice = _choice(x, weight, call.geometry, native.threads(), native.lib().isa())
    return "PyTorch's own convolution is faster on this shape" if choice == "reference" else None


def _algorithm(call: ConvCall) -> str:
    name = backends.current_algorithm()
    return tuned.choice_of(call, "cpu") or name if name == "auto" else name


def run(call: ConvCall) -> Tensor:
    """Runs a checked call."""
    y = call.empty_output(depth_to_space=(1, 1, 1))
    bias = None if call.bias is None else call.bias.contiguous()
    plain = call.depth_to_space == (1, 1, 1)
    residual = call.residual if plain else None
    if residual is not None and residual.stride(1) != 1:  # the epilogue reads channels as vectors
        residual = residual.contiguous(memory_format=torch.channels_last_3d)
    native.lib().causal_conv3d(
        native.arg(call.x),
        native.arg(call.weight),
        native.arg(bias),
        native.arg(call.cache),
        native.arg(residual),
        native.arg(y),
        call.geometry.native(),
        call.alpha if plain else None,
        call.activation == "silu",
        _ALGORITHM_CODES[_algorithm(call)],
        native.threads(),
    )
    if plain:
        return y
    y = reference.depth_to_space_3d(y, call.depth_to_space)
    if call.residual is not None:
        y = y + call.residual if call.alpha is None else torch.lerp(y, call.residual, call.alpha)
    return y.contiguous(memory_format=torch.channels_last_3d)
