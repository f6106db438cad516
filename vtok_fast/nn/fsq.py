"""``nn.FSQ``: finite scalar quantization as a module without parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vtok_fast.ops.fsq import VARIANTS, FSQOutput, check_levels, fsq_decode, fsq_quantize


class FSQ(nn.Module):
    """Quantizes a latent with len(levels) channels at ``dim``; no parameters, no buffers, no state keys.

    Options as in `vtok_fast.fsq_quantize`.

    Raises ValueError for levels or a variant that do not exist; ``forward`` and ``decode`` raise as the
    functions that they call.
    """

    def __init__(
        self, levels: Sequence[int], *, variant: str = "vidtok", dim: int = 1, backend: str | None = None
    ):
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
        self.levels = check_levels(levels)
        self.variant, self.dim, self.backend = variant, dim, backend

    @property
    def codebook_size(self) -> int:
        """How many indices there are."""
        return math.prod(self.levels)

    def forward(self, z: Tensor) -> FSQOutput:
        """(codes, indices) of ``z``; see `vtok_fast.fsq_quantize`."""
        return fsq_quantize(z, self.levels, variant=self.variant, dim=self.dim, backend=self.backend)

    def decode(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The codes of ``indices``; see `vtok_fast.fsq_decode`."""
        return fsq_decode(indices, self.levels, dtype=dtype, dim=self.dim)

    def extra_repr(self) -> str:
        return f"levels={list(self.levels)}, variant={self.variant!r}, dim={self.dim}"
