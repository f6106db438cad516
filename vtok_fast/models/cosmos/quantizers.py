"""The bottlenecks of the Cosmos tokenizer: finite scalar quantization, the same in residual steps, and
none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vtok_fast.models.common.regularizers import FSQRegularizer, Regularized


class FSQuantizer(FSQRegularizer):
    """FSQ as in VidTok; the official loss is zero. `constants` keeps the official buffers in the state dict.

    The official class rounds its codes to bfloat16 by default, whatever the model computes in; here they have
    the dtype of z.
    """

    def __init__(
        self,
        levels: Sequence[int],
        *,
        dim: int | None = None,
        num_codebooks: int = 1,
        constants: bool = False,
    ):
        self.constants = constants
        super().__init__(levels, dim=dim, num_codebooks=num_codebooks)

    def set_constants(self, device: torch.device | None = None) -> None:
        super().set_constants(device)
        if self.constants:
            self.register_buffer("_levels", torch.tensor(self.levels, dtype=torch.int32, device=device))
            self.register_buffer("_basis", self.basis.to(torch.int32))
            q = (
                torch.arange(self.codebook_size, device=device)[:, None] // self.basis % self._levels
                - self.width
            )
            self.register_buffer("implicit_codebook", (q / self.width).to(torch.bfloat16))


class ResidualFSQuantizer(nn.Module):
    """FSQ of z, then of what is left of it, and so on: the codes are the sum. Its indices have an axis more
    than `Tokens`."""

    def __init__(self, levels: Sequence[int], *, num_quantizers: int):
        super().__init__()
        self.layers = nn.ModuleList(FSQuantizer(levels) for _ in range(num_quantizers))

    def forward(self, z: Tensor) -> Regularized:
        """z (B, C, t, h, w) -> codes like z, indices (B, num_quantizers, t, h, w) int32."""
        rest, total, indices = z, torch.zeros_like(z), []
        for layer in self.layers:
            codes, index, _ = layer(rest)
            rest, total = rest - codes.detach(), total + codes
            indices.append(index)
        return Regularized(total, torch.stack(indices, dim=1), None)

    def decode(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Codes (B, C, t, h, w) of indices as `forward` returns them."""
        return sum(
            layer.decode(index, dtype) for layer, index in zip(self.layers, indices.unbind(1), strict=True)
        )


class Identity(nn.Module):
    """The bottleneck of an autoencoder without one."""

    def forward(self, z: Tensor, *, step: int | None = None) -> Regularized:
        return Regularized(z, None, None if step is None else z.new_zeros(()))
