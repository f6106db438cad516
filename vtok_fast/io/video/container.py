"""What a file says about itself: which stream to read, by which decoder, what is cropped, where it should
end."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from vtok_fast.io.video.errors import VideoError, pyav

ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own ones leave the transparency out
STRICT = {"h264": {"err_detect": "explode+aggressive"}}  # without, H.264 hides what is damaged, unmarked
# Containers whose clock starts anywhere, and raw streams, of which FFmpeg makes the times up.
UNANCHORED = ("mpegts", "mpeg", "h264", "hevc", "vvc", "mpegvideo", "m4v", "vc1", "obu", "h261", "h263")
BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"free", b"wide", b"skip", b"styp", b"sidx", b"uuid", b"mfra")
_LEVEL = threading.Lock()


@dataclass(frozen=True)
class Said:
    """What the container says of a stream in side data that PyAV does not give: crop (top, bottom, left,
    right) in pixels, and the profile of Dolby Vision, if there is one."""

    crop: tuple[int, int, int, int] = (0, 0, 0, 0)
    dolby_vision: int | None = None


def open_container(path: Path) -> Any:
    """The opened file. Raises FileNotFoundError or VideoError."""
    av = pyav()
    if not path.is_file():
        raise FileNotFoundError(f"path: no video at {path}")
    try:
        return av.open(str(path), metadata_errors="replace")  # titles are not always UTF-8
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(f"path: {path} cannot be read as a video ({error})") from error


def is_picture(stream: Any) -> bool:
    """Whether a video stream is cover art or a thumbnail."""
    disposition = int(stream.disposition)
    kind = type(stream.disposition)
    marks = [getattr(kind, name, 0) for name in ("attached_pic", "timed_thumbnails")]
    return any(disposition & int(mark) for mark in marks)


def choose(container: Any, path: Path, index: int | None = None) -> Any:
    """The stream that a player shows: of those that are not cover art, one with more than a single frame,
    then one marked as default, then the one with the most pixels, then the first. A number: that video
    stream.

    Raises VideoError if there is none.
    """
    streams = list(container.streams.video)
    known = [stream for stream in streams if stream.codec_context is not None]
    if streams and not known:
        raise VideoError(f"path: {path} has a video stream, but no decoder for it is known")
    if index is not None:
        if not 0 <= index < len(streams):
            raise VideoError(f"stream={index}: {path} has {len(streams)} video streams")
        if streams[index] not in known:
            raise VideoError(f"stream={index}: no decoder is known for that stream of {path}")
        return streams[index]
    real = [stream for stream in known if not is_picture(stream)]
    if not real:
        pictures = f" except {len(streams)} of cover art" if streams else ""
        raise VideoError(f"path: {path} has no video stream{pictures}")
    return max(real, key=_rank)  # the first one of the best


def _rank(stream: Any) -> tuple[bool, bool, int]:
    """Of the streams of an animated AVIF the one of a single frame is the still picture."""
    default = int(stream.disposition) & int(getattr(type(stream.disposition), "default", 0))
    return stream.frames != 1, bool(default), stream.width * stream.height


def decoder(stream: Any, strict: bool, exact: bool) -> Any:
    """The codec context that decodes a stream's packets: with transparency where there is any. `strict`: what
    is damaged is an error, where the codec can tell; `exact`: an error comes with the packet that causes it,
    which frame threads do not give."""
    av = pyav()
    context = stream.codec_context
    wanted = ALPHA_DECODERS.get(context.name)
    if wanted and stream.metadata.get("alpha_mode", stream.metadata.get("ALPHA_MODE")) == "1":
        context = av.CodecContext.create(wanted, "r")
    context.thread_type = "SLICE" if exact else "AUTO"
    if strict and context.name in STRICT:
        context.options = dict(STRICT[context.name])
    return context


def said(container: Any, stream: Any) -> Said:
    """Reads the description that libavformat prints, the only way by which PyAV gives it."""
    av = pyav()
    with _LEVEL:
        level = av.logging.get_level()
        av.logging.set_level(av.logging.INFO)
        try:
            text = container.dumps_format()
        finally:
            av.logging.set_level(level)
    found = re.search(rf"^  Stream #0:{stream.index}\b.*?(?=^  Stream #|\Z)", text, re.M | re.S)
    own = found.group() if found else ""
    crop = re.search(r"Frame Cropping: (\d+)/(\d+)/(\d+)/(\d+)", own, re.I)
    vision = re.search(r"DOVI configuration record:.*?profile: (\d+)", own)
    left, right, top, bottom = map(int, crop.groups()) if crop else (0, 0, 0, 0)
    return Said((top, bottom, left, right), int(vision.group(1)) if vision else None)


def clock_start(container: Any, stream: Any) -> int:
    """What to subtract from a stream's timestamps: 0, or where the clock starts anywhere, the start of the
    file's earliest stream."""
    if container.format.name not in UNANCHORED or container.start_time is None:
        return 0
    start = Fraction(container.start_time, 1_000_000)
    own = stream.start_time
    if own is not None and abs(own * stream.time_base - start) < Fraction(2, 1_000_000):
        return own
    return round(start / stream.time_base)


def declared_bytes(path: Path) -> int | None:
    """How long the file should be by its outermost structure (boxes of MP4, RIFF of AVI, EBML of Matroska,
    packets of MPEG-TS); None where it does not say."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        if head[4:8] in BOXES:
            at = 0
            while at + 8 <= size:
                file.seek(at)
                box = file.read(16)
                length = int.from_bytes(box[:4], "big")
                if length == 1 and len(box) == 16:
                    length = int.from_bytes(box[8:], "big")
                if length == 0:  # to the end of the file
                    return None
                if length < 8 or (at + length > size and box[4:8] not in BOXES):  # something was appended
                    return None
                at += length
            return at
        if head[:4] in (b"RIFF", b"RIFX") and head[8:12] in (b"AVI ", b"WEBP"):
            return int.from_bytes(head[4:8], "little" if head[:4] == b"RIFF" else "big") + 8
        if head[:4] == b"\x1a\x45\xdf\xa3":
            return _declared_matroska(file)
        if size > 564 and head[0] == 0x47:
            file.seek(188)
            marks = file.read(189)
            if marks[0] == marks[188] == 0x47 and size % 188:
                return (size // 188 + 1) * 188
    return None


def _declared_matroska(file: Any) -> int | None:
    """The end of the segment, if its length is known."""
    file.seek(4)
    length, _ = _vint(file)
    if length is None:
        return None
    file.seek(length, 1)
    if file.read(4) != b"\x18\x53\x80\x67":
        return None
    length, at = _vint(file)
    return None if length is None else at + length


def _vint(file: Any) -> tuple[int | None, int]:
    """A number of EBML, and where it ends. None: unknown, or not a number."""
    first = file.read(1)
    if not first or not first[0]:
        return None, file.tell()
    more = 8 - first[0].bit_length()
    value = int.from_bytes(bytes([first[0] & (0xFF >> (more + 1))]) + file.read(more), "big")
    unknown = value == (1 << (7 * (more + 1))) - 1
    return (None if unknown else value), file.tell()
