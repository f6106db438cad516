"""The two bottlenecks of VidTok: finite scalar quantization (arXiv 2309.15505), and a Gaussian latent with
its KL loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from typing_extensions import Self

LOG_FLOOR = 1e-5  # the official code clamps probabilities there, inside the logarithm of an entropy
ELEMENTS_AT_ONCE = 1 << 24  # of the dense probability table, when it is asked for


class Regularized(NamedTuple):
    """What a regularizer returns: the latent for the decoder, the integer indices (fsq only), and the loss
    (where asked for)."""

    codes: Tensor
    indices: Tensor | None
    loss: Tensor | None


class FSQRegularizer(nn.Module):
    """Finite scalar quantization: each latent channel is bounded by tanh and rounded to one of its levels.

    For L levels: half = (L - 1)(1 + eps)/2, offset = 1/2 if L is even else 0, shift = atanh(offset/half);
    q = round(tanh(z + shift) half - offset), code = q/(L//2), index = sum_d (q_d + L_d//2) prod_{e<d} L_e
    (first channel fastest). The gradient passes straight through the rounding alone. Computed in float32
    (float64 for float64 input).

    The training loss is w (mean token entropy - diversity_gamma * entropy of the mean distribution) +
    commitment_loss_weight * mean (z - code)^2, with p = softmax(2 inv_temperature z . codebook). w falls
    linearly from entropy_loss_annealing_factor * entropy_loss_weight to entropy_loss_weight in
    entropy_loss_annealing_steps steps. The logits are sums over channels, so p is a
    product over channels: the mean token entropy is a sum of small entropies, and the mean distribution one
    matrix product. The official code clamps p at 1e-5 inside the logarithm, which does not factorize (3.2358
    against 3.2368 for 8^4 codes): `clamp_entropy=True` computes that value from the dense table, in pieces.

    Args:
        levels: number of levels of each channel; all at least 2, product at most 2**31.
        dim: input channels; if not len(levels) * num_codebooks, a linear layer before and after changes them.
        num_codebooks: channels are split into that many groups, quantized alike; the indices get one more
            axis, the last.
    """

    def __init__(
        self,
        levels: Sequence[int],
        *,
        dim: int | None = None,
        num_codebooks: int = 1,
        entropy_loss_weight: float = 0.0,
        entropy_loss_annealing_steps: int = 0,
        entropy_loss_annealing_factor: float = 1.0,
        commitment_loss_weight: float = 0.0,
        diversity_gamma: float = 1.0,
        inv_temperature: float = 100.0,
        eps: float = 1e-3,
        clamp_entropy: bool = False,
    ):
        super().__init__()
        self.levels = tuple(int(level) for level in levels)
        self.eps = eps
        self.num_codebooks = num_codebooks
        self.codebook_size = math.prod(self.levels)
        self.entropy_loss_weight = entropy_loss_weight
        self.entropy_loss_annealing_steps = entropy_loss_annealing_steps
        self.entropy_loss_annealing_factor = entropy_loss_annealing_factor
        self.commitment_loss_weight = commitment_loss_weight
        self.diversity_gamma = diversity_gamma
        self.inv_temperature = inv_temperature
        self.clamp_entropy = clamp_entropy
        inner = len(self.levels) * num_codebooks
        dim = inner if dim is None else dim
        self.project_in = nn.Linear(dim, inner) if dim != inner else nn.Identity()
        self.project_out = nn.Linear(inner, dim) if dim != inner else nn.Identity()

        self.set_constants()

    def set_constants(self, device: torch.device | None = None) -> None:
        target = torch.empty(0, device=device).device
        # Arithmetic on meta imports PyTorch's compiler, which takes as long as PyTorch itself.
        device = torch.device("cpu") if target.type == "meta" else target
        size = torch.tensor(self.levels, device=device)
        offset = torch.where(size % 2 == 0, 0.5, 0.0)
        half = (size - 1) * (1 + self.eps) / 2  # float32, as are all constants of the official code
        constants = {
            "reach": half,
            "offset": offset,
            "shift": torch.atanh(offset / half),
            "width": size // 2,
            "basis": torch.cumprod(torch.tensor((1, *self.levels[:-1]), device=device), 0),
        }
        for name, value in constants.items():
            self.register_buffer(name, value.to(target), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.set_constants(self.basis.device)  # `model.half()` must not move the thresholds
        return self

    def forward(self, z: Tensor, *, step: int | None = None) -> Regularized:
        """Quantize z (B, C, ...) with C = dim. With `step`, the number of training steps so far, also the
        loss.

        Returns codes like z, indices (B, ...) int32 (with num_codebooks > 1: (B, ..., num_codebooks)), and
        the loss, a scalar. NaN in z gives NaN codes and an undefined index.
        """
        z = self.project_in(z.movedim(1, -1))
        wide = z if z.dtype == torch.float64 else z.float()
        wide = wide.unflatten(-1, (self.num_codebooks, len(self.levels)))
        bounded = torch.tanh(wide + self.shift) * self.reach - self.offset
        rounded = bounded.detach().round()
        codes = (
            rounded + (bounded - bounded.detach())
        ) / self.width  # the value is exact, the gradient passes through bounded
        indices = ((rounded.to(torch.int64) + self.width) * self.basis).sum(-1).to(torch.int32)
        loss = None if step is None else self.loss(wide, codes.detach(), step)
        codes = self.project_out(codes.flatten(-2).to(z.dtype)).movedim(-1, 1)
        return Regularized(codes, indices.squeeze(-1) if self.num_codebooks == 1 else indices, loss)

    def decode(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Codes (B, dim, ...) of indices as `forward` returns them."""
        if self.num_codebooks == 1:
            indices = indices.unsqueeze(-1)
        size = self.basis.new_tensor(self.levels)
        q = indices.unsqueeze(-1).long() // self.basis % size - self.width
        codes = (q / self.width).flatten(-2).to(dtype)
        # Contiguous, as forward gives them: what a convolution makes of codes has their layout.
        return self.project_out(codes).movedim(-1, 1).contiguous()

    def entropy_weight(self, step: int) -> float:
        if step >= self.entropy_loss_annealing_steps:
            return self.entropy_loss_weight
        start = self.entropy_loss_annealing_factor * self.entropy_loss_weight
        return start - step / self.entropy_loss_annealing_steps * (start - self.entropy_loss_weight)

    def loss(self, z: Tensor, codes: Tensor, step: int) -> Tensor:
        """The training loss for z and codes (..., num_codebooks, len(levels))."""
        commitment = F.mse_loss(z, codes)
        with torch.autocast(z.device.type, enabled=False):
            log_p = self.channel_log_probabilities(z)
            p = [log.exp() for log in log_p]
            if self.clamp_entropy:
                token = self.clamped_token_entropy(p)
            else:
                token = -sum((a * b).sum(-1).mean() for a, b in zip(p, log_p, strict=True))
            entropy = token - self.diversity_gamma * clamped_entropy(mean_distribution(p))
        return self.entropy_weight(step) * entropy + self.commitment_loss_weight * commitment

    def channel_log_probabilities(self, z: Tensor) -> list[Tensor]:
        """Per channel d, log softmax over its levels: a list of (n, L_d). p of a codebook entry is the
        product of its channels'."""
        z = z.reshape(-1, len(self.levels))
        result = []
        for d, levels in enumerate(self.levels):
            values = (torch.arange(levels, device=z.device) - levels // 2).to(z.dtype) / (levels // 2)
            result.append(torch.log_softmax(2 * self.inv_temperature * z[:, d, None] * values, dim=-1))
        return result

    def clamped_token_entropy(self, p: list[Tensor]) -> Tensor:
        """Mean over tokens of -sum p log max(p, 1e-5) over all codebook entries. Each piece is recomputed in
        the backward pass."""
        tokens = p[0].shape[0]
        step = max(1, ELEMENTS_AT_ONCE // self.codebook_size)
        total = 0.0
        for i in range(0, tokens, step):
            part = [x[i : i + step] for x in p]
            total = total + checkpoint(lambda *x: clamped_entropy(_joint(x)), *part, use_reentrant=False)
        return total / tokens


def clamped_entropy(p: Tensor) -> Tensor:
    """-sum p log max(p, 1e-5)"""
    return -(p * p.clamp(min=LOG_FLOOR).log()).sum()


def _joint(parts: Sequence[Tensor]) -> Tensor:
    """(n, L_1), (n, L_2), ... -> (n, L_1 L_2 ...), the products of one entry of each."""
    joint = parts[0]
    for p in parts[1:]:
        joint = (joint.unsqueeze(-1) * p.unsqueeze(-2)).flatten(1)
    return joint


def mean_distribution(per_channel: list[Tensor]) -> Tensor:
    """Mean over n of the product distribution: one matrix product of the two halves of the channels.
    (codebook_size,)"""
    split = (len(per_channel) + 1) // 2
    first = _joint(per_channel[:split])
    if split == len(per_channel):
        return first.mean(0)
    return (first.T @ _joint(per_channel[split:])).flatten() / first.shape[0]


class KLRegularizer(nn.Module):
    """A diagonal Gaussian latent: z holds mean and log-variance stacked on the channel axis.

    loss = 1/2 sum(mean^2 + var - 1 - log var) over channels, time, height and width, divided by the batch;
    log var is clamped to [-30, 20].
    """

    def forward(self, z: Tensor, *, step: int | None = None, sample: bool = False) -> Regularized:
        """z (B, 2C, ...) -> codes (B, C, ...): the mean, or with `sample` a draw. With `step` (its value is
        not used) also the loss."""
        mean, logvar = z.chunk(2, dim=1)
        logvar = logvar.clamp(-30.0, 20.0)
        codes = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean) if sample else mean
        loss = (
            None if step is None else 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum() / z.shape[0]
        )
        return Regularized(codes, None, loss)
