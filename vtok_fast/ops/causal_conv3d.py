"""``causal_conv3d``: 1D, 2D and 3D convolution over video in which padding, caching and upsampling are never materialised."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtok_fast import backends, native, tuning
from vtok_fast.ops import causal_conv3d_backward as backward
from vtok_fast.ops import causal_conv3d_cuda as cuda
from vtok_fast.ops import causal_conv3d_sm90 as sm90
from vtok_fast.reference import causal_conv3d as reference

Triple = tuple[int, int, int]
MODES = cuda.MODES
LARGEST_STEP, LARGEST_AXIS = 2**16, 2**27  # beyond any video; the kernels' tables of an axis hold ints
_ALGORITHM_CODES = {"auto": 0, "direct": 1, "winograd2": 2, "winograd4": 4}


class ConvCall(NamedTuple):
    """One checked call, as backends see it."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    cache: Tensor | None
    residual: Tensor | None
    stride: Triple
    dilation: Triple
    groups: int
    pad: tuple[int, int, int, int, int, int]  # front, back, top, bottom, left, right
    time_mode: str
    spatial_mode: str
    alpha: float | None
    activation: str | None
    upsample: Triple
    upsample_first_frame_once: bool
    depth_to_space: Triple


def causal_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int | Sequence[int] = 1,
                  dilation: int | Sequence[int] = 1, groups: int = 1, time_pad: Sequence[int] | None = None,
                  spatial_pad: Sequence[Sequence[int]] | None = None, time_mode: str = "zeros", spatial_mode: str = "zeros",
                  cache: Tensor | None = None, residual: Tensor | None = None, alpha: float | Tensor | None = None,
                  activation: str | None = None, upsample: Sequence[int] = (1, 1, 1),
                  upsample_first_frame_once: bool = False, depth_to_space: Sequence[int] = (1, 1, 1),
                  backend: str | None = None) -> Tensor:
    """Convolves a video; what lies before, behind and around it is defined by rules instead of by a padded copy.

    The result is ``activation(conv(upsample(x)) + bias)``, then depth-to-space, then ``+ residual``, or with ``alpha``
    ``alpha * residual + (1 - alpha) * that``. It is a fresh tensor in ``channels_last_3d`` memory format.
    Contract: *close* (see :mod:`vtok_fast.parity`). First-order gradients for all tensor arguments.

    Args:
        x: (B, C, T, H, W), float32, float64, bfloat16 or float16; any strides.
        weight: (O, C/groups, kt, kh, kw), the dtype of ``x``.
        bias: (O), the dtype of ``x``.
        stride, dilation: one int or (time, height, width).
        time_pad: frames (front, back) added before and behind; default (dilation*(kt-1), 0), which is causal.
        spatial_pad: ((top, bottom), (left, right)); default "same" (dilation*(k-1) split evenly, the odd one behind). Must be
            given where a stride exceeds 1, because frameworks disagree there.
        time_mode: ``zeros``; ``replicate`` repeats the first frame in front and the last behind; ``reflect``.
        spatial_mode: ``zeros``, ``replicate`` or ``reflect`` (which needs pads smaller than the frame).
        cache: (B, C, n, H, W), earlier input frames. The last ``front`` of them (counted after upsampling) stand before
            ``x``; a shorter cache is preceded by zeros under ``zeros`` and by its own first frame under ``replicate``.
        residual: the output's shape, or, with ``upsample``, the shape that becomes the output's by the same upsampling.
        alpha: a float or a tensor of one element (gradients reach it); needs ``residual``.
        activation: None or ``silu``.
        upsample: nearest-neighbour factors (time, height, width) applied to ``x`` (and ``cache``) first. Pads count
            upsampled frames, rows and columns.
        upsample_first_frame_once: the first frame is not repeated in time: T frames become 1 + (T-1)*factor. A call with a
            ``cache`` continues a video, so its frames are all repeated.
        depth_to_space: (rt, rh, rw); output channels (O/(rt*rh*rw), rt, rh, rw), the first slowest, become positions.
        backend: a name to insist on; else the best that can run.

    Returns:
        (B, O/(rt*rh*rw), To*rt, Ho*rh, Wo*rw), the dtype of ``x``.

    Raises:
        TypeError: dtypes differ or are not floating point.
        ValueError: a shape, pad, mode or factor is impossible; names the argument and its value.
        BackendError: ``backend`` cannot run this call.
    """
    stride, dilation = _triple("stride", stride, 1), _triple("dilation", dilation, 1)
    upsample, depth_to_space = _triple("upsample", upsample, 1), _triple("depth_to_space", depth_to_space, 1)
    x, weight, bias, cache, residual = _autocast(x, weight, bias, cache, residual)
    _check_tensors(x, weight, bias, cache, groups)
    pad = _resolve_pads(x, weight, stride, dilation, time_pad, spatial_pad)
    if upsample_first_frame_once and cache is not None:
        upsample_first_frame_once = False
    size = _check_geometry(x, weight, cache, stride, dilation, pad, time_mode, spatial_mode, upsample,
                           upsample_first_frame_once, depth_to_space)
    if activation not in (None, "silu"):
        raise ValueError(f"activation: expected None or 'silu', got {activation!r}")
    _check_residual(x, residual, alpha, size, upsample, upsample_first_frame_once, depth_to_space)
    blend: tuple[Tensor, Tensor] | None = None
    if isinstance(alpha, Tensor):
        assert residual is not None  # checked
        if torch.compiler.is_compiling() or alpha.requires_grad or alpha.device.type != "cpu":
            blend, alpha = (residual, alpha), None  # outside the kernel: a graph, a gradient or a device keeps the value
            residual = None
        else:
            alpha = float(alpha)
    if native.is_plain(x, weight, bias, cache, residual):
        y = run(ConvCall(x, weight, bias, cache, residual, stride, dilation, groups, pad, time_mode, spatial_mode, alpha,
                         activation, upsample, upsample_first_frame_once, depth_to_space), backend)
    else:
        y = torch.ops.vtok_fast.causal_conv3d(x, weight, bias, cache, residual, stride, dilation, groups, pad, time_mode,
                                              spatial_mode, alpha, activation, upsample, upsample_first_frame_once,
                                              depth_to_space, backend)
    if blend is not None:
        other, weight_of_other = blend
        if other.shape != y.shape:
            other = reference.upsample_nearest(other, upsample, upsample_first_frame_once)
        y = torch.lerp(y, other, weight_of_other.to(y.dtype)).contiguous(memory_format=torch.channels_last_3d)
    return y


