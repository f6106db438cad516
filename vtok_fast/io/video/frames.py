"""What reading gives: how it is asked for, a frame as it is shown, a window of frames, a clip."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtok_fast.io.video import color
from vtok_fast.io.video.decode import ON_ERROR, Problem
from vtok_fast.io.video.filters import DEINTERLACERS
from vtok_fast.io.video.geometry import Size, View, cut
from vtok_fast.io.video.timing import Times


@dataclass(frozen=True)
class Reading:
    """How a video is read.

    Attributes:
        fps: resample to this constant rate, by time. None: every frame, when it is shown.
        deinterlace: "bwdif" (or True) or "yadif" for interlaced frames, one frame of two fields. None or
            False: VideoError for them.
        hdr: "tonemap": PQ and HLG as on a standard display. "error": VideoError.
        background: (R, G, B), 0 .. 255, under what is transparent.
        on_error: of damage: "stop" (VideoError), "skip" (leave out what cannot be right) or "conceal" (keep
            what the decoder makes of it).
        stream: which of the file's video streams, by number. None: the one that a player shows.
    """

    fps: float | Fraction | None = None
    deinterlace: str | bool | None = None
    hdr: str = "tonemap"
    background: tuple[int, int, int] = (0, 0, 0)
    on_error: str = "stop"
    stream: int | None = None

    def __post_init__(self) -> None:
        if self.fps is not None and not 0 < self.fps <= 1_000_000:
            raise ValueError(f"fps={self.fps}: must be positive, and at most a million")
        if self.deinterlace not in (None, False, True, *DEINTERLACERS):
            raise ValueError(f"deinterlace={self.deinterlace!r}: {' or '.join(DEINTERLACERS)}")
        if self.hdr not in ("tonemap", "error"):
            raise ValueError(f"hdr={self.hdr!r}: tonemap or error")
        if self.on_error not in ON_ERROR:
            raise ValueError(f"on_error={self.on_error!r}: {', '.join(ON_ERROR)}")
        if len(self.background) != 3 or not all(0 <= value <= 255 for value in self.background):
            raise ValueError(f"background={self.background}: three values in 0 .. 255")

    @property
    def deinterlacer(self) -> str | None:
        return "bwdif" if self.deinterlace is True else self.deinterlace or None

    @property
    def rate(self) -> Fraction | None:
        if self.fps is None or isinstance(self.fps, Fraction):
            return self.fps
        return Fraction(self.fps).limit_denominator(1_000_000)


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames of a video; `video, fps = clip` works too.

    Attributes:
        video: (C, T, H, W), float32 in [-1, 1] or uint8.
        fps: frames per second, on average.
        times: when each frame is shown.
        problems: what was left out or concealed.
    """

    video: Tensor
    fps: float
    times: Times
    problems: tuple[Problem, ...] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter((self.video, self.fps))


@dataclass
class Picture:
    """A frame, when it is shown and how long, in multiples of base seconds, and how it is shown."""

    frame: Any
    pts: int
    duration: int
    base: Fraction
    view: View
    background: tuple[int, int, int]
    like: View

    @property
    def time(self) -> float:
        return float(self.pts * self.base)

    def pixels(self, size: Size = None) -> list[np.ndarray]:
        """R, G and B as shown, scaled and cut, each (H, W) uint8, perhaps as views."""
        height, width = self.like.scaled(size)
        if self.view.swap != self.like.swap:
            height, width = width, height
        planes = color.rgb(self.frame, height, width, self.background)
        return [cut(self.view.turned(plane), size) for plane in planes]


@dataclass(eq=False)
class Window:
    """Consecutive frames; `count, read = window` works too.

    Attributes:
        times: of its frames.
        problems: what was left out or concealed since the window before.
    """

    times: Times
    problems: list[Problem]
    _video: Tensor | None = field(repr=False, default=None)

    @property
    def count(self) -> int:
        return len(self.times)

    def read(self) -> Tensor:
        """(C, T, H, W) uint8. Raises ValueError of one that was not wanted."""
        if self._video is None:
            raise ValueError("window: its pixels were not asked for")
        return self._video

    def __iter__(self) -> Iterator[Any]:
        return iter((self.count, self.read))


def times_of(pictures: Sequence[Picture]) -> Times:
    """When some frames are shown."""
    last = pictures[-1]
    return Times(last.base, tuple(picture.pts for picture in pictures), last.pts + last.duration)


def video_of(frames: Sequence[Sequence[np.ndarray]]) -> Tensor:
    """T frames of three planes (H, W) as (3, T, H, W)."""
    height, width = frames[0][0].shape
    video = np.empty((3, len(frames), height, width), np.uint8)
    for t, planes in enumerate(frames):
        for channel, plane in enumerate(planes):
            video[channel, t] = plane
    return torch.from_numpy(video)
