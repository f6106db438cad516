"""The adapter for vector-quantize-pytorch: its ``FSQ``, alone or as the layers of a ``ResidualFSQ``."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vtok_fast.ops.fsq import fsq_quantize
from vtok_fast.parity import Parity
from vtok_fast.reference.fsq import MAX_LEVEL
from vtok_fast.reference.fsq import fsq_quantize as in_float64
from vtok_fast.swap.adapters.fsq_parity import compare
from vtok_fast.swap.adapters.layers import Answer, Table, lookup
from vtok_fast.swap.patch import Skip, Swap
from vtok_fast.swap.results import equal

PACKAGE = "vector_quantize_pytorch"


def propose(module: nn.Module) -> Answer:
    return lookup(module, _SWAPS, f"{PACKAGE}.finite_scalar_quantization") or lookup(
        module, _SIGNS, f"{PACKAGE}.lookup_free_quantization"
    )


def _propose_fsq(fsq: nn.Module) -> list[Swap] | Skip:
    if fsq.orthogonal_rotation:
        return Skip("orthogonal_rotation has no kernel")
    if fsq.preserve_symmetry:
        return [
            Swap(
                "the same roundings in place, without gradients",
                symmetric,
                sample=_sample,
                judge=equal,
                exact=symmetric,
            )
        ]
    if fsq.bound_hard_clamp:
        return Skip("bound_hard_clamp without preserve_symmetry has no kernel")
    levels = tuple(fsq._levels.tolist())
    if not all(2 <= level <= MAX_LEVEL for level in levels) or math.prod(levels) > 2**31:
        return Skip(f"levels {list(levels)}: the op takes 2 to {MAX_LEVEL}, and at most 2**31 codes")

    def forward(fsq: nn.Module, z: Tensor) -> tuple[Tensor, Tensor | None]:
        if not _in_float32(fsq, z):
            return type(fsq).forward(fsq, z)
        return _around(fsq, z, lambda z, dim: fsq_quantize(z, levels, dim=dim))

    def judge(fast: tuple, eager: tuple, z: Tensor) -> Parity:
        return compare(z, levels, -1, *(result[1].reshape(z.shape[:-1]) for result in (fast, eager)))

    def codes(fsq: nn.Module, z: Tensor) -> tuple[Tensor, None]:
        return _around(fsq, z, lambda z, dim: (in_float64(z.double(), levels, dim=dim)[0].to(z.dtype), None))

    what = "thresholds instead of tanh and rounding"
    if not fsq.return_indices:
        return [
            Swap(
                what,
                forward,
                sample=_sample,
                reference=codes,
                judge=lambda fast, eager, ref64: equal(fast, ref64),
            )
        ]
    return [Swap(what, forward, sample=_sample, reference=_projected, judge=judge)]


def _in_float32(fsq: nn.Module, z: Tensor) -> bool:
    """Whether the library quantizes in float32 or float64, and not in the input's 16 bits."""
    return (
        z.dtype in (torch.float32, torch.float64)
        or fsq.force_quantization_f32
        and z.dtype not in fsq.allowed_dtypes
    )


def _around(fsq: nn.Module, z: Tensor, quantize) -> tuple[Tensor, Tensor | None]:
    """What stands around the quantizer: channels to the end and back, projections, codebooks, indices if
    wanted."""
    first = z.dim() >= 4 or fsq.channel_first
    if not fsq.has_projections and fsq.num_codebooks == 1:  # then the channels can stay where they are
        codes, indices = quantize(z, 1 if first else -1)
        indices = indices.unsqueeze(-1) if fsq.keep_num_codebooks_dim and indices is not None else indices
    else:
        z = fsq.project_in(z.movedim(1, -1) if first else z).unflatten(-1, (fsq.num_codebooks, -1))
        codes, indices = quantize(z, -1)
        codes = fsq.project_out(codes.flatten(-2))
        codes = codes.movedim(-1, 1) if first else codes
        indices = indices if fsq.keep_num_codebooks_dim or indices is None else indices.squeeze(-1)
    return codes, indices if fsq.return_indices else None


def symmetric(fsq: nn.Module, z: Tensor) -> tuple[Tensor, Tensor | None]:
    """``preserve_symmetry=True``: the library's own operations in its order, on one buffer. It counts levels
    by floor, whose straight-through form changes no value, so without gradients that is left out."""
    if torch.is_grad_enabled() or fsq.training and fsq.noise_dropout > 0 or not _in_float32(fsq, z):
        return type(fsq).forward(fsq, z)

    def quantize(z: Tensor, dim: int) -> tuple[Tensor, Tensor | None]:
        last = z.movedim(dim, -1)
        wide = last if last.dtype in fsq.allowed_dtypes else last.float()
        steps = fsq._levels - 1
        size = 2.0 / steps
        y = wide.clamp(-1.0, 1.0) if fsq.bound_hard_clamp else torch.tanh(wide)
        codes = y.add_(1).mul_(steps).div_(2.0).add_(0.5).floor_().mul_(size).sub_(1.0)
        indices = None
        if fsq.return_indices:
            indices = codes.add(1.0).div_(size).mul_(fsq._basis).sum(-1).round_().to(torch.int32)
        return codes.to(z.dtype).movedim(-1, dim), indices

    return _around(fsq, z, quantize)


def _sample(fsq: nn.Module) -> tuple[Tensor]:
    device = fsq._levels.device
    dtype = next((p.dtype for p in fsq.parameters()), torch.float32)
    size = (2, fsq.dim, 200) if fsq.channel_first else (2, 200, fsq.dim)
    return (torch.randn(size, dtype=dtype, device=device) * 2,)


def _projected(fsq: nn.Module, z: Tensor) -> Tensor:
    """What the quantizer itself gets, in float64, channels last."""
    z = z.movedim(1, -1) if z.dim() >= 4 or fsq.channel_first else z
    return fsq.project_in(z).unflatten(-1, (fsq.num_codebooks, -1)).double()


_SWAPS: Table = {"FSQ": _propose_fsq}
_SIGNS: Table = {"LFQ": lambda fsq: Skip("a quantizer of signs: there is no op for it")}