def output_size(x: Sequence[int], kernel: Sequence[int], stride: Triple, dilation: Triple, pad: Sequence[int],
                upsample: Triple = (1, 1, 1), upsample_first_frame_once: bool = False) -> list[int]:
    """(To, Ho, Wo) before depth-to-space, for ``x`` = (T, H, W); the cache does not matter, it stands in for padding."""
    size = [n * u for n, u in zip(x, upsample)]
    if upsample_first_frame_once:
        size[0] -= upsample[0] - 1
    return [(n + pad[2 * i] + pad[2 * i + 1] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i, n in enumerate(size)]


def run(call: ConvCall, backend: str | None) -> Tensor:
    """Runs a checked call on the chosen backend."""
    return backends.select("causal_conv3d", call, backend).run(call)


# ---- checks --------------------------------------------------------------------------------------------------------------


def _triple(name: str, value: int | Sequence[int], least: int) -> Triple:
    triple = (value,) * 3 if isinstance(value, int) else tuple(value)
    if len(triple) != 3 or any(not isinstance(v, int) or not least <= v <= LARGEST_STEP for v in triple):
        raise ValueError(f"{name}: expected one int or three (time, height, width), each from {least} to {LARGEST_STEP}, got "
                         f"{value!r}")
    return triple


def _autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Under autocast, the tensors in its dtype, as PyTorch's own convolutions take them; float64 is left alone."""
    devices = [t.device.type for t in tensors if isinstance(t, Tensor)]
    device = devices[0] if devices else "cpu"
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    narrow = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in narrow else t for t in tensors)


