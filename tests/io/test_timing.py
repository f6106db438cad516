"""Each frame's own time: read, resampled, written."""

from __future__ import annotations

import shutil
import subprocess
from fractions import Fraction

import numpy as np
import pytest
import torch

av = pytest.importorskip("av")

from support.video_files import encode, gray_levels, moving  # noqa: E402

from vtok_fast.io.video import Times, join_videos, open_video, read_video, write_video  # noqa: E402
from vtok_fast.io.video.timing import near, resample  # noqa: E402

FFMPEG = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="the program ffmpeg is not installed")
VARIABLE = [0, 42, 83, 125, 1000, 1017, 1300]


def levels(path, **options):
    """Which of `gray_levels` each frame is."""
    video = read_video(path, dtype=torch.uint8, **options).video.float().mean((0, 2, 3))
    return ((video - 16) / 8).round().int().tolist()


@pytest.mark.parametrize("options", [{"bf": "0"}, {}])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov", "ts", "webm"])
def test_variable_rate_is_kept(tmp_path, suffix, options):
    """Breakthrough/PySceneDetect #168, pytorch/vision #2490: the header's rate does not say when frames are
    shown."""
    codec = "libvpx" if suffix == "webm" else "libx264"
    path = encode(
        tmp_path / f"a.{suffix}", moving(7), codec, pts=VARIABLE, options=options if codec != "libvpx" else {}
    )
    clip = read_video(path)
    assert clip.times.seconds == pytest.approx([value / 1000 for value in VARIABLE], abs=2e-5)
    assert clip.fps == pytest.approx(7 / (1.3 + clip.times.durations[-1]))
    write_video(tmp_path / "back.mp4", clip.video, times=clip.times)
    assert read_video(tmp_path / "back.mp4").times.seconds == clip.times.seconds
    assert read_video(tmp_path / "back.mp4").times.durations == clip.times.durations


@pytest.mark.parametrize(
    "rate", [Fraction(24000, 1001), Fraction(60000, 1001), 25, Fraction(1, 2), Fraction(1, 3600), 1000]
)
def test_constant_rates_are_exact(tmp_path, rate):
    write_video(tmp_path / "a.mp4", torch.rand(3, 5, 16, 16), rate)
    clip = read_video(tmp_path / "a.mp4")
    assert clip.times.rate == rate and clip.fps == float(rate)
    assert [time * clip.times.base for time in clip.times.pts] == [n / Fraction(rate) for n in range(5)]
    with open_video(tmp_path / "a.mp4") as source:
        assert [picture.time for picture in source.frames()] == clip.times.seconds


@pytest.mark.parametrize("fps", [0, -1, float("inf"), float("nan")])
def test_impossible_rates(tmp_path, fps):
    with pytest.raises(ValueError, match="fps="):
        write_video(tmp_path / "a.mp4", torch.zeros(3, 2, 8, 8), fps)


def test_offset_start_is_kept(tmp_path):
    path = encode(tmp_path / "a.mkv", moving(4), pts=[500, 540, 580, 620], options={"bf": "0"})
    clip = read_video(path)
    assert clip.times.seconds == [0.5, 0.54, 0.58, 0.62]
    write_video(tmp_path / "b.mp4", clip.video, times=clip.times)
    assert read_video(tmp_path / "b.mp4").times.seconds == [0.5, 0.54, 0.58, 0.62]


def test_negative_start_begins_at_0_when_written(tmp_path):
    times = Times(Fraction(1, 1000), (-40, 0, 100), 140)
    write_video(tmp_path / "a.mp4", torch.rand(3, 3, 16, 16), times=times)
    assert read_video(tmp_path / "a.mp4").times.seconds == [0, 0.04, 0.14]


def test_a_broadcast_counts_from_its_start(tmp_path):
    """The clock of MPEG-TS starts anywhere; also just before it wraps, after 26.5 hours."""
    for name, start in (("a.ts", 0), ("b.ts", (1 << 33) - 9000)):
        path = encode(
            tmp_path / name, moving(6), pts=[start + 3600 * n for n in range(6)], base=Fraction(1, 90000)
        )
        assert read_video(path).times.seconds == [0, 0.04, 0.08, 0.12, 0.16, 0.2], name


def edit_list(data: bytes, duration: int, media_time: int) -> bytes:
    """An MP4 with this one entry in its edit list, in the clocks of the movie and of the track."""
    at = data.index(b"elst") + 12
    return data[:at] + duration.to_bytes(4, "big") + media_time.to_bytes(4, "big") + data[at + 8 :]


