"""What a call of the Hopper convolution costs on the host, before any kernel runs: choosing the backend, the
plan, the tensor maps and the launch, from ``backends.select`` on. The runtime and the driver are the
emulator's and answer at once, kernels are not run, and torch's own look-ups of device and stream are left
out; so what a GPU's driver takes comes on top. Needs g++ and pybind11, no GPU.

    python scripts/host_cost_sm90.py
"""

from __future__ import annotations

import ctypes
import importlib.util
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

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.conv_sm90_emulated import compiled  # noqa: E402

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


def main() -> None:
    torch.set_num_threads(1)
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
        calls = {
            "weights as PyTorch has them": ConvCall(x, weight, bias, geometry=geometry),
            "weights channels-last": ConvCall(
                x, weight.contiguous(memory_format=last), bias, geometry=geometry
            ),
            "with a residual and a SiLU": ConvCall(
                x, weight, bias, None, x, geometry=geometry, activation="silu"
            ),
        }
        for name, call in calls.items():
            print(
                f"forward, {name}: {microseconds(lambda: run(call, None)):.1f} us, of which the question "  # noqa: B023
                f"{microseconds(lambda: sm90.why_not(call)):.1f}"  # noqa: B023
            )
        backward = ConvBackwardCall(x, x, weight, None, geometry, (True, True, True, False))
        print(f"backward: {microseconds(lambda: gradient.run_cuda(backward, hopper=True)):.1f} us")


if __name__ == "__main__":
    main()
