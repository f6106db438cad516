"""How good a reconstruction is and what its tokens cost, by the definitions of torchmetrics.

Videos are (B, C, T, H, W) or (C, T, H, W) in [-1, 1]; what lies outside is clamped first. PSNR, SSIM and LPIPS need the package
``torchmetrics`` (``pip install "vtok-fast[train]"``), LPIPS also ``torchvision`` and its weights; nothing is downloaded.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vtok_fast.tokens import Tokens


def psnr(video: Tensor, original: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, of the squared error over all values together."""
    return _image().peak_signal_noise_ratio(*_pair(video, original), data_range=2.0).item()


def ssim(video: Tensor, original: Tensor) -> float:
    """Structural similarity, the mean over frames; frames of at least 11x11."""
    return _image().structural_similarity_index_measure(*_frames(video, original), data_range=2.0).item()


def lpips(video: Tensor, original: Tensor) -> float | None:
    """Learned perceptual distance (AlexNet), the mean over frames; None where torchvision or the network's weights are absent."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return None
    if not list(Path(torch.hub.get_dir(), "checkpoints").glob("alexnet-*.pth")):
        return None
    return _image().learned_perceptual_image_patch_similarity(*_frames(video, original), net_type="alex").item()


def bits(tokens: Tokens, codebook_size: int | None = None) -> int:
    """Bits of the tokens as they would be stored: ceil(log2(codebook_size)) for each index, and where some were dropped (-1) one
    for each position and none for those; of latents, the bits of their dtype.

    Raises ValueError for indices without a codebook_size of at least 2.
    """
    if tokens.indices is None:
        return tokens.latents.numel() * tokens.latents.element_size() * 8
    if codebook_size is None or codebook_size < 2:
        raise ValueError(f"codebook_size={codebook_size}: indices need the number of entries of their codebook")
    kept, positions = int((tokens.indices >= 0).sum()), tokens.indices.numel()
    return kept * (codebook_size - 1).bit_length() + (positions if kept < positions else 0)


def bits_per_pixel(tokens: Tokens, codebook_size: int | None = None) -> float:
    """`bits` for each pixel of each frame of the videos."""
    return bits(tokens, codebook_size) / (tokens.batch * math.prod(tokens.video_shape))


class CodebookUse(NamedTuple):
    """`used`: share of the codebook's entries that occur; `perplexity`: 2 to the entropy (in bits) of how often each one does."""

    used: float
    perplexity: float


def codebook_use(indices: Tensor, size: int) -> CodebookUse:
    """Of integer indices of any shape; negative ones (dropped tokens) do not count.

    Raises ValueError if there is none, or one lies beyond the codebook.
    """
    kept = indices[indices >= 0]
    if not kept.numel() or kept.max() >= size:
        raise ValueError(f"indices: {kept.numel()} of them, need at least one, and all below size={size}")
    counts = kept.unique(return_counts=True)[1].double()
    p = counts / counts.sum()
    return CodebookUse(len(counts) / size, math.exp(-(p * p.log()).sum().item()))


def _pair(video: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
    if video.shape != original.shape or video.dim() not in (4, 5):
        raise ValueError(f"video of {tuple(video.shape)}, original of {tuple(original.shape)}: expected (B, C, T, H, W) or "
                         "(C, T, H, W), both alike")
    return video.float().clamp(-1, 1), original.float().clamp(-1, 1)


def _frames(video: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (N, C, H, W)."""
    pair = _pair(video, original)
    return tuple(x.movedim(-4, -3).flatten(0, -4) for x in pair)


def _image():
    try:
        import torchmetrics.functional.image as image
    except ImportError as error:
        raise ImportError(f'PSNR, SSIM and LPIPS need torchmetrics ({error}): pip install "vtok-fast[train]"') from error
    return image
