"""The processor's name. Only the standard library."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_name() -> str:
    """As Linux tells it, else as Python does."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
