"""Frames as a player shows them: turned, mirrored, cropped, with square pixels, of the right stream."""

from __future__ import annotations

import shutil
import subprocess
from fractions import Fraction

import numpy as np
import pytest
import torch

av = pytest.importorskip("av")

from support.video_files import (  # noqa: E402
    SAMPLE_ENTRY,
    add,
    add_box,
    clap,
    display_matrix,
    encode,
    moving,
    picture,
    pixel_crop,
    two_streams,
)

from vtok_fast.io.video import VideoError, open_video, read_video  # noqa: E402
from vtok_fast.io.video.geometry import View, fit, turns  # noqa: E402

# (a, b, c, d): the pixel at (p, q) is shown at (a p + c q, b p + d q), q downwards (ISO/IEC 14496-12, 8.3.2).
MATRICES = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0),
            (-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)]  # fmt: skip


def moved(image: np.ndarray, a: int, b: int, c: int, d: int) -> np.ndarray:
    """Each pixel put where the matrix says, one by one."""
    points = {
        (a * p + c * q, b * p + d * q): image[q, p]
        for q in range(image.shape[0])
        for p in range(image.shape[1])
    }
    left, top = (min(point[axis] for point in points) for axis in (0, 1))
    width, height = (max(point[axis] for point in points) + 1 - low for axis, low in ((0, left), (1, top)))
    shown = np.zeros((height, width, *image.shape[2:]), image.dtype)
    for (x, y), value in points.items():
        shown[y - top, x - left] = value
    return shown


def bytes_of(path, **options):
    return read_video(path, dtype=torch.uint8, **options).video.permute(1, 2, 3, 0).numpy()


@pytest.mark.parametrize("matrix", MATRICES)
def test_display_matrix(tmp_path, matrix):
    """PyAV-Org/PyAV #570 and #1047, meta-pytorch/torchcodec #1084, opencv/opencv #26876."""
    path = encode(tmp_path / "a.mp4", [picture()] * 2)
    plain = bytes_of(path)[0]
    path.write_bytes(display_matrix(path.read_bytes(), *matrix))
    with open_video(path) as source:
        assert (source.height, source.width) == moved(plain, *matrix).shape[:2]
    np.testing.assert_array_equal(bytes_of(path)[0], moved(plain, *matrix))
    small = bytes_of(path, size=(16, 20))[0]
    assert small.shape == (16, 20, 3)
    corner = moved(picture(), *matrix)[0, 0].astype(int)
    assert np.abs(small[0, 0].astype(int) - corner).max() < 40  # the quarter that is there, cut off the rest


def test_display_matrix_of_matroska(tmp_path):
    def turn(stream):
        stream.set_display_rotation(90)

    path = encode(
        tmp_path / "a.mkv", [picture()] * 2, "libx264rgb", "rgb24", prepare=turn, options={"qp": "0"}
    )
    frame = next(av.open(str(path)).decode(video=0))
    assert frame.rotation == 90
    np.testing.assert_array_equal(bytes_of(path)[0], np.rot90(picture()))


def test_matrices_that_are_not_quarter_turns():
    assert turns(None) == turns(bytes(36)) == (False, (False, False))
    with pytest.raises(VideoError, match="is turned by 45.0 degrees"):
        turns(np.array([46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30], np.int32).tobytes())
    nearly = np.array([-65536, 300, 0, -300, -65536, 0, 0, 0, 1 << 30], np.int32)
    assert turns(nearly.tobytes()) == (False, (True, True))


@pytest.mark.parametrize(
    ("sar", "shape"), [((64, 45), (72, 128)), ((4, 3), (72, 120)), ((8, 9), (72, 80)), ((1, 1), (72, 90))]
)
def test_square_pixels(tmp_path, sar, shape):
    """meta-pytorch/torchcodec #733, rigaya/NVEnc #43: the height stays, the width is multiplied."""
    path = encode(tmp_path / "dvd.mp4", moving(2, 72, 90), sar=sar)
    assert bytes_of(path).shape == (2, *shape, 3)
    assert bytes_of(path, size=36).shape == (2, *fit(*shape, 36), 3)
    assert bytes_of(path, size=(36, 36)).shape == (2, 36, 36, 3)


def test_square_pixels_are_turned_after_they_are_square(tmp_path):
    path = encode(tmp_path / "a.mp4", moving(2, 72, 90), sar=(4, 3))
    path.write_bytes(display_matrix(path.read_bytes(), 0, 1, -1, 0))
    assert bytes_of(path).shape == (2, 120, 72, 3)
    assert View((72, 90), Fraction(4, 3), True).shown == (120, 72)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_crop_of_the_container(tmp_path, suffix):
    """Clean aperture of MP4, PixelCrop of Matroska: the hidden bars stay hidden."""
    frames = moving(3)
    path = encode(tmp_path / f"a.{suffix}", frames, "libx264rgb", "rgb24", options={"qp": "0"})
    data = path.read_bytes()
    if suffix == "mp4":  # center moved by (5, -2): 17 on the left, 7 on the right, 4 above, 8 below
        path.write_bytes(add_box(data, SAMPLE_ENTRY, clap(40, 36, 10, -4)))
        rows, columns = slice(4, 40), slice(17, 57)
    else:
        path.write_bytes(pixel_crop(data, 8, 4, 2, 6))
        rows, columns = slice(8, 44), slice(2, 58)
    np.testing.assert_array_equal(bytes_of(path), np.stack(frames)[:, rows, columns])


