"""Peak memory of one encode and decode, in a process of its own: ``python -m benchmarks.memory CONFIG T H W VARIANT``.

Peak = high-water resident set during the pass minus the resident set once the model is loaded (and accelerated). The allocator is
left at its defaults, as a user has it. Linux only: it reads /proc.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import harness

VARIANTS = ("eager", "vtok_fast", "vtok_fast, no weight cache")


def peak(config: str, size: tuple[int, int, int], variant: str, threads: int | None = None) -> dict[str, Any]:
    """Measures in a fresh process. Returns peak, loaded and weight_cache in bytes, seconds of the one pass, and the tokens' hash.

    Raises RuntimeError with what the process said where it failed.
    """
    environment = {k: v for k, v in os.environ.items() if k not in harness.ALLOCATOR}
    environment.pop("VTOK_FAST_WEIGHT_CACHE", None)
    if variant == VARIANTS[2]:
        environment["VTOK_FAST_WEIGHT_CACHE"] = "0"
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    run = subprocess.run([sys.executable, "-m", "benchmarks.memory", config, *map(str, size), variant], env=environment,
                         capture_output=True, text=True, cwd=Path(__file__).resolve().parent.parent)
    if run.returncode:
        raise RuntimeError(f"{variant} at {size}: exit status {run.returncode}: {run.stderr.strip()[-500:]}")
    return json.loads(run.stdout.splitlines()[-1])


def _status(field: str) -> int:
    return 1024 * int(re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M).group(1))


def _measure(config: str, size: tuple[int, int, int], variant: str) -> dict[str, Any]:
    import torch

    from benchmarks.vidtok import make_model
    from vtok_fast import native
    from vtok_fast.swap import accelerate

    model = make_model(config)
    if variant != VARIANTS[0]:
        accelerate(model, check=False)
    torch.manual_seed(0)
    video = torch.rand(1, 3, *size) * 2 - 1
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what loading freed is not part of the model
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    loaded = _status("VmRSS")
    start = time.perf_counter()
    tokens = model.encode(video)
    encoded = time.perf_counter()
    model.decode(tokens)
    end = time.perf_counter()
    return {"peak": _status("VmHWM") - loaded, "loaded": loaded, "seconds": end - start, "encode_seconds": encoded - start,
            "weight_cache": native.lib().weight_cache_stats()["bytes"] if native.lib() else 0,
            "model": sum(p.numel() * p.element_size() for p in model.parameters())}


if __name__ == "__main__":
    name, *numbers, which = sys.argv[1:]
    print(json.dumps(_measure(name, tuple(map(int, numbers)), which)))
