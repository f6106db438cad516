"""Reading and writing video files, and what happens when that is impossible."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

pytest.importorskip("av")

from vtok_fast.io.video import VideoError, read_video, to_float, to_uint8, write_video


def moving_disc(frames: int = 6, height: int = 48, width: int = 80) -> torch.Tensor:
    """(3, T, H, W) in [-1, 1]: a soft red disc that moves right by 4 pixels a frame on a gray ramp."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    video = (x / width - 0.5).expand(3, frames, height, width).clone()
    for t in range(frames):
        disc = torch.sigmoid((10.0 - ((x - 20 - 4 * t) ** 2 + (y - 24) ** 2).sqrt()) / 2)
        color = torch.tensor([0.8, -0.5, -0.5])[:, None, None]
        video[:, t] = video[:, t] * (1 - disc) + color * disc
    return video


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "disc.mp4"
    write_video(path, moving_disc(), fps=12.5)
    return path


def test_what_is_written_is_read(clip):
    video, fps = read_video(clip)
    assert (video.shape, video.dtype, fps) == ((3, 6, 48, 80), torch.float32, 12.5)
    assert (video - moving_disc()).square().mean().sqrt() < 0.06  # lossy, and half the chroma resolution
    red = video[0] - video[1]
    centers = [
        (red[t].clamp(min=0.4) - 0.4).sum(0).mul(torch.arange(80)).sum() / (red[t].clamp(min=0.4) - 0.4).sum()
        for t in range(6)
    ]
    np.testing.assert_allclose(centers, [20 + 4 * t for t in range(6)], atol=0.7)


def test_a_range_of_frames(clip):
    whole = read_video(clip).video
    assert torch.equal(read_video(clip, start=2, frames=3).video, whole[:, 2:5])
    assert read_video(clip, start=4, frames=100).video.shape[1] == 2


def test_sizes(clip):
    assert read_video(clip, size=(32, 32)).video.shape == (3, 6, 32, 32)
    assert read_video(clip, size=24).video.shape == (3, 6, 24, 40)
    assert read_video(clip, size=(96, 16)).video.shape == (3, 6, 96, 16)
    # The center is kept: the ramp of the background is 0 in the middle.
    corner = read_video(clip, size=(32, 32), frames=1).video[:, 0, :6, 16]
    assert corner.abs().max() < 0.1


def test_bytes_and_floats():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(values)), values)
    assert to_uint8(torch.tensor([-7.0, 7.0, float("nan")])).tolist() == [0, 255, 0]


def test_dtype_uint8(clip):
    raw = read_video(clip, dtype=torch.uint8).video
    assert raw.dtype == torch.uint8
    assert torch.equal(to_float(raw), read_video(clip).video)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="path: no video at .*none.mp4"):
        read_video(tmp_path / "none.mp4")


@pytest.mark.parametrize("content", [b"", b"this is no video" * 100])
def test_not_a_video(tmp_path, content):
    path = tmp_path / "bad.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match="path: .*bad.mp4 cannot be read as a video"):
        read_video(path)


def test_truncated(tmp_path, clip):
    path = tmp_path / "half.mp4"
    path.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    with pytest.raises(VideoError, match=r"half\.mp4"):
        read_video(path)


def test_no_video_stream(tmp_path):
    import av

    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match=r"sound\.wav has no video stream"):
        read_video(path)


def test_no_frame_in_range(clip):
    with pytest.raises(VideoError, match="no frame 6 or later"):
        read_video(clip, start=6)


@pytest.mark.parametrize(
    "options", [{"start": -1}, {"frames": 0}, {"size": 0}, {"size": (0, 8)}, {"dtype": torch.int64}]
)
def test_impossible_options(clip, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        read_video(clip, **options)


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (3, 4, 8), (3, 0, 8, 8), (3, 4, 7, 8)])
def test_write_wants_rgb_of_even_size(tmp_path, shape):
    with pytest.raises(ValueError, match="video must be"):
        write_video(tmp_path / "x.mp4", torch.zeros(shape))
    assert list(tmp_path.iterdir()) == []


def test_write_wants_a_positive_rate(tmp_path):
    with pytest.raises(ValueError, match="fps=0"):
        write_video(tmp_path / "x.mp4", torch.zeros(3, 2, 8, 8), fps=0)


def test_write_into_no_folder(tmp_path):
    with pytest.raises(OSError, match=r"none/x\.mp4"):
        write_video(tmp_path / "none" / "x.mp4", torch.zeros(3, 2, 8, 8))


@pytest.mark.volatile
def test_no_space_left_keeps_the_old_file(tmp_path):
    """A limit on the size of files stands for a full disk: the write fails half-way."""
    path = tmp_path / "x.mp4"
    path.write_bytes(b"old")
    script = textwrap.dedent(f"""
        import resource, torch
        from vtok_fast.io.video import write_video
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            write_video({str(path)!r}, torch.rand(3, 8, 64, 64) * 2 - 1)
        except OSError as error:
            print(type(error).__name__, error)
    """)
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.stdout.startswith("OSError"), result
    assert "x.mp4" in result.stdout and os.strerror(errno.EFBIG) in result.stdout
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.mp4"]


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    import av

    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def add_stream(self, *_, **__):
            raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(av, "open", lambda *_, **__: Full())
    with pytest.raises(OSError, match="No space left") as caught:
        write_video(tmp_path / "x.mp4", torch.zeros(3, 2, 8, 8))
    assert errno.ENOSPC in (caught.value.errno, caught.value.__cause__.errno)
    assert list(tmp_path.iterdir()) == []


def test_without_pyav(monkeypatch, clip):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"vtok-fast\[demo\]"):
        read_video(clip)
