#!/usr/bin/env bash
# In AVI with B frames the pictures come in order and their times do not.
#
# One would guess: frame.pts rises from frame to frame, as in any other container, so it can be used to pick
# frames or to estimate the frame rate.
# What happens: AVI has no presentation times. libavformat counts packets in storage order, starting at 1, and
# the H.264 decoder hands each packet's number on to its picture: 1, 3, 4, 2, 6, ... The pictures come in the
# right order. The same encode in MP4 has rising times, and so has AVI without B frames, or with MPEG-4 Part 2
# instead of H.264. Sorting by pts, the usual repair for a reader that returns frames out of order, scrambles
# such a clip.
#
# Seen with: PyAV 18.1.0 (libavformat 62.12.102, libx264). Source: superuser404notfound/AetherEngine issue 516
# and xbmc/xbmc pull request 2057; FFmpeg, libavformat/avidec.c, which sets decoding times only.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check 'av==18.1.0' 'numpy==2.4.2'
venv/bin/python - <<'PY'
import av
import numpy as np

av.logging.set_level(av.logging.PANIC)


def write(path, codec, b_frames):
    with av.open(path, "w") as out:
        stream = out.add_stream(codec, rate=25, options={"bf": str(b_frames)})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for i in range(12):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 + 15 * i, np.uint8))))
        out.mux(stream.encode(None))


def rises(values):
    return all(a < b for a, b in zip(values, values[1:]))


print("one would guess rising times in each")
for path, codec, b_frames, in_order in [
    ("b.avi", "libx264", 2, False),
    ("b.mp4", "libx264", 2, True),
    ("p.avi", "libx264", 0, True),
    ("part2.avi", "mpeg4", 2, True),
]:
    write(path, codec, b_frames)
    with av.open(path) as src:
        frames = [(frame.pts, frame.to_ndarray(format="gray").mean()) for frame in src.decode(video=0)]
    times, brightness = [pts for pts, _ in frames], [mean for _, mean in frames]
    print(f"{path:10} {codec:8} B frames {b_frames}: pictures in order: {rises(brightness)}, times: {times}")
    assert len(frames) == 12 and rises(brightness)
    assert rises(times) == in_order, "the behavior has changed"
    if not in_order:
        assert times[:5] == [1, 3, 4, 2, 6], "the behavior has changed"
PY
