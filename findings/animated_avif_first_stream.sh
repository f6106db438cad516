#!/usr/bin/env bash
# An animated AVIF has two video streams, and the first one is a still picture.
#
# One would guess: a file of ten frames opens as one video stream of ten frames, as it did in older FFmpeg
# (PyAV 12.3.0) and as a GIF does.
# What happens: newer FFmpeg also lists the file's cover picture, the primary item, as a video stream, before
# the animation's track. streams.video[0] and decode(video=0) give one frame without an error, and so does the
# ffmpeg command with the streams that it chooses itself. Both streams carry the default flag and the same
# size; only streams.best("video") or the number of frames finds the animation.
#
# Seen with: PyAV 18.1.0 and 12.3.0, the ffmpeg 9.0.2 of imageio-ffmpeg 0.8.1, file made by Pillow 13.0.0.
# Source: wader/static-ffmpeg issue 530 (only the first frame since ffmpeg 7), hydrusnetwork/hydrus issue
# 2041.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check \
    'av==18.1.0' 'numpy==2.4.2' 'pillow==13.0.0' 'imageio-ffmpeg==0.8.1'
python3 -m venv old
old/bin/pip install -q --disable-pip-version-check 'av==12.3.0'
venv/bin/python - <<'PY'
import subprocess

import av
import imageio_ffmpeg
from PIL import Image

av.logging.set_level(av.logging.PANIC)
pictures = [Image.new("RGB", (64, 64), (20 * i, 20 * i, 20 * i)) for i in range(10)]
pictures[0].save("clip.avif", save_all=True, append_images=pictures[1:], duration=100)
assert Image.open("clip.avif").n_frames == 10


def frames(index):
    with av.open("clip.avif") as src:
        return sum(1 for _ in src.decode(video=index))


with av.open("clip.avif") as src:
    streams, best = len(src.streams.video), src.streams.best("video").index
    flags = {(stream.disposition, stream.width, stream.height) for stream in src.streams.video}
seen = [frames(index) for index in range(streams)]
command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", "clip.avif", "-f", "framemd5", "-"]
lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
by_command = sum(not line.startswith("#") for line in lines)
print(f"PyAV {av.__version__}: one would guess 10 frames in one stream; frames by stream {seen}, best {best}")
print(f"the ffmpeg command, left to choose: {by_command} of 10 frames")
assert seen == [1, 10] and best == 1 and by_command == 1 and len(flags) == 1, "the behavior has changed"
PY
old/bin/python - <<'PY'
import av

with av.open("clip.avif") as src:
    seen = len(src.streams.video), sum(1 for _ in src.decode(video=0))
print(f"PyAV {av.__version__}: {seen[0]} stream, {seen[1]} frames")
assert seen == (1, 10), "the behavior has changed"
PY
