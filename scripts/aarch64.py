"""Cross-builds the wheel for CPUs of aarch64 on an x86-64 machine, and runs its module's entry points there,
under qemu. `python scripts/aarch64.py SYSTEM`.

SYSTEM is a folder with an aarch64 system's Python, its headers and libraries. On Debian 12, with
`dpkg --add-architecture arm64` and g++-aarch64-linux-gnu and qemu-user-static installed:

    apt-get download {libpython3.11-{dev,stdlib,minimal},python3.11-minimal}:arm64 \\
        {libc6,libgcc-s1,libstdc++6,libgomp1,zlib1g,libexpat1,libffi8}:arm64
    python scripts/sysroot.py SYSTEM *.deb

With `--sysroot` it is compiled against an older system (scripts/sysroot.py), for an older manylinux tag.

What is run are the calls of tests/support/fuzz.py, as this machine's portable kernels ran them: results that
are exact by contract must have the same bytes, and the others be within theirs (tests/support/foreign.py).
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import sysroot  # noqa: E402
import wheels  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
HOST, COMPILER, QEMU = "linux-aarch64", "aarch64-linux-gnu-g++", "qemu-aarch64-static"
TOOLS = (*wheels.TOOLS, "setuptools>=77", "pybind11>=2.13", "cmake>=3.20", "ninja")


def needs(system: Path, python: str) -> Path:
    """The aarch64 system's interpreter. Ends the program where something is missing."""
    for program, package in ((COMPILER, "g++-aarch64-linux-gnu"), (QEMU, "qemu-user-static")):
        if shutil.which(program) is None:
            sys.exit(f"aarch64: there is no {program}; on Debian: apt install {package}")
    interpreter = system / "usr" / "bin" / f"python{python}"
    header = system / "usr" / "include" / f"python{python}" / "Python.h"
    for file in (interpreter, header):
        if not file.is_file():
            sys.exit(
                f"aarch64: SYSTEM has no {file.relative_to(system)}; "
                "the head of this script says how to get it"
            )
    return interpreter


def variables(system: Path, python: str, older: Path | None = None) -> dict[str, str]:
    """The environment of the build. ``older``: the system to compile against."""
    suffix = f".cpython-{python.replace('.', '')}-aarch64-linux-gnu.so"
    include = system / "usr" / "include"
    cmake = [
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={COMPILER}",
        f"-DPython_INCLUDE_DIR={include / f'python{python}'}",
        f"-DPYTHON_MODULE_EXTENSION={suffix}",
    ]
    beside = f"-idirafter {include}"  # a part of Python's headers lies beside its folder
    old = sysroot.cmake_args(older, "aarch64") if older else ["-DCMAKE_CXX_FLAGS="]
    cmake += [f"{arg} {beside}" if arg.startswith("-DCMAKE_CXX_FLAGS=") else arg for arg in old]
    return {
        "VTOK_FAST_CUDA_ARCHS": "none",
        "_PYTHON_HOST_PLATFORM": HOST,
        "SETUPTOOLS_EXT_SUFFIX": suffix,
        "CMAKE_ARGS": shlex.join(cmake),
        "SOURCE_DATE_EPOCH": str(wheels.epoch()),
    }


def build(tools: Path, system: Path, python: str, out: Path, older: Path | None) -> wheels.Built:
    """The wheel, with its manylinux tag, in the folder of its family."""
    start, raw = (time.perf_counter(), wheels.cpu_time()), ROOT / "build" / "aarch64"
    shutil.rmtree(raw, ignore_errors=True)
    environment = variables(system, python, older)
    path = f"{tools.parent}{os.pathsep}{os.environ['PATH']}"
    said = wheels.run(
        tools, "-m", "build", "--wheel", "--no-isolation", "--outdir", raw, ROOT, **environment, PATH=path
    )
    return wheels.finish(tools, raw, out, said, "cpu", start)


def test(wheel: Path, system: Path, interpreter: Path, calls: int) -> str:
    """Runs the module's entry points. Returns what the comparison said."""
    folder = ROOT / "build" / "aarch64" / "wheel"
    shutil.unpack_archive(wheel, folder, "zip")
    (module,) = folder.glob("vtok_fast/_C*.so")
    foreign = ROOT / "tests" / "support" / "foreign.py"
    recorded, replayed = folder / "recorded", folder / "replayed"
    support = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    subprocess.run(
        [sys.executable, foreign, "record", recorded, str(calls)],
        check=True, env=os.environ | {"PYTHONPATH": support},
    )  # fmt: skip
    subprocess.run(
        [QEMU, "-L", system, interpreter, foreign, "replay", recorded, replayed, module], check=True
    )
    return subprocess.run(
        [sys.executable, foreign, "compare", recorded, replayed],
        check=True, env=os.environ | {"PYTHONPATH": support}, capture_output=True, text=True,
    ).stdout  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Cross-build the wheel for CPUs of aarch64, and run it.")
    parser.add_argument("system", type=Path, metavar="SYSTEM", help="an aarch64 system's files")
    parser.add_argument("--python", default="3.11", help="of SYSTEM and of this program; default: 3.11")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="default: dist")
    parser.add_argument("--sysroot", type=Path, metavar="FOLDER", help="an older system to compile against")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add sizes and times to a run's file")
    parser.add_argument("--note", default="", help="what to say of the run there")
    parser.add_argument("--calls", type=int, default=40, help="rounds of calls; default: 40")
    options = parser.parse_args()
    if f"{sys.version_info[0]}.{sys.version_info[1]}" != options.python:
        sys.exit(f"aarch64: run this with Python {options.python}, whose module is built")
    system = options.system.resolve()
    interpreter = needs(system, options.python)
    wheels.WORK.mkdir(parents=True, exist_ok=True)
    tools = wheels.environment(sys.executable, wheels.WORK / "aarch64-tools", *TOOLS)
    about = wheels.circumstances(options.note) if options.json else {}
    built = build(tools, system, options.python, options.out, options.sysroot)
    if options.json:
        wheels.record(options.json, [built], about)
    print(built.row(), flush=True)
    print(test(options.out / "cpu" / built.wheel, system, interpreter, options.calls), end="")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RuntimeError as error:
        sys.exit(f"aarch64: {error}")
