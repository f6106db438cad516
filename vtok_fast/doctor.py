"""`vtok-fast doctor`: what is wrong with this installation, and what cures it.

It must work where little else does, so it uses the standard library alone, and imports torch and the native module in a process of
their own: one that dies takes nothing along.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

OLDEST_TORCH = (2, 6)
PACKAGE = Path(__file__).resolve().parent

# Printed by a fresh Python: what torch is, and which OpenMP runtimes are in the process once everything is loaded.
PROBE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.ones(64, 64) @ torch.ones(64, 64)
found = {"torch": torch.__version__, "cuda": torch.cuda.is_available(), "threads": torch.get_num_threads(), "native": None, "isa": None, "runtime": None}
try:
    from vtok_fast import native
    found["native"] = native.why_missing()
    if native.lib() is not None:
        found["isa"], found["runtime"] = native.lib().isa(), native.lib().threading_runtime()
except Exception as error:
    found["native"] = f"{type(error).__name__}: {error}"
try:
    lines = open("/proc/self/maps").read().split()
    names = {word for word in lines if word.startswith("/") and any(n in word.rsplit("/", 1)[-1] for n in ("libgomp", "libomp", "libiomp"))}
    found["openmp"] = sorted(names)
except OSError:
    found["openmp"] = None
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Finding:
    """One check. `level`: "ok", "hint" (works, could be better) or "bad"; `cure` says what to do."""

    name: str
    level: str
    text: str
    cure: str = ""


def examine() -> list[Finding]:
    """All findings."""
    probe, failure = _probe()
    findings = [_python(), _torch(probe, failure)]
    findings += [check(probe) for check in (_native, _openmp)] if probe else []
    return findings + [_compiler(), _headers(), *_packages(), *_allocator()]


def _probe() -> tuple[dict | None, str]:
    try:
        result = subprocess.run([sys.executable, "-c", PROBE, str(PACKAGE.parent)], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return None, "importing torch takes more than two minutes"
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        return None, lines[-1] if lines else f"Python ended with status {result.returncode} (a signal, where it is negative)"
    return json.loads(result.stdout.splitlines()[-1]), ""


def _python() -> Finding:
    text = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < (3, 10):  # noqa: UP036 -- this file runs as a script, too
        return Finding("python", "bad", text, "use Python 3.10 or newer")
    return Finding("python", "ok", text)


def _torch(probe: dict | None, failure: str) -> Finding:
    if probe is None:
        cure = "pip install 'torch>=2.6'" if "No module named 'torch'" in failure else "reinstall it: pip install --force-reinstall torch"
        return Finding("torch", "bad", f"cannot be imported: {failure}", cure)
    version = tuple(int(part) for part in probe["torch"].split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        return Finding("torch", "bad", f"{probe['torch']} is too old", "pip install 'torch>=2.6'")
    if version == (2, 9) and probe["cuda"]:  # pytorch issue 166643: they leave cuDNN for a chain with 17 times the memory
        return Finding("torch", "hint", f"{probe['torch']}: 3D convolutions in half precision are slow and large on a GPU", "use torch 2.10 or newer")
    return Finding("torch", "ok", f"{probe['torch']}, {probe['threads']} threads")


def _native(probe: dict) -> Finding:
    if probe["native"] is None:
        return Finding("native module", "ok", f"built; runs its {probe['isa']} kernels, threads from {probe['runtime']}")
    tag = sysconfig.get_config_var("EXT_SUFFIX")
    others = [path.name for path in PACKAGE.glob("_C*.so") if not path.name.endswith(tag)]
    hint = f" (there is {', '.join(others)}, for another Python)" if others else ""
    return Finding("native module", "bad", probe["native"] + hint, "in the source folder: pip install .   (needs g++ and python3-dev)")


def _openmp(probe: dict) -> Finding:
    loaded = probe["openmp"]
    if loaded is None:
        return Finding("OpenMP", "ok", "this system does not tell which runtimes are loaded")
    if len(loaded) > 1:
        return Finding("OpenMP", "hint", f"{len(loaded)} runtimes in one process, whose threads compete: {', '.join(loaded)}",
                       "import torch first, or set OMP_WAIT_POLICY=passive")
    return Finding("OpenMP", "ok", loaded[0] if loaded else "none loaded")


def _compiler() -> Finding:
    found = next((path for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (path := shutil.which(name))), None)
    if found is None:
        return Finding("compiler", "hint", "no C++ compiler, so the native module cannot be built here", "apt install g++")
    version = subprocess.run([found, "--version"], capture_output=True, text=True).stdout.splitlines()
    return Finding("compiler", "ok", version[0] if version else found)


def _headers() -> Finding:
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        return Finding("Python.h", "hint", f"not at {header}, so the native module cannot be built here", "apt install python3-dev")
    return Finding("Python.h", "ok", str(header))


def _packages() -> list[Finding]:
    wanted = {"av": "demo", "matplotlib": "demo", "pytest": "test"}
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if not missing:
        return [Finding("optional packages", "ok", ", ".join(wanted))]
    extras = sorted({wanted[name] for name in missing})
    return [Finding("optional packages", "hint", f"not installed: {', '.join(missing)}", f'pip install "vtok-fast[{",".join(extras)}]"')]


def _allocator() -> list[Finding]:
    """Large tensors are fresh pages of the kernel each time; both settings make that cheaper."""
    if sys.platform != "linux":
        return []
    preloaded = [name for name in ("tcmalloc", "jemalloc", "mimalloc") if name in os.environ.get("LD_PRELOAD", "")]
    if preloaded or "MALLOC_TRIM_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", ""):
        findings = [Finding("malloc", "ok", f"{preloaded[0]} is loaded" if preloaded else "kept pages are configured")]
    else:
        findings = [Finding("malloc", "hint", "glibc gives large tensors back to the system each time, and page faults cost time",
                            "MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=1073741824 in the environment, or tcmalloc")]
    setting = _read("/sys/kernel/mm/transparent_hugepage/enabled")
    if setting is not None:
        chosen = setting.split("[")[-1].split("]")[0]
        level, cure = ("ok", "") if chosen == "always" else ("hint", "THP_MEM_ALLOC_ENABLE=1 in the environment lets torch ask for them")
        if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" and chosen == "madvise":
            level, cure = "ok", ""
        findings.append(Finding("huge pages", level, chosen, cure))
    return findings


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None


def main(say: Callable[[str], None] = print) -> int:
    """Print every finding; 1 if one is bad. Runs as a script too, where the package itself cannot be imported."""
    findings = examine()
    for finding in findings:
        say(f"{finding.level:4}  {finding.name}: {finding.text}" + (f"\n      -> {finding.cure}" if finding.cure else ""))
    return int(any(finding.level == "bad" for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
