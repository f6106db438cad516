"""Rewrites the Hopper convolution's table, vtok_fast/ops/causal_conv3d_sm90.json: a plan for each layer class of the benchmarks.

    python scripts/tune_causal_conv3d_sm90.py              # on an H100 or H200: measures the candidates, keeps the fastest
    python scripts/tune_causal_conv3d_sm90.py --predict    # anywhere with g++: the model's choice, measured_us null
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vtok_fast import native  # noqa: E402
from vtok_fast.bench import layers  # noqa: E402
from vtok_fast.ops import causal_conv3d as op  # noqa: E402
from vtok_fast.ops import causal_conv3d_sm90 as sm90  # noqa: E402

MHZ = 1750  # of an H200 under load, for predictions
NOTE = ("Per layer class the plan: rows and columns of the tile, K splits, blocks per cluster, stages of weights. predicted_us is "
        "the model's figure for an H200; measured_us is null where no GPU has measured the class. Written by "
        "scripts/tune_causal_conv3d_sm90.py.")


def classes() -> dict[str, dict[str, Any]]:
    """One entry per class of layers that the kernel may take, at their real sizes; of several the one with the most positions."""
    found: dict[str, dict[str, Any]] = {}
    for layer in sorted(layers.load(), key=lambda x: x.gflop):
        if layer.cin % 8 or layer.cout % 8:
            continue
        t, h, w = layer.out_size
        name = sm90.layer_class(layer.kernel, layer.stride, layer.cin, layer.cout, t * h * w)
        found[name] = {"kernel": layer.kernel, "stride": layer.stride, "channels": layer.cin, "outputs": layer.cout,
                       "size": layer.size, "time_pad": (layer.front, 0), "spatial_pad": layer.spatial_pad,
                       "gflop": round(layer.gflop, 2)}
    return dict(sorted(found.items()))


def call_of(entry: dict[str, Any], device: str) -> op.ConvCall:
    def tensor(*shape: int) -> torch.Tensor:
        made = torch.empty(shape, dtype=torch.bfloat16, device=device, memory_format=torch.channels_last_3d)
        return made if device == "meta" else made.normal_()

    (top, bottom), (left, right) = entry["spatial_pad"]
    x = tensor(1, entry["channels"], *entry["size"])
    weight = tensor(entry["outputs"], entry["channels"], *entry["kernel"])
    return op.ConvCall(x, weight, None, None, None, entry["stride"], (1, 1, 1), 1, (*entry["time_pad"], top, bottom, left, right),
                       "replicate", "zeros", None, None, (1, 1, 1), False, (1, 1, 1))


def plan(call: op.ConvCall, lib: Any, choice: sm90.Choice = sm90.ANY) -> sm90.Plan:
    return sm90.plan(call, op._native_geometry(call), op._empty_output(call._replace(x=call.x.to("meta"))), lib=lib, choice=choice)


def candidates(call: op.ConvCall, lib: Any) -> list[sm90.Plan]:
    """The model's best plan of each tile, cluster and number of splits, but for those predicted at more than twice the best."""
    found = {}
    for rows, columns in ((256, 160), (256, 128), (256, 96), (128, 144), (128, 128), (128, 112), (128, 96), (128, 64)):
        for cluster in (1, 2):
            for splits in (1, 2, 4, 8):
                p = plan(call, lib, (rows, columns, splits, cluster, 0))
                found[p.choice] = p
    best = min(p.cycles for p in found.values())
    return [p for p in found.values() if p.cycles <= 2 * best]


def measure(call: op.ConvCall, choice: sm90.Choice, rounds: int = 20) -> float:
    """Median microseconds of a call, the second-level cache flushed before each."""
    out = op._empty_output(call)
    flush = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(rounds + 3):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        sm90.forward(call, op._native_geometry(call), out, choice=choice)
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end))
    return sorted(times[3:])[rounds // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predict", action="store_true", help="measure nothing: write the model's choices")
    predict = parser.parse_args().predict
    if predict:
        sys.path.insert(0, str(ROOT / "tests" / "emulator"))
        from conv_sm90_emulated import Emulated

        lib: Any = Emulated(multiprocessors=132)
    elif (reason := sm90.why_not_machine(torch.empty(0, device="cuda"))) is not None:
        sys.exit(f"tune: {reason}")
    else:
        lib = native.lib()
    table = {}
    for name, entry in classes().items():
        call = call_of(entry, "meta" if predict else "cuda")
        try:
            best, measured = plan(call, lib), None
        except NotImplementedError as error:
            print(f"{name}: left out, {error}")
            continue
        if not predict:
            measured, best = min((measure(call, p.choice), p) for p in candidates(call, lib))
        microseconds = best.cycles / MHZ
        table[name] = {**entry, "choice": best.choice, "tile": (best.frames, best.rows, best.columns),
                       "predicted_us": round(microseconds, 1), "measured_us": measured}
        print(f"{name}: {best.choice} tile {best.frames}x{best.rows}x{best.columns} predicted {microseconds:.1f} us, "
              f"{entry['gflop'] * 1e3 / microseconds:.0f} TFLOP/s" + (f"; measured {measured:.1f} us" if measured else ""))
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in table.items())
    temporary = sm90.TABLE.with_suffix(".tmp")
    temporary.write_text(f'{{"note": {json.dumps(NOTE)},\n"classes": {{\n{lines}\n}}}}\n')
    os.replace(temporary, sm90.TABLE)


if __name__ == "__main__":
    main()
