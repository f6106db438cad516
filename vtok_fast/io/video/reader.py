"""Reading: frames as a player shows them, each with its time, one by one or in windows."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vtok_fast.io.video.decode import Problem
from vtok_fast.io.video.errors import VideoError
from vtok_fast.io.video.frames import Clip, Picture, Reading, Window, times_of, video_of
from vtok_fast.io.video.geometry import Size
from vtok_fast.io.video.pixels import to_float
from vtok_fast.io.video.prefetch import ahead
from vtok_fast.io.video.seek import pictures_from
from vtok_fast.io.video.source import Source


class open_video:
    """A video file while it is read, as a context.

    Attributes:
        height, width: of a frame as it is shown.
        fps: frames per second, as the file says it; `Clip.fps` and `Times.rate` are measured.
        count: of frames, as the file says it; 0 where it does not, or the rate is changed.
        problems: what was left out or concealed so far.

    `reading`: the fields of `Reading`. Raises ImportError, FileNotFoundError and VideoError as `read_video`
    does.
    """

    def __init__(self, path: str | os.PathLike, **reading: Any):
        self.reading, self.path = Reading(**reading), Path(path)
        self._source = Source(self.path, self.reading)
        self._begun: Generator[Picture, None, None] | None = None
        try:
            stream = self._source.stream
            rate = stream.guessed_rate or stream.average_rate or Fraction(25)
            if stream.duration is not None:  # there are times
                rate = stream.average_rate or rate
            self.fps = float(self.reading.rate or rate)
            self.count = 0 if self.reading.fps else stream.frames
            shown = self._source.shown()
            self._first: Picture | None = next(shown)
            self.view = self._first.view
            self._begun = shown
        except BaseException:
            self.close()
            raise
        self.height, self.width = self.view.shown

    @property
    def problems(self) -> list[Problem]:
        return self._source.problems

    def __enter__(self) -> open_video:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give back what the decoder holds, at once: it is large."""
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.close()
        self._source.close()

    def frames(self, start: int = 0) -> Iterator[Picture]:
        """The frames from number `start` on. Raises VideoError.

        A later start is reached by seeking where that is exact: each packet of the file is counted, and the
        frames must have the times of these packets. Elsewhere by decoding what comes before.
        """
        seekable = (
            self.reading.fps is None and not self.reading.deinterlacer and self.reading.on_error == "stop"
        )
        if start and seekable:
            yield from pictures_from(self._source, start)
            return
        begun, self._begun = self._begun, None
        pictures = chain((self._first,), begun) if begun and self._first else self._source.shown()
        self._first = None
        try:
            for number, picture in enumerate(pictures):
                if number >= start:
                    yield picture
        finally:
            if begun is not None:
                begun.close()

    def windows(
        self,
        length: int,
        size: Size = None,
        overlap: int = 0,
        *,
        first: int = 0,
        wanted: Callable[[int], bool] = lambda index: True,
        prefetch: bool = True,
    ) -> Generator[Window, None, None]:
        """Windows of `length` frames, each beginning with the last `overlap` frames of the one before, the
        last one perhaps of fewer.

        Args:
            size: as for `read_video`.
            first: the window to begin with.
            wanted: of a window's number, whether its pixels are needed.
            prefetch: decode the next window in a thread, while the caller works on one.
        """

        def make() -> Generator[Window, None, None]:
            return self._windows(length, size, overlap, first, wanted)

        return ahead(make) if prefetch else make()

    def _windows(
        self, length: int, size: Size, overlap: int, first: int, wanted: Callable[[int], bool]
    ) -> Generator[Window, None, None]:
        step, index, noted = length - overlap, first, len(self._source.problems)
        held: list[tuple[Picture, list[np.ndarray] | None]] = []
        shared = 0
        for number, picture in enumerate(self.frames(first * step)):
            if len(held) == length:  # not before the next frame, so that what is damaged at the end is noted
                yield self._window(held, wanted(index), noted)
                noted, index, shared = len(self._source.problems), index + 1, overlap
                held = held[step:]
            # The frame is part of this window, and of those after it that begin at or before it.
            uses = range(index, first + number // step + 1)
            pixels = picture.pixels(size) if any(wanted(use) for use in uses) else None
            held.append((replace(picture, frame=None), pixels))
        if len(held) > shared:
            yield self._window(held, wanted(index), noted)

    def _window(
        self, held: list[tuple[Picture, list[np.ndarray] | None]], wanted: bool, noted: int
    ) -> Window:
        pictures, pixels = zip(*held)
        video = video_of(pixels) if wanted else None
        return Window(times_of(pictures), list(self._source.problems[noted:]), video)


def read_video(
    path: str | os.PathLike,
    *,
    size: Size = None,
    start: int = 0,
    frames: int | None = None,
    dtype: torch.dtype = torch.float32,
    **reading: Any,
) -> Clip:
    """Decode frames [start, start + frames) of a file as RGB, as a player shows them.

    Args:
        size: (H, W): scale until the frame covers it, then cut out the center. A number: scale the shorter
            side to it, and cut nothing. None: as it is shown.
        frames: how many at most; None: to the end.
        dtype: float32, values in [-1, 1]; or uint8, values as decoded.
        reading: the fields of `Reading`: fps, deinterlace, hdr, background, on_error, stream.

    Raises:
        ImportError: PyAV is not installed.
        FileNotFoundError: there is no such file.
        ValueError: size, start, frames, dtype or a field of `Reading` is impossible.
        VideoError: the file is damaged, has no video stream, or has no frame in that range; or is interlaced,
            HDR or of other colors, and may not or cannot be converted.
    """
    if start < 0 or (frames is not None and frames < 1):
        raise ValueError(f"start={start}, frames={frames}: need start >= 0 and frames >= 1")
    if dtype not in (torch.float32, torch.uint8):
        raise ValueError(f"dtype={dtype}: torch.float32 or torch.uint8")
    if size is not None and min(size if isinstance(size, tuple) else (size,)) < 1:
        raise ValueError(f"size={size}: need at least one pixel")
    pictures, pixels = [], []
    with open_video(path, **reading) as source:
        for picture in source.frames(start):
            pixels.append(picture.pixels(size))
            pictures.append(replace(picture, frame=None))
            if len(pictures) == frames:
                break
        problems = tuple(source.problems)
    if not pictures:
        raise VideoError(f"path: {path} has no frame {start} or later")
    video, times = video_of(pixels), times_of(pictures)
    return Clip(video if dtype == torch.uint8 else to_float(video), float(times.rate), times, problems)
