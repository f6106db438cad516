"""``norm_act``: LayerNorm, RMSNorm and GroupNorm over video, with modulation and SiLU, in one or two
passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtok_fast.dispatch import backends, native
from vtok_fast.ops.norm_act import cpu, triton
from vtok_fast.ops.norm_act.call import NormCall, output_format
from vtok_fast.reference import norm_act as reference

KINDS = reference.KINDS
ROUNDINGS = reference.ROUNDINGS


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
    """Normalizes a video, scales and shifts it per channel, modulates and activates it.

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
        if tail_frames and chosen.name == "triton":  # writes the tail with the rest
            return chosen.run(call, tail_frames)
        y = chosen.run(call)
    elif native.is_transformed():
        backends.insist_on_reference("norm_act", backend)
        y = _definition(call)
    else:
        y = torch.ops.vtok_fast.norm_act(*call, backend)
    if not tail_frames:
        return y
    first = max(x.shape[2] - tail_frames, 0)
    tail = y[:, :, first:]
    return y, tail.clone() if native.is_transformed() else tail.clone(memory_format=output_format(x))


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


def run_reference(call: NormCall) -> Tensor:
    """The definition in PyTorch."""
    y = _definition(call)
    out = torch.empty_like(y, memory_format=output_format(call.x))
    return y if y.stride() == out.stride() else out.copy_(y)


def _definition(call: NormCall) -> Tensor:
    return reference.norm_act(
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


backends.register(
    "norm_act",
    backends.Backend("triton", triton.why_not, triton.run),
    backends.Backend("cpu", cpu.why_not, cpu.run),
    backends.Backend("reference", lambda call: None, run_reference),
)

# ---- torch.library -----------------------------------------------------------------------------------------


@torch.library.impl("vtok_fast::norm_act", ("cpu", "cuda"))
def _impl(*args: Any) -> Tensor:
    return run(NormCall(*args[:-1]), args[-1])


@torch.library.register_fake("vtok_fast::norm_act")
def _fake(x: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x, memory_format=output_format(x))
