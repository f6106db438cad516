"""``fsq``: finite scalar quantisation, its inverse, and its entropy loss."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vtok_fast import backends, native
from vtok_fast.reference import fsq as reference

VARIANTS = reference.VARIANTS


class FSQOutput(NamedTuple):
    """``codes`` in the dtype and shape of z, ``indices`` int32 without the channel dimension."""

    codes: Tensor
    indices: Tensor


class FSQCall(NamedTuple):
    """One checked call, as backends see it."""

    z: Tensor
    levels: tuple[int, ...]
    variant: str
    dim: int


def fsq_quantize(z: Tensor, levels: Sequence[int], *, variant: str = "vidtok", dim: int = 1,
                 backend: str | None = None) -> FSQOutput:
    """Quantises each channel of ``z`` to one of its levels.

    The index is defined by the formula of :mod:`vtok_fast.reference.fsq` in float64 for the value that ``z`` holds. Every backend
    counts the same thresholds, so codes and indices are the same bits on all of them. Contract: *exact*.

    A NaN in ``z`` gives the code NaN in its channel and the index -1 at its position, which no codebook has; +-inf are the
    outermost levels. The gradient passes straight through the rounding and not through the bound: d codes / d z =
    (1 - tanh(z + shift)^2) half_l / (L // 2).

    Args:
        z: any rank up to 6, float32, float64, bfloat16 or float16; any strides. In float64 the formula itself decides.
        levels: how many levels each channel has, 2 to 1000; their product at most 2**31.
        variant: ``vidtok`` (also Cosmos) or ``elastictok``.
        dim: the channel dimension, of size len(levels).
        backend: a name to insist on; else the best that can run.

    Returns:
        ``codes``, (index of the level - L // 2) / (L // 2) computed in float32 (float64 for that) and rounded to the dtype of
        ``z``, in the strides that ``torch.empty_like(z)`` has; ``indices`` int32, contiguous, the first channel fastest.

    Raises:
        TypeError: ``z`` is not floating point.
        ValueError: levels, variant or dim do not fit; names the argument and its value.
        BackendError: ``backend`` cannot run this call.
    """
    levels = check_levels(levels)
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    call = FSQCall(z, levels, variant, _channel_dim(z, levels, dim))
    if native.is_plain(z):
        return FSQOutput(*run(call, backend))
    return FSQOutput(*torch.ops.vtok_fast.fsq_quantize(*call, backend))


def fsq_decode(indices: Tensor, levels: Sequence[int], *, dtype: torch.dtype = torch.float32, dim: int = 1) -> Tensor:
    """The codes of ``indices``: the inverse of :func:`fsq_quantize`, bit for bit in the same dtype.

    Args:
        indices: any integer dtype, any shape. An index outside [0, codebook size), such as the -1 of a NaN, gives codes NaN.
        levels: as in :func:`fsq_quantize`.
        dtype: of the result.
        dim: where the result has its channel dimension.

    Returns:
        ``indices.shape`` with len(levels) inserted at ``dim``; the channels are innermost in memory, which for
        (B, C, T, H, W) is ``channels_last_3d``.

    Raises:
        TypeError: ``indices`` are not integers, or ``dtype`` is not floating point.
        ValueError: levels or dim do not fit.
    """
    levels = check_levels(levels)
    if indices.dtype.is_floating_point or indices.dtype.is_complex or indices.dtype == torch.bool:
        raise TypeError(f"indices: expected an integer dtype, got {indices.dtype}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating point dtype, got {dtype}")
    rank = indices.dim() + 1
    if not -rank <= dim < rank:
        raise ValueError(f"dim: expected -{rank} to {rank - 1} for indices of shape {tuple(indices.shape)}, got {dim}")
    return reference.fsq_decode(indices, levels, dtype=dtype, dim=dim)


def fsq_entropy_loss(z: Tensor, levels: Sequence[int], *, inv_temperature: float = 100.0, gamma: float = 1.0,
                     dim: int = 1) -> tuple[Tensor, Tensor]:
    """VidTok's two training terms, factorised per channel: no (tokens x codebook) tensor exists.

    Every token has the distribution softmax(2 inv_temperature z . code) over the codebook. The first term is the mean entropy of a
    token minus ``gamma`` times the entropy of the mean distribution, the second is mean((z - codes)^2), whose gradient reaches
    ``z`` and not the codes.

    Logits add up over channels, so a token's distribution is a product: its entropy is the sum of the channels', and the mean
    distribution is one GEMM between the outer products of two halves of the channels; memory is tokens x sqrt(codebook) +
    codebook. VidTok clamps probabilities at 1e-5 inside the logarithm. That is done here in the mean distribution, where
    it matters and is the same; a token's entropy is exact instead, which is larger by the sum of p log(1e-5 / p) over the codes
    with p < 1e-5 (3.2368 instead of 3.2358 for four channels of 8 levels).

    Args:
        z: the latent before quantisation, channels at ``dim``; computed in float32, or float64 for that.
        levels, dim: as in :func:`fsq_quantize`.

    Returns:
        (entropy term, commitment term), scalars in float32 or float64.
    """
    levels = check_levels(levels)
    dim = _channel_dim(z, levels, dim)
    if z.numel() == 0:
        raise ValueError(f"z: expected at least one token, got shape {tuple(z.shape)}")
    codes = fsq_quantize(z.detach(), levels, dim=dim).codes
    return reference.fsq_entropy_loss(z, levels, codes, inv_temperature=inv_temperature, gamma=gamma, dim=dim)


def check_levels(levels: Sequence[int]) -> tuple[int, ...]:
    """The levels as a tuple, or a ValueError that says what is wrong with them."""
    possible = _possible.__wrapped__ if torch.compiler.is_compiling() else _possible  # tracing through a cache makes torch warn
    try:
        return possible(tuple(map(operator.index, levels)))
    except TypeError:
        raise ValueError(f"levels: expected a sequence of ints, got {levels!r}") from None


@functools.lru_cache(maxsize=256)
def _possible(levels: tuple[int, ...]) -> tuple[int, ...]:
    if not levels or not all(2 <= level <= reference.MAX_LEVEL for level in levels):
        raise ValueError(f"levels: expected one or more ints from 2 to {reference.MAX_LEVEL}, got {levels}")
    if math.prod(levels) > 2**31:
        raise ValueError(f"levels: a codebook of at most 2**31, so that int32 holds its indices, got {levels} with {math.prod(levels)}")
    return levels


def _channel_dim(z: Tensor, levels: tuple[int, ...], dim: int) -> int:
    """``dim`` counted from the front."""
    if not z.dtype.is_floating_point:
        raise TypeError(f"z: expected a floating point dtype, got {z.dtype}")
    if not -z.dim() <= dim < z.dim():
        raise ValueError(f"dim: expected -{z.dim()} to {z.dim() - 1} for z of shape {tuple(z.shape)}, got {dim}")
    if z.shape[dim] != len(levels):
        raise ValueError(f"levels: expected one for each of the {z.shape[dim]} channels of z (shape {tuple(z.shape)}, dim {dim}), "
                         f"got {len(levels)}: {levels}")
    return dim % z.dim()


def run(call: FSQCall, backend: str | None) -> tuple[Tensor, Tensor]:
    """Runs a checked call on the chosen backend."""
    return backends.select("fsq", call, backend).run(call)


# ---- backends ------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def threshold_table(levels: tuple[int, ...], variant: str) -> Tensor:
    """float32 (channels, most levels - 1), contiguous: each channel's thresholds, NaN (never reached) behind them."""
    table = torch.full((len(levels), max(levels) - 1), math.nan)
    for row, level in zip(table, levels):
        row[:level - 1] = reference.thresholds(level, variant)
    return table


def _cpu_can_run(call: FSQCall) -> str | None:
    if not call.z.is_cpu:
        return f"the tensors are on {call.z.device}"
    if call.z.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no {call.z.dtype} kernel"
    if call.z.dim() > 6:
        return f"rank {call.z.dim()}, at most 6"
    return native.why_missing()


def _outputs(z: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    positions = list(z.shape)
    del positions[dim]
    return torch.empty_like(z), z.new_empty(positions, dtype=torch.int32)


def _cpu_run(call: FSQCall) -> tuple[Tensor, Tensor]:
    codes, indices = _outputs(call.z, call.dim)
    arg = native.arg
    native.lib().fsq_quantize(arg(call.z), arg(codes), arg(indices), arg(threshold_table(call.levels, call.variant)), call.levels,
                              call.dim, native.threads())
    return codes, indices


def _reference_run(call: FSQCall) -> tuple[Tensor, Tensor]:
    codes, indices = reference.fsq_quantize(call.z, call.levels, variant=call.variant, dim=call.dim)
    return torch.empty_like(call.z).copy_(codes), indices.contiguous()


backends.register("fsq", backends.Backend("cpu", _cpu_can_run, _cpu_run),
                  backends.Backend("reference", lambda call: None, _reference_run))

# ---- torch.library -------------------------------------------------------------------------------------------------------

torch.library.define("vtok_fast::fsq_quantize",
                     "(Tensor z, int[] levels, str variant, int dim, str? backend) -> (Tensor, Tensor)")


@torch.library.impl("vtok_fast::fsq_quantize", ("cpu", "cuda"))
def _impl(z, levels, variant, dim, backend):
    return run(FSQCall(z, tuple(levels), variant, dim), backend)


@torch.library.register_fake("vtok_fast::fsq_quantize")
def _fake(z, levels, variant, dim, backend):
    return _outputs(z, dim)


def _setup_context(ctx, inputs, output) -> None:
    z, ctx.levels, ctx.variant, ctx.dim, _ = inputs
    ctx.save_for_backward(z)


def _backward(ctx, grad_codes, grad_indices):
    (z,) = ctx.saved_tensors
    grad = reference.fsq_quantize_backward(grad_codes, z, ctx.levels, variant=ctx.variant, dim=ctx.dim)
    return grad, None, None, None, None


torch.library.register_autograd("vtok_fast::fsq_quantize", _backward, setup_context=_setup_context)
