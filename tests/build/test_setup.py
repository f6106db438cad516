"""setup.py: what is missing for a build is a sentence, and the source distribution is the whole check-out."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from vtok_fast.dispatch import native

ROOT = Path(__file__).resolve().parents[2]
setuptools = pytest.importorskip("setuptools")


@pytest.fixture
def script(monkeypatch):
    """The names of setup.py, which builds nothing here."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.setattr(sys, "argv", ["setup.py", "sdist"])
    return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


def program(folder: Path, name: str, text: str = "true") -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_missing_tools_are_named(monkeypatch, tmp_path, script):
    """As in a minimal environment under --no-build-isolation, which fetches nothing."""
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "python"))
    with pytest.raises(SystemExit, match="needs cmake, .* with --no-build-isolation .*: pip install cmake"):
        script.cmake()
    with pytest.raises(SystemExit, match="needs ninja or make, .*: pip install ninja"):
        script.generator()
    monkeypatch.setitem(sys.modules, "pybind11", None)
    with pytest.raises(SystemExit, match="needs pybind11.*: pip install pybind11"):
        script.pybind11()
    program(tmp_path / "path", "make")
    assert script.generator() == []
    ninja, cmake = program(tmp_path / "venv", "ninja"), program(tmp_path / "venv", "cmake")  # not activated
    assert script.generator() == ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    assert script.cmake() == str(cmake)


def copy(files: list[str], to: Path) -> Path:
    for name in files:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, to / name)
    return to


FEW = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "vtok_fast/__init__.py", "kernels/__init__.py",
       "csrc/cuda/archs.cmake"]  # fmt: skip


@pytest.mark.parametrize(
    ("cmake", "said"),
    [
        (None, "the build needs cmake, which is not on PATH."),
        (
            "case $1 in -S) echo no compiler >&2; exit 1;; esac; echo cuda= archs=",
            "could not configure the build",
        ),
        ("case $1 in --build) echo bad code >&2; exit 2;; esac; echo cuda= archs=", "could not be built"),
    ],
    ids=["no cmake", "configure", "compile"],
)
def test_what_ends_a_build_is_a_sentence(tmp_path, cmake, said):
    """And not a traceback; what a tool said itself stands above."""
    source = copy(FEW, tmp_path / "source")
    (tmp_path / "lib" / "pybind11").mkdir(parents=True)
    (tmp_path / "lib" / "pybind11" / "__init__.py").write_text("def get_cmake_dir(): return ''\n")
    python = tmp_path / "venv" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    program(tmp_path / "path", "ninja")
    if cmake is not None:
        program(tmp_path / "path", "cmake", cmake)
    path = os.pathsep.join([str(tmp_path / "lib"), str(Path(setuptools.__file__).parents[1])])
    environment = {"PATH": str(tmp_path / "path"), "PYTHONPATH": path, "HOME": str(tmp_path)}
    command = [str(python), "setup.py", "build_ext", "--build-lib", "lib"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.rstrip().splitlines()[-1].startswith("vtok-fast: ")


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_a_module_that_python_could_not_load_is_an_error_of_the_build(tmp_path, script):
    """The linker allows a shared library what nothing defines, and Python would find out at import."""
    (tmp_path / "module.cpp").write_text("void left_out(); void call() { left_out(); }\n")
    module = tmp_path / "_C.so"
    subprocess.run(["g++", "-shared", "-fPIC", tmp_path / "module.cpp", "-o", module], check=True)
    with pytest.raises(
        SystemExit, match=r"_C.so was built and cannot be loaded: .*undefined symbol.*declared that no"
    ):
        script.check_loads(module)
    module.write_text("not a library")
    with pytest.raises(SystemExit, match="cannot be loaded") as refused:
        script.check_loads(module)
    assert "declared" not in str(refused.value)


@pytest.mark.skipif(native.lib() is None, reason="no native module")
def test_a_module_that_loads_passes(script):
    script.check_loads(Path(native.lib().__file__))


RELATIVE = re.compile(r"\]\((?!https?:|mailto:|#)")  # a link to a file beside the page
LINKED = "See [a page](docs/a.md#b), ![one](a.png), [there](https://arxiv.org).\n```py\nx = f[0](y)\n```\n"


def test_links_of_the_long_description_lead_to_the_project(script):
    project = '[project.urls]\nSource = "https://example.org/v/"\n'
    tag = f"v{script.version()}"
    assert script.long_description(LINKED, project) == (
        f"See [a page](https://example.org/v/blob/{tag}/docs/a.md#b), "
        f"![one](https://example.org/v/raw/{tag}/a.png), [there](https://arxiv.org).\n"
        "```py\nx = f[0](y)\n```\n"
    )
    plain = script.long_description(LINKED, "[project]\n")
    assert plain.startswith("See a page, , [there](https://arxiv.org).\n```py\nx = f[0](y)\n```\n")
    assert "source distribution" in plain


def tracked() -> list[str]:
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this is not a check-out")
    return [name for name in done.stdout.split("\0") if (ROOT / name).is_file()]


def test_the_source_distribution_is_the_check_out(tmp_path):
    """Tests and documentation too, and nothing that was built or cached."""
    files = tracked()
    source = copy(files, tmp_path / "source")
    junk = [
        "tests/emulator/.cache/a.so",
        "vtok_fast/_C.cpython-311-x86_64-linux-gnu.so",
        "vtok_fast/.hypothesis/a",
        "tests/__pycache__/a.pyc",
        "docs/.DS_Store",
        "build/cmake/a.o",
        "dist/cpu/a.whl",
        "data/a.mp4",
    ]
    for name in junk:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("")
    # As pip does, without the source folder on the path: its folder kernels has the name of a package.
    make = (
        "import sys; sys.path.remove(''); from setuptools.build_meta import build_sdist as b; b(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", make, str(tmp_path)], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        inside = {name.partition("/")[2] for name in (m.name for m in archive.getmembers() if m.isfile())}
    made = {
        name for name in inside if name in ("PKG-INFO", "setup.cfg") or name.startswith("vtok_fast.egg-info/")
    }
    assert inside - made == set(files)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        (name,) = [m.name for m in archive.getmembers() if re.fullmatch(r"[^/]+/PKG-INFO", m.name)]
        said = archive.extractfile(name).read().decode()
    assert "Description-Content-Type: text/markdown" in said and "## Install" in said
    assert RELATIVE.search((ROOT / "README.md").read_text()) and not RELATIVE.search(said)
