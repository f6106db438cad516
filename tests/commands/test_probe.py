"""What `probe` says is what the reader does."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

av = pytest.importorskip("av")

from support.video_files import display_matrix, encode, moving, plane_frame, two_streams  # noqa: E402

from vtok_fast.cli import app  # noqa: E402
from vtok_fast.commands.probe import contact_sheet, probe, rgb_of  # noqa: E402
from vtok_fast.io.video import VideoError, read_video  # noqa: E402


def run(*arguments):
    return CliRunner().invoke(app, ["probe", *map(str, arguments)])


def test_a_plain_file(tmp_path):
    path = encode(tmp_path / "a.mp4", moving(5))
    found = probe(path)
    assert found["readable"] and found["size"] == [48, 64] and found["times"]["fps"] == 10
    assert found["times"]["even"] and found["times"]["frames"] == 5
    assert found["notes"] == ["the matrix is not tagged: BT.601 is taken, by its 48 lines"]
    assert json.loads(run(path, "--json").stdout) == json.loads(json.dumps(found))


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        ((0, 1, -1, 0), "turns by 90 degrees clockwise"),
        ((-1, 0, 0, -1), "turns by 180 degrees"),
        ((0, -1, 1, 0), "turns by 90 degrees counterclockwise"),
        ((-1, 0, 0, 1), "mirrors left to right"),
        ((1, 0, 0, -1), "mirrors top to bottom"),
    ],
)
def test_turned(tmp_path, matrix, words):
    path = encode(tmp_path / "a.mp4", moving(2), sar=(4, 3))
    path.write_bytes(display_matrix(path.read_bytes(), *matrix))
    found = probe(path)
    assert any(words in note for note in found["notes"]) and any(
        "4/3 times as wide" in note for note in found["notes"]
    )
    assert found["size"] == list(read_video(path).video.shape[2:])
    assert words in run(path).stdout


def test_streams_and_what_becomes_of_them(tmp_path):
    two_streams(tmp_path / "a.mkv", (32, 96))
    found = probe(tmp_path / "a.mkv")
    uses = [stream["use"] for stream in found["streams"]]
    chosen = uses.index("read")
    assert uses[1 - chosen] == "dropped: another video stream (--stream)"
    assert found["size"] == list(read_video(tmp_path / "a.mkv").video.shape[2:])


def test_what_cannot_be_read_is_said(tmp_path):
    path = encode(tmp_path / "a.mp4", moving(3), options={"x264-params": "tff=1"})
    found = probe(path)
    assert not found["readable"] and "is interlaced" in found["error"] and found["shape"]["interlaced"]
    result = run(path)
    assert result.exit_code == 1 and "refused without --deinterlace" in result.stdout
    result = run(path, "--deinterlace", "--deinterlacer", "yadif")
    assert result.exit_code == 0 and "yadif makes whole frames" in result.stdout
    (tmp_path / "b.mp4").write_bytes(b"noise" * 100)
    with pytest.raises(VideoError, match="cannot be read"):
        probe(tmp_path / "b.mp4")


def test_hdr_and_transparency(tmp_path):
    tags = {"colorspace": 9, "color_primaries": 9, "color_trc": 16, "color_range": 1}
    frame = plane_frame("yuv420p10le", 32, 32, (573, 512, 512), **tags)
    path = encode(tmp_path / "a.mp4", [frame], form="yuv420p10le", tags=tags)
    found = probe(path)
    assert found["colors"]["transfer"] == "PQ" and found["colors"]["bits"] == 10
    assert "it is HDR (PQ): tone-mapped to BT.709" in found["notes"]
    assert not probe(path, hdr="error")["readable"]
    image = torch.zeros(32, 32, 4, dtype=torch.uint8).numpy()
    path = encode(tmp_path / "b.mov", [image], "png", "rgba", source="rgba")
    assert "transparency is over RGB 255,255,255" in probe(path, background=rgb_of("white"))["notes"]


def test_a_cut_file_is_named(tmp_path):
    path = encode(tmp_path / "a.mkv", moving(9))
    path.write_bytes(path.read_bytes()[:-200])
    assert any("the file is cut off after" in note for note in probe(path)["notes"])


def test_contact_sheet(tmp_path):
    pytest.importorskip("matplotlib")
    path = encode(tmp_path / "a.mp4", moving(40))
    contact_sheet(path, tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 20_000
    assert run(path, "--plot", tmp_path / "b.png").exit_code == 0 and (tmp_path / "b.png").read_bytes()


def test_colors_by_name():
    assert rgb_of("black") == (0, 0, 0) and rgb_of("#ff8000") == (255, 128, 0) == rgb_of("FF8000")
    with pytest.raises(ValueError, match="background='blurple': expected"):
        rgb_of("blurple")
