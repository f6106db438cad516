"""`vtok-fast doctor`: what is wrong with this installation, and what cures it.

It must work where little else does, so it uses only the standard library, and imports torch and the native
module in a process of their own: one that dies takes nothing along.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if __package__:  # in this form, because without torch the package itself gives nothing
    import vtok_fast.installation.gpus as gpus
    import vtok_fast.installation.known_bad as known_bad
else:  # run as a file, where the package itself cannot be imported
    import gpus  # type: ignore[import-not-found, no-redef]
    import known_bad  # type: ignore[import-not-found, no-redef]

OLDEST_TORCH = (2, 6)
PACKAGE = Path(__file__).resolve().parents[1]

# Printed by a fresh Python, line by line as far as it gets: what torch and the GPUs are, what the native
# module has, which backends each op has here, and which OpenMP runtimes are in the process once everything is
# loaded.
PROBE = """
import json, sys
def say(**facts): print(json.dumps(facts), flush=True)
sys.path.insert(0, sys.argv[1])
import torch
torch.ones(64, 64) @ torch.ones(64, 64)
cuda = torch.cuda.is_available()
say(torch=torch.__version__, cuda=cuda, threads=torch.get_num_threads(), toolkit=torch.version.cuda,
    hip=torch.version.hip, cudnn=torch.backends.cudnn.version() if cuda else None,
    allow_tf32=torch.backends.cudnn.allow_tf32 if cuda else False)
count = torch.cuda.device_count() if cuda else 0
say(gpus=[{"name": torch.cuda.get_device_name(i), "capability": torch.cuda.get_device_capability(i)}
          for i in range(count)])
try:
    import warnings
    warnings.simplefilter("ignore")
    import vtok_fast
    from vtok_fast.dispatch import native
    lib = native.lib()
    say(version=vtok_fast.__version__, native=native.why_missing(), ops=vtok_fast.available_backends())
    if lib is not None:
        say(isa=lib.isa(), isas=list(lib.supported_isas()), runtime=lib.threading_runtime(),
            archs=list(lib.cuda_archs),
            cuda_problem=(lib.cuda_problem() or None) if cuda and lib.cuda_archs else None)
except Exception as error:
    say(native=f"{type(error).__name__}: {error}")
try:
    lines = open("/proc/self/maps").read().split()
    runtimes = ("libgomp", "libomp", "libiomp")
    files = {word for word in lines if word.startswith("/")}
    say(openmp=sorted(file for file in files if file.rsplit("/", 1)[-1].startswith(runtimes)))
except OSError:
    pass
"""
# The native module takes no torch: where that cannot be imported, another process tells what the module has.
NATIVE_PROBE = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("vtok_fast._C", sys.argv[1])
lib = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lib)
print(json.dumps({"isa": lib.isa(), "isas": list(lib.supported_isas()), "runtime": lib.threading_runtime(),
                  "archs": list(lib.cuda_archs)}))
"""
NOTHING = {
    "torch": None,
    "cuda": False,
    "threads": None,
    "toolkit": None,
    "hip": None,
    "cudnn": None,
    "allow_tf32": False,
    "gpus": [],
    "version": None,
    "native": None,
    "ops": None,
    "isa": None,
    "isas": [],
    "runtime": None,
    "archs": [],
    "cuda_problem": None,
    "openmp": None,
    "packages": {},
}


@dataclass(frozen=True)
class Finding:
    """One check. `level`: "ok", "hint" (works, could be better) or "bad"; `cure` says what to do."""

    name: str
    level: str
    text: str
    cure: str = ""


def examine() -> list[Finding]:
    """All findings."""
    probe, failure = look()
    findings = [_python(), _torch(probe, failure)]
    if probe is None:
        probe = without_torch()
        findings += [_native(probe), *_gpus(probe)]
    else:
        findings += [*_pairs(probe), *_triton(probe), _native(probe), *_gpus(probe), _openmp(probe)]
    return findings + [_compiler(), *_nvcc(probe), _headers(), *_packages(), *_allocator()]