@pytest.mark.parametrize("shape", [(47, 81), (1, 1), (33, 2)])
def test_odd_sizes(tmp_path, shape):
    frames = moving(2, *shape)
    path = encode(tmp_path / "a.mkv", frames, "ffv1", "bgr0")
    np.testing.assert_array_equal(bytes_of(path), np.stack(frames))


def test_crop_of_the_codec(tmp_path):
    """1080 lines are coded as 1088."""
    path = encode(tmp_path / "a.mp4", [np.full((1080, 16, 3), 200, np.uint8)])
    assert bytes_of(path).shape == (1, 1080, 16, 3)


def test_the_default_stream(tmp_path):
    """bytedeco/javacv #1876: of two streams the one marked as default, else the larger one."""
    for marked, expected in ((0, 32), (1, 96), (None, 96)):
        path = two_streams(tmp_path / f"{marked}.mkv", (32, 96), marked)
        assert bytes_of(path).shape[1] == expected, marked
        assert bytes_of(path, stream=0).shape[1] == 32
    with pytest.raises(VideoError, match="stream=2: .* has 2 video streams"):
        read_video(path, stream=2)


def test_cover_art_is_not_a_video(tmp_path):
    """opencast/opencast #3694, UltraStar-Deluxe/USDX #948."""
    jpeg = encode(tmp_path / "c.avi", moving(1), "mjpeg", "yuvj420p")
    cover = next(packet for packet in av.open(str(jpeg)).demux(video=0) if packet.size)
    for name in ("song.m4a", "film.mp4"):
        path = tmp_path / name
        with av.open(str(path), "w", format="mp4") as container:
            art = container.add_stream("mjpeg", rate=1)
            art.width, art.height, art.pix_fmt = 64, 48, "yuvj420p"
            art.disposition = int(av.stream.Disposition.attached_pic)
            if name == "song.m4a":
                sound = container.add_stream("aac", rate=44100)
                silence = av.AudioFrame.from_ndarray(
                    np.zeros((1, 44100), np.float32), format="fltp", layout="mono"
                )
                silence.sample_rate = 44100
                container.mux(sound.encode(silence))
                container.mux(sound.encode())
            else:
                add(container, moving(3, 32, 32))
            packet = av.Packet(bytes(cover))
            packet.stream, packet.pts, packet.dts, packet.is_keyframe = art, 0, 0, True
            container.mux(packet)
    assert bytes_of(tmp_path / "film.mp4").shape == (3, 32, 32, 3)
    with pytest.raises(VideoError, match="song.m4a has no video stream except 1 of cover art"):
        read_video(tmp_path / "song.m4a")


def interlaced(tmp_path, name="a.mp4", codec="libx264", form="yuv420p", **more):
    """Still picture except for a bar, which the bottom fields show 16 pixels further right."""
    frames = []
    for t in range(5):
        image = np.full((48, 64, 3), 60, np.uint8)
        image[0::2, 8 * t : 8 * t + 8] = 220
        image[1::2, 8 * t + 4 : 8 * t + 12] = 220
        frames.append(image)
    return frames, encode(tmp_path / name, frames, codec, form, **more)


def test_interlaced_is_refused_or_made_whole(tmp_path):
    _, path = interlaced(tmp_path, options={"x264-params": "tff=1", "qp": "4"})
    with pytest.raises(
        VideoError, match=r"a\.mp4 is interlaced \(at 0\.000 s\); deinterlace \(--deinterlace\)"
    ):
        read_video(path)
    for kind in (True, "bwdif", "yadif"):
        clip = read_video(path, deinterlace=kind, dtype=torch.uint8)
        assert clip.video.shape == (3, 5, 48, 64) and clip.times.seconds == [0, 0.1, 0.2, 0.3, 0.4]
        rows = clip.video[1].float()
        combs = (rows[:, 1:-1] - (rows[:, :-2] + rows[:, 2:]) / 2).abs().mean()
        woven = torch.from_numpy(np.stack(interlaced(tmp_path, "b.mp4")[0])[..., 1]).float()
        before = (woven[:, 1:-1] - (woven[:, :-2] + woven[:, 2:]) / 2).abs().mean()
        assert combs < before / 3
    with pytest.raises(ValueError, match="deinterlace='blend'"):
        read_video(path, deinterlace="blend")


def test_interlaced_by_the_container(tmp_path):
    """Of codecs that do not say it, the container does: Matroska's FlagInterlaced, the atom 'fiel' of MOV."""
    _, path = interlaced(tmp_path, "a.mov", "rawvideo", "uyvy422")
    fiel = b"\0\0\0\x0afiel\x02\x01"  # two fields, the top one first and stored first
    entry = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"2vuy")
    path.write_bytes(add_box(path.read_bytes(), entry, fiel))
    if av.open(str(path)).streams.video[0].codec_context.field_order < 2:
        pytest.skip("this FFmpeg does not read the atom")
    with pytest.raises(VideoError, match="is interlaced"):
        read_video(path)
    assert read_video(path, deinterlace=True).video.shape == (3, 5, 48, 64)


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="the program ffmpeg is not installed")
@pytest.mark.parametrize("matrix", MATRICES[1:5])
def test_as_ffmpeg_turns(tmp_path, matrix):
    path = encode(tmp_path / "a.mov", moving(2), "libx264rgb", "rgb24", options={"qp": "0"})
    path.write_bytes(display_matrix(path.read_bytes(), *matrix))
    command = ["ffmpeg", "-v", "error", "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    ours = bytes_of(path)
    np.testing.assert_array_equal(np.frombuffer(raw, np.uint8).reshape(ours.shape), ours)
