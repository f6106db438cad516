"""``fsq``: finite scalar quantization, its inverse, and its entropy loss."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vtok_fast.dispatch import backends, native
from vtok_fast.ops.fsq import cpu, sm80
from vtok_fast.ops.fsq.call import FSQCall, FSQDecodeCall, empty_outputs
from vtok_fast.reference import fsq as reference

VARIANTS = reference.VARIANTS


class FSQOutput(NamedTuple):
    """``codes`` in the dtype and shape of z, ``indices`` int32 without the channel dimension."""

    codes: Tensor
    indices: Tensor


def fsq_quantize(
    z: Tensor, levels: Sequence[int], *, variant: str = "vidtok", dim: int = 1, backend: str | None = None
) -> FSQOutput:
    """Quantizes each channel of ``z`` to one of its levels.

    The index is defined by the formula of `vtok_fast.reference.fsq` in float64 for the value that ``z``
    holds. Every backend counts the same thresholds, so codes and indices are the same bits on all of them.
    Contract: *exact*.

    A NaN in ``z`` gives the code NaN in its channel and the index -1 at its position, which no codebook has;
    +-inf are the outermost levels. The gradient passes straight through the rounding and not through the
    bound: d codes / d z = (1 - tanh(z + shift)^2) half_l / (L // 2).

    Args:
        z: any rank up to 6, float32, float64, bfloat16 or float16; any strides. In float64 the formula itself
            decides.
        levels: how many levels each channel has, 2 to 1000; their product at most 2**31.
        variant: ``vidtok`` (also Cosmos) or ``elastictok``.
        dim: the channel dimension, of size len(levels).
        backend: a name to insist on; else the best that can run.

    Returns:
        ``codes``, (index of the level - L // 2) / (L // 2) computed in float32 (float64 for that) and rounded
        to the dtype of ``z``, in the strides that ``torch.empty_like(z)`` has; ``indices`` int32, contiguous,
        the first channel fastest.

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
    if native.is_transformed():
        backends.insist_on_reference("fsq", backend)
        return FSQOutput(*reference.fsq_straight_through(z, levels, variant=variant, dim=call.dim))
    return FSQOutput(*torch.ops.vtok_fast.fsq_quantize(*call, backend))


def fsq_decode(
    indices: Tensor, levels: Sequence[int], *, dtype: torch.dtype = torch.float32, dim: int = 1
) -> Tensor:
    """The codes of ``indices``: the inverse of `fsq_quantize`, bit for bit in the same dtype.

    Args:
        indices: any integer dtype, any shape. An index outside [0, codebook size), such as the -1 of a NaN,
            gives codes NaN.
        levels: as in `fsq_quantize`.
        dtype: of the result.
        dim: where the result has its channel dimension.

    Returns:
        ``indices.shape`` with len(levels) inserted at ``dim``; the channels are innermost in memory, which
        for (B, C, T, H, W) is ``channels_last_3d``.

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
        raise ValueError(
            f"dim: expected -{rank} to {rank - 1} for indices of shape {tuple(indices.shape)}, got {dim}"
        )
    call = FSQDecodeCall(indices, levels, dtype, dim % rank)
    if not native.is_plain(indices):
        return decode_reference(call)
    return backends.select("fsq_decode", call).run(call)


def fsq_entropy_loss(
    z: Tensor, levels: Sequence[int], *, inv_temperature: float = 100.0, gamma: float = 1.0, dim: int = 1
) -> tuple[Tensor, Tensor]:
    """VidTok's two training terms, factorized per channel: no (tokens x codebook) tensor exists.

    Every token has the distribution softmax(2 inv_temperature z . code) over the codebook. The first term is
    the mean entropy of a token minus ``gamma`` times the entropy of the mean distribution, the second is
    mean((z - codes)^2), whose gradient reaches ``z`` and not the codes.

    Logits add up over channels, so a token's distribution is a product: its entropy is the sum of the
    channels', and the mean distribution is one GEMM between the outer products of two halves of the channels;
    memory is tokens x sqrt(codebook) + codebook. VidTok clamps probabilities at 1e-5 inside the logarithm.
    That is done here in the mean distribution, where it matters and is the same; a token's entropy is exact
    instead, which is larger by the sum of p log(1e-5 / p) over the codes with p < 1e-5 (3.2368 instead of
    3.2358 for four channels of 8 levels). Plain PyTorch operations on every device.

    Args:
        z: the latent before quantization, channels at ``dim``; computed in float32, or float64 for that.
        levels, dim: as in `fsq_quantize`.

    Returns:
        (entropy term, commitment term), scalars in float32 or float64.

    Raises:
        TypeError, ValueError: an argument does not fit, or ``z`` has no token; names it and its value.
    """
    levels = check_levels(levels)
    dim = _channel_dim(z, levels, dim)
    if z.numel() == 0:
        raise ValueError(f"z: expected at least one token, got shape {tuple(z.shape)}")
    codes = fsq_quantize(z.detach(), levels, dim=dim).codes
    return reference.fsq_entropy_loss(z, levels, codes, inv_temperature=inv_temperature, gamma=gamma, dim=dim)


def check_levels(levels: Sequence[int]) -> tuple[int, ...]:
    """The levels as a tuple, or a ValueError that says what is wrong with them."""
    # Tracing through a cache makes torch warn
    possible = _possible.__wrapped__ if torch.compiler.is_compiling() else _possible
    try:
        return possible(tuple(map(operator.index, levels)))
    except TypeError:
        raise ValueError(f"levels: expected a sequence of ints, got {levels!r}") from None


@functools.lru_cache(maxsize=256)
def _possible(levels: tuple[int, ...]) -> tuple[int, ...]:
    if not levels or not all(2 <= level <= reference.MAX_LEVEL for level in levels):
        raise ValueError(f"levels: expected one or more ints from 2 to {reference.MAX_LEVEL}, got {levels}")
    if math.prod(levels) > 2**31:
        raise ValueError(
            f"levels: a codebook of at most 2**31, so that int32 holds its indices, got {levels} with "
            f"{math.prod(levels)}"
        )
    return levels


def _channel_dim(z: Tensor, levels: tuple[int, ...], dim: int) -> int:
    """``dim`` counted from the front."""
    if not z.dtype.is_floating_point:
        raise TypeError(f"z: expected a floating point dtype, got {z.dtype}")
    if not -z.dim() <= dim < z.dim():
        raise ValueError(
            f"dim: expected -{z.dim()} to {z.dim() - 1} for z of shape {tuple(z.shape)}, got {dim}"
        )
    if z.shape[dim] != len(levels):
        raise ValueError(
            f"levels: expected one for each of the {z.shape[dim]} channels of z (shape {tuple(z.shape)}, "
            f"dim {dim}), "
            f"got {len(levels)}: {levels}"
        )
    return dim % z.dim()


def run(call: FSQCall, backend: str | None) -> tuple[Tensor, Tensor]:
    """Runs a checked call on the chosen backend."""
    return backends.select("fsq", call, backend).run(call)


# ---- backends ----------------------------------------------------------------------------------------------


def run_reference(call: FSQCall) -> tuple[Tensor, Tensor]:
    codes, indices = reference.fsq_quantize(call.z, call.levels, variant=call.variant, dim=call.dim)
    return torch.empty_like(call.z).copy_(codes), indices.contiguous()


def decode_reference(call: FSQDecodeCall) -> Tensor:
    return reference.fsq_decode(call.indices, call.levels, dtype=call.dtype, dim=call.dim)


backends.register(
    "fsq",
    backends.Backend("sm80", sm80.why_not, sm80.run),
    backends.Backend("cpu", cpu.why_not, cpu.run),
    backends.Backend("reference", lambda call: None, run_reference),
)
backends.register(
    "fsq_decode",
    backends.Backend("sm80", sm80.why_not_decode, sm80.decode),
    backends.Backend("reference", lambda call: None, decode_reference),
)
# ---- torch.library -----------------------------------------------------------------------------------------


@torch.library.impl("vtok_fast::fsq_quantize", ("cpu", "cuda"))
def _impl(z, levels, variant, dim, backend):
    return run(FSQCall(z, tuple(levels), variant, dim), backend)


@torch.library.register_fake("vtok_fast::fsq_quantize")
def _fake(z, levels, variant, dim, backend):
    return empty_outputs(z, dim)
