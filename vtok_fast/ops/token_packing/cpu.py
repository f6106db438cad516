"""The CPU kernels of ``pack_tokens`` and ``unpack_tokens``."""

from __future__ import annotations

import torch
from torch import Tensor

from vtok_fast.dispatch import backends, native
from vtok_fast.ops.token_packing.call import PackCall, Packed, UnpackCall, dense_output, element, quantized

# What stands for any dtype of that size in C++
_BYTES = {
    1: torch.uint8,
    2: torch.float16,
    4: torch.float32,
    8: torch.float64,
}


def why_not(tokens: Tensor) -> backends.Reason:
    if tokens.dtype.itemsize not in _BYTES:
        return f"no kernel for elements of {tokens.dtype.itemsize} bytes"
    return native.why_not_on_cpu(tokens, (tokens.dtype,))


def _moved(tensor: Tensor) -> tuple:
    return native.arg(tensor.view(_BYTES[tensor.dtype.itemsize]))


def pack(call: PackCall) -> Packed:
    tokens, keep = call.tokens, call.keep.flatten(1).contiguous().view(torch.uint8)
    tokens = tokens.flatten(1).unsqueeze(1) if tokens.dim() == call.keep.dim() else tokens.flatten(2)
    arg, cu_seqlens = native.arg, keep.new_empty(len(keep) + 1, dtype=torch.int32)
    total = native.lib().count_tokens(arg(keep), arg(cu_seqlens), native.threads())
    if call.capacity is not None and total > call.capacity:
        raise ValueError(f"capacity: {total} tokens are kept, got {call.capacity}")
    rows = total if call.capacity is None else call.capacity
    values, indices = tokens.new_empty(rows, tokens.shape[1]), tokens.new_empty(rows, dtype=torch.int32)
    values[total:], indices[total:] = 0, -1
    native.lib().pack_tokens(_moved(tokens), arg(keep), _moved(values), arg(indices), native.threads())
    values = values if call.tokens.dim() > call.keep.dim() else values.squeeze(1)
    return quantized(values, indices, call), indices, cu_seqlens


def unpack(call: UnpackCall) -> Tensor:
    values, mask = call.values.contiguous(), call.mask.flatten(1).contiguous().view(torch.uint8)
    dense = dense_output(values, call.mask)
    flat = dense.flatten(1).unsqueeze(1) if values.dim() == 1 else dense.flatten(2)
    rows, fill = values.view(len(values), flat.shape[1]), element(call.fill, values.dtype)
    native.lib().unpack_tokens(_moved(rows), native.arg(mask), _moved(fill), _moved(flat), native.threads())
    return dense
