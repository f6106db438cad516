"""The kinds of file of the table in docs/videos.md, each made from nothing: `KINDS`, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from support.video_files import (
    SAMPLE_ENTRY,
    add_box,
    clap,
    display_matrix,
    encode,
    moving,
    picture,
    pixel_crop,
    plane_frame,
    two_streams,
)

VARIABLE = [0, 42, 83, 125, 1000, 1017, 1300]
RED = {601: (81, 90, 240), 709: (63, 102, 240)}


@dataclass(frozen=True)
class Kind:
    """A file: what it is called, how it is made, and the options with which it is read."""

    name: str
    file: str
    make: Callable[[Path], Any]
    reading: dict[str, Any] = field(default_factory=dict)


def turned(matrix: tuple[int, int, int, int]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        encode(path, [picture()] * 3)
        path.write_bytes(display_matrix(path.read_bytes(), *matrix))

    return make


def patched(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        encode(path, [picture()] * 3)
        path.write_bytes(change(path.read_bytes()))

    return make


def written(frames: Callable[[], list[Any]], *arguments: Any, **options: Any) -> Callable[[Path], Path]:
    return lambda path: encode(path, frames(), *arguments, **options)


def flat(
    form: str,
    codes: tuple[int, ...],
    codec: str = "libx264",
    height: int = 48,
    options: dict[str, str] | None = None,
    **tags: int,
) -> Callable[[Path], Path]:
    """Two frames of one color, by its codes."""

    def make(path: Path) -> Path:
        frames = [plane_frame(form, 64, height, codes, **tags) for _ in range(2)]
        return encode(path, frames, codec, form, tags=tags, options=options)

    return make


def level(value: int, codec: str, form: str) -> Callable[[Path], Path]:
    return written(lambda: [np.full((48, 64, 3), value, np.uint8)] * 2, codec, form)


def hidden_red(codec: str, form: str) -> Callable[[Path], Path]:
    """Green on the right; on the left red, wholly transparent."""
    image = np.zeros((48, 64, 4), np.uint8)
    image[:, :, 1], image[:, :, 3] = 255, 255
    image[:, :32] = (255, 0, 0, 0)
    return written(lambda: [image] * 2, codec, form, source="rgba")


def joined(suffix: str, *parts: Callable[[Path], Any]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        data = b""
        for number, part in enumerate(parts):
            piece = path.with_name(f"part{number}{suffix}")
            part(piece)
            data += piece.read_bytes()
            piece.unlink()
        path.write_bytes(data)

    return make


def packets_of(path: Path, *clips: tuple[list[np.ndarray], dict[str, Any]], codec: str) -> None:
    """Clips of several encoders as one stream, the description being that of the first."""
    with av.open(str(path), "w") as out:
        out_stream, offset = None, 0
        for number, (frames, options) in enumerate(clips):
            piece = encode(path.with_name(f"part{number}{path.suffix}"), frames, codec, **options)
            with av.open(str(piece)) as source:
                track = source.streams.video[0]
                out_stream = out_stream or out.add_stream_from_template(track)
                for packet in source.demux(track):
                    if packet.size:
                        packet.pts, packet.dts = packet.pts + offset, packet.dts + offset
                        packet.stream = out_stream
                        out.mux(packet)
                offset += round(len(frames) / 10 / track.time_base)
            piece.unlink()


def cut_off(path: Path) -> None:
    encode(path, moving(20), options={"bf": "0"}, container_options={"movflags": "faststart"})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 9 // 10])


def animation(path: Path, **options: Any) -> None:
    """By Pillow: a red square that moves over transparent ground."""
    from PIL import Image

    frames = []
    for t in range(3):
        image = np.zeros((48, 64, 4), np.uint8)
        image[8:24, 8 + 16 * t : 24 + 16 * t] = (255, 0, 0, 255)
        frames.append(Image.fromarray(image))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[200, 300, 500], **options)


def still(path: Path) -> None:
    from PIL import Image

    Image.fromarray(picture()).save(path)


def palette_mov(path: Path) -> None:
    """PNG pictures of a palette in MOV."""
    import io

    from PIL import Image

    def paletted(t: int) -> bytes:
        image = Image.fromarray(np.full((48, 64), 1, np.uint8))
        image.putpalette([0, 0, 0, 200, 40, 10 + t])
        file = io.BytesIO()
        image.save(file, "png")
        return file.getvalue()

    template = encode(path.with_name("template.mov"), moving(1), "png", "rgb24", pts=[0])
    with av.open(str(template)) as source, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for t in range(3):
            packet = av.Packet(paletted(t))
            packet.stream, packet.is_keyframe, packet.time_base = stream, True, Fraction(1, 10)
            packet.pts, packet.dts, packet.duration = t, t, 1
            out.mux(packet)
    template.unlink()


def sound(path: Path) -> None:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=44100)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 4410), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 44100
        out.mux(stream.encode(silence))
        out.mux(stream.encode())


SMALL, LARGE = moving(5, 64, 64), moving(5, 96, 96)
FIELDS = {"options": {"x264-params": "tff=1"}}
X264 = {"options": {"bf": "0"}}
RAW = {"fmt": "h264", **X264}
HLG = {"colorspace": 9, "color_primaries": 9, "color_trc": 18, "color_range": 1}
PQ = {**HLG, "color_trc": 16}
QUIET = {"x265-params": "log-level=none"}
SIZES = joined(".h264", written(lambda: SMALL, **RAW), written(lambda: LARGE, **RAW))
SHAPES = joined(".h264", written(lambda: SMALL, **RAW), written(lambda: SMALL, sar=(4, 3), **RAW))


def clock(start: int) -> Callable[[Path], Path]:
    """Six frames of 25 a second in MPEG-TS, from this value of its clock of 90 kHz on."""
    return written(lambda: moving(6), base=Fraction(1, 90000), pts=[start + 3600 * n for n in range(6)])


def vp9_sizes(path: Path) -> None:
    packets_of(path, (SMALL, {}), (LARGE, {}), codec="libvpx-vp9")


KINDS = [
    Kind("turned 90° clockwise (phone)", "turned90.mp4", turned((0, 1, -1, 0))),
    Kind("turned 180°", "turned180.mp4", turned((-1, 0, 0, -1))),
    Kind("turned 270°", "turned270.mp4", turned((0, -1, 1, 0))),
    Kind("mirrored left to right", "hflip.mp4", turned((-1, 0, 0, 1))),
    Kind("mirrored top to bottom", "vflip.mp4", turned((1, 0, 0, -1))),
    Kind("turned and mirrored", "transposed.mp4", turned((0, 1, 1, 0))),
    Kind("display matrix in Matroska", "turned.mkv",
         written(lambda: [picture()] * 3, prepare=lambda stream: stream.set_display_rotation(90))),
    Kind("pixels 64:45 (DVD)", "dvd.mp4", written(lambda: moving(3, 72, 90), sar=(64, 45))),
    Kind("pixels 8:9", "ntsc.mp4", written(lambda: moving(3, 72, 90), sar=(8, 9))),
    Kind("pixels 4:3 as DisplayWidth of Matroska", "display.mkv",
         written(lambda: moving(3, 72, 90), sar=(4, 3))),
    Kind("clean aperture (clap)", "clap.mp4",
         patched(lambda data: add_box(data, SAMPLE_ENTRY, clap(40, 36, 10, -4)))),
    Kind("PixelCrop in Matroska", "crop.mkv", patched(lambda data: pixel_crop(data, 8, 4, 2, 6))),
    Kind("1080 lines coded as 1088", "lines.mp4", written(lambda: moving(2, 1080, 64))),
    Kind("odd size, VP9", "odd.webm", written(lambda: moving(3, 47, 81), "libvpx-vp9")),
    Kind("odd size, FFV1", "odd.mkv", written(lambda: moving(3, 47, 81), "ffv1", "bgr0")),
    Kind("interlaced", "fields.mp4", written(lambda: moving(4), **FIELDS)),
    Kind("interlaced, --deinterlace", "fields.mp4", written(lambda: moving(4), **FIELDS),
         {"deinterlace": True}),
    Kind("progressive, coded as if interlaced", "fake.mp4",
         written(lambda: moving(4), options={"x264-params": "fake-interlaced=1"})),
    Kind("BT.709 tagged, SD", "tagged.mp4",
         flat("yuv420p", RED[709], colorspace=1, color_primaries=1, color_trc=1, color_range=1)),
    Kind("untagged, 720 lines", "u720.mp4", flat("yuv420p", RED[709], height=720)),
    Kind("untagged, 480 lines", "u480.mp4", flat("yuv420p", RED[601], height=480)),
    Kind("full range", "full.mp4", flat("yuv420p", (255, 128, 128), color_range=2)),
    Kind("full range, MJPEG", "full.avi", flat("yuvj420p", (255, 128, 128), "mjpeg")),
    Kind("10 bit white", "deep.mp4", flat("yuv420p10le", (940, 512, 512))),
    Kind("12 bit 4:4:4, FFV1", "deep.mkv", flat("yuv444p12le", (3760, 2048, 2048), "ffv1")),
    Kind("PQ, reference white", "pq.mp4", flat("yuv420p10le", (573, 512, 512), **PQ)),
    Kind("HLG, 75 %", "hlg.mp4", flat("yuv420p10le", (721, 512, 512), **HLG)),
    Kind("HLG, 75 %, HEVC", "hlg.mkv", flat("yuv420p10le", (721, 512, 512), "libx265", options=QUIET, **HLG)),
    Kind("P3 primaries, red", "p3.mp4",
         flat("yuv420p", RED[709], colorspace=1, color_primaries=12, color_trc=1, color_range=1)),
    Kind("YCgCo", "ycgco.mkv", flat("yuv444p", (128, 168, 148), colorspace=8, color_range=2)),
    Kind("RGB (H.264 4:4:4)", "rgb.mp4", written(lambda: [picture()] * 2, "libx264rgb", "rgb24")),
    Kind("gray", "gray.mkv", level(100, "ffv1", "gray")),
    Kind("10 bit gray", "gray10.mkv", flat("gray10le", (401,), "ffv1")),
    Kind("16 bit gray", "gray16.mkv", level(100, "ffv1", "gray16le")),
    Kind("ProRes 4:2:2", "prores.mov", level(100, "prores_ks", "yuv422p10le")),
    Kind("4:2:2 of 10 bit, v210", "v210.mov", level(100, "v210", "yuv422p10le")),
    Kind("4:1:1, raw", "y411.avi", level(100, "rawvideo", "yuv411p")),
    Kind("black and white", "mono.avi", level(255, "rawvideo", "monow")),
    Kind("transparent MOV (PNG), hidden red", "alpha.mov", hidden_red("png", "rgba")),
    Kind("transparent ProRes 4444, hidden red", "alpha4444.mov", hidden_red("prores_ks", "yuva444p10le")),
    Kind("transparent WebM (VP9), hidden red", "alpha.webm", hidden_red("libvpx-vp9", "yuva420p")),
    Kind("palette, PNG in MOV", "palette.mov", palette_mov),
    Kind("GIF with delays", "delays.gif",
         written(lambda: [picture()] * 3, "gif", "rgb8", pts=[0, 200, 1000], base=Fraction(1, 1000))),
    Kind("transparent GIF, frames cleared", "cleared.gif", lambda path: animation(path, disposal=2)),
    Kind("APNG, frames cleared", "cleared.apng", lambda path: animation(path, format="PNG", disposal=1)),
    Kind("animated WebP", "animated.webp", lambda path: animation(path, lossless=True)),
    Kind("one picture, PNG", "still.png", still),
    Kind("one frame, MP4", "one.mp4", written(lambda: moving(1))),
    Kind("one frame, MPEG-TS", "one.ts", written(lambda: moving(1))),
    Kind("two streams, the larger one second", "larger.mkv", lambda path: two_streams(path, (32, 96))),
    Kind("two streams, the first marked as default", "default.mkv",
         lambda path: two_streams(path, (32, 96), 0)),
    Kind("variable rate, MP4 with B frames", "variable.mp4", written(lambda: moving(7), pts=VARIABLE)),
    Kind("variable rate, Matroska", "variable.mkv", written(lambda: moving(7), pts=VARIABLE)),
    Kind("variable rate, --fps 10", "variable.mkv", written(lambda: moving(7), pts=VARIABLE), {"fps": 10}),
    Kind("fragmented MP4", "fragments.mp4",
         written(lambda: moving(6), container_options={"movflags": "frag_keyframe+empty_moov"})),
    Kind("starts at 0.5 s", "late.mkv", written(lambda: moving(4), pts=[500, 540, 580, 620], **X264)),
    Kind("starts at -0.04 s", "early.nut", written(lambda: moving(4), pts=[-40, 0, 40, 80], **X264)),
    Kind("MPEG-TS (clock starts anywhere)", "clock.ts", written(lambda: moving(5))),
    Kind("MPEG-TS over the wrap of its clock", "wrap.ts", clock((1 << 33) - 9000)),
    Kind("two recordings joined", "joined.ts",
         joined(".ts", written(lambda: moving(5)), written(lambda: moving(5)))),
    Kind("two recordings joined, the second an hour later", "gap.ts",
         joined(".ts", clock(90000), clock(90000 * 3601))),
    Kind("AVI with B frames", "reordered.avi", written(lambda: moving(8), options={"bf": "3"})),
    Kind("raw H.264, 30 per second", "raw.h264", written(lambda: moving(6), fps=30, **RAW)),
    Kind("cut off", "cut.mp4", cut_off),
    Kind("cut off, --on-error skip", "cut.mp4", cut_off, {"on_error": "skip"}),
    Kind("size changes", "sizes.h264", SIZES),
    Kind("size changes, --on-error conceal", "sizes.h264", SIZES, {"on_error": "conceal"}),
    Kind("size changes, VP9", "sizes.webm", vp9_sizes),
    Kind("shape of pixels changes", "shapes.h264", SHAPES),
    Kind("shape of pixels changes, --on-error conceal", "shapes.h264", SHAPES, {"on_error": "conceal"}),
    Kind("size changes, VP9, --on-error conceal", "sizes.webm",
         vp9_sizes, {"on_error": "conceal"}),
    Kind("FLV", "a.flv", written(lambda: moving(4), "flv")),
    Kind("Windows Media", "a.wmv", written(lambda: moving(4), "wmv2")),
    Kind("AV1, 10 bit white", "av1.mkv", flat("yuv420p10le", (940, 512, 512), "libsvtav1")),
    Kind("sound alone", "sound.m4a", sound),
]  # fmt: skip
