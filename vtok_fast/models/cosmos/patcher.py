"""Videos into patches and back: the two ends of a Cosmos tokenizer.

A patch of p frames, rows and columns becomes one position of p^3 times the channels. The first frame is its
own patch, as p copies.

The Haar wavelets of one round are sums and differences of pairs along t, h and w: eight bands, in the order
(t, h, w) = LLL, LLH, LHL, LHH, HLL, HLH, HHL, HHH, each 1/8 of a signed sum of 2x2x2 values; LLL is their
mean. They are computed as what they are, three stages of butterflies, and not as convolutions: so the factors
are exact powers of two, where the official float32 constants are about 3e-8 off in each round.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def haar(x: Tensor) -> Tensor:
    """One round: (B, C, 2t, 2h, 2w) -> (B, 8C, t, h, w), band by band."""
    for axis in (2, 3, 4):  # each new stage is the faster part of the band's number
        first, second = x.unflatten(axis, (-1, 2)).unbind(axis + 1)
        bands = 2 ** (axis - 2)
        pair = torch.stack((first + second, first - second), dim=1) * 0.5
        pair = pair.unflatten(2, (bands, -1))  # (B, 2, bands, C, ...)
        x = pair.transpose(1, 2).flatten(1, 3)
    return x


def inverse_haar(x: Tensor) -> Tensor:
    """The inverse of `haar`: (B, 8C, t, h, w) -> (B, C, 2t, 2h, 2w)."""
    for axis in (4, 3, 2):
        low, high = x.unflatten(1, (2 ** (axis - 2), 2, -1)).unbind(2)  # each (B, bands, C, t, h, w)
        x = torch.stack((low + high, low - high), dim=axis + 2).flatten(axis + 1, axis + 2).flatten(1, 2)
    return x


class Patcher(nn.Module):
    """(B, C, 1 + k*p, H, W) -> (B, C*p^3, 1 + k, H/p, W/p). `constants` keeps the official buffers in the
    state dict."""

    def __init__(self, patch_size: int, method: str = "haar", *, constants: bool = False):
        super().__init__()
        self.patch_size, self.method, self.constants = patch_size, method, constants
        self.set_constants()

    def set_constants(self, device: torch.device | None = None) -> None:
        if self.constants:
            _register_wavelets(self, device)
            self.register_buffer(
                "patch_size_buffer", torch.tensor([self.patch_size], dtype=torch.int32, device=device)
            )

    def forward(self, x: Tensor) -> Tensor:
        p = self.patch_size
        x = torch.cat((x[:, :, :1].expand(-1, -1, p - 1, -1, -1), x), dim=2) if p > 1 else x
        if self.method == "rearrange":
            # (B, C, t, p, h, p, w, p)
            x = x.unflatten(4, (-1, p)).unflatten(3, (-1, p)).unflatten(2, (-1, p))
            return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)
        while p > 1:
            x, p = haar(x), p // 2
        return x


class UnPatcher(nn.Module):
    """The inverse of `Patcher`."""

    def __init__(self, patch_size: int, method: str = "haar", *, constants: bool = False):
        super().__init__()
        self.patch_size, self.method, self.constants = patch_size, method, constants
        self.set_constants()

    def set_constants(self, device: torch.device | None = None) -> None:
        if self.constants:
            _register_wavelets(self, device)

    def forward(self, x: Tensor) -> Tensor:
        p = self.patch_size
        if self.method == "rearrange":
            x = (
                x.unflatten(1, (-1, p, p, p))
                .permute(0, 1, 5, 2, 6, 3, 7, 4)
                .flatten(6, 7)
                .flatten(4, 5)
                .flatten(2, 3)
            )
        while self.method == "haar" and p > 1:
            x, p = inverse_haar(x), p // 2
        return x[:, :, self.patch_size - 1 :]


def _register_wavelets(module: nn.Module, device: torch.device | None) -> None:
    module.register_buffer("wavelets", torch.tensor([0.5, 0.5], device=device).sqrt())
    module.register_buffer("_arange", torch.arange(2, device=device))
