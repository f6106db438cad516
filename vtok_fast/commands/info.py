"""What this installation can run, one line each: ``python -m vtok_fast.commands.info``, or ``vtok-fast
info``.

It needs nothing but the standard library: torch and the native module are looked at by processes of their
    own.
"""

from __future__ import annotations

import ast
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vtok_fast

# in this form, because without torch the package itself gives nothing
import vtok_fast.installation.doctor as doctor
import vtok_fast.installation.facts as installed
import vtok_fast.installation.gpus as gpus
from vtok_fast.installation.processor import cpu_name


def _registered() -> dict[str, tuple[str, ...]]:
    """The backends of each op in order of preference, for where torch cannot be asked: read from the ops'
    sources, ``backends.register("op", backends.Backend("name", ...), ...)``."""
    found = {}
    for path in sorted(Path(vtok_fast.__file__).with_name("ops").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "backends.register":
                op, *candidates = (ast.literal_eval(getattr(a, "args", [a])[0]) for a in node.args)
                found[op] = tuple(candidates)
    return found


BACKENDS = _registered()


def facts() -> dict[str, Any]:
    """Versions, the processor, threads, GPUs, and per op each backend with None where it can run here, or why
    not."""
    probe, failure = installed.look()
    found = installed.without_torch() if probe is None else probe
    missing = (
        f"torch cannot be imported: {failure}"
        if probe is None
        else f"vtok_fast cannot be imported: {found['native']}"
    )
    ops = found["ops"] or {op: dict.fromkeys(backends, missing) for op, backends in BACKENDS.items()}
    return {
        "vtok_fast": vtok_fast.__version__,
        "torch": found["torch"] or missing,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "native_module": found["native"] or "built",
        "isa": found["isa"],
        "supported_isas": found["isas"],
        "cuda_archs": found["archs"],
        "threads": found["threads"],
        "threading_runtime": found["runtime"],
        "cuda": found["toolkit"],
        "cudnn": found["cudnn"],
        "gpu": found["gpus"][0]["name"] if found["gpus"] else None,
        "gpus": [
            f"{gpu['name']}: {gpus.fit(tuple(gpu['capability']), found['archs'])}" for gpu in found["gpus"]
        ],
        "ops": ops,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The facts as text."""
    rows = []
    for key, value in found.items():
        if key in ("ops", "gpu"):
            continue
        text = ", ".join(value) if isinstance(value, list) else "" if value is None else str(value)
        rows.append(f"{key.replace('_', ' '):30}{text or 'none'}")
    for op, backends in found["ops"].items():
        rows += [
            f"{f'{op}.{name}':30}{'available' if why is None else f'unavailable: {why}'}"
            for name, why in backends.items()
        ]
    return rows


def main(say: Callable[[str], None] = print) -> int:
    for line in lines(facts()):
        say(line)
    return 0


if __name__ == "__main__":
    doctor.end_with_the_reader()
    sys.exit(main())
