"""A stream of a file, decoded from its start as often as is needed, as pictures."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from vtok_fast.io.video import color
from vtok_fast.io.video.container import choose, clock_start, open_container, said
from vtok_fast.io.video.decode import Damaged, Decoding, Problem, Timed
from vtok_fast.io.video.errors import VideoError
from vtok_fast.io.video.filters import Filters, is_interlaced
from vtok_fast.io.video.frames import Picture, Reading
from vtok_fast.io.video.geometry import View, turns
from vtok_fast.io.video.timing import resample


class Source:
    """The stream that is read, and the container around it.

    Attributes:
        container, stream: of PyAV; others after `rewind`.
        said: what the container says of the stream beside that.
        decoding: what decodes now, or did last.
        problems: what was left out or concealed since the last start.

    Raises FileNotFoundError and VideoError.
    """

    def __init__(self, path: Path, reading: Reading):
        self.path, self.reading = path, reading
        self.problems: list[Problem] = []
        self.container: Any = None
        self.decoding: Any = None
        self._fresh = False
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.decoding = None
        if self.container is not None:
            self.container.close()

    def rewind(self) -> None:
        """To the start of the file; a container that was just opened is there."""
        if not self._fresh:
            self._open()
        self._fresh = False

    def _open(self) -> None:
        if self.container is not None:
            self.container.close()
        self.container = open_container(self.path)
        self._fresh = True
        self.stream = choose(self.container, self.path, self.reading.stream)
        self.said = said(self.container, self.stream)
        if self.said.dolby_vision == 5:
            raise VideoError(f"path: {self.path} is Dolby Vision of profile 5, whose colors only it can show")

    def shown(self) -> Generator[Picture, None, None]:
        """All frames, from the first one on, resampled if that is asked for."""
        rate = self.reading.rate
        if rate is None:
            yield from self.pictures(self.timed())
            return
        pictures = ((picture, picture.pts, picture.duration) for picture in self.pictures(self.timed()))
        for picture, number in resample(pictures, self.stream.time_base or Fraction(1, 25), rate):
            yield replace(picture, pts=number, duration=1, base=1 / rate)

    def timed(self) -> Iterator[Timed]:
        """The decoded frames. A file that seems damaged is decoded once more without frame threads, which
        name the place of an error wrongly."""
        given, exact = 0, self.reading.on_error != "stop"
        self.problems.clear()
        if not exact:
            self.rewind()
            self.decoding = self.decode(exact=False)
            try:
                for timed in self.decoding.frames():
                    yield timed
                    given += 1
                return
            except Damaged:
                pass
        self.rewind()
        self.decoding = self.decode(exact=True)
        for number, timed in enumerate(self.decoding.frames()):
            if number >= given:
                yield timed

    def decode(self, exact: bool) -> Decoding:
        """From where the container stands. exact: see `container.decoder`."""
        decoding = Decoding(self.path, self.container, self.stream, self.reading.on_error, exact)
        decoding.problems = self.problems
        return decoding

    def pictures(self, timed: Iterator[Timed]) -> Iterator[Picture]:
        """Frames as they are shown. Raises VideoError for interlaced ones, colors that cannot be converted,
        and another shape than the first one's."""
        base = self.stream.time_base or Fraction(1, 25)
        start = clock_start(self.container, self.stream)
        filters = Filters(self.stream, self.reading.deinterlacer, self.said.crop)
        first: View | None = None
        number, kind = 0, None
        for shown, decoded in filters(self._checked(timed)):
            # Only where something has changed: side data keep their frame until garbage is collected.
            changed = (decoded.width, decoded.height, decoded.rotation, shown.aspect)
            if kind != changed:
                kind, view = changed, self._view(shown, decoded)
            first = first or view
            pts = shown.pts - start
            if view.shown != first.shown:
                what = f"its size is {_by(view.shown)}, that of the first frame {_by(first.shown)}"
                keep = self.reading.on_error == "conceal"
                self.decoding.problem(shown.pts, 1, what, keep, number)
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
                time = float((one.pts - clock_start(self.container, self.stream)) * self.stream.time_base)
                raise VideoError(
                    f"path: {self.path} is interlaced (at {time:.3f} s); deinterlace (--deinterlace) makes "
                    "whole frames of its fields"
                )
            yield one

    def _view(self, shown: Timed, decoded: Any) -> View:
        side = decoded.side_data.get("DISPLAYMATRIX")
        try:
            swap, flip = turns(bytes(side) if side is not None else None)
        except VideoError as error:
            raise VideoError(f"path: {self.path} {error}") from None
        said = self.stream.sample_aspect_ratio or self.stream.codec_context.sample_aspect_ratio
        aspect = shown.aspect or Fraction(said or 1)
        return View((shown.frame.height, shown.frame.width), aspect, swap, flip)


def _by(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"
