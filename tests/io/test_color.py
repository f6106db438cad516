"""Colors, against the formulas of the standards: matrix, range, depth, transparency, HDR; and what we
write."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

av = pytest.importorskip("av")

from support.video_files import encode, moving, plane_frame  # noqa: E402

from vtok_fast.io.video import VideoError, read_video, write_video  # noqa: E402
from vtok_fast.io.video.color import rgb  # noqa: E402

KR_KB = {
    1: (0.2126, 0.0722),
    4: (0.30, 0.11),
    5: (0.299, 0.114),
    6: (0.299, 0.114),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
}  # ITU-T H.273, table 4


def codes(color, matrix: int, bits: int, full: bool) -> list[int]:
    """Y'CbCr of R'G'B' in [0, 1], ITU-T H.273 (8.3)."""
    kr, kb = KR_KB[matrix]
    y = kr * color[0] + (1 - kr - kb) * color[1] + kb * color[2]
    u, v = (color[2] - y) / (2 * (1 - kb)), (color[0] - y) / (2 * (1 - kr))
    step, top = 1 << (bits - 8), (1 << bits) - 1
    if full:
        values = [y * top, u * top + 128 * step, v * top + 128 * step]
    else:
        values = [(219 * y + 16) * step, (224 * u + 128) * step, (224 * v + 128) * step]
    return [min(max(round(value), 0), top) for value in values]


def color_of(values, matrix: int, bits: int, full: bool) -> np.ndarray:
    """R'G'B' in [0, 255] of Y'CbCr codes."""
    kr, kb = KR_KB[matrix]
    step, top = 1 << (bits - 8), (1 << bits) - 1
    y, u, v = (float(value) for value in values)
    if full:
        y, u, v = y / top, (u - 128 * step) / top, (v - 128 * step) / top
    else:
        y, u, v = (
            (y - 16 * step) / (219 * step),
            (u - 128 * step) / (224 * step),
            (v - 128 * step) / (224 * step),
        )
    r, b = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
    return np.array([r, (y - kr * r - kb * b) / (1 - kr - kb), b]).clip(0, 1) * 255


COLORS = [
    (1, 1, 1),
    (0, 0, 0),
    (0.5, 0.5, 0.5),
    (1, 0, 0),
    (0, 1, 0),
    (0, 0, 1),
    *np.random.default_rng(0).random((24, 3)),
]


def pixel(frame, height=8, width=12, background=(0, 0, 0)):
    return np.array(
        [plane[height // 2, width // 2] for plane in rgb(frame, height, width, background)], float
    )


@pytest.mark.parametrize("size", [(16, 16), (8, 12), (24, 20)])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("form", "bits"),
    [
        ("yuv420p", 8),
        ("yuv422p", 8),
        ("yuv444p", 8),
        ("yuv420p10le", 10),
        ("yuv422p12le", 12),
        ("yuv444p16le", 16),
        ("yuv420p9le", 9),
    ],
)
def test_yuv_is_unbiased_at_every_depth_and_size(form, bits, full, size):
    """Half a code from the formula, at the frame's own size and scaled: libswscale by itself gives 253 for
    white, and PyAV before 17 another matrix (PyAV-Org/PyAV #2230, #2149, #1431)."""
    errors = []
    for matrix in KR_KB:
        for color in COLORS:
            values = codes(color, matrix, bits, full)
            frame = plane_frame(form, 16, 16, values, colorspace=matrix, color_range=2 if full else 1)
            errors.append(pixel(frame, *size) - color_of(values, matrix, bits, full))
    assert np.abs(errors).max() < 0.56  # half a code, and libswscale's coefficients of 16 bits
    assert abs(np.mean(errors)) < 0.08


@pytest.mark.parametrize(("height", "matrix"), [(576, 5), (718, 5), (720, 1), (1080, 1)])
def test_untagged_is_taken_by_lines(height, matrix):
    values = codes((1, 0, 0), matrix, 8, False)
    assert np.abs(pixel(plane_frame("yuv420p", 16, height, values)) - (255, 0, 0)).max() <= 1.5


@pytest.mark.parametrize(
    ("form", "bits"), [("gray", 8), ("gray10le", 10), ("gray12le", 12), ("gray16le", 16)]
)
def test_gray_is_full_range_unless_tagged(form, bits):
    top = (1 << bits) - 1
    for level in (0, 0.25, 0.5, 1):
        assert np.abs(pixel(plane_frame(form, 16, 16, (round(level * top),))) - level * 255).max() <= 0.51
        limited = round((16 + 219 * level) * (1 << (bits - 8)))
        tagged = plane_frame(form, 16, 16, (limited,), color_range=1)
        assert np.abs(pixel(tagged) - level * 255).max() <= 0.52


@pytest.mark.parametrize(
    ("form", "bits"), [("gbrp", 8), ("gbrp10le", 10), ("gbrp12le", 12), ("gbrp16le", 16)]
)
def test_planar_rgb(form, bits):
    top = (1 << bits) - 1
    for color in COLORS:
        r, g, b = (round(value * top) for value in color)
        frame = plane_frame(form, 16, 16, (g, b, r))
        assert np.abs(pixel(frame) - np.array((r, g, b)) * 255 / top).max() <= (0.51 if bits == 8 else 0.6)


@pytest.mark.parametrize(
    "form", ["rgb24", "bgr24", "rgba", "bgra", "argb", "abgr", "rgb48le", "rgba64le", "bgr0", "rgb0"]
)
def test_packed_rgb(form):
    image = np.zeros((16, 16, 3), np.uint8) + np.array((200, 40, 7), np.uint8)
    if "64" in form or "48" in form:
        extra = [np.full((16, 16, 1), 65535, np.uint16)] if "64" in form else []
        frame = av.VideoFrame.from_ndarray(
            np.concatenate([image.astype(np.uint16) * 257, *extra], 2), format=form
        )
    else:
        frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=form)
    assert pixel(frame).tolist() == [200, 40, 7]


