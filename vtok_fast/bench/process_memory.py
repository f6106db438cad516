"""The peak memory of one encode and decode of a VidTok, each variant in a fresh process.

    measure("eager", (17, 128, 128), config="tiny", checkpoint=path)["peak"]  # bytes

The peak is the high-water resident set during the work, minus what was resident when the model was loaded and
swapped. That counts everything the work allocates, in Python, in torch, and in the native module, with the
allocator at its defaults, as a user has it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIANTS = ("eager", "fast", "fast without weight cache")


def measure(
    variant: str,
    shape: tuple[int, int, int],
    *,
    config: str | dict[str, Any],
    checkpoint: str | os.PathLike | None = None,
    threads: int | None = None,
) -> dict[str, float]:
    """What encoding and decoding one video of shape (T, H, W) takes beyond the loaded model.

    Returns ``peak``, ``loaded`` (resident before), ``model`` (its parameters) and ``weight_cache``
    (transformed weights, part of the peak) in bytes; ``seconds`` of the one pass and ``encode_seconds`` of
    its first half.

    Raises ValueError for an unknown variant, RuntimeError if the process failed (its last line is in the
    message) or the system keeps no high-water mark (it is Linux's /proc/self/status).
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r}: expected one of {', '.join(VARIANTS)}")
    task = {
        "variant": variant,
        "shape": list(shape),
        "config": config,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "threads": threads,
    }
    return in_process(
        "vtok_fast.bench.process_memory", task, weight_cache=variant != "fast without weight cache"
    )


def in_process(module: str, task: dict[str, Any], *, weight_cache: bool) -> dict[str, float]:
    """What ``python -m module TASK`` prints as its last line, with the allocator at its defaults and at will
    without weight cache.

    Raises RuntimeError if the process failed; its last line is in the message.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment.pop("VTOK_FAST_WEIGHT_CACHE", None)
    if not weight_cache:
        environment["VTOK_FAST_WEIGHT_CACHE"] = "0"
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).resolve().parents[2]), environment.get("PYTHONPATH", "")]
    )
    result = subprocess.run(
        [sys.executable, "-m", module, json.dumps(task)], capture_output=True, text=True, env=environment
    )
    if result.returncode:
        reason = (result.stderr.strip() or f"exit status {result.returncode}").splitlines()[-1]
        raise RuntimeError(f"measuring the memory of {task['variant']}: {reason}")
    return json.loads(result.stdout.splitlines()[-1])


def _resident(field: str) -> int:
    """VmRSS (now) or VmHWM (highest) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def settled() -> int:
    """Returns what is resident, in bytes, after what is free has been given back; from here `highest`
    starts again."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def highest() -> int:
    """The most that was resident at a time since `settled`, in bytes."""
    return _resident("VmHWM")


def of_pass(model: Any, encode: Callable[[], Any], decode: Callable[[Any], Any]) -> dict[str, float]:
    """Runs both, and returns what `measure` does; the model is loaded and swapped, the video made."""
    import torch

    from vtok_fast.dispatch import native

    loaded = settled()  # what loading freed is not part of the model
    with torch.inference_mode():
        start = time.perf_counter()
        encoded = encode()
        middle = time.perf_counter()
        decode(encoded)
        end = time.perf_counter()
    return {
        "peak": highest() - loaded,
        "loaded": loaded,
        "seconds": end - start,
        "encode_seconds": middle - start,
        "weight_cache": native.lib().weight_cache_stats()["bytes"] if native.lib() else 0,
        "model": sum(p.numel() * p.element_size() for p in model.parameters()),
    }


def _measure(task: dict[str, Any]) -> dict[str, float]:
    import torch

    import vtok_fast
    from vtok_fast.models import VidTok

    if task["threads"]:
        torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    model = (
        VidTok.from_checkpoint(task["checkpoint"], task["config"])
        if task["checkpoint"]
        else VidTok(task["config"])
    )
    model.eval()
    if task["variant"] != "eager":
        # A check would leave freed memory behind that the work then reuses
        vtok_fast.accelerate(model, check=False)
    video = torch.rand(1, model.config.in_channels, *task["shape"]) * 2 - 1
    return of_pass(model, lambda: model.encode(video), model.decode)


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))