def test_an_edit_list_cuts(tmp_path):
    """Frames before the cut are decoded and not shown; the header still counts them."""
    path = encode(tmp_path / "a.mp4", gray_levels(12), fps=10, options={"bf": "0", "g": "30", "qp": "10"})
    track = av.open(str(path)).streams.video[0].time_base.denominator
    path.write_bytes(edit_list(path.read_bytes(), 700, 5 * track // 10))
    assert levels(path) == list(range(5, 12))
    assert read_video(path).times.seconds == pytest.approx([n / 10 for n in range(7)])


def test_avi_with_reordered_frames(tmp_path):
    """AVI stamps pictures in the order of decoding; they come in the order of showing."""
    path = encode(tmp_path / "a.avi", gray_levels(12), options={"bf": "3", "qp": "10"})
    assert levels(path) == list(range(12))
    assert read_video(path).times.seconds == pytest.approx([n / 10 for n in range(12)])


def test_a_raw_stream_has_a_rate(tmp_path):
    path = encode(tmp_path / "a.h264", gray_levels(6), fps=30, fmt="h264", options={"bf": "0", "qp": "10"})
    clip = read_video(path)
    assert clip.times.rate == 30 and levels(path) == list(range(6)) and clip.times.pts[0] == 0


def test_joined_recordings_go_on(tmp_path):
    """The clock jumps back where two recordings are put together; their frames follow one another."""
    parts = [
        encode(tmp_path / f"{n}.ts", gray_levels(5), options={"qp": "10"}).read_bytes() for n in range(2)
    ]
    (tmp_path / "both.ts").write_bytes(b"".join(parts))
    assert levels(tmp_path / "both.ts") == [*range(5), *range(5)]
    assert read_video(tmp_path / "both.ts").times.seconds == pytest.approx([n / 10 for n in range(10)])


def fps_filter(times, end, fps):
    """What round=near means, number by number: k shows the last frame whose time rounds to k or before."""
    starts = [near(time * fps) for time in times]
    numbers = range(starts[0], max(near(end * fps), starts[0] + 1))
    return [max(i for i, start in enumerate(starts) if start <= number) for number in numbers]


@pytest.mark.parametrize("fps", [1, 5, 10, 24, Fraction(30000, 1001), 60])
def test_resampling_is_by_time(tmp_path, fps):
    path = encode(tmp_path / "a.mkv", gray_levels(7), pts=VARIABLE, options={"bf": "0", "qp": "10"})
    clip = read_video(path)
    times = [pts * clip.times.base for pts in clip.times.pts]
    expected = fps_filter(times, clip.times.end * clip.times.base, Fraction(fps))
    assert levels(path, fps=fps) == expected
    resampled = read_video(path, fps=fps)
    assert resampled.times.rate == fps and len(resampled.times) == len(expected)


@FFMPEG
@pytest.mark.parametrize("fps", ["5", "24", "30000/1001"])
def test_resampling_as_ffmpeg(tmp_path, fps):
    path = encode(tmp_path / "a.mp4", gray_levels(7), pts=VARIABLE, options={"bf": "0", "qp": "10"})
    command = [
        "ffmpeg",
        "-v",
        "error",
        "-i",
        path,
        "-vf",
        f"fps={fps}:round=near",
        "-fps_mode",
        "passthrough",
    ]
    raw = subprocess.run(
        [*command, "-f", "rawvideo", "-pix_fmt", "gray", "-"], capture_output=True, check=True
    ).stdout
    theirs = np.frombuffer(raw, np.uint8).reshape(-1, 32 * 32).mean(1)
    assert ((theirs - 16) / 8).round().astype(int).tolist() == levels(path, fps=Fraction(fps))


def test_resampling_a_single_short_frame():
    assert [number for _, number in resample([("a", 0, 1)], Fraction(1, 1000), Fraction(1))] == [0]
    assert near(Fraction(-1, 2)) == -1 and near(Fraction(1, 2)) == 1 and near(Fraction(-1, 3)) == 0


def test_times_as_json():
    times = Times(Fraction(1, 1000), (7, 49, 90, 132, 1007), 1047)
    assert Times.from_json(times.to_json()) == times
    assert times.to_json()["steps"] == [[42, 1], [41, 1], [42, 1], [875, 1], [40, 1]]
    assert Times.constant(Fraction(30000, 1001), 1_000_000).to_json()["steps"] == [[1, 1_000_000]]
    assert times[1:3] == Times(Fraction(1, 1000), (49, 90), 132)
    assert Times.cat([times[:2], times[2:]]) == times
    with pytest.raises(ValueError, match="must increase"):
        Times(Fraction(1, 1000), (0, 5, 5), 9)


def test_a_clock_too_fine_for_mp4_is_rounded(tmp_path):
    times = Times(Fraction(1, 1_000_000_000), (0, 10**9, 3600 * 10**9), 3601 * 10**9)
    write_video(tmp_path / "a.mp4", torch.rand(3, 3, 16, 16), times=times)
    assert read_video(tmp_path / "a.mp4").times.seconds == [0, 1, 3600]


def test_parts_are_joined_at_their_times(tmp_path):
    times = Times(Fraction(1, 1000), (500, 542, 583, 1600, 1700), 1733)
    video = torch.rand(3, 5, 16, 16)
    for index, frames in enumerate((slice(0, 2), slice(2, 5))):
        write_video(tmp_path / f"{index}.mp4", video[:, frames], times=times[frames].from_zero())
    join_videos(tmp_path / "a.mp4", [tmp_path / "0.mp4", tmp_path / "1.mp4"], start=Fraction(1, 2))
    found = read_video(tmp_path / "a.mp4").times
    assert found.seconds == times.seconds and found.durations == times.durations


def test_times_of_another_length(tmp_path):
    with pytest.raises(ValueError, match="times: of 3 frames, the video has 2"):
        write_video(tmp_path / "a.mp4", torch.zeros(3, 2, 8, 8), times=Times.constant(25, 3))