@pytest.mark.parametrize(
    ("codec", "form", "name"),
    [
        ("gif", "rgb8", "a.gif"),
        ("png", "pal8", "a.mov"),
        ("qtrle", "rgb24", "b.mov"),
        ("ffv1", "gray", "a.mkv"),
        ("ffv1", "gray16le", "b.mkv"),
        ("ffv1", "bgr0", "c.mkv"),
        ("mjpeg", "yuvj444p", "a.avi"),
        ("prores_ks", "yuv422p10le", "c.mov"),
        ("libx264rgb", "rgb24", "a.mp4"),
    ],
)
def test_formats_in_files(tmp_path, codec, form, name):
    """White, gray and black come back, whatever holds them."""
    path = tmp_path / name
    frames = [np.full((32, 48, 3), value, np.uint8) for value in (0, 128, 255)]
    if form == "pal8":
        gray = [av.VideoFrame.from_ndarray(x, format="rgb24").reformat(format="rgb8") for x in frames]
        form, frames = "rgb24", [x.reformat(format="rgb24") for x in gray]
    encode(path, frames, codec, form)
    found = read_video(path, dtype=torch.uint8).video[:, :, 16, 24]
    expected = torch.tensor([0, 128, 255])
    tolerance = 44 if codec in ("gif", "png") else 1  # a palette of 3 + 3 + 2 bits
    assert (found.int() - expected).abs().max() <= tolerance, found


def test_ycgco():
    """Y = 128, Cg = 128 + 40, Co = 128 + 20 in full range: R = Y - Cg + Co, G = Y + Cg, B = Y - Cg - Co."""
    frame = plane_frame("yuv444p", 16, 16, (128, 168, 148), colorspace=8, color_range=2)
    assert np.abs(pixel(frame) - (108, 168, 68)).max() <= 1
    frame = plane_frame("yuv420p", 16, 16, (235, 128, 128), colorspace=8, color_range=1)
    assert pixel(frame).tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"colorspace": 14}, "ICtCp"),
        ({"colorspace": 10}, "constant luminance"),
        ({"color_trc": 9}, "logarithmic"),
        ({"color_primaries": 10}, "XYZ"),
    ],
)
def test_colors_that_cannot_be_converted_are_named(tmp_path, tags, message):
    path = encode(tmp_path / "a.mkv", moving(2), tags=tags)
    with pytest.raises(VideoError, match=rf"a\.mkv has .*{message}"):
        read_video(path)


