"""Damaged files: an error that names file, frame and time, or an account of what is left out or concealed."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

av = pytest.importorskip("av")

from support.video_files import encode, moving  # noqa: E402

from vtok_fast.io.video import VideoError, open_video, read_video  # noqa: E402
from vtok_fast.io.video.container import declared_bytes  # noqa: E402


def noise(count, height=64, width=64):
    values = np.random.default_rng(0)
    return [values.integers(0, 255, (height, width, 3), dtype=np.uint8) for _ in range(count)]


def packets(path):
    return [packet for packet in av.open(str(path)).demux(video=0) if packet.size]


def hurt(path, number, kind):
    """Damage a packet, or cut the file off in it."""
    data = bytearray(path.read_bytes())
    packet = bytes(packets(path)[number])
    at = data.index(packet)
    middle, end = at + len(packet) // 2, at + len(packet)
    if kind == "zero":
        data[at:end] = bytes(len(packet))
    elif kind == "half":
        data[middle:end] = np.random.default_rng(1).integers(0, 256, end - middle, np.uint8).tobytes()
    path.write_bytes(data[:middle] if kind == "cut" else data)


KINDS = [
    ("libx264", "a.mp4", {"bf": "0"}),
    ("libx264", "b.mp4", {}),
    ("libx264", "a.mkv", {}),
    ("libx264", "a.mov", {}),
    ("mpeg4", "a.avi", {}),
    ("libx265", "c.mp4", {"x265-params": "log-level=none"}),
    ("libvpx-vp9", "a.webm", {}),
    ("mjpeg", "b.avi", {}),
    ("libvpx", "b.webm", {}),
]
KINDS = [(codec, name, {"g": "8", **options}) for codec, name, options in KINDS]


def made(tmp_path, codec, name, options, frames=None):
    form = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    start = {"movflags": "faststart"} if name.endswith(("mp4", "mov")) else {}
    return encode(tmp_path / name, frames or noise(24), codec, form, options=options, container_options=start)


@pytest.mark.parametrize(("codec", "name", "options"), KINDS)
def test_a_packet_that_is_lost(tmp_path, codec, name, options):
    """dmlc/decord #83 and #119, meta-pytorch/torchcodec #505, pytorch/vision #4357."""
    path = made(tmp_path, codec, name, options)
    whole = read_video(path)
    assert whole.video.shape[1] == 24 and whole.problems == ()
    hurt(path, 12, "zero")
    with pytest.raises(VideoError, match=rf"{name}: frame 1\d at 1\.\d00 s: .*--on-error: skip or conceal"):
        read_video(path)
    skipped = read_video(path, on_error="skip")
    left = sum(problem.count for problem in skipped.problems)
    assert skipped.video.shape[1] == 24 - left and 1 <= left <= 12
    assert {problem.done for problem in skipped.problems} == {"left out"}
    for index, time in enumerate(skipped.times.seconds):  # what is left is right, at its own time
        assert torch.equal(skipped.video[:, index], whole.video[:, round(time * 10)])
    concealed = read_video(path, on_error="conceal")
    assert concealed.video.shape[1] == 24 and concealed.times.seconds == whole.times.seconds
    assert concealed.problems and {problem.done for problem in concealed.problems} == {"concealed"}


@pytest.mark.parametrize(
    ("codec", "name"), [("libx264", "a.mp4"), ("mpeg4", "b.mp4"), ("mpeg2video", "a.mpg")]
)
def test_a_packet_that_a_decoder_would_conceal(tmp_path, codec, name):
    """Half of it is noise; FFmpeg alone gives all frames, and no error."""
    rate = {"fps": 25} if codec == "mpeg2video" else {}
    path = encode(tmp_path / name, noise(24), codec, options={"g": "8"}, **rate)
    hurt(path, 12, "half")
    with pytest.raises(VideoError, match=rf"{name}: frame \d+ at .* s: "):
        read_video(path)
    assert read_video(path, on_error="skip").video.shape[1] < 24
    concealed = read_video(path, on_error="conceal")
    assert concealed.video.shape[1] == 24
    if codec != "libx264":  # of H.264 the decoder says nothing then, so nothing can be listed
        assert concealed.problems[0].what


@pytest.mark.parametrize(("codec", "name", "options"), KINDS)
def test_a_file_that_is_cut_off(tmp_path, codec, name, options):
    """yaak-ai/rbyte #56, pytorch/vision #1271, open-mmlab/mmaction2 #362: fewer frames, and no error."""
    path = made(tmp_path, codec, name, options)
    hurt(path, 15, "cut")
    with pytest.raises(VideoError, match=rf"{name}: frame 1\d at 1\.\d00 s: "):
        read_video(path)
    assert read_video(path, frames=8).video.shape[1] == 8  # what is there can be read
    clip = read_video(path, on_error="skip")
    assert 8 <= clip.video.shape[1] < 24
    assert clip.problems[-1].what.startswith("the file is cut off after") and clip.problems[-1].count == 0


def test_a_broadcast_that_is_cut_off(tmp_path):
    path = encode(tmp_path / "a.ts", noise(10))
    path.write_bytes(path.read_bytes()[: 188 * 100 + 60])
    with pytest.raises(VideoError, match=r"a\.ts: frame \d"):
        read_video(path)


