"""The one command for a machine with a GPU: every line of it runs without one, and its verdict says what it found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from gpu_verdict import verdict  # noqa: E402


def junit(folder: Path, step: str, passed: int, failed: tuple[str, ...] = (), skipped: int = 0) -> None:
    cases = "".join(f'<testcase classname="t" name="{n}"><failure message="off by one"/></testcase>' for n in failed)
    counts = f'tests="{passed + len(failed) + skipped}" failures="{len(failed)}" errors="0" skipped="{skipped}"'
    (folder / f"{step}.xml").write_text(f"<testsuites><testsuite {counts}>{cases}</testsuite></testsuites>")


def test_a_sound_run(tmp_path):
    (tmp_path / "steps.tsv").write_text("build\t0\t90\nconformance\t0\t20\nncu\tleft out: it is not installed\t0\n")
    junit(tmp_path, "conformance", 5)
    (tmp_path / "loops.json").write_text('[{"tile": "256x128", "module": "cmake", "us": 100.0, "tflops": 600.0, "predicted_cycles": 175000}]')
    text = verdict(tmp_path)
    assert text.endswith("VERDICT: sound") and "5 passed, 0 failed" in text and "left out: it is not installed" in text
    assert any(line.split() == ["256x128", "cmake", "100.0", "600", "100.0"] for line in text.splitlines())
    assert len(text.splitlines()) < 60


def test_what_failed_first_is_named(tmp_path):
    (tmp_path / "steps.tsv").write_text("build\t0\t90\nconformance\t1\t20\nhost\t124\t300\n")
    junit(tmp_path, "conformance", 4, tuple(f"test_{i}" for i in range(20)))
    text = verdict(tmp_path)
    assert "VERDICT: not sound" in text and "FIRST: conformance: an instruction" in text and "HUNG (124)" in text
    assert "t::test_0: ['off by one']" in text and "and 8 more" in text and len(text.splitlines()) < 60


def test_a_run_in_which_all_is_skipped_is_not_sound(tmp_path):
    (tmp_path / "steps.tsv").write_text("host\t0\t5\n")
    junit(tmp_path, "host", 0, skipped=12)
    assert "NOTHING RAN in host" in verdict(tmp_path) and "VERDICT: incomplete" in verdict(tmp_path)


def test_unknown_arguments_are_refused():
    command = ["bash", ROOT / "scripts/gpu_check.sh", "--rehearsal"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable})
    assert result.returncode == 2 and "unknown argument --rehearsal" in result.stdout


@pytest.mark.slow
@pytest.mark.needs_native
def test_rehearsal():
    """Against stand-ins for the GPU and its programs, in a copy of the tree: no step fails. Python may be named
    from here, as .venv/bin/python."""
    command = ["bash", ROOT / "scripts/gpu_check.sh", "--rehearse"]
    before = subprocess.run(["git", "status", "--short"], cwd=ROOT, capture_output=True, text=True).stdout
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHON": os.path.relpath(sys.executable, ROOT)})
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "VERDICT: incomplete" in result.stdout and "FAILED" not in result.stdout
    assert subprocess.run(["git", "status", "--short"], cwd=ROOT, capture_output=True, text=True).stdout == before
