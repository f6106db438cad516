"""The CUDA kernels of ``fsq``, its inverse and its gradient, for every GPU from compute capability 8.0 on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtok_fast.dispatch import native
from vtok_fast.dispatch.backends import Reason
from vtok_fast.ops.fsq.call import FSQBackwardCall, FSQCall, FSQDecodeCall, empty_outputs, threshold_table
from vtok_fast.reference import fsq as reference


def _why_not_on(tensor: Tensor, dtype: torch.dtype, rank: int) -> Reason:
    if (reason := native.why_no_cuda(tensor)) is not None:
        return reason
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no {dtype} kernel"
    return f"rank {rank}, at most 6" if rank > 6 else None


def why_not(call: FSQCall) -> Reason:
    if max(call.levels) > 8 and sum(call.levels) - len(call.levels) > 768:
        return (
            f"more than 768 thresholds, which do not fit into a kernel's parameters, for levels {call.levels}"
        )
    return _why_not_on(call.z, call.z.dtype, call.z.dim())


def run(call: FSQCall, lib: Any = None) -> tuple[Tensor, Tensor]:
    codes, indices = empty_outputs(call.z, call.dim)
    arg, table = native.arg_on(call.z.device), threshold_table(call.levels, call.variant)
    with native.cuda_queue(call.z) as queue:
        (lib or native.lib()).fsq_sm80_quantize(
            arg(call.z), arg(codes), arg(indices), native.arg(table), call.levels, call.dim, queue
        )
    return codes, indices


def why_not_decode(call: FSQDecodeCall) -> Reason:
    if call.indices.dtype not in (torch.int32, torch.int64):
        return f"no kernel for indices of {call.indices.dtype}"
    if len(call.levels) > 31:
        return f"{len(call.levels)} channels, at most 31"
    return _why_not_on(call.indices, call.dtype, call.indices.dim() + 1)


def decode(call: FSQDecodeCall, lib: Any = None) -> Tensor:
    codes = call.indices.new_empty((*call.indices.shape, len(call.levels)), dtype=call.dtype).movedim(
        -1, call.dim
    )
    arg = native.arg_on(call.indices.device)
    with native.cuda_queue(call.indices) as queue:
        (lib or native.lib()).fsq_sm80_decode(arg(call.indices), arg(codes), call.levels, call.dim, queue)
    return codes


def why_not_backward(call: FSQBackwardCall) -> Reason:
    if call.grad.dtype != call.z.dtype or call.grad.device != call.z.device:
        return "the gradient has another dtype or device than z"
    return _why_not_on(call.z, call.z.dtype, call.z.dim())


def backward(call: FSQBackwardCall, lib: Any = None) -> Tensor:
    grad_z, arg = torch.empty_like(call.z), native.arg_on(call.z.device)
    half_l, _, shifts = zip(*(reference.bound_constants(level, call.variant) for level in call.levels))
    slopes = [half / (level // 2) for half, level in zip(half_l, call.levels)]
    with native.cuda_queue(call.z) as queue:
        (lib or native.lib()).fsq_sm80_backward(
            arg(call.grad), arg(call.z), arg(grad_z), list(shifts), slopes, call.dim, queue
        )
    return grad_z
