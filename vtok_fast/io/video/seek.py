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

from vtok_fast.io.video.decode import Timed
from vtok_fast.io.video.errors import VideoError
from vtok_fast.io.video.frames import Picture
from vtok_fast.io.video.source import Source

# Containers that give each packet its time. Of MPEG-TS and -PS a parser guesses it, after a seek wrongly.
STAMPED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "flv")
KEYS = 3  # key frames that are tried


class Elsewhere(Exception):
    """A seek that did not lead where it should."""


def pictures_from(source: Source, start: int) -> Iterator[Picture]:
    """The pictures of a source from number `start` on."""
    times, keys = scan(source)
    given = 0
    if start < len(times):
        before = bisect_right(keys, times[start])
        for key in reversed(keys[max(0, before - KEYS) : before]):
            try:
                for picture in source.pictures(_from(source, key, times[start], times)):
                    yield picture
                    given += 1
                return
            except (Elsewhere, VideoError):
                # A decoder may also miss what lies before the key frame; whether there is damage is seen from
                # the start.
                if given:
                    break
    yield from (picture for number, picture in enumerate(source.shown()) if number >= start + given)


def scan(source: Source) -> tuple[list[int], list[int]]:
    """The times of the frames in order, and those of the key frames; empty where the packets do not tell."""
    source.rewind()
    if source.container.format.name not in STAMPED:
        return [], []
    decoding = source.decode(exact=True)
    times, keys = [], []
    for packet, joins, _ in decoding.packets():
        if packet.pts is None or joins or decoding.by_order:
            return [], []
        if packet.size and not packet.is_discard and not decoding.is_hidden(packet):
            times.append(packet.pts)
            if packet.is_keyframe:
                keys.append(packet.pts)
    times.sort()
    if any(one == other for one, other in zip(times, times[1:])):
        return [], []
    return times, sorted(keys)


def _from(source: Source, key: int, target: int, times: list[int]) -> Iterator[Timed]:
    """Frames from the one at `target` on. Raises Elsewhere if the first ones are not those that they should
    be."""
    wanted, reached = bisect_left(times, target), False
    source.rewind()
    source.container.seek(key, stream=source.stream)
    source.decoding = source.decode(exact=False)
    number: int | None = None
    for timed in source.decoding.frames():
        number = bisect_left(times, timed.pts) if number is None else number + 1
        if number >= len(times) or times[number] != timed.pts or (number > wanted and not reached):
            raise Elsewhere
        reached = reached or number == wanted
        if reached:
            yield timed
