"""First-order gradients of ``causal_conv3d``: which backend computes which, and the op that autograd calls.

With respect to the input, a convolution's gradient is a convolution: of the output's gradient, with flipped
weights and mirrored pads. Where a CPU kernel can run that, it does; everything else is ATen on the padded
input, followed by the adjoint of the padding (what was read several times, a replicated frame say, sums its
gradients). On a GPU, kernels of their own compute all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vtok_fast.dispatch import backends, native
from vtok_fast.dispatch.backends import Reason
from vtok_fast.ops.causal_conv3d import sm80, sm90, sm90_wgrad
from vtok_fast.ops.causal_conv3d.call import ConvBackwardCall, ConvCall, Geometry, Gradients, Triple, run
from vtok_fast.ops.causal_conv3d.launch import LAST, inputs, laid_out, why_not_machine
from vtok_fast.reference import causal_conv3d as reference

# ---- adjoints ----------------------------------------------------------------------------------------------


def upsample_adjoint(grad: Tensor, factors: Triple, first_frame_once: bool = False) -> Tensor:
    """The adjoint of `reference.upsample_nearest`: sums what was repeated."""
    if first_frame_once and factors[0] > 1:
        head, rest = grad[:, :, :1], grad[:, :, 1:]
        return torch.cat([upsample_adjoint(head, (1, *factors[1:])), upsample_adjoint(rest, factors)], 2)
    for axis, factor in zip((2, 3, 4), factors):
        if factor > 1:
            grad = grad.unflatten(axis, (-1, factor)).sum(axis + 1)
    return grad


def space_to_depth_3d(grad: Tensor, factors: Triple) -> Tensor:
    """The adjoint (and inverse) of `reference.depth_to_space_3d`."""
    if factors == (1, 1, 1):
        return grad
    b, c, t, h, w = grad.shape
    rt, rh, rw = factors
    grad = grad.reshape(b, c, t // rt, rt, h // rh, rh, w // rw, rw).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return grad.reshape(b, c * rt * rh * rw, t // rt, h // rh, w // rw)


def _pad_adjoint(grad: Tensor, axis: int, size: int, front: int, back: int, mode: str) -> Tensor:
    if front == back == 0:
        return grad
    if mode == "zeros":
        return grad.narrow(axis, front, size)
    index = reference.source_index(size, front, back, mode).to(grad.device)
    shape = list(grad.shape)
    shape[axis] = size
    return grad.new_zeros(shape).index_add_(axis, index, grad)


def _laid_out_like(like: Tensor, grad: Tensor) -> Tensor:
    """The gradient in the memory format that the fake kernel promises, copied only where it is not so
    already."""
    out = torch.empty_like(like)
    return grad if grad.stride() == out.stride() and grad.storage_offset() == 0 else out.copy_(grad)


# ---- ATen, with the input's gradient by a forward kernel where there is one --------------------------------


def _input_gradient(
    call: ConvBackwardCall,
    padded_size: list[int],
    inside: Triple,
    convolve: Callable[[ConvCall], Tensor] | None,
) -> Tensor:
    """Gradient with respect to an input of ``padded_size`` that the convolution itself pads by ``inside``
    zeros each side."""
    grad, weight, geometry = call.grad, call.weight, call.geometry
    mirrored = [d * (k - 1) - p for d, k, p in zip(geometry.dilation, weight.shape[2:], inside)]
    if convolve is not None and geometry.stride == (1, 1, 1) and geometry.groups == 1 and min(mirrored) >= 0:
        flipped = weight.flip(2, 3, 4).transpose(0, 1)
        t, h, w = mirrored
        return convolve(
            ConvCall(grad, flipped, geometry=Geometry(dilation=geometry.dilation, pad=(t, t, h, h, w, w)))
        )
    like = grad.new_empty(1).expand(padded_size)
    return torch.ops.aten.convolution_backward(
        grad,
        like,
        weight,
        None,
        geometry.stride,
        inside,
        geometry.dilation,
        False,
        [0, 0, 0],
        geometry.groups,
        [True, False, False],
    )[0]


def _run_aten(call: ConvBackwardCall, convolve: Callable[[ConvCall], Tensor] | None = None) -> Gradients:
    grad, x, weight, cache, geometry, wanted = call
    upsample, once = geometry.upsample, geometry.upsample_first_frame_once
    front, back, *space = geometry.pad
    height, width = x.shape[3] * upsample[1], x.shape[4] * upsample[2]
    # Symmetric zeros stay inside the convolution; everything else is padded in the open.
    spatial_pad = ((space[0], space[1]), (space[2], space[3]))
    inside = (0, 0, 0)
    if geometry.spatial_mode == "zeros" and space[0] == space[1] and space[2] == space[3]:
        inside, spatial_pad = (0, space[0], space[2]), ((0, 0), (0, 0))
    used = 0 if cache is None else min(front, cache.shape[2] * upsample[0])
    frames = used + x.shape[2] * upsample[0] - (upsample[0] - 1 if once else 0)
    grad_x = grad_weight = grad_bias = grad_cache = None
    if wanted[0] or wanted[3]:
        padded_size = [
            x.shape[0],
            x.shape[1],
            frames + front - used + back,
            height + sum(spatial_pad[0]),
            width + sum(spatial_pad[1]),
        ]
        g = _input_gradient(call, padded_size, inside, convolve)
        g = _pad_adjoint(g, 4, width, *spatial_pad[1], geometry.spatial_mode)
        g = _pad_adjoint(g, 3, height, *spatial_pad[0], geometry.spatial_mode)
        g = _pad_adjoint(g, 2, frames, front - used, back, geometry.time_mode)
        if wanted[0]:
            grad_x = upsample_adjoint(g[:, :, used:], upsample, once)
        if wanted[3] and cache is not None:
            grad_cache = _cache_gradient(g[:, :, :used], cache, upsample)
    if wanted[1]:
        padded = reference.padded_input(
            x,
            time_pad=(front, back),
            spatial_pad=spatial_pad,
            time_mode=geometry.time_mode,
            spatial_mode=geometry.spatial_mode,
            cache=cache,
            upsample=upsample,
            upsample_first_frame_once=once,
        )
        grad_weight = torch.ops.aten.convolution_backward(
            grad,
            padded,
            weight,
            None,
            geometry.stride,
            inside,
            geometry.dilation,
            False,
            [0, 0, 0],
            geometry.groups,
            [False, True, False],
        )[1]
    if wanted[2]:
        grad_bias = grad.sum((0, 2, 3, 4))
    return grad_x, grad_weight, grad_bias, grad_cache


def _cache_gradient(whole: Tensor, cache: Tensor, upsample: Triple) -> Tensor:
    """The gradient of the cache from that of the upsampled frames which were read of it."""
    grad_cache, used = torch.zeros_like(cache), whole.shape[2]
    missing = -used % upsample[0]  # a frame of which only the last repetitions were read
    if missing:
        whole = torch.cat([whole.new_zeros((*whole.shape[:2], missing, *whole.shape[3:])), whole], 2)
    if used:
        grad_cache[:, :, -(used + missing) // upsample[0] :] = upsample_adjoint(whole, upsample)
    return grad_cache


def run_reference(call: ConvBackwardCall) -> Gradients:
    """The definition in PyTorch, which autograd can differentiate again."""
    return _run_aten(call)


def _why_not_cpu(call: ConvBackwardCall) -> Reason:
    return native.why_not_on_cpu(call.x, (torch.float32, torch.bfloat16, torch.float16))


def _run_cpu(call: ConvBackwardCall) -> Gradients:
    return _run_aten(call, lambda forward: run(forward, None))


# ---- CUDA --------------------------------------------------------------------------------------------------


def _why_not_sm90(call: ConvBackwardCall) -> Reason:
    if (reason := why_not_machine(call.x) or sm80.why_not(call)) is not None:
        return reason
    call = _as_read(call, copied=False)
    of_weight = sm90_wgrad.why_not(call) if call.wanted[1] or call.wanted[2] else None
    of_input = sm90.why_not_dgrad(call) if call.wanted[0] or call.wanted[3] else None
    return of_weight and of_input


def _as_read(call: ConvBackwardCall, copied: bool = True) -> ConvBackwardCall:
    """The call with its tensors in the memory format that the CUDA kernels read; only described where they
    are not ``copied``, but would be."""
    x, cache = inputs(call.x, call.cache, call.geometry.groups, copied)
    return call._replace(grad=laid_out(call.grad, copied), x=x, cache=cache)


def run_cuda(
    call: ConvBackwardCall, *, hopper: bool, lib: Any = None, choice: Triple = sm80.ANY
) -> Gradients:
    """The wanted gradients; those of x and the cache are channels_last_3d. The Hopper kernels compute those
    that they can, where ``hopper`` allows it; the kernels for every GPU compute the rest."""
    wanted, call = call.wanted, _as_read(call)
    x, weight, cache = call.x, call.weight, call.cache
    grad_x = torch.empty_like(x, memory_format=LAST) if wanted[0] else None
    grad_cache = torch.empty_like(cache, memory_format=LAST) if cache is not None and wanted[3] else None
    grad_weight = torch.empty_like(weight) if wanted[1] or wanted[2] else None
    grad_bias = weight.new_empty(weight.shape[0]) if wanted[2] else None
    left: list[Tensor | None] = [grad_x, grad_weight, grad_bias, grad_cache]
    if hopper and grad_weight is not None and sm90_wgrad.why_not(call) is None:
        sm90_wgrad.wgrad(call, grad_weight, grad_bias, lib=lib)
        left[1] = left[2] = None
    if hopper and (grad_x is not None or grad_cache is not None) and sm90.why_not_dgrad(call) is None:
        sm90.dgrad(call, grad_x, grad_cache, lib=lib)
        left[0] = left[3] = None
    if any(t is not None for t in left):
        sm80.backward(call, (left[0], left[1], left[2], left[3]), lib=lib, choice=choice)
    return grad_x, grad_weight if wanted[1] else None, grad_bias, grad_cache


backends.register(
    "causal_conv3d_backward",
    backends.Backend("sm90", _why_not_sm90, lambda call: run_cuda(call, hopper=True)),
    backends.Backend("sm80", sm80.why_not, lambda call: run_cuda(call, hopper=False)),
    backends.Backend("cpu", _why_not_cpu, _run_cpu),
    backends.Backend("reference", lambda call: None, run_reference),
)

# ---- torch.library -----------------------------------------------------------------------------------------

torch.library.define(
    "vtok_fast::causal_conv3d_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor? cache, int[] stride, int[] dilation, int groups, int[] "
    "pad, str time_mode, "
    "str spatial_mode, int[] upsample, bool upsample_first_frame_once, bool[] wanted, str? preferred) -> "
    "(Tensor, Tensor, "
    "Tensor, Tensor)",
)


@torch.library.impl("vtok_fast::causal_conv3d_backward", ("cpu", "cuda"))
def _impl(grad: Tensor, x: Tensor, weight: Tensor, cache: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    fields: Any = [tuple(a) if isinstance(a, list) else a for a in args]
    *geometry, wanted, preferred = fields
    call = ConvBackwardCall(grad, x, weight, cache, Geometry(*geometry), wanted)
    with backends.backend(preferred):
        found = backends.select("causal_conv3d_backward", call).run(call)
    # An op returns tensors: an empty one stands for a gradient that is not wanted.
    return tuple(
        grad.new_empty(0) if g is None else g if source is None else _laid_out_like(source, g)
        for g, source in zip(found, (x, weight, None, cache))
    )


@torch.library.register_fake("vtok_fast::causal_conv3d_backward")
def _fake(grad: Tensor, x: Tensor, weight: Tensor, cache: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    sources: Any = (x, weight, grad.new_empty(weight.shape[0]), cache)
    return tuple(torch.empty_like(s) if needed else grad.new_empty(0) for s, needed in zip(sources, args[-2]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    call = ConvCall.of_flat(*inputs[:-2])
    ctx.save_for_backward(call.x, call.weight, call.bias, call.cache)
    ctx.residual_shape = None if call.residual is None else call.residual.shape
    ctx.output_shape = output.shape
    no_tensors: dict[str, Any] = dict.fromkeys(("x", "weight", "bias", "cache", "residual"))
    ctx.options = call._replace(**no_tensors)
    backends.remember(ctx, inputs[-2])


def _backward(ctx: Any, grad: Tensor) -> Any:
    x, weight, bias, cache = backends.saved_tensors(ctx)
    call: ConvCall = ctx.options._replace(x=x, weight=weight, bias=bias, cache=cache)
    geometry, needs = call.geometry, ctx.needs_input_grad
    grad_residual = None
    if ctx.residual_shape is not None:
        if needs[4]:
            grad_residual = grad if call.alpha is None else grad * call.alpha
            if ctx.residual_shape != ctx.output_shape:
                grad_residual = upsample_adjoint(
                    grad_residual, geometry.upsample, geometry.upsample_first_frame_once
                )
        if call.alpha is not None:
            grad = grad * (1 - call.alpha)
    grad = space_to_depth_3d(grad, call.depth_to_space)
    if call.activation == "silu":
        # Recomputed instead of saved: one more forward for one activation less in memory.
        linear = call._replace(alpha=None, activation=None, depth_to_space=(1, 1, 1))
        with backends.remembered(ctx):
            pre = torch.ops.vtok_fast.causal_conv3d(
                *linear.flat(), ctx.explicit_backend, ctx.surrounding_backend
            )
        sigmoid = torch.sigmoid(pre)
        grad = grad * (sigmoid * (1 + pre * (1 - sigmoid)))
    wanted = [needs[0], needs[1], needs[2] and bias is not None, needs[3] and cache is not None]
    found: Any
    if backends.is_differentiated(grad, x, weight, cache):
        found = run_reference(ConvBackwardCall(grad, x, weight, cache, geometry, tuple(wanted)))
    else:
        with backends.remembered(ctx):
            found = torch.ops.vtok_fast.causal_conv3d_backward(
                grad, x, weight, cache, *geometry, wanted, ctx.preferred_backend
            )
    grads = [g if needed else None for g, needed in zip(found, needs)]
    return *grads, grad_residual, *[None] * 13


torch.library.register_autograd("vtok_fast::causal_conv3d", _backward, setup_context=_setup_context)
