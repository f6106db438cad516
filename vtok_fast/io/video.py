"""Video files in and out, by PyAV: frames as the tensors the models take, and back.

Everything here needs the package `av`, which `pip install "vtok-fast[demo]"` brings.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vtok_fast.io.files import write_atomically


class VideoError(ValueError):
    """A file that cannot be read as a video; the message names it and says why."""


class Clip(NamedTuple):
    """`video` (C, T, H, W), float32 in [-1, 1] or uint8; `fps` its frames per second."""

    video: Tensor
    fps: float


def read_video(
    path: str | os.PathLike,
    *,
    size: int | tuple[int, int] | None = None,
    start: int = 0,
    frames: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Clip:
    """Decode frames [start, start + frames) of the first video stream of a file, as RGB.

    Args:
        size: (H, W): scale until the frame covers it, then cut out the centre. A number: scale the shorter
            side to it, and cut nothing. None: as the file has it.
        frames: how many at most; None: to the end.
        dtype: float32, values in [-1, 1]; or uint8, values as decoded.

    Raises:
        ImportError: PyAV is not installed.
        FileNotFoundError: there is no such file.
        ValueError: size, start, frames or dtype is impossible.
        VideoError: the file is damaged, has no video stream, or has no frame in that range.
    """
    if start < 0 or (frames is not None and frames < 1):
        raise ValueError(f"start={start}, frames={frames}: need start >= 0 and frames >= 1")
    if dtype not in (torch.float32, torch.uint8):
        raise ValueError(f"dtype={dtype}: torch.float32 or torch.uint8")
    if size is not None and min(size if isinstance(size, tuple) else (size,)) < 1:
        raise ValueError(f"size={size}: need at least one pixel")
    taken = []
    with open_video(path) as source:
        for index, frame in enumerate(source.frames()):
            if frames is not None and index >= start + frames:
                break
            if index >= start:
                taken.append(_pixels(frame, size))
        fps = source.fps
    if not taken:
        raise VideoError(f"path: {path} has no frame {start} or later")
    video = _video(taken)
    return Clip(video if dtype == torch.uint8 else to_float(video), fps)


class open_video:
    """A video file while it is read, as a context: its `fps`, `height`, `width` and `count` of frames (0
    where the file does not say), its frames one by one, or in windows.

    Raises ImportError, FileNotFoundError and VideoError as `read_video` does.
    """

    def __init__(self, path: str | os.PathLike):
        self._av, self.path = _av(), Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"path: no video at {self.path}")
        try:
            self._container = self._av.open(str(self.path))
        except (self._av.error.FFmpegError, OSError) as error:
            raise self._unreadable(error) from error
        if not self._container.streams.video:
            self._container.close()
            raise VideoError(f"path: {self.path} has no video stream")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self.fps = float(self._stream.average_rate or self._stream.guessed_rate or 25)
        self.height, self.width, self.count = self._stream.height, self._stream.width, self._stream.frames

    def __enter__(self) -> open_video:
        return self

    def __exit__(self, *_: Any) -> None:
        self._container.close()

    def frames(self) -> Iterator[Any]:
        """The frames as PyAV gives them, from the first on."""
        try:
            yield from self._container.decode(self._stream)
        except (self._av.error.FFmpegError, OSError) as error:
            raise self._unreadable(error) from error

    def windows(
        self, length: int, size: int | tuple[int, int] | None = None, overlap: int = 0
    ) -> Iterator[tuple[int, Callable[[], Tensor]]]:
        """Windows of `length` frames, each beginning with the last `overlap` frames of the one before, the
        last one perhaps of fewer: how many, and a function that gives them as (C, T, H, W) uint8 (so that a
        window that is not needed costs no conversion)."""
        window: list[Any] = []
        shared = 0
        for frame in self.frames():
            window.append(frame)
            if len(window) == length:
                yield len(window), partial(_stacked, window, size)
                shared = overlap
                window = window[length - overlap :]
        if len(window) > shared:
            yield len(window), partial(_stacked, window, size)

    def _unreadable(self, error: Exception) -> VideoError:
        return VideoError(f"path: {self.path} cannot be read as a video ({error})")


def to_float(video: Tensor) -> Tensor:
    """uint8 values to float32 in [-1, 1]."""
    return video.float().div_(127.5).sub_(1.0)


def to_uint8(video: Tensor) -> Tensor:
    """Values in [-1, 1] (others are clamped; NaN becomes black) to the nearest uint8."""
    return video.float().nan_to_num(-1.0).add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def write_video(path: str | os.PathLike, video: Tensor, fps: float = 25.0) -> None:
    """Write video (3, T, H, W) in [-1, 1] (or uint8) as an H.264 file in an MP4 container; H and W even.

    A file that is there is replaced only once the new one is complete; after an error nothing is left behind.

    Raises:
        ImportError: PyAV is not installed.
        ValueError: not such a video, or fps is not positive.
        OSError: the file cannot be written (no space left, no such folder, no permission).
    """
    av = _av()
    shape = tuple(video.shape)
    if len(shape) != 4 or shape[0] != 3 or 0 in shape or shape[2] % 2 or shape[3] % 2:
        raise ValueError(f"video must be (3, T, H, W) with even H and W, not of shape {shape}")
    if not fps > 0:
        raise ValueError(f"fps={fps}: must be positive")
    pixels = (
        (video if video.dtype == torch.uint8 else to_uint8(video.detach()))
        .cpu()
        .permute(1, 2, 3, 0)
        .contiguous()
        .numpy()
    )
    rate = Fraction(fps).limit_denominator(1001)

    def write(temporary: str) -> None:
        try:
            with av.open(temporary, "w", format="mp4") as container:
                # No frame leans on a later one ("bf"): see join_videos.
                stream = container.add_stream(
                    "libx264", rate=rate, options={"crf": "14", "preset": "medium", "bf": "0"}
                )
                stream.width, stream.height, stream.pix_fmt = shape[3], shape[2], "yuv420p"
                for frame in pixels:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                container.mux(stream.encode())
        except av.error.FFmpegError as error:
            code = getattr(error, "errno", None) or errno.EIO
            raise OSError(code, os.strerror(code) if code > 0 else str(error)) from error

    write_atomically(path, write)


def join_videos(path: str | os.PathLike, parts: Sequence[str | os.PathLike]) -> None:
    """Write the files that `write_video` wrote, one after the other, as one, without coding them again.

    They have one size and one frame rate. Errors as for `write_video`; VideoError for a part that cannot be
    read.
    """
    av = _av()

    def write(temporary: str) -> None:
        try:
            with av.open(temporary, "w", format="mp4") as container:
                stream, offset = None, 0
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
        except av.error.FFmpegError as error:
            code = getattr(error, "errno", None) or errno.EIO
            raise OSError(code, os.strerror(code) if code > 0 else str(error)) from error

    write_atomically(path, write)


def _stacked(frames: Sequence[Any], size: int | tuple[int, int] | None) -> Tensor:
    return _video([_pixels(frame, size) for frame in frames])


def _video(frames: Sequence[np.ndarray]) -> Tensor:
    """(T) frames (H, W, C) as (C, T, H, W)."""
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).contiguous()


def _pixels(frame: Any, size: int | tuple[int, int] | None) -> np.ndarray:
    """A decoded frame, scaled and cut, as (H, W, 3) uint8."""
    height, width = frame.height, frame.width
    if size is not None:
        target = size if isinstance(size, tuple) else (size, size)
        scale = max(target[0] / height, target[1] / width)
        height, width = max(target[0], round(height * scale)), max(target[1], round(width * scale))
    # AREA averages the pixels that fall together, so that shrinking does not alias.
    rgb = frame.reformat(width=width, height=height, format="rgb24", interpolation="AREA").to_ndarray()
    if isinstance(size, tuple):
        top, left = (height - size[0]) // 2, (width - size[1]) // 2
        rgb = rgb[top : top + size[0], left : left + size[1]]
    return rgb


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError(
            f'reading and writing videos needs PyAV ({error}): pip install "vtok-fast[demo]"'
        ) from error
    return av
