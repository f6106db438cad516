"""How good a reconstructed video is and what its tokens cost, for videos of any length: ``vtok-fast
score``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtok_fast import metrics
from vtok_fast.commands.load_model import systems
from vtok_fast.commands.model_frames import center
from vtok_fast.commands.tokenize import reading_of
from vtok_fast.io.token_windows import TokenWindows
from vtok_fast.io.video import Picture, open_video, to_float

CLIP = 16  # frames of one clip of FVD
PIECE = 4  # frames that are compared at a time: SSIM holds several copies of them
CUT = 32  # pixels, and at most a quarter of a frame: by less a model cuts a frame that it does not scale
Progress = Callable[[int, int | None], None]  # frames done, frames in all if that is known


def score(
    original: str | os.PathLike,
    reconstruction: str | os.PathLike,
    *,
    tokens: str | os.PathLike | None = None,
    size: int | tuple[int, int] | None = None,
    fvd_network: str | os.PathLike | None = None,
    progress: Progress = lambda done, total: None,
    **reading: Any,
) -> dict[str, Any]:
    """What ``tokenize`` and ``detokenize`` have left of a video, in memory that does not grow with its
    length. Each frame of the reconstruction is compared with what the original shows in the middle of its
    time.

    Args:
        tokens: what ``tokenize`` wrote: then also what they cost, and how much of the codebook they use.
        size: as it was tokenized with. None: a frame that is only a little larger than the reconstruction's
            is cut, as it then was; another one is scaled until it covers the reconstruction's, and cut.
        fvd_network: a TorchScript file, see `vtok_fast.metrics.load_fvd_network`; FVD is of the clips
            of 16 frames.
        reading: how the original was read, the fields of `vtok_fast.io.video.Reading`. Default: as the tokens
            say, where they are given.

    Returns ``frames``, ``size``, ``psnr`` (dB), ``ssim``, ``lpips`` (or ``no_lpips``, why there is none);
    ``fvd`` and ``clips``; and of tokens ``tokens``, ``bits_per_pixel``, that of the whole file
    ``file_bits_per_pixel``, and with a codebook ``codebook_size``, ``codebook_used`` and ``perplexity``.

    Raises ImportError without PyAV or torchmetrics; FileNotFoundError; VideoError; ValueError for videos of
    different durations, a reconstruction that is larger than the frame, or tokens of another video.
    """
    quality, features = (
        metrics.Quality(),
        None if fvd_network is None else metrics.load_fvd_network(fvd_network),
    )
    seen: tuple[list[Tensor], list[Tensor]] = ([], [])
    frames = 0
    windows = None if tokens is None else TokenWindows(tokens)
    reading = {**({} if windows is None else reading_of(windows.info)), **reading}
    with open_video(original, **reading) as one, open_video(reconstruction) as other:
        height, width = other.height, other.width
        for a, b in _pairs(one, other, _scale(one.height, one.width, height, width, size)):
            if a.shape[2] < height or a.shape[3] < width:
                raise ValueError(
                    f"size={size}: the original then has frames of {a.shape[2]}x{a.shape[3]}, the "
                    f"reconstruction of "
                    f"{height}x{width}"
                )
            a = center(a, height, width)
            for first in range(0, a.shape[1], PIECE):
                quality.update(*(to_float(x[:, first : first + PIECE]) for x in (b, a)))
            if features is not None and a.shape[1] == CLIP:
                for kept, x in zip(seen, (a, b)):
                    kept.append(features(to_float(x)[None]).double().cpu())
            frames += a.shape[1]
            progress(frames, other.count or None)
    found = {"frames": frames, "size": [height, width], **quality.compute()}
    if "lpips" not in found:
        found["no_lpips"] = metrics.why_no_lpips()
    if features is not None:
        if len(seen[0]) < 2:
            raise ValueError(
                f"fvd_network: FVD needs at least two clips of {CLIP} frames, the video has {frames}"
            )
        found |= {"fvd": metrics.frechet_distance(*map(torch.cat, seen)), "clips": len(seen[0])}
    return found | ({} if windows is None else cost(windows, frames, height, width))


def cost(windows: TokenWindows, frames: int, height: int, width: int) -> dict[str, Any]:
    """What the tokens of a video of that size cost, for each pixel of its own frames: those that windows
    share, and copies that fill the last one up, are paid for but do not count."""
    shape = windows[0].video_shape[1:]
    if tuple(shape) != (height, width) or windows.info.get("frames", frames) != frames:
        raise ValueError(
            f"tokens: of {windows.info.get('frames')} frames of {'x'.join(map(str, shape))}, the "
            f"reconstruction has "
            f"{frames} of {height}x{width}"
        )
    size: Any = None
    if windows[0].indices is not None:
        with torch.device("meta"):  # the codebook's size needs no weights
            size = systems()[windows.model.partition("/")[0]](windows.config).codebook_size
    pixels = frames * height * width
    costs = {
        "bits_per_pixel": sum(metrics.bits(tokens, size) for tokens in windows) / pixels,
        "file_bits_per_pixel": 8 * windows.path.stat().st_size / pixels,
    }
    if size is None:
        return {"tokens": sum(tokens.data[:, 0].numel() for tokens in windows), **costs}
    kept = torch.cat([tokens.data[tokens.data >= 0] for tokens in windows])
    use = metrics.codebook_use(kept, size)
    return {
        "tokens": len(kept),
        **costs,
        "codebook_size": size,
        "codebook_used": use.used,
        "perplexity": use.perplexity,
    }


def _scale(
    height: int, width: int, new_height: int, new_width: int, size: int | tuple[int, int] | None
) -> int | tuple[int, int] | None:
    """What to scale the original to."""
    if size is not None or all(
        0 <= old - new < min(CUT, new / 4) for old, new in ((height, new_height), (width, new_width))
    ):
        return size
    return new_height, new_width


Planes = list[np.ndarray]


def _pairs(
    one: open_video, other: open_video, size: int | tuple[int, int] | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Clips of both, (C, T, H, W) uint8, of what is shown at the same times."""
    originals = _Shown(one, size)
    clip: list[tuple[Planes, Planes]] = []
    end = last = Fraction(0)
    frames = 0
    for picture in other.frames():
        time, last = picture.pts * picture.base, picture.duration * picture.base
        if not frames:
            originals.align(time, last)
        end, frames = time + last, frames + 1
        clip.append((originals.at(end - last / 2), picture.pixels()))
        if len(clip) == CLIP:
            yield _stacked(clip)
            clip = []
    has, until, longest = originals.rest()
    if abs(end - until) > max(last, longest) / 2:
        raise ValueError(
            f"reconstruction: it has {frames} frames, the original {has} frames (they end at "
            f"{float(end):.3f} s and {float(until):.3f} s)"
        )
    if clip:
        yield _stacked(clip)