def look() -> tuple[dict | None, str]:
    """What the probe found, with a value for each name of NOTHING; or None, and why torch cannot be
    imported."""
    try:
        result = subprocess.run(
            [sys.executable, "-c", PROBE, str(PACKAGE.parent)], capture_output=True, text=True, timeout=120
        )
    except subprocess.TimeoutExpired:
        return None, "importing torch takes more than two minutes"
    facts: dict = {}
    for line in result.stdout.splitlines():
        if line.startswith("{"):
            facts |= json.loads(line)
    if not facts or (result.returncode and "native" in facts):
        return None, _last_line(result)
    if result.returncode:  # it died with the native module
        facts["native"] = f"importing it ends Python: {_last_line(result)}"
    return NOTHING | facts | {
        "packages": {name: found for name in known_bad.PACKAGES if (found := _version(name))}
    }, ""


def without_torch() -> dict:
    """The native module and the GPUs as far as they can be told without torch: by loading the one file, and
    by nvidia-smi."""
    facts: dict = {"gpus": _smi_gpus()}
    tag = sysconfig.get_config_var("EXT_SUFFIX")
    module = PACKAGE / f"_C{tag}"
    if not module.is_file():
        return NOTHING | facts | {"native": "the native module is not built"}
    try:
        result = subprocess.run(
            [sys.executable, "-c", NATIVE_PROBE, str(module)], capture_output=True, text=True, timeout=120
        )
    except subprocess.TimeoutExpired:
        return NOTHING | facts | {"native": "loading it takes more than two minutes"}
    if result.returncode:
        return NOTHING | facts | {"native": f"it cannot be loaded: {_last_line(result)}"}
    return NOTHING | facts | json.loads(result.stdout)


