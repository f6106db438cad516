"""Beginning in the middle: the same frames as after decoding everything before; windows; memory."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch

av = pytest.importorskip("av")

from support.video_files import encode, gray_levels, moving  # noqa: E402

from vtok_fast.io.video import VideoError, open_video, read_video  # noqa: E402
from vtok_fast.io.video.decode import Decoding  # noqa: E402
from vtok_fast.io.video.frames import Reading  # noqa: E402
from vtok_fast.io.video.prefetch import ahead  # noqa: E402
from vtok_fast.io.video.seek import scan  # noqa: E402
from vtok_fast.io.video.source import Source  # noqa: E402

OPEN = {"x264-params": "open-gop=1:keyint=10:min-keyint=10:scenecut=0:bframes=3"}
FILES = [
    ("libx264", "closed.mp4", {"g": "10"}),
    ("libx264", "open.mp4", OPEN),
    ("libx264", "open.mkv", OPEN),
    ("libx264", "open.ts", OPEN),
    ("libx264", "refresh.mp4", {"x264-params": "intra-refresh=1:keyint=10:bframes=0"}),
    ("libx265", "cra.mp4", {"x265-params": "open-gop=1:keyint=10:min-keyint=10:scenecut=0:log-level=none"}),
    ("libx265", "cra.mkv", {"x265-params": "open-gop=1:keyint=10:min-keyint=10:scenecut=0:log-level=none"}),
    ("libvpx-vp9", "a.webm", {"g": "10", "lag-in-frames": "5"}),
    ("mpeg4", "b.avi", {"g": "10"}),
    ("mpeg2video", "c.mpg", {"g": "10", "bf": "2"}),
    ("libx264", "raw.h264", {"g": "10"}),
]


@pytest.mark.parametrize(("codec", "name", "options"), FILES)
def test_every_start_gives_the_same_frames(tmp_path, codec, name, options):
    path = encode(tmp_path / name, moving(34), codec, fps=25, options=options)
    whole = read_video(path, dtype=torch.uint8)
    assert whole.video.shape[1] == 34
    with open_video(path) as source:
        for start in (1, 7, 8, 9, 10, 11, 12, 18, 19, 20, 21, 25, 33):
            pictures = [
                (picture.time, picture.pixels()) for picture, _ in zip(source.frames(start), range(3))
            ]
            assert [time for time, _ in pictures] == whole.times.seconds[start : start + 3]
            for offset, (_, planes) in enumerate(pictures):
                for channel, plane in enumerate(planes):
                    assert torch.equal(
                        torch.from_numpy(plane.copy()), whole.video[channel, start + offset]
                    ), start


def test_a_seek_decodes_only_what_it_needs(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", moving(60), options={"g": "10"})
    with contextlib.closing(Source(path, Reading())) as source:
        times, keys = scan(source)
        assert len(times) == 60 and len(keys) == 6
    with open_video(path) as source:
        decoded = []
        plain = Decoding.frames

        def counted(self):
            for timed in plain(self):
                decoded.append(timed.pts)
                yield timed

        monkeypatch.setattr(Decoding, "frames", counted)
        next(source.frames(55))
    assert len(decoded) <= 6


def test_no_frame_after_the_end(tmp_path):
    path = encode(tmp_path / "a.mp4", moving(5))
    with pytest.raises(VideoError, match="has no frame 5 or later"):
        read_video(path, start=5)


@pytest.mark.parametrize(("length", "overlap"), [(8, 0), (8, 3), (6, 4), (30, 0), (25, 0), (5, 0)])
@pytest.mark.parametrize("prefetch", [True, False])
def test_windows(tmp_path, length, overlap, prefetch):
    path = encode(tmp_path / "a.mp4", gray_levels(25), options={"g": "5", "qp": "10"})
    whole = read_video(path, dtype=torch.uint8)
    step = length - overlap
    starts = [n for n in range(0, 25, step) if n == 0 or n + overlap < 25]
    with open_video(path) as source:
        windows = list(source.windows(length, overlap=overlap, prefetch=prefetch))
        assert [len(window.times) for window in windows] == [min(length, 25 - start) for start in starts]
        for start, window in zip(starts, windows, strict=True):
            count, read = window
            assert torch.equal(read(), whole.video[:, start : start + count])
            assert window.times.seconds == whole.times.seconds[start : start + count]
        some = source.windows(
            length, overlap=overlap, first=1, wanted=lambda index: index == 2, prefetch=prefetch
        )
        for index, window in enumerate(some, 1):
            if index == 2:
                assert torch.equal(window.read(), windows[2].read())
            else:
                with pytest.raises(ValueError, match="not asked for"):
                    window.read()


def test_work_ahead_is_bounded_and_ends():
    made, gone = [], threading.Event()

    def numbers():
        try:
            for number in range(100):
                made.append(number)
                yield number
        finally:
            gone.set()

    items = ahead(numbers, depth=1)
    assert [next(items), next(items)] == [0, 1]
    assert len(made) <= 5
    items.close()
    assert gone.wait(5) and threading.active_count() < 20

    def fails():
        yield 1
        raise VideoError("no more")

    items = ahead(fails)
    assert next(items) == 1
    with pytest.raises(VideoError, match="no more"):
        next(items)


def test_frames_are_given_back_at_once(tmp_path):
    """Decoded frames are large; none may wait for the garbage collector."""
    import gc

    path = encode(tmp_path / "a.mp4", moving(60), prepare=lambda stream: stream.set_display_rotation(90))
    gc.collect()
    gc.disable()
    try:
        before = sum(isinstance(one, av.VideoFrame) for one in gc.get_objects())
        with open_video(path) as source:
            for window in source.windows(8):
                assert window.read().shape[2:] == (64, 48)
        assert sum(isinstance(one, av.VideoFrame) for one in gc.get_objects()) <= before + 3
    finally:
        gc.enable()


def test_memory_does_not_grow_with_length(tmp_path):
    """The peak of what Python and NumPy hold, over ten times as many frames."""
    import tracemalloc

    peaks = []
    for count in (30, 300):
        path = encode(
            tmp_path / f"{count}.mp4", [moving(1, 120, 160)[0]] * count, options={"preset": "ultrafast"}
        )
        tracemalloc.start()
        with open_video(path) as source:
            for window in source.windows(8, (96, 96)):
                window.read()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + 100_000
