"""Measure `vtok-fast corpus` and draw docs/scale.png: clips a second against workers.

    python scripts/scale.py measure            # 1 and 2 workers, local and Ray, to docs/scale.json
    python scripts/scale.py draw               # the picture, and a simulation of more workers

Every clip is two seconds long. The rate counts from the first third of the clips on, when all workers have
their model. One thread for each worker.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import platform
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from vtok_fast.corpus.drive import Progress, make_corpus
from vtok_fast.corpus.manifest import NAME
from vtok_fast.io.video import write_video

RESULT = Path(__file__).resolve().parents[1] / "docs" / "scale.json"
FRAMES, FPS = 50, 25


def make_clips(folder: Path, count: int, size: int) -> None:
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    for number in range(count):
        frames = [
            torch.stack((torch.sin(3 * x + t / 4 + number), torch.cos(2 * y - t / 6), x * y))
            for t in range(FRAMES)
        ]
        write_video(folder / f"{number:04d}.mp4", torch.stack(frames, 1), fps=FPS)


def one(videos: Path, folder: Path, engine: str, workers: int) -> dict[str, Any]:
    """Seconds per clip of the whole, of the workers, and of the driver's own work."""
    moments: list[tuple[float, int]] = []
    busy = time.process_time()

    def note(progress: Progress) -> None:
        moments.append((time.monotonic(), progress.done))

    progress = make_corpus(
        [str(videos)], folder, engine=engine, workers=workers, cores=1, shards=64, progress=note
    )
    busy = time.process_time() - busy
    (begin, skipped), (end, last) = next(m for m in moments if m[1] >= progress.total // 3), moments[-2]
    rows = [json.loads(line) for line in (folder / NAME).read_text().splitlines()[1:]]
    times = [sum(row["seconds"].values()) for row in rows if row.get("status") == "done"]
    return {
        "engine": engine,
        "workers": workers,
        "clips": last - skipped,
        "seconds_per_clip": (end - begin) / (last - skipped),
        "worker_seconds": times[skipped:last],
        "driver_cpu_seconds_per_clip": busy / progress.total,
    }


def measure(clips: int, size: int, rounds: int) -> None:
    found = []
    with tempfile.TemporaryDirectory() as name:
        videos = Path(name, "videos")
        videos.mkdir()
        make_clips(videos, clips, size)
        cases = [(engine, workers) for workers in (1, 2) for engine in ("local", "ray")]
        for number in range(rounds):
            for engine, workers in cases:
                found.append(one(videos, Path(name, f"{number}-{engine}-{workers}"), engine, workers))
                print(
                    found[-1]["engine"], found[-1]["workers"], found[-1]["seconds_per_clip"], file=sys.stderr
                )
    machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    machine |= {"load_average": os.getloadavg()}
    RESULT.write_text(
        json.dumps({"machine": machine, "size": size, "frames": FRAMES, "runs": found}, indent=1) + "\n"
    )


def simulated(times: list[float], driver: float, workers: int, clips: int = 20_000) -> float:
    """Clips a second of `workers` that take what clips were seen to take, each clip followed by the driver's
    work, of which there is one at a time."""
    dice = random.Random(0)
    ends = [(dice.choice(times), worker) for worker in range(workers)]
    heapq.heapify(ends)
    free = 0.0
    for _ in range(clips):
        end, worker = heapq.heappop(ends)
        free = max(free, end) + driver
        heapq.heappush(ends, (end + dice.choice(times), worker))
    return clips / free


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    result = json.loads(RESULT.read_text())
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    runs = result["runs"]
    for engine, mark in (("local", "o"), ("ray", "s")):
        own = [run for run in runs if run["engine"] == engine]
        axes.plot(
            [run["workers"] for run in own],
            [1 / run["seconds_per_clip"] for run in own],
            mark,
            label=f"measured, {engine}",
        )
    single = [run for run in runs if run["workers"] == 1]
    times = [seconds for run in single for seconds in run["worker_seconds"]]
    # Ray's start is in those of its runs, which are short
    driver = max(run["driver_cpu_seconds_per_clip"] for run in runs if run["engine"] == "local")
    counts = [2**k for k in range(13)]
    axes.plot(counts, [simulated(times, driver, count) for count in counts], "--", label="simulated")
    axes.axhline(1 / driver, color="gray", linewidth=0.8, label="one driver's limit, by its processor time")
    axes.set(xscale="log", yscale="log", xlabel="workers", ylabel=f"clips of {FRAMES / FPS:.0f} s a second")
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("measure", "draw"))
    parser.add_argument("--clips", type=int, default=45)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    if options.what == "measure":
        measure(options.clips, options.size, options.rounds)
    else:
        draw(RESULT.with_suffix(".png"))


if __name__ == "__main__":
    main()
