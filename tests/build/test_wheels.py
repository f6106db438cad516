"""scripts/wheels.py: what it would build, and what it refuses. (Building is minutes: make wheels.)"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("wheels", Path(__file__).resolve().parents[2] / "scripts" / "wheels.py")
wheels = importlib.util.module_from_spec(spec)
sys.modules["wheels"] = wheels  # where its dataclass looks
spec.loader.exec_module(wheels)
NAME = "vtok_fast-0.1.0+cu130.sm90a-cp311-cp311-manylinux_2_34_x86_64.whl"


def main(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["wheels.py", *options])
    return wheels.main()


def test_a_dry_run_lists_the_matrix(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert main(monkeypatch, "--dry-run", "--python", "/a/python3.11", "--python", "/b/python3.12") == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 * len(wheels.FAMILIES) and "/b/python3.12: sm90a: VTOK_FAST_CUDA_ARCHS=90a" in said


def test_gpus_need_nvcc(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    with pytest.raises(SystemExit, match="--family cpu builds without"):
        main(monkeypatch, "--dry-run", "--python", "/a/python3.11")
    assert main(monkeypatch, "--dry-run", "--python", "/a/python3.11", "--family", "cpu") == 0


def test_the_pythons_at_hand_can_build():
    assert all(Path(path).is_file() for path in wheels.pythons())


@pytest.mark.parametrize("listed", ["vtok_fast/_C.cpython-311.so", "vtok_fast.libs/libgomp-abc.so.1"])
def test_a_wheel_that_needed_libraries_is_refused(monkeypatch, tmp_path, listed):
    asked = []

    def run(*command, **variables):
        words = [str(word) for word in command]
        asked.append((words, variables))
        if "--outdir" in words:
            (tmp_path / "raw").mkdir()
            (tmp_path / "raw" / "vtok_fast-0.1.0-cp311-cp311-linux_x86_64.whl").write_text("")
        if "repair" in words:
            (tmp_path / "raw" / "repaired").mkdir()
            (tmp_path / "raw" / "repaired" / NAME).write_text("")
        return listed if "zipfile" in words else "vtok-fast: built\n"

    monkeypatch.setattr(wheels, "WORK", tmp_path)
    monkeypatch.setattr(wheels, "run", run)
    if "libs" in listed:
        with pytest.raises(RuntimeError, match="had to copy libraries"):
            wheels.build(Path("/t/bin/python"), tmp_path, "sm90a", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    wheel, _ = wheels.build(Path("/t/bin/python"), tmp_path, "sm90a", tmp_path / "out")
    assert wheel == tmp_path / "out" / NAME and wheel.is_file()
    assert asked[0][1]["VTOK_FAST_CUDA_ARCHS"] == "90a"


def test_a_command_that_fails_shows_what_it_said():
    with pytest.raises(RuntimeError, match="some reason"):
        wheels.run(sys.executable, "-c", "print('some reason'); raise SystemExit(3)")
