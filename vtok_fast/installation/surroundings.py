"""What a build would need here, which optional packages there are, and how the system hands out memory."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

if __package__:  # in this form, because without torch the package itself gives nothing
    from vtok_fast.installation.finding import Finding
else:  # beside the doctor, which runs as a file, too
    from finding import Finding  # type: ignore[import-not-found, no-redef]


def compiler() -> Finding:
    found = next(
        (
            path
            for name in (os.environ.get("CXX"), "c++", "g++", "clang++")
            if name and (path := shutil.which(name))
        ),
        None,
    )
    if found is None:
        return Finding(
            "compiler",
            "hint",
            "no C++ compiler, so the native module cannot be built here",
            "apt install g++",
        )
    version = subprocess.run([found, "--version"], capture_output=True, text=True).stdout.splitlines()
    return Finding("compiler", "ok", version[0] if version else found)


def nvcc(probe: dict) -> list[Finding]:
    """Whether CUDA kernels could be built here, where there is a GPU for them."""
    if not probe["gpus"]:
        return []
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    found = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))
    if found is None:
        return [
            Finding(
                "nvcc",
                "hint",
                "not found, so CUDA kernels cannot be built here",
                "install the CUDA toolkit, or set CUDA_HOME",
            )
        ]
    return [Finding("nvcc", "ok", found)]


def headers() -> Finding:
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        return Finding(
            "Python.h",
            "hint",
            f"not at {header}, so the native module cannot be built here",
            "apt install python3-dev",
        )
    return Finding("Python.h", "ok", str(header))


def packages() -> list[Finding]:
    wanted = {"av": "demo", "matplotlib": "demo", "pytest": "test"}
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if not missing:
        return [Finding("optional packages", "ok", ", ".join(wanted))]
    extras = sorted({wanted[name] for name in missing})
    return [
        Finding(
            "optional packages",
            "hint",
            f"not installed: {', '.join(missing)}",
            f'pip install "vtok-fast[{",".join(extras)}]"',
        )
    ]


def allocator() -> list[Finding]:
    """Large tensors are fresh pages of the kernel each time; both settings make that cheaper."""
    if sys.platform != "linux":
        return []
    preloaded = [
        name for name in ("tcmalloc", "jemalloc", "mimalloc") if name in os.environ.get("LD_PRELOAD", "")
    ]
    if (
        preloaded
        or "MALLOC_TRIM_THRESHOLD_" in os.environ
        or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")
    ):
        findings = [
            Finding("malloc", "ok", f"{preloaded[0]} is loaded" if preloaded else "kept pages are configured")
        ]
    else:
        findings = [
            Finding(
                "malloc",
                "hint",
                "glibc gives large tensors back to the system each time, and page faults cost time",
                "MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=1073741824 in the environment, or "
                "tcmalloc",
            )
        ]
    setting = _read("/sys/kernel/mm/transparent_hugepage/enabled")
    if setting is not None:
        chosen = setting.split("[")[-1].split("]")[0]
        level, cure = (
            ("ok", "")
            if chosen == "always"
            else ("hint", "THP_MEM_ALLOC_ENABLE=1 in the environment lets torch ask for them")
        )
        if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" and chosen == "madvise":
            level, cure = "ok", ""
        findings.append(Finding("huge pages", level, chosen, cure))
    return findings


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None
