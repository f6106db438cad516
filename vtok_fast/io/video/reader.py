"""Reading: frames as a player shows them, each with its time, one by one or in windows."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtok_fast.io.video import color
from vtok_fast.io.video.container import choose, clock_start, open_container, said
from vtok_fast.io.video.decode import ON_ERROR, Damaged, Decoding, Problem, Timed
from vtok_fast.io.video.errors import VideoError
from vtok_fast.io.video.filters import DEINTERLACERS, Filters, is_interlaced
from vtok_fast.io.video.geometry import Size, View, cut, turns
from vtok_fast.io.video.pixels import to_float
from vtok_fast.io.video.prefetch import ahead
from vtok_fast.io.video.seek import pictures_from
from vtok_fast.io.video.timing import Times, resample


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
        self.problems: list[Problem] = []
        self._container: Any = None
        self._fresh = False
        self._begun: Generator[Picture, None, None] | None = None
        self._decoding: Any = None
        self._open()
        try:
            rate = self.stream.guessed_rate or self.stream.average_rate or Fraction(25)
            self.fps = float(self.reading.rate or self._usual_rate(rate))
            self.count = 0 if self.reading.fps else self.stream.frames
            shown = self._shown()
            self._first: Picture | None = next(shown)
            self.view = self._first.view
            self._begun = shown
        except BaseException:
            self.close()
            raise
        self.height, self.width = self.view.shown

    def _usual_rate(self, rate: Fraction) -> Fraction:
        """The average rate where there are times, the codec's own where there are none."""
        return rate if self.stream.duration is None else (self.stream.average_rate or rate)

    def __enter__(self) -> open_video:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give back what the decoder holds, at once: it is large."""
        begun, self._begun, self._decoding = self._begun, None, None
        if begun is not None:
            begun.close()
        if self._container is not None:
            self._container.close()

    def _rewind(self) -> None:
        """To the start of the file; a container that was just opened is there."""
        if not self._fresh:
            self._open()
        self._fresh = False

    def _open(self) -> None:
        if self._container is not None:
            self._container.close()
        self._container = open_container(self.path)
        self._fresh = True
        self.stream = choose(self._container, self.path, self.reading.stream)
        self.said = said(self._container, self.stream)
        if self.said.dolby_vision == 5:
            raise VideoError(f"path: {self.path} is Dolby Vision of profile 5, whose colors only it can show")

    def frames(self, start: int = 0) -> Iterator[Picture]:
        """The frames from number `start` on. Raises VideoError.

        A later start is reached by seeking where that is exact: each packet of the file is counted, and the
        frames must have the times of these packets. Elsewhere by decoding what comes before.
        """
        seekable = (
            self.reading.fps is None and not self.reading.deinterlacer and self.reading.on_error == "stop"
        )
        if start and seekable:
            yield from pictures_from(self, start)
            return
        begun, self._begun = self._begun, None
        pictures = chain((self._first,), begun) if begun else self._shown()
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
        step, index, noted = length - overlap, first, len(self.problems)
        held: list[tuple[Picture, list[np.ndarray] | None]] = []
        shared = 0
        for number, picture in enumerate(self.frames(first * step)):
            if len(held) == length:  # not before the next frame, so that what is damaged at the end is noted
                yield self._window(held, wanted(index), noted)
                noted, index, shared = len(self.problems), index + 1, overlap
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
        video = _video(pixels) if wanted else None
        return Window(_times(pictures), list(self.problems[noted:]), video)

    def _shown(self) -> Generator[Picture, None, None]:
        """All frames, from the first one on, resampled if that is asked for."""
        rate = self.reading.rate
        if rate is None:
            yield from self._pictures(self._timed())
            return
        pictures = ((picture, picture.pts, picture.duration) for picture in self._pictures(self._timed()))
        for picture, number in resample(pictures, self.stream.time_base or Fraction(1, 25), rate):
            yield replace(picture, pts=number, duration=1, base=1 / rate)

    def _timed(self) -> Iterator[Timed]:
        """The decoded frames. A file that seems damaged is decoded once more without frame threads, which
        name the place of an error wrongly."""
        given, exact = 0, self.reading.on_error != "stop"
        self.problems.clear()
        if not exact:
            self._rewind()
            self._decoding = self._decode(exact=False)
            try:
                for timed in self._decoding.frames():
                    yield timed
                    given += 1
                return
            except Damaged:
                pass
        self._rewind()
        self._decoding = self._decode(exact=True)
        for number, timed in enumerate(self._decoding.frames()):
            if number >= given:
                yield timed

    def _decode(self, exact: bool) -> Decoding:
        decoding = Decoding(self.path, self._container, self.stream, self.reading.on_error, exact)
        decoding.problems = self.problems
        return decoding

    def _pictures(self, timed: Iterator[Timed]) -> Iterator[Picture]:
        """Frames as they are shown. Raises VideoError for interlaced ones, colors that cannot be converted,
        and another shape than the first one's."""
        base = self.stream.time_base or Fraction(1, 25)
        start = clock_start(self._container, self.stream)
        filters = Filters(self.stream, self.reading.deinterlacer, self.said.crop)
        first: View | None = None
        number, kind = 0, None
        for shown, decoded in filters(self._checked(timed)):
            # Only where something has changed: side data keep their frame until garbage is collected.
            changed = (decoded.width, decoded.height, decoded.rotation)
            if kind != changed:
                kind, view = changed, self._view(shown.frame, decoded)
            first = first or view
            pts = shown.pts - start
            if view.shown != first.shown:
                what = f"its size is {_by(view.shown)}, that of the first frame {_by(first.shown)}"
                keep = self.reading.on_error == "conceal"
                self._decoding.problem(shown.pts, 1, what, keep, number)
                if not keep:
                    continue
            number += 1
            yield Picture(shown.frame, pts, shown.duration, base, view, self.reading.background, first)

    def _checked(self, timed: Iterator[Timed]) -> Iterator[Timed]:
        for one in timed:
            frame = one.frame
            try:
                color.check(frame, self.reading.hdr)
            except VideoError as error:
                raise VideoError(f"path: {self.path} {error}") from None
            if not self.reading.deinterlacer and is_interlaced(frame, self.stream):
                time = float((one.pts - clock_start(self._container, self.stream)) * self.stream.time_base)
                raise VideoError(
                    f"path: {self.path} is interlaced (at {time:.3f} s); deinterlace (--deinterlace) makes "
                    "whole frames of its fields"
                )
            yield one

    def _view(self, frame: Any, decoded: Any) -> View:
        side = decoded.side_data.get("DISPLAYMATRIX")
        try:
            swap, flip = turns(bytes(side) if side is not None else None)
        except VideoError as error:
            raise VideoError(f"path: {self.path} {error}") from None
        aspect = self.stream.sample_aspect_ratio or self.stream.codec_context.sample_aspect_ratio
        return View((frame.height, frame.width), Fraction(aspect) if aspect else Fraction(1), swap, flip)


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
    video, times = _video(pixels), _times(pictures)
    return Clip(video if dtype == torch.uint8 else to_float(video), float(times.rate), times, problems)


def _times(pictures: Any) -> Times:
    last = pictures[-1]
    return Times(last.base, tuple(picture.pts for picture in pictures), last.pts + last.duration)


def _video(frames: Any) -> Tensor:
    """T frames of three planes (H, W) as (3, T, H, W)."""
    height, width = frames[0][0].shape
    video = np.empty((3, len(frames), height, width), np.uint8)
    for t, planes in enumerate(frames):
        for channel, plane in enumerate(planes):
            video[channel, t] = plane
    return torch.from_numpy(video)


def _by(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"
