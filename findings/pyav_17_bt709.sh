#!/usr/bin/env bash
# PyAV 17 changed the colors of every BT.709 clip, and PyAV 16 ignores even src_colorspace.
#
# One would guess: to_ndarray("rgb24") honors the matrix that a file states; and if an old version does not,
# src_colorspace=ITU709 says it.
# What happens: PyAV 16.1.0 converts a frame that is tagged BT.709 with BT.601's matrix, and asking for the
# matrix by name changes nothing: pure red reads (232, 0, 1). PyAV 18.1.0 reads (254, 0, 0) from the same
# file. So pixels, and tokens made of them, depend on the version of the reader: pin it with the tokens.
#
# Seen with: PyAV 16.1.0 and 18.1.0, on the same H.264 file. Source: PyAV-Org/PyAV issues 2230, 2149 and 1431.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
for version in 16.1.0 18.1.0; do
    python3 -m venv "venv-$version"
    "venv-$version/bin/pip" install -q --disable-pip-version-check "av==$version" 'numpy==2.4.2'
done
cat >read.py <<'PY'
import pathlib

import av
import numpy as np
from av.video.reformatter import Colorspace

av.logging.set_level(av.logging.PANIC)
EXPECTED = {"16.1.0": [232, 0, 1], "18.1.0": [254, 0, 0]}[av.__version__]
BT709 = 1
if not pathlib.Path("red.mp4").exists():
    with av.open("red.mp4", "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.colorspace = BT709
        frame = av.VideoFrame(64, 64, "yuv420p")
        frame.colorspace = BT709
        for plane, value in zip(frame.planes, (63, 102, 240)):  # BT.709, limited range: pure red
            plane.update(np.full(plane.buffer_size, value, np.uint8))
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
with av.open("red.mp4") as src:
    frame = next(src.decode(video=0))
assert int(frame.colorspace) == BT709
assert [np.frombuffer(plane, np.uint8)[0] for plane in frame.planes] == [63, 102, 240]
plain = frame.to_ndarray(format="rgb24")[32, 32].tolist()
asked = frame.to_ndarray(format="rgb24", src_colorspace=Colorspace.ITU709)[32, 32].tolist()
print(f"PyAV {av.__version__}, red in BT.709, one would guess [254, 0, 0]: {plain}, ITU709 by name {asked}")
assert plain == asked == EXPECTED, "the behavior has changed"
PY
for version in 16.1.0 18.1.0; do
    "venv-$version/bin/python" read.py
done
