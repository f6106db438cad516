"""Two builds of the package against each other, in turns, each in a process of its own with one thread.

    python scripts/compare_builds.py models OLD NEW benchmarks/runs/models_of_builds.json [--rounds 7]
    python scripts/compare_builds.py winograd OLD NEW benchmarks/runs/winograd_check.json [--rounds 15]

OLD and NEW are folders with vtok_fast and its native module in them, such as two checkouts. ``models`` runs
one encode and one decode of each listed model; ``winograd`` single convolutions. A ratio is the time of OLD
over that of NEW in one round; above 1, NEW is faster.

What the check for values that Winograd must not spread costs shows a build without it as OLD:

    CXXFLAGS=-DVTOK_WINOGRAD_UNCHECKED pip install --no-deps --target build/unchecked .
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MODELS = ("Wan 2.1", "CogVideoX", "HunyuanVideo", "Cosmos CV8x8x8", "VidTok KL")
FRAMES, SIZE = 9, 64
ENOUGH = 0.02  # seconds of calls that make one time


def models() -> list[dict[str, Any]]:
    from vtok_fast.bench.cases.models import MODELS as LISTED

    return [
        {
            "name": name,
            "class": LISTED[name].name,
            "options": LISTED[name].options,
            "frames": LISTED[name].frames,
        }
        for name in MODELS
    ]


def model_runner(case: dict[str, Any]) -> Callable[[], Any]:
    import diffusers

    import vtok_fast

    torch.manual_seed(0)
    model = getattr(diffusers, case["class"])(**case["options"]).eval()
    vtok_fast.accelerate(model, check=False)
    x = torch.randn(1, 3, case["frames"], SIZE, SIZE)

    def run() -> Any:
        h = model.encode(x)
        return model.decode(h.latent_dist.mode() if hasattr(h, "latent_dist") else h[0])

    return run


def convolutions() -> list[dict[str, Any]]:
    """Channels, taps in time, frames and side, tile, dtype and layout, of about equal work."""
    sizes = ((32, 64, 4), (96, 64, 2), (192, 32, 4), (384, 16, 8), (512, 8, 8))
    chosen = itertools.product(
        sizes, (1, 3), ("winograd2", "winograd4"), ("float32", "bfloat16"), (True, False)
    )
    return [
        {
            "name": f"{c} channels, {t}x{n}x{n}, taps {k}x3x3, {algorithm}, {dtype}, "
            f"channels-{'last' if last else 'first'}",
            "x": [1, c, t, n, n],
            "taps": k,
            "algorithm": algorithm,
            "dtype": dtype,
            "last": last,
        }
        for (c, n, t), k, algorithm, dtype, last in chosen
        if dtype == "float32" or last
    ]


def convolution_runner(case: dict[str, Any]) -> Callable[[], Any]:
    from vtok_fast import causal_conv3d
    from vtok_fast.dispatch import backends

    torch.manual_seed(0)
    dtype, channels = getattr(torch, case["dtype"]), case["x"][1]
    x = torch.randn(case["x"]).to(dtype)
    if case["last"]:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    weight = (torch.randn(channels, channels, case["taps"], 3, 3) / (9 * channels) ** 0.5).to(dtype)
    bias = torch.randn(channels).to(dtype)

    def run() -> Any:
        with backends.algorithm(case["algorithm"]):
            return causal_conv3d(x, weight, bias, backend="cpu")

    return run


KINDS = {"models": (models, model_runner), "winograd": (convolutions, convolution_runner)}


def worker(kind: str) -> None:
    """Reads lines: a case, or nothing for one more time of it, which is answered with processor seconds
    of one call: other programs do not count."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    run: Callable[[], Any] = int
    calls = 1
    for line in sys.stdin:
        if line.strip():
            run = KINDS[kind][1](json.loads(line))
            run()
            spent = time.process_time()
            run()
            calls = max(1, round(ENOUGH / (time.process_time() - spent)))
        started = time.process_time()
        for _ in range(calls):
            run()
        print((time.process_time() - started) / calls, flush=True)


class Build:
    """A process that runs cases with the package in a folder."""

    def __init__(self, folder: Path, kind: str):
        paths = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), "worker", kind]
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | paths,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def seconds(self, case: dict[str, Any] | None = None) -> float:
        """Of one call; of a new case, where one is given."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write((json.dumps(case) if case else "") + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"a process ended with status {self.process.wait()}")
        return float(answer)


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 4), "q1": round(low, 4), "q3": round(high, 4)}


def compare(builds: list[Build], case: dict[str, Any], rounds: int) -> dict[str, Any]:
    times: list[list[float]] = [[], []]
    for build in builds:
        build.seconds(case)
    for turn in range(rounds):
        for i in (0, 1) if turn % 2 else (1, 0):
            times[i].append(builds[i].seconds())
    ratios = [old / new for old, new in zip(*times)]
    result = {"case": case["name"], "ratio": spread(ratios), "least": round(min(times[0]) / min(times[1]), 4)}
    result["ms"] = [round(statistics.median(t) * 1e3, 3) for t in times]
    print(result, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("json", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    args = parser.parse_args()
    from vtok_fast.bench import machine

    builds = [Build(folder.resolve(), args.kind) for folder in (args.old, args.new)]
    cases = [c for c in KINDS[args.kind][0]() if args.only in c["name"]]
    found: dict[str, Any] = {"machine": machine.describe(), "date": time.strftime("%Y-%m-%d"), "cases": []}
    found |= {"torch": torch.__version__, "rounds": args.rounds}
    found["cases"] = [compare(builds, case, args.rounds) for case in cases]
    for build in builds:
        build.process.communicate()
    medians = [c["ratio"]["median"] for c in found["cases"]]
    found["geometric mean"] = round(statistics.geometric_mean(medians), 4)
    args.json.write_text(json.dumps(found, indent=1) + "\n")
    print("geometric mean of the medians", found["geometric mean"])


if __name__ == "__main__":
    worker(sys.argv[2]) if sys.argv[1:2] == ["worker"] else main()
