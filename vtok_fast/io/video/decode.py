"""Packets to frames, each with its time, and an account of what is damaged.

Every packet that should give a picture is remembered by its time; frames come out in the order of their
times, so a packet whose time has passed is lost. Whether a decoder also reports it depends on codec, threads
and damage, so reports alone are not relied on.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from vtok_fast.io.video.container import UNANCHORED, clock_start, declared_bytes, decoder
from vtok_fast.io.video.errors import VideoError, pyav

# Codecs of which each packet gives one picture, unless it says that it is not shown.
ONE_TO_ONE = {
    "h264",
    "hevc",
    "av1",
    "libdav1d",
    "vp8",
    "vp9",
    "libvpx",
    "libvpx-vp9",
    "mpeg1video",
    "mpeg2video",
}
NEVER = -(1 << 63)
GAP = 10  # seconds that a broadcast does not go on for without a picture, as ffmpeg has it
MARKED_EARLY = 2  # packets by which a break between two recordings is marked before it, since parsers lag
ON_ERROR = ("stop", "skip", "conceal")


@dataclass
class Problem:
    """What is wrong with some consecutive frames of a file.

    Attributes:
        frame: the number of the first of them, among those that were given before it.
        time: in seconds, where it is known.
        count: how many frames; 0: not a frame, such as the end of a file that was cut off.
        what: the reason.
        done: "left out" or "concealed".
    """

    frame: int
    time: float | None
    count: int
    what: str
    done: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Timed:
    """A decoded frame, its time and how long it is shown, in multiples of the stream's time base.

    aspect: width of a pixel over its height, where the codec says it and not the container.
    """

    frame: Any
    pts: int
    duration: int
    aspect: Fraction | None = None


LEANS = "it may lean on what is damaged"
Entry = tuple[Any, int | None, str | None, bool]
"""A frame, or None if it is lost; its time; what is wrong with it; whether no other frame leans on it."""


def reason(error: Exception) -> str:
    """What FFmpeg says, without its number and the function."""
    return f"FFmpeg reports: {getattr(error, 'strerror', None) or error}"


class Damaged(VideoError):
    """A VideoError about frames, which another way of decoding may place better."""


class Decoding:
    """The frames of a stream, from the first key frame on.

    Args:
        on_error: "stop": VideoError at the first damage. "skip": leave out what is damaged or leans on it, up
            to the next key frame. "conceal": keep what the decoder makes of it, and repeat the frame before
            in place of one that is lost.
        exact: see `container.decoder`.

    `problems` holds what was left out or concealed.
    """

    def __init__(self, path: Path, container: Any, stream: Any, on_error: str, exact: bool):
        self.path, self.container, self.stream, self.on_error = path, container, stream, on_error
        self.context = decoder(stream, on_error != "conceal", exact)
        self.exact = exact
        self._av = pyav()
        self._failure: str | None = None  # of the container, after which nothing can be read
        self.problems: list[Problem] = []
        self.given = 0
        rate = stream.guessed_rate or stream.average_rate or Fraction(25)
        self.base = stream.time_base or 1 / rate
        self.step = max(1, round(1 / rate / self.base))  # how long a frame lasts where nothing says
        self.start = clock_start(container, stream)
        self.by_order = container.format.name == "avi"  # its pictures are in order, their stamps are not
        # Of a broadcast the codec says how wide pixels are, and may change it at a key frame.
        self.broadcast = container.format.name in UNANCHORED

    def time(self, pts: int | None) -> float | None:
        return None if pts is None else float((pts - self.start) * self.base)

    def problem(
        self, pts: int | None, count: int, what: str, keep: bool = False, frame: int | None = None
    ) -> None:
        """Note it, or raise Damaged. frame: its number, where that is not how many were given."""
        time, frame = self.time(pts), self.given if frame is None else frame
        if self.on_error == "stop":
            when = "" if time is None else f" at {time:.3f} s"
            raise Damaged(
                f"path: {self.path}: frame {frame}{when}: {what} "
                "(on_error, --on-error: skip or conceal goes on)"
            )
        done = "concealed" if keep else "left out"
        last = self.problems[-1] if self.problems else None
        if (
            last
            and count
            and (last.what, last.done) == (what, done)
            and (last.frame + (last.count if done == "concealed" else 0) == frame)
        ):
            last.count += count
        else:
            self.problems.append(Problem(frame, time, count, what, done))

    def frames(self) -> Iterator[Timed]:
        """Raises VideoError."""
        last: Timed | None = None
        aspect: Fraction | None = None
        shift, leaning, failure = 0, False, None
        for frame, time, why, disposable in self._account():
            if frame is not None and frame.key_frame:
                leaning = False
                if self.broadcast:
                    aspect = self.context.sample_aspect_ratio or Fraction(1)
            if why is None and leaning:
                why, disposable = LEANS, True
            if why is not None:
                leaning = leaning or not disposable
                failure = failure or why
                shows = frame is not None or (last is not None and time is not None)
                kept = self.on_error == "conceal" and shows
                self.problem(time, 1, why, kept)
                if not kept:
                    continue
            frame = last.frame if frame is None and last is not None else frame
            duration = frame.duration or self.step
            pts = (last.pts + last.duration - shift if last else self.start) if time is None else time
            if last and pts + shift <= last.pts:  # a clock that jumps back goes on where it was
                shift = last.pts + last.duration - pts
            last = Timed(frame, pts + shift, duration, aspect)
            yield last
            self.given += 1
        if last is None:
            why = f" ({failure})" if failure else ""
            raise VideoError(f"path: {self.path} has no frame that can be decoded{why}")
        self._check_end(last)

    def _check_end(self, last: Timed) -> None:
        has, wanted = self.path.stat().st_size, declared_bytes(self.path)
        if wanted is not None and has < wanted:
            self.problem(last.pts, 0, f"the file is cut off after {has} of {wanted} bytes")

    def _account(self) -> Iterator[Entry]:
        """What each packet has come to, in the order of the frames."""
        # Packets without a frame yet: time, whether nothing leans on it, whether it leans on damage.
        waiting: list[tuple[int, bool, bool]] = []
        bad: dict[int, str] = {}  # what is known to be wrong with the packet of a time
        report: str | None = None  # of the decoder, not yet explained by a frame
        reported: int | None = None  # the time of the packet with which it came
        explained = False
        key_time: int | None = None  # of the first key frame; what comes before it leans on what is not there
        broken, shadow = False, NEVER  # since the last key frame; until the time of the key frame after it

        def place(frame: Any) -> Iterator[Entry]:
            nonlocal report, explained
            time, leans = frame.pts, False
            if self.by_order and waiting:
                time, _, leans = heapq.heappop(waiting)
            elif time is not None:
                while waiting and waiting[0][0] < time:
                    yield from lost(frame.interlaced_frame)
                if waiting and waiting[0][0] == time:
                    leans = heapq.heappop(waiting)[2]
            why = None if time is None else bad.pop(time, None)
            if frame.is_corrupt:
                why = why or report or "the decoder conceals damage"
            if why or explained:
                report, explained = None, False
            yield frame, time, why or (LEANS if leans else None), why is None

        def lost(fields: bool = False) -> Iterator[Entry]:
            nonlocal explained
            time, disposable, _ = heapq.heappop(waiting)
            why = bad.pop(time, None) or report
            if why is None and self.context.name in ONE_TO_ONE and not fields:
                why = "the decoder gives no picture"
            if why is not None and not leading(time):
                explained = True
                yield None, time, why, disposable

        def leading(time: int | None) -> bool:
            return key_time is None or (time is not None and time < key_time)

        def decoded(packet: Any, time: int | None = None) -> list[Any]:
            nonlocal report, reported
            try:
                return self.context.decode(packet)
            except self._av.error.EOFError:
                return []
            except self._av.error.FFmpegError as error:
                if not leading(time):
                    report, reported = reason(error), time
                    if self.exact and time is not None:
                        bad[time] = report
                return []

        for packet, joins, flagged in self.packets():
            if joins:
                for frame in decoded(None):
                    yield from place(frame)
                while waiting and not self.by_order:
                    yield from lost()
                self.context.flush_buffers()
                key_time = None
            time = packet.dts if self.by_order else packet.pts
            if packet.is_keyframe:
                if key_time is None:
                    key_time = NEVER if time is None or self.by_order else time
                    waiting.clear()
                shadow = time if broken and time is not None else shadow
                broken = False
            leans = broken or (time is not None and time < shadow)
            entry = (time or 0, packet.is_disposable, leans)
            counts = time is not None and packet.size and not packet.is_discard
            if counts and not self.is_hidden(packet):
                heapq.heappush(waiting, entry)
            if counts and flagged and not leading(time):
                bad[time or 0] = "a packet is incomplete"
            frames = decoded(packet, time)
            if counts and time in bad and self.exact:
                broken = broken or not packet.is_disposable
                if entry not in waiting and not frames:
                    heapq.heappush(waiting, entry)
                elif self.by_order and not frames:
                    waiting.remove(entry)
                    heapq.heapify(waiting)
                    report = None
                    yield None, time, bad.pop(time or 0), packet.is_disposable
            for frame in frames:
                yield from place(frame)
        for frame in decoded(None):
            yield from place(frame)
        while waiting and not self.by_order:
            yield from lost()
        if self._failure is not None:
            yield None, None, self._failure, False
        elif report is not None and not explained:
            yield None, reported, report, False

    def packets(self) -> Iterator[tuple[Any, bool, bool]]:
        """(packet, whether another recording begins with it, whether the container marks it as damaged)."""
        held: deque[tuple[Any, bool, bool]] = deque()
        clock: int | None = None
        try:
            for packet in self.container.demux(self.stream):
                if packet.size == 0 and packet.pts is None and packet.dts is None:
                    continue  # the end
                joins = False
                if clock is not None and packet.dts is not None:
                    step = (packet.dts - clock) * self.base
                    joins = step < 0 and (packet.is_keyframe or step < -1)
                    joins = joins or self.broadcast and packet.is_keyframe and step > GAP
                clock = packet.dts if packet.dts is not None else clock
                if joins:  # the counters of MPEG-TS break, but not the pictures
                    held = deque((one, begins, False) for one, begins, _ in held)
                held.append((packet, joins, packet.is_corrupt and not joins))
                if len(held) > MARKED_EARLY:
                    yield held.popleft()
        except (self._av.error.FFmpegError, OSError) as error:
            self._failure = reason(error)
        yield from held

    def is_hidden(self, packet: Any) -> bool:
        """Whether a packet of VP8 or VP9 holds a frame that is only there to be referred to."""
        name = self.context.name
        if name in ("vp8", "libvpx"):
            return not bytes(packet)[0] & 0x10
        if name in ("vp9", "libvpx-vp9"):
            data = bytes(packet)
            together = data[-1] & 0xE0 == 0xC0  # several frames, of which one is shown
            return not together and data[0] & 0xC0 == 0x80 and data[0] & 0x30 != 0x30 and not data[0] & 0x0A
        return False
