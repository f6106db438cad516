"""``causal_conv3d`` with operands of e4m3: for the modules of a model under ``accelerate(contract="fast")``,
and never else.

A module that runs within ``with scales:`` (a `Scales`) has the convolutions of `why_not` multiply x and the
weights rounded to e4m3, summed in float32. On a Hopper GPU a kernel does; on a CPU the rounding is simulated,
so that its error can be seen. All other calls are as they are outside: other shapes, other GPUs, graphs of
``torch.compile``, and calls that want a gradient.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from vtok_fast.dispatch import native
from vtok_fast.dispatch.backends import Reason
from vtok_fast.ops.causal_conv3d import call as calls
from vtok_fast.ops.causal_conv3d import sm90
from vtok_fast.ops.causal_conv3d.call import ConvCall
from vtok_fast.ops.causal_conv3d.launch import (
    ask,
    channels_last,
    inputs,
    launch,
    why_not_machine,
    why_refused,
)
from vtok_fast.reference import e4m3 as reference

HEADROOM = 2.0  # what x may grow, from the inputs that were seen, before values are cut off
_local = threading.local()


class Scales:
    """The scales of a module's inputs. Within ``with scales:`` its convolutions round to e4m3.

    The scale of x is that of the largest magnitude which the same weights met while ``recording``, times
    `HEADROOM`; of the input itself, found anew for each call, where there is no such record.

    Attributes:
        recording: whether calls run as outside, and the magnitudes of their inputs are recorded.
        ran: calls that were rounded, or recorded.
    """

    def __init__(self) -> None:
        self.recording, self.ran = False, 0
        self._largest: dict[int, tuple[weakref.ref, Tensor]] = {}

    def __enter__(self) -> Scales:
        _stack().append(self)
        return self

    def __exit__(self, *_: Any) -> None:
        _stack().pop()

    def of(self, call: ConvCall) -> Tensor:
        """The scale of x and its cache: one float32 on their device."""
        known = self._largest.get(id(_owner(call.weight)))
        largest = known[1] if known is not None and known[0]() is _owner(call.weight) else None
        if largest is None or largest.device != call.x.device:
            largest = largest_of(call)
        return reference.power_of_two(largest.float() * HEADROOM)  # which float16 may not hold

    def record(self, call: ConvCall) -> None:
        owner, largest = _owner(call.weight), largest_of(call)
        known = self._largest.get(id(owner))
        if known is not None and known[0]() is owner:
            largest = torch.maximum(largest, known[1])
        self._largest[id(owner)] = weakref.ref(owner), largest


class _Off(Scales):
    """Within ``with OFF:`` nothing is rounded, whatever surrounds it."""


OFF = _Off()


def _stack() -> list[Scales]:
    try:
        return _local.stack
    except AttributeError:
        _local.stack = []
        return _local.stack


def _owner(weight: Tensor) -> Tensor:
    """The parameter: a module may hand over views of it, a new one for each call."""
    return weight if weight._base is None else weight._base


def largest_of(call: ConvCall) -> Tensor:
    """The largest magnitude of x and its cache."""
    largest = call.x.abs().amax()
    return largest if call.cache is None else torch.maximum(largest, call.cache.abs().amax())


def why_not(call: ConvCall) -> Reason:
    """Why a checked call is not one of those that e4m3 is for, on whatever device; None where it is."""
    kernel, g = tuple(call.weight.shape[2:]), call.geometry
    if call.x.dtype == torch.float64:
        return "no float64"
    if kernel not in ((3, 3, 3), (1, 3, 3)):
        return "kernels of 3x3x3 and 1x3x3 only"
    if call.weight.shape[1] % 16 or call.weight.shape[0] % 8:
        return "input channels must be a multiple of 16, output channels one of 8"
    if g.groups != 1 or g.upsample != (1, 1, 1) or call.depth_to_space != (1, 1, 1):
        return "no groups, no upsampling, no depth_to_space"
    if g.spatial_mode != "zeros" and any(g.pad[2:]):
        return "rows and columns padded by anything but zeros"
    return None if call.x.numel() else "the batch is empty"


def why_not_sm90(call: ConvCall) -> Reason:
    """Why the kernel cannot run a call that e4m3 is for, or None."""
    if (reason := why_not_machine(call.x)) is not None:
        return reason
    scale = torch.empty(1, dtype=torch.float32, device="meta")
    args, _ = _args(call, call.empty_output(device="meta"), scale, copied=False)
    return why_refused(call.x, "causal_conv3d_sm90_e4m3", args, sm90.ANY, len(sm90.Plan._fields))


def run_within(call: ConvCall) -> Tensor | None:
    """The result of a plain call where its module rounds to e4m3; None where it does not, or not this one."""
    stack = _local.__dict__.get("stack")  # where there is none, at once
    if not stack or stack[-1] is OFF or why_not(call) is not None:
        return None
    scales = stack[-1]
    if call.x.device.type != "cpu" and why_not_sm90(call) is not None:
        return None
    scales.ran += 1
    if scales.recording:
        scales.record(call)
        return None
    scale = scales.of(call)
    return simulated(call, scale) if call.x.device.type == "cpu" else forward(call, scale)


def simulated(call: ConvCall, scale: Tensor) -> Tensor:
    """The definition: the same call with its operands rounded to e4m3."""
    x = reference.rounded(call.x, scale)
    cache = None if call.cache is None else reference.rounded(call.cache, scale)
    weight = reference.rounded(call.weight, reference.scale_of_weight(call.weight))
    return calls.run(call._replace(x=x, weight=weight, cache=cache), None)


def _args(
    call: ConvCall, out: Tensor, scale: Tensor, copied: bool = True
) -> tuple[tuple, list[Tensor | None]]:
    """As `sm90._forward_args`."""
    x, cache = inputs(call.x, call.cache, call.geometry.groups, copied)
    bias = call.bias if call.bias is None or not copied else call.bias.contiguous()
    residual = channels_last(call.residual, copied)
    arg = native.arg_on(call.x.device) if copied else native.arg_anywhere
    args = (
        arg(x),
        arg(call.weight),
        arg(cache),
        call.geometry.native(),
        arg(bias),
        arg(residual),
        native.arg_anywhere(out),
        call.alpha,
        call.activation == "silu",
        call.depth_to_space,
        native.arg_anywhere(scale),
    )
    return args, [x, cache, bias, residual]


def forward(call: ConvCall, scale: Tensor, *, lib: Any = None, choice: sm90.Choice = sm90.ANY) -> Tensor:
    """Runs the kernel: the result of `simulated` in another order of sums. ``scale``: one float32 on the
    device of x, a power of two."""
    out = call.empty_output()
    args, _alive = _args(call, out, scale.reshape(1))
    launch((lib or native.lib()).causal_conv3d_sm90_e4m3, call.x, *args, choice)
    return out


def plan(call: ConvCall, *, lib: Any = None, choice: sm90.Choice = sm90.ANY) -> sm90.Plan:
    """As `sm90.plan`."""
    scale = torch.empty(1, dtype=torch.float32, device="meta")
    args, _ = _args(call, call.empty_output(device="meta"), scale, copied=False)
    launcher = (lib or native.lib()).causal_conv3d_sm90_e4m3
    return sm90.Plan(*ask(launcher, args, choice, len(sm90.Plan._fields)))