def with_alpha(count=3):
    """Green; hidden red on the left, half seen in the middle."""
    image = np.zeros((32, 48, 4), np.uint8)
    image[:, :, 1], image[:, 16:, 3] = 255, 255
    image[:, :16] = (255, 0, 0, 0)
    image[:, 16:32, 3] = 128
    return [image] * count


@pytest.mark.parametrize(
    ("codec", "form", "name"),
    [
        ("png", "rgba", "a.mov"),
        ("qtrle", "argb", "b.mov"),
        ("ffv1", "bgra", "a.mkv"),
        ("libvpx", "yuva420p", "a.webm"),
        ("libvpx-vp9", "yuva420p", "b.webm"),
        ("prores_ks", "yuva444p10le", "c.mov"),
        ("ffv1", "yuva444p10le", "b.mkv"),
    ],
)
def test_transparency_is_over_a_stated_color(tmp_path, codec, form, name):
    """renpy/renpy #3324, mpv-player/mpv #3256: what is not seen must not show."""
    options = (
        {"crf": "4", "b": "4000000", "auto-alt-ref": "0"}
        if "vpx" in codec
        else {"profile": "4444"}
        if codec == "prores_ks"
        else {}
    )
    path = encode(tmp_path / name, with_alpha(), codec, form, source="rgba", options=options)
    for background in ((0, 0, 0), (255, 255, 255)):
        video = read_video(path, dtype=torch.uint8, background=background).video[:, 1].int()
        expected = [
            background,
            tuple(round(127 / 255 * b + 128 / 255 * c) for b, c in zip(background, (0, 255, 0))),
            (0, 255, 0),
        ]
        for x, color in zip((6, 24, 42), expected, strict=True):
            assert (video[:, 16, x] - torch.tensor(color)).abs().max() <= 12, (x, background)
        shrunk = read_video(path, dtype=torch.uint8, background=background, size=8).video[:, 1].int()
        assert (shrunk[:, 4, 1] - torch.tensor(background)).abs().max() <= 12


def test_hidden_colors_make_no_difference(tmp_path):
    """Two files that look the same give the same pixels, at every size."""
    frames = with_alpha()
    other = [frame.copy() for frame in frames]
    for frame in other:
        frame[:, :16, :3] = (7, 99, 200)
    clips = []
    for name, images in (("a.mkv", frames), ("b.mkv", other)):
        path = encode(tmp_path / name, images, "ffv1", "bgra", source="rgba")
        clips += [read_video(path, size=size, dtype=torch.uint8).video for size in (None, 10)]
    assert torch.equal(clips[0], clips[2]) and torch.equal(clips[1], clips[3])


