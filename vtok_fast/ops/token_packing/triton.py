"""The Triton kernels of ``pack_tokens`` and ``unpack_tokens``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vtok_fast.dispatch import backends, tuning
from vtok_fast.dispatch.lasting import keep, refuse_recording
from vtok_fast.ops.fsq import threshold_table
from vtok_fast.ops.token_packing.call import PackCall, Packed, UnpackCall, dense_output, element
from vtok_fast.ops.token_packing.packed_tokens import error_flag, raise_device_errors

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def why_not(tokens: Tensor) -> backends.Reason:
    if tokens.dtype.itemsize not in _INTEGERS:
        return f"no kernel for elements of {tokens.dtype.itemsize} bytes"
    return backends.why_not_triton_on(tokens)


def why_not_pack(call: PackCall) -> backends.Reason:
    if call.levels is not None and call.tokens.dtype == torch.float64:
        return "in float64 the formula of FSQ decides, not its thresholds"
    return why_not(call.tokens)


@tuning.guarded("token_packing")
def pack(call: PackCall) -> Packed:
    from vtok_fast.kernels import token_packing as kernels

    tokens, keep = call.tokens, call.keep.flatten(1).contiguous().view(torch.uint8)
    tokens = tokens.flatten(1).unsqueeze(1) if tokens.dim() == call.keep.dim() else tokens.flatten(2)
    device = tokens.device
    if call.capacity is None and not keep.is_cpu:
        raise_device_errors(device)
    if call.levels is not None:
        tables = _fsq_tables(call.levels, call.variant, device)
        return kernels.pack_tokens(tokens, keep, call.capacity, error_flag(device), *tables)
    tokens = tokens.view(_INTEGERS[tokens.dtype.itemsize])
    values, indices, cu_seqlens = kernels.pack_tokens(tokens, keep, call.capacity, error_flag(device))
    values = values.view(call.tokens.dtype)
    return values if call.tokens.dim() > call.keep.dim() else values.squeeze(1), indices, cu_seqlens


_tables: dict[tuple, Any] = {}  # a recorded CUDA graph reads them, so none is ever dropped


def _fsq_tables(levels: tuple[int, ...], variant: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """The thresholds of each channel, and what a level of it adds to the index, on the device. Do not write
    to them. Raises RuntimeError where they would have to be made while a CUDA graph is recorded."""

    def make() -> tuple[Tensor, Tensor]:
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        steps = torch.tensor(basis, dtype=torch.int32)
        return threshold_table(levels, variant).to(device), steps.to(device)

    key = (levels, variant, device)
    if key not in _tables:
        refuse_recording(device, "the tables of FSQ")
    return keep(_tables, key, device, make)


@tuning.guarded("token_packing")
def unpack(call: UnpackCall) -> Tensor:
    from vtok_fast.kernels import token_packing as kernels

    integer = _INTEGERS[call.values.dtype.itemsize]
    values, mask = call.values.contiguous(), call.mask.flatten(1).contiguous().view(torch.uint8)
    dense = dense_output(values, call.mask)
    flat = dense.flatten(1).unsqueeze(1) if values.dim() == 1 else dense.flatten(2)
    fill = element(call.fill, values.dtype).view(integer).item()  # its bits, known on the host
    values = values.view(integer).view(len(values), flat.shape[1])
    kernels.unpack_tokens(values, mask, fill, flat.view(integer), error_flag(values.device))
    return dense
