"""SoftVQ (arXiv 2412.10958): a token becomes the softmax-weighted mean of the codewords."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOG_FLOOR = 1e-5  # inside the logarithm of the mean distribution


class SoftVQ(nn.Module):
    """z -> softmax(z . E^T / temperature) . E, with E (codebooks, size, dim) and the tokens dealt to the
    codebooks in order.

    The logits see E as a constant: codewords learn from the mean alone. In training, loss = entropy_weight
    (mean entropy of a token's distribution - entropy of the mean distribution) at entropy_temperature, the
    mean over codebooks.

    Args:
        normalize: scale tokens and codewords to length 1 first.
    """

    def __init__(
        self,
        codebooks: int,
        size: int,
        dim: int,
        *,
        temperature: float = 0.07,
        normalize: bool = True,
        entropy_weight: float = 0.01,
        entropy_temperature: float = 0.01,
    ):
        super().__init__()
        self.temperature, self.normalize = temperature, normalize
        self.entropy_weight, self.entropy_temperature = entropy_weight, entropy_temperature
        self.codebook = nn.Parameter(torch.randn(codebooks, size, dim))

    def forward(self, z: Tensor, *, loss: bool = False) -> tuple[Tensor, Tensor | None]:
        """(codes like z, loss or None) of z (B, N, dim); N a multiple of the codebooks. The softmax is in
        float32 at least."""
        words = self.codebook
        if self.normalize:
            z, words = F.normalize(z, dim=-1), F.normalize(words, dim=-1)
        dealt = z.unflatten(1, (words.shape[0], -1))
        with torch.autocast(z.device.type, enabled=False):
            wide = torch.float64 if z.dtype == torch.float64 else torch.float32
            dealt, words = dealt.to(wide), words.to(wide)
            logits = dealt @ words.detach().mT
            codes = torch.softmax(logits / self.temperature, dim=-1) @ words
            value = self.loss(logits) if loss else None
        return codes.flatten(1, 2).to(z.dtype), value

    def loss(self, logits: Tensor) -> Tensor:
        log_p = torch.log_softmax(logits / self.entropy_temperature, dim=-1)
        log_p = log_p.movedim(1, 0).flatten(1, 2)  # (codebooks, tokens, size)
        p = log_p.exp()
        mean = p.mean(1)
        token, spread = -(p * log_p).sum(-1).mean(), -(mean * (mean + LOG_FLOOR).log()).sum(-1).mean()
        return self.entropy_weight * (token - spread)
