"""Processes that want the same compiled code share the work: each file is made once."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.volatile
TESTS = Path(__file__).resolve().parents[1]
COMPILER = """#!/bin/sh
echo "$1" >> "$(dirname "$0")/log"
while [ "$#" -gt 1 ]; do shift; done
sleep 0.1
echo made > "$1"
"""
BUILD = """
import sys
from pathlib import Path
from support import emulator
emulator.CACHE = Path(sys.argv[1])
emulator._make({emulator.CACHE / f"{i}.o": [emulator.CACHE / "compiler", i] for i in range(6)})
print(all((emulator.CACHE / f"{i}.o").read_text() == "made\\n" for i in range(6)))
"""


def test_each_file_is_made_once(tmp_path):
    (tmp_path / "compiler").write_text(COMPILER)
    (tmp_path / "compiler").chmod(0o755)
    command = [sys.executable, "-c", BUILD, str(tmp_path)]
    processes = [subprocess.Popen(command, cwd=TESTS, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0] for process in processes] == ["True\n"] * 3
    assert sorted((tmp_path / "log").read_text().split()) == [*"012345"]
