"""Times the Hopper convolution of several builds of the native module, at tiles that are insisted on, beside
what its model predicts. For scripts/gpu_check.sh.

    python scripts/time_hopper_loops.py RESULT.json MODULE.so...
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vtok_fast.io.files import write_atomically
from vtok_fast.ops.causal_conv3d import sm90
from vtok_fast.ops.causal_conv3d.call import ConvCall, Geometry

REHEARSED = bool(
    os.environ.get("VTOK_REHEARSE")
)  # on a CPU, by a module that does nothing, on a frame of 8 x 8
TILES = ((256, 128), (128, 128), (256, 160), (128, 64))
SIZE, CHANNELS, ROUNDS = ((1, 8, 8), 16, 1) if REHEARSED else ((17, 128, 128), 128, 50)


class Rehearsal:
    """In the place of a native module."""

    def causal_conv3d_sm90(self, *args: Any) -> None:
        pass


def module(path: str) -> Any:
    if REHEARSED:
        return Rehearsal()
    name = "_C"  # the name under which a module was built is the name of its function that Python calls
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def seconds(call: Callable[[], Any]) -> float:
    """The median of single calls, on the device's clock."""
    found = []
    for _ in range(ROUNDS + 5):
        if REHEARSED:
            begin = time.perf_counter()
            call()
            found.append(time.perf_counter() - begin)
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return median(found[5:])


def main(result: str, *paths: str) -> None:
    device, last = "cpu" if REHEARSED else "cuda", torch.channels_last_3d
    x = torch.randn(1, CHANNELS, *SIZE, device=device).bfloat16().contiguous(memory_format=last)
    rows = []
    for rows_of_tile, columns in TILES:
        weight = torch.randn(columns, CHANNELS, 3, 3, 3, device=device).bfloat16() / 50
        call = ConvCall(x, weight.contiguous(memory_format=last), geometry=Geometry(pad=(2, 0, 1, 1, 1, 1)))
        out, choice = call.empty_output(), (rows_of_tile, columns, 1, 2, 0)
        # The first frames of a causal video have fewer time taps: what is not computed does not count.
        taps = sum(min(t + 1, 3) for t in range(SIZE[0])) / SIZE[0]
        flop = 2 * out.numel() * CHANNELS * 9 * taps
        for path in paths:
            lib = module(path)
            plan = sm90.plan(call, out, lib=lib, choice=choice)
            took = seconds(lambda: sm90.forward(call, out, lib=lib, choice=choice))  # noqa: B023
            rows.append(
                {
                    "tile": f"{rows_of_tile}x{columns}",
                    "module": Path(path).parent.name,
                    "us": took * 1e6,
                    "tflops": flop / took / 1e12,
                    "predicted_cycles": plan.cycles,
                }
            )
            print(
                f"{rows[-1]['tile']} {rows[-1]['module']}: {took * 1e6:.1f} us, "
                f"{rows[-1]['tflops']:.0f} TFLOP/s"
            )
    write_atomically(Path(result), lambda temporary: Path(temporary).write_text(json.dumps(rows, indent=1)))


if __name__ == "__main__":
    main(*sys.argv[1:])
