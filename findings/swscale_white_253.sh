#!/usr/bin/env bash
# Scaled or 10-bit 4:2:0 white becomes 253 in 8-bit RGB.
#
# One would guess: a flat white picture (Y = 235, or 940 in ten bits; neutral chroma) becomes 255, 255, 255 in
# RGB, at its own size and at any other, since no scaling filter can change a constant.
# What happens: libswscale gives 255 only for 8-bit planar video at its own size. Any change of size, ten
# bits, or NV12 takes another path, which is up to two codes too dark: 255 becomes 253, 128 becomes 126. A
# model that is trained on scaled clips and tried on unscaled ones sees two brightnesses, and 42 dB is the
# best PSNR that white can reach. 4:4:4 is right everywhere. The flag FULL_CHR_H_INT, which by its name is
# about chroma only, cures it.
#
# Seen with: PyAV 18.1.0 (libswscale 9.5.102). Source: FFMS/ffms2 issue 97 (conversions need undocumented
# flags); FFmpeg's scaler documentation, sws_flags, full_chroma_int ("enable full chroma interpolation").
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check 'av==18.1.0' 'numpy==2.4.2'
venv/bin/python - <<'PY'
import av
import numpy as np
from av.video.reformatter import Interpolation

AREA, FULL = Interpolation.AREA, Interpolation.AREA | Interpolation.FULL_CHR_H_INT


def flat(pix_fmt, luma):
    frame = av.VideoFrame(128, 128, pix_fmt)
    dtype, neutral = (np.uint16, 512) if "10" in pix_fmt else (np.uint8, 128)
    for i, plane in enumerate(frame.planes):
        plane.update(np.full(plane.buffer_size // dtype().itemsize, neutral if i else luma, dtype))
    return frame


def rgb(frame, size, flags):
    out = frame.reformat(width=size, height=size, format="rgb24", interpolation=flags).to_ndarray()
    assert out.min() == out.max()
    return int(out[0, 0, 0])


print("libswscale", av.library_versions["libswscale"])
print("a flat 128x128 picture as RGB; one would guess 255 throughout, or 128 for Y 126")
for pix_fmt, luma, expected in [
    ("yuv420p", 235, [255, 253, 253]),
    ("yuv420p", 126, [128, 126, 126]),
    ("yuv422p", 235, [255, 253, 253]),
    ("nv12", 235, [253, 253, 253]),
    ("yuv420p10le", 940, [253, 253, 253]),
    ("yuv444p", 235, [255, 255, 255]),
    ("yuv444p10le", 940, [255, 255, 255]),
]:
    frame = flat(pix_fmt, luma)
    seen = [rgb(frame, size, AREA) for size in (128, 64, 256)]
    cured = [rgb(frame, size, FULL) for size in (128, 64, 256)]
    print(f"{pix_fmt:12} Y {luma:3}  to 128, 64, 256: {seen}  with FULL_CHR_H_INT: {cured}")
    assert seen == expected, "the behavior has changed"
    assert cured == [expected[0] if pix_fmt == "yuv420p" else 255] * 3, "the behavior has changed"
PY
