"""An hour of video through `tokenize` in one process: resident memory after each minute of video.

python scripts/video_hour.py --json benchmarks/runs/video_hour.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np


def generate(path: Path, frames: int, height: int, width: int) -> None:
    y, x = np.mgrid[:height, :width]
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"preset": "ultrafast", "g": "250", "crf": "28"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for t in range(frames):
            gray = (128 + 100 * np.sin(x / 9 + t / 25) * np.cos(y / 7 - t / 40)).astype(np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(gray, format="gray")))
        out.mux(stream.encode())


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="64x64")
    parser.add_argument("--frames", type=int, default=90_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    height, width = map(int, options.size.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        clip, output = Path(folder) / "hour.mp4", Path(folder) / "hour.tokens"
        begun = time.time()
        generate(clip, options.frames, height, width)
        print(f"{clip.stat().st_size / 1e6:.1f} MB in {time.time() - begun:.0f} s", flush=True)

        from vtok_fast.commands.heap import keep_freed_memory

        keep_freed_memory()
        import torch

        import vtok_fast
        from vtok_fast.commands.load_model import load_model
        from vtok_fast.commands.tokenize import tokenize

        torch.set_num_threads(1)
        model = load_model("vidtok/tiny")
        vtok_fast.accelerate(model, check=False)
        samples: list[tuple[int, float]] = []

        def progress(done: int, total: int | None) -> None:
            minute = done * 17 // 1500
            if not samples or minute > samples[-1][0]:
                samples.append((minute, resident()))
                print(f"minute {minute}: {samples[-1][1]:.1f} MB, {time.time() - begun:.0f} s", flush=True)

        windows = tokenize(clip, output, model, progress=progress)
        samples.append((60, resident()))
        print(f"{windows.info['frames']} frames, {len(windows)} windows, {time.time() - begun:.0f} s")
    rss = [value for _, value in samples[:-1]]
    print(f"RSS at the first minute {rss[1]:.1f} MB, at the last {rss[-1]:.1f} MB, highest {max(rss):.1f} MB")
    if options.json:
        options.json.write_text(
            json.dumps({"samples": samples, "frames": options.frames, "size": options.size})
        )


if __name__ == "__main__":
    sys.exit(main())
