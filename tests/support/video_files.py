"""Small video files of every kind, written with PyAV and, where it cannot, by patching their boxes."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

LOSSLESS = {"qp": "0"}
TAGS = {"709": (1, 1, 1, 1), "601": (6, 6, 6, 1)}  # matrix, primaries, transfer, range


def encode(
    path: Path,
    frames: list[np.ndarray | av.VideoFrame],
    codec: str = "libx264",
    form: str = "yuv420p",
    *,
    fps: Any = 10,
    pts: list[int] | None = None,
    base: Fraction = Fraction(1, 1000),
    sar: tuple[int, int] | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    fmt: str | None = None,
    tags: dict[str, int] | None = None,
    source: str = "rgb24",
    prepare: Any = None,
) -> Path:
    """Write frames, arrays of the format `source` or PyAV's own, at the times pts * base or at a constant
    rate.

    tags: attributes of the encoder, such as colorspace; prepare(stream): anything else before the first
    frame.
    """
    with av.open(str(path), "w", format=fmt, options=container_options or {}) as container:
        add(container, frames, codec, form, fps, pts, base, sar, options, tags, source, prepare)
    return path


def add(
    container: Any,
    frames: list[Any],
    codec: str = "libx264",
    form: str = "yuv420p",
    fps: Any = 10,
    pts: list[int] | None = None,
    base: Fraction = Fraction(1, 1000),
    sar: tuple[int, int] | None = None,
    options: dict[str, str] | None = None,
    tags: dict[str, int] | None = None,
    source: str = "rgb24",
    prepare: Any = None,
) -> Any:
    """A stream of an open container, as `encode` writes it."""
    stream = container.add_stream(codec, rate=fps, options=options or {})
    frames = [
        x if isinstance(x, av.VideoFrame) else av.VideoFrame.from_ndarray(x, format=source) for x in frames
    ]
    stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, form
    if sar:
        stream.codec_context.sample_aspect_ratio = Fraction(*sar)
    if pts is not None:
        stream.time_base = stream.codec_context.time_base = base
    for name, value in (tags or {}).items():
        setattr(stream.codec_context, name, value)
    if prepare:
        prepare(stream)
    packets = []
    for index, frame in enumerate(frames):
        if pts is not None:
            frame.pts, frame.time_base = pts[index], base
        packets += stream.encode(frame)
    for packet in packets + stream.encode():
        container.mux(packet)
    return stream


def two_streams(path: Path, sizes: tuple[int, int], marked: int | None = None) -> Path:
    """Square videos of these sizes in one file, of which one may be marked as default."""
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("libx264", rate=10) for _ in sizes]
        for index, (stream, size) in enumerate(zip(streams, sizes, strict=True)):
            stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
            stream.disposition = int(index == marked)
        for stream, size in zip(streams, sizes, strict=True):
            for image in moving(3, size, size):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode())
    return path


def plane_frame(form: str, width: int, height: int, values: tuple[int, ...], **tags: int) -> av.VideoFrame:
    """A frame of one color: a code for each plane, of a planar format."""
    frame = av.VideoFrame(width, height, form)
    for plane, component, value in zip(frame.planes, frame.format.components, values, strict=True):
        kind = np.uint8 if component.bits <= 8 else np.uint16
        lines = np.full(plane.buffer_size // kind().itemsize, value, kind)
        plane.update(lines.tobytes())
    for name, tag in tags.items():
        setattr(frame, name, tag)
    return frame


def picture(height: int = 48, width: int = 64) -> np.ndarray:
    """(H, W, 3) with four quarters: red, green / blue, white. It differs under every turn and mirroring."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2, 0] = 255
    image[: height // 2, width // 2 :, 1] = 255
    image[height // 2 :, : width // 2, 2] = 255
    image[height // 2 :, width // 2 :] = 255
    return image


def moving(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Smooth frames that differ from one another."""
    y, x = np.mgrid[:height, :width]
    return [
        np.stack(
            (128 + 100 * np.sin(x / 7 + t / 3), 128 + 90 * np.cos(y / 9 - t / 4), 60 + x * y / 20 % 99), -1
        ).astype(np.uint8)
        for t in range(count)
    ]


def gray_levels(count: int, height: int = 32, width: int = 32) -> list[np.ndarray]:
    """Frame t is of the gray 16 + 8 * t, which tells frames apart whatever a codec does to them."""
    return [np.full((height, width, 3), 16 + 8 * t, np.uint8) for t in range(count)]


def display_matrix(data: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """An MP4 with another matrix in its track header (tkhd)."""
    at = data.index(b"tkhd") + 44
    matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    return data[:at] + matrix + data[at + 36 :]


def add_box(data: bytes, path: tuple[bytes, ...], box: bytes) -> bytes:
    """An MP4, whose index is at its end, with a box more at the end of the one that path leads to."""
    made, at, starts = bytearray(data), 0, []
    for name in path:
        at = made.index(name, at) - 4
        starts.append(at)
    end = at + struct.unpack(">I", made[at : at + 4])[0]
    made[end:end] = box
    for start in starts:
        made[start : start + 4] = struct.pack(
            ">I", struct.unpack(">I", made[start : start + 4])[0] + len(box)
        )
    return bytes(made)


SAMPLE_ENTRY = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1")


def clap(width: int, height: int, right: int, down: int) -> bytes:
    """A clean aperture of whole pixels, its center moved by (right, down) / 2."""
    return struct.pack(">I4s8i", 40, b"clap", width, 1, height, 1, right, 2, down, 2)


def pixel_crop(data: bytes, top: int, bottom: int, left: int, right: int) -> bytes:
    """A Matroska file with PixelCrop elements in its Video element."""
    crop = b"".join(
        code + b"\x82" + value.to_bytes(2, "big")
        for code, value in (
            (b"\x54\xbb", top),
            (b"\x54\xaa", bottom),
            (b"\x54\xcc", left),
            (b"\x54\xdd", right),
        )
    )
    return grow_matroska(data, (b"\x18\x53\x80\x67", b"\x16\x54\xae\x6b", b"\xae", b"\xe0"), crop)


def grow_matroska(data: bytes, path: tuple[bytes, ...], element: bytes) -> bytes:
    """A Matroska file with an element more at the end of the one that path leads to. What positions say of
    the parts behind it is not mended: readers find those in order."""
    made, at, end, sizes = bytearray(data), 0, len(data), []
    for name in path:
        while True:
            code = made[at : at + 9 - made[at].bit_length()]
            start = at + len(code)
            length = 9 - made[start].bit_length()
            value = int.from_bytes(made[start : start + length], "big") & ((1 << 7 * length) - 1)
            if bytes(code) == name:
                break
            at = start + length + value
            assert at < end, name
        sizes.append((start, length, value))
        at = start + length
    start, length, value = sizes[-1]
    made[start + length + value : start + length + value] = element
    for start, length, value in sizes:
        if value != (1 << 7 * length) - 1:  # not unknown
            assert value + len(element) < (1 << 7 * length) - 1
            made[start : start + length] = (value + len(element) | 1 << 7 * length).to_bytes(length, "big")
    return bytes(made)
