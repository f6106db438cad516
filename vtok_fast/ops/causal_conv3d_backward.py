"""First-order gradients of the linear part of ``causal_conv3d``, as an op of its own.

With respect to the input, a convolution's gradient is a convolution: of the output's gradient, with flipped weights and
mirrored pads. Where the forward kernel can run that, it does; everything else is ATen on the padded input, followed by the
adjoint of the padding (what was read several times, a replicated frame say, sums its gradients). On a GPU, kernels of their own
compute all of it (:mod:`vtok_fast.ops.causal_conv3d_cuda`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtok_fast.ops import causal_conv3d_cuda as cuda
from vtok_fast.reference import causal_conv3d as reference

Triple = tuple[int, int, int]


def upsample_adjoint(grad: Tensor, factors: Triple, first_frame_once: bool = False) -> Tensor:
    """The adjoint of :func:`reference.upsample_nearest`: sums what was repeated."""
    if first_frame_once and factors[0] > 1:
        head, rest = grad[:, :, :1], grad[:, :, 1:]
        return torch.cat([upsample_adjoint(head, (1, *factors[1:])), upsample_adjoint(rest, factors)], 2)
    for axis, factor in zip((2, 3, 4), factors):
        if factor > 1:
            grad = grad.unflatten(axis, (-1, factor)).sum(axis + 1)
    return grad


def space_to_depth_3d(grad: Tensor, factors: Triple) -> Tensor:
    """The adjoint (and inverse) of :func:`reference.depth_to_space_3d`."""
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
    """The gradient in the memory format that the fake kernel promises, copied only where it is not so already."""
    out = torch.empty_like(like)
    return grad if grad.stride() == out.stride() and grad.storage_offset() == 0 else out.copy_(grad)


def _input_gradient(grad: Tensor, weight: Tensor, padded_size: list[int], stride: Triple, dilation: Triple, groups: int,
                    inside: Triple) -> Tensor:
    """Gradient with respect to an input of ``padded_size`` that the convolution itself pads by ``inside`` zeros each side."""
    from vtok_fast.ops.causal_conv3d import causal_conv3d

    kernel = weight.shape[2:]
    mirrored = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, inside)]
    if stride == (1, 1, 1) and groups == 1 and min(mirrored) >= 0:
        flipped = weight.flip(2, 3, 4).transpose(0, 1)
        t, h, w = mirrored
        return causal_conv3d(grad, flipped, dilation=dilation, time_pad=(t, t), spatial_pad=((h, h), (w, w)))
    like = grad.new_empty(1).expand(padded_size)
    return torch.ops.aten.convolution_backward(grad, like, weight, None, stride, inside, dilation, False, [0, 0, 0], groups,
                                               [True, False, False])[0]


torch.library.define(
    "vtok_fast::causal_conv3d_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor? cache, int[] stride, int[] dilation, int groups, int[] pad, str time_mode, "
    "str spatial_mode, int[] upsample, bool upsample_first_frame_once, bool[] mask, str? backend) -> (Tensor, Tensor, Tensor, "
    "Tensor)")


@torch.library.impl("vtok_fast::causal_conv3d_backward", ("cpu", "cuda"))
def _impl(grad, x, weight, cache, stride, dilation, groups, pad, time_mode, spatial_mode, upsample, once, mask, backend):
    stride, dilation, upsample = tuple(stride), tuple(dilation), tuple(upsample)
    none = grad.new_empty(0)
    grad_x = grad_weight = grad_bias = grad_cache = none
    once = once and cache is None
    if backend in (None, "sm80", "sm90") and cuda.why_not(x, weight, groups) is None:
        geometry = (stride, dilation, groups, pad, cuda.MODES.index(time_mode), cuda.MODES.index(spatial_mode), upsample, once)
        grads = cuda.backward(grad, x, weight, cache, geometry, mask, hopper=backend != "sm80")
        sources = (x, weight, None, cache)
        return tuple(none.clone() if g is None else g if s is None else _laid_out_like(s, g) for g, s in zip(grads, sources))
    front, back, *space = pad
    height, width = x.shape[3] * upsample[1], x.shape[4] * upsample[2]
    # Symmetric zeros stay inside the convolution; everything else is padded in the open.
    spatial_pad = ((space[0], space[1]), (space[2], space[3]))
    inside = (0, 0, 0)
    if spatial_mode == "zeros" and space[0] == space[1] and space[2] == space[3]:
        inside, spatial_pad = (0, space[0], space[2]), ((0, 0), (0, 0))
    used = 0 if cache is None else min(front, cache.shape[2] * upsample[0])
    frames = used + x.shape[2] * upsample[0] - (upsample[0] - 1 if once else 0)
    if mask[0] or mask[3]:
        padded_size = [x.shape[0], x.shape[1], frames + front - used + back, height + sum(spatial_pad[0]),
                       width + sum(spatial_pad[1])]
        g = _input_gradient(grad, weight, padded_size, stride, dilation, groups, inside)
        g = _pad_adjoint(g, 4, width, *spatial_pad[1], spatial_mode)
        g = _pad_adjoint(g, 3, height, *spatial_pad[0], spatial_mode)
        g = _pad_adjoint(g, 2, frames, front - used, back, time_mode)
        if mask[0]:
            grad_x = _laid_out_like(x, upsample_adjoint(g[:, :, used:], upsample, once))
        if mask[3]:
            grad_cache = torch.zeros_like(cache)
            whole = g[:, :, :used]
            missing = -used % upsample[0]  # a frame of which only the last repetitions were read
            if missing:
                whole = torch.cat([whole.new_zeros((*whole.shape[:2], missing, *whole.shape[3:])), whole], 2)
            if used:
                grad_cache[:, :, -(used + missing) // upsample[0]:] = upsample_adjoint(whole, upsample)
    if mask[1]:
        padded = reference.padded_input(x, time_pad=(front, back), spatial_pad=spatial_pad, time_mode=time_mode,
                                        spatial_mode=spatial_mode, cache=cache, upsample=upsample, upsample_first_frame_once=once)
        grad_weight = torch.ops.aten.convolution_backward(grad, padded, weight, None, stride, inside, dilation, False, [0, 0, 0],
                                                          groups, [False, True, False])[1]
        grad_weight = _laid_out_like(weight, grad_weight)
    if mask[2]:
        grad_bias = grad.sum((0, 2, 3, 4))
    return tuple(none.clone() if g is none else g for g in (grad_x, grad_weight, grad_bias, grad_cache))


@torch.library.register_fake("vtok_fast::causal_conv3d_backward")
def _fake(grad, x, weight, cache, stride, dilation, groups, pad, time_mode, spatial_mode, upsample, once, mask, backend):
    sources = (x, weight, grad.new_empty(weight.shape[0]), cache)
    return tuple(torch.empty_like(s) if needed else grad.new_empty(0) for s, needed in zip(sources, mask))
