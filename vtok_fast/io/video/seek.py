"""Beginning in the middle of a file, exactly.

Where a seek lands depends on the container: in MP4 with open groups of pictures it can be after its target,
and after an intra refresh the first frames are missing. So all packets are counted first, without decoding:
their times in order are those of the frames. A key frame at or before the target is sought, and every frame
from there must have the time of its packet; else an earlier key frame is tried, and at last the file is read
from its start.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vtok_fast.io.video.decode import Damaged, Decoding, Timed
from vtok_fast.io.video.errors import VideoError

if TYPE_CHECKING:
    from vtok_fast.io.video.reader import Picture, open_video

KEYS = 3  # key frames that are tried


class Elsewhere(Exception):
    """A seek that did not lead where it should."""


def pictures_from(source: open_video, start: int) -> Iterator[Picture]:
    """The frames of a source from number `start` on."""
    times, keys = scan(source)
    if start < len(times):
        target = times[start]
        for key in reversed(keys[max(0, bisect_right(keys, target) - KEYS) : bisect_right(keys, target)]):
            timed = _from(source, key, target, times)
            try:
                first = next(timed)
            except (Elsewhere, VideoError, StopIteration):
                continue
            yield from source._pictures(_again(first, timed))
            return
    yield from (picture for number, picture in enumerate(source._shown()) if number >= start)


def scan(source: open_video) -> tuple[list[int], list[int]]:
    """The times of the frames in order, and those of the key frames; empty where the packets do not tell."""
    source._open()
    decoding = Decoding(source.path, source._container, source.stream, "stop", exact=True)
    times, keys = [], []
    for packet, joins, _ in decoding._packets():
        if packet.pts is None or joins or decoding.by_order:
            return [], []
        if packet.size and not packet.is_discard and not decoding._hidden(packet):
            times.append(packet.pts)
            if packet.is_keyframe:
                keys.append(packet.pts)
    times.sort()
    if any(one == other for one, other in zip(times, times[1:])):
        return [], []
    return times, sorted(keys)


def _from(source: open_video, key: int, target: int, times: list[int]) -> Iterator[Timed]:
    """Frames from the one at `target` on. Raises Elsewhere if the first ones are not those that they should
    be."""
    for exact in (False, True):
        given = 0
        source._open()
        source._container.seek(key, stream=source.stream)
        source._decoding = source._decode(exact)
        number: int | None = None
        try:
            for timed in source._decoding.frames():
                if number is None:
                    number = bisect_left(times, timed.pts)
                    if timed.pts > target:
                        raise Elsewhere
                if timed.pts <= target and (number >= len(times) or times[number] != timed.pts):
                    raise Elsewhere
                number += 1
                if timed.pts >= target:
                    if not given and timed.pts != target:
                        raise Elsewhere
                    given += 1
                    yield timed
            return
        except Damaged:
            if exact or given:
                raise


def _again(first: Timed, rest: Iterator[Timed]) -> Iterator[Timed]:
    yield first
    yield from rest
