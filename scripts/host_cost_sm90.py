"""What a call of the Hopper convolution costs on the host, before any kernel runs: choosing the backend, the
plan, the tensor maps and the launch, from ``backends.select`` on. The runtime and the driver are the
emulator's and answer at once, kernels are not run, and torch's own look-ups of device and stream are left
out; so what a GPU's driver takes comes on top. Needs g++ and pybind11, no GPU.

    python scripts/host_cost_sm90.py
    python scripts/host_cost_sm90.py --against OTHER --file benchmarks/runs/host_cost_sm90.json

The second measures another checkout and this one in turns; OTHER needs sources only.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pybind11
import torch

ROOT = Path(os.environ.get("HOST_COST_TREE") or Path(__file__).resolve().parents[1])
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.conv_sm90_emulated import compiled  # noqa: E402

from vtok_fast.bench import machine  # noqa: E402
from vtok_fast.dispatch import native  # noqa: E402
from vtok_fast.ops.causal_conv3d import gradient, launch, sm90  # noqa: E402
from vtok_fast.ops.causal_conv3d.call import ConvBackwardCall, ConvCall, Geometry, run  # noqa: E402

MODULE = """
#include "bindings/caster.h"
PYBIND11_MODULE(host, m) {
  vtok::bind_causal_conv3d_cuda(m);
  m.attr("cuda_archs") = pybind11::make_tuple("80", "90a");
}
"""


def module(folder: Path) -> Any:
    """The bindings of the native module, on the emulator's runtime."""
    library = Path(compiled()._lib._name)
    (folder / "module.cpp").write_text(MODULE)
    target = folder / "host.so"
    flags = ["-std=c++20", "-O3", "-shared", "-fPIC", "-DVTOK_CUDA=80,90a", "-DVTOK_SM90"]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    sources = [folder / "module.cpp", ROOT / "csrc/bindings/causal_conv3d_gpu.cpp", library]
    subprocess.run(
        ["g++", *flags, *includes, *map(str, sources), f"-Wl,-rpath,{library.parent}", "-o", str(target)],
        check=True,
    )
    spec = importlib.util.spec_from_file_location("host", target)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    emulated = ctypes.CDLL(str(library))
    emulated.emu_prepare(0, 227 << 10, 132, 90)
    emulated.emu_run_kernels(0)
    return made


def microseconds(call: Callable[[], Any], rounds: int = 60, calls: int = 100) -> float:
    """Of a call, by the clock of the process: the least of many rounds."""
    call()
    found = []
    for _ in range(rounds):
        begin = time.process_time_ns()
        for _ in range(calls):
            call()
        found.append((time.process_time_ns() - begin) / calls / 1e3)
    return min(found)


def measure() -> dict[str, float]:
    """Microseconds of each call on the checkout at ROOT."""
    torch.set_num_threads(1)
    found = {"torch.empty(16)": microseconds(lambda: torch.empty(16))}
    with tempfile.TemporaryDirectory() as folder:
        lib: Any = module(Path(folder))
        native.lib = lambda: lib  # type: ignore[assignment]
        for owner in (launch, sm90, gradient):
            owner.why_not_machine = lambda x: None  # type: ignore[attr-defined]
        gradient.sm80.why_not = lambda call: None  # type: ignore[attr-defined]
        torch.cuda.device = lambda device: nullcontext()  # type: ignore[assignment, misc]
        last = torch.channels_last_3d
        x = torch.randn(1, 128, 5, 16, 16).bfloat16().contiguous(memory_format=last)
        weight, bias = torch.randn(128, 128, 3, 3, 3).bfloat16(), torch.randn(128).bfloat16()
        geometry = Geometry(pad=(2, 0, 1, 1, 1, 1))
        in_place = weight.contiguous(memory_format=last)
        calls = {
            "weights as PyTorch has them": ConvCall(x, weight, bias, geometry=geometry),
            "weights channels-last": ConvCall(x, in_place, bias, geometry=geometry),
            "with a residual and a SiLU": ConvCall(
                x, weight, bias, None, x, geometry=geometry, activation="silu"
            ),
        }
        for name, call in calls.items():
            found[f"forward, {name}"] = microseconds(lambda: run(call, None))  # noqa: B023
            found[f"the question, {name}"] = microseconds(lambda: sm90.why_not(call))  # noqa: B023
        backward = ConvBackwardCall(x, x, weight, None, geometry, (True, True, True, False))
        found["backward"] = microseconds(lambda: gradient.run_cuda(backward, hopper=True))
    return {name: round(time, 2) for name, time in found.items()}


def in_turns(other: Path, rounds: int) -> dict[str, Any]:
    """Both checkouts, each in a process of its own, in turns; and the least of each."""
    commit = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    trees = {"other": other, "this": ROOT}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    for turn in range(rounds):
        for name in sorted(trees, reverse=bool(turn % 2)):
            environment = os.environ | {"HOST_COST_TREE": str(trees[name]), "PYTHONPATH": str(trees[name])}
            command = [sys.executable, __file__, "--json"]
            result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            runs[name].append(json.loads(result.stdout))
    return {
        "what": "microseconds of a call on the host, scripts/host_cost_sm90.py",
        "machine": machine.describe(),
        "load": os.getloadavg(),
        "commit": subprocess.run(commit, capture_output=True, text=True, check=True).stdout.strip(),
        "least": {
            call: {name: min(run[call] for run in of_tree) for name, of_tree in runs.items()}
            for call in runs["this"][0]
        },
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--against", type=Path, metavar="OTHER")
    parser.add_argument("--file", type=Path)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.against is not None:
        found = in_turns(options.against.resolve(), options.rounds)
        print(json.dumps(found["least"], indent=1))
        if options.file is not None:
            options.file.write_text(json.dumps(found, indent=1) + "\n")
        return
    found = measure()
    print(json.dumps(found) if options.json else "\n".join(f"{n}: {t} us" for n, t in found.items()))


if __name__ == "__main__":
    main()
