"""``token_packing``: pack the kept tokens of a video, and put them back. Choosing them: ``scores``,
``budget``, ``selection``."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from vtok_fast.dispatch import backends, native
from vtok_fast.ops.fsq import VARIANTS, check_levels
from vtok_fast.ops.token_packing import cpu, triton
from vtok_fast.ops.token_packing.call import PackCall, Packed, UnpackCall, dense_output, quantized
from vtok_fast.ops.token_packing.packed_tokens import (
    CAPACITY,
    POSITION,
    ROWS,
    PackedTokens,
    note_error,
    raise_device_errors,
)
from vtok_fast.reference import token_packing as reference


def pack_tokens(
    tokens: Tensor | Sequence[Tensor],
    keep: Tensor | Sequence[Tensor],
    *,
    levels: Sequence[int] | None = None,
    variant: str = "vidtok",
    capacity: int | None = None,
    validate: bool = False,
    backend: str | None = None,
) -> PackedTokens:
    """Gathers the kept tokens of every clip, in the order of their positions. Contract: *exact*. Gradients
    for ``tokens``.

    Without a ``capacity`` the result has exactly the kept tokens; on a GPU its size must be read back, the
    one time that this waits for the device. With one, nothing waits and no shape depends on data (CUDA graphs
    can record it): the result has that many rows, those left over hold 0, and tokens that do not fit are left
    out, which the next call that waits for the device reports.

    Args:
        tokens: (B, C, *grid), or (B, *grid), such as the indices of FSQ; any dtype and strides; a grid has at
            most 2^31 - 1 positions in all. Or a sequence of such batches, of different grids, with a sequence
            for ``keep``.
        keep: bool (B, *grid). Or int positions (B, K) in the flat grid, in any order, counted once if
            repeated, -1 for none; with them integer ``tokens`` are (B, *grid) and others (B, C, *grid).
            Positions on a GPU are checked as the capacity is.
        levels, variant: quantize the kept tokens on the way, as `vtok_fast.fsq_quantize` with dim=1:
            values are its indices.
        capacity: rows of the result.
        validate: wait for the device and raise at once.
        backend: a name to insist on; else the best that can run.

    Raises:
        TypeError, ValueError: an argument does not fit; names it and its value. ValueError also for what
            earlier calls found.
        BackendError: ``backend`` cannot run this call.
    """
    if not isinstance(tokens, Tensor):
        if isinstance(keep, Tensor) or len(keep) != len(tokens) or capacity is not None:
            raise ValueError(
                f"keep: expected {len(tokens)} masks for as many batches of tokens, and no capacity"
            )
        return PackedTokens.cat(
            [
                pack_tokens(t, k, levels=levels, variant=variant, validate=validate, backend=backend)
                for t, k in zip(tokens, keep)
            ]
        )
    if not isinstance(keep, Tensor):
        raise TypeError(f"keep: expected a tensor, as tokens is one, got {type(keep).__name__}")
    if keep.dtype != torch.bool:
        keep = _mask_of_positions(keep, tokens)
    grid = tokens.shape[tokens.dim() - keep.dim() + 1 :]
    if keep.dim() < 2 or tokens.device != keep.device or tokens.shape[:1] + grid != keep.shape:
        raise ValueError(
            f"keep: expected (B, *grid) of tokens, {tuple(tokens.shape)} on {tokens.device}, got "
            f"{tuple(keep.shape)} "
            f"on {keep.device}"
        )
    if tokens.dim() not in (keep.dim(), keep.dim() + 1):
        raise ValueError(
            f"tokens: expected (B, *grid) or (B, C, *grid) for keep {tuple(keep.shape)}, got "
            f"{tuple(tokens.shape)}"
        )
    if keep.numel() >= 2**31:
        raise ValueError(f"keep: at most 2**31 - 1 positions, which int32 counts, got {keep.numel()}")
    if capacity is not None and not (isinstance(capacity, (int, torch.SymInt)) and 0 <= capacity < 2**31):
        raise ValueError(f"capacity: expected a number of tokens, got {capacity!r}")
    if levels is not None:
        levels = _check_levels(levels, variant, tokens, keep)
        tokens = tokens.detach()
    call = PackCall(tokens, keep, capacity, levels, variant)
    if native.is_plain(call.tokens, call.keep):
        packed = run_pack(call, backend)
    elif native.is_transformed():
        backends.insist_on_reference("pack_tokens", backend)
        packed = _reference_pack(call)
    else:
        packed = torch.ops.vtok_fast.pack_tokens(*call, backend)
    if validate:
        raise_device_errors(tokens.device)
    return PackedTokens(*packed, keep, bounded=capacity is not None)


def _check_levels(levels: Sequence[int], variant: str, tokens: Tensor, keep: Tensor) -> tuple[int, ...]:
    levels = check_levels(levels)
    if tokens.dim() == keep.dim() or tokens.shape[1] != len(levels):
        raise ValueError(
            f"levels: expected one for each channel of tokens, shape {tuple(tokens.shape)}, got {levels}"
        )
    if not tokens.is_floating_point():
        raise TypeError(f"tokens: expected a floating point dtype to quantize, got {tokens.dtype}")
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    return levels


def _mask_of_positions(positions: Tensor, tokens: Tensor) -> Tensor:
    if positions.is_floating_point() or positions.is_complex():
        raise TypeError(f"keep: expected bool or integers, got {positions.dtype}")
    if positions.dim() != 2 or positions.shape[0] != tokens.shape[0] or positions.device != tokens.device:
        raise ValueError(
            f"keep: expected positions ({tokens.shape[0]}, K) on {tokens.device}, got "
            f"{tuple(positions.shape)} on "
            f"{positions.device}"
        )
    grid = tokens.shape[2 if tokens.is_floating_point() else 1 :]
    size = math.prod(grid)
    wrong = (positions < -1) | (positions >= size)
    if positions.is_cpu:
        if not torch.compiler.is_compiling() and wrong.any():
            raise ValueError(f"keep: expected positions -1 to {size - 1}, got {int(positions[wrong][0])}")
    else:
        note_error(wrong, POSITION)
    at = positions.long().masked_fill(wrong | (positions < 0), size)
    mask = torch.zeros(tokens.shape[0], size + 1, dtype=torch.bool, device=tokens.device).scatter_(
        1, at, True
    )
    return mask[:, :size].reshape(tokens.shape[0], *grid)


def unpack_tokens(
    packed: PackedTokens,
    *,
    shape: Sequence[int] | None = None,
    fill: float = 0.0,
    validate: bool = False,
    backend: str | None = None,
) -> Tensor | list[Tensor]:
    """The dense tokens: each value at its position, ``fill`` everywhere else. Contract: *exact*. Gradients
    for the values.

    Args:
        packed: its ``mask`` says where row by row of its ``values`` goes. On a CPU they must agree; on a GPU
            positions without a value get ``fill``, which the next call that waits for the device reports.
        shape: of the result, to be checked; None takes it from the mask.
        fill: a number that the dtype of the values can hold.
        validate, backend: as in `pack_tokens`.

    Returns:
        (B, C, *grid) with the channels innermost in memory, which for videos is ``channels_last_3d``; (B,
        *grid) for values (N,). For clips of several sizes a list of such tensors without B.

    Raises:
        TypeError, ValueError: an argument does not fit; names it and its value.
        BackendError: ``backend`` cannot run this call.
    """
    values, mask = packed.values, packed.mask
    if mask.dtype != torch.bool or mask.device != values.device:
        raise ValueError(f"packed.mask: expected bool on {values.device}, got {mask.dtype} on {mask.device}")
    if values.dim() not in (1, 2):
        raise ValueError(f"packed.values: expected (N,) or (N, C), got {tuple(values.shape)}")
    if not values.is_floating_point() and fill != int(fill):
        raise ValueError(f"fill: expected a whole number for {values.dtype}, got {fill!r}")
    channels = values.shape[1:]
    if shape is not None:
        if packed.grids is not None:
            raise ValueError(
                f"shape: {len(packed.grids)} clips of several sizes have no common one, got {tuple(shape)}"
            )
        want = (*mask.shape[:1], *channels, *mask.shape[1:])
        if tuple(map(operator.index, shape)) != want:
            raise ValueError(f"shape: expected {want}, got {tuple(shape)}")
    call = UnpackCall(values, mask if packed.grids is None else mask.unsqueeze(0), float(fill))
    if native.is_plain(call.values, call.mask):
        dense = run_unpack(call, backend)
    elif native.is_transformed():
        backends.insist_on_reference("unpack_tokens", backend)
        dense = _reference_unpack(call)
    else:
        dense = torch.ops.vtok_fast.unpack_tokens(*call, backend)
    if validate:
        raise_device_errors(values.device)
    if packed.grids is None:
        return dense
    clips = dense[0].split([math.prod(grid) for grid in packed.grids], dim=-1)
    return [clip.unflatten(-1, grid) for clip, grid in zip(clips, packed.grids)]


def run_pack(call: PackCall, backend: str | None) -> Packed:
    """Runs a checked call on the chosen backend."""
    return backends.select("pack_tokens", call, backend).run(call)


def run_unpack(call: UnpackCall, backend: str | None) -> Tensor:
    """Runs a checked call on the chosen backend."""
    return backends.select("unpack_tokens", call, backend).run(call)


# ---- backends ----------------------------------------------------------------------------------------------


def _reference_pack(call: PackCall) -> Packed:
    if call.capacity is not None:
        over = call.keep.sum() > call.capacity
        if call.keep.is_cpu and over:
            raise ValueError(f"capacity: {int(call.keep.sum())} tokens are kept, got {call.capacity}")
        note_error(over, CAPACITY)
    elif not call.keep.is_cpu:
        raise_device_errors(call.keep.device)
    values, indices, cu_seqlens = reference.pack_tokens(*call[:3])
    return quantized(values.contiguous(), indices, call), indices, cu_seqlens


def _reference_unpack(call: UnpackCall) -> Tensor:
    over = call.mask.sum() > len(call.values)
    if call.mask.is_cpu and over:
        raise ValueError(f"packed.mask: keeps {int(call.mask.sum())} positions, of {len(call.values)} values")
    note_error(over, ROWS)
    return reference.unpack_tokens(*call)


backends.register(
    "pack_tokens",
    backends.Backend("triton", triton.why_not_pack, triton.pack),
    backends.Backend("cpu", lambda call: cpu.why_not(call.tokens), cpu.pack),
    backends.Backend("reference", lambda call: None, _reference_pack),
)
backends.register(
    "unpack_tokens",
    backends.Backend("triton", lambda call: triton.why_not(call.values), triton.unpack),
    backends.Backend("cpu", lambda call: cpu.why_not(call.values), cpu.unpack),
    backends.Backend("reference", lambda call: None, _reference_unpack),
)

# ---- torch.library -----------------------------------------------------------------------------------------


@torch.library.impl("vtok_fast::pack_tokens", ("cpu", "cuda"))
def _pack_impl(tokens, keep, capacity, levels, variant, backend):
    return run_pack(
        PackCall(tokens, keep, capacity, None if levels is None else tuple(levels), variant), backend
    )


@torch.library.register_fake("vtok_fast::pack_tokens")
def _pack_fake(tokens, keep, capacity, levels, variant, backend):
    rows = torch.library.get_ctx().new_dynamic_size() if capacity is None else capacity
    channels = tokens.shape[1:2] if tokens.dim() > keep.dim() and levels is None else ()
    return (
        tokens.new_empty(rows, *channels, dtype=tokens.dtype if levels is None else torch.int32),
        tokens.new_empty(rows, dtype=torch.int32),
        tokens.new_empty(keep.shape[0] + 1, dtype=torch.int32),
    )


@torch.library.impl("vtok_fast::unpack_tokens", ("cpu", "cuda"))
def _unpack_impl(values, mask, fill, backend):
    return run_unpack(UnpackCall(values, mask, fill), backend)


@torch.library.register_fake("vtok_fast::unpack_tokens")
def _unpack_fake(values, mask, fill, backend):
    return dense_output(values, mask)
