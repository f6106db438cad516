"""What it means to score, choose, pack and unpack the tokens of a video, in plain PyTorch.

InfoTok (arXiv 2512.16975): a token's score is the mean absolute error of its pixels after a full decode, and
the highest-scoring tokens of a clip are kept. ElasticTok (arXiv 2410.08368) and AdapTok (arXiv 2505.17011)
keep a prefix of each block instead.

Means are defined on integers, so that no order of summation can change a bit: every value is cut to a
multiple of 2^-30 and to at most 4096, which float32 and float64 do exactly; the sum is an int64; one division
in float64 makes it a mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

METHODS = ("topk", "threshold", "order", "order_strided")
STRATEGIES = ("elbo", "global_elbo", "bin", "elbo_ema")
SCALE = 2.0**30
CLIP = 4096.0
MAX_COUNT = 2**20  # values under one mean: MAX_COUNT * CLIP * SCALE = 2^62 fits int64
MIN_RATE = 1 / 16
BINS = 4


def fixed(value: Tensor) -> Tensor:
    """Multiples of 2^-30 as int64, towards zero; beyond +-4096, and for NaN, what +-4096 and 0 have."""
    return (value.clamp(-CLIP, CLIP).nan_to_num(0.0) * SCALE).to(torch.int64)


def router_scores(video: Tensor, reconstruction: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """(B, t, h, w): mean |video - reconstruction| over the channels and pixels of each cell; frame 0 is a
    cell's whole time."""
    wide = torch.float64 if video.dtype == torch.float64 else torch.float32
    difference = (video.to(wide) - reconstruction.to(wide)).abs()
    parts = []
    for part, frames in ((difference[:, :, :1], 1), (difference[:, :, 1:], grid[0])):
        b, c, t, h, w = part.shape
        cells = part.reshape(b, c, t // frames, frames, h // grid[1], grid[1], w // grid[2], grid[2])
        over = (1, 3, 5, 7)
        mean = fixed(cells).sum(over).double() / (c * frames * grid[1] * grid[2] * SCALE)
        parts.append(mean.masked_fill(cells.isnan().any(7).any(5).any(3).any(1), torch.nan))
    return torch.cat(parts, 1).to(wide)


def mean_scores(scores: Tensor) -> Tensor:
    """float64 (B,): the mean of each clip's scores; a NaN counts as 4096, the most that a score can be."""
    flat = scores.flatten(1).nan_to_num(nan=CLIP)
    return fixed(flat).sum(1).double() / (flat.shape[1] * SCALE)


def rates(scores: Tensor, rate: Tensor, strategy: str, elbo_mean: Tensor | None) -> Tensor:
    """float64 (B,): the share of each clip's tokens to keep, for a float64 rate of one or B elements."""
    rate = rate.expand(scores.shape[0])
    if strategy == "elbo" or elbo_mean is None:
        return rate
    rate = rate * mean_scores(scores) / elbo_mean.to(scores.device, torch.float64)
    if strategy == "bin":
        rate = torch.round(rate * BINS) / BINS
    return rate.nan_to_num(1.0).clamp(MIN_RATE, 1.0)


def update_mean(elbo_mean: Tensor, scores: Tensor, decay: float) -> None:
    """Moves a running mean, in place, towards the mean of these clips; one that is NaN becomes it."""
    batch = mean_scores(scores).mean()
    mean = elbo_mean.double()
    elbo_mean.copy_(torch.where(mean.isnan(), batch, decay * mean + (1 - decay) * batch))


def counts(rate: Tensor, tokens: int, released: bool) -> Tensor:
    """int64: how many of ``tokens`` a rate keeps; ``released`` counts as InfoTok's code, whose rate 1 drops
    one token."""
    rate = rate.clamp(0.0, 1.0)
    if released:
        return (tokens - 1 - quantile_rank(rate, tokens)[0]).clamp_min(0)
    return torch.floor(rate * tokens + 0.5).to(torch.int64)


def quantile_rank(rate: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Where ``torch.quantile(scores.float(), float(1 - rate))`` lies among ``tokens`` ascending scores, for a
    rate in float32: the rank below it, int64, and how far from that to the next, 0 <= float32 < 1."""
    rank = (1 - rate.float()) * max(tokens - 1, 0)
    below = rank.to(torch.int64)
    return below, rank - below


def above_quantile(scores: Tensor, rate: Tensor) -> Tensor:
    """The keep mask of InfoTok's code: the scores of each clip above their quantile 1 - rate. ``rate`` is
    float32 (B,)."""
    flat = scores.flatten(1)
    if not flat.numel():
        return torch.zeros_like(scores, dtype=torch.bool)
    bounds = [torch.quantile(clip.float(), 1 - r) for clip, r in zip(flat, rate)]
    return (flat > torch.stack(bounds).to(scores.dtype)[:, None]).view(scores.shape)


def select_tokens(scores: Tensor, budget: Tensor, *, method: str = "topk", stride: int = 4) -> Tensor:
    """The keep mask; ``budget`` is int64 (B,), or (B, blocks) for the two orders, and is clamped to what
    exists."""
    if method in ("order", "order_strided"):
        blocks = scores.shape[1]
        size = scores[0, 0].numel() if scores.shape[0] else 0
        position = torch.arange(size, device=scores.device)
        rank = position if method == "order" else strided_rank(position, size, stride)
        budget = budget.unsqueeze(1) if budget.dim() == 1 else budget
        return (rank < budget.unsqueeze(-1)).expand(-1, blocks, -1).reshape(scores.shape).contiguous()
    flat = scores.flatten(1)
    tokens = flat.shape[1]
    budget = budget.clamp(0, tokens).unsqueeze(1)
    ordered, order = flat.sort(dim=1, descending=True, stable=True)  # NaN first, equals by position
    if method == "topk":
        kept = torch.arange(tokens, device=scores.device) < budget
        return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, order, kept).view(scores.shape)
    if tokens == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    bound = ordered.gather(1, budget.clamp_max(tokens - 1))
    above = (flat > bound) | (flat.isnan() & ~bound.isnan())
    return (above | (budget == tokens)).view(scores.shape)


def strided_rank(position: Tensor, size: int, stride: int) -> Tensor:
    """Where a position comes in the order 0, stride, 2 stride, ..., 1, stride + 1, ..."""
    start = position % stride
    return start * (size // stride) + start.clamp_max(size % stride) + position // stride


def pack_tokens(tokens: Tensor, keep: Tensor, capacity: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Values (N, C), or (N,) where tokens have no channels; int32 positions within their clip; int32
    cu_seqlens.

    With a ``capacity``, N is that: what exceeds it is left out, rows that are left over hold 0, their
        positions -1.
    """
    flat_keep = keep.flatten(1)
    last = tokens.flatten(1) if tokens.dim() == keep.dim() else tokens.flatten(2).transpose(1, 2)
    count = torch.nn.functional.pad(flat_keep.sum(1).cumsum(0), (1, 0))
    if capacity is None:
        clip, position = flat_keep.nonzero(as_tuple=True)
        return last[clip, position], position.to(torch.int32), count.to(torch.int32)
    # Without a size that depends on data: every token is written, those without a row to a row that is cut
    # off.
    row = (flat_keep.flatten().cumsum(0) - 1).where(flat_keep.flatten(), capacity).clamp_max(capacity)
    values = last.new_zeros(capacity + 1, *last.shape[2:]).index_copy(0, row, last.flatten(0, 1))
    position = torch.arange(flat_keep.shape[1], device=keep.device).repeat(flat_keep.shape[0])
    indices = torch.full((capacity + 1,), -1, device=keep.device).index_copy(0, row, position)
    return values[:capacity], indices[:capacity].to(torch.int32), count.clamp_max(capacity).to(torch.int32)


def unpack_tokens(values: Tensor, mask: Tensor, fill: float = 0.0) -> Tensor:
    """(B, C, *grid) or (B, *grid): row r of ``values`` goes to the r-th kept position, ``fill`` everywhere
    else."""
    flat = mask.flatten()
    row = (flat.cumsum(0) - 1).clamp(0, max(len(values) - 1, 0))
    there = flat & (flat.cumsum(0) <= len(values))
    if len(values) == 0:
        dense = values.new_full((flat.numel(), *values.shape[1:]), fill)
    else:
        dense = values[row].masked_fill(~(there if values.dim() == 1 else there.unsqueeze(1)), fill)
    dense = dense.view(*mask.shape, *values.shape[1:])
    return dense if values.dim() == 1 else dense.movedim(-1, 1)
