"""scripts/wheel_trials.py and scripts/sysroot.py: a wheel that is asked for by its version is the one that
comes, from a folder with all families, and another one would be found out."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vtok_fast.installation import gpus

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclasses look
    spec.loader.exec_module(module)
    return module


trials, sysroot = script("wheel_trials"), script("sysroot")


def fake(folder: Path, label: str) -> Path:
    """A wheel for this Python whose module is text."""
    version, tag = f"0.1.0+{label}".rstrip("+"), f"cp3{sys.version_info[1]}"
    info = f"vtok_fast-{version}.dist-info"
    path = folder / f"vtok_fast-{version}-{tag}-{tag}-linux_{trials.platform.machine()}.whl"
    files = {
        "vtok_fast/__init__.py": "",
        "vtok_fast/_C.so": label,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: vtok-fast\nVersion: {version}\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {path.stem.partition('-')[2]}\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return path


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """All families in one folder."""
    folder = tmp_path_factory.mktemp("together")
    return folder, {family: fake(folder, gpus.label(archs)) for family, archs in gpus.FAMILIES.items()}


@pytest.mark.parametrize("installer", ["uv", pytest.param("pip", marks=pytest.mark.slow)])
def test_the_wheel_that_is_asked_for_comes(together, tmp_path, installer):
    """Each in the place of the one before, the wheel for CPUs last, whose version has no label."""
    if installer == "uv" and importlib.util.find_spec("uv") is None:
        pytest.skip("uv is not installed")
    folder, wheels = together
    inside = trials.environment(sys.executable, tmp_path / "fresh", installer)
    for family in ("sm90a", gpus.ALL, "cpu"):
        trials.install(inside, installer, folder, wheels[family].name)
        assert trials.is_that(inside, wheels[family]).read_text() == gpus.label(gpus.FAMILIES[family])
    with pytest.raises(RuntimeError, match="what was installed has another vtok_fast/_C.so"):
        trials.is_that(inside, wheels["sm90a"])


def test_code_for_other_gpus_than_the_name_says_is_found(together, monkeypatch, tmp_path):
    folder, wheels = together
    monkeypatch.setattr(trials, "environment", lambda *where: Path("/t/bin/python"))
    for name in ("install", "is_that", "says_that_torch_is_missing"):
        monkeypatch.setattr(trials, name, lambda *words: None)
    for archs, family in (("90a", "sm90a"), ("80,89", "sm80-89"), ("", "cpu")):
        monkeypatch.setattr(trials, "holds", lambda *words, archs=archs: ("module loads", archs))
        for name, wheel in wheels.items():
            if name == family:
                assert trials.try_wheel(wheel, sys.executable, "pip", folder, None) == "module loads"
                continue
            with pytest.raises(RuntimeError, match=f"the module has code for {archs or 'no GPU'}"):
                trials.try_wheel(wheel, sys.executable, "pip", folder, None)


def test_wheels_of_other_machines_lie_beside(monkeypatch, tmp_path):
    here, other = fake(tmp_path, ""), "vtok_fast-0.1.0-cp311-cp311-manylinux_2_28_s390x.whl"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / other).write_bytes(here.read_bytes())
    tried = []
    monkeypatch.setattr(trials, "try_wheel", lambda wheel, *words: tried.append(wheel.name) or "held")
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    held, failed = trials.try_all(tmp_path, {python: sys.executable}, ("pip",), None)
    assert tried == [here.name] and not failed and held[0].beside == 1


def test_links_to_absolute_places_stay_in_the_folder(tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "usr" / "lib").mkdir(parents=True)
    (tmp_path / "lib" / "libdl.so.2").write_text("library")
    (tmp_path / "usr" / "lib" / "libdl.so").symlink_to("/lib/libdl.so.2")
    sysroot.unpack(tmp_path, [])
    assert (tmp_path / "usr" / "lib" / "libdl.so").read_text() == "library"
    assert (tmp_path / "usr" / "lib" / "libdl.so").resolve().is_relative_to(tmp_path.resolve())


def test_a_folder_without_a_system_is_refused(tmp_path):
    command = [sys.executable, SCRIPTS / "sysroot.py", tmp_path / "system", tmp_path / "no.deb"]
    assert subprocess.run(command, capture_output=True).returncode
    with pytest.raises(SystemExit, match=r"system has no headers and libraries of C\+\+ for x86_64"):
        sysroot.cmake_args(tmp_path / "system", "x86_64")


def test_a_compiler_is_pointed_at_the_folder(tmp_path):
    for release in ("9", "10"):
        (tmp_path / "usr" / "include" / "c++" / release).mkdir(parents=True)
    (tmp_path / "usr" / "lib" / "aarch64-linux-gnu").mkdir(parents=True)
    (tmp_path / "usr" / "lib" / "aarch64-linux-gnu" / "libc.so").touch()
    given = dict(argument[2:].split("=", 1) for argument in sysroot.cmake_args(tmp_path, "aarch64"))
    place = tmp_path.resolve()
    assert f"-isystem{place}/usr/include/c++/10" in given["CMAKE_CXX_FLAGS"].split()
    assert given["CMAKE_CUDA_FLAGS"] == f"-Xcompiler={given['CMAKE_CXX_FLAGS'].replace(' ', ',')}"
    assert f"-L{place}/usr/lib/gcc/aarch64-linux-gnu/10" in given["CMAKE_MODULE_LINKER_FLAGS"].split()
