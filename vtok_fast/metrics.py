"""How good a reconstruction is and what its tokens cost, by the definitions of torchmetrics.

Videos are (B, C, T, H, W) or (C, T, H, W) in [-1, 1]; what lies outside is clamped first. PSNR, SSIM and
LPIPS need the package ``torchmetrics`` (``pip install "vtok-fast[train]"``), LPIPS also ``torchvision`` and
its weights, FVD a network of yours; nothing is downloaded.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtok_fast.io.tokens import Tokens


def psnr(video: Tensor, original: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, of the squared error over all values together."""
    return _image().peak_signal_noise_ratio(*_pair(video, original), data_range=2.0).item()


def ssim(video: Tensor, original: Tensor) -> float:
    """Structural similarity, the mean over frames; frames of at least 11x11."""
    return _image().structural_similarity_index_measure(*_frames(video, original), data_range=2.0).item()


def lpips(video: Tensor, original: Tensor) -> float | None:
    """Learned perceptual distance (AlexNet), the mean over frames; None where torchvision or the network's
    weights are absent."""
    if why_no_lpips() is not None:
        return None
    return (
        _image().learned_perceptual_image_patch_similarity(*_frames(video, original), net_type="alex").item()
    )


def why_no_lpips(network: str = "alexnet") -> str | None:
    """What LPIPS on that network of torchvision lacks here, or None."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return "torchvision is not installed"
    except RuntimeError as error:  # one made for another torch
        return f"torchvision cannot be imported ({str(error).splitlines()[0]})"
    folder = Path(torch.hub.get_dir(), "checkpoints")
    return None if list(folder.glob(f"{network}-*.pth")) else f"no weights {network}-*.pth in {folder}"


class Quality:
    """PSNR, SSIM and LPIPS of videos that come piece by piece, each of all frames so far.

    Raises ImportError without torchmetrics.
    """

    def __init__(self) -> None:
        _image()
        from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

        self._metrics: dict[str, Any] = {
            "psnr": PeakSignalNoiseRatio(data_range=2.0),
            "ssim": StructuralSimilarityIndexMeasure(data_range=2.0),
        }
        if why_no_lpips() is None:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            self._metrics["lpips"] = LearnedPerceptualImagePatchSimilarity(net_type="alex")

    @torch.no_grad()
    def update(self, video: Tensor, original: Tensor) -> None:
        """Adds a piece. Raises ValueError unless both have one shape, frames of at least 11x11."""
        pair = _frames(video, original)
        if min(pair[0].shape[2:]) < 11:
            raise ValueError(f"video: frames of {tuple(pair[0].shape[2:])}, SSIM needs at least 11x11")
        for metric in self._metrics.values():
            metric.to(pair[0].device).update(*pair)

    def compute(self) -> dict[str, float]:
        """``psnr`` in dB, ``ssim``, and ``lpips`` where there is what it needs."""
        return {name: metric.compute().item() for name, metric in self._metrics.items()}


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Between the Gaussians with the mean and covariance of two sets of features (N, D) and (M, D), in
    float64:
    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2) (Heusel et al., arXiv 1706.08500).

    Raises ValueError for another shape, fewer than two of either, NaN or infinity; warns where there are no
    more than D, since the covariance then has no full rank, and the distance depends on how many there are
    more than on what they are.
    """
    for name, x in (("real", real), ("generated", generated)):
        if x.dim() != 2 or len(x) < 2 or x.shape[1] != real.shape[-1]:
            raise ValueError(
                f"{name}: features of shape {tuple(x.shape)}, expected (at least 2, D), the same D for both"
            )
        if not x.isfinite().all():
            raise ValueError(f"{name}: features hold NaN or infinity")
    least, size = min(len(real), len(generated)), real.shape[1]
    if least <= size:
        warnings.warn(
            f"a Frechet distance of {least} samples in {size} dimensions compares only with one of as many "
            f"samples",
            RuntimeWarning,
            stacklevel=2,
        )
    a, b = real.double(), generated.double()
    one, other = (x.T.cov().reshape(size, size) for x in (a, b))
    # C1 C2 has the eigenvalues of the symmetric C1^1/2 C2 C1^1/2, which only rounding can make negative.
    values, vectors = torch.linalg.eigh(one)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0).sqrt().sum()
    return (
        ((a.mean(0) - b.mean(0)).square().sum() + one.trace() + other.trace() - 2 * mixed).clamp(min=0).item()
    )


