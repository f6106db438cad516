#!/usr/bin/env bash
# A mirrored clip comes out upside down.
#
# One would guess: a reader that applies an MP4's display matrix shows what the ffmpeg command shows.
# What happens: OpenCV, and whoever turns PyAV's frames by frame.rotation, read a rotation out of the matrix
# and nothing else. A horizontal flip (a front camera's mirror) has no rotation, yet the formula gives 180
# degrees, so they turn the picture upside down; a vertical flip gives 0 and is ignored; a rotation with a
# flip loses the flip. Pure rotations are right. Only the sign of the matrix's determinant tells a flip from a
# turn.
#
# Seen with: PyAV 18.1.0, opencv-python-headless 5.0.0.93, the ffmpeg 9.0.2 of imageio-ffmpeg 0.8.1.
# Source: FFMS/ffms2 issue 317 and mpv-player/mpv pull request 16090 (the determinant must be looked at);
# FFmpeg, libavutil/display.h, av_display_rotation_get.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check 'av==18.1.0' 'numpy==2.4.2' \
    'opencv-python-headless==5.0.0.93' 'imageio-ffmpeg==0.8.1'
venv/bin/python - <<'PY'
import subprocess

import av
import cv2
import imageio_ffmpeg
import numpy as np

av.logging.set_level(av.logging.PANIC)
FFMPEG, N = imageio_ffmpeg.get_ffmpeg_exe(), 128


def ffmpeg(*args):
    return subprocess.run([FFMPEG, "-v", "error", "-y", *args], check=True, capture_output=True).stdout


def corners(picture):
    """Colors of the upper left, upper right, lower left and lower right quarter: R, G, B or W."""
    points = [picture[y, x] for y in (N // 4, 3 * N // 4) for x in (N // 4, 3 * N // 4)]
    return "".join("W" if p.min() > 150 else "RGB"[int(p.argmax())] for p in points)


picture = np.zeros((N, N, 3), np.uint8)
picture[: N // 2, : N // 2, 0] = picture[: N // 2, N // 2 :, 1] = picture[N // 2 :, : N // 2, 2] = 255
picture[N // 2 :, N // 2 :] = 255
with av.open("plain.mp4", "w") as out:
    stream = out.add_stream("libx264", rate=25)
    stream.width, stream.height, stream.pix_fmt = N, N, "yuv420p"
    for _ in range(3):
        out.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
    out.mux(stream.encode(None))

print("stored", corners(picture), "(quarters: upper left, upper right, lower left, lower right)")
print("shown by each; one would guess the same three times in a row")
for matrix, shown, angle, read in [
    ("-display_rotation 90", "GWRB", 90, "GWRB"),
    ("-display_hflip", "GRWB", -180, "WBGR"),
    ("-display_vflip", "BWRG", 0, "RGBW"),
    ("-display_rotation 90 -display_hflip", "WGBR", 90, "GWRB"),
]:
    ffmpeg(*matrix.split(), "-i", "plain.mp4", "-c", "copy", "m.mp4")
    raw = ffmpeg("-i", "m.mp4", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    by_ffmpeg = corners(np.frombuffer(raw, np.uint8)[: N * N * 3].reshape(N, N, 3))
    with av.open("m.mp4") as src:
        frame = next(src.decode(video=0))
    by_pyav = corners(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))
    by_opencv = corners(cv2.VideoCapture("m.mp4").read()[1][..., ::-1])
    seen = by_ffmpeg, frame.rotation, by_pyav, by_opencv
    print("{:36} ffmpeg {}  rotation {:4}, turned by it {}  OpenCV {}".format(matrix, *seen))
    assert seen == (shown, angle, read, read), "the behavior has changed"
PY