def pq(nits: float) -> float:
    """The inverse EOTF of SMPTE ST 2084."""
    power = (nits / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def method_c(nits: float) -> float:
    """ITU-R BT.2446-1, method C, gray, as a code of BT.1886."""
    knee = 58.5 / 0.83802
    sdr = 0.83802 * nits if nits < knee else 15.09968 * np.log(nits / knee - 0.74204) + 78.99439
    return 255 * (min(sdr, 100) / 100) ** (1 / 2.4)


@pytest.mark.parametrize("nits", [0, 1, 26, 100, 203, 300, 1000])
def test_pq_is_tone_mapped(nits):
    """PyAV-Org/PyAV #2192, #2034: reference white, 203 nits, is nearly white and not gray."""
    tags = {"colorspace": 9, "color_primaries": 9, "color_trc": 16, "color_range": 1}
    code = round((16 + 219 * pq(nits)) * 4) if nits else 64
    found = pixel(plane_frame("yuv420p10le", 16, 16, (code, 512, 512), **tags))
    assert np.abs(found - method_c(nits)).max() <= 2 and np.ptp(found) <= 1
    if nits == 203:
        assert 235 <= found.min() <= 255


@pytest.mark.parametrize("signal", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_hlg_is_tone_mapped(signal):
    """Three quarters of the signal are 203 nits on a display of 1000 nits (BT.2408)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = signal**2 / 3 if signal <= 0.5 else (np.exp((signal - c) / a) + b) / 12
    nits = 1000 * scene**1.2
    if signal == 0.75:
        assert nits == pytest.approx(203, rel=0.01)
    tags = {"colorspace": 9, "color_primaries": 9, "color_trc": 18, "color_range": 1}
    found = pixel(plane_frame("yuv420p10le", 16, 16, (round((16 + 219 * signal) * 4), 512, 512), **tags))
    assert np.abs(found - method_c(nits)).max() <= 2


def test_hdr_colors_come_to_bt709():
    """BT.709 red inside BT.2020 (BT.2087) at 50 nits is red alone."""
    linear = np.array((0.6274, 0.0691, 0.0164)) * 50
    values = codes([pq(value) for value in linear], 9, 10, False)
    tags = {"colorspace": 9, "color_primaries": 9, "color_trc": 16, "color_range": 1}
    red, green, blue = pixel(plane_frame("yuv444p10le", 16, 16, values, **tags))
    assert red == pytest.approx(255 * (50 * 0.83802 / 100) ** (1 / 2.4), abs=3) and max(green, blue) < 20


def test_wide_gamut_of_standard_range_comes_to_bt709():
    """The same color, coded with the gamma of BT.1886 in BT.2020 and in P3."""
    for primaries, linear in ((9, (0.6274, 0.0691, 0.0164)), (12, (0.8225, 0.0332, 0.0171))):
        values = codes([value ** (1 / 2.4) for value in linear], 9, 10, False)
        tags = {"colorspace": 9, "color_primaries": primaries, "color_trc": 14, "color_range": 1}
        red, green, blue = pixel(plane_frame("yuv444p10le", 16, 16, values, **tags))
        assert red > 252 and max(green, blue) < 25, primaries


def test_hdr_can_be_refused(tmp_path):
    tags = {"colorspace": 9, "color_primaries": 9, "color_trc": 16, "color_range": 1}
    frame = plane_frame("yuv420p10le", 32, 32, (573, 512, 512), **tags)
    path = encode(tmp_path / "a.mp4", [frame], form="yuv420p10le", tags=tags)
    assert read_video(path, dtype=torch.uint8).video.min() >= 235
    with pytest.raises(VideoError, match=r"a\.mp4 is HDR, PQ .*--hdr error"):
        read_video(path, hdr="error")
    with pytest.raises(ValueError, match="hdr='off'"):
        read_video(path, hdr="off")


@pytest.mark.parametrize(("height", "matrix"), [(480, 6), (576, 6), (720, 1), (1080, 1), (2160, 1)])
def test_what_is_written_is_tagged_and_is_what_the_tag_says(tmp_path, height, matrix):
    """CyberAgentGameEntertainment/InstantReplay #173, Kosinkadink/ComfyUI-VideoHelperSuite #591."""
    colors = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (37, 180, 90))
    for color in colors[: 5 if height < 2000 else 1]:
        video = (
            torch.tensor(color, dtype=torch.uint8)[:, None, None, None].expand(3, 1, height, 64).contiguous()
        )
        write_video(tmp_path / "a.mp4", video)
        frame = next(av.open(str(tmp_path / "a.mp4")).decode(video=0))
        assert (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc) == (
            matrix,
            1,
            1,
            1,
        )
        planes = frame.to_ndarray()
        found = [
            planes[height // 2, 32],
            planes[height + height // 8, 16],
            planes[height + height // 4 + height // 8, 16],
        ]
        wanted = codes([value / 255 for value in color], matrix, 8, False)
        assert np.abs(np.array(found, int) - wanted).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(64, 96), (480, 640), (720, 1280)])
def test_what_writing_and_reading_costs(tmp_path, height, width):
    torch.manual_seed(0)
    coarse = torch.randn(1, 3, 2, max(2, height // 60), max(2, width // 60))
    video = torch.nn.functional.interpolate(coarse, (2, height, width), mode="trilinear")[0].tanh()
    write_video(tmp_path / "a.mp4", video, Fraction(25))
    error = (read_video(tmp_path / "a.mp4").video - video).square().mean()
    assert 10 * torch.log10(4 / error) > 43