def _smi_gpus() -> list[dict]:
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = (line.rpartition(", ") for line in said.splitlines())
    return [
        {"name": name, "capability": [int(part) for part in capability.split(".")]}
        for name, _, capability in rows
        if capability.replace(".", "", 1).isdigit()
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _last_line(result: subprocess.CompletedProcess) -> str:
    lines = result.stderr.strip().splitlines()
    return (
        lines[-1]
        if lines
        else f"Python ended with status {result.returncode} (a signal, where it is negative)"
    )


def _python() -> Finding:
    text = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < (3, 10):  # noqa: UP036 -- this file runs as a script, too
        return Finding("python", "bad", text, "use Python 3.10 or newer")
    return Finding("python", "ok", text)


def _torch(probe: dict | None, failure: str) -> Finding:
    if probe is None:
        absent = "No module named 'torch'" in failure
        cure = "pip install 'torch>=2.6'" if absent else "reinstall it: pip install --force-reinstall torch"
        return Finding("torch", "bad", f"cannot be imported: {failure}", cure)
    version = tuple(int(part) for part in probe["torch"].split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        return Finding("torch", "bad", f"{probe['torch']} is too old", "pip install 'torch>=2.6'")
    return Finding("torch", "ok", f"{probe['torch']}, {probe['threads']} threads")


def _pairs(probe: dict) -> list[Finding]:
    """Versions that are known to be bad together."""
    torch, cudnn = (
        f"torch {probe['torch']}",
        f"cuDNN {'.'.join(map(str, known_bad.version(probe['cudnn']) or ()))}",
    )

    def which(pair: known_bad.Pair) -> str:
        package = f"{pair.package[0]} {probe['packages'][pair.package[0]]}" if pair.package else ""
        return package if pair.torch == known_bad.ANY and package else f"{torch} with {package or cudnn}"

    return [
        Finding("known-bad versions", pair.level, f"{which(pair)}: {pair.text} ({pair.source})", pair.cure)
        for pair in known_bad.found(probe)
    ]


def _triton(probe: dict) -> list[Finding]:
    """Whether Triton is the one that torch was built with: others often fail to compile, or compile worse."""
    if not probe["cuda"]:
        return []
    here = _version("triton")
    if here is None:
        return [
            Finding(
                "Triton",
                "hint",
                "not installed, so norms, attention and packing run on PyTorch's own kernels",
                "pip install triton",
            )
        ]
    wanted = known_bad.triton_of(importlib.metadata.requires("torch") or [])
    if wanted is not None and not known_bad.is_triton(here, wanted):
        return [
            Finding(
                "Triton",
                "hint",
                f"{here}, and this torch was built with {wanted.lstrip('=')}",
                f"pip install 'triton{wanted}'",
            )
        ]
    return [Finding("Triton", "ok", here)]


def _native(probe: dict) -> Finding:
    if probe["native"] is None:
        return Finding(
            "native module", "ok", f"built; runs its {probe['isa']} kernels, threads from {probe['runtime']}"
        )
    tag = sysconfig.get_config_var("EXT_SUFFIX")
    others = [path.name for path in PACKAGE.glob("_C*.so") if not path.name.endswith(tag)]
    hint = f" (there is {', '.join(others)}, for another Python)" if others else ""
    return Finding(
        "native module",
        "bad",
        probe["native"] + hint,
        "in the source folder: pip install .   (needs g++ and python3-dev)",
    )


def _gpus(probe: dict) -> list[Finding]:
    """Each GPU, and what of the native module it runs."""
    if probe["cuda_problem"]:
        return [
            Finding(
                "GPU",
                "bad",
                f"the CUDA kernels cannot start: {probe['cuda_problem']}",
                "update the GPU's driver",
            )
        ]
    findings = []
    for i, gpu in enumerate(probe["gpus"]):
        name, capability = f"GPU {i}, {gpu['name']}", tuple(gpu["capability"])
        if probe["native"] is not None:
            continue  # there is a finding of its own
        if probe["hip"]:
            findings.append(Finding(name, "ok", f"{gpus.NOT_NVIDIA}; this one runs Triton's and PyTorch's"))
            continue
        if capability < (8, 0):
            old = f"compute capability {capability[0]}.{capability[1]}: the CUDA kernels need 8.0"
            findings.append(Finding(name, "hint", old))
            continue
        code, text = gpus.code_for(capability, probe["archs"]), gpus.fit(capability, probe["archs"])
        if capability == (9, 0) and code != "sm_90a" and code is not None:
            text += ", without the Hopper kernels"
        if code == "sm_90a" or (code is not None and code.startswith("sm_") and capability != (9, 0)):
            findings.append(Finding(name, "ok", text))
        else:
            cure = gpus.install(capability, probe["archs"], _version("vtok-fast"))
            findings.append(Finding(name, "hint", text, cure))
    return findings or [
        Finding("GPU", "ok", "none that torch sees" if probe["torch"] else "none that nvidia-smi names")
    ]


def _openmp(probe: dict) -> Finding:
    loaded = probe["openmp"]
    if loaded is None:
        return Finding("OpenMP", "ok", "this system does not tell which runtimes are loaded")
    if len(loaded) > 1:
        return Finding(
            "OpenMP",
            "hint",
            f"{len(loaded)} runtimes in one process, whose threads compete: {', '.join(loaded)}",
            "import torch first, or set OMP_WAIT_POLICY=passive",
        )
    return Finding("OpenMP", "ok", loaded[0] if loaded else "none loaded")


def _compiler() -> Finding:
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


def _nvcc(probe: dict) -> list[Finding]:
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


def _headers() -> Finding:
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        return Finding(
            "Python.h",
            "hint",
            f"not at {header}, so the native module cannot be built here",
            "apt install python3-dev",
        )
    return Finding("Python.h", "ok", str(header))


def _packages() -> list[Finding]:
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


def _allocator() -> list[Finding]:
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


def end_with_the_reader() -> None:
    """`... | head` ends this program quietly, as it does others, instead of with a BrokenPipeError."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def main(say: Callable[[str], None] = print) -> int:
    """Print every finding; 1 if one is bad. Runs as a script too, where the package itself cannot be
    imported."""
    findings = examine()
    for finding in findings:
        say(
            f"{finding.level:4}  {finding.name}: {finding.text}"
            + (f"\n      -> {finding.cure}" if finding.cure else "")
        )
    return int(any(finding.level == "bad" for finding in findings))


if __name__ == "__main__":
    end_with_the_reader()
    sys.exit(main())