class _Shown:
    """What a video shows at times that increase."""

    def __init__(self, source: open_video, size: int | tuple[int, int] | None):
        self.size, self._pictures = size, iter(source.frames())
        self._now: Picture = next(self._pictures)
        self._next = next(self._pictures, None)
        self._late = Fraction(0)  # by how much it begins later than the other one
        self._planes: Planes | None = None
        self._count = 1

    def align(self, begin: Fraction, duration: Fraction) -> None:
        """To another video's first frame: their clocks are the same, unless one starts more than a frame
        after the other; then both count from their first frames. A clock that starts below 0 is written from
        0."""
        own = self._now.pts * self._now.base
        late = max(own, Fraction(0)) - begin
        apart = abs(late) > max(duration, self._now.duration * self._now.base)
        self._late = own - begin if apart else min(own, Fraction(0))

    def _step(self, after: Picture) -> None:
        self._now, self._planes = after, None
        self._next = next(self._pictures, None)
        self._count += 1

    def at(self, time: Fraction) -> Planes:
        """R, G and B of the frame until that time: resampling rounds a frame of just that time up."""
        while self._next is not None and self._next.pts * self._next.base - self._late < time:
            self._step(self._next)
        if self._planes is None:
            self._planes = self._now.pixels(self.size)
        return self._planes

    def rest(self) -> tuple[int, Fraction, Fraction]:
        """How many frames there are, when the last one ends, and how long it lasts."""
        while self._next is not None:
            self._step(self._next)
        last = self._now.duration * self._now.base
        return self._count, self._now.pts * self._now.base + last - self._late, last


def _stacked(clip: list[tuple[Planes, Planes]]) -> tuple[Tensor, Tensor]:
    one, other = (torch.from_numpy(np.array(frames)).transpose(0, 1).contiguous() for frames in zip(*clip))
    return one, other