def test_the_length_that_a_file_declares(tmp_path):
    for name in ("a.mp4", "a.mkv", "a.avi", "a.ts"):
        path = encode(tmp_path / name, moving(3), "mpeg4" if name == "a.avi" else "libx264")
        size = path.stat().st_size
        assert declared_bytes(path) in (None, size), name
        path.write_bytes(path.read_bytes()[:-100])
        assert (declared_bytes(path) or 0) > size - 100, name
    path = encode(tmp_path / "live.mkv", moving(3), container_options={"live": "1"})
    assert declared_bytes(path) is None
    (tmp_path / "b.mp4").write_bytes(encode(tmp_path / "c.mp4", moving(3)).read_bytes() + b"something else")
    assert read_video(tmp_path / "b.mp4").video.shape[1] == 3


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system cannot bind a process to a core"
)
def test_the_error_does_not_depend_on_the_number_of_cores(tmp_path):
    path = made(tmp_path, "libx264", "a.mp4", {"g": "8"})
    hurt(path, 12, "cut")
    cores, said = os.sched_getaffinity(0), []
    for some in (list(cores)[:1], cores):
        os.sched_setaffinity(0, some)
        try:
            with pytest.raises(VideoError) as caught:
                read_video(path)
        finally:
            os.sched_setaffinity(0, cores)
        said.append(str(caught.value))
    assert said[0] == said[1] and "frame 1" in said[0]


@pytest.mark.parametrize(("first", "then"), [(64, 96), (96, 64)])
def test_a_change_of_size(tmp_path, first, then):
    """PyAV-Org/PyAV #3, imageio/imageio #930, soft-matter/pims #251."""
    parts = [encode(tmp_path / f"{size}.ts", moving(5, size, size)) for size in (first, then)]
    (tmp_path / "call.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    message = (
        rf"call\.ts: frame 5 at 0\.500 s: its size is {then}x{then}, that of the first frame {first}x{first}"
    )
    with pytest.raises(VideoError, match=message):
        read_video(tmp_path / "call.ts")
    with open_video(tmp_path / "call.ts") as source, pytest.raises(VideoError, match=message):
        list(source.windows(5))
    skipped = read_video(tmp_path / "call.ts", on_error="skip")
    assert skipped.video.shape == (3, 5, first, first) and skipped.problems[0].count == 5
    kept = read_video(tmp_path / "call.ts", on_error="conceal", dtype=torch.uint8)
    assert kept.video.shape == (3, 10, first, first) and kept.problems[0].done == "concealed"
    small = read_video(parts[1], dtype=torch.uint8).video.float().mean((2, 3))
    assert (kept.video[:, 5:].float().mean((2, 3)) - small).abs().max() < 3  # the whole picture, scaled


def test_a_recording_that_begins_within_a_group(tmp_path):
    """What comes before the first key frame cannot be shown, and is not damage."""
    path = encode(tmp_path / "a.ts", moving(30), options={"g": "10", "bf": "0"})
    data = path.read_bytes()
    at = data.index(bytes(packets(path)[4])[:60]) // 188 * 188
    path.write_bytes(data[: 188 * 3] + data[at:])
    clip = read_video(path)
    assert clip.video.shape[1] in (20, 21) and clip.problems == ()


def test_problems_come_with_their_window(tmp_path):
    path = made(tmp_path, "libx264", "a.mp4", {"g": "8", "bf": "0"})
    hurt(path, 12, "zero")
    with open_video(path, on_error="conceal") as source:
        windows = list(source.windows(8))
    assert [len(window.problems) > 0 for window in windows] == [False, True, False]
    assert windows[1].problems[0].frame == 12 and windows[1].problems[0].time == pytest.approx(1.2)


def test_unknown_policies(tmp_path):
    with pytest.raises(ValueError, match="on_error='ignore'"):
        read_video(os.devnull, on_error="ignore")


def test_a_codec_that_is_not_known(tmp_path):
    path = encode(tmp_path / "a.mp4", moving(3))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zz?1").replace(b"avcC", b"zzzC"))
    with pytest.raises(VideoError, match=r"a\.mp4 has a video stream, but no decoder for it is known"):
        read_video(path)


@pytest.mark.parametrize(
    ("codec", "name"),
    [
        ("libx264", "a.mp4"),
        ("libx264", "a.mkv"),
        ("libx264", "a.ts"),
        ("mpeg4", "a.avi"),
        ("libvpx", "a.webm"),
        ("ffv1", "b.mkv"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_damaged_ends_in_a_video_error(tmp_path, codec, name, seed):
    """Random bytes changed, or a random length: never another exception, and never a crash."""
    data, values = encode(tmp_path / name, moving(12), codec).read_bytes(), np.random.default_rng(seed)
    for turn in range(4):
        broken = bytearray(data)
        for at in values.integers(0, len(data), 6):
            broken[at] = values.integers(0, 256)
        (tmp_path / name).write_bytes(broken[: int(values.integers(1, len(data)))] if turn % 2 else broken)
        for on_error in ("stop", "skip", "conceal"):
            try:
                clip = read_video(tmp_path / name, on_error=on_error)
            except VideoError as error:
                assert name in str(error)
            else:
                assert len(clip.times) == clip.video.shape[1]


def test_titles_that_are_not_utf8(tmp_path):
    path = encode(tmp_path / "a.mkv", moving(3))
    assert b"Lavf" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b"Lavf", b"\xa8avf"))
    assert read_video(path).video.shape[1] == 3
