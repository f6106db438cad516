#!/usr/bin/env bash
# A stream's average rate is not its frames over its time, and B frames decide what it is.
#
# One would guess: for five frames at 0, 40, 80, 120 and 1000 ms, average_rate is near 5 a second and the
# duration about 1.04 s, whatever the container and the encoder's settings.
# What happens: MP4 without B frames says 125/26 and 1.04 s. With them, the same five frames at the same five
# times have an average of 25 and last 0.2 s by the header, though the last frame comes out at 1.0 s: MP4 and
# MOV store the gaps between decoding times, which run behind, and the long gap falls off the end. Matroska
# and WebM always say 25, the nominal rate. So index / average_rate, the usual way to place frames in time,
# puts the last one at 0.16 s.
#
# Seen with: PyAV 18.1.0 (libavformat 62.12.102). Source: PyAV-Org/PyAV issue 2335 (variable frame rate in
# MP4); FFmpeg, libavformat/avformat.h, AVStream.avg_frame_rate ("average framerate").
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check 'av==18.1.0' 'numpy==2.4.2'
venv/bin/python - <<'PY'
from fractions import Fraction

import av
import numpy as np

av.logging.set_level(av.logging.PANIC)
TIMES = [0, 40, 80, 120, 1000]  # milliseconds


def write(path, codec, options):
    with av.open(path, "w") as out:
        stream = out.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, time in enumerate(TIMES):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 + 40 * i, np.uint8))
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


print("five frames at", TIMES, "ms; one would guess an average near 5 and 1.04 s everywhere")
for path, codec, options, average, seconds in [
    ("p.mp4", "libx264", {"bf": "0"}, Fraction(125, 26), 1.04),
    ("b.mp4", "libx264", {"bf": "3"}, Fraction(25), 0.2),
    ("b.mov", "libx264", {"bf": "3"}, Fraction(25), 0.2),
    ("p.mkv", "libx264", {"bf": "0"}, Fraction(25), 1.04),
    ("b.mkv", "libx264", {"bf": "3"}, Fraction(25), 1.04),
    ("p.webm", "libvpx", {}, Fraction(25), 1.04),
]:
    write(path, codec, options)
    with av.open(path) as src:
        stream = src.streams.video[0]
        seen = stream.average_rate, src.duration / av.time_base
        decoded = [round(1000 * frame.time) for frame in src.decode(stream)]
    print(f"{path:7} {options}: average {seen[0]}, duration {seen[1]} s; decoded at {decoded} ms")
    assert decoded == TIMES
    assert seen == (average, seconds), "the behavior has changed"
PY
