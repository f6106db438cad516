"""How a swapped FSQ is judged, whichever library it is from.

The op's index is the formula's in float64, and must be. Eager code evaluates the formula in float32, so near
a threshold it can name the level next to it: such tokens are counted, and each must lie as close to a
threshold as float32's
    roundings reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtok_fast.parity import Parity
from vtok_fast.reference.fsq import bound_constants
from vtok_fast.reference.fsq import fsq_quantize as reference

EPS32 = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class TokensAgainstEager(Parity):
    """*exact* against float64, with a ``note`` on the tokens that ``differ`` from the eager ones."""

    note: str = ""
    differ: int = 0


def compare(z: Tensor, levels: Sequence[int], dim: int, indices: Tensor, eager: Tensor) -> TokensAgainstEager:
    """Judges the indices of a latent ``z`` with its channels at ``dim``."""
    _, expected = reference(z.double(), levels, dim=dim)
    wrong = int((indices != expected).sum())
    differ = (indices != eager) & (eager >= 0)
    furthest, unexplained = 0.0, 0
    if count := int(differ.sum()):
        at = z.double().movedim(dim, -1)[differ]
        near = torch.zeros(count, dtype=torch.bool)
        ulps = torch.full((count,), torch.inf, dtype=torch.float64)
        for channel, level in enumerate(levels):
            half_l, offset, shift = bound_constants(level)
            t = torch.tanh(at[:, channel] + shift)
            y = t * half_l - offset
            distance = ((y - y.floor()) - 0.5).abs()
            # float32 rounds shift, sum, tanh (2 ulp), product and difference, each within half an ulp of at
            # most half_l + 1.
            near |= distance <= 4 * EPS32 * (half_l + 1)
            in_z = distance / (half_l * (1 - t * t)).clamp_min(1e-300)
            ulps = torch.minimum(ulps, in_z / (EPS32 * (at[:, channel].abs() + abs(shift)).clamp_min(EPS32)))
        furthest, unexplained = float(ulps.max()), int((~near).sum())
    note = f"{count} of {differ.numel()} tokens differ from eager's float32"
    if count:
        note += f", the furthest {furthest:.1f} ulp from a threshold" + (
            f"; {unexplained} are unexplained" if unexplained else ""
        )
    return TokensAgainstEager(
        "exact",
        not wrong and not unexplained,
        wrong / max(indices.numel(), 1),
        0.0,
        mismatches=wrong + unexplained,
        note=note,
        differ=count,
    )