def fvd(real: Iterable[Tensor], generated: Iterable[Tensor], features: Callable[[Tensor], Tensor]) -> float:
    """Frechet video distance (Unterthiner et al., arXiv 1812.01717): `frechet_distance` of what a
    network sees in clips.

    Args:
        real, generated: batches of clips (B, C, T, H, W) in [-1, 1]; the published figures take 2,048 clips
            of 16 frames.
        features: (B, D) of such a batch. A published figure needs the published network, an I3D trained on
            Kinetics-400, which is not part of this package: `load_fvd_network` reads one that you have.

    Raises what `frechet_distance` does, and ValueError for features of another shape.
    """
    found = []
    for name, batches in (("real", real), ("generated", generated)):
        parts = []
        for batch in batches:
            x = features(batch).detach()
            if x.dim() != 2 or len(x) != len(batch):
                raise ValueError(
                    f"features: of shape {tuple(x.shape)} for {len(batch)} clips, expected (B, D)"
                )
            parts.append(x.double().cpu())
        if not parts:
            raise ValueError(f"{name}: no clips")
        found.append(torch.cat(parts))
    return frechet_distance(*found)


def load_fvd_network(
    path: str | os.PathLike, device: torch.device | str = "cpu"
) -> Callable[[Tensor], Tensor]:
    """The ``features`` of `fvd` from a TorchScript file: called with clips (B, 3, T, H, W), float32 in
    [-1, 1].

    One whose ``forward`` takes ``rescale``, ``resize`` and ``return_features``, as the I3D that StyleGAN-V's
    code made common, gets False, True and True. A TorchScript file is a program: load only one that you
    trust.

    Raises FileNotFoundError, and ValueError for a file that is not such a network.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"fvd_network: no file at {path}")
    try:
        network = torch.jit.load(str(path), map_location=device).eval()
        takes = {argument.name for argument in network.forward.schema.arguments}
    except RuntimeError as error:
        raise ValueError(
            f"fvd_network: {path} is not a TorchScript network ({str(error).splitlines()[0]})"
        ) from error
    options = {"rescale": False, "resize": True, "return_features": True}
    chosen = {name: value for name, value in options.items() if name in takes}

    @torch.no_grad()
    def features(clips: Tensor) -> Tensor:
        return network(clips.float().clamp(-1, 1).to(device), **chosen)

    return features


def bits(tokens: Tokens, codebook_size: int | None = None) -> int:
    """Bits of the tokens as they would be stored: ceil(log2(codebook_size)) for each index, and where some
    were dropped (-1) one for each position and none for those; of latents, the bits of their dtype.

    Raises ValueError for indices without a codebook_size of at least 2.
    """
    if tokens.indices is None:
        return tokens.data.numel() * tokens.data.element_size() * 8
    if codebook_size is None or codebook_size < 2:
        raise ValueError(
            f"codebook_size={codebook_size}: indices need the number of entries of their codebook"
        )
    kept, positions = int((tokens.indices >= 0).sum()), tokens.indices.numel()
    return kept * (codebook_size - 1).bit_length() + (positions if kept < positions else 0)


def bits_per_pixel(tokens: Tokens, codebook_size: int | None = None) -> float:
    """`bits` for each pixel of each frame of the videos."""
    return bits(tokens, codebook_size) / (tokens.batch * math.prod(tokens.video_shape))


class CodebookUse(NamedTuple):
    """`used`: share of the codebook's entries that occur; `perplexity`: 2 to the entropy (in bits) of how
    often each one does."""

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
        raise ValueError(
            f"video of {tuple(video.shape)}, original of {tuple(original.shape)}: expected (B, C, T, H, W) "
            f"or "
            "(C, T, H, W), both alike"
        )
    return video.float().clamp(-1, 1), original.float().clamp(-1, 1)


def _frames(video: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (N, C, H, W)."""
    one, other = (x.movedim(-4, -3).flatten(0, -4) for x in _pair(video, original))
    return one, other


def _image() -> Any:
    try:
        import torchmetrics.functional.image as image
    except ImportError as error:
        raise ImportError(
            f'PSNR, SSIM and LPIPS need torchmetrics ({error}): pip install "vtok-fast[train]"'
        ) from error
    return image
