"""What `vtok-fast bench` and `vtok-fast bench compare` print."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from vtok_fast.bench import machine, report
from vtok_fast.bench.harness import Settings
from vtok_fast.bench.sections import SECTIONS, section
from vtok_fast.cli import app

ROOT = Path(__file__).parents[2]
RESULTS = str(next((ROOT / "benchmarks" / "results").glob("*.json")))
TESTS = "benchmarks/test_cases.py::test_case"


def said(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        app(["bench", *arguments])
    assert not end.value.code
    return capsys.readouterr().out


def test_the_help_shows_the_options_of_a_run(capsys):
    text = said(capsys, "--help")
    assert all(word in text for word in ("compare", "--op", "--shape", "--plot", "--dry-run"))


def test_one_case_is_one_case(capsys):
    assert said(capsys, "--op", "fsq", "--shape", "1,6,2,8,8", "--dry-run").splitlines()[-1] == "1 case"


def test_compare_prints_every_case_with_its_figures(capsys):
    text = said(capsys, "compare", RESULTS, RESULTS)
    assert all(word in text for word in ("before", "after / before", "noise", "verdict", "0 slower"))
    assert text.count("1.000") == int(re.search(r"(\d+) cases in both", text)[1]) > 50
    assert "verdict" not in said(capsys, "compare", "--changed", RESULTS, RESULTS)


def test_a_folder_as_output_gets_the_file_of_this_machine(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("vtok_fast.bench.harness.pin_allocator", lambda: None)  # it starts the program again
    options = ("--op", "fsq", "--shape", "1,6,2,8,8", "--quick", "--device", "cpu", "--output", str(tmp_path))
    said(capsys, *options)
    (file,) = tmp_path.iterdir()
    assert file.name == f"{machine.slug(machine.describe('cpu'))}.json"
    assert list(report.load(file)["sections"]) == ["fsq"]


def test_pytest_benchmark_has_a_test_for_each_case():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "--quick",
        "--device",
        "cpu",
        "--collect-only",
        "-q",
    ]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert listed.returncode == 0, listed.stdout + listed.stderr
    settings = Settings.of(quick=True, device="cpu")
    for name in SECTIONS:
        found = [line for line in listed.stdout.splitlines() if line.startswith(f"{TESTS}[{name} ")]
        assert len(found) == len(section(name).cases(settings)) > 0
