"""`vtok-fast doctor`: what is wrong with this installation, and what cures it.

It must work where little else does, so it uses only the standard library, and asks torch and the native
module in a process of their own (facts.py).
"""

from __future__ import annotations

import importlib.metadata
import platform
import signal
import sys
import sysconfig
from collections.abc import Callable

if __package__:  # in this form, because without torch the package itself gives nothing
    import vtok_fast.installation.facts as facts
    import vtok_fast.installation.gpus as gpus
    import vtok_fast.installation.known_bad as known_bad
    import vtok_fast.installation.surroundings as surroundings
    from vtok_fast.installation.finding import Finding
else:  # run as a file, where the package itself cannot be imported
    import facts  # type: ignore[import-not-found, no-redef]
    import gpus  # type: ignore[import-not-found, no-redef]
    import known_bad  # type: ignore[import-not-found, no-redef]
    import surroundings  # type: ignore[import-not-found, no-redef]
    from finding import Finding  # type: ignore[import-not-found, no-redef]

OLDEST_TORCH = (2, 6)


def examine() -> list[Finding]:
    """All findings."""
    probe, failure = facts.look()
    findings = [_python(), _torch(probe, failure)]
    if probe is None:
        probe = facts.without_torch()
        findings += [_native(probe), *_gpus(probe)]
    else:
        findings += [*_pairs(probe), *_triton(probe), _native(probe), *_gpus(probe), _openmp(probe)]
    return findings + [
        surroundings.compiler(),
        *surroundings.nvcc(probe),
        surroundings.headers(),
        *surroundings.packages(),
        *surroundings.allocator(),
    ]


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
    here = facts.version("triton")
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
    others = [path.name for path in facts.PACKAGE.glob("_C*.so") if not path.name.endswith(tag)]
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
            cure = gpus.install(capability, probe["archs"], facts.version("vtok-fast"))
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
