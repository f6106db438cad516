"""The machine that a result belongs to, and the state that it was measured in."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from vtok_fast.bench import harness
from vtok_fast.dispatch import native

ROOT, CPUINFO = Path(__file__).resolve().parents[2], Path("/proc/cpuinfo")
# What nvidia-smi is asked for, and under which name it is kept: clocks in MHz, temperature in degrees
# Celsius, power in watts.
SMI = {"driver": "driver_version"}
SMI_CLOCKS = {
    "sm_mhz": "clocks.sm",
    "sm_mhz_most": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "temperature": "temperature.gpu",
    "watts": "power.draw",
}


def describe(device: str = "cpu") -> dict[str, Any]:
    """Processor, caches, and the instance of the CPU kernels in use; for a GPU also what it is. What this
    system does not tell is None."""
    info = _cpuinfo()
    lib = native.lib()
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "family": _int(info.get("cpu family")),
        "model": _int(info.get("model")),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "simd": [
            f
            for f in ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile")
            if f in info.get("flags", "").split()
        ],
        "isa": lib.isa() if lib else None,
        "native_module": native.why_missing() or "built",
        "caches": _caches(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.release()}",
    } | (_gpu(device) if torch.device(device).type == "cuda" else {})


def _gpu(device: str) -> dict[str, Any]:
    properties, lib = torch.cuda.get_device_properties(device), native.lib()
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "sms": properties.multi_processor_count,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": getattr(properties, "L2_cache_size", 0) / 2**20,
        "cuda_archs": list(lib.cuda_archs) if lib else [],
    }


def clocks(device: str) -> dict[str, float | None]:
    """Clocks, temperature and power of a GPU at this moment, as nvidia-smi tells them."""
    return {name: _float(value) for name, value in _smi(device, SMI_CLOCKS).items()}


def _smi(device: str, fields: dict[str, str]) -> dict[str, str | None]:
    # Its number among all GPUs may be another one
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = f"GPU-{uuid}" if uuid else str(torch.device(device).index or 0)
    try:
        said = subprocess.run(
            [
                "nvidia-smi",
                f"--query-gpu={','.join(fields.values())}",
                "--format=csv,noheader,nounits",
                "-i",
                which,
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return dict.fromkeys(fields)
    return dict(zip(fields, (part.strip() for part in said.strip().split(","))))


def state(device: str = "cpu") -> dict[str, Any]:
    """What differs from run to run."""
    on_gpu = torch.device(device).type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_mhz": _cpu_mhz(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "allocator_pinned": harness.allocator_is_pinned(),
        "threading": native.lib().threading_runtime() if native.lib() else None,
        "device": device,
        "triton": _version("triton"),
        "vtok_fast": _version("vtok_fast"),
    } | (
        _smi(device, SMI) | {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        if on_gpu
        else {}
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def slug(machine: dict[str, Any]) -> str:
    """A file name for a machine's results: its GPU's name, or what tells its processor."""
    if machine.get("gpu"):
        return re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower().replace("nvidia", "")).strip("-")
    parts = [
        machine["cpu"],
        f"family{machine['family']}" if machine["family"] is not None else "",
        f"model{machine['model']}" if machine["model"] is not None else "",
        f"{machine['cores']}cores",
        machine["isa"] or "no-native",
    ]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def _cpuinfo() -> dict[str, str]:
    try:
        text = CPUINFO.read_text()
    except OSError:
        return {}
    first = text.split("\n\n")[0]
    return {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())
    }


def _cpu_mhz() -> list[float] | None:
    """The clocks of the slowest and the fastest core at this moment."""
    try:
        text = CPUINFO.read_text()
    except OSError:
        return None
    clocks = [float(mhz) for mhz in re.findall(r"^cpu MHz\s*: ([\d.]+)$", text, re.MULTILINE)]
    return [min(clocks), max(clocks)] if clocks else None


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
        return subprocess.run(
            ["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "csrc", "vtok_fast", "kernels")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None  # no git, or no repository


def _int(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def _float(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:  # "[N/A]"
        return None
