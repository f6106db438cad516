"""Every kind of file of the table in docs/videos.md reads as that says; and what changes in mid-stream."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("PIL")

from support.video_files import encode, gray_levels, moving  # noqa: E402
from support.video_kinds import KINDS, animation  # noqa: E402

from vtok_fast.io.video import VideoError, open_video, read_video  # noqa: E402

PAGE = Path(__file__).resolve().parents[2] / "docs" / "videos.md"
ROWS = {
    cells[0]: cells[-1]
    for line in PAGE.read_text().partition("## Kinds of file")[2].splitlines()
    if line.startswith("| ") and len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 4
}
READS = re.compile(r"(\d+)x(\d+), (\d+) frames, (\S+) s, (\d+) (\d+) (\d+)")


def test_the_table_has_every_kind():
    assert [kind.name for kind in KINDS] == [name for name in ROWS if name not in ("kind", "---")]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_table_is_true(tmp_path, kind):
    """Size, number of frames and times to the letter, colors within what another build of a codec changes."""
    path = tmp_path / kind.file
    kind.make(path)
    found = READS.fullmatch(ROWS[kind.name])
    if found is None:
        name, text = ROWS[kind.name].split(": ", 1)
        assert name == "VideoError"
        with pytest.raises(VideoError) as error:
            read_video(path, **kind.reading)
        assert text in str(error.value).replace(str(path), path.name)
        return
    clip = read_video(path, dtype=torch.uint8, **kind.reading)
    _, count, height, width = clip.video.shape
    assert [height, width, count] == [int(found[n]) for n in (1, 2, 3)]
    assert f"{clip.times.seconds[-1]:.3g}" == found[4]
    color = clip.video[:, 0, height // 4, width // 4].int()
    assert (color - torch.tensor([int(found[n]) for n in (5, 6, 7)])).abs().max() <= 2


@pytest.mark.parametrize("bf", ["0", "3"])
@pytest.mark.parametrize(
    ("codec", "suffix"), [("libx264", ".ts"), ("libx264", ".h264"), ("mpeg2video", ".ts")]
)
def test_pixels_change_their_shape_at_the_right_frame(tmp_path, codec, suffix, bf):
    """A broadcast goes from 4:3 to 16:9 and back; the container says nothing of it."""
    data = b""
    for number, sar in enumerate(((1, 1), (4, 3), (1, 1))):
        part = encode(
            tmp_path / f"{number}{suffix}", moving(7, 48, 64), codec, sar=sar, fps=25, options={"bf": bf}
        )
        data += part.read_bytes()
    (tmp_path / f"all{suffix}").write_bytes(data)
    with open_video(tmp_path / f"all{suffix}", on_error="conceal") as source:
        aspects = [picture.view.aspect for picture in source.frames()]
        assert {picture.shape for picture in source.frames(6) for picture in picture.pixels()} == {(48, 64)}
    assert aspects == [Fraction(1)] * 7 + [Fraction(4, 3)] * 7 + [Fraction(1)] * 7
    with pytest.raises(VideoError, match="frame 7 .* its size is 48x85, that of the first frame 48x64"):
        read_video(tmp_path / f"all{suffix}")


@pytest.mark.parametrize("bf", ["0", "3"])
def test_a_broadcast_with_a_gap_is_whole(tmp_path, bf):
    """The counters of MPEG-TS begin anew after it, which marks packets before it as incomplete."""
    data, times = b"", []
    for number, start in enumerate((10, 3600, 7300)):
        pts = [90000 * start + 3600 * n for n in range(6)]
        part = encode(
            tmp_path / f"{number}.ts",
            gray_levels(6),
            pts=pts,
            base=Fraction(1, 90000),
            options={"bf": bf, "qp": "10"},
        )
        data, times = data + part.read_bytes(), times + [start - 10 + n / 25 for n in range(6)]
    (tmp_path / "all.ts").write_bytes(data)
    for how in ("stop", "skip", "conceal"):
        clip = read_video(tmp_path / "all.ts", on_error=how, dtype=torch.uint8)
        assert clip.problems == () and clip.times.seconds == pytest.approx(times)
        levels = (clip.video.float().mean((0, 2, 3)) - 16) / 8
        assert levels.round().int().tolist() == [*range(6)] * 3


@pytest.mark.parametrize(
    ("name", "options"), [("a.gif", {"disposal": 2}), ("a.apng", {"format": "PNG", "disposal": 1})]
)
def test_animations_clear_their_frames(tmp_path, name, options):
    """Where the square was, the background is seen again."""
    animation(tmp_path / name, **options)
    clip = read_video(tmp_path / name, dtype=torch.uint8, background=(0, 0, 255))
    assert clip.times.seconds == [0, 0.2, 0.5]
    for t in range(3):
        row = clip.video[:, t, 16].T.numpy()
        expected = np.full((64, 3), (0, 0, 255), np.uint8)
        expected[8 + 16 * t : 24 + 16 * t] = (255, 0, 0)
        np.testing.assert_array_equal(row, expected)
