"""scripts/aarch64.py without its compiler: what is missing is named, and the comparison of two machines'
results finds a difference."""

import pickle
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import foreign

from vtok_fast.dispatch import native

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "aarch64.py")))


def test_what_is_missing_is_named(script, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"no aarch64-linux-gnu-g\+\+; on Debian: apt install g\+\+-aarch64"):
        script.needs(tmp_path, "3.11")
    monkeypatch.setattr(script.needs.__globals__["shutil"], "which", lambda program: program)
    with pytest.raises(SystemExit, match=r"SYSTEM has no usr/bin/python3\.11; the head of this script"):
        script.needs(tmp_path, "3.11")
    for file in ("usr/bin/python3.11", "usr/include/python3.11/Python.h"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    assert script.needs(tmp_path, "3.11") == tmp_path / "usr/bin/python3.11"


def test_the_module_is_named_for_the_other_machine(script, tmp_path):
    found = script.variables(tmp_path, "3.11")
    assert found["SETUPTOOLS_EXT_SUFFIX"] == ".cpython-311-aarch64-linux-gnu.so"
    assert found["_PYTHON_HOST_PLATFORM"] == "linux-aarch64" and found["VTOK_FAST_CUDA_ARCHS"] == "none"


@pytest.fixture(scope="module")
def replayed(tmp_path_factory):
    """A few calls on this machine's portable kernels, and on its own ones by a bare Python."""
    folder = tmp_path_factory.mktemp("foreign")
    isa = native.lib().isa()
    try:
        foreign.record(folder / "recorded", 6)
    finally:
        native.lib().set_isa(isa)
    module = next(
        (ROOT / "vtok_fast").glob(f"_C*{sys.implementation.cache_tag.removeprefix('cpython-')}*.so")
    )
    words = ["replay", folder / "recorded", folder / "replayed", module]
    subprocess.run([sys.executable, "-I", "-S", foreign.__file__, *words], check=True)
    return folder


@pytest.mark.needs_native
def test_results_of_another_processor_are_compared(replayed):
    said = foreign.compare(replayed / "recorded", replayed / "replayed")
    assert "pack_tokens: 6 calls, equal" in said and "norm_act: 6 calls, " in said


@pytest.mark.needs_native
@pytest.mark.parametrize("name", sorted(foreign.EXACT | foreign.CLOSE))
def test_a_difference_is_found(replayed, tmp_path, name):
    calls = foreign.read(replayed / "recorded")
    isa, results = pickle.loads((replayed / "replayed").read_bytes())
    number = next(
        i
        for i, c in enumerate(calls)
        if c.name == name and any(c.after[k] != c.arguments[k].data for k in c.after)
    )
    after = results[number][1]
    for place, data in after.items():
        if data != calls[number].arguments[place].data:  # an output
            after[place] = bytes(255 - byte for byte in data)
    (tmp_path / "spoiled").write_bytes(pickle.dumps((isa, results)))
    with pytest.raises(AssertionError, match=f"call {number}, {name}: "):
        foreign.compare(replayed / "recorded", tmp_path / "spoiled")
