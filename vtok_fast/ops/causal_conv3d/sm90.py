"""The sm90 kernels of ``causal_conv3d``: which calls they take, which tile, and how a call becomes a
launch.

A plan is a tile of the output (rows x columns of the product), K splits, blocks per cluster and stages. The
native module's model of the cost chooses it, unless the caller does: what ``vtok-fast tune`` measured is in
the machine's tuning table.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from vtok_fast.dispatch import native
from vtok_fast.dispatch.backends import Reason
from vtok_fast.ops.causal_conv3d import tuned
from vtok_fast.ops.causal_conv3d.call import ConvBackwardCall, ConvCall
from vtok_fast.ops.causal_conv3d.launch import (
    LAST,
    UNKNOWN,
    ask,
    channels_last,
    inputs,
    launch,
    launch_with,
    why_not_machine,
    why_refused,
)

# Rows and columns of the tile, K splits, cluster, stages of weights; 0: the plan's
Choice = tuple[int, int, int, int, int]
ANY: Choice = (0, 0, 0, 0, 0)


class Plan(NamedTuple):
    """What the native module would launch. ``cycles`` are predicted, of a multiprocessor's clock: of the
    whole call, and those for which a unit of work, before splits, would keep each resource busy."""

    scratch_bytes: int
    tile_m: int
    tile_n: int
    splits: int
    cluster: int
    weight_stages: int
    patch_stages: int
    frames: int
    rows: int
    columns: int
    cycles: int
    units: int
    tensor_cycles: int
    shared_cycles: int
    l2_cycles: int

    @property
    def choice(self) -> Choice:
        return self.tile_m, self.tile_n, self.splits, self.cluster, self.weight_stages


# ---- forward -----------------------------------------------------------------------------------------------


class _Known:
    """What calls of one signature have in common.

    Attributes:
        reason: why the kernel cannot run them; ``...`` where nobody has asked.
        shape, strides: of the output.
        geometry: as the native module takes it.
        layouts: what the launcher is told of x, weight, cache, bias, residual and the output but their
            addresses; None where a launch copies one of them first.
        scratch: bytes of scratch memory by the choice of the tile.
    """

    __slots__ = ("geometry", "layouts", "reason", "scratch", "shape", "strides")

    def __init__(self, call: ConvCall) -> None:
        self.reason: Any = ...
        self.scratch: dict[Choice, int] = {}
        out = call.empty_output(device="meta")
        self.shape, self.strides = out.shape, out.stride()
        self.geometry = call.geometry.native()
        args, _ = _forward_args(call, out, copied=False)
        tensors = (args[0], args[1], args[2], args[4], args[5], args[6])
        x, cache = inputs(call.x, call.cache, call.geometry.groups, copied=False)
        given = (call.x, call.cache, call.residual)
        copied = any(a is not b for a, b in zip(given, (x, cache, channels_last(call.residual, False))))
        in_a_row = call.bias is None or call.bias.is_contiguous()
        self.layouts: Any = [t and t[1:] for t in tensors] if in_a_row and not copied else None


_calls: dict[tuple[Any, ...], _Known] = {}


def _known(call: ConvCall) -> _Known:
    key = _signature(call)
    try:
        return _calls[key]
    except KeyError:
        pass
    if len(_calls) >= 4096:
        _calls.clear()
    found = _calls[key] = _Known(call)
    return found


def why_not(call: ConvCall) -> Reason:
    """The reason why the kernel cannot run a checked call, or None; remembered by what decides it."""
    known = _known(call)
    if known.reason is ...:
        known.reason = why_not_machine(call.x)
        if known.reason is None:
            args, _ = _forward_args(call, call.empty_output(device="meta"), copied=False)
            known.reason = why_refused(call.x, "causal_conv3d_sm90", args, ANY, len(Plan._fields))
    return known.reason


def _signature(call: ConvCall) -> tuple[Any, ...]:
    """All of a call but the contents and the addresses of its tensors, of which only the alignment counts."""
    x, weight, bias, cache, residual = call[:5]
    addresses = x.data_ptr() | weight.data_ptr()
    of_cache = of_residual = None
    if cache is not None:
        addresses |= cache.data_ptr()
        of_cache = cache.shape, cache.stride()
    if residual is not None:
        addresses |= residual.data_ptr()
        of_residual = residual.shape, residual.stride()
    return (
        x.device,
        x.dtype,
        x.shape,
        x.stride(),
        weight.shape,
        weight.stride(),
        bias is None or bias.is_contiguous(),
        bias is None,
        of_cache,
        of_residual,
        addresses & 15,
        *call[5:],
    )


def why_slower(call: ConvCall) -> Reason:
    """The reason to prefer another backend, as measured on this machine, or None."""
    return tuned.why_slower("sm90", call)


def run(call: ConvCall) -> Tensor:
    """Runs a checked call, with the tile of the tuning table where it has one."""
    return tuned.launch(forward, call, "sm90", ANY)


def _forward_args(call: ConvCall, out: Tensor, copied: bool = True) -> tuple[tuple, list[Tensor | None]]:
    """The launcher's arguments, and the tensors that they point into; only described where they are not
    ``copied``, but would be."""
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
        native.arg_anywhere(out),  # a plan is asked for with an output on the meta device
        call.alpha,
        call.activation == "silu",
        call.depth_to_space,
    )
    return args, [x, cache, bias, residual]


def plan(call: ConvCall, out: Tensor, *, lib: Any = None, choice: Choice = ANY) -> Plan:
    """The plan for a checked call. Tensors are not read: ``out`` may be on the meta device.

    Raises:
        NotImplementedError: the kernel cannot run it; the message says why.
    """
    args, _ = _forward_args(call, out, copied=False)
    return Plan(*ask((lib or native.lib()).causal_conv3d_sm90, args, choice, len(Plan._fields)))


def forward(call: ConvCall, out: Tensor | None = None, *, lib: Any = None, choice: Choice = ANY) -> Tensor:
    """Runs a checked call into ``out``: the final shape, channels_last_3d; a fresh one where it is None."""
    known = _known(call)
    expected = out is None or out.shape == known.shape and out.is_contiguous(memory_format=LAST)
    if out is None:
        out = call.x.new_empty_strided(known.shape, known.strides)
    quick = _quick_args(call, out, known) if expected else None
    args, _alive = quick or _forward_args(call, out)
    launcher = (lib or native.lib()).causal_conv3d_sm90
    room = known.scratch.get(choice, UNKNOWN)
    needed = launch_with(launcher, call.x, (*args, choice), room)
    if needed != room:
        known.scratch[choice] = needed
    return out


def _quick_args(call: ConvCall, out: Tensor, known: _Known) -> tuple[tuple, None] | None:
    """What `_forward_args` gives, from what is known of it; None where that does not suffice, or a tensor has
    no memory, which the long way says."""
    if known.layouts is None:
        return None
    x, weight, bias, cache, residual, _, alpha, activation, ratios = call
    at: list[Any] = []
    for tensor, layout in zip((x, weight, cache, bias, residual, out), known.layouts):
        if tensor is None:
            at.append(None)
        elif address := tensor.data_ptr():
            at.append((address, *layout))
        else:
            return None
    args = (*at[:3], known.geometry, *at[3:], alpha, activation == "silu", ratios)
    return args, None


# ---- the input's gradient ----------------------------------------------------------------------------------


def _dgrad_args(
    call: ConvBackwardCall, grad_x: Tensor | None, grad_cache: Tensor | None, asked: bool = False
) -> tuple:
    arg = native.arg_anywhere if asked else native.arg_on(call.x.device)
    return (
        arg(call.x),
        arg(call.weight),
        arg(call.cache),
        call.geometry.native(),
        arg(call.grad),
        arg(grad_x),
        arg(grad_cache),
    )


def why_not_dgrad(call: ConvBackwardCall) -> Reason:
    """The reason why the kernel cannot compute the input's gradient on the weights' device, or None. x, cache
    and grad are channels-last already, or are tensors on the meta device that describe such ones."""
    args = _dgrad_args(call, call.x, call.cache, asked=True)
    return why_refused(call.weight, "causal_conv3d_sm90_dgrad", args, ANY, len(Plan._fields))


def dgrad(
    call: ConvBackwardCall,
    grad_x: Tensor | None,
    grad_cache: Tensor | None,
    *,
    lib: Any = None,
    choice: Choice = ANY,
) -> None:
    """Writes the gradients of x and of the cache, where they are given: the shapes of both,
    channels_last_3d."""
    launch(
        (lib or native.lib()).causal_conv3d_sm90_dgrad, call.x, *_dgrad_args(call, grad_x, grad_cache), choice
    )
