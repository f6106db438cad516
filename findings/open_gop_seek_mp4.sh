#!/usr/bin/env bash
# In an open-GOP HEVC file a backward seek can land after its target, in MP4 but not in Matroska.
#
# One would guess: seek(t, backward=True) lands on a key frame at or before t, so decoding from there reaches
# the frame at t; and the same packets in another container behave the same.
# What happens: in MP4 every target among the leading pictures of a CRA (shown before it, stored after it)
# lands on that CRA, so the first frame that comes out is later than the one asked for. The MP4 demuxer's
# index holds decoding times, and the CRA's decoding time lies before the leading pictures' presentation
# times. Matroska indexes presentation times, and all targets are exact there. A closed GOP is exact in both.
# So a clip sampler that seeks and drops frames earlier than t silently starts late: check the first time, and
# seek further back if it is late.
#
# Seen with: PyAV 18.1.0 (libavformat 62.12.102, x265). Source: FFmpeg, libavformat/avformat.h,
# AVIndexEntry.timestamp (a demuxer may store another time than the presentation time); mbunkus/mkvtoolnix
# issue 1543 (CRA in MP4).
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
TARGETS = range(40, 56)


def encode(path, open_gop):
    params = f"log-level=none:keyint=25:min-keyint=25:scenecut=0:bframes=4:open-gop={open_gop}"
    noise = np.random.default_rng(0).integers(60, 200, (64, 164, 3), np.uint8)
    with av.open(path, "w") as out:
        stream = out.add_stream("libx265", rate=25, options={"x265-params": params})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(100):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(noise[:, i : i + 64]))))
        out.mux(stream.encode(None))


def remux(source, target):
    with av.open(source) as src, av.open(target, "w") as out:
        stream = out.add_stream_from_template(src.streams.video[0])
        for packet in src.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)


def late(path):
    """{target frame: the first frame decoded after a backward seek to it}, where that frame is later."""
    with av.open(path) as src:
        times = [frame.pts for frame in src.decode(video=0)]
    found = {}
    for i in TARGETS:
        with av.open(path) as src:
            stream = src.streams.video[0]
            src.seek(times[i], stream=stream, backward=True)
            first = times.index(next(src.decode(stream)).pts)
        if first > i:
            found[i] = first
    return found


for open_gop in (1, 0):
    encode("clip.mp4", open_gop)
    remux("clip.mp4", "clip.mkv")
    for path in ("clip.mp4", "clip.mkv"):
        seen = late(path)
        expected = dict.fromkeys(range(46, 50), 50) if open_gop and path == "clip.mp4" else {}
        print(f"open-gop={open_gop} {path}: of targets 40..55, one would guess none late; late: {seen}")
        assert seen == expected, "the behavior has changed"
PY
