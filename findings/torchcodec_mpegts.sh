#!/usr/bin/env bash
# torchcodec finds no frame of an ordinary MPEG-TS.
#
# One would guess: what the ffmpeg command makes of a test picture with its defaults and a name that ends in
# .ts (H.264 with B frames) can be read frame by frame: len() says how many there are.
# What happens: len() is right, every single frame raises "Requested next frame while there are no more frames
# left to decode", by number and by iteration. Without B frames all are read, and so are the same packets in
# MP4. With several key frames some are read. The decoder seeks, and the first key frame of MPEG-TS cannot be
# sought by its presentation time.
#
# Seen with: torchcodec 0.13.0 (CPU), torch 2.13.0, FFmpeg 5.1.9 of Debian 12. Needs ffmpeg's shared libraries.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check 'torch==2.13.0' 'numpy==2.4.2'
venv/bin/pip install -q --disable-pip-version-check --no-deps 'torchcodec==0.13.0'
source=(-v error -y -f lavfi -i "testsrc2=s=320x240:r=25:d=8" -c:v libx264)
ffmpeg "${source[@]}" -bf 0 without.ts
ffmpeg "${source[@]}" with.ts
ffmpeg -v error -y -i with.ts -c copy with.mp4
venv/bin/python - <<'PY'
from torchcodec.decoders import VideoDecoder

for name, expected in (("without.ts", 200), ("with.mp4", 200), ("with.ts", 0)):
    decoder, read, why = VideoDecoder(name), 0, ""
    for number in range(len(decoder)):
        try:
            decoder.get_frame_at(number)
            read += 1
        except RuntimeError as error:
            why = str(error).splitlines()[0]
    print(f"{name:10}  of {len(decoder)} frames (one would guess all) {read} are read  {why}")
    assert (len(decoder), read) == (200, expected), "the behavior has changed"
PY
