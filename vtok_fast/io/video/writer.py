"""Writing: frames and their times as H.264 in MP4, tagged with the colors they are in."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtok_fast.io.files import write_atomically
from vtok_fast.io.video.color import HD_LINES
from vtok_fast.io.video.errors import pyav
from vtok_fast.io.video.pixels import to_uint8
from vtok_fast.io.video.timing import Times

OPTIONS = {"crf": "14", "preset": "medium", "bf": "0"}  # no frame leans on a later one: see join_videos
LONGEST = 1 << 31  # of the clock of a track, between two frames


def write_video(
    path: str | os.PathLike, video: Tensor, fps: float = 25.0, *, times: Times | None = None
) -> None:
    """Write video (3, T, H, W) in [-1, 1] (or uint8) as an H.264 file in an MP4 container; H and W even.

    The matrix is that of BT.601 below 720 lines and of BT.709 from there on, the range limited, primaries and
    transfer those of BT.709; all are tagged. A file that is there is replaced only once the new one is
    complete; after an error nothing is left behind.

    Args:
        fps: frames per second, of a constant rate.
        times: when each frame is shown, instead of fps. Where they begin before 0, they are moved to begin
            at 0.

    Raises:
        ImportError: PyAV is not installed.
        ValueError: not such a video, fps is not positive, or times are not of as many frames.
        OSError: the file cannot be written (no space left, no such folder, no permission).
    """
    av = pyav()
    shape = tuple(video.shape)
    if len(shape) != 4 or shape[0] != 3 or 0 in shape or shape[2] % 2 or shape[3] % 2:
        raise ValueError(f"video must be (3, T, H, W) with even H and W, not of shape {shape}")
    if not (fps > 0 and math.isfinite(fps)):
        raise ValueError(f"fps={fps}: must be positive and finite")
    if times is None:
        times = Times.constant(fps, shape[1])
    if len(times) != shape[1]:
        raise ValueError(f"times: of {len(times)} frames, the video has {shape[1]}")
    times = writable(times)
    scale = timescale(times.base)
    shift = -min(times.pts[0], 0)
    pixels = (video if video.dtype == torch.uint8 else to_uint8(video.detach())).cpu().contiguous().numpy()

    def write(temporary: str) -> None:
        with _failures(av), av.open(temporary, "w", format="mp4", options=_clocks(scale)) as container:
            stream = container.add_stream("libx264", rate=_nominal(times.rate), options=OPTIONS)
            stream.width, stream.height, stream.pix_fmt = shape[3], shape[2], "yuv420p"
            context = stream.codec_context
            stream.time_base = context.time_base = times.base
            context.colorspace, context.color_range = matrix(shape[2]), 1
            context.color_primaries = context.color_trc = 1
            steps = iter(times.steps)
            for t, pts in enumerate(times.pts):
                frame = _frame(av, pixels[:, t])
                frame.pts, frame.time_base = pts + shift, times.base
                _mux(container, stream.encode(frame), steps)
            _mux(container, stream.encode(), steps)

    write_atomically(path, write)


def join_videos(
    path: str | os.PathLike, parts: Sequence[str | os.PathLike], start: Fraction | int = 0
) -> None:
    """Write the files that `write_video` wrote, one after the other, as one, without coding them again.

    They have one size and one time base. start: when the first frame is shown, in seconds, where the parts
    begin at 0. Errors as for `write_video`; VideoError for a part that cannot be read.
    """
    av = pyav()

    def write(temporary: str) -> None:
        with _failures(av), av.open(str(parts[0])) as first:
            scale = first.streams.video[0].time_base.denominator
        with _failures(av), av.open(temporary, "w", format="mp4", options=_clocks(scale)) as container:
            stream, offset = None, round(start * scale)
            for part in parts:
                with av.open(str(part)) as source:
                    track = source.streams.video[0]
                    stream = stream or container.add_stream_from_template(track)
                    end = offset
                    for packet in source.demux(track):
                        if packet.dts is None:  # the end, not a packet
                            continue
                        packet.pts, packet.dts = packet.pts + offset, packet.dts + offset
                        end = max(end, packet.pts + packet.duration)
                        packet.stream = stream
                        container.mux(packet)
                    offset = end

    write_atomically(path, write)


def writable(times: Times) -> Times:
    """Times that MP4 can hold: exactly these, or, where a clock is so fine that a frame's duration does not
    fit into 32 bits, to a tenth of a millisecond, or to a second."""
    for base in (times.base, Fraction(1, 10_000), Fraction(1)):
        scale = timescale(base)
        if scale < LONGEST and max(times.steps) * times.base * scale < LONGEST:
            break
    return times if base == times.base else times.to_base(base)


def matrix(height: int) -> int:
    """The matrix that players take for such a height, a number of ITU-T H.273: SMPTE 170M (BT.601) or
    BT.709."""
    return 1 if height >= HD_LINES else 6


def timescale(base: Fraction) -> int:
    """Ticks per second of a track in MP4: a multiple of the clock's, at least 10000 as FFmpeg has it."""
    scale = base.denominator
    while scale < 10000:
        scale *= 2
    return scale


def _clocks(scale: int) -> dict[str, str]:
    """The movie's clock is the track's, so that a start later than 0 is exact."""
    return {"movie_timescale": str(scale), "video_track_timescale": str(scale)}


def _nominal(rate: Fraction) -> Fraction:
    """A rate that fits into FFmpeg's fractions; only the encoder's rate control sees it."""
    return max(Fraction(1, 1000), min(rate, Fraction(1000))).limit_denominator(1001)


def _frame(av: Any, planes: np.ndarray) -> Any:
    """(3, H, W) uint8 as YUV 4:2:0."""
    kinds = av.video.reformatter.Interpolation
    frame = av.VideoFrame(planes.shape[2], planes.shape[1], "gbrp")
    for plane, values in zip(frame.planes, (planes[1], planes[2], planes[0])):
        lines = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
        lines[: values.shape[0], : values.shape[1]] = values
    return frame.reformat(
        format="yuv420p",
        src_colorspace=matrix(planes.shape[1]),
        dst_colorspace=matrix(planes.shape[1]),
        dst_color_range=1,
        interpolation=kinds.BICUBIC | kinds.FULL_CHR_H_INP | kinds.ACCURATE_RND,
        threads=1,
    )


def _mux(container: Any, packets: Any, steps: Iterator[int]) -> None:
    for packet in packets:
        packet.duration = next(steps)
        container.mux(packet)


@contextmanager
def _failures(av: Any) -> Iterator[None]:
    """FFmpeg's errors as OSError, with the number that the system gave."""
    try:
        yield
    except av.error.FFmpegError as error:
        code = getattr(error, "errno", None) or errno.EIO
        raise OSError(code, os.strerror(code) if code > 0 else str(error)) from error
