"""libavfilter on decoded frames: deinterlacing, and the crop that a container asks for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from vtok_fast.io.video.decode import Timed
from vtok_fast.io.video.errors import pyav

Crop = tuple[int, int, int, int]  # top, bottom, left, right
DEINTERLACERS = ("bwdif", "yadif")
FLAGGING = ("h264", "hevc", "mpeg2video", "mpeg1video", "vc1", "mpeg4", "dvvideo", "prores", "av1", "vp9")
"""Codecs whose frames say themselves whether they are interlaced; of others the container does."""


def field_order(stream: Any) -> int:
    """0: progressive or unknown; 1: the top field first; 2: the bottom field, as the container says it
    (AVFieldOrder)."""
    order = int(stream.codec_context.field_order or 0)
    return {2: 1, 3: 2, 4: 2, 5: 1}.get(order, 0)


def is_interlaced(frame: Any, stream: Any) -> bool:
    """Whether a frame consists of two fields, by itself or by the container."""
    own = stream.codec_context.name in FLAGGING
    return frame.interlaced_frame or (not own and field_order(stream) > 0)


class Filters:
    """Passes frames through bwdif or yadif and crop, one for one, and keeps their times."""

    def __init__(self, stream: Any, deinterlacer: str | None, crop: Crop):
        self.stream, self.deinterlacer, self.crop = stream, deinterlacer, crop
        self._graph: Any = None
        self._made_for: tuple[Any, ...] | None = None
        self._times: deque[Timed] = deque()

    def __call__(self, frames: Iterator[Timed]) -> Iterator[tuple[Timed, Any]]:
        """Frames, and each one as it was decoded, whose side data filters may drop."""
        if not self.deinterlacer and not any(self.crop):
            for timed in frames:
                yield timed, timed.frame
            return
        for timed in frames:
            frame = timed.frame
            kind = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range)
            if kind != self._made_for:
                yield from self._finish()
                self._make(frame)
                self._made_for = kind
            self._times.append(timed)
            self._graph.push(frame)
            yield from self._pull()
        yield from self._finish()

    def _make(self, frame: Any) -> None:
        av = pyav()
        graph = av.filter.Graph()
        last = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=self.stream.time_base
        )
        steps = []
        if self.deinterlacer:
            order = 0 if self.stream.codec_context.name in FLAGGING else field_order(self.stream)
            which = f":deint=all:parity={'tff' if order == 1 else 'bff'}" if order else ":deint=interlaced"
            steps.append((self.deinterlacer, "mode=send_frame" + which))
        if any(self.crop):
            top, bottom, left, right = self.crop
            width, height = frame.width - left - right, frame.height - top - bottom
            steps.append(("crop", f"{width}:{height}:{left}:{top}:exact=1"))
        for name, arguments in steps:
            node = graph.add(name, arguments)
            last.link_to(node)
            last = node
        last.link_to(graph.add("buffersink"))
        graph.configure()
        self._graph = graph

    def _pull(self) -> Iterator[tuple[Timed, Any]]:
        errors = pyav().error
        while True:
            try:
                frame = self._graph.pull()
            except (errors.BlockingIOError, errors.EOFError):
                return
            timed = self._times.popleft()
            yield replace(timed, frame=frame), timed.frame

    def _finish(self) -> Iterator[tuple[Timed, Any]]:
        if self._graph is not None:
            self._graph.push(None)
            yield from self._pull()
            self._graph = None
