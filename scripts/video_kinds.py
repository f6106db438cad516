"""Make a file of every kind of the table in docs/videos.md, and print the table: what ffmpeg, torchcodec and
vtok_fast give.

    python scripts/video_kinds.py FOLDER [--torchcodec PYTHON] [--only WORD]

PYTHON: an interpreter with torchcodec, which need not be this one's environment. ffmpeg: the program of that
name in PATH.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import av  # noqa: E402
import torch  # noqa: E402
from support.video_kinds import KINDS, Kind  # noqa: E402

from vtok_fast.io.video import VideoError, read_video  # noqa: E402

TORCHCODEC = """
import json, sys
from torchcodec.decoders import VideoDecoder
for path in sys.argv[1:]:
    try:
        decoder = VideoDecoder(path, seek_mode="exact")
        frames = [decoder.get_frame_at(number) for number in range(len(decoder))]
        height, width = frames[0].data.shape[1:]
        color = frames[0].data[:, height // 4, width // 4].tolist()
        sizes = sorted({tuple(frame.data.shape[1:]) for frame in frames})
        print(json.dumps([height, width, len(frames), frames[-1].pts_seconds, color, len(sizes)]), flush=True)
    except Exception as error:
        print(json.dumps(type(error).__name__ + ": " + str(error).split("\\n")[0]), flush=True)
"""


def form(height: int, width: int, count: int, last: float, color: Any, sizes: int = 1) -> str:
    changes = "" if sizes == 1 else f", {sizes} sizes"
    return f"{height}x{width}{changes}, {count} frames, {last:.3g} s, {' '.join(str(int(v)) for v in color)}"


def here(kind: Kind, path: Path) -> str:
    """What `read_video` gives, or why not."""
    try:
        clip = read_video(path, dtype=torch.uint8, **kind.reading)
    except VideoError as error:
        said = str(error).replace(str(path), path.name).removeprefix("path: ")
        return "VideoError: " + said.partition(" (on_error, ")[0]
    _, count, height, width = clip.video.shape
    color = clip.video[:, 0, height // 4, width // 4].tolist()
    return form(height, width, count, clip.times.seconds[-1], color)


def by_ffmpeg(path: Path) -> str:
    """The program's own choice of stream, turned and converted by itself, with the times that come in."""
    if not shutil.which("ffmpeg"):
        return "not installed"
    raw = path.with_name(path.name + ".ffmpeg.nut")
    command = ["ffmpeg", "-v", "error", "-y", "-i", path, "-an", "-fps_mode", "passthrough"]
    command += ["-c:v", "rawvideo", "-pix_fmt", "rgb24", raw]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    try:
        with av.open(str(raw)) as container:
            frames = list(container.decode(video=0))
        first = frames[0].to_ndarray(format="rgb24")
        height, width = first.shape[:2]
        return form(height, width, len(frames), float(frames[-1].time), first[height // 4, width // 4])
    except (av.error.FFmpegError, IndexError, OSError):
        return "error: " + (done.stderr.strip().splitlines() or ["nothing"])[-1].replace(str(path), path.name)
    finally:
        raw.unlink(missing_ok=True)


def by_torchcodec(python: str | None, paths: list[Path]) -> list[str]:
    if python is None:
        return ["not run"] * len(paths)
    said = subprocess.run([python, "-c", TORCHCODEC, *paths], capture_output=True, text=True)
    lines = [line for line in said.stdout.splitlines() if line[:1] in '["']
    if len(lines) != len(paths):
        sys.exit(f"--torchcodec {python}: {said.stderr[-2000:]}")
    found = [json.loads(line) for line in lines]
    place = re.compile(r"(?<=Error: )\w+, \S+:\d+, ")  # in its own sources
    return [place.sub("", one) if isinstance(one, str) else form(*one) for one in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files are written")
    parser.add_argument("--torchcodec", help="an interpreter that has torchcodec")
    parser.add_argument("--only", default="", help="kinds with this in their name")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    kinds = [kind for kind in KINDS if options.only in kind.name]
    paths = [options.folder / kind.file for kind in kinds]
    for kind, path in zip(kinds, paths, strict=True):
        kind.make(path)
    print("| kind | ffmpeg | torchcodec | here |\n| --- | --- | --- | --- |")
    for kind, path, other in zip(kinds, paths, by_torchcodec(options.torchcodec, paths), strict=True):
        print(f"| {kind.name} | {by_ffmpeg(path)} | {other} | {here(kind, path)} |", flush=True)


if __name__ == "__main__":
    main()
