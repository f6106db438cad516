"""Installs wheels into empty environments, by pip and by uv, from a folder that has all the others too:
`python scripts/wheel_trials.py dist`.

Each wheel for this machine is asked for by its exact version, once by each installer, and what came must be
that wheel, byte for byte. Without torch the doctor must say so. With it (`--packages`) the native module must
load, with code for the GPUs of its name, and `vtok-fast check` must hold; where there is no torch for a
wheel's Python, the module alone is loaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import wheel_files  # noqa: E402

INSTALLERS = ("pip", "uv")
LOADS = """
from vtok_fast.dispatch import native
assert native.why_missing() is None, native.why_missing()
print(",".join(native.lib().cuda_archs))
"""
LOADS_ALONE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("vtok_fast._C", sys.argv[1])
lib = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lib)
print(",".join(lib.cuda_archs))
"""


@dataclass(frozen=True)
class Trial:
    """One wheel by one installer. ``checked``: "vtok-fast check", or "module loads" where there is no
    torch."""

    wheel: str
    python: str
    installer: str
    beside: int  # how many other wheels the folder had
    checked: str


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


def uv() -> list[str]:
    """uv as a command: of this Python's packages, else of PATH. Ends the program where there is none."""
    if importlib.util.find_spec("uv") is not None:
        return [sys.executable, "-m", "uv"]
    found = shutil.which("uv")
    if found is None:
        sys.exit("wheel_trials: there is no uv: pip install uv, or leave --installer uv out")
    return [found]


def python_of(wheel: str) -> str:
    """``3.11`` of a wheel for cp311."""
    major, minor = re.search(r"-cp(\d)(\d+)-", wheel).groups()
    return f"{major}.{minor}"


def fits(wheel: str, machine: str | None = None) -> bool:
    return wheel.endswith(f"_{machine or platform.machine()}.whl")


def all_in_one(root: Path, folder: Path) -> list[Path]:
    """Every wheel under ``root``, in one folder: those of this machine and the others."""
    wheels = sorted(root.rglob("*.whl"))
    for wheel in wheels:
        shutil.copyfile(wheel, folder / wheel.name)
    return wheels


def environment(python: str, folder: Path, installer: str) -> Path:
    """An empty virtual environment, made by the installer's own program: its Python."""
    if installer == "uv":
        run(*uv(), "venv", "--no-config", "--clear", "--python", python, folder)
    else:
        run(python, "-m", "venv", "--clear", folder)
    return folder / "bin" / "python"


def install(inside: Path, installer: str, folder: Path, wheel: str) -> None:
    """``===`` compares versions as words: ``==0.1.0`` would take ``0.1.0+cu130.sm90a`` as well."""
    wanted = [
        "--no-deps",
        "--no-index",
        "--find-links",
        folder,
        f"vtok-fast==={wheel_files.version_of(wheel)}",
    ]
    if installer == "uv":
        run(*uv(), "pip", "install", "--no-config", "--quiet", "--python", inside, *wanted)
    else:
        run(inside, "-m", "pip", "--isolated", "--disable-pip-version-check", "--quiet", "install", *wanted)


def is_that(inside: Path, wheel: Path) -> Path:
    """Its native module, where what is installed is this wheel: every file of it has its bytes. Raises
    RuntimeError where not."""
    site = Path(run(inside, "-c", "import sysconfig; print(sysconfig.get_paths()['platlib'])").strip())
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith((".dist-info/RECORD", "/"))]
        for name in names:
            if not (site / name).is_file() or (site / name).read_bytes() != archive.read(name):
                raise RuntimeError(f"{wheel.name}: what was installed has another {name}")
    (module,) = (site / name for name in names if re.fullmatch(r"vtok_fast/_C[^/]*\.so", name))
    return module


