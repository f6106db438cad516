"""The first hour of a stranger: `python scripts/first_hour.py WHEEL [--torch NAME | --packages FOLDER]`.

In an empty environment and an empty folder it installs torch and the wheel, runs the lines of the README that
begin with `vtok-fast` (not those that measure for minutes) and its first block of Python, and makes three
mistakes, each of which must be one sentence. Prints how long each step took; exit code 1 if one did not go as
expected.

--torch says which torch pip takes; without, it is PyPI's newest, with gigabytes of CUDA. With --packages the
dependencies are those of another environment's site-packages, and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
LONG = ("check", "bench", "tune")
DESCRIPTION = r"""
import importlib.metadata, re
text = importlib.metadata.metadata("vtok-fast").get_payload()
assert "## Install" in text and not re.search(r"\]\((?!https?:|mailto:|#)", text), text[:2000]
"""
MISTAKES = {  # what the one sentence says
    "vtok-fast tokenize clip.mp5 -o other.tokens": "no video at clip.mp5",
    "vtok-fast tokenize clip.mp4 -o other.tokens --model vidtok/nope": "the configurations of vidtok are",
    "vtok-fast detokenize clip.tokens -o back.mp4": "back.mp4 is there already; --force replaces it",
}


def lines(page: str) -> list[str]:
    """The README's commands, in its order, each once."""
    shell = "\n".join(re.findall(r"^```sh\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    found = [shlex.split(line, comments=True) for line in shell.splitlines() if line.startswith("vtok-fast")]
    return list(dict.fromkeys(shlex.join(words) for words in found if words[1] not in LONG))


def first_block(page: str) -> str:
    return re.search(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)[1]


def environment(folder: Path, packages: Path | None) -> dict[str, str]:
    """A fresh environment's variables, its programs first."""
    venv.create(folder, with_pip=True)
    if packages is not None:
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "packages.pth").write_text(f"{packages.resolve()}\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "VIRTUAL_ENV": str(folder)}


class Hour:
    """The steps, each in the same folder and environment; what went wrong is kept."""

    def __init__(self, folder: Path, variables: dict[str, str]):
        self.folder, self.variables, self.wrong = folder, variables, []

    def step(self, name: str, *command: str, says: str | None = None) -> None:
        """``says``: a mistake, whose exit code is 1 and whose standard error is one line with this."""
        began = time.perf_counter()
        done = subprocess.run(command, cwd=self.folder, env=self.variables, capture_output=True, text=True)
        seconds = time.perf_counter() - began
        said = done.stderr.strip().splitlines()
        fine = (
            done.returncode == 0
            if says is None
            else done.returncode == 1 and len(said) == 1 and says in said[0]
        )
        print(f"{'ok   ' if fine else 'WRONG'} {seconds:7.1f} s  {name}", flush=True)
        if says is not None and said:
            print(f"                 {said[-1][:100]}")
        if not fine:
            print(done.stdout[-2000:], done.stderr[-2000:], sep="\n")
            self.wrong.append(name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", default="torch", help="what pip installs first")
    parser.add_argument("--packages", type=Path, help="site-packages with the dependencies")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="first_hour_") as top:
        home, work = Path(top, "environment"), Path(top, "work")
        work.mkdir()
        variables = environment(home, options.packages) | {"VTOK_FAST_CACHE": str(Path(top, "cache"))}
        hour, python = Hour(work, variables), str(home / "bin" / "python")
        wheel = str(options.wheel.resolve())
        pip = (python, "-m", "pip", "install", "--quiet")
        if options.packages:
            hour.step("pip install", *pip, "--no-deps", wheel)
        else:
            hour.step(f"pip install {options.torch}", *pip, options.torch)
            hour.step("pip install WHEEL[all]", *pip, f"{wheel}[all]")
        hour.step("the long description needs no clone", python, "-c", DESCRIPTION)
        clip = "from vtok_fast.commands.clips import draw; draw('clip.mp4')"
        hour.step("a clip", python, "-c", clip)
        page = README.read_text()
        for line in lines(page):
            hour.step(line, *shlex.split(line))
        hour.step("the README's first Python", python, "-c", first_block(page))
        for line, says in MISTAKES.items():
            hour.step(line, *shlex.split(line), says=says)
        made = {"clip.tokens", "back.mp4", "demo"} - {path.name for path in work.iterdir()}
        if made:
            print(f"WRONG not written: {', '.join(sorted(made))}")
    return bool(hour.wrong or made)


if __name__ == "__main__":
    sys.exit(main())