def _check_tensors(x: Tensor, weight: Tensor, bias: Tensor | None, cache: Tensor | None, groups: int) -> None:
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("cache", cache)):
        if not isinstance(tensor, Tensor) and not (tensor is None and name in ("bias", "cache")):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if torch.jit.is_tracing():
        raise RuntimeError("torch.jit.trace cannot record vtok_fast's ops; use torch.compile or torch.export")
    if x.dim() != 5:
        raise ValueError(f"x: expected (B, C, T, H, W), got shape {tuple(x.shape)}")
    if weight.dim() != 5:
        raise ValueError(f"weight: expected (O, C/groups, kt, kh, kw), got shape {tuple(weight.shape)}")
    if x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"x: expected a floating point dtype (float32, float64, bfloat16, float16), got {x.dtype}")
    if not isinstance(groups, int) or groups < 1 or x.shape[1] % groups or weight.shape[0] % groups:
        raise ValueError(f"groups: must divide {x.shape[1]} input and {weight.shape[0]} output channels, got {groups}")
    if weight.shape[1] * groups != x.shape[1]:
        raise ValueError(f"weight: expects {weight.shape[1] * groups} input channels (shape {tuple(weight.shape)}, groups "
                         f"{groups}), but x has {x.shape[1]} (shape {tuple(x.shape)})")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if cache is not None and (cache.dim() != 5 or cache.shape[:2] != x.shape[:2] or cache.shape[3:] != x.shape[3:]):
        raise ValueError(f"cache: expected (B, C, n, H, W) like x {tuple(x.shape)}, got {tuple(cache.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias), ("cache", cache)):
        if tensor is not None:
            _check_like(name, tensor, x)


def _check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name}: expected the dtype of x, {x.dtype}, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected the device of x, {x.device}, got {tensor.device}")