def says_that_torch_is_missing(inside: Path, folder: Path) -> None:
    done = subprocess.run(
        [inside, "-m", "vtok_fast.installation.doctor"], cwd=folder, capture_output=True, text=True
    )
    if done.returncode != 1 or "torch: cannot be imported" not in done.stdout:
        raise RuntimeError(f"the doctor without torch: status {done.returncode}\n{done.stdout}{done.stderr}")


def holds(inside: Path, module: Path, folder: Path, packages: Path | None) -> tuple[str, str]:
    """What was checked, and the GPUs that the module has code for. Raises RuntimeError where it fails."""
    if packages is None:
        return "module loads", run(inside, "-c", LOADS_ALONE, module, cwd=folder).strip()
    (module.parents[1] / "other.pth").write_text(f"{packages.resolve()}\n")
    archs = run(inside, "-c", LOADS, cwd=folder).strip()
    run(inside, "-m", "vtok_fast.cli", "check", cwd=folder)
    run(inside.with_name("vtok-fast"), "info", cwd=folder)
    return "vtok-fast check", archs


def try_wheel(wheel: Path, python: str, installer: str, together: Path, packages: Path | None) -> str:
    """Installs it into an empty environment and checks it there. Returns what was checked; raises
    RuntimeError where it does not do what it should."""
    want = [part.removeprefix("sm") for part in wheel_files.version_of(wheel.name).split(".") if "sm" in part]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "fresh"
        inside = environment(python, folder, installer)
        install(inside, installer, together, wheel.name)
        module = is_that(inside, wheel)
        says_that_torch_is_missing(inside, folder)
        checked, archs = holds(inside, module, folder, packages)
    if archs != ",".join(want):
        raise RuntimeError(f"{wheel.name}: the module has code for {archs or 'no GPU'}")
    return checked


def try_all(
    root: Path, found: dict[str, str], installers: Sequence[str], packages: Path | None
) -> tuple[list[Trial], list[str]]:
    """Every wheel under ``root`` for this machine and these Pythons, and which of them failed."""
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    trials, failed = [], []
    with tempfile.TemporaryDirectory() as together:
        wheels = all_in_one(root, Path(together))
        for wheel in wheels:
            python = python_of(wheel.name)
            if not fits(wheel.name) or python not in found:
                print(f"{wheel.name}: not for this machine's Pythons", flush=True)
                continue
            for installer in installers:
                try:
                    said = try_wheel(
                        wheel, found[python], installer, Path(together), packages if python == here else None
                    )
                    trials.append(Trial(wheel.name, python, installer, len(wheels) - 1, said))
                except RuntimeError as error:
                    said = f"FAILED\n{error}"
                    failed.append(f"{wheel.name} by {installer}")
                print(f"{wheel.name}: {installer}: {said}", flush=True)
    return trials, failed


def interpreters(paths: list[str]) -> dict[str, str]:
    """Of each version, the first one given, else that on PATH."""
    asked = paths or [
        path for name in ("10", "11", "12", "13", "14") if (path := shutil.which(f"python3.{name}"))
    ]
    found: dict[str, str] = {}
    for path in asked:
        said = run(path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
        found.setdefault(said, path)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Install wheels into empty environments and try them.")
    parser.add_argument("root", type=Path, metavar="FOLDER", help="with wheels, such as dist")
    parser.add_argument("--python", action="append", default=[], metavar="PATH", help="may be repeated")
    parser.add_argument("--installer", action="append", choices=INSTALLERS, help="default: both")
    parser.add_argument(
        "--packages", type=Path, metavar="FOLDER",
        help="a site-packages with torch and the rest, for the Python that runs this",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was tried")
    options = parser.parse_args()
    installers = options.installer or INSTALLERS
    trials, failed = try_all(options.root, interpreters(options.python), installers, options.packages)
    if options.json:
        wheel_files.write(options.json, json.dumps([asdict(trial) for trial in trials], indent=1) + "\n")
    print("\n".join(["", *(f"FAILED: {name}" for name in failed), f"{len(trials)} held"]))
    return int(bool(failed) or not trials)


if __name__ == "__main__":
    sys.exit(main())
