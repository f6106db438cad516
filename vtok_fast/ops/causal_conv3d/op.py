"""``causal_conv3d``: 1D, 2D and 3D convolution over video in which padding, caching and upsampling are never
materialised."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from vtok_fast.dispatch import backends, native
from vtok_fast.ops.causal_conv3d import checks, cpu, e4m3, sm80, sm90
from vtok_fast.ops.causal_conv3d.call import ConvCall, Geometry, run
from vtok_fast.reference import causal_conv3d as reference


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    time_pad: Sequence[int] | None = None,
    spatial_pad: Sequence[Sequence[int]] | None = None,
    time_mode: str = "zeros",
    spatial_mode: str = "zeros",
    cache: Tensor | None = None,
    residual: Tensor | None = None,
    alpha: float | Tensor | None = None,
    activation: str | None = None,
    upsample: Sequence[int] = (1, 1, 1),
    upsample_first_frame_once: bool = False,
    depth_to_space: Sequence[int] = (1, 1, 1),
    backend: str | None = None,
) -> Tensor:
    """Convolves a video; the padding before, after and around it is defined by rules, without a padded copy.

    The result is ``activation(conv(upsample(x)) + bias)``, then depth-to-space, then ``+ residual``, or with
    ``alpha`` ``alpha * residual + (1 - alpha) * that``. It is a fresh tensor in ``channels_last_3d`` memory
    format.
    Contract: *close* (see `vtok_fast.parity`). First-order gradients for all tensor arguments.

    Args:
        x: (B, C, T, H, W), float32, float64, bfloat16 or float16; any strides.
        weight: (O, C/groups, kt, kh, kw), the dtype of ``x``.
        bias: (O), the dtype of ``x``.
        stride, dilation: one int or (time, height, width).
        time_pad: frames (front, back) added before and after; default (dilation*(kt-1), 0), which is causal.
        spatial_pad: ((top, bottom), (left, right)); default "same" (dilation*(k-1) split evenly, the odd one
            at the end). Must be given where a stride exceeds 1, because frameworks disagree there.
        time_mode: ``zeros``; ``replicate`` repeats the first frame in front and the last at the end;
            ``reflect``.
        spatial_mode: ``zeros``, ``replicate`` or ``reflect`` (which needs pads smaller than the frame).
        cache: (B, C, n, H, W), earlier input frames. The last ``front`` of them (counted after upsampling)
            stand before ``x``; a shorter cache is preceded by zeros under ``zeros`` and by its own first
            frame under ``replicate``.
        residual: the output's shape, or, with ``upsample``, the shape that becomes the output's by the same
            upsampling.
        alpha: a float or a tensor of one element (gradients reach it); needs ``residual``.
        activation: None or ``silu``.
        upsample: nearest-neighbor factors (time, height, width) applied to ``x`` (and ``cache``) first. Pads
            count upsampled frames, rows and columns.
        upsample_first_frame_once: the first frame is not repeated in time: T frames become 1 + (T-1)*factor.
            A call with a ``cache`` continues a video, so its frames are all repeated.
        depth_to_space: (rt, rh, rw); output channels (O/(rt*rh*rw), rt, rh, rw), the first slowest, become
            positions.
        backend: a name to insist on; else the best that can run.

    Returns:
        (B, O/(rt*rh*rw), To*rt, Ho*rh, Wo*rw), the dtype of ``x``.

    Raises:
        TypeError: dtypes differ or are not floating point.
        ValueError: a shape, pad, mode or factor is impossible; names the argument and its value.
        BackendError: ``backend`` cannot run this call.
    """
    stride, dilation = checks.triple("stride", stride, 1), checks.triple("dilation", dilation, 1)
    upsample, depth_to_space = (
        checks.triple("upsample", upsample, 1),
        checks.triple("depth_to_space", depth_to_space, 1),
    )
    x, weight, bias, cache, residual = checks.autocast(x, weight, bias, cache, residual)
    # To trace the checks takes ten times as long as to run them: in a graph, _fake makes them.
    traced = torch.compiler.is_dynamo_compiling()
    if not traced:
        checks.check_tensors(x, weight, bias, cache, groups)
    pad = checks.resolve_pads(x, weight, stride, dilation, time_pad, spatial_pad)
    if cache is not None:
        upsample_first_frame_once = False
    geometry = Geometry(
        stride, dilation, groups, pad, time_mode, spatial_mode, upsample, upsample_first_frame_once
    )
    if activation not in (None, "silu"):
        raise ValueError(f"activation: expected None or 'silu', got {activation!r}")
    if not traced or residual is not None or alpha is not None:
        size = checks.check_geometry(x, weight, cache, geometry, depth_to_space)
        checks.check_residual(x, residual, alpha, size, geometry, depth_to_space)
    blend: tuple[Tensor, Tensor] | None = None
    if isinstance(alpha, Tensor):
        assert residual is not None  # checked
        if torch.compiler.is_compiling() or alpha.requires_grad or alpha.device.type != "cpu":
            # Outside the kernel: a graph, a gradient or a device keeps the value
            blend, alpha = (
                (residual, alpha),
                None,
            )
            residual = None
        else:
            alpha = float(alpha)
    call = ConvCall(x, weight, bias, cache, residual, geometry, alpha, activation, depth_to_space)
    if native.is_plain(x, weight, bias, cache, residual):
        narrow = e4m3.run_within(call) if backend is None else None
        y = run(call, backend) if narrow is None else narrow
    elif native.is_transformed():
        backends.insist_on_reference("causal_conv3d", backend)
        y = _definition(call)
    else:
        y = torch.ops.vtok_fast.causal_conv3d(*call.flat(), backend, None)
    if blend is not None:
        other, weight_of_other = blend
        if other.shape != y.shape:
            other = reference.upsample_nearest(other, upsample, upsample_first_frame_once)
        y = torch.lerp(y, other, weight_of_other.to(y.dtype))
        if torch._C._functorch.peek_interpreter_stack() is None:  # torch.vmap knows no memory formats
            y = y.contiguous(memory_format=torch.channels_last_3d)
    return y


# ---- backends ----------------------------------------------------------------------------------------------


def run_reference(call: ConvCall) -> Tensor:
    """The definition in PyTorch."""
    return _definition(call).contiguous(memory_format=torch.channels_last_3d)


def _definition(call: ConvCall) -> Tensor:
    g, pad = call.geometry, call.geometry.pad
    return reference.causal_conv3d(
        call.x,
        call.weight,
        call.bias,
        stride=g.stride,
        dilation=g.dilation,
        groups=g.groups,
        time_pad=pad[:2],
        spatial_pad=(pad[2:4], pad[4:]),
        time_mode=g.time_mode,
        spatial_mode=g.spatial_mode,
        cache=call.cache,
        residual=call.residual,
        alpha=call.alpha,
        activation=call.activation,
        upsample=g.upsample,
        upsample_first_frame_once=g.upsample_first_frame_once,
        depth_to_space=call.depth_to_space,
    )


backends.register(
    "causal_conv3d",
    backends.Backend("sm90", sm90.why_not, sm90.run, sm90.why_slower),
    backends.Backend("sm80", sm80.why_not, sm80.run, sm80.why_slower),
    backends.Backend("cpu", cpu.why_not, cpu.run, cpu.why_slower),
    backends.Backend("reference", lambda call: None, run_reference),
)

# ---- torch.library -----------------------------------------------------------------------------------------


@torch.library.impl("vtok_fast::causal_conv3d", ("cpu", "cuda"))
def _impl(*args: Any) -> Tensor:
    *call, backend, preferred = args
    with backends.backend(preferred) if preferred is not None else nullcontext():
        return run(ConvCall.of_flat(*call), backend)


@torch.library.register_fake("vtok_fast::causal_conv3d")
def _fake(*args: Any) -> Tensor:
    call = ConvCall.of_flat(*args[:-2])
    checks.check_tensors(call.x, call.weight, call.bias, call.cache, call.geometry.groups)
    checks.check_geometry(call.x, call.weight, call.cache, call.geometry, call.depth_to_space)
    return call.empty_output()
