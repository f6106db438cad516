"""What is installed, as a fresh Python tells it: torch, the GPUs and the native module.

Each is imported in a process of its own: one that dies takes nothing along.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

if __package__:  # in this form, because without torch the package itself gives nothing
    import vtok_fast.installation.known_bad as known_bad
else:  # beside the doctor, which runs as a file, too
    import known_bad  # type: ignore[import-not-found, no-redef]

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
        return None, last_line(result)
    if result.returncode:  # it died with the native module
        facts["native"] = f"importing it ends Python: {last_line(result)}"
    return NOTHING | facts | {
        "packages": {name: found for name in known_bad.PACKAGES if (found := version(name))}
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
        return NOTHING | facts | {"native": f"it cannot be loaded: {last_line(result)}"}
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


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def last_line(result: subprocess.CompletedProcess) -> str:
    lines = result.stderr.strip().splitlines()
    return (
        lines[-1]
        if lines
        else f"Python ended with status {result.returncode} (a signal, where it is negative)"
    )
