"""The machine that a result belongs to, and the state that it was measured in."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from vtok_fast import native

ROOT = Path(__file__).resolve().parent.parent


def describe() -> dict[str, Any]:
    """Processor, caches, and the instance of the CPU kernels in use. What this system does not tell is None."""
    info = _cpuinfo()
    lib = native.lib()
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "family": _int(info.get("cpu family")), "model": _int(info.get("model")),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "simd": [f for f in ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile") if f in info.get("flags", "").split()],
        "isa": lib.isa() if lib else None, "native_module": native.why_missing() or "built",
        "caches": _caches(), "memory_gib": _memory_gib(), "system": f"{platform.system()} {platform.release()}",
    }


def state() -> dict[str, Any]:
    """What differs from run to run."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "commit": _commit(),
        "python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "allocator_pinned": harness.allocator_is_pinned(),
        "threading": native.lib().threading_runtime() if native.lib() else None,
    }


def slug(machine: dict[str, Any]) -> str:
    """A file name for a machine's results."""
    parts = [machine["cpu"], f"family{machine['family']}" if machine["family"] is not None else "",
             f"model{machine['model']}" if machine["model"] is not None else "", f"{machine['cores']}cores", machine["isa"] or "no-native"]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    first = text.split("\n\n")[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def _caches() -> dict[str, str]:
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        caches[f"L{level}" + {"Data": "d", "Instruction": "i"}.get(kind, "")] = size
    return caches


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf"):
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _commit() -> str | None:
    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "csrc", "vtok_fast", "kernels", "benchmarks/*.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None  # no git, or no repository


def _int(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None
