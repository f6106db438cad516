"""The first hour of a stranger, from the wheel that this tree builds: scripts/first_hour.py."""

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("av")
pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "first_hour.py"


def test_the_readme_has_what_the_hour_runs():
    names = runpy.run_path(str(SCRIPT))
    page = (ROOT / "README.md").read_text()
    commands = {line.split()[1] for line in names["lines"](page)}
    assert commands >= {"doctor", "demo", "info", "tokenize", "detokenize", "score"}
    assert "accelerate" in names["first_block"](page) and len(names["MISTAKES"]) == 3


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_the_first_hour(tmp_path):
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "build", "data", "demo", "site", "*.so", "__pycache__", "shared"
    )
    shutil.copytree(ROOT, source, ignore=ignored)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path / "wheels", source]
    subprocess.run(build, check=True)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    packages = Path(importlib.util.find_spec("torch").origin).parents[1]
    command = [sys.executable, SCRIPT, wheel, "--packages", packages]
    one = os.environ | {"OMP_NUM_THREADS": "1"}  # as the tests beside it
    done = subprocess.run(command, capture_output=True, text=True, env=one)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
