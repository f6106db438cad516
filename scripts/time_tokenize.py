"""`vtok-fast tokenize` on a 1080p clip, another checkout against this one: whole commands in turns.

    python scripts/time_tokenize.py OTHER benchmarks/runs/tokenize_1080p.json [--frames 90] [--rounds 3]

OTHER is a checkout with a .venv and a native module of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np

from vtok_fast.bench import machine

HERE = Path(__file__).resolve().parents[1]


def smooth(draw: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise of several octaves, around 127."""
    total = np.zeros((height, width, 3), np.float32)
    for octave in range(7):
        step = 1 << (7 - octave)
        small = draw.standard_normal((height // step + 2, width // step + 2, 3)).astype(np.float32)
        total += small.repeat(step, 0).repeat(step, 1)[:height, :width] * 0.72**octave
    return 127 + 45 * total / total.std()


def make_clip(path: Path, frames: int, height: int = 1080, width: int = 1920) -> None:
    """A picture that drifts, with grain."""
    draw = np.random.default_rng(7)
    canvas = smooth(draw, height + 2 * frames, width + 3 * frames)
    grain = draw.normal(0, 3, (8, height, width, 1)).astype(np.float32)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=30, options={"preset": "veryfast", "crf": "21", "g": "60"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for t in range(frames):
            picture = canvas[2 * t : 2 * t + height, 3 * t : 3 * t + width] + grain[t % 8]
            frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def seconds(tree: Path, clip: Path, output: Path, size: str) -> float:
    output.unlink(missing_ok=True)
    command = [
        tree / ".venv/bin/python",
        "-m",
        "vtok_fast.cli",
        "tokenize",
        clip,
        "-o",
        output,
        "--size",
        size,
    ]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    start = time.perf_counter()
    subprocess.run([*map(str, command), "--json"], cwd=tree, env=environment, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("other", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--frames", type=int, default=90)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", default="256")
    options = parser.parse_args()
    commit = ["git", "-C", str(options.other), "rev-parse", "HEAD"]
    of = {"other": options.other, "this": HERE}
    times: dict[str, list[float]] = {name: [] for name in of}
    with tempfile.TemporaryDirectory() as folder:
        clip, output = Path(folder) / "clip.mp4", Path(folder) / "clip.tokens"
        make_clip(clip, options.frames)
        for tree in of.values():  # once beforehand: files into memory
            seconds(tree, clip, output, options.size)
        for turn in range(options.rounds):
            for name in sorted(of, reverse=bool(turn % 2)):
                times[name].append(round(seconds(of[name], clip, output, options.size), 3))
    ratio = statistics.median(times["this"]) / statistics.median(times["other"])
    found = {
        "machine": machine.describe(),
        "other": subprocess.run(commit, capture_output=True, text=True, check=True).stdout.strip(),
        "frames": options.frames,
        "size": options.size,
        "seconds": times,
        "this / other": round(ratio, 3),
    }
    options.file.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["seconds"]), f"{ratio:.3f}")


if __name__ == "__main__":
    sys.exit(main())