def _resolve_pads(x: Tensor, weight: Tensor, stride: Triple, dilation: Triple, time_pad: Sequence[int] | None,
                  spatial_pad: Sequence[Sequence[int]] | None) -> tuple[int, int, int, int, int, int]:
    spans = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
    if spatial_pad is None:
        if stride[1] > 1 or stride[2] > 1:
            raise ValueError(f"spatial_pad: must be given with stride {stride}, because 'same' is ambiguous there")
        spatial_pad = [(s // 2, s - s // 2) for s in spans[1:]]
    time_pad = (spans[0], 0) if time_pad is None else time_pad
    try:
        (top, bottom), (left, right) = spatial_pad
        front, back = time_pad
    except (TypeError, ValueError):
        raise ValueError(f"time_pad, spatial_pad: expected (front, back) and ((top, bottom), (left, right)), got {time_pad!r} "
                         f"and {spatial_pad!r}") from None
    pad = (front, back, top, bottom, left, right)
    for name, p in zip(("time_pad", "time_pad", *("spatial_pad",) * 4), pad):
        if not isinstance(p, int) or not 0 <= p < 2**31:
            raise ValueError(f"{name}: pads must be ints, not negative and below 2**31, got {p!r}")
    return pad


def _check_geometry(x: Tensor, weight: Tensor, cache: Tensor | None, stride: Triple, dilation: Triple, pad: tuple[int, ...],
                    time_mode: str, spatial_mode: str, upsample: Triple, once: bool, depth_to_space: Triple) -> list[int]:
    for name, mode in (("time_mode", time_mode), ("spatial_mode", spatial_mode)):
        if mode not in MODES:
            raise ValueError(f"{name}: expected one of {', '.join(MODES)}, got {mode!r}")
    if 0 in x.shape[1:]:
        raise ValueError(f"x: no dimension but the batch may be empty, got shape {tuple(x.shape)}")
    if 0 in weight.shape:
        raise ValueError(f"weight: no dimension may be empty, got shape {tuple(weight.shape)}")
    cached = 0 if cache is None else cache.shape[2] * upsample[0]
    frames = x.shape[2] * upsample[0] - (upsample[0] - 1 if once else 0)
    lengths = (frames + min(cached, pad[0]), x.shape[3] * upsample[1], x.shape[4] * upsample[2])
    rest = (max(pad[0] - cached, 0), *pad[1:])
    for axis, (name, length) in enumerate(zip(("time_pad", "spatial_pad", "spatial_pad"), lengths)):
        mode = spatial_mode if axis else time_mode
        largest = max(rest[2 * axis:2 * axis + 2])
        if mode == "reflect" and largest >= length:
            raise ValueError(f"{name}: reflect needs pads smaller than the {length} elements of the axis, got {largest}")
    size = output_size(x.shape[2:], weight.shape[2:], stride, dilation, pad, upsample, once)
    if min(size) < 1:
        raise ValueError(f"x: too small for the kernel: {tuple(x.shape[2:])} (T, H, W) with pads {pad} and kernel "
                         f"{tuple(weight.shape[2:])} gives an output of {tuple(size)}")
    if max(size[i] * weight.shape[2 + i] for i in range(3)) > LARGEST_AXIS or max(lengths) > LARGEST_AXIS:
        raise ValueError(f"time_pad, spatial_pad: {pad} (front, back, top, bottom, left, right) and upsample {upsample} make an "
                         f"axis of more than {LARGEST_AXIS} elements times taps")
    if math.prod(size) * weight.shape[0] * max(x.shape[0], 1) >= 2**48:
        raise ValueError(f"time_pad, spatial_pad: {pad} (front, back, top, bottom, left, right) would make an output of "
                         f"{tuple(size)} (T, H, W) with {weight.shape[0]} channels, which no machine holds")
    factor = depth_to_space[0] * depth_to_space[1] * depth_to_space[2]
    if weight.shape[0] % factor:
        raise ValueError(f"depth_to_space: {depth_to_space} does not divide {weight.shape[0]} output channels")
    return [x.shape[0], weight.shape[0] // factor, *(s * r for s, r in zip(size, depth_to_space))]


def _check_residual(x: Tensor, residual: Tensor | None, alpha: float | Tensor | None, size: list[int], upsample: Triple,
                    once: bool, depth_to_space: Triple) -> None:
    if residual is None:
        if alpha is not None:
            raise ValueError(f"alpha: blends with residual, which is None; got alpha={alpha!r}")
        return
    _check_like("residual", residual, x)
    if isinstance(alpha, Tensor) and alpha.numel() != 1:
        raise ValueError(f"alpha: expected a number or a tensor of one element, got shape {tuple(alpha.shape)}")
    shape = list(residual.shape)
    if shape == size:
        return
    if len(shape) == 5 and depth_to_space == (1, 1, 1):
        up = [n * u for n, u in zip(shape[2:], upsample)]
        if once:
            up[0] -= upsample[0] - 1
        if shape[:2] + up == size:
            return
    raise ValueError(f"residual: expected the output's shape {tuple(size)}, as it is or before upsampling by {upsample}, got "
                     f"{tuple(residual.shape)}")


# ---- backends ------------------------------------------------------------------------------------------------------------


def _native_geometry(call: ConvCall) -> tuple:
    return (call.stride, call.dilation, call.groups, call.pad, MODES.index(call.time_mode), MODES.index(call.spatial_mode),
            call.upsample, call.upsample_first_frame_once)


def _empty_output(call: ConvCall, depth_to_space: Triple = (1, 1, 1)) -> Tensor:
    size = output_size(call.x.shape[2:], call.weight.shape[2:], call.stride, call.dilation, call.pad, call.upsample,
                       call.upsample_first_frame_once)
    shape = (call.x.shape[0], call.weight.shape[0] // math.prod(depth_to_space), *(s * r for s, r in zip(size, depth_to_space)))
    return torch.empty(shape, dtype=call.x.dtype, device=call.x.device, memory_format=torch.channels_last_3d)


def tuning_class(call: ConvCall) -> str:
    """The call's class in a tuning table."""
    return _tuning_class(call.x.shape, call.weight.shape, call.stride, call.dilation, call.pad, call.upsample,
                         call.upsample_first_frame_once, call.x.dtype)


@functools.lru_cache(maxsize=4096)
def _tuning_class(x: torch.Size, weight: torch.Size, stride: Triple, dilation: Triple, pad: tuple[int, ...], upsample: Triple,
                  once: bool, dtype: torch.dtype) -> str:
    positions = x[0] * math.prod(output_size(x[2:], weight[2:], stride, dilation, pad, upsample, once))
    return tuning.conv_class(weight[2:], stride, x[1], weight[0], positions, dtype)


def _tuned(call: ConvCall) -> tuning.Entry | None:
    """What was measured to be fastest for this class of calls on this machine; None too for an entry that makes no sense."""
    entries = tuning.entries("causal_conv3d", call.x.device)
    if not entries or call.groups > 1 or call.dilation != (1, 1, 1) or call.upsample != (1, 1, 1):
        return None
    entry = entries.get(tuning_class(call))
    return entry if entry is not None and _makes_sense(entry.get("backend"), entry.get("choice")) else None


def _makes_sense(backend: Any, choice: Any) -> bool:
    if backend in ("sm80", "sm90"):
        length = 3 if backend == "sm80" else len(sm90.ANY)
        return isinstance(choice, list) and len(choice) == length and all(isinstance(n, int) for n in choice)
    return backend == "reference" or backend == "cpu" and choice in backends.ALGORITHMS


def _choice_of(call: ConvCall, backend: str) -> Any:
    entry = _tuned(call)
    return None if entry is None or entry["backend"] != backend else entry["choice"]


def _not_slower(backend: str, call: ConvCall) -> str | None:
    entry = _tuned(call)
    if entry is None or entry["backend"] == backend:
        return None
    return f"{entry['backend']} was measured to be faster on this machine"


def _sm80_can_run(call: ConvCall) -> str | None:
    return cuda.why_not(call.x, call.weight, call.groups, call.depth_to_space)


def _sm80_run(call: ConvCall) -> Tensor:
    return _with_choice(cuda.forward, call, _choice_of(call, "sm80"), (0, 0, 0))


def _with_choice(forward: Callable[..., Tensor], call: ConvCall, choice: list[int] | None, default: tuple[int, ...]) -> Tensor:
    """Launches with the table's choice; with the default where that is a tile which these kernels have no more."""
    geometry, out = _native_geometry(call), _empty_output(call, call.depth_to_space)
    if choice is not None:
        try:
            return forward(call, geometry, out, choice=tuple(choice))
        except (NotImplementedError, ValueError):
            pass
    return forward(call, geometry, out, choice=default)


def _sm80_worthwhile(call: ConvCall) -> str | None:
    return _not_slower("sm80", call) or cuda.why_slower(call)


def _sm90_can_run(call: ConvCall) -> str | None:
    if (reason := sm90.why_not_machine(call.x)) is not None:
        return reason
    out = _empty_output(call._replace(x=call.x.to("meta")), call.depth_to_space)
    return sm90.why_not(call, _native_geometry(call), out)


def _sm90_run(call: ConvCall) -> Tensor:
    return _with_choice(sm90.forward, call, _choice_of(call, "sm90"), sm90.ANY)


def _sm90_worthwhile(call: ConvCall) -> str | None:
    return _not_slower("sm90", call)


def _cpu_can_run(call: ConvCall) -> str | None:
    if call.x.device.type != "cpu":
        return f"the tensors are on {call.x.device}"
    if call.x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no {call.x.dtype} kernel"
    return native.why_missing()


@functools.lru_cache(maxsize=4096)
def _choice(x: tuple, weight: tuple, geometry: tuple, threads: int, isa: str) -> str:
    """The native module's choice for these shapes, strides and types; it reads no data, so the pointers are zero."""
    stride, dilation, _, pad, *_, upsample, once = geometry
    size = output_size(x[2][2:], weight[2][2:], stride, dilation, pad, upsample, once)
    o, h, w = weight[2][0], size[1], size[2]
    out = (0, x[1], (x[2][0], o, *size), (o * size[0] * h * w, 1, o * h * w, o * w, o))
    return native.lib().causal_conv3d_choice(x, weight, out, *geometry, threads)


def _cpu_worthwhile(call: ConvCall) -> str | None:
    if backends.current_algorithm() != "auto":
        return None
    if _tuned(call) is not None:
        return _not_slower("cpu", call)
    x, weight = ((0, *native.arg(t)[1:]) for t in (call.x, call.weight))
    choice = _choice(x, weight, _native_geometry(call), native.threads(), native.lib().isa())
    return "PyTorch's own convolution is faster on this shape" if choice == "reference" else None


def _cpu_algorithm(call: ConvCall) -> str:
    name = backends.current_algorithm()
    return _choice_of(call, "cpu") or name if name == "auto" else name


def _cpu_run(call: ConvCall) -> Tensor:
    y = _empty_output(call)
    bias = None if call.bias is None else call.bias.contiguous()
    plain = call.depth_to_space == (1, 1, 1)
    residual = call.residual if plain else None
    if residual is not None and residual.stride(1) != 1:  # the epilogue reads channels as vectors
        residual = residual.contiguous(memory_format=torch.channels_last_3d)
    native.lib().causal_conv3d(
        native.arg(call.x), native.arg(call.weight), native.arg(bias), native.arg(call.cache), native.arg(residual),
        native.arg(y), *_native_geometry(call), call.alpha if plain else None, 1 if call.activation else 0,
        _ALGORITHM_CODES[_cpu_algorithm(call)], native.threads())
    if plain:
        return y
    y = reference.depth_to_space_3d(y, call.depth_to_space)
    if call.residual is not None:
        y = y + call.residual if call.alpha is None else torch.lerp(y, call.residual, call.alpha)
    return y.contiguous(memory_format=torch.channels_last_3d)


def _reference_run(call: ConvCall) -> Tensor:
    p = call.pad
    return reference.causal_conv3d(
        call.x, call.weight, call.bias, stride=call.stride, dilation=call.dilation, groups=call.groups, time_pad=p[:2],
        spatial_pad=(p[2:4], p[4:]), time_mode=call.time_mode, spatial_mode=call.spatial_mode, cache=call.cache,
        residual=call.residual, alpha=call.alpha, activation=call.activation, upsample=call.upsample,
        upsample_first_frame_once=call.upsample_first_frame_once, depth_to_space=call.depth_to_space)


backends.register("causal_conv3d", backends.Backend("sm90", _sm90_can_run, _sm90_run, _sm90_worthwhile),
                  backends.Backend("sm80", _sm80_can_run, _sm80_run, _sm80_worthwhile),
                  backends.Backend("cpu", _cpu_can_run, _cpu_run, _cpu_worthwhile),
                  backends.Backend("reference", lambda call: None, _reference_run))

# ---- torch.library -------------------------------------------------------------------------------------------------------

torch.library.define(
    "vtok_fast::causal_conv3d",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? cache, Tensor? residual, int[] stride, int[] dilation, int groups, int[] "
    "pad, str time_mode, str spatial_mode, float? alpha, str? activation, int[] upsample, bool upsample_first_frame_once, "
    "int[] depth_to_space, str? backend) -> Tensor")


def _call(*args: Any) -> ConvCall:
    fields: list[Any] = [tuple(a) if isinstance(a, list) else a for a in args]
    return ConvCall(*fields)


@torch.library.impl("vtok_fast::causal_conv3d", ("cpu", "cuda"))
def _impl(*args: Any) -> Tensor:
    return run(_call(*args[:-1]), args[-1])


@torch.library.register_fake("vtok_fast::causal_conv3d")
def _fake(*args: Any) -> Tensor:
    call = _call(*args[:-1])
    return _empty_output(call, call.depth_to_space)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    call = _call(*inputs[:-1])
    ctx.save_for_backward(call.x, call.weight, call.bias, call.cache)
    ctx.residual_shape = None if call.residual is None else call.residual.shape
    ctx.output_shape = output.shape
    no_tensors: dict[str, Any] = dict.fromkeys(("x", "weight", "bias", "cache", "residual"))
    ctx.options = call._replace(**no_tensors)
    ctx.backend = inputs[-1]
    ctx.wish = inputs[-1] or backends.preferred()  # asked here, because the backward runs in a thread of its own


def _backward(ctx: Any, grad: Tensor) -> Any:
    x, weight, bias, cache = ctx.saved_tensors
    call = ctx.options._replace(x=x, weight=weight, bias=bias, cache=cache)
    needs = ctx.needs_input_grad
    grad_residual = None
    if ctx.residual_shape is not None:
        if needs[4]:
            grad_residual = grad if call.alpha is None else grad * call.alpha
            if ctx.residual_shape != ctx.output_shape:
                grad_residual = backward.upsample_adjoint(grad_residual, call.upsample, call.upsample_first_frame_once)
        if call.alpha is not None:
            grad = grad * (1 - call.alpha)
    grad = backward.space_to_depth_3d(grad, call.depth_to_space)
    if call.activation == "silu":
        # Recomputed instead of saved: one more forward for one activation less in memory.
        linear = call._replace(alpha=None, activation=None, depth_to_space=(1, 1, 1))
        pre = torch.ops.vtok_fast.causal_conv3d(*linear, ctx.backend)
        sigmoid = torch.sigmoid(pre)
        grad = grad * (sigmoid * (1 + pre * (1 - sigmoid)))
    grad_x, grad_weight, grad_bias, grad_cache = torch.ops.vtok_fast.causal_conv3d_backward(
        grad, x, weight, cache, call.stride, call.dilation, call.groups, call.pad, call.time_mode, call.spatial_mode,
        call.upsample, call.upsample_first_frame_once,
        [needs[0], needs[1], needs[2] and bias is not None, needs[3] and cache is not None], ctx.wish)
    grads = [g if needed else None for g, needed in zip((grad_x, grad_weight, grad_bias, grad_cache), needs)]
    return *grads, grad_residual, *[None] * 12


torch.library.register_autograd("vtok_fast::causal_conv3d", _backward, setup_context=_setup_context)
