"""Tries the newest release of each requirement of the package, one at a time: `python scripts/newest.py`.

Each is installed alone into a fresh environment that finds everything else in this Python's packages, and
there `vtok-fast check` must hold. At the end: a table of what is here, what is newest, and how it went.
torch is left out unless `--torch VERSION` names one, because a release for GPUs has some hundred megabytes.
CUDA's libraries, of some gigabytes, are not fetched with it: others stand in for those that it loads
(stand_ins.py), and it runs on the CPU.

Exit status 1 where something newer does not work.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import tomllib

sys.path.insert(0, str(Path(__file__).resolve().parent))
import wheel_files  # noqa: E402
import wheels  # noqa: E402
from stand_ins import stand_in  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "newest"


@dataclass(frozen=True)
class Outcome:
    name: str
    here: str
    newest: str
    said: str  # "works", "the same", "not tried", or what went wrong

    @property
    def failed(self) -> bool:
        return self.said not in ("works", "the same", "not tried")

    def row(self) -> str:
        return f"{self.name:20}{self.here:14}{self.newest:14}{self.said.splitlines()[-1][:120]}"


def requirements(project: Path) -> list[str]:
    """The names in pyproject.toml that an installation asks for, with its extras demo and train."""
    table = tomllib.loads(project.read_text())["project"]
    extras = table["optional-dependencies"]
    asked = [*table["dependencies"], *extras["demo"], *extras["train"]]
    return list(dict.fromkeys(re.match(r"[\w-]+", requirement)[0] for requirement in asked))


def version_here(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def environment(name: str) -> Path:
    """A fresh environment's Python, which finds the packages of this one after its own."""
    inside = wheels.environment(sys.executable, WORK / name)
    site = wheels.run(inside, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip()
    Path(site, "others.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n{ROOT}\n")
    return inside


def attempt(name: str, wanted: str, run: Callable[..., str] = wheels.run) -> Outcome:
    """Installs one requirement's newest release, or ``wanted``, and checks the package with it."""
    here, inside = version_here(name), environment(name)
    version = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
    newest = "?"
    try:
        install = ("-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--no-deps")
        run(inside, *install, "--ignore-installed", wanted)
        newest = run(inside, "-c", version, name).strip()
        if newest == here:
            return Outcome(name, here, newest, "the same")
        if name == "torch":
            where = "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
            stand_in(Path(run(inside, "-c", where).strip()))
        run(inside, "-c", "import vtok_fast", cwd=WORK)
        run(inside, "-m", "vtok_fast.cli", "check", cwd=WORK)
    except RuntimeError as error:
        return Outcome(name, here, newest, str(error).strip())
    return Outcome(name, here, newest, "works")


def record(file: Path, outcomes: list[Outcome]) -> None:
    """Adds these to a run's file, in the place of earlier ones of their releases."""
    kept = json.loads(file.read_text())["outcomes"] if file.is_file() else []
    about = {
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": wheels.run("git", "log", "-1", "--format=%h").strip(),
    }
    rows = {(row["name"], row["newest"]): row for row in kept}
    rows |= {(one.name, one.newest): asdict(one) | about for one in outcomes if one.said != "not tried"}
    what = "scripts/newest.py: `vtok-fast check` with one requirement in another release"
    wheel_files.write(file, json.dumps({"what": what, "outcomes": list(rows.values())}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description="Try the newest release of each requirement.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these; default: all but torch")
    parser.add_argument("--torch", metavar="VERSION", help="try this torch too, such as 2.14.1+cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add what was found to a run's file")
    options = parser.parse_args()
    names = requirements(ROOT / "pyproject.toml")
    for name in options.names:
        if name not in names:
            sys.exit(f"newest: expected one of {', '.join(names)}, got {name}")
    WORK.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for name in options.names or names:
        if name != "torch":
            outcomes.append(attempt(name, name))
        elif options.torch:
            outcomes.append(attempt(name, f"torch=={options.torch}"))
        else:
            outcomes.append(Outcome(name, version_here(name), "", "not tried"))
        if outcomes[-1].failed:
            print(outcomes[-1].said, file=sys.stderr, flush=True)
    print(
        "\n".join(["requirement         here          newest        outcome", *(o.row() for o in outcomes)])
    )
    if options.json:
        record(options.json, outcomes)
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
