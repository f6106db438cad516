"""What the Hopper convolution's model of its cost chooses and predicts for the layer classes of the
benchmarks: benchmarks/predictions/causal_conv3d_sm90.json, and with operands of e4m3
benchmarks/predictions/causal_conv3d_sm90_e4m3.json. Needs g++ and no GPU; what a GPU measures is
    `vtok-fast tune`'s.

    python scripts/predict_causal_conv3d_sm90.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.conv_sm90_emulated import Emulated  # noqa: E402

from vtok_fast.bench.cases import layers  # noqa: E402
from vtok_fast.dispatch import tuning  # noqa: E402
from vtok_fast.io.files import write_atomically  # noqa: E402
from vtok_fast.ops.causal_conv3d import e4m3, sm90  # noqa: E402
from vtok_fast.ops.causal_conv3d.call import ConvCall, Geometry  # noqa: E402

PREDICTIONS = ROOT / "benchmarks" / "predictions" / "causal_conv3d_sm90.json"
PREDICTIONS_E4M3 = PREDICTIONS.with_name("causal_conv3d_sm90_e4m3.json")
MHZ, MULTIPROCESSORS = 1750, 132  # of an H200 under load
PEAK = 4096 * MULTIPROCESSORS * MHZ / 1e6  # TFLOP/s of the tensor cores
NOTE = (
    "Per layer class the plan that the model of the cost chooses (rows and columns of the tile, K splits, "
    "blocks per cluster, "
    "stages of weights) and its figure for an H200. Operations on frames of zeros, which are skipped, "
    "count. of_peak: of what the tensor cores could do; filled: of the multiprocessors' time, what the last "
    "wave leaves; busy: cycles of shared memory and L2 for one of the tensor cores. Nothing here is "
    "measured. Written by scripts/predict_causal_conv3d_sm90.py."
)
NOTE_E4M3 = (
    NOTE + " With operands of e4m3, of which the tensor cores multiply twice as many; to round x and the "
    "weights is not counted, nor is the power that these products take, which is assumed to bound them as it "
    "bounds halves: at 0.83 of the peak."
)


def classes() -> dict[str, layers.Layer]:
    """The layers that the kernel may take, at their real sizes; of several in one class the one with the most
    positions."""
    found = {}
    for layer in sorted(layers.load(), key=lambda x: x.gflop):
        if layer.cin % 8 == 0 and layer.cout % 8 == 0:
            t, h, w = layer.out_size
            found[
                tuning.conv_class(
                    layer.kernel, layer.stride, layer.cin, layer.cout, t * h * w, torch.bfloat16
                )
            ] = layer
    return dict(sorted(found.items()))


def call_of(layer: layers.Layer) -> ConvCall:
    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last_3d)

    (top, bottom), (left, right) = layer.spatial_pad
    x, weight = tensor(1, layer.cin, *layer.size), tensor(layer.cout, layer.cin, *layer.kernel)
    geometry = Geometry(layer.stride, pad=(layer.front, 0, top, bottom, left, right), time_mode="replicate")
    return ConvCall(x, weight, geometry=geometry)


def plan_of_halves(call: ConvCall, lib: Any) -> sm90.Plan:
    return sm90.plan(call, call.empty_output(), lib=lib)


def plan_of_e4m3(call: ConvCall, lib: Any) -> sm90.Plan:
    if (reason := e4m3.why_not(call)) is not None:
        raise NotImplementedError(reason)
    return e4m3.plan(call, lib=lib)


def filled(best: sm90.Plan) -> float:
    """The share of the chip's time in which there is a tile left for a cluster: what the last wave wastes."""
    at_once = MULTIPROCESSORS // best.cluster
    return best.units / (-(-best.units // at_once) * at_once)


def entry_of(layer: layers.Layer, best: sm90.Plan, peak: float) -> dict[str, Any]:
    microseconds = best.cycles / MHZ
    return {
        "kernel": layer.kernel,
        "stride": layer.stride,
        "channels": layer.cin,
        "outputs": layer.cout,
        "size": layer.size,
        "time_pad": (layer.front, 0),
        "spatial_pad": layer.spatial_pad,
        "choice": best.choice,
        "tile": (best.frames, best.rows, best.columns),
        "predicted_us": round(microseconds, 1),
        "predicted_tflops": round(layer.gflop * 1e3 / microseconds),
        "of_peak": round(layer.gflop * 1e3 / microseconds / peak, 2),
        "filled": round(filled(best), 2),
        "busy": {
            part: round(cycles / best.tensor_cycles, 2)
            for part, cycles in (("shared", best.shared_cycles), ("l2", best.l2_cycles))
        },
    }


def write(path: Path, note: str, plan: Callable[[ConvCall, Any], sm90.Plan], peak: float) -> None:
    lib, table = Emulated(multiprocessors=MULTIPROCESSORS), {}
    for name, layer in classes().items():
        try:
            best = plan(call_of(layer), lib)
        except NotImplementedError as error:  # a layer of the models that this kernel leaves to others
            print(f"{name}: left out, {error}")
            continue
        table[name] = entry = entry_of(layer, best, peak)
        print(
            f"{name}: {best.choice}, {entry['predicted_us']} us, {entry['predicted_tflops']} TFLOP/s, "
            f"{entry['of_peak']} of the peak, filled {entry['filled']}, {entry['busy']}"
        )
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in table.items())
    text = f'{{"note": {json.dumps(note)},\n"classes": {{\n{lines}\n}}}}\n'
    write_atomically(path, lambda temporary: Path(temporary).write_text(text))


def main() -> None:
    write(PREDICTIONS, NOTE, plan_of_halves, PEAK)
    write(PREDICTIONS_E4M3, NOTE_E4M3, plan_of_e4m3, 2 * PEAK)


if __name__ == "__main__":
    main()
