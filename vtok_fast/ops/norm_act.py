"""``norm_act``: LayerNorm, RMSNorm and GroupNorm over video, with modulation and SiLU, in one or two
passes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtok_fast.dispatch import backends, native, tuning
from vtok_fast.reference import norm_act as reference

KINDS = reference.KINDS
ROUNDINGS = reference.ROUNDINGS


class NormCall(NamedTuple):
    """One checked call, as backends see it."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    residual: Tensor | None
    kind: str
    groups: int
    per_frame: bool
    eps: float
    activation: str | None
    rounding: str


def norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: str = "layer",
    groups: int = 1,
    per_frame: bool = False,
    eps: float = 1e-6,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    tail_frames: int = 0,
    rounding: str = "once",
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalises a video, scales and shifts it per channel, modulates and activates it.

    The result is ``activation((norm(x + residual) * weight + bias) * scale + shift)``, computed in float32
    (float64 for a float64 ``x``) and rounded once. It is a fresh tensor: ``contiguous`` where ``x`` is that
    and not also ``channels_last_3d``, else ``channels_last_3d``. Contract: *close* (see
    `vtok_fast.parity`). First-order gradients for all tensor arguments.

    Args:
        x: (B, C, T, H, W), float32, float64, bfloat16 or float16; any strides.
        weight, bias: (C), any floating point dtype; absent ones do nothing.
        kind: ``layer`` (LayerNorm over the channels of each position), ``rms`` (the same without mean),
            ``group`` (GroupNorm) or ``group_rms`` (the same without mean).
        groups: divides C; each group of channels has its own statistics.
        per_frame: statistics of ``group`` and ``group_rms`` over (C/groups, H, W) of each frame instead of
            (C/groups, T, H, W). Means nothing to ``layer`` and ``rms``, whose statistics are per position.
        eps: added to the variance, or to the mean square.
        scale, shift: modulation, broadcastable to ``x``.
        residual: the shape and dtype of ``x``, added before the norm.
        activation: None or ``silu``.
        tail_frames: k > 0 also returns the last k frames of the result (all of them where there are fewer) as
            a fresh tensor, the cache of a causal convolution that follows.
        rounding: ``once``; or, with ``kind="rms"`` and one group, the exact chain of roundings of a library:
            ``wan`` (diffusers ``WanRMS_norm``: F.normalize, which has a floor of 1e-12 under the norm in
            place of ``eps``, times sqrt(C), times weight, plus bias or 0.0) or ``ltx`` (diffusers ``RMSNorm``
            on a channels-last view); modulation and SiLU then round separately too. Bit for bit in the
            reference; Triton rounds at the same places but adds up in another order, so that single elements
            differ by a rounding.
        backend: a name to insist on; else the best that can run.

    Returns:
        (B, C, T, H, W), the dtype of ``x``; with ``tail_frames`` a pair, the second (B, C, min(k, T), H, W).

    Raises:
        TypeError: a dtype is not floating point, or ``residual`` has another one than ``x``.
        ValueError: a shape, kind or number is impossible; names the argument and its value.
        BackendError: ``backend`` cannot run this call.
    """
    _check(x, weight, bias, scale, shift, residual, kind, groups, eps, activation, tail_frames, rounding)
    call = NormCall(
        x, weight, bias, scale, shift, residual, kind, groups, per_frame, eps, activation, rounding
    )
    if native.is_plain(x, weight, bias, scale, shift, residual):
        chosen = backends.select("norm_act", call, backend)
        if tail_frames and chosen is _triton:  # writes the tail with the rest
            return _triton_run(call, tail_frames)
        y = chosen.run(call)
    else:
        y = torch.ops.vtok_fast.norm_act(*call, backend)
    if not tail_frames:
        return y
    first = max(x.shape[2] - tail_frames, 0)
    return y, y[:, :, first:].clone(memory_format=output_format(x))


def output_format(x: Tensor) -> torch.memory_format:
    """The memory format of the result: that of ``x``, where it has one of the two; ``channels_last_3d`` where
    it has both."""
    if x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.contiguous_format
    return torch.channels_last_3d


def run(call: NormCall, backend: str | None) -> Tensor:
    """Runs a checked call on the chosen backend."""
    return backends.select("norm_act", call, backend).run(call)


# ---- checks ------------------------------------------------------------------------------------------------


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    kind: str,
    groups: int,
    eps: float,
    activation: str | None,
    tail_frames: int,
    rounding: str,
) -> None:
    if x.dim() != 5:
        raise ValueError(f"x: expected (B, C, T, H, W), got shape {tuple(x.shape)}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"x: expected a floating point dtype, got {x.dtype}")
    channels = x.shape[1]
    if channels == 0:
        raise ValueError(f"x: expected at least one channel, got shape {tuple(x.shape)}")
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding: expected one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    if not isinstance(groups, int) or groups < 1 or channels % groups:
        raise ValueError(f"groups: must divide the {channels} channels of x, got {groups!r}")
    if rounding != "once" and (kind != "rms" or groups != 1):
        raise ValueError(
            f"rounding: {rounding!r} is a chain of kind 'rms' with one group, got kind {kind!r} and "
            f"{groups} groups"
        )
    if not eps >= 0:
        raise ValueError(f"eps: expected a number that is not negative, got {eps!r}")
    if activation not in (None, "silu"):
        raise ValueError(f"activation: expected None or 'silu', got {activation!r}")
    if not isinstance(tail_frames, int) or tail_frames < 0:
        raise ValueError(f"tail_frames: expected a number of frames, got {tail_frames!r}")
    for name, t in (
        ("weight", weight),
        ("bias", bias),
        ("scale", scale),
        ("shift", shift),
        ("residual", residual),
    ):
        if t is None:
            continue
        if not t.dtype.is_floating_point:
            raise TypeError(f"{name}: expected a floating point dtype, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {t.device}")
        if name in ("weight", "bias"):
            if t.shape != (channels,):
                raise ValueError(
                    f"{name}: expected shape ({channels},), one value per channel of x, got {tuple(t.shape)}"
                )
        elif name == "residual":
            if t.shape != x.shape:
                raise ValueError(f"residual: expected the shape of x, {tuple(x.shape)}, got {tuple(t.shape)}")
            if t.dtype != x.dtype:
                raise TypeError(f"residual: expected the dtype of x, {x.dtype}, got {t.dtype}")
        elif t.dim() > 5 or any(n not in (1, m) for n, m in zip(reversed(t.shape), reversed(x.shape))):
            raise ValueError(
                f"{name}: expected a shape that broadcasts to that of x, {tuple(x.shape)}, got "
                f"{tuple(t.shape)}"
            )


# ---- backends ----------------------------------------------------------------------------------------------


def _why_not_cpu(call: NormCall) -> str | None:
    if call.x.device.type != "cpu":
        return f"the tensors are on {call.x.device}"
    if call.x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no {call.x.dtype} kernel"
    if call.rounding != "once":
        return (
            f"rounding={call.rounding!r} promises the bits of a chain of PyTorch's own reductions, and only "
            f"they sum in their "
            "order"
        )
    return native.why_missing()


def _modulation(t: Tensor | None, x: Tensor, channels_last: bool) -> Tensor | None:
    """A scale or shift in x's dtype, expanded to its shape, in strides that the kernel reads: see
    NormProblem."""
    if t is None:
        return None
    t = t.to(x.dtype).reshape((1,) * (5 - t.dim()) + t.shape)
    if channels_last:
        if x.shape[1] > 1 and (t.shape[1] == 1 or t.stride(1) != 1):
            t = t.expand(-1, x.shape[1], -1, -1, -1).contiguous(memory_format=torch.channels_last_3d)
    elif t.shape[3] * t.shape[4] > 1:
        t = t.expand(-1, -1, -1, *x.shape[3:]).contiguous()
    return t.expand(x.shape)


def _cpu_run(call: NormCall) -> Tensor:
    x, residual = call.x, call.residual
    layout = output_format(x)
    channels_last = layout == torch.channels_last_3d
    if channels_last and x.stride(1) != 1:
        x = x.contiguous(memory_format=layout)
    if residual is not None and not (channels_last and residual.stride(1) == 1):
        residual = residual.contiguous(memory_format=layout)
    y = torch.empty_like(x, memory_format=layout)
    # Held in names until the kernel returns: it sees pointers only.
    scale, shift = _modulation(call.scale, x, channels_last), _modulation(call.shift, x, channels_last)
    arg = native.arg
    native.lib().norm_act(
        arg(x),
        arg(call.weight),
        arg(call.bias),
        arg(scale),
        arg(shift),
        arg(residual),
        arg(y),
        channels_last,
        call.kind in ("layer", "group"),
        call.kind in ("group", "group_rms"),
        call.per_frame,
        call.groups,
        call.eps,
        call.activation == "silu",
        native.threads(),
    )
    return y


def _reference_run(call: NormCall) -> Tensor:
    y = reference.norm_act(
        call.x,
        call.weight,
        call.bias,
        kind=call.kind,
        groups=call.groups,
        per_frame=call.per_frame,
        eps=call.eps,
        scale=call.scale,
        shift=call.shift,
        residual=call.residual,
        activation=call.activation,
        rounding=call.rounding,
    )
    out = torch.empty_like(y, memory_format=output_format(call.x))
    return y if y.stride() == out.stride() else out.copy_(y)


def _why_not_triton(call: NormCall) -> str | None:
    for name, t in zip(call._fields, call[:6]):
        if t is not None and t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"no kernel for {name} in {t.dtype}"
    if (why := backends.why_not_triton_on(call.x)) is not None:
        return why
    from vtok_fast.kernels import norm_act as kernels

    if "group" not in call.kind and call.x.shape[1] // call.groups > kernels.MAX_CHANNELS:
        return f"{call.x.shape[1] // call.groups} channels in a group, at most {kernels.MAX_CHANNELS}"
    return None


@tuning.guarded("norm_act")
def _triton_run(call: NormCall, tail_frames: int = 0) -> Tensor | tuple[Tensor, Tensor]:
    from vtok_fast.kernels import norm_act as kernels

    layout = output_format(call.x)
    y = torch.empty_like(call.x, memory_format=layout)
    tail = (
        torch.empty_like(y[:, :, max(y.shape[2] - tail_frames, 0) :], memory_format=layout)
        if tail_frames
        else None
    )
    kernels.norm_act(
        *call[:6],
        y,
        kind=call.kind,
        groups=call.groups,
        per_frame=call.per_frame,
        eps=call.eps,
        silu=call.activation == "silu",
        rounding=call.rounding,
        tail=tail,
    )
    return y if tail is None else (y, tail)


@tuning.guarded("norm_act")
def _triton_backward(call: NormCall, grad: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    from vtok_fast.kernels import norm_act_backward as kernels

    return kernels.norm_act_backward(
        grad,
        *call[:6],
        kind=call.kind,
        groups=call.groups,
        per_frame=call.per_frame,
        eps=call.eps,
        activation=call.activation,
        rounding=call.rounding,
        layout=output_format(call.x),
        wanted=wanted,
    )


_triton = backends.Backend("triton", _why_not_triton, _triton_run)
backends.register(
    "norm_act",
    _triton,
    backends.Backend("cpu", _why_not_cpu, _cpu_run),
    backends.Backend("reference", lambda call: None, _reference_run),
)

# ---- torch.library -----------------------------------------------------------------------------------------

torch.library.define(
    "vtok_fast::norm_act",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? residual, str kind, int "
    "groups, bool "
    "per_frame, float eps, str? activation, str rounding, str? backend) -> Tensor",
)


@torch.library.impl("vtok_fast::norm_act", ("cpu", "cuda"))
def _impl(*args: Any) -> Tensor:
    return run(NormCall(*args[:-1]), args[-1])


@torch.library.register_fake("vtok_fast::norm_act")
def _fake(x: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x, memory_format=output_format(x))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    call = NormCall(*inputs[:-1])
    ctx.save_for_backward(*call[:6])
    ctx.options = {
        "kind": call.kind,
        "groups": call.groups,
        "per_frame": call.per_frame,
        "eps": call.eps,
        "activation": call.activation,
        "rounding": call.rounding,
    }


def _backward(ctx: Any, grad: Tensor) -> Any:
    saved = ctx.saved_tensors  # once: activation checkpointing computes them when they are asked for
    options = ctx.options
    call = NormCall(*saved, **options)
    if native.is_plain(grad, *saved) and _why_not_triton(call) is None:
        grads = _triton_backward(call, grad, ctx.needs_input_grad[:6])
    else:
        grads = reference.norm_act_backward(grad, *saved, **options)
    return *[g if needed else None for g, needed in zip(grads, ctx.needs_input_grad)], *[None] * 7


torch.library.register_autograd("vtok_fast::norm_act", _backward, setup_context=_setup_context)
