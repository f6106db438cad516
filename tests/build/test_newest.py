"""scripts/newest.py: which requirements it tries, that one that breaks the package is reported, and what stands
in for CUDA's libraries (scripts/stand_ins.py)."""

import ctypes
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("tomllib")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "newest.py")))


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return runpy.run_path(str(ROOT / "scripts" / "stand_ins.py"))["stand_in"]


def test_everything_that_an_installation_asks_for_is_tried(script):
    names = script.requirements(ROOT / "pyproject.toml")
    assert {"torch", "numpy", "safetensors", "rich", "typer", "av", "torchmetrics"} <= set(names)
    assert len(names) == len(set(names)) and all(name.replace("-", "").isalnum() for name in names)


@pytest.mark.parametrize(
    ("newest", "broken", "said", "failed"),
    [
        ("999.0", None, "works", False),
        ("999.0", "check", "3 outside of their contract", True),
        ("999.0", "install", "no such release", True),
        (None, None, "the same", False),
    ],
)
def test_an_outcome(script, monkeypatch, newest, broken, said, failed):
    """Without an index: what a command says is given."""

    def run(*words, **how):
        words = [str(word) for word in words]
        if broken in words:
            raise RuntimeError(said)
        return f"{newest or script.version_here('numpy')}\n" if "numpy" in words[-1:] else ""

    monkeypatch.setitem(script.attempt.__globals__, "environment", lambda name: Path("/t/bin/python"))
    outcome = script.attempt("numpy", "numpy", run)
    assert (outcome.said, outcome.failed) == (said, failed)
    assert outcome.newest == ("?" if broken == "install" else newest or script.version_here("numpy"))
    assert said in outcome.row()


@pytest.mark.skipif(
    shutil.which("g++") is None or shutil.which("objdump") is None, reason="no g++ or no binutils"
)
@pytest.mark.parametrize("versions", [False, True])
def test_libraries_stand_in_for_those_of_cuda(stand_in, tmp_path, versions):
    """What calls one that is not there can then be loaded, and is told that there is no device."""
    (tmp_path / "lib").mkdir()
    source, absent = tmp_path / "torch.cpp", tmp_path / "lib" / f"libcudart_{versions}.so.13"
    source.write_text('int launch();\nextern "C" int answer(bool gpu) { return gpu ? launch() : 42; }\n')
    (tmp_path / "cuda.cpp").write_text("int launch() { return 0; }\n")
    (tmp_path / "cuda.map").write_text(
        "CUDA_13 { global: *launch*; };\n" if versions else "{ global: *; };\n"
    )
    gpp = ("g++", "-shared", "-fPIC", f"-Wl,--version-script={tmp_path / 'cuda.map'}")
    subprocess.run([*gpp, tmp_path / "cuda.cpp", f"-Wl,-soname,{absent.name}", "-o", absent], check=True)
    gpp = gpp[:-1]
    library = tmp_path / "lib" / "libtorch.so"
    subprocess.run([*gpp, source, absent, "-Wl,-rpath,$ORIGIN", "-o", library], check=True)
    absent.unlink()
    with pytest.raises(OSError, match=absent.name):
        ctypes.CDLL(str(library))
    assert stand_in(tmp_path) == [absent.name]
    loaded = ctypes.CDLL(str(library))
    assert (loaded.answer(False), loaded.answer(True)) == (42, 100)


def test_an_unknown_requirement_is_refused(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["newest.py", "no_such_package"])
    with pytest.raises(SystemExit, match="newest: expected one of torch, .* got no_such_package"):
        script.main()
